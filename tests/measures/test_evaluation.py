"""`spd eval` against the same numbers worked out one position, one matrix, one sequence at a time."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from small_runs import loud_toy, model_recipe, toy_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.engine import tables
from spdcli.engine.forward import clean_pass
from spdcli.measures import evaluation
from spdcli.measures.evaluation import EVALUATION_SEED, Mean, evaluate
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject, toy_subject
from spdcli.targets.sequences import induction_batch

CPU = torch.device("cpu")
FLOAT32 = {"rel": 1e-4, "abs": 1e-7}  # sums in another order
NOISE = 0.25
TOY = ["target.d_model=4", "target.heads=2", "target.vocabulary=4", "target.length=6", "slices.C=3"]
LOSSES = evaluation.LOSSES


@pytest.fixture(autouse=True)
def steady_noise(monkeypatch):
    """Stochastic masks of a constant draw, so that they can be worked out by hand."""

    class Steady:
        def __init__(self, generator: torch.Generator) -> None: ...

        def __call__(self, out, piece, name, kind):
            out.fill_(NOISE)

    monkeypatch.setattr(evaluation, "Noise", Steady)


def unsettle(decomposition):
    """Gates that differ by slice and position; a matrix's last slice is active nowhere."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in decomposition.importances.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
            if name.endswith("b2"):
                parameter += 0.1
                parameter[-1] = -9
    return decomposition


def masked(weight, slices, g, source, delta):
    """One position's matrix: its slices by their masks, and the delta by its own."""
    mask = g if source == "importance" else g + (1 - g) * NOISE
    out = slices.U @ torch.diag(mask) @ slices.V
    if delta and source == "stochastic":
        out = out + NOISE * (weight - slices.U @ slices.V)
    return out


def stand_ins(weights, decomposition, g, chosen, source):
    """The function that gives matrix `name` at a position: masked slices for those in `chosen`, else its own weight."""

    def weight_at(name, t):
        if name not in chosen:
            return weights[name]
        return masked(weights[name], decomposition.of(name), g[name][0, t], source, decomposition.delta)

    return weight_at


def kl(log_p, log_q):
    return sum((p.exp() * (p - q)).item() for p, q in zip(log_p.double(), log_q.double(), strict=True))


# --- the toy ---------------------------------------------------------------------------------------


def slow_toy(toy, tokens, weight_at):
    """The toy on one sequence, query by query: log-probabilities at the last position, and attention rows.

    `weight_at(name, position)` is the matrix `[I, O]` that stands in for `name` there.
    Returns also what every matrix reads, `[T, I]`.
    """
    hidden = toy.embed(tokens)
    heads, reads, rows = toy.shape.heads, {}, {}
    for layer in range(len(toy.blocks)):
        placed = hidden + toy.positions[: len(tokens)]
        reads |= {f"Q{layer}": placed, f"K{layer}": placed, f"V{layer}": hidden}
        q, k, v = (
            torch.stack([x @ weight_at(f"{letter}{layer}", t) for t, x in enumerate(reads[f"{letter}{layer}"])])
            for letter in "QKV"
        )
        added = torch.zeros_like(hidden)
        for head in range(heads):
            own = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
            for t in range(len(tokens)):
                scores = torch.stack([q[t, own] @ k[s, own] for s in range(t + 1)]) / math.sqrt(q.shape[1] / heads)
                rows[layer, head, t] = scores.log_softmax(0)
                added[t, own] = sum(rows[layer, head, t][s].exp() * v[s, own] for s in range(t + 1))
        hidden = hidden + added
    return (toy.unembed.weight @ hidden[-1]).log_softmax(0), rows, reads


