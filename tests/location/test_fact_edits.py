"""The edits of a fact: which matrix and tokens, slices by rule and by effect against loops, and what a report adds."""

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
from spdcli.location.fact_context import FactContext, chosen_matrix, matrix_like, naming_tokens
from spdcli.location.fact_edits import METHODS, slices_by_effect, slices_by_rule
from spdcli.location.report_edits import BASELINE, CONTROL, SLICES, SOUGHT, report_edits
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.induction import toy_target

SECOND = "h.1.mlp.c_fc"
KOBE, TIGER = 0, 1
OBE, BRYANT = 1, 2
TOKENS = ["K", "obe", " Bryant", " plays", " professional"]
OF = 6  # in the other prompt
NAMING = [[(OBE,), (BRYANT,)], [(OF,)]]


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    """A run whose gates are set by hand, and its context: slice 0 of FC is active at ' Bryant' alone."""
    subject, decomposition, _ = plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))
    activity, questions = own_activity(subject, decomposition, 0)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(80, 32, generator=generator, dtype=torch.float64)
    moments = dict.fromkeys((FC, SECOND), drawn.t() @ drawn / 80)
    return subject, FactContext(subject, decomposition, activity, questions, None, NAMING, FC, moments, 0.3, 5)


def with_g(context, g):
    return replace(context, activity=replace(context.activity, g=g))


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
def test_the_last_two_tokens_name_a_subject_but_never_the_first(subject, tokens):
    assert naming_tokens(subject) == [(token,) for token in tokens]


def test_the_rule_finds_what_is_planted(planted):
    _, context = planted
    assert slices_by_rule(context, KOBE) == {Address(FC, 0): (BRYANT,)}  # 1 is shared, 3 is everywhere
    assert slices_by_rule(context, TIGER) == {Address(FC, 2): (OF,)}
    elsewhere = replace(context, naming=[[(OBE,)], [(5,)]])
    assert slices_by_rule(elsewhere, KOBE) == slices_by_rule(elsewhere, TIGER) == {}


def test_the_rule_takes_at_each_token_of_the_name_what_the_weights_hold_most_of(planted):
    _, context = planted
    weight, own = context.target.matrices[FC].weight, context.decomposition.of(FC)
    held = [abs((u / u.norm()) @ weight @ (v / v.norm())).item() for u, v in zip(own.U.t(), own.V, strict=True)]
    most, second, third, fourth = sorted(range(6), key=lambda index: -held[index])[:4]
    g = {name: torch.zeros_like(values) for name, values in context.activity.g.items()}
    context = with_g(context, g)
    assert slices_by_rule(context, KOBE) == {}
    g[FC][KOBE, 3, most] = 1.0  # at a token that is no name
    for position, index, importance in ((OBE, second, 0.1), (OBE, third, 0.9), (BRYANT, fourth, 0.2)):
        g[FC][KOBE, position, index] = importance
    assert slices_by_rule(context, KOBE) == {Address(FC, second): (OBE,), Address(FC, fourth): (BRYANT,)}
    both = {Address(FC, second): (OBE,), Address(FC, third): (OBE,), Address(FC, fourth): (BRYANT,)}
    assert slices_by_rule(context, KOBE, top=2) == both
    g[FC][KOBE, 4, second] = 1.0  # elsewhere in the same prompt it may be active
    assert slices_by_rule(context, KOBE) == {Address(FC, second): (OBE,), Address(FC, fourth): (BRYANT,)}
    g[FC][KOBE, BRYANT, second] = 0.1  # at both names: there once
    assert slices_by_rule(context, KOBE) == {Address(FC, second): (OBE, BRYANT)}
    g[FC][TIGER, 3, second] = 0.1  # in the other prompt it may not
    assert slices_by_rule(context, KOBE) == {Address(FC, third): (OBE,), Address(FC, fourth): (BRYANT,)}
    twice = replace(context, naming=[[(OBE, 3)], []])  # a name that stands there twice
    assert slices_by_rule(twice, KOBE) == {Address(FC, most): (3,)}
    assert slices_by_rule(twice, TIGER) == {}


