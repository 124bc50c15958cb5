"""Causal tracing against whole models with hooks: one site, one draw at a time, in every architecture of the table."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import save_tiny_model
from small_runs import loud_toy, toy_recipe
from twins import hooks, language_subject

from spdcli.engine.interchange import KINDS, Interchange, Site, interchanged_run
from spdcli.errors import UsageError
from spdcli.location import tracing
from spdcli.location.subject_prompts import SubjectPrompt, subject_prompts
from spdcli.location.tracing import (
    TraceSettings,
    clean_and_corrupted,
    embedding_sigma,
    standard_error,
    trace_prompt,
    window_of,
)
from spdcli.targets.architectures import ARCHITECTURES
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.induction import toy_target
from spdcli.targets.prompts import encode

SUBJECT, ANSWER, WINDOW, SEED = (1, 2), 7, 2, 5
NUMBERS = ("probability", "effect", "standard_error")
SETTINGS = TraceSettings(noise=3.0, samples=2, window=WINDOW, seed=SEED)


@pytest.fixture(params=sorted(ARCHITECTURES))
def every_family(request, tmp_path):
    """A tiny random model of every family in float64; norms of the Llama family do not round to float32."""
    return language_subject(save_tiny_model(tmp_path, request.param))


@pytest.fixture(params=["gpt2", "llama"])
def subject(request, tmp_path):
    return language_subject(save_tiny_model(tmp_path, request.param))


def prompt_of(tokens, answer, subject):
    return SubjectPrompt(tokens, answer, subject, "a text", " answer", tuple(f" {token}" for token in tokens.tolist()))


def first_prompt(subject):
    return prompt_of(subject.batch.tokens[0], ANSWER, SUBJECT)


# What writes to the stream, where it is not the block's mlp and its attn, self_attn or attention.
WRITERS = {
    "bloom": ("mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon": ("mlp", "self_attention"),
    "opt": ("fc2", "self_attn"),
} | dict.fromkeys(("olmo2", "gemma2", "gemma3_text"), ("post_feedforward_layernorm", "post_attention_layernorm"))


def places(model):
    """Blocks, MLPs and attentions, by the names that transformers gives them."""
    blocks = list(next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList)))
    block = blocks[0]
    usual = next(name for name in ("attn", "self_attn", "attention", "self_attention") if hasattr(block, name))
    mlp, attention = WRITERS.get(model.config.model_type, ("mlp", usual))
    named = {"state": "", "mlp": mlp, "attention": attention}
    return {kind: [block.get_submodule(path) for block in blocks] for kind, path in named.items()}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run(model, tokens, noise, pieces):
    """The whole model once: `noise` `[2, D]` on the subject's embeddings (None: clean) and `pieces[module]`, a token
    and its value, put into what modules return. Gives P(answer) and what every module returned."""
    left = {}

    def noisy(module, args, output):
        changed = output.clone()
        if noise is not None:
            changed[0, list(SUBJECT)] += noise
        return changed

    def keep_or_put(module, args, output):
        stream = first(output).clone()
        row = stream.view(len(tokens), -1)  # OPT's MLP has no dimension for sequences
        if module in pieces:
            token, value = pieces[module]
            row[token] = value
        left[module] = row.clone()  # Falcon adds to it in place
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    watched = {module: keep_or_put for modules in places(model).values() for module in modules}
    # BLOOM has a norm between its embeddings and its first block.
    entering = getattr(model.base_model, "word_embeddings_layernorm", model.get_input_embeddings())
    with hooks({entering: noisy} | watched):
        logits = model(tokens[None], use_cache=False).logits[0, -1]
    return logits.softmax(-1)[ANSWER].item(), left


def draws(model):
    embedding = model.get_input_embeddings()(torch.arange(model.config.vocab_size))  # Gemma's are multiplied
    generator = torch.Generator().manual_seed(SEED)
    shape = (2, len(SUBJECT), embedding.shape[1])
    return 3.0 * embedding.std() * torch.randn(shape, generator=generator, dtype=torch.float64)


def one_site(model, tokens, noise, kind, token, layer, left):
    """P(answer) with the pieces that the run `left` behind, at one site."""
    modules = places(model)[kind]
    reach = [layer] if kind == "state" else range(layer - WINDOW // 2, layer + (WINDOW - 1) // 2 + 1)
    pieces = {modules[at]: (token, left[modules[at]][token]) for at in reach if 0 <= at < len(modules)}
    return run(model, tokens, noise, pieces)[0]


def test_every_site_is_the_whole_model_with_hooks(every_family, monkeypatch):
    subject, full = every_family, every_family.target.model.config.model_type in ("gpt2", "llama")
    monkeypatch.setattr(tracing, "CHUNK_BYTES", 5 * tracing.row_bytes(subject.target, 6))  # chunks that cut draws apart
    prompt, model = first_prompt(subject), subject.target.model
    result = trace_prompt(subject.target, prompt, SETTINGS)
    clean, left = run(model, prompt.tokens, None, {})
    corrupted = [run(model, prompt.tokens, noise, {}) for noise in draws(model)]
    mean = (corrupted[0][0] + corrupted[1][0]) / 2
    assert result.clean == pytest.approx(clean, rel=1e-9)
    assert result.corrupted == pytest.approx(mean, rel=1e-9)
    assert result.corrupted_standard_error == pytest.approx(abs(corrupted[0][0] - corrupted[1][0]) / 2, rel=1e-7)
    for kind in KINDS:
        for token in range(len(prompt.tokens)) if full else (2, 4):
            for layer in range(3) if full else (1,):
                restored = [one_site(model, prompt.tokens, noise, kind, token, layer, left) for noise in draws(model)]
                effects = [p - corrupt for p, (corrupt, _) in zip(restored, corrupted, strict=True)]
                at = {name: getattr(result.sites[kind], name)[token][layer] for name in NUMBERS}
                assert at["probability"] == pytest.approx(sum(restored) / 2, rel=1e-9)
                assert at["effect"] == pytest.approx(sum(effects) / 2, rel=1e-8, abs=1e-15)
                assert at["standard_error"] == pytest.approx(abs(effects[0] - effects[1]) / 2, rel=1e-6, abs=1e-15)
    assert result.sites["state"].effect[0] == [0.0, 0.0, 0.0]  # before the subject nothing differs
    assert result.sites["state"].probability[-1][-1] == pytest.approx(clean, rel=1e-9)


def test_the_best_sites_and_their_reverse(subject):
    prompt, model = first_prompt(subject), subject.target.model
    result = trace_prompt(subject.target, prompt, SETTINGS)
    corrupted = [run(model, prompt.tokens, noise, {}) for noise in draws(model)]
    wanted = [(kind, where) for kind in KINDS for where in ("subject", "after")]
    assert [(best.kind, best.where) for best in result.best] == wanted
    for best in result.best:
        tokens = SUBJECT if best.where == "subject" else (3, 4, 5)
        grid = result.sites[best.kind]
        assert best.position in tokens
        assert best.effect == max(max(grid.effect[token]) for token in tokens)
        assert best.effect == grid.effect[best.position][best.layer]
        assert best.standard_error == grid.standard_error[best.position][best.layer]
        place = (best.kind, best.position, best.layer)
        reverse = [one_site(model, prompt.tokens, None, *place, left) for _, left in corrupted]
        assert best.reverse == pytest.approx(sum(reverse) / 2, rel=1e-9)


def test_interchanges_of_all_kinds_in_one_batch(subject):
    """Rows that enter at every block, the last hidden state among them, are each what they are alone."""
    runs = clean_and_corrupted(subject.target, first_prompt(subject), 0.1, SETTINGS)
    sites = [Site("mlp", 2, 0, 1), Site("attention", 1, 0, 2), Site("state", 3, 0, 0), Site("state", 5, 2, 2)]
    interchanges = [Interchange(site, draw, 0) for site in sites for draw in (1, 0)]
    assert [one.site.entry for one in interchanges] == [0, 0, 0, 0, 1, 1, 3, 3]
    together = interchanged_run(subject.target, runs.calls, runs.corrupted, runs.clean, interchanges)
    for row, one in zip(together, interchanges, strict=True):
        alone = interchanged_run(subject.target, runs.calls, runs.corrupted, runs.clean, [one])[0]
        torch.testing.assert_close(row, alone, rtol=1e-10, atol=1e-12)
    answers = [round(p, 12) for p in runs.answers(together).tolist()]
    assert answers[-1] == answers[-2]  # the last hidden state alone decides, and is the clean one in either draw
    assert len(set(answers)) == len(interchanges) - 1
    with pytest.raises(AssertionError, match="ordered"):
        interchanged_run(subject.target, runs.calls, runs.corrupted, runs.clean, interchanges[::-1])
    assert not any(module._forward_hooks for module in subject.target.model.modules())


def test_seeds_and_noise(subject):
    prompt = first_prompt(subject)
    grid = lambda **changes: trace_prompt(subject.target, prompt, TraceSettings(window=1, **changes)).sites  # noqa: E731
    assert grid(samples=2, seed=1) == grid(samples=2, seed=1)
    assert grid(samples=2, seed=1) != grid(samples=2, seed=2)
    sigma = embedding_sigma(subject.target)
    named = grid(samples=2, sigma=2 * sigma, noise=1.5)["mlp"].effect
    torch.testing.assert_close(torch.tensor(named), torch.tensor(grid(samples=2, noise=3.0)["mlp"].effect))
    still = trace_prompt(subject.target, prompt, TraceSettings(noise=0.0, samples=1))
    assert still.corrupted == pytest.approx(still.clean, rel=1e-12)
    assert math.isnan(still.corrupted_standard_error)  # one draw has no spread
    assert max(abs(e) for row in still.sites["mlp"].effect for e in row) < 1e-12


@pytest.mark.parametrize(
    ("block", "window", "reach"),
    [(5, 10, (0, 9)), (6, 10, (1, 10)), (29, 10, (24, 29)), (4, 3, (3, 5)), (4, 2, (3, 4)), (7, 1, (7, 7))],
)
def test_windows_are_centred_and_cut_off(block, window, reach):
    assert window_of(block, window, 30) == reach


def test_standard_errors_by_hand():
    assert standard_error(torch.tensor([1.0, 2.0, 6.0])).item() == pytest.approx(math.sqrt(7 / 3))


PROMPTS = ["Kobe Bryant plays basketball", "Tiger Woods plays the sport of Tiger Woods golf"]


def test_subjects_are_found_by_text(tiny_gpt2_dir):
    language_model = load_model(str(tiny_gpt2_dir), "float64")
    prompts = encode(language_model.tokenizer, PROMPTS)
    positions = lambda *subjects: [prompt.subject for prompt in subject_prompts(prompts, subjects)]  # noqa: E731
    assert prompts.pieces[0] == ["K", "obe", " Bryant", " plays"]
    assert positions("Kobe Bryant", "Tiger Woods")[0] == (0, 1, 2)
    assert positions("Tiger", "Kobe", "Kobe Bryant")[0] == (0, 1)  # the first that it has
    assert positions(" Bryant", "Tiger")[0] == positions("Bryant", "Tiger")[0] == (2,)
    twice = positions("Kobe Bryant", "Tiger Woods")[1]
    assert [prompts.pieces[1][at] for at in twice] == ["T", "iger", " Woods", " ", "T", "iger", " Woods"]
    first, second = subject_prompts(prompts, ["Kobe"], ["the", "Tiger", "Kobe Bryant"])
    assert first.subject == (0, 1)
    assert [prompts.pieces[1][at] for at in second.subject] == [" the"]
    assert first.tokens.tolist() == prompts.fed(0)
    assert first.answer == language_model.tokenizer(" basketball")["input_ids"][0]
    for subjects in ((), ("Tiger Woods",)):
        with pytest.raises(UsageError, match=r"^which words of 'Kobe Bryant plays basketball' are its subject\?$"):
            subject_prompts(prompts, subjects)
    for subject in ("Koby", "Brya", "basketball", ""):
        with pytest.raises(UsageError, match=f"^no prompt has the subject '{subject}' as whole tokens$"):
            subject_prompts(prompts, [subject], ["Kobe", "Tiger"])
    prompt = subject_prompts(prompts, ["Kobe", "Woods"])[0]
    result = trace_prompt(build_target(language_model, True), prompt, TraceSettings(samples=1, window=1))
    assert [best.where for best in result.best] == ["subject", "after"] * 3
    ends = prompt_of(prompt.tokens[:2], 1, (0, 1))  # the subject is last: nothing comes after it
    result = trace_prompt(build_target(language_model, True), ends, TraceSettings(samples=1, window=1))
    assert [best.where for best in result.best] == ["subject"] * 3


def test_a_toy_is_refused(tmp_path):
    toy = loud_toy(toy_recipe(folder=tmp_path))
    with pytest.raises(UsageError, match="language model"):
        trace_prompt(toy_target(toy), prompt_of(torch.tensor([1, 2, 3]), 1, (0,)), SETTINGS)
