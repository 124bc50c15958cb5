"""Edit scripts as files: what they mean, and every mistake at once with its line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spdcli.edits.script import KIND, Expect, load_script
from spdcli.errors import RecipeError

GOOD = """\
[[edit]]
name = "one"
slices = ["a:1", "b:2"]
together = "sequence"

[[edit.expect]]
prompt = 1
measure = "ratio"
at_most = 0.5

[[edit.expect]]
name = "nothing else"
facts = "others"
measure = "max"
at_most = 0.05

[[edit]]
name = "two"

[edit.select]
prompt = "Tiger Woods plays golf"
token = " Woods"
matrices = ["layers.0.mlp.*"]
only_at = true
top = 2
by = "effect"
threshold = 0.25
"""


def problems(folder, text):
    path = folder / "edits.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_script(path)
    assert error.value.exit_code == 2
    assert error.value.hint == KIND.hint
    return [str(problem).removeprefix(f"{path}:") for problem in error.value.problems]


def test_a_script_is_read(tmp_path):
    path = tmp_path / "edits.toml"
    path.write_text(GOOD)
    script, source = load_script(path)
    one, two = script.edit
    assert (one.slices, one.together, one.select) == (["a:1", "b:2"], "sequence", None)
    assert [expect.bound for expect in one.expect] == ["≤ 0.5", "≤ 0.05"]
    assert (two.select.token, two.select.only_at, two.select.unique, two.select.by) == (" Woods", True, True, "effect")
    assert (two.expect, two.together) == ([], "literal")
    assert script.asks_facts
    assert source.lines["edit", 0, "expect", 1, "facts"] == 13


def test_every_mistake_has_its_line(tmp_path):
    text = GOOD.replace('name = "two"', 'name = "one"\nexpects = []').replace("top = 2", "top = 0")
    text = text.replace('by = "effect"', 'by = "efect"').replace('prompt = "Tiger Woods plays golf"', "prompt = 0")
    text = text.replace("at_most = 0.5", 'at_most = "0.5"')
    assert problems(tmp_path, text) == [
        "9: [[edit.expect]] at_most = '0.5': expected a number",
        "19: [[edit]] unknown key 'expects' (did you mean 'expect'?)",
        "22: [[edit]] select.prompt = 0: expected a whole number of at least 1 or text in quotes, not empty",
        "26: [[edit]] select.top = 0: expected a whole number of at least 1",
        "27: [[edit]] select.by = 'efect': expected one of 'importance', 'written', 'weight', 'effect' "
        "(did you mean 'effect'?)",
    ]


def test_what_types_cannot_say_has_its_line_too(tmp_path):
    text = """\
[[edit]]
name = "a"
[[edit]]
name = "a"
slices = ["m:1"]
select = { prompt = 1, token = "x" }
[[edit.expect]]
measure = "kl"
at_most = 1
[[edit.expect]]
prompt = 1
facts = "all"
measure = "kl"
[[edit.expect]]
prompt = 1
measure = "mean"
at_most = 1
[[edit.expect]]
facts = "others"
token = "x"
measure = "ratio"
at_least = 2
at_most = 1
"""
    assert problems(tmp_path, text) == [
        "1: [[edit]] 'a' has no slices: expected slices or [edit.select]",
        "4: [[edit]] name = 'a': is there already",
        "5: [[edit]] 'a' has slices and select: give one of the two",
        "7: [[edit.expect]] expected prompt, facts or text",
        "10: [[edit.expect]] prompt and facts: give one of the two",
        "10: [[edit.expect]] no bound: expected at_most or at_least",
        "16: [[edit.expect]] measure = 'mean': of a prompt expected one of "
        "'probability', 'ratio', 'change', 'kl', 'rank'",
        "20: [[edit.expect]] token: only a prompt has one",
        "21: [[edit.expect]] measure = 'ratio': of facts expected one of 'median', 'mean', 'max'",
        "22: [[edit.expect]] nothing is ≥ 2 and ≤ 1",
    ]


@pytest.mark.parametrize(
    ("text", "said"), [("", "missing section [[edit]]"), ("edit = 3", "edit = 3: expected sections, at least one")]
)
def test_no_edits_is_a_mistake(text, said, tmp_path):
    (problem,) = problems(tmp_path, text)
    assert said in problem


@pytest.mark.parametrize(
    ("bounds", "value", "holds"),
    [
        ({"at_most": 0.5}, 0.5, True),
        ({"at_most": 0.5}, 0.51, False),
        ({"at_least": 0.5}, 0.5, True),
        ({"at_least": 0.5}, 0.49, False),
        ({"at_least": 1, "at_most": 2}, 3, False),
        ({"at_most": 0.5}, float("nan"), False),
        ({"at_most": 0.5}, None, False),
    ],
)
def test_bounds(bounds, value, holds):
    assert Expect(prompt=1, measure="kl", **bounds).holds(value) is holds


def test_a_script_is_checked_without_torch():
    code = (
        "import sys, spdcli.edits.script, spdcli.edits.facts_file; sys.exit(len({'torch', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
