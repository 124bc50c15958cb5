"""Recipes as files: every mistake with its line, overrides, matrix patterns, later blame."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from spdcli.errors import RecipeError, UsageError
from spdcli.recipe.reading import dump_recipe, load_recipe, select_matrices, shipped
from spdcli.recipe.schema import InductionTarget, Recipe
from spdcli.targets.induction import InductionToy, ToyShape, toy_target

VALID = """\
name = "toy"
[target]
kind = "induction"
d_model = 16
[train]
batch = 8
steps = 10
[slices]
C = 4
matrices = [
  "?0",  # the first layer
  "?1",
]
[importance]
kind = "attention"
gate_width = 16
[losses]
faithfulness = 1
[decompose]
batch = 8
steps = 10
"""


def complaints(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error that `text` gives, from the line number on (or the option, when one is to blame)."""
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), list(overrides))
    return [line.removeprefix(f"{file}:").removeprefix(" ") for line in caught.value.message.splitlines()]


# --- mistakes --------------------------------------------------------------------------------------

KINDS = "'huggingface', 'induction', 'module', 'planted_induction', 'planted_lookup', 'resid_mlp', 'tms'"

MISTAKES = [
    (
        "faithfulness = 1",
        "faithfullness = 1\nrecon = 1",
        "18: [losses] unknown key 'faithfullness' (did you mean 'faithfulness'?)",
    ),
    ("[losses]", "[loses]", "17: unknown section [loses] (did you mean [losses]?)"),
    ('name = "toy"', 'nmae = "toy"', "1: unknown key 'nmae' (did you mean 'name'?)"),
    ("d_model = 16", "layrs = 2", "4: [target] unknown key 'layrs' (did you mean 'layers'?)"),
    (
        "d_model = 16",
        'model = "x"',
        "4: [target] unknown key 'model' (it belongs in [target] with kind = 'huggingface')",
    ),
    ("gate_width = 16", "gate_width = 16\nC = 3", "17: [importance] unknown key 'C' (it belongs in [slices])"),
    (
        "faithfulness = 1",
        "faithfulness = 1\nbatch = 3",
        "19: [losses] unknown key 'batch' (it belongs in [train] or [decompose])",
    ),
    ("C = 4", "C = 4\nseed = 4", "10: [slices] unknown key 'seed' (it belongs at the top, before the first section)"),
    ("C = 4", "", "8: [slices] missing key 'C' (a whole number of at least 1)"),
    ("[losses]\nfaithfulness = 1\n", "", " missing section [losses]"),
    ("C = 4", "C = 0", "9: [slices] C = 0: expected a whole number of at least 1"),
    ("C = 4", "C = 4.0", "9: [slices] C = 4.0: expected a whole number of at least 1"),
    ("C = 4", 'C = "4"', "9: [slices] C = '4': expected a whole number of at least 1"),
    ("C = 4", "C = true", "9: [slices] C = true: expected a whole number of at least 1"),
    ("C = 4", "C = 4\ndelta = 1", "10: [slices] delta = 1: expected true or false"),
    ('  "?1",', "  3,", "12: [slices] matrices[1] = 3: expected text in quotes, not empty"),
    ("faithfulness = 1", "faithfulness = -1", "18: [losses] faithfulness = -1: expected a number of at least 0"),
    ("faithfulness = 1", "faithfulness = nan", "18: [losses] faithfulness = nan: expected a number of at least 0"),
    ("faithfulness = 1", "recon = 1\np_final = 0", "19: [losses] p_final = 0: expected a number above 0"),
    (
        'kind = "attention"',
        'kind = "Vektor"',
        "15: [importance] kind = 'Vektor': expected one of 'scalar', 'vector', 'shared', 'attention', 'global'"
        " (did you mean 'vector'?)",
    ),
    (
        'kind = "induction"',
        "",
        f"2: [target] missing key 'kind' (one of {KINDS})",
    ),
    (
        'kind = "induction"',
        'kind = "gpt"',
        f"3: [target] kind = 'gpt': expected one of {KINDS}",
    ),
    ('name = "toy"', 'name = "toy"\ndata = 3', "2: data = 3: expected a section"),
    # contradictions
    (
        "faithfulness = 1",
        "faithfulness = 1\np_final = 2.5",
        "19: [losses] p_final = 2.5 is above p_start = 0.9; p is annealed downwards",
    ),
    (
        "faithfulness = 1",
        'faithfulness = 1\npenalty = "smooth_l0"\ngamma_final = 2',
        "20: [losses] gamma_final = 2 is above gamma_start = 1.0; gamma is annealed downwards",
    ),
    (
        'kind = "attention"',
        'kind = "global"\nheads = 3',
        "16: [importance] width = 64 is no multiple of twice the heads = 3: a head's coordinates are pairs",
    ),
    (
        "faithfulness = 1",
        'faithfulness = 1\npenalty = "l0"',
        "19: [losses] penalty = 'l0': expected one of 'power', 'smooth_l0'",
    ),
    (
        "faithfulness = 1",
        "faithfulness = 1\n[adversary]\nsteps = 3",
        "19: [adversary] is given, but both adversarial losses are 0: adversarial_recon, adversarial_recon_partial",
    ),
    (
        "faithfulness = 1",
        'adversarial_recon = 1\n[adversary]\nmasks = "persistent"\nshared = false',
        "21: [adversary] masks = 'persistent' keeps masks for sequences to come, which have to share them",
    ),
    (
        "faithfulness = 1",
        "adversarial_recon = 1\n[adversary]\ndelta = false",
        "20: [adversary] delta is set, but [slices] delta = false: it has no masks",
    ),
    (
        "faithfulness = 1",
        'stochastic_recon = 1\ndelta_masks = "forward"',
        "19: [losses] delta_masks = 'forward' draws the delta's masks, and [slices] delta = false",
    ),
    (
        "faithfulness = 1",
        'faithfulness = 1\ndelta_masks = "all"',
        "19: [losses] delta_masks = 'all': expected one of 'position', 'forward', 'corner'",
    ),
    ("d_model = 16", "d_model = 16\nheads = 3", "5: [target] heads = 3 does not divide d_model = 16"),
    (
        "d_model = 16",
        "d_model = 16\nlength = 4\nbegin_token = true",
        "5: [target] length = 4: with a begin token a sequence has 5 tokens at least",
    ),
    (
        "gate_width = 16",
        'gate_width = 16\nrelative_start = "local"',
        "17: [importance] relative_start = 'local' needs relative = 'scalar', not 'query'",
    ),
    (
        "[train]\nbatch = 8\nsteps = 10\n",
        "",
        "3: missing section [train]: a target of kind 'induction' is trained first, unless target.path names a "
        "trained one",
    ),
    (
        "faithfulness = 1",
        "minimality = 1",
        "17: [losses] faithfulness and every recon coefficient are 0: nothing holds the slices to the target",
    ),
    (
        "[slices]",
        '[data]\nprompts = ["a"]\n[slices]',
        "8: [data] is for language models; a toy draws its own data",
    ),
    (
        "[slices]",
        '[data]\nprompts = ["a", " "]\n[slices]',
        "9: [data] prompts[1] = ' ': expected text in quotes, not empty",
    ),
]


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES, ids=[case[2][:60] for case in MISTAKES])
def test_a_mistake_is_told_with_its_line(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert VALID.count(old) == 1 or old == "C = 4"
    assert expected.strip() in [line.strip() for line in complaints(tmp_path, VALID.replace(old, new, 1))]


def test_span_needs_vector_gates_and_fixed_prompts(tmp_path: Path) -> None:
    assert complaints(tmp_path, VALID.replace("gate_width = 16", 'gate_width = 16\nbasis = "span"')) == [
        "17: [importance] basis = 'span' is for kind = 'vector' or 'global', not 'attention'",
        "17: [importance] basis = 'span' needs a fixed set of prompts; the induction toy draws new sequences",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "importance.kind=attention",
            "[importance] kind = 'attention' looks over a sequence; inputs of this target have one position",
        ),
        (
            "losses.kl=variant_to_target",
            "[losses] kl is the order of two distributions; this target gives vectors",
        ),
        ("losses.attention=1.0", "[losses] attention is for the induction toy"),
        ("slices.init=dual", "[slices] init = 'dual' needs a fixed set of prompts; a toy draws new sequences"),
        ('data={prompts=["a b"]}', "[data] is for language models; a toy draws its own data"),
        ("slices.matrices=['W_in0']", "[slices] matrices: 'W_in0' matches no matrix of the target; it has W, WT"),
        ("target.d_mlp=3", "[target] unknown key 'd_mlp' (it belongs in [target] with kind = 'resid_mlp')"),
    ],
)
def test_what_a_toy_of_sparse_features_cannot_have(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tms-5-2", [setting])
    assert caught.value.message.endswith(message)


def test_the_matrices_of_a_toy_of_sparse_features_are_known_before_it_is_trained() -> None:
    assert load_recipe("tms-5-2", ["slices.matrices=['W*']"]).recipe.target.kind == "tms"
    recipe = load_recipe("resid-mlp-2", ["slices.matrices=['W_out1']"]).recipe
    assert recipe.slices.matrices == ["W_out1"]


@pytest.mark.parametrize("init", ["dual", "dual_whitened"])
def test_duals_need_fixed_prompts_and_whitened_ones_broad_text(init: str, tmp_path: Path) -> None:
    assert complaints(tmp_path, VALID.replace("C = 4", f'C = 4\ninit = "{init}"', 1)) == [
        f"10: [slices] init = '{init}' needs a fixed set of prompts; the induction toy draws new sequences",
    ]
    needs = "[slices] init = 'dual_whitened' needs broad text to whiten by: [data] stream = 'generated', or a file"
    settings = [f"slices.init={init}"]
    if init == "dual_whitened":
        with pytest.raises(RecipeError) as caught:
            load_recipe("gpt2", settings)
        assert caught.value.message == f"--set slices.init={init}: {needs}"
    assert load_recipe("gpt2", [*settings, "data.stream=generated"]).recipe.slices.init == init


def test_a_module_has_no_broad_text_to_whiten_by(tmp_path: Path) -> None:
    text = """name = "mine"
target = { kind = "module" }
slices = { C = 4, init = "dual_whitened" }
importance = { kind = "vector", gate_width = 4 }
losses = { stochastic_recon = 1.0 }
decompose = { batch = 2, steps = 2 }
"""
    assert complaints(tmp_path, text) == [
        "3: [slices] init = 'dual_whitened' needs broad text to whiten by, and a module has none; 'dual' needs none"
    ]
    (tmp_path / "mine.toml").write_text(text.replace("dual_whitened", "dual"))
    assert load_recipe(str(tmp_path / "mine.toml")).recipe.slices.init == "dual"


def test_a_targeted_decomposition_needs_the_delta_and_broad_text() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gpt2", ["losses.targeted=1.0"])
    assert caught.value.message.splitlines() == [
        "--set losses.targeted=1.0: [losses] targeted keeps the delta on, and [slices] delta = false",
        "--set losses.targeted=1.0: [losses] targeted needs broad text beside the prompts: "
        "[data] stream = 'generated', or a file",
    ]
    recipe = load_recipe("gpt2", ["losses.targeted=1.0", "slices.delta=true", "data.stream=words.txt"]).recipe
    assert recipe.losses.targeted == 1.0


def test_a_language_model_needs_prompts_and_no_training(tmp_path: Path) -> None:
    text = VALID.replace('kind = "induction"\nd_model = 16', 'kind = "huggingface"\nmodel = "gpt2"')
    assert complaints(tmp_path, text) == [
        "3: missing section [data]: a huggingface target needs prompts, or text",
        "5: [train] is for toys; a huggingface target comes trained",
    ]


def test_all_mistakes_at_once_also_contradictions_beside_malformed_keys(tmp_path: Path) -> None:
    text = (
        VALID.replace('name = "toy"', "name = 3")
        .replace("d_model = 16", "heads = 3")
        .replace("C = 4", "c = 4")
        .replace("faithfulness = 1", "faithfullness = 1\nrecon = 'x'\np_start = 0.05")
        .replace("[decompose]", "[decompos]")
    )
    assert complaints(tmp_path, text) == [
        "missing section [decompose]",
        "1: name = 3: expected text in quotes, not empty",
        "4: [target] heads = 3 does not divide d_model = 16",
        "8: [slices] missing key 'C' (a whole number of at least 1)",
        "9: [slices] unknown key 'c' (did you mean 'C'?)",
        "18: [losses] unknown key 'faithfullness' (did you mean 'faithfulness'?)",
        "19: [losses] recon = 'x': expected a number of at least 0",
        "20: [losses] p_final = 0.1 is above p_start = 0.05; p is annealed downwards",
        "21: unknown section [decompos] (did you mean [decompose]?)",
    ]


WEIRD = [
    3,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    True,
    "text",
    "",
    [],
    [1],
    ["x"],
    {},
    {"x": 1},
    tomli.loads("d = 1979-05-27")["d"],
]
KEYS = [
    *[(section,) for section in Recipe.model_fields],
    *[
        (section, key)
        for name in ("induction", "gpt2")
        for section, values in load_recipe(name).recipe.model_dump().items()
        if isinstance(values, dict)
        for key in values
    ],
]


@settings(deadline=None)
@given(path=st.sampled_from(KEYS), value=st.sampled_from(WEIRD), name=st.sampled_from(["induction", "gpt2"]))
def test_no_value_of_any_key_brings_jargon_or_a_crash(path: tuple[str, ...], value: Any, name: str) -> None:
    literal = tomli_w.dumps({"v": {"v": value}}, multiline_strings=False)
    if isinstance(value, dict):
        literal = "v = {x = 1}" if value else "v = {}"
    literal = " ".join(literal.partition("v = ")[2].split())
    try:
        load_recipe(name, [f"{'.'.join(path)}={literal}"])
        lines = []
    except RecipeError as error:
        lines = error.message.split("\n")
    for line in lines:
        assert re.match(r"(--set |.*\.toml(:\d+)?: )", line), line
        assert not re.search(r"Input should|union|tag|pydantic|valid |None", line), line


@settings(deadline=None)
@given(
    section=st.sampled_from(["target", "train", "slices", "importance", "losses", "decompose"]),
    key=st.from_regex(r"[a-z_]{1,12}x9", fullmatch=True),
)
def test_any_unknown_key_is_named_at_its_line(section: str, key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = VALID.replace(f"[{section}]\n", f"[{section}]\n# a comment with [brackets] and = signs\n{key} = 1\n")
    line = text.splitlines().index(f"{key} = 1") + 1
    found = complaints(tmp_path_factory.mktemp("unknown"), text)
    assert len(found) == 1
    assert found[0].startswith(f"{line}: [{section}] unknown key '{key}'")


# --- files -----------------------------------------------------------------------------------------


def test_broken_toml_is_told_with_line_and_column(tmp_path: Path) -> None:
    assert complaints(tmp_path, 'name = "x"\nseed = \n') == ["2:8: not valid TOML: invalid value"]


def test_a_missing_file_names_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(VALID)
    with pytest.raises(RecipeError, match=r"^mien.toml: no such recipe \(did you mean 'mine.toml'\?\)$") as caught:
        load_recipe("mien.toml")
    assert "spd recipe ls" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="did you mean 'gpt2'"):
        load_recipe("gtp2")
    with pytest.raises(RecipeError, match="did you mean 'gpt2'"):
        load_recipe("nowhere/gtp2.toml")


def test_a_file_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("gpt2").recipe.name == "gpt2"
    assert load_recipe("gpt2.toml").recipe.name == "gpt2"
    Path("gpt2.toml").write_text(VALID)
    assert load_recipe("gpt2.toml").recipe.name == "toy"


def test_what_is_no_recipe_file_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(VALID)
    with pytest.raises(RecipeError, match=r"a directory, not a recipe \(did you mean '.*recipe.toml'\?\)$"):
        load_recipe(tmp_path)
    binary = tmp_path / "x.gguf"
    binary.write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        load_recipe(binary)


# --- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("losses.minimality=0.25", ("losses", "minimality"), 0.25),
        ("losses.anneal_p=false", ("losses", "anneal_p"), False),
        ("importance.relative='scalar'", ("importance", "relative"), "scalar"),
        ("importance.relative=scalar", ("importance", "relative"), "scalar"),
        ("target.path=/some/dir", ("target", "path"), "/some/dir"),
        ("target.path=a=b", ("target", "path"), "a=b"),
        (' target . "path" = "x y"', ("target", "path"), "x y"),
        ('slices.matrices=["Q0", "V1"]', ("slices", "matrices"), ["Q0", "V1"]),
    ],
)
def test_an_override_is_a_toml_literal_or_text(override: str, path: tuple[str, str], value: Any) -> None:
    recipe = load_recipe("induction", [override]).recipe
    assert getattr(getattr(recipe, path[0]), path[1]) == value


