"""The engine's one pass over a plan against running the whole model for every variant and every sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_model
from torch import nn
from twins import (
    COEFFICIENTS,
    DRAWN,
    KeyedNoise,
    Subject,
    close,
    decompose,
    feature_subject,
    language_subject,
    looked_at,
    matrix_inputs,
    one_by_one,
    swapped,
    toy_subject,
)

from spdcli.engine.direct_losses import exact_faithfulness
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.masks import Noise, importance_masks
from spdcli.engine.part_tables import IMPORTANCE_FUNCTIONS
from spdcli.engine.reconstruction import reconstruction
from spdcli.engine.step import backward_step
from spdcli.engine.subcomponents import SliceSet
from spdcli.engine.target import Batch, Matrix, Target
from spdcli.engine.variants import Piece, Variant, draw_variants, fixed_variant

TOLERANCE = 1e-9  # float64, after some hundred passes of three blocks are summed
P = 0.6
PLENTY = 1e12


@pytest.fixture
def subject(request, tmp_path, tiny_gpt2_dir, tiny_llama_dir) -> Subject:
    return {
        "toy": lambda: toy_subject(),
        "toy with everything": lambda: toy_subject(
            layers=3, heads=2, layer_norm=True, feed_forward=True, output_projection=True, positions="added"
        ),
        "gpt2": lambda: language_subject(tiny_gpt2_dir),
        "gpt2 split": lambda: language_subject(tiny_gpt2_dir, split_attention=True),
        "llama": lambda: language_subject(tiny_llama_dir),
        "gpt_neox split": lambda: language_subject(save_tiny_model(tmp_path, "gpt_neox"), split_attention=True),
        "tms": lambda: feature_subject("tms"),
        "resid_mlp": lambda: feature_subject("resid_mlp"),
    }[request.param]()


def engine_step(subject, decomposition, settings, budget=PLENTY, seed=3):
    """The step's losses and the gradients it left."""
    decomposition.zero_grad(set_to_none=True)
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    generator = torch.Generator().manual_seed(seed)
    noise = KeyedNoise(len(subject.batch.tokens))
    done = backward_step(subject.target, decomposition, clean, settings, P, generator, noise, budget)
    return done, gradients_of(decomposition)


def slow_step(subject, decomposition, settings, seed=3):
    decomposition.zero_grad(set_to_none=True)
    blocks = {name: subject.target.matrices[name].block for name in decomposition.names}
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(subject.batch.valid.shape)
    variants = draw_variants(
        settings.reconstruction,
        blocks,
        settings.samples,
        settings.subset,
        shape,
        generator,
        delta=settings.delta_mask,
        delta_masks=settings.delta_masks if decomposition.delta else "position",
    )
    noise = KeyedNoise(len(subject.batch.tokens))
    return one_by_one(subject, decomposition, settings, P, variants, noise), gradients_of(decomposition)


def gradients_of(decomposition):
    return {n: p.grad.clone() for n, p in decomposition.named_parameters() if p.grad is not None}


