"""What a report sets side by side: which matrix and tokens, slices by rule and by effect against loops, every edit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from edited_models import in_place
from planted_gates import FC, PROJ, plant_gates
from small_runs import loud_toy, toy_recipe

from spdcli.edits.selection import PAIRED, SPARED, own_activity
from spdcli.edits.suppression import Address, suppression
from spdcli.errors import UsageError
from spdcli.location.baselines import edit_norm
from spdcli.location.fact_edits import (
    BASELINE,
    CONTROL,
    SLICES,
    SOUGHT,
    Scene,
    chosen_matrix,
    fact_edits,
    matrix_like,
    naming_tokens,
    slices_by_effect,
    slices_by_rule,
)
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.induction import toy_target

SECOND = "h.1.mlp.c_fc"
KOBE, TIGER = 0, 1
OBE, BRYANT = 1, 2
SUBJECT, TOKENS = (0, OBE, BRYANT), ["K", "obe", " Bryant", " plays", " professional"]


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    """A run whose gates are set by hand, and its scene: slice 0 of FC is active at ' Bryant' alone."""
    subject, decomposition, _ = plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))
    activity, questions = own_activity(subject, decomposition, 0)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(80, 32, generator=generator, dtype=torch.float64)
    moments = dict.fromkeys((FC, SECOND), drawn.t() @ drawn / 80)
    tokenizer = subject.prompts.tokenizer
    return subject, Scene(subject.target, decomposition, activity, questions, tokenizer, FC, moments, 0.3, 3, 5)


def test_the_matrix_is_the_last_before_the_output_of_the_first_mlp(tiny_gpt2_dir, tiny_llama_dir, tmp_path):
    gpt2, llama = (build_target(load_model(str(path), "float32"), False) for path in (tiny_gpt2_dir, tiny_llama_dir))
    assert chosen_matrix(gpt2, list(gpt2.matrices), None) == "h.0.mlp.c_fc"
    assert chosen_matrix(llama, list(llama.matrices), None) == "layers.0.mlp.up_proj"
    some = ["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "layers.2.mlp.gate_proj", "layers.2.mlp.down_proj"]
    assert chosen_matrix(llama, some, None) == "layers.2.mlp.gate_proj"
    assert chosen_matrix(llama, some, some[0]) == some[0]
    with pytest.raises(UsageError, match="no MLP matrix that reads the residual stream"):
        chosen_matrix(llama, some[:2], None)
    with pytest.raises(UsageError, match=r"nearest is 'layers\.0\.mlp\.down_proj'"):
        chosen_matrix(llama, some, "layers.0.mlp.down")
    assert matrix_like(llama, "layers.0.mlp.up_proj", 2) == "layers.2.mlp.up_proj"
    assert matrix_like(gpt2, "h.2.attn.c_proj", 1) == "h.1.attn.c_proj"
    with pytest.raises(UsageError, match="language model"):
        chosen_matrix(toy_target(loud_toy(toy_recipe(folder=tmp_path))), ["K0"], None)


@pytest.mark.parametrize(
    ("subject", "tokens"), [((0, 1, 2), [1, 2]), ((0, 1), [1]), ((0,), [0]), ((2, 3, 4, 7), [4, 7]), ((5,), [5])]
)
def test_slices_are_named_at_the_last_two_tokens_but_never_the_first(subject, tokens):
    assert naming_tokens(subject) == tokens


def test_the_rule_finds_what_is_planted(planted):
    _, scene = planted
    assert slices_by_rule(scene, KOBE) == {Address(FC, 0): BRYANT}  # 1 is shared, 3 is everywhere
    assert slices_by_rule(scene, TIGER) == {Address(FC, 2): 6}


def test_the_rule_takes_what_the_weights_hold_most_of(planted):
    _, scene = planted
    weight, own = scene.target.matrices[FC].weight, scene.decomposition.of(FC)
    held = [abs((u / u.norm()) @ weight @ (v / v.norm())).item() for u, v in zip(own.U.t(), own.V, strict=True)]
    g = {name: torch.zeros_like(values) for name, values in scene.activity.g.items()}
    made = replace(scene, activity=replace(scene.activity, g=g))
    assert slices_by_rule(made, KOBE) == {}
    for index, position in enumerate((3, 1, 2, 4, 1, 2)):
        g[FC][KOBE, position, index] = 0.1 + 0.1 * index
    most, second, third = sorted(range(6), key=lambda index: -held[index])[:3]
    places = (3, 1, 2, 4, 1, 2)
    assert slices_by_rule(made, KOBE) == {Address(FC, most): places[most], Address(FC, second): places[second]}
    g[FC][TIGER, 3, most] = 0.1  # now it is active at two tokens
    assert slices_by_rule(made, KOBE) == {Address(FC, second): places[second], Address(FC, third): places[third]}
    g[FC][KOBE, :, second] = 0
    g[FC][KOBE, 0, second] = 1.0  # at the first token alone
    assert Address(FC, second) not in slices_by_rule(made, KOBE)


def ratio_of(subject, scene, slices):
    """after / before of both prompts, by a model whose own weights were changed."""
    (factors,) = suppression(scene.target, scene.decomposition, slices).values()

    def probability(log_p):
        return log_p.gather(1, scene.questions.batch.answers[:, None]).exp()[:, 0]

    # the model answers at the last fed token
    changed = in_place(
        subject, scene.questions, lambda: scene.target.matrices[FC].weight.sub_((factors.read @ factors.write).float())
    )
    return probability(changed) / probability(in_place(subject, scene.questions, lambda: None))


@pytest.mark.parametrize("spared", [SPARED, 1e9, 0.0])
def test_slices_by_effect_are_the_best_that_spare_the_others(spared, planted, monkeypatch):
    subject, scene = planted
    monkeypatch.setattr("spdcli.edits.selection.SPARED", spared)
    every = torch.full_like(scene.activity.g[FC], 0.5) * scene.questions.batch.valid[..., None]
    every[:, 0] = 0
    scene = replace(scene, activity=replace(scene.activity, g=scene.activity.g | {FC: every}))
    addresses = [Address(FC, index) for index in range(6)]
    assert len(addresses) <= PAIRED  # all of them are paired
    tried = {(one,): ratio_of(subject, scene, [one]) for one in addresses}
    tried |= {pair: ratio_of(subject, scene, list(pair)) for pair in itertools.combinations(addresses, 2)}
    fair = {slices: ratio for slices, ratio in tried.items() if abs(ratio[TIGER] - 1) < spared}
    best = min(fair, key=lambda slices: fair[slices][KOBE]) if fair else ()
    assert set(slices_by_effect(scene, KOBE)) == set(best)


def test_slices_at_a_first_token_are_left_out(planted):
    _, scene = planted
    every = {name: torch.full_like(values, 0.5) for name, values in scene.activity.g.items()}
    every[FC][:, 0, [0, 1, 2, 4, 5]] = 0
    every[FC][TIGER, 0, 0] = 0.1
    scene = replace(scene, activity=replace(scene.activity, g=every))
    assert not {Address(FC, 0), Address(FC, 3)} & set(slices_by_effect(scene, KOBE))
    assert slices_by_effect(scene, KOBE)


def test_no_slice_is_active(planted):
    _, scene = planted
    off = {name: torch.zeros_like(values) for name, values in scene.activity.g.items()}
    scene = replace(scene, activity=replace(scene.activity, g=off))
    assert slices_by_effect(scene, KOBE) == []
    side = fact_edits(scene, KOBE, SUBJECT, TOKENS, FC)
    assert not {"rule", "effect", "direct second", "optimised second"} & set(side.edits)
    assert edit_norm(side.edits["random 0"]) == pytest.approx(edit_norm(side.edits["direct"]))


def test_everything_stands_side_by_side(planted):
    _, scene = planted
    side = fact_edits(scene, KOBE, SUBJECT, TOKENS, SECOND)
    kinds = [place.kind for place in side.places]
    assert kinds == [SLICES] * 2 + [BASELINE] * 4 + [CONTROL] * 2 + [SOUGHT] * 2
    named = [name for place in side.places for name in place.edits]
    assert set(side.edits) == {*named, f"{FC}:0"}
    assert (side.rule, side.positions) == ({Address(FC, 0): BRYANT}, [BRYANT])
    matrices = {name: list(edit) for name, edit in side.edits.items()}
    assert matrices["direct second"] == matrices["optimised second"] == [SECOND]
    for name, (factors,) in {name: tuple(edit.values()) for name, edit in side.edits.items()}.items():
        assert factors.read.shape[1] == (len(side.effect) if name == "effect" else 1), name
        assert edit_norm(side.edits[name]) > 1e-6
    norm = edit_norm(side.edits["rule"])
    assert [edit_norm(side.edits[f"random {n}"]) for n in range(3)] == pytest.approx([norm] * 3)
    again = fact_edits(scene, KOBE, SUBJECT, TOKENS, SECOND)
    for name, edit in side.edits.items():
        for matrix, factors in edit.items():
            assert torch.equal(factors.read, again.edits[name][matrix].read)


def test_direct_edits_are_of_the_tokens_inputs(planted):
    """After the edit the matrix does nothing along C⁻¹x, x its input at the token; at both tokens, at either."""
    _, scene = planted
    off = scene.activity.g | {FC: torch.zeros_like(scene.activity.g[FC])}  # the rule finds none: the subject's tokens
    side = fact_edits(replace(scene, activity=replace(scene.activity, g=off)), KOBE, SUBJECT, TOKENS, SECOND)
    assert side.positions == [OBE, BRYANT]
    block = scene.target.blocks[0]
    with torch.no_grad():
        tokens = scene.questions.batch.tokens
        model = scene.target.model.transformer
        stream = model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1]))
        stream = stream + block.attn(block.ln_1(stream))[0]
        x = block.ln_2(stream)[KOBE].double()
    ridge = 0.02 * scene.moments[FC].diagonal().mean() * torch.eye(32, dtype=torch.float64)
    special = torch.linalg.solve(scene.moments[FC] + ridge, x.t())  # [I, T]
    weight = scene.target.matrices[FC].weight.double()
    left = {name: weight - side.edits[name][FC].read @ side.edits[name][FC].write for name in ("direct", "direct last")}
    size = lambda name, at: (special[:, at] @ left[name]).norm() / (special[:, at] @ weight).norm()  # noqa: E731
    assert size("direct", OBE) < 1e-5
    assert size("direct", BRYANT) < 1e-5
    assert size("direct last", BRYANT) < 1e-5
    assert size("direct last", OBE) > 0.1
    assert PROJ not in side.edits["direct"]