def slow_evaluation(subject, decomposition, batches, threshold):
    toy, names = subject.toy, decomposition.names
    weights = {name: matrix.weight for name, matrix in subject.target.matrices.items()}
    found = {loss: [] for loss in LOSSES}
    active = {name: {kind: [] for kind in ("s1", "m", "s2", "random")} for name in names}
    seen = {name: set() for name in names}
    attention = {layer: [] for layer in range(len(toy.blocks))}
    split = {(layer, kind): [] for layer in attention for kind in ("matters", "rest")}
    right = {"target": 0, "masked": 0}
    by_matrix = {name: [] for name in names}
    for batch in batches:
        for row, tokens in enumerate(batch.tokens):
            log_p, rows, reads = slow_toy(toy, tokens, lambda name, t: weights[name])
            g, _ = decomposition.importance({name: reads[name][None] for name in names})

            def run(chosen, source, tokens=tokens, g=g):
                return slow_toy(toy, tokens, stand_ins(weights, decomposition, g, chosen, source))

            for loss in LOSSES:
                source, scope = tables.LOSSES[loss].source, tables.LOSSES[loss].scope
                sets = [[name] for name in names] if scope == "each" else [names]
                values = [kl(log_p, run(chosen, source)[0]) for chosen in sets]
                found[loss].append(statistics.mean(values))
                if loss == "recon_layerwise":
                    for name, value in zip(names, values, strict=True):
                        by_matrix[name].append(value)
            log_q, masked_rows, _ = run(names, "importance")
            for layer, divergences in attention.items():
                divergences.append(statistics.mean(kl(rows[at], masked_rows[at]) for at in rows if at[0] == layer))
                s2 = len(tokens) - 1
                m = int((tokens[:s2] == toy.shape.vocabulary).nonzero()) + 1
                query = m if layer == 0 else s2
                for kind in ("matters", "rest"):
                    chosen = [at for at in rows if at[0] == layer and (at[2] == query) == (kind == "matters")]
                    split[layer, kind].append(statistics.mean(kl(rows[at], masked_rows[at]) for at in chosen))
            for model, guess in (("target", log_p), ("masked", log_q)):
                right[model] += int(guess.argmax() == batch.answers[row])
            for name in names:
                for t in range(len(tokens)):
                    on = [c for c, value in enumerate(g[name][0, t]) if value > threshold]
                    kind = next(kind for kind, mask in batch.classes.items() if mask[row, t])
                    active[name][kind].append(len(on))
                    seen[name] |= set(on)
    errors = [(weights[n] - decomposition.of(n).U @ decomposition.of(n).V).square().sum().item() for n in names]
    count = len(found["recon"])
    return {
        "sequences": count,
        "active": {name: {kind: statistics.mean(n) for kind, n in kinds.items()} for name, kinds in active.items()},
        "unique": {name: len(slices) for name, slices in seen.items()},
        "total_active": sum(len(slices) for slices in seen.values()),
        "total_slices": 3 * len(names),
        "metrics": {"faithfulness": sum(errors) / sum(weights[name].numel() for name in names)}
        | {loss: statistics.mean(values) for loss, values in found.items()},
        "standard_error": {"faithfulness": 0.0}
        | {loss: statistics.stdev(values) / math.sqrt(count) for loss, values in found.items()},
        "recon_layerwise_by_matrix": {name: statistics.mean(values) for name, values in by_matrix.items()},
        "attention_kl": [statistics.mean(values) for values in attention.values()],
        "attention_kl_split": [
            {"layer": layer + 1} | {kind: statistics.mean(split[layer, kind]) for kind in ("matters", "rest")}
            for layer in attention
        ],
        "accuracy": {model: number / count for model, number in right.items()},
    }


def compare(ours, slow):
    assert ours.keys() >= slow.keys()
    for key, value in slow.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            compare(ours[key], value)
        elif key == "attention_kl_split":
            for mine, theirs in zip(ours[key], value, strict=True):
                compare(mine, theirs)
        else:
            assert ours[key] == pytest.approx(value, **FLOAT32), key


ALL = ["Q0", "K0", "V0", "Q1", "K1", "V1"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "names", "threshold", "plan_bytes"),
    [
        ([], ALL, 0.0, 2**30),
        (["slices.delta=true"], ALL, 0.2, 2**30),
        (["importance.kind=scalar"], ["K1", "V1"], 0.0, 2**30),  # the first block is left alone
        (["slices.delta=true"], ["V0", "Q1"], 0.0, 1),  # every sequence of every variant on its own
    ],
)
def test_the_toys_numbers_are_those_of_a_slow_evaluation(tmp_path, monkeypatch, settings, names, threshold, plan_bytes):
    monkeypatch.setattr(evaluation, "SEQUENCES_AT_ONCE", 3)
    monkeypatch.setattr(evaluation, "PLAN_BYTES", plan_bytes)
    recipe = toy_recipe(*TOY, *settings, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    decomposition = unsettle(start_decomposition(recipe, subject, names))
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 9)
    batches = [induction_batch(count, 6, 4, generator) for count in (3, 3, 1)]
    slow = slow_evaluation(subject, decomposition, batches, threshold)
    compare(evaluate(subject, decomposition, 7, threshold, seed=9), slow)
    assert 0 < slow["total_active"] < slow["total_slices"]  # the comparison has something to compare
    assert slow["metrics"]["recon"] > 0.01
    assert (slow["attention_kl"][0] == 0) == ("Q0" not in names)