def ratio_of(subject, context, slices):
    """after / before of both prompts, by a model whose own weights were changed."""
    (factors,) = suppression(context.target, context.decomposition, slices).values()

    def probability(log_p):
        return log_p.gather(1, context.prompts.batch.answers[:, None]).exp()[:, 0]

    # the model answers at the last fed token
    changed = in_place(
        subject,
        context.prompts,
        lambda: context.target.matrices[FC].weight.sub_((factors.read @ factors.write).float()),
    )
    return probability(changed) / probability(in_place(subject, context.prompts, lambda: None))


@pytest.mark.parametrize("spared", [SPARED, 1e9, 0.0])
def test_slices_by_effect_are_the_best_that_spare_the_others(spared, planted, monkeypatch):
    subject, context = planted
    monkeypatch.setattr("spdcli.edits.selection.SPARED", spared)
    every = torch.full_like(context.activity.g[FC], 0.5) * context.prompts.batch.valid[..., None]
    every[:, 0] = 0
    context = with_g(context, context.activity.g | {FC: every})
    addresses = [Address(FC, index) for index in range(6)]
    assert len(addresses) <= PAIRED  # all of them are paired
    tried = {(one,): ratio_of(subject, context, [one]) for one in addresses}
    tried |= {pair: ratio_of(subject, context, list(pair)) for pair in itertools.combinations(addresses, 2)}
    fair = {slices: ratio for slices, ratio in tried.items() if abs(ratio[TIGER] - 1) < spared}
    best = min(fair, key=lambda slices: fair[slices][KOBE]) if fair else ()
    assert set(slices_by_effect(context, KOBE)) == set(best)


def test_slices_at_a_first_token_are_left_out(planted):
    _, context = planted
    every = {name: torch.full_like(values, 0.5) for name, values in context.activity.g.items()}
    every[FC][:, 0, [0, 1, 2, 4, 5]] = 0
    every[FC][TIGER, 0, 0] = 0.1
    context = with_g(context, every)
    assert not {Address(FC, 0), Address(FC, 3)} & set(slices_by_effect(context, KOBE))
    assert slices_by_effect(context, KOBE)


def test_by_effect_is_of_the_whole_mlp(planted, tiny_gpt2_dir, monkeypatch):
    """Its output matrix, too, and no other block's; of the chosen matrix where nothing of the MLP is decomposed."""
    _, context = planted
    asked = []
    monkeypatch.setattr("spdcli.location.fact_edits.most_lowering", lambda *given: asked.append(given[-1]) or [])
    out = "h.0.mlp.c_proj"
    slices_by_effect(with_g(context, context.activity.g | {out: context.activity.g[FC]}), KOBE)
    slices_by_effect(replace(context, matrix=PROJ), KOBE)
    slices_by_effect(replace(context, matrix="h.2.attn.c_proj"), KOBE)
    assert asked == [[FC, out], [PROJ], ["h.2.attn.c_proj"]]


def test_no_slice_is_active(planted):
    _, context = planted
    off = {name: torch.zeros_like(values) for name, values in context.activity.g.items()}
    context = with_g(context, off)
    assert slices_by_effect(context, KOBE) == []
    shown = report_edits(context, KOBE, TOKENS, FC, 1)
    assert not {"rule", "effect", "direct second", "optimised second"} & set(shown.by_name)
    assert shown.fact.positions == [OBE, BRYANT]
    assert edit_norm(shown.by_name["random"]) == pytest.approx(edit_norm(shown.by_name["direct"]))


