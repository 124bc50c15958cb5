"""`spd eval` of a language model against the same numbers worked out one position at a time."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from slow_evaluation import CPU, FLOAT32, LOSSES, NOISE, TOY, kl, masked, stand_ins, steady_noise, unsettle  # noqa: F401
from small_runs import model_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.engine import tables
from spdcli.engine.forward import clean_pass
from spdcli.measures.evaluation import evaluate
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject


def slow_model(model, ids, names, weight_at):
    """Log-probabilities `[T, N]` of one prompt without padding, the modules `names` computed position by position.

    Returns also what each of them reads, `[T, I]`.
    """
    reads, handles = {}, []
    modules = dict(model.base_model.named_modules())
    for name in names:

        def hook(module, args, output, name=name):
            reads[name] = args[0][0]
            out = torch.stack([x @ weight_at(name, t) for t, x in enumerate(reads[name])])
            bias = getattr(module, "bias", None)
            return (out if bias is None else out + bias)[None]

        handles.append(modules[name].register_forward_hook(hook))
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return log_probs, reads


NAMES = {
    "gpt2": ["h.0.mlp.c_fc", "h.1.attn.c_attn", "h.1.mlp.c_proj"],
    "llama": ["layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.down_proj"],
}


@torch.no_grad()
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("answers", ["held_out", "fed"])
@pytest.mark.parametrize("kind", NAMES)
def test_a_language_models_numbers_are_those_of_a_slow_evaluation(request, tmp_path, kind, answers, last_only):
    folder, names = request.getfixturevalue(f"tiny_{kind}_dir"), NAMES[kind]
    settings = [f"data.answers={answers}", f"losses.last_token_only={str(last_only).lower()}", "slices.delta=true"]
    recipe = model_recipe(folder, *settings, folder=tmp_path)
    subject = language_subject(recipe, CPU)
    decomposition = unsettle(start_decomposition(recipe, subject, names))
    ours = evaluate(subject, decomposition, 0, 0.1, seed=0)

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    modules = dict(model.base_model.named_modules())
    weights = {name: modules[name].weight if kind == "gpt2" else modules[name].weight.T for name in names}
    losses = {loss: [] for loss in LOSSES}
    active, seen = {name: {} for name in names}, {name: set() for name in names}
    entropy, chances, right = {"target": [], "masked": []}, [], {"target": 0, "masked": 0}
    for prompt, text in enumerate(recipe.data.prompts):
        ids = tokenizer(text)["input_ids"]
        fed = ids[:-1] if answers == "held_out" else ids
        clean, reads = slow_model(model, fed, names, lambda name, t: weights[name])
        g, _ = decomposition.importance({name: reads[name][None] for name in names})

        def run(chosen, source, fed=fed, g=g):
            return slow_model(model, fed, names, stand_ins(weights, decomposition, g, chosen, source))[0]

        looked = [len(ids) - 2] if last_only else range(len(fed))
        for loss in LOSSES:
            source, scope = tables.LOSSES[loss].source, tables.LOSSES[loss].scope
            sets = [[name] for name in names] if scope == "each" else [names]
            variants = [run(chosen, source) for chosen in sets]
            losses[loss].append([kl(clean[t], variant[t]) for variant in variants for t in looked])
        alone = run(names, "importance")
        for t in looked:
            if t + 1 < len(ids):
                entropy["target"].append(-clean[t, ids[t + 1]].item())
                entropy["masked"].append(-alone[t, ids[t + 1]].item())
        chances.append((text, ids[-1], clean[len(ids) - 2, ids[-1]].exp().item(), alone[len(ids) - 2, ids[-1]].exp()))
        for model_name, log_probs in (("target", clean), ("masked", alone)):
            right[model_name] += int(log_probs[len(ids) - 2].argmax() == ids[-1])
        for name in names:
            for t in range(len(fed)):
                on = [c for c, value in enumerate(g[name][0, t]) if value > 0.1]
                active[name][f"{prompt + 1}:{t}"] = len(on)
                seen[name] |= set(on)

    assert ours.active_at == active
    assert ours.unique == {name: len(slices) for name, slices in seen.items()}
    assert 0 < ours.total_active == sum(ours.unique.values()) < ours.total_slices
    for loss, (first, second) in losses.items():  # a mean over positions: the longer prompt counts for more
        mean = statistics.mean(first + second)
        off = [len(values) * (statistics.mean(values) - mean) for values in (first, second)]
        assert ours.metrics[loss] == pytest.approx(mean, **FLOAT32)
        error = math.sqrt(2 * (off[0] ** 2 + off[1] ** 2)) / (len(first) + len(second))
        assert ours.standard_error[loss] == pytest.approx(error, **FLOAT32)
    for model_name, values in entropy.items():
        assert getattr(ours.cross_entropy, model_name) == pytest.approx(statistics.mean(values), **FLOAT32)
    assert plain(ours.accuracy) == {model_name: count / 2 for model_name, count in right.items()}
    for answer, (text, token, target, alone) in zip(ours.answers, chances, strict=True):
        assert (answer.prompt, answer.answer) == (text, tokenizer.decode([token]))
        assert answer.target == pytest.approx(target, **FLOAT32)
        assert answer.masked == pytest.approx(float(alone), **FLOAT32)
    assert ours.metrics["recon"] > 0.01


def test_one_prompt_has_no_standard_error(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, 'data.prompts=["Woods plays golf"]', folder=tmp_path)
    subject = language_subject(recipe, CPU)
    evaluation = evaluate(subject, start_decomposition(recipe, subject, ["h.1.mlp.c_fc"]), 0, 0.0, seed=0)
    assert math.isnan(evaluation.standard_error["recon"])
    assert evaluation.sequences == 1


@torch.no_grad()
def test_a_slice_that_is_active_at_padding_alone_is_not_active(tmp_path, tiny_gpt2_dir):
    settings = ["importance.gate_width=1", "importance.activation=relu"]
    recipe = model_recipe(tiny_gpt2_dir, *settings, folder=tmp_path)
    subject = language_subject(recipe, CPU)
    decomposition = start_decomposition(recipe, subject, ["h.1.mlp.c_fc"])
    batch = subject.prompts.batch
    read = clean_pass(subject.target, batch, decomposition.names).inputs["h.1.mlp.c_fc"]
    aim = torch.where(batch.valid, -1.0, 0.7).flatten()[:, None]
    gate = decomposition.importances.gates["h/1/mlp/c_fc"]
    gate.b2.zero_()
    gate.w2.zero_()[:, 2] = 1  # slice 2 alone, along the direction that tells padding from text
    gate.w1[:, 2:3] = torch.linalg.lstsq(read.flatten(0, 1), aim, driver="gelsd").solution
    g, _ = decomposition.importance({"h.1.mlp.c_fc": read})
    assert g["h.1.mlp.c_fc"][~batch.valid][:, 2].tolist() == pytest.approx([0.7, 0.7], abs=1e-3)
    evaluation = evaluate(subject, decomposition, 0, 0.0, seed=0)
    assert (evaluation.total_active, evaluation.unique) == (0, {"h.1.mlp.c_fc": 0})