def agree(actual, expected, tolerance=TOLERANCE):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        try:
            close(actual[name], value, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


SETTINGS = {
    "all": {"looked": "all", "delta": True},
    "last": {"looked": "last", "delta": False, "samples": 2},
    "routed": {"looked": "some", "delta": True, "subset": "position", "reverse_kl": True},
    "routed last": {"looked": "last", "delta": True, "subset": "position"},
    "routed without delta": {"looked": "all", "delta": False, "subset": "position", "samples": 2},
    "some": {"looked": "some", "delta": False, "reverse_kl": True},
    "hidden at blocks": {"looked": "some", "delta": True, "subset": "position", "hidden_at": "block"},
    "hidden by sequence": {"looked": "some", "delta": True, "subset": "position", "hidden_scale": "sequence"},
    "blocks by sequence": {"looked": "all", "delta": False, "hidden_at": "block", "hidden_scale": "sequence"},
    "smooth": {"looked": "some", "delta": True, "penalty": "smooth_l0", "frequency_tokens": 20},
    "delta on": {"looked": "some", "delta": True, "delta_mask": 1.0},
    "delta on, routed": {"looked": "all", "delta": True, "delta_mask": 1.0, "subset": "position"},
    "corners": {"looked": "all", "delta": True, "delta_masks": "corner", "samples": 2},
    "one delta mask": {"looked": "some", "delta": True, "delta_masks": "forward", "subset": "position"},
    "no delta to draw": {"looked": "last", "delta": False, "delta_masks": "corner"},
}
CASES = [
    ("toy", "attention", "all"),
    ("toy", "attention", "last"),
    ("toy", "scalar", "routed"),
    ("toy", "shared", "routed without delta"),
    ("toy with everything", "attention", "some"),
    ("toy with everything", "vector", "routed without delta"),
    ("toy with everything", "scalar", "all"),
    ("gpt2", "vector", "last"),
    ("gpt2", "attention", "routed"),
    ("gpt2", "scalar", "some"),
    ("gpt_neox split", "vector", "all"),
    ("gpt2 split", "vector", "all"),
    ("gpt2 split", "shared", "routed without delta"),
    ("gpt2 split", "scalar", "last"),
    ("llama", "vector", "all"),
    ("llama", "scalar", "last"),
    ("llama", "shared", "routed last"),
    ("llama", "attention", "some"),
    ("toy with everything", "scalar", "delta on"),
    ("gpt2 split", "vector", "delta on, routed"),
    ("llama", "scalar", "smooth"),
    ("gpt2 split", "vector", "hidden at blocks"),
    ("toy with everything", "scalar", "hidden at blocks"),
    ("gpt2 split", "vector", "hidden by sequence"),
    ("toy", "scalar", "blocks by sequence"),
    ("toy", "global", "last"),
    ("llama", "global", "all"),
    ("llama", "vector", "delta on"),
    ("toy", "vector", "corners"),
    ("gpt2 split", "scalar", "one delta mask"),
    ("toy", "scalar", "no delta to draw"),
    ("tms", "scalar", "all"),
    ("tms", "vector", "routed"),
    ("resid_mlp", "scalar", "last"),
    ("resid_mlp", "shared", "routed without delta"),
]


@pytest.mark.parametrize(("subject", "kind", "name"), CASES, indirect=["subject"])
def test_a_step_is_the_one_by_one_evaluation(subject, kind, name):
    options = dict(SETTINGS[name])
    subject.batch = looked_at(subject.batch, options.pop("looked"))
    decomposition = decompose(subject.target, delta=options.pop("delta"), kind=kind)
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6, **options)
    done, actual = engine_step(subject, decomposition, settings)
    expected_losses, expected = slow_step(subject, decomposition, settings)
    agree(done.losses, expected_losses)
    assert all(loss > 1e-4 for loss in expected_losses.values())  # nothing agrees by being zero
    assert set(expected) == {name for name, p in decomposition.named_parameters() if p.requires_grad}
    agree(actual, expected)
    g = torch.cat([g[subject.batch.valid].flatten() for g in raw_importances(subject, decomposition).values()])
    for part in (g < 0, g > 1, (g > 0) & (g < 1)):  # both leaks took part
        assert part.any()


def raw_importances(subject, decomposition):
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    read = {name: decomposition.of(name).U for name in decomposition.names}
    return decomposition.importances(clean.inputs, read, subject.batch.valid)


PARTS = [
    ("gpt2 split", ["h.1.attn.c_attn.q", "h.1.attn.c_attn.v", "h.2.mlp.c_proj"]),  # k stays, block 0 stays
    ("gpt2", ["h.2.attn.c_attn"]),
    ("llama", ["layers.0.self_attn.k_proj", "layers.2.mlp.down_proj"]),
    ("toy", ["K1", "V1"]),
]


@pytest.mark.parametrize(("subject", "names"), PARTS, indirect=["subject"])
def test_some_matrices_only(subject, names):
    decomposition = decompose(subject.target, names)
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6, samples=2)
    done, actual = engine_step(subject, decomposition, settings)
    losses, expected = slow_step(subject, decomposition, settings)
    agree(done.losses, losses)
    agree(actual, expected)


@pytest.mark.parametrize("loss", DRAWN)
@pytest.mark.parametrize("subject", ["toy"], indirect=True)
def test_a_loss_alone_is_what_it_is_among_others(subject, loss):
    decomposition = decompose(subject.target)
    settings = LossSettings({loss: 2.0})
    done, actual = engine_step(subject, decomposition, settings)
    losses, expected = slow_step(
        subject, decomposition, replace(settings, coefficients=dict.fromkeys(COEFFICIENTS, 0) | {loss: 2.0})
    )
    assert set(done.losses) == {loss}
    close(done.losses[loss], losses[loss], TOLERANCE)
    agree(actual, {name: expected[name] for name in actual})
    # A loss with coefficient 0 leaves no gradient; the slow one leaves zeros.
    assert not any(gradient.any() for name, gradient in expected.items() if name not in actual)