def test_the_last_override_wins_and_options_come_after(tmp_path: Path) -> None:
    loaded = load_recipe("gpt2", ["seed=1", "seed=2"])
    assert loaded.recipe.seed == 2
    assert load_recipe("gpt2", ["seed=1"], seed=3, device="cpu").recipe.seed == 3


def test_an_override_makes_the_section_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(VALID.replace("[losses]\nfaithfulness = 1\n", ""))
    assert load_recipe(file, ["losses.recon=1"]).recipe.losses.recon == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["losses.recon=x"], ["--set losses.recon=x: [losses] recon = 'x': expected a number of at least 0"]),
        (
            ["losses.faithfullness=1", "loses.recon=1"],
            [
                "--set losses.faithfullness=1: [losses] unknown key 'faithfullness' (did you mean 'faithfulness'?)",
                "--set loses.recon=1: unknown section [loses] (did you mean [losses]?)",
            ],
        ),
        (
            ["losses.p_start=0.01"],
            ["--set losses.p_start=0.01: [losses] p_final = 0.1 is above p_start = 0.01; p is annealed downwards"],
        ),
        (["name.x=1"], ["--set name.x=1: name is 'toy', not a section"]),
        (["slices=3"], ["--set slices=3: slices = 3: expected a section"]),
        (["seed=-1"], ["--set seed=-1: seed = -1: expected a whole number of at least 0"]),
        (["data.begin_token=true"], ["--set data.begin_token=true: [data] is for language models"]),
    ],
)
def test_a_mistake_of_an_override_names_the_option(overrides: list[str], expected: list[str], tmp_path: Path) -> None:
    found = complaints(tmp_path, VALID, *overrides)
    for line in expected:
        assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize("text", ["losses.recon", "=1", "losses.=1", "lo sses=1"])