@torch.no_grad()
def test_perfect_slices_with_open_gates_change_nothing(tmp_path):
    recipe = toy_recipe("slices.C=8", "importance.gate_bias=2.0", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = start_decomposition(recipe, subject, ALL)
    for gate in decomposition.importances.gates.values():
        gate.w2.zero_()
    found = evaluate(subject, decomposition, 50, 0.0, seed=0)
    assert all(0 <= value < 1e-6 for value in found["metrics"].values())
    assert found["active"]["V1"] == {"s1": 8, "m": 8, "s2": 8, "random": 8}
    assert found["accuracy"]["masked"] == found["accuracy"]["target"]
    assert found["attention_kl"] == pytest.approx([0, 0], abs=1e-6)


def test_the_seed_draws_the_sequences(tmp_path):
    recipe = toy_recipe(*TOY, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = unsettle(start_decomposition(recipe, subject, ["V1"]))
    one, again, other = (evaluate(subject, decomposition, 20, 0.0, seed)["metrics"] for seed in (1, 1, 2))
    assert one == again
    assert one["recon"] != other["recon"]
    assert one["faithfulness"] == other["faithfulness"]


def test_a_mean_and_its_error_do_not_depend_on_the_batches():
    values = torch.randn(20) + 3
    whole, parts = Mean(), Mean()
    whole.add(values)
    for part in values.split([1, 7, 12]):
        parts.add(part)
    for mean in (whole, parts):
        assert mean.value == pytest.approx(values.double().mean().item())
        assert mean.error == pytest.approx(values.double().std().item() / math.sqrt(20))
    single = Mean()
    single.add(torch.tensor([2.0]))
    assert single.value == 2
    assert math.isnan(single.error)


# --- language models -------------------------------------------------------------------------------


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
    found = {loss: [] for loss in LOSSES}
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
            source = "stochastic" if "stochastic" in loss else "importance"
            sets = [[name] for name in names] if "layerwise" in loss else [names]
            variants = [run(chosen, source) for chosen in sets]
            found[loss].append(statistics.mean(kl(clean[t], variant[t]) for variant in variants for t in looked))
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
                active[name][f"{prompt}:{t}"] = len(on)
                seen[name] |= set(on)

    assert ours["active"] == active
    assert ours["unique"] == {name: len(slices) for name, slices in seen.items()}
    assert 0 < ours["total_active"] == sum(ours["unique"].values()) < ours["total_slices"]
    for loss, values in found.items():
        assert ours["metrics"][loss] == pytest.approx(statistics.mean(values), **FLOAT32)
        assert ours["standard_error"][loss] == pytest.approx(statistics.stdev(values) / math.sqrt(2), **FLOAT32)
    for model_name, values in entropy.items():
        assert ours["cross_entropy"][model_name] == pytest.approx(statistics.mean(values), **FLOAT32)
    assert ours["accuracy"] == {model_name: count / 2 for model_name, count in right.items()}
    for answer, (text, token, target, alone) in zip(ours["answers"], chances, strict=True):
        assert (answer["prompt"], answer["answer"]) == (text, tokenizer.decode([token]))
        assert answer["target"] == pytest.approx(target, **FLOAT32)
        assert answer["masked"] == pytest.approx(float(alone), **FLOAT32)
    assert ours["metrics"]["recon"] > 0.01


def test_one_prompt_has_no_standard_error(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, 'data.prompts=["Woods plays golf"]', folder=tmp_path)
    subject = language_subject(recipe, CPU)
    found = evaluate(subject, start_decomposition(recipe, subject, ["h.1.mlp.c_fc"]), 0, 0.0, seed=0)
    assert math.isnan(found["standard_error"]["recon"])
    assert found["sequences"] == 1


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
    found = evaluate(subject, decomposition, 0, 0.0, seed=0)
    assert (found["total_active"], found["unique"]) == (0, {"h.1.mlp.c_fc": 0})