@pytest.mark.parametrize("subset", ["forward", "position"])
@pytest.mark.parametrize("subject", ["toy with everything", "gpt2 split", "llama"], indirect=True)
def test_memory_changes_nothing(subject, subset):
    decomposition = decompose(subject.target, kind="scalar")
    subject.batch = looked_at(subject.batch, "some")  # sequence 1 alone in a chunk has nothing to be looked at
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6, subset=subset)
    done, expected = engine_step(subject, decomposition, settings, PLENTY)
    for budget in (1, 3e5, 3e6):  # one row a chunk, some rows, some variants
        again, actual = engine_step(subject, decomposition, settings, budget)
        agree(again.losses, done.losses)
        agree(actual, expected)


@pytest.mark.parametrize("subject", ["toy", "gpt2", "llama"], indirect=True)
def test_a_plan_is_cut_as_memory_asks(subject, monkeypatch):
    decomposition = decompose(subject.target)
    rows = []
    block = subject.target.blocks[-1]
    block.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for budget in (1, PLENTY):
        rows.clear()
        engine_step(subject, decomposition, LossSettings({"recon_layerwise": 1.0}), budget)
        sequences, variants = len(subject.batch.tokens), len(decomposition.names)
        clean, *plan = rows
        assert clean == sequences
        assert plan == ([1] * (sequences * variants) if budget == 1 else [sequences * variants])


@pytest.mark.parametrize("subject", ["toy", "toy with everything", "gpt2 split", "llama"], indirect=True)
def test_each_layerwise_variant_starts_where_it_differs(subject):
    """Half a pass, batched, instead of L passes: block b sees the variants of the blocks up to b."""
    decomposition = decompose(subject.target)
    seen = []
    for block in subject.target.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    engine_step(subject, decomposition, LossSettings({"recon_layerwise": 1.0}))
    count, blocks = len(subject.batch.tokens), len(subject.target.blocks)
    each = len(decomposition.names) // blocks
    assert seen == [count] * blocks + [count * each * (b + 1) for b in range(blocks)]


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("subject", ["toy", "gpt2", "llama"], indirect=True)
def test_as_many_sequences_as_positions_or_one(subject, count):
    """A block's argument [T, D] must not be taken for one with the sequences first."""
    tokens = torch.randint(11, (count, 7), generator=torch.Generator().manual_seed(8))
    subject.batch = Batch(tokens, tokens >= 0, tokens >= 0)
    decomposition = decompose(subject.target, list(subject.target.matrices)[:4])
    settings = LossSettings(
        {name: COEFFICIENTS[name] for name in set(COEFFICIENTS) - set(DRAWN)}
        | {"recon": 1.0, "stochastic_recon_layerwise": 1.0}
    )
    losses, expected = slow_step(subject, decomposition, settings)
    for budget in (1, PLENTY):
        done, actual = engine_step(subject, decomposition, settings, budget)
        agree(done.losses, losses)
        agree(actual, expected)