def test_everything_stands_side_by_side(planted):
    _, context = planted
    shown = report_edits(context, KOBE, TOKENS, SECOND, 3)
    kinds = [one.kind for one in shown.rows]
    assert kinds == [SLICES] * 2 + [BASELINE] * 4 + [CONTROL] * 2 + [SOUGHT] * 2
    named = [name for one in shown.rows for name in one.edits]
    assert set(shown.by_name) == {*named, f"{FC}:0"}
    assert (shown.fact.rule, shown.fact.positions) == ({Address(FC, 0): (BRYANT,)}, [BRYANT])
    assert [name for name in shown.fact.edits if name in METHODS] == list(METHODS)
    matrices = {name: list(edit) for name, edit in shown.by_name.items()}
    assert matrices["direct second"] == matrices["optimised second"] == [SECOND]
    for name, (factors,) in {name: tuple(edit.values()) for name, edit in shown.by_name.items()}.items():
        assert factors.read.shape[1] == (len(shown.fact.effect) if name == "effect" else 1), name
        assert edit_norm(shown.by_name[name]) > 1e-6
    norm, draws = edit_norm(shown.by_name["rule"]), ("random", "random 1", "random 2")
    assert [edit_norm(shown.by_name[name]) for name in draws] == pytest.approx([norm] * 3)
    assert len({shown.by_name[name][FC].write[0, 0].item() for name in draws}) == 3
    again = report_edits(context, KOBE, TOKENS, SECOND, 3)
    for name, edit in shown.by_name.items():
        for matrix, factors in edit.items():
            assert torch.equal(factors.read, again.by_name[name][matrix].read)


def test_controls_have_as_many_directions_as_the_rule_has_slices(planted):
    _, context = planted
    g = {name: torch.zeros_like(values) for name, values in context.activity.g.items()}
    g[FC][KOBE, OBE, 1] = g[FC][KOBE, BRYANT, 0] = 0.5
    g[FC][KOBE, 3, 1] = 0.9  # most important elsewhere: what needs no decomposition is of that token
    shown = report_edits(with_g(context, g), KOBE, TOKENS, FC, 1)
    assert list(shown.fact.rule) == [Address(FC, 1), Address(FC, 0)]
    assert shown.fact.positions == [BRYANT, 3]
    ranks = {
        name: int(torch.linalg.matrix_rank(edit[FC].read @ edit[FC].write)) for name, edit in shown.by_name.items()
    }
    for name in ("rule", "static", "static_plain", "direct", "optimised", "random", "singular"):
        assert ranks[name] == 2, name
    assert ranks[f"{FC}:0"] == ranks[f"{FC}:1"] == ranks["direct last"] == 1
    assert [one.label for one in shown.rows if one.edits == ("direct last",)] == ["direct C⁻¹x at ' plays'"]


def test_direct_edits_are_of_the_tokens_inputs(planted):
    """After the edit the matrix does nothing along C⁻¹x, x its input at the token; at both tokens, at either."""
    _, context = planted
    off = context.activity.g | {FC: torch.zeros_like(context.activity.g[FC])}  # the rule finds none: the names' tokens
    shown = report_edits(with_g(context, off), KOBE, TOKENS, SECOND, 1)
    assert shown.fact.positions == [OBE, BRYANT]
    block = context.target.blocks[0]
    with torch.no_grad():
        tokens = context.prompts.batch.tokens
        model = context.target.model.transformer
        stream = model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1]))
        stream = stream + block.attn(block.ln_1(stream))[0]
        x = block.ln_2(stream)[KOBE].double()
    ridge = 0.02 * context.moments[FC].diagonal().mean() * torch.eye(32, dtype=torch.float64)
    special = torch.linalg.solve(context.moments[FC] + ridge, x.t())  # [I, T]
    weight = context.target.matrices[FC].weight.double()
    direct = {name: shown.by_name[name][FC] for name in ("direct", "direct last")}
    left = {name: weight - factors.read @ factors.write for name, factors in direct.items()}
    size = lambda name, at: (special[:, at] @ left[name]).norm() / (special[:, at] @ weight).norm()  # noqa: E731
    assert size("direct", OBE) < 1e-5
    assert size("direct", BRYANT) < 1e-5
    assert size("direct last", BRYANT) < 1e-5
    assert size("direct last", OBE) > 0.1
    assert PROJ not in shown.by_name["direct"]
