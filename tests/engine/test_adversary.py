"""Sign ascent on masks: by hand, against running the whole model, and in chunks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from twins import (
    KeyedNoise,
    Subject,
    close,
    decompose,
    language_subject,
    looked_at,
    matrix_inputs,
    one_by_one,
    swapped,
    toy_subject,
)

from spdcli.engine import adversary, step
from spdcli.engine.adversary import Attack, ascend, begin, corner
from spdcli.engine.forward import clean_pass
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise, chunk_masks
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.subcomponents import detached
from spdcli.engine.tables import LOSSES as LOSSES_TABLE
from spdcli.engine.variants import Numbers, Piece, Variant

PLENTY, TOLERANCE = 1e12, 1e-9
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.fixture
def subject(request, tiny_llama_dir) -> Subject:
    toy = lambda: toy_subject(layers=2, heads=2, feed_forward=True)  # noqa: E731
    return {"toy": toy, "llama": lambda: language_subject(tiny_llama_dir)}[request.param]()


def noise(seed=0):
    return Noise(torch.Generator().manual_seed(seed))


def attacked(subject, slices, shape, routed=False, delta=None, count=3, attack_delta=True):
    """Some variants of every kind of selection, with numbers drawn; those after the first replace fewer matrices."""
    names, batch, variants = slices.names, subject.batch, []
    widths = {name: slices.of(name).U.shape[1] for name in names}
    for number in range(count):
        own = names[2 * number :]
        where = {name: torch.rand(batch.tokens.shape) < 0.6 for name in own} if routed else None
        entry = min(subject.target.matrices[name].block for name in own)
        plain = Variant(f"{number}", "adversarial", frozenset(own), entry, 1.0, where, delta=delta)
        variants.append(begin(plain, widths, shape, noise(number), LIKE, attack_delta))
    return sorted(variants, key=lambda variant: variant.entry)


def everything(subject, slices, variants):
    """The numbers of `variants`, flat."""
    return [t for v in variants for own in v.numbers.values() for t in own]


def plan_run(subject, slices, budget):
    """What runs variants through the plan, and the importances that it does so with."""
    clean = clean_pass(subject.target, subject.batch, slices.names)
    with torch.no_grad():
        g, _ = slices.importance(clean.inputs, subject.batch.valid)

    def run(variants, consume):
        reconstruction(subject.target, detached(slices), clean, variants, g, noise(), budget, consume)

    return run, g


def slow_kl(subject, slices, g, variant):
    """The summed KL of a variant, every sequence by itself through the whole model, with every matrix formed."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(subject.batch.tokens)):
        real = subject.batch.valid[b]
        tokens = subject.batch.tokens[b, real][None]
        log_p = matrix_inputs(subject, tokens, slices.names)[1].log_softmax(-1)
        masks = {}
        for name in variant.matrices:
            moved, off = (t.expand(len(g[name]), real.numel(), -1)[b, real] for t in variant.numbers[name])
            off = off[:, 0] if variant.delta is None else torch.full_like(off[:, 0], variant.delta)
            where = torch.ones(len(moved), dtype=torch.bool)
            where = where if variant.routed is None else variant.routed[name][b, real]
            own = g[name][b, real]
            masks[name] = (own + (1 - own) * moved, off if slices.delta else 0 * off, where)
        with swapped(subject.target, slices, masks):
            log_q = subject.logits(tokens).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum(-1)[subject.batch.looked[b, real]].sum()
    return total


CASES = [
    ("toy", {"shape": (1, 1)}, "all", True),
    ("toy", {"shape": "everywhere", "routed": True}, "last", True),
    ("toy", {"shape": (1, 1), "routed": True}, "some", False),
    ("toy", {"shape": (1, 1), "delta": 0.5}, "last", True),
    ("llama", {"shape": "everywhere", "delta": 0.0}, "some", True),
    ("llama", {"shape": (1, 1)}, "last", False),
]


