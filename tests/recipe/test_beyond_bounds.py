"""Numbers, nesting and lists that nobody means: one line each, at once, in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from spdcli.errors import LISTED, RecipeError, SpdError, UsageError
from spdcli.recipe.reading import load_recipe
from spdcli.recipe.toml_lines import DEEPEST, key_lines, read_tables, split_key

DIGITS = "9" * 4301
HEXADECIMAL = f"0x{'f' * 4000}"


def lines_of(*settings: str) -> list[str]:
    """The lines of the error that these settings of a shipped recipe give."""
    with pytest.raises(SpdError) as caught:
        load_recipe("induction", list(settings))
    assert caught.value.exit_code == 2
    return caught.value.message.split("\n")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            f"target.layers={2**63 - 1}",
            f"[target] layers = {2**63 - 1}: expected a whole number of at least 1 and at most 1,000",
        ),
        (f"seed={DIGITS}", "9...: a whole number is beyond 64 bits"),
        (f"seed={2**64}", f"--set seed={2**64}: a whole number is beyond 64 bits"),
        (f"seed={2**63 - 1}", "expected a whole number of at least 0 and at most 4,611,686,018,427,387,904"),
        (f"losses.recon={HEXADECIMAL}", "f...: a whole number is beyond 64 bits"),
        (f"slices.C={'[' * 500}{']' * 500}", "[...: more than 50 arrays, tables or parts of a key are in each other"),
        (f"slices.C={'[' * 60}{']' * 60}", "[...: more than 50 arrays, tables or parts of a key are in each other"),
        ("losses.layerwise_matrices=1000001", "expected a whole number of at least 1 and at most 1,000,000"),
        ("slices.C=1000000001", "[slices] C = 1000000001: expected a whole number of at least 1 and at most 1,000,000"),
    ],
)
def test_a_setting_beyond_bounds_is_one_short_line(setting: str, line: str) -> None:
    (only,) = lines_of(setting)
    assert line in only
    assert len(only) < 300


def test_a_key_of_a_thousand_parts_is_no_key() -> None:
    with pytest.raises(UsageError, match=r"--set a\.a\.a.*\.\.\.: expected a key") as caught:
        load_recipe("induction", ["a." * 1500 + "b=1"])
    assert len(caught.value.message) < 200
    assert split_key(".".join("a" * (DEEPEST + 1))) is None
    assert split_key("a.b.c") == ("a", "b", "c")


def test_long_lists_of_mistakes_are_cut() -> None:
    lines = lines_of(f"slices.matrices=[{'1,' * 30000}]")
    assert len(lines) == LISTED + 1
    assert lines[-1].endswith("and 29,980 more mistakes")
    assert max(map(len, lines)) < 250


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        (f"name = 'x'\nseed = {DIGITS}", "2:8", "a whole number is beyond 64 bits"),
        (f"name = 'x'\nseed = {HEXADECIMAL}", "2:8", "a whole number is beyond 64 bits"),
        (f"name = 'x'\n[a]\nb = [{2**63}]", "3:6", "a whole number is beyond 64 bits"),
        (f"C = {'[' * 500}{']' * 500}", "1:1", "more than 50 arrays, tables or parts of a key are in each other"),
        (f"C = {'[' * 99}{']' * 99}", "1:1", "more than 50 arrays, tables or parts of a key are in each other"),
        (f"{'a.' * 1500}b = 1", "1:1", "more than 50 arrays, tables or parts of a key are in each other"),
        (f"C = {'{a=' * 99}1{'}' * 99}", "1:1", "more than 50 arrays, tables or parts of a key are in each other"),
    ],
)
def test_a_file_beyond_bounds_is_told_with_its_place(tmp_path: Path, text: str, place: str, what: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert caught.value.message == f"{file}:{place}: not valid TOML: {what}"


def test_what_is_within_bounds_is_read() -> None:
    deep = f"C = {'[' * (DEEPEST - 2)}1{']' * (DEEPEST - 2)}\nseed = {2**63 - 1}\nleast = {-(2**63) + 1}"
    assert read_tables(deep) == tomli.loads(deep)
    assert len(key_lines(deep)) == DEEPEST + 1