class ToldBlock(nn.Module):
    """A block that is told things about its sequences, in several ways, and answers with a tuple."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(4, 4)

    def forward(self, hidden, gain, told):
        shifts, _ = told["shifts"]
        return hidden + self.read(hidden) * gain + shifts[0] + told["shared"], None


def told_subject():
    torch.manual_seed(2)
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(ToldBlock() for _ in range(3)), "embed": nn.Embedding(9, 4)}
    ).double()
    model.requires_grad_(False)
    tokens = torch.randint(9, (3, 5))

    def run(tokens):
        hidden = model["embed"](tokens)
        gain = tokens[:, :1, None].double() + 1  # another one for every sequence
        told = {"shifts": ([hidden.cos()], None), "shared": torch.ones(4, dtype=torch.float64)}
        for block in model["blocks"]:
            hidden, _ = block(hidden, gain, told=told)
        return hidden

    head = model["embed"].weight
    target = Target(
        model=model,
        blocks=list(model["blocks"]),
        run=run,
        finish=torch.tanh,
        unembedding=head,
        unembedding_bias=None,
        embedding=head,
        matrices={f"m{i}": Matrix(f"m{i}", block.read, i, (0, 4), True) for i, block in enumerate(model["blocks"])},
    )
    return Subject(target, lambda t: run(t).tanh()[0] @ head.t(), Batch(tokens, tokens >= 0, tokens >= 0))


@pytest.mark.parametrize("budget", [1, 3e3, PLENTY])
def test_what_a_block_is_told_about_a_sequence_follows_its_rows(budget):
    subject = told_subject()
    decomposition = decompose(subject.target, slices=2)
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6)
    done, actual = engine_step(subject, decomposition, settings, budget)
    losses, expected = slow_step(subject, decomposition, settings)
    agree(done.losses, losses)
    agree(actual, expected)


def test_masks_are_drawn_uniformly():
    piece = Piece(Variant("stochastic_recon", "stochastic", frozenset("m"), 0, 1.0), 0, 4)
    drawn = [torch.empty(4, 50, 50) for _ in range(3)]
    for seed, out in zip((1, 1, 2), drawn, strict=True):
        Noise(torch.Generator().manual_seed(seed))(out, piece, "m", "mask")
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    tenths = (drawn[0] * 10).long().flatten().bincount(minlength=10)
    assert len(tenths) == 10
    assert ((tenths - 1000).abs() < 5 * 30).all()  # 10000 numbers; sqrt(1000 * 0.9) = 30


@pytest.mark.parametrize("subject", ["toy", "gpt2 split", "llama"], indirect=True)
def test_full_masks_are_the_target(subject):
    """With every mask and the delta at 1 a stochastic variant is the target itself, and its KL is rounding."""

    class Ones(Noise):
        def __call__(self, out, piece, name, kind):
            out.fill_(1.0)

    decomposition = decompose(subject.target)
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    settings = LossSettings({"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0})
    done = backward_step(subject.target, decomposition, clean, settings, P, torch.Generator(), Ones(None), PLENTY)
    assert all(0 <= loss < 1e-20 for loss in done.losses.values())


@pytest.mark.parametrize("subject", ["toy", "gpt2", "llama"], indirect=True)
def test_the_clean_pass_is_the_model(subject):
    names = list(subject.target.matrices)
    clean = clean_pass(subject.target, looked_at(subject.batch, "some"), names)
    at = 0
    for b, tokens in enumerate(subject.batch.tokens):
        real = subject.batch.valid[b]
        inputs, logits = matrix_inputs(subject, tokens[real][None], names)
        for name in names:
            close(clean.inputs[name][b, real], inputs[name][0], TOLERANCE)
        for t in clean.batch.looked[b].nonzero()[:, 0].tolist():
            assert clean.at.spots[at] == b * tokens.shape[-1] + t
            close(clean.log_probs[at], logits[t].log_softmax(-1), TOLERANCE)
            at += 1
    assert at == len(clean.log_probs)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("subject", ["toy", "gpt2 split", "llama"], indirect=True)
def test_logits_of_the_active_slices_alone(subject, delta):
    decomposition = decompose(subject.target, delta=delta)
    clean = clean_pass(subject.target, looked_at(subject.batch, "last"), decomposition.names)
    lower, _ = decomposition.importance(clean.inputs, subject.batch.valid)
    actual = masked_logits(subject.target, decomposition, clean, importance_masks(lower, delta))
    for b, tokens in enumerate(subject.batch.tokens):
        real = subject.batch.valid[b]
        off = torch.zeros(int(real.sum()), dtype=torch.float64)
        with (
            torch.no_grad(),
            swapped(subject.target, decomposition, {n: (g[b, real], off, off == 0) for n, g in lower.items()}),
        ):
            close(actual[b], subject.logits(tokens[real][None])[-1], TOLERANCE)


@pytest.mark.parametrize("budget", [1, 3e5, PLENTY])
@pytest.mark.parametrize("subject", ["toy with everything", "gpt2 split", "llama"], indirect=True)
def test_fixed_masks_are_the_same_everywhere(subject, budget):
    """Slices cut out of the target (delta 1) and slices alone (delta 0) in one plan, as ablation asks for them."""
    target = subject.target
    slices = decompose(target)
    names, blocks = slices.names, {name: target.matrices[name].block for name in slices.names}
    draw = lambda chosen: {name: torch.randint(2, (5,)).double() for name in chosen}  # noqa: E731
    wanted = [(draw(names), 0.0), (draw(names[1:3]), 1.0), (draw(names[-1:]), 1.0), (draw(names[-2:]), 0.0)]
    variants = [fixed_variant(str(i), masks, blocks, delta) for i, (masks, delta) in enumerate(wanted)]
    variants.sort(key=lambda variant: variant.entry)
    clean = clean_pass(target, subject.batch, names)
    got = {}

    def consume(variant, sequences, divergence):
        got[variant.loss, sequences.start] = divergence

    with torch.no_grad():
        reconstruction(
            target,
            SliceSet(dict(zip(names, map(slices.of, names), strict=True)), False),
            clean,
            variants,
            {},
            Noise(torch.Generator()),
            budget,
            consume,
        )
    for i, (masks, delta) in enumerate(wanted):
        pieces = torch.cat([got[key] for key in sorted(got) if key[0] == str(i)])
        expected = []
        for b, tokens in enumerate(subject.batch.tokens):
            tokens = tokens[subject.batch.valid[b]][None]
            everywhere = torch.ones(tokens.shape[1], dtype=torch.float64)
            full = {n: (m.expand(len(everywhere), -1), delta * everywhere, everywhere > 0) for n, m in masks.items()}
            with torch.no_grad():
                log_p = subject.logits(tokens).log_softmax(-1)
                with swapped(target, slices, full):
                    log_q = subject.logits(tokens).log_softmax(-1)
            expected.append((log_p.exp() * (log_p - log_q)).sum(-1))
        close(pieces, torch.cat(expected), TOLERANCE)


def test_active_counts_real_positions_only(tiny_gpt2_dir):
    subject = language_subject(tiny_gpt2_dir)
    decomposition = decompose(subject.target)
    done, _ = engine_step(subject, decomposition, LossSettings({"recon": 1.0}))
    for name, raw in raw_importances(subject, decomposition).items():
        active = sum(int((raw[b, t] > 0).sum()) for b, t in subject.batch.valid.nonzero().tolist())
        assert done.active[name].item() == pytest.approx(active / 14)  # 6 + 3 + 5 real positions


@pytest.mark.parametrize("subject", ["toy", "gpt2"], indirect=True)
def test_evaluation_without_gradient_gives_every_kl(subject):
    """`reconstruction` hands each variant's KLs to `consume`, position by position, in the order of the batch."""
    decomposition = decompose(subject.target)
    names = frozenset(decomposition.names)
    variant = Variant("recon", "importance", names, 0, 1.0)
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    lower, _ = decomposition.importance(clean.inputs)
    got = {}

    def consume(variant, sequences, divergence):
        got[sequences.start] = divergence

    with torch.no_grad():
        reconstruction(subject.target, decomposition, clean, [variant], lower, Noise(torch.Generator()), 1, consume)
    assert [len(got[b]) for b in sorted(got)] == subject.batch.looked.sum(1).tolist()
    done, _ = engine_step(subject, decomposition, LossSettings({"recon": 1.0}))
    close(torch.cat([got[b] for b in sorted(got)]).mean(), done.losses["recon"], TOLERANCE)