@pytest.mark.parametrize("budget", [3e4, PLENTY])
@pytest.mark.parametrize(("subject", "options", "looked", "delta"), CASES, indirect=["subject"])
def test_gradients_of_numbers_are_those_of_the_whole_model(subject, options, looked, delta, budget):
    subject.batch = looked_at(subject.batch, looked)
    slices = decompose(subject.target, delta=delta)
    shape = tuple(subject.batch.tokens.shape) if options["shape"] == "everywhere" else options["shape"]
    variants = attacked(subject, slices, **(options | {"shape": shape}))
    run, g = plan_run(subject, slices, budget)
    got = dict.fromkeys(variants, 0.0)

    def consume(variant, part, divergence):
        got[variant] += divergence.detach().sum()
        return divergence.sum()

    run(variants, consume)
    expected = [slow_kl(subject, slices, g, variant) for variant in variants]
    close(torch.stack([got[variant] for variant in variants]), torch.stack(expected).detach(), TOLERANCE)
    numbers = everything(subject, slices, variants)
    wanted = torch.autograd.grad(torch.stack(expected).sum(), numbers, allow_unused=True)
    for tensor, slow in zip(numbers, wanted, strict=True):
        close(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, 0 * tensor if slow is None else slow)
    assert all(parameter.grad is None for parameter in slices.parameters())
    assert sum(slow is not None and bool(slow.any()) for slow in wanted) > len(numbers) / 3


def test_ascent_by_hand():
    """Of f = 3 a - 2 b + 0 c: a rises by 0.3 a step to 1 and b falls to 0; c, and what f does not read, stay."""
    own = Numbers(torch.tensor([[[0.5, 0.5, 0.5]]]).requires_grad_(), torch.tensor([[[0.25]]]).requires_grad_())
    variant = Variant("", "adversarial", frozenset("m"), 0, 1.0, numbers={"m": own})
    seen = []

    def run(variants, consume):
        mask = variants[0].numbers["m"].mask
        seen.append(mask.detach().flatten().tolist())
        consume(variants[0], slice(0, 1), (mask * torch.tensor([3.0, -2.0, 0.0])).flatten()).backward()

    with torch.no_grad():  # as evaluation calls it
        ascend([variant], run, 3, 0.3)
    assert [[round(x, 6) for x in row] for row in seen] == [[0.5, 0.5, 0.5], [0.8, 0.2, 0.5], [1.0, 0.0, 0.5]]
    assert own.mask.flatten().tolist() == [1.0, 0.0, 0.5]
    assert own.delta.item() == 0.25
    assert own.mask.grad is None


@pytest.mark.parametrize("subject", ["toy"], indirect=True)
def test_ascent_finds_worse_masks_within_its_bounds(subject):
    slices = decompose(subject.target)
    run, g = plan_run(subject, slices, PLENTY)
    variants = attacked(subject, slices, (1, 1), attack_delta=False)
    deltas = [own.delta for v in variants for own in v.numbers.values()]
    held = torch.cat(deltas)
    before = [slow_kl(subject, slices, g, variant).item() for variant in variants]
    ascend(variants, run, 8, 0.1)
    after = [slow_kl(subject, slices, g, variant).item() for variant in variants]
    assert all(later > 1.2 * earlier for earlier, later in zip(before, after, strict=True))
    assert all(t.min() >= 0 and t.max() <= 1 for t in everything(subject, slices, variants))
    assert torch.equal(torch.cat(deltas), held)


@pytest.mark.parametrize("subject", ["toy"], indirect=True)
@pytest.mark.parametrize("routed", [False, True])
def test_masks_are_the_same_beside_others_in_a_chunk(subject, routed):
    """Beside a variant whose masks are drawn, numbers are written out by row; alone they are shared."""
    slices = decompose(subject.target)
    (variant,) = attacked(subject, slices, (1, 1), routed, count=1)
    _, g = plan_run(subject, slices, PLENTY)
    pieces = [Piece(variant, 0, 2), Piece(variant, 2, 3)]
    drawn = Piece(replace(variant, source="stochastic", numbers=None, routed=None), 0, 3)
    alone, beside = chunk_masks(pieces, slices, g), chunk_masks([*pieces, drawn], slices, g, noise())
    for name in slices.names:
        own, other = alone[name], beside[name]
        assert len(own.noise) == (3 if routed else 2)
        for part in ("noise", "delta"):
            wide = getattr(own, part)[own.draw].expand(-1, getattr(other, part).shape[1], -1)
            assert torch.equal(wide, getattr(other, part)[:3])