def test_an_override_without_key_and_value_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a key, = and a value"):
        load_recipe("induction", [text])


# --- later blame -----------------------------------------------------------------------------------


def test_a_command_can_blame_a_key_later(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(VALID)
    loaded = load_recipe(str(file), ["train.steps=3"])
    assert str(loaded.error("slices.C", "too many")) == f"{file}:9: too many"
    assert str(loaded.error("slices.init", "no data")) == f"{file}:8: no data"
    assert str(loaded.error(("slices", "matrices", 1), "odd")) == f"{file}:12: odd"
    assert str(loaded.error("train.steps", "too few")) == "--set train.steps=3: too few"
    assert str(loaded.error("device", "no GPU", "use a CPU")) == f"{file}: no GPU"


NAMES = [f"h.{layer}.{part}" for layer in range(3) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_patterns_choose_matrices_in_the_targets_order() -> None:
    def chosen(patterns: list[str]) -> list[str]:
        return select_matrices(load_recipe("gpt2", [f"slices.matrices={patterns}"]), NAMES)

    assert chosen(["*"]) == NAMES
    assert chosen(["h.2.mlp.c_fc", "h.[0-1].mlp.c_fc"]) == ["h.0.mlp.c_fc", "h.1.mlp.c_fc", "h.2.mlp.c_fc"]
    assert chosen(["h.?.attn.c_proj", "h.0.attn.*"]) == [
        "h.0.attn.c_attn",
        "h.0.attn.c_proj",
        "h.1.attn.c_proj",
        "h.2.attn.c_proj",
    ]


def test_a_pattern_that_matches_nothing_is_told_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    text = shipped()["gpt2"].read_text()
    file.write_text(text.replace('matrices = ["*"]', 'matrices = ["zzz",\n"h.1.mpl.c_fc"]'))
    line = 1 + text[: text.index("matrices = ")].count("\n")
    with pytest.raises(RecipeError) as caught:
        select_matrices(load_recipe(file), NAMES)
    first, second = caught.value.message.splitlines()
    assert first == (
        f"{file}:{line}: [slices] matrices: 'zzz' matches no matrix of the target; "
        "it has h.0.attn.c_attn, h.0.attn.c_proj, h.0.mlp.c_fc ..."
    )
    assert second.startswith(f"{file}:{line + 1}: [slices] matrices: 'h.1.mpl.c_fc' matches no matrix of the target; ")
    assert "the nearest are h.1.mlp.c_fc" in second


def test_the_toys_patterns_are_checked_before_it_is_trained(tmp_path: Path) -> None:
    told = complaints(tmp_path, VALID.replace('"?0"', '"blocks.*"').replace('"?1"', '"V7"'))
    assert told == [
        "11: [slices] matrices: 'blocks.*' matches no matrix of the target; it has Q0, K0, V0 ...",
        "12: [slices] matrices: 'V7' matches no matrix of the target; the nearest are V1, V0",
    ]


@pytest.mark.parametrize("settings", [{}, {"layers": 3, "output_projection": True}, {"feed_forward": True}])
def test_the_toys_matrices_are_known_from_the_recipe(settings: dict[str, Any]) -> None:
    shape = ToyShape(**settings)
    target = InductionTarget(kind="induction", **settings)
    assert target.matrix_names == list(toy_target(InductionToy(shape)).matrices)


def test_a_share_is_asked_for_with_both_its_ends(tmp_path: Path) -> None:
    (told,) = complaints(tmp_path, VALID, "decompose.prune_at=1.5")
    assert told == "--set decompose.prune_at=1.5: [decompose] prune_at = 1.5: expected a number between 0 and 1"


def test_a_directory_may_be_called_like_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert load_recipe("smollm2").recipe.name == "smollm2"


@pytest.mark.parametrize(("how", "losses"), [("forward", "recon"), ("position", "adversarial_recon")])
def test_delta_masks_need_a_loss_that_draws_them(how: str, losses: str) -> None:
    chosen = [f"losses.{name}=0" for name in ("recon", "recon_partial", "stochastic_recon_partial")]
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2-facts", [*chosen, f"losses.{losses}=1", f"losses.delta_masks={how}"])
    assert f"[losses] delta_masks = '{how}' is for " in caught.value.message


PLANTED = """name = "planted"
target = { kind = "planted_induction" }
slices = { C = 4 }
importance = { kind = "vector", gate_width = 4 }
losses = { recon = 1.0 }
decompose = { batch = 2, steps = 2 }
"""


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (
            'on" }',
            'on", tokens = 12 }',
            "2: [target] d_model = 32 cannot hold the 36 directions that tokens, triggers and length take",
        ),
        (
            'on" }',
            'on", triggers = 3, tokens = 4 }',
            "2: [target] length = 8: 3 triggers, their m and their return take 9 tokens",
        ),
        ('induction" }', 'lookup", tokens = 9 }', "2: [target] tokens = 9: each of 10 subjects has a token of its own"),
        (
            "recon = 1.0",
            "recon = 1.0, last_token_only = true",
            "5: [losses] last_token_only: a planted model says itself where its answers are, not only at the end",
        ),
        (
            "C = 4",
            'C = 4, init = "dual"',
            "3: [slices] init = 'dual' needs a fixed set of prompts; a planted model draws new sequences",
        ),
        (
            "width = 4",
            'width = 4, basis = "span"',
            "4: [importance] basis = 'span' needs a fixed set of prompts; a planted model draws new sequences",
        ),
        (
            "slices =",
            'data = { prompts = ["a b"] }\nslices =',
            "3: [data] is for other kinds of target; a planted model makes its own sequences",
        ),
    ],
)
def test_what_a_planted_target_cannot_be(before: str, after: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "planted.toml").write_text(PLANTED)
    assert load_recipe(str(tmp_path / "planted.toml")).recipe.target.kind == "planted_induction"
    assert complaints(tmp_path, PLANTED.replace(before, after)) == [problem]


def test_prompts_may_stand_in_a_file(tmp_path: Path) -> None:
    """One a line, blank lines and blanks around them left out; from `--set` and from the recipe alike."""
    (tmp_path / "prompts.txt").write_text("  Größe is a word\n\nthe sport of golf \n", encoding="utf-8")
    loaded = load_recipe("smollm2-prompts", [f"data.prompts={tmp_path / 'prompts.txt'}"])
    assert loaded.recipe.data is not None
    assert loaded.recipe.data.prompts == ["Größe is a word", "the sport of golf"]
    again = tmp_path / "again.toml"
    again.write_text(dump_recipe(loaded.recipe))
    assert load_recipe(again).recipe == loaded.recipe  # the prompts themselves are kept
    for name, content, said in (
        ("none.txt", None, "no such file"),
        ("empty.txt", b"\n", "prompts"),
        ("bytes.txt", b"\xff\xfe", "not text in UTF-8"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=said):
            load_recipe("smollm2-prompts", [f"data.prompts={tmp_path / name}"])
    with pytest.raises(RecipeError, match="a pipe or a device") as caught:
        load_recipe("smollm2-prompts", ["data.prompts=/dev/zero"])
    assert len(caught.value.problems) == 1