@pytest.mark.parametrize("kind", sorted(IMPORTANCE_FUNCTIONS))
def test_importances_do_not_depend_on_padding(kind, tiny_gpt2_dir):
    subject = language_subject(tiny_gpt2_dir)
    decomposition = decompose(subject.target, ["h.1.mlp.c_fc"], kind=kind)
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    together = decomposition.importance(clean.inputs, subject.batch.valid)
    for b, tokens in enumerate(subject.batch.tokens):
        real = subject.batch.valid[b]
        inputs, _ = matrix_inputs(subject, tokens[real][None], decomposition.names)
        alone = decomposition.importance(inputs)
        for padded, plain in zip(together, alone, strict=True):
            close(padded["h.1.mlp.c_fc"][b, real], plain["h.1.mlp.c_fc"][0], TOLERANCE)


def test_a_step_in_bfloat16(tiny_gpt2_dir):
    subject = language_subject(tiny_gpt2_dir)
    decomposition = decompose(subject.target)
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6)
    exact, _ = engine_step(subject, decomposition, settings)
    subject.target.model.bfloat16()
    decomposition.float()  # slices and gates of a narrower target are float32
    clean = clean_pass(subject.target, subject.batch, decomposition.names)
    generator, noise = torch.Generator().manual_seed(3), Noise(torch.Generator().manual_seed(0))
    done = backward_step(subject.target, decomposition, clean, settings, P, generator, noise, PLENTY)
    assert all(gradient.isfinite().all() for gradient in gradients_of(decomposition).values())
    # The masks are drawn anew, so the stochastic losses differ; 8 bits and three random blocks give the others 5 %.
    for name in ("recon", "recon_layerwise", "minimality", "faithfulness"):
        assert done.losses[name].item() == pytest.approx(exact.losses[name].item(), rel=0.05)