def test_corners():
    variant = Variant("", "adversarial", frozenset("ab"), 0, 1.0)
    made = begin(variant, {"a": 2, "b": 3}, (4, 5), corner(1.0), LIKE)
    assert {name: own.mask.shape for name, own in made.numbers.items()} == {"a": (4, 5, 2), "b": (4, 5, 3)}
    assert all(bool((t == 1).all()) and t.requires_grad for own in made.numbers.values() for t in own)


# --- in training --------------------------------------------------------------------------------------------------

LOSSES = {"adversarial_recon": 1.5, "adversarial_recon_partial": 0.5, "stochastic_recon": 1.0, "minimality": 0.1}


def training_step(subject, slices, attack, monkeypatch, subset="forward", budget=PLENTY, kept=None):
    """The losses of a step, its gradients and the variants it ran, and the losses and gradients of those one by one."""
    ran, found = [], adversary.attacked
    settings = LossSettings(LOSSES, subset=subset, attack=attack)
    monkeypatch.setattr(step, "attacked", lambda *arguments: ran.extend(found(*arguments)) or ran)
    clean = clean_pass(subject.target, subject.batch, slices.names)
    generator = torch.Generator().manual_seed(3)
    keyed = KeyedNoise(len(subject.batch.tokens))
    slices.zero_grad(set_to_none=True)
    done = step.backward_step(subject.target, slices, clean, settings, 0.6, generator, keyed, budget, kept)
    return done.losses, gradients_of(slices), ran, (settings, keyed)


def gradients_of(slices):
    return {n: p.grad.clone() for n, p in slices.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("subject", "subset", "attack", "budget"),
    [
        ("toy", "forward", Attack(steps=2), 1),
        ("toy", "position", Attack(True, 1, 0.1), PLENTY),
        ("llama", "position", Attack(steps=1, shared=False), 1e5),
    ],
    indirect=["subject"],
)
def test_an_attacked_step_is_the_one_by_one_evaluation(subject, subset, attack, budget, monkeypatch):
    slices = decompose(subject.target)
    losses, actual, ran, (settings, keyed) = training_step(subject, slices, attack, monkeypatch, subset, budget)
    assert [v.numbers is None for v in ran] == [LOSSES_TABLE[v.loss].source == "stochastic" for v in ran]
    slices.zero_grad(set_to_none=True)
    exact = settings.coefficients | {"faithfulness": 0.0}
    expected = one_by_one(subject, slices, replace(settings, coefficients=exact), 0.6, ran, keyed)
    for name, loss in losses.items():
        close(loss, expected[name], TOLERANCE)
    wanted = gradients_of(slices)
    for name, gradient in actual.items():
        close(gradient, wanted[name], TOLERANCE)


@pytest.mark.parametrize("subject", ["toy"], indirect=True)
def test_more_ascent_is_worse(subject, monkeypatch):
    found = []
    for steps in (1, 8):
        slices = decompose(subject.target)
        losses, *_ = training_step(subject, slices, Attack(steps=steps, size=0.1), monkeypatch)
        found.append(losses)
    assert found[1]["adversarial_recon"] > 1.05 * found[0]["adversarial_recon"]
    close(found[1]["minimality"], found[0]["minimality"])


@pytest.mark.parametrize("subject", ["toy"], indirect=True)
def test_a_persistent_adversary_goes_on_from_what_it_found(subject, monkeypatch):
    """Two steps of one ascent each at unchanged slices are a step of two; a fresh adversary starts anew."""
    slices, kept = decompose(subject.target), {}
    for _ in range(2):
        losses, _, ran, _ = training_step(subject, slices, Attack(True, 1, 0.1), monkeypatch, kept=kept)
    twice, *_ = training_step(subject, slices, Attack(False, 2, 0.1), monkeypatch)
    once, *_ = training_step(subject, slices, Attack(False, 1, 0.1), monkeypatch)
    close(losses["adversarial_recon"], twice["adversarial_recon"])
    assert losses["adversarial_recon"] > once["adversarial_recon"]
    assert len(kept) >= 2 * len(slices.names)
    by_loss = defaultdict(dict, {variant.loss: variant.numbers for variant in ran if variant.numbers})
    for key, tensor in kept.items():
        loss, name, kind = key.split(".")
        if loss == "adversarial_recon":
            assert torch.equal(tensor, getattr(by_loss[loss][name], kind))
            assert not tensor.requires_grad
