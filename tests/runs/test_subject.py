"""From a recipe to target, data and decomposition, and back from what was saved."""

from __future__ import annotations

import pytest
import torch
from small_runs import loud_toy, model_recipe, save_toy, toy_recipe

from spdcli.engine.tables import LOSSES
from spdcli.errors import SpdError
from spdcli.files import save_tensors
from spdcli.recipe.reading import load_recipe
from spdcli.runs.decomposition import load_decomposition, parameter_counts, start_decomposition
from spdcli.runs.directory import TOY_WEIGHTS
from spdcli.runs.settings import fit_settings, loss_settings, optimiser_settings
from spdcli.runs.subject import (
    choose_device,
    feature_subject,
    language_subject,
    load_toy,
    open_subject,
    toy_shape,
    toy_subject,
)
from spdcli.targets.feature_toys import TMS, TMSShape
from spdcli.targets.induction import InductionToy

CPU = torch.device("cpu")
FULL_RANK = ["slices.C=8", "slices.init=svd"]


def inputs_of(subject, names, batch):
    """What every matrix reads at the real positions, `[n, I]`, by hooks of the test's own."""
    seen = {}
    handles = [
        subject.target.matrices[name].module.register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    subject.target.run(batch.tokens)
    for handle in handles:
        handle.remove()
    return {name: x[batch.valid] for name, x in seen.items()}


@pytest.mark.parametrize(
    ("asked", "gpu", "given"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_a_device_is_chosen(monkeypatch, asked, gpu, given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_device(asked) == torch.device(given)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpdError, match=r"^device = 'cuda', but torch sees no GPU here$"):
        choose_device("cuda")


def test_the_budget_of_a_plan_is_given_or_found(tmp_path):
    given = toy_recipe("decompose.plan_memory=0.5", folder=tmp_path)
    assert fit_settings(given, free=100).plan_bytes == 2**29
    found = toy_recipe("decompose.plan_memory=auto", folder=tmp_path)
    assert fit_settings(found, free=2**30).plan_bytes == 2**29
    assert fit_settings(found, free=2**40).plan_bytes == 4 * 2**30


# --- the toy ---------------------------------------------------------------------------------------


def test_a_saved_toy_comes_back(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    toy = load_toy(save_toy(tmp_path, recipe, seed=4), recipe.target, CPU)
    tokens = torch.tensor([[0, 6, 2, 3, 6]])
    assert torch.equal(toy.logits(tokens), loud_toy(recipe, seed=4).logits(tokens))
    assert not toy.training


@pytest.mark.parametrize(
    "setting", ["target.d_model=10", "target.vocabulary=7", "target.layers=1", "target.output_projection=true"]
)
def test_a_toy_of_another_shape_is_refused(tmp_path, setting):
    save_toy(tmp_path, toy_recipe(folder=tmp_path))
    with pytest.raises(SpdError, match=r"has the shape|lacks the tensor|is no part of it") as info:
        load_toy(tmp_path, toy_recipe(setting, folder=tmp_path).target, CPU)
    assert "give the recipe it was trained by" in info.value.hint


def test_toy_batches_are_drawn_by_the_generator(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    a, b, other = (subject.batches(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.tokens, other.tokens)
    assert a.tokens.shape == (4, 8)
    assert a.looked.nonzero()[:, 1].tolist() == [7] * 4
    assert [subject.token_text(token) for token in (0, 5, 6)] == ["0", "5", "s"]


def test_the_toy_is_looked_at_everywhere_when_asked(tmp_path):
    recipe = toy_recipe("losses.last_token_only=false", folder=tmp_path)
    assert toy_subject(recipe, loud_toy(recipe)).batches(torch.Generator()).looked.all()


# --- language models -------------------------------------------------------------------------------


@pytest.mark.parametrize(("answers", "last"), [("held_out", [4, 6]), ("fed", [4, 6])])
@pytest.mark.parametrize("last_only", ["true", "false"])
def test_where_a_language_model_is_looked_at(tmp_path, tiny_gpt2_dir, answers, last, last_only):
    settings = [f"data.answers={answers}", f"losses.last_token_only={last_only}"]
    subject = language_subject(model_recipe(tiny_gpt2_dir, *settings, folder=tmp_path), CPU)
    batch = subject.batches(torch.Generator())
    lengths = [5, 7] if answers == "held_out" else [6, 8]
    assert batch.valid.sum(1).tolist() == lengths
    assert subject.length == max(lengths)
    expected = [[at] for at in last] if last_only == "true" else [list(range(length)) for length in lengths]
    assert [row.nonzero()[:, 0].tolist() for row in batch.looked] == expected
    assert subject.prompts.batch is batch  # what `spd eval` measures is what was trained on


def test_a_batch_of_all_prompts_is_the_same_object_every_time(tmp_path, tiny_gpt2_dir):
    """So that the clean pass is done once for the whole run."""
    subject = language_subject(model_recipe(tiny_gpt2_dir, folder=tmp_path), CPU)
    generator = torch.Generator()
    assert subject.batches(generator) is subject.batches(generator)


def test_a_smaller_batch_draws_prompts(tmp_path, tiny_gpt2_dir):
    subject = language_subject(model_recipe(tiny_gpt2_dir, "decompose.batch=1", folder=tmp_path), CPU)
    generator = torch.Generator().manual_seed(0)
    drawn = [subject.batches(generator) for _ in range(20)]
    assert {int(batch.valid.sum()) for batch in drawn} == {5, 7}
    for batch in drawn:
        row = 0 if batch.valid.sum() == 5 else 1
        assert torch.equal(batch.tokens[0], subject.prompts.batch.tokens[row])
        assert torch.equal(batch.answers[0], subject.prompts.batch.answers[row])


# --- the decomposition -----------------------------------------------------------------------------


def test_full_rank_svd_slices_are_the_matrix(tmp_path):
    recipe = toy_recipe(*FULL_RANK, folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    made = start_decomposition(recipe, subject, ["V1", "Q0"])
    assert made.names == ["V1", "Q0"]
    for name in made.names:
        torch.testing.assert_close(made.of(name).U @ made.of(name).V, subject.target.matrices[name].weight)


def test_svd_span_slices_are_the_matrix_on_the_data(tmp_path, tiny_llama_dir):
    recipe = model_recipe(tiny_llama_dir, "slices.C=12", "slices.init=svd_span", folder=tmp_path)
    subject = language_subject(recipe, CPU)
    names = ["layers.1.mlp.down_proj", "layers.2.self_attn.k_proj"]
    made = start_decomposition(recipe, subject, names)
    for name, x in inputs_of(subject, names, subject.prompts.batch).items():
        weight = subject.target.matrices[name].weight
        torch.testing.assert_close(x @ made.of(name).U @ made.of(name).V, x @ weight, rtol=1e-3, atol=1e-4)
        assert (made.of(name).U @ made.of(name).V - weight).norm() > 0.1 * weight.norm()


def test_a_span_basis_spans_the_data(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, "importance.basis=span", folder=tmp_path)
    subject = language_subject(recipe, CPU)
    names = ["h.1.attn.c_attn", "h.1.mlp.c_proj"]
    made = start_decomposition(recipe, subject, names)
    for name, x in inputs_of(subject, names, subject.prompts.batch).items():
        basis = made.importances.bases[name.replace(".", "/")]
        assert basis.shape[0] <= 12  # as many as there are tokens
        back = (x @ basis.T) @ torch.linalg.pinv(basis.T)
        torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
        assert not basis.requires_grad


def test_whitened_duals_of_a_recipe(tmp_path, tiny_llama_dir):
    """Reads dual to the prompts' distinct tokens and least on the stream, whatever the order of the matrices."""
    settings = ["slices.C=14", "slices.init=dual_whitened", "slices.ridge=0.5", "target.dtype='float64'"]
    settings += ["data.stream=generated", "data.stream_sequences=20", "data.stream_length=6"]
    subject = language_subject(model_recipe(tiny_llama_dir, *settings, folder=tmp_path), CPU)
    names = ["layers.1.mlp.down_proj", "layers.0.mlp.up_proj"]
    made = start_decomposition(model_recipe(tiny_llama_dir, *settings, folder=tmp_path), subject, names)
    stream = inputs_of(subject, names, subject.stream())
    for name, x in inputs_of(subject, names, subject.prompts.batch).items():
        moment = stream[name].t() @ stream[name] / (20 * 6)
        moment = moment + 0.5 * torch.linalg.eigvalsh(moment).mean() * torch.eye(len(moment))
        inverse = torch.linalg.inv(moment)
        reads = inverse @ x.t() @ torch.linalg.inv(x @ inverse @ x.t())  # all 12 tokens differ
        U = made.of(name).U[:, :12]
        torch.testing.assert_close(U / U.norm(dim=0), reads / reads.norm(dim=0))
        torch.testing.assert_close(x @ U @ made.of(name).V[:12], x @ subject.target.matrices[name].weight)


def test_slices_of_sparse_features_start_at_what_single_features_read_and_write():
    recipe = load_recipe("tms-40-10-quick", ["slices.C=300"]).recipe
    subject = feature_subject(recipe, TMS(TMSShape(features=40, hidden=10, identity=False)))
    made = start_decomposition(recipe, subject, ["W"]).of("W")
    assert (made.U.norm(dim=0) * made.V.norm(dim=1) > 0).all()  # as many inputs were drawn as there are slices
    weight = subject.target.matrices["W"].weight
    single = (made.U.abs() > 1e-6).sum(0) == 1
    assert single.float().mean() > 0.2  # of inputs with a feature 31% have one alone
    features = made.U.abs().argmax(0)[single]
    written = torch.nn.functional.cosine_similarity(made.V[single], weight[features] * made.U.sum(0)[single, None])
    torch.testing.assert_close(written, torch.ones_like(written))


@pytest.mark.parametrize("init", ["random", "inputs", "svd", "svd_span"])
def test_the_seed_decides_the_start(tmp_path, init):
    def start(seed: int):
        recipe = toy_recipe(f"slices.init={init}", f"seed={seed}", "slices.C=9", folder=tmp_path)
        return start_decomposition(recipe, toy_subject(recipe, loud_toy(recipe)), ["Q0"]).state_dict()

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["slices.Q0.U"], other["slices.Q0.U"])
    assert not torch.equal(one["importances.gates.Q0.w1"], other["importances.gates.Q0.w1"])


@pytest.mark.parametrize(
    "settings",
    [
        *[(f"importance.kind={kind}",) for kind in ("scalar", "vector", "shared", "attention")],
        ("importance.kind=attention", "importance.relative=scalar"),
    ],
)
def test_parameters_are_counted_without_making_them(tmp_path, settings):
    recipe = toy_recipe(*settings, folder=tmp_path)
    check_counts(recipe, toy_subject(recipe, loud_toy(recipe)), ["Q0", "K0", "V1"])


@pytest.mark.parametrize("basis", ["full", "span"])
def test_parameters_of_a_language_model_are_counted(tmp_path, tiny_llama_dir, basis):
    recipe = model_recipe(tiny_llama_dir, f"importance.basis={basis}", folder=tmp_path)
    names = ["layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"]
    check_counts(recipe, language_subject(recipe, CPU), names)


def check_counts(recipe, subject, names):
    made = start_decomposition(recipe, subject, names)
    counted = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (made.slices, made.importances)]
    assert list(parameter_counts(recipe, subject, names)) == counted


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["importance.basis=span", "slices.delta=true"], ["h.0.mlp.c_fc", "h.2.attn.c_proj"]),
        (["importance.kind=attention"], ["h.1.attn.c_attn"]),
        (["target.split_attention=true"], ["h.1.attn.c_attn.q", "h.1.attn.c_attn.v"]),
    ],
)
def test_a_saved_decomposition_comes_back(tmp_path, tiny_gpt2_dir, settings, names):
    recipe = model_recipe(tiny_gpt2_dir, *settings, folder=tmp_path)
    subject = language_subject(recipe, CPU)
    made = start_decomposition(recipe, subject, names)
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            parameter += 0.01 * torch.randn_like(parameter)
    # The file's own order is not the target's.
    saved = {name: made.state_dict()[name].clone() for name in sorted(made.state_dict(), reverse=True)}
    loaded = load_decomposition(recipe, subject, saved)
    assert loaded.names == names
    assert loaded.delta == recipe.slices.delta
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    inputs = {name: torch.randn(1, subject.length, subject.target.matrices[name].d_in) for name in names}
    for one, two in zip(loaded.importance(inputs), made.importance(inputs), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in names)


def test_a_decomposition_of_another_target_is_refused(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    deep = toy_recipe("target.layers=3", folder=tmp_path)
    subject = toy_subject(deep, loud_toy(deep))
    saved = start_decomposition(deep, subject, ["Q2"]).state_dict()
    with pytest.raises(SpdError, match="is of another target: it has \\['Q2'\\]"):
        load_decomposition(recipe, toy_subject(recipe, loud_toy(recipe)), saved)
    with pytest.raises(SpdError, match="is of another target: it has no slices"):
        load_decomposition(recipe, toy_subject(recipe, loud_toy(recipe)), {})


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_coefficient_reaches_the_engine(tmp_path, loss):
    assert loss_settings(toy_recipe(f"losses.{loss}=0.375", folder=tmp_path)).coefficients[loss] == 0.375


def test_every_setting_reaches_the_engine(tmp_path):
    settings = {
        "losses.samples": 3,
        "losses.p_start": 0.8,
        "losses.p_final": 0.3,
        "losses.epsilon": 0.125,
        "losses.frequency": 1,
        "losses.frequency_tokens": 99,
        "losses.subset": "position",
        "losses.recon_partial": 1,
        "losses.stochastic_recon": 1,
        "losses.kl": "variant_to_target",
        "losses.layerwise_matrices": 5,
        "losses.stochastic_recon_layerwise": 1,
        "losses.faithfulness_probes": 6,
        "losses.faithfulness": 1,
        "decompose.steps": 40,
        "decompose.warmup": 0.25,
        "decompose.weight_decay": 0.5,
        "decompose.clip_slices": 2.0,
        "decompose.clip_gates": 3.0,
        "decompose.log_every": 7,
        "decompose.plan_memory": 0.5,
    }
    recipe = toy_recipe(*(f"{key}={value}" for key, value in settings.items()), folder=tmp_path)
    losses, fit, optimiser = loss_settings(recipe), fit_settings(recipe), optimiser_settings(recipe.decompose)
    assert (losses.samples, losses.p_start, losses.p_final, losses.anneal_p) == (3, 0.8, 0.3, True)
    assert (losses.epsilon, losses.subset, losses.reverse_kl) == (0.125, "position", True)
    assert losses.frequency_tokens == 99
    assert (losses.layerwise_matrices, losses.faithfulness_probes) == (5, 6)
    assert (fit.steps, fit.clip_slices, fit.clip_gates, fit.log_every) == (40, 2.0, 3.0, 7)
    assert (fit.plan_bytes, fit.losses) == (2**29, losses)
    assert (optimiser.optimizer, optimiser.learning_rate, optimiser.weight_decay) == ("adam", 0.01, 0.5)
    assert (optimiser.schedule, optimiser.warmup, optimiser.steps) == ("cosine", 10, 40)
    assert not loss_settings(toy_recipe(folder=tmp_path)).reverse_kl
    smooth = {"minimality": 1, "penalty": "smooth_l0", "gamma_start": 0.7, "gamma_final": 0.2}
    losses = loss_settings(toy_recipe(*(f"losses.{key}={value}" for key, value in smooth.items()), folder=tmp_path))
    assert (losses.penalty, losses.gamma_start, losses.gamma_final) == ("smooth_l0", 0.7, 0.2)
    falling = loss_settings(toy_recipe("losses.minimality=1", "losses.penalty_final=0.1", folder=tmp_path))
    assert (falling.penalty_final, losses.penalty_final) == (0.1, 1.0)
    still = loss_settings(toy_recipe("losses.minimality=1", "losses.anneal_p=false", folder=tmp_path))
    assert not still.anneal_p


def test_gates_of_another_shape_are_told_in_one_line(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    saved = start_decomposition(recipe, subject, ["Q0"]).state_dict()
    saved["importances.gates.Q0.w2"] = saved["importances.gates.Q0.w2"].t().contiguous()
    with pytest.raises(SpdError, match="does not fit its recipe") as error:
        load_decomposition(recipe, subject, saved)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_a_toy_is_opened_from_the_directory_of_its_training(tmp_path, heads):
    recipe = toy_recipe(f"target.heads={heads}", folder=tmp_path)
    toy = InductionToy(toy_shape(recipe.target))
    assert (toy.shape.heads, toy.shape.length) == (heads, 8)
    save_tensors(tmp_path / "toy" / TOY_WEIGHTS, toy.state_dict())
    subject = open_subject(recipe, CPU, tmp_path / "toy")
    assert torch.equal(subject.target.unembedding, toy.unembed.weight)
    assert list(subject.target.matrices) == ["Q0", "K0", "V0", "Q1", "K1", "V1"] == list(subject.routes)