@pytest.mark.parametrize("subject", ["toy", "gpt2 split", "llama"], indirect=True)
@pytest.mark.parametrize("subset", ["forward", "position"])
def test_blocks_in_half_precision_and_losses_in_full(subject, subset):
    """The same draws, so that 8 bits in the products are all that differs; what is no block's is exactly the same."""
    subject.target.model.float()
    subject.target.unembedding = subject.target.unembedding.float()
    decomposition = decompose(subject.target).float()
    for name, matrix in subject.target.matrices.items():
        assert matrix.weight.dtype == torch.float32, name
    settings = LossSettings(COEFFICIENTS, epsilon=1e-6, subset=subset)
    exact, wanted = engine_step(subject, decomposition, settings)
    done, gradients = engine_step(subject, decomposition, replace(settings, half=True))
    assert {loss.dtype for loss in done.losses.values()} <= {torch.float32, torch.float64}
    for name in ("minimality", "faithfulness"):
        assert torch.equal(done.losses[name], exact.losses[name])
    for name in DRAWN:
        assert done.losses[name] != exact.losses[name]
        assert done.losses[name].item() == pytest.approx(exact.losses[name].item(), rel=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.98, name


def breaks(module):
    def forward(*args, **kwargs):
        raise RuntimeError("broken block")

    module.forward = forward


def untouched(target, before):
    for module in target.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert {name: "forward" in vars(module) for name, module in target.model.named_modules()} == before


@pytest.mark.parametrize("subject", ["toy", "gpt2 split", "llama"], indirect=True)
def test_a_step_leaves_the_model_as_it_was_even_when_it_breaks(subject):
    target = subject.target
    patched = {name: "forward" in vars(module) for name, module in target.model.named_modules()}
    logits = subject.logits(subject.batch.tokens[:1])
    weights = {name: p.clone() for name, p in target.model.named_parameters()}
    decomposition = decompose(target)
    engine_step(subject, decomposition, LossSettings(COEFFICIENTS, epsilon=1e-6))
    untouched(target, patched)
    assert all(p.grad is None for p in target.model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in target.model.named_parameters())

    clean = clean_pass(target, subject.batch, decomposition.names)
    breaks(target.blocks[1])
    for run in (
        lambda: clean_pass(target, subject.batch, decomposition.names),
        lambda: backward_step(
            target, decomposition, clean, LossSettings({"recon": 1.0}), P, torch.Generator(), KeyedNoise(3), PLENTY
        ),
    ):
        with pytest.raises(RuntimeError, match="broken block"):
            run()
    del target.blocks[1].forward
    untouched(target, patched)
    assert torch.equal(subject.logits(subject.batch.tokens[:1]), logits)


@pytest.mark.parametrize("subject", ["gpt2 split"], indirect=True)
def test_cheaper_estimates_are_unbiased(subject):
    """Sampled layerwise and probed faithfulness: the mean loss and gradient of many steps is the exact one's."""
    decomposition = decompose(subject.target)
    settings = LossSettings({"recon_layerwise": 1.0, "faithfulness": 1.0})
    exact, wanted = engine_step(subject, decomposition, settings)
    cheap = replace(settings, layerwise_matrices=6, faithfulness_probes=4)
    steps = [engine_step(subject, decomposition, cheap, seed=seed) for seed in range(60)]
    for name, value in exact.losses.items():
        drawn = torch.stack([done.losses[name] for done, _ in steps])
        assert drawn.std() > 0
        assert abs(drawn.mean() - value) < 4 * drawn.std() / len(steps) ** 0.5
    for name in ("slices.h/1/mlp/c_fc.U", "slices.h/0/attn/c_attn/q.V", "importances.gates.h/1/mlp/c_fc.b2"):
        drawn = torch.stack([gradients.get(name, torch.zeros_like(wanted[name])) for _, gradients in steps])
        apart = (drawn.mean(0) - wanted[name]) / (drawn.std(0) / len(steps) ** 0.5).clamp(min=1e-12)
        assert apart.square().mean().sqrt() < 2  # z scores: about 1 when unbiased


@pytest.mark.parametrize("subject", ["toy"], indirect=True)
def test_faithfulness_is_exact(subject):
    decomposition = decompose(subject.target)
    squares = [
        (m.weight - decomposition.of(n).U @ decomposition.of(n).V).square() for n, m in subject.target.matrices.items()
    ]
    close(exact_faithfulness(subject.target, decomposition), torch.cat([s.flatten() for s in squares]).mean())
