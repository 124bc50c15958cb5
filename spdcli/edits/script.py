"""Edit scripts: named suppressions with what is expected of each, as TOML, so that an edit can be tested.

    [[edit]]
    name = "Kobe Bryant plays nothing"
    slices = ["layers.0.mlp.up_proj:3"]       # or [edit.select], which chooses by rule

    [[edit.expect]]
    prompt = 1                                # a number of the run's prompts, or a text whose last token is the answer
    measure = "ratio"
    at_most = 0.4

    [[edit.expect]]
    facts = "others"
    measure = "max"
    at_most = 0.05

Every edit is measured on its own, from the original weights. Knows neither torch nor transformers;
`edits/selection.py`, `edits/script_plan.py` and `edits/expectations.py` do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from spdcli.disk import write_text
from spdcli.edits.choices import (
    ANSWER_MEASURES,
    MEASURES,
    ORDERS,
    STATISTICS,
    TEXT_MEASURES,
    TOGETHER,
    USUAL_TOGETHER,
)
from spdcli.recipe.documents import Kind, load_document
from spdcli.recipe.reading import Source
from spdcli.recipe.section import OneOf, Positive, Section, Text
from spdcli.recipe.toml_lines import KeyPath
from spdcli.recipe.wording import Mistake

KIND = Kind(
    "an edit script", "a script has [[edit]] sections with slices or [edit.select], and [[edit.expect]] sections"
)
Prompt = Positive | Text
ABOUT_MEASURES = {"prompt": ANSWER_MEASURES, "facts": STATISTICS, "text": TEXT_MEASURES}  # what a bound may be about
ABOUT = tuple(ABOUT_MEASURES)
MANY = {2: "two", 3: "three"}


class Select(Section):
    """Slices by rule (see `edits/selection.py`)."""

    prompt: Prompt  # of the run: its number, or its text
    token: Text
    unique: bool = True  # active in no other prompt of the run
    only_at: bool = False  # and nowhere else in this one
    matrices: Annotated[list[Text], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    top: Positive | None = None  # all of them when absent
    by: Annotated[str, OneOf(ORDERS)] = "importance"
    threshold: Annotated[float, Field(ge=0)] = 0.0


class Expect(Section):
    """A bound on one number: of a prompt, of the facts that the model knows, or of a text."""

    name: Text | None = None
    prompt: Prompt | None = None
    token: Text | None = None  # the prompt's answer when absent
    facts: Literal["others", "all"] | None = None  # others: none of the run's prompts
    text: Literal["corpus"] | None = None  # that of --text, or the run's own that nothing is trained on
    measure: Annotated[str, OneOf(MEASURES)]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def bound(self) -> str:
        """The bound in words."""
        sides = [("≥", self.at_least), ("≤", self.at_most)]
        return " and ".join(f"{sign} {value:g}" for sign, value in sides if value is not None)

    def holds(self, value: float | None) -> bool:
        """Whether `value` is within the bound; no value never is."""
        if value is None:
            return False
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


class ScriptEdit(Section):
    """A named suppression of slices."""

    name: Text
    slices: Annotated[list[Text], Field(min_length=1)] | None = None
    select: Select | None = None
    together: Annotated[str, OneOf(TOGETHER)] = USUAL_TOGETHER
    strength: Annotated[float, Field(gt=0, le=10)] = 1.0  # how much of that is done
    expect: list[Expect] = Field(default_factory=list)


class Script(Section):
    """An edit script."""

    edit: Annotated[list[ScriptEdit], Field(min_length=1)]

    @property
    def asks_facts(self) -> bool:
        return any(expect.facts is not None for edit in self.edit for expect in edit.expect)

    @property
    def asks_text(self) -> bool:
        return any(expect.text is not None for edit in self.edit for expect in edit.expect)


def load_script(path: Path) -> tuple[Script, Source]:
    """The script at `path`, and where its keys stand. Raises RecipeError with every mistake."""
    return load_document(path, Script, KIND, mistakes)


def add_edit(path: Path, slices: Sequence[str], name: str = "explored") -> str:
    """Write an edit that suppresses `slices` to the script at `path`, after those that are there; gives its name.

    A name that is taken gets a number. RecipeError where the file is no edit script, and it stays as it is.
    """
    import tomli_w

    before, taken = "", set[str]()
    if path.exists():
        script, _ = load_script(path)
        taken = {edit.name for edit in script.edit}
        before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    free = next(one for n in count(1) if (one := name if n == 1 else f"{name} {n}") not in taken)
    body = tomli_w.dumps({"name": free, "slices": list(slices)})
    write_text(path, f"{before}[[edit]]\n{body}")
    return free


def mistakes(script: Script) -> Iterator[Mistake]:
    """What types and ranges cannot say: names twice, edits without slices, expectations of nothing."""
    names = [edit.name for edit in script.edit]
    for number, edit in enumerate(script.edit):
        here: KeyPath = ("edit", number)
        if edit.name in names[:number]:
            yield Mistake(((*here, "name"),), f"[[edit]] name = {edit.name!r}: is there already")
        if (edit.slices is None) == (edit.select is None):
            said = "give one of the two" if edit.slices is not None else "expected slices or [edit.select]"
            keys = ((*here, "slices"), here) if edit.slices is not None else (here,)
            yield Mistake(
                keys, f"[[edit]] {edit.name!r} has {'slices and select' if edit.slices else 'no slices'}: {said}"
            )
        for place, expect in enumerate(edit.expect):
            yield from expectation_mistakes((*here, "expect", place), expect)


def expectation_mistakes(here: KeyPath, expect: Expect) -> Iterator[Mistake]:
    """What is wrong with one expectation at `here`."""
    asked = [name for name in ABOUT if getattr(expect, name) is not None]
    if len(asked) != 1:
        said = (
            f"{' and '.join(asked)}: give one of the {MANY[len(asked)]}"
            if asked
            else f"expected {', '.join(ABOUT[:-1])} or {ABOUT[-1]}"
        )
        yield Mistake((here,), f"[[edit.expect]] {said}")
    elif expect.measure not in (own := ABOUT_MEASURES[asked[0]]):
        of = "a prompt" if asked == ["prompt"] else asked[0]
        expected = ", ".join(f"'{name}'" for name in own)
        yield Mistake(
            ((*here, "measure"),), f"[[edit.expect]] measure = '{expect.measure}': of {of} expected one of {expected}"
        )
    if expect.token is not None and expect.prompt is None:
        yield Mistake(((*here, "token"),), "[[edit.expect]] token: only a prompt has one")
    if expect.at_most is None and expect.at_least is None:
        yield Mistake((here,), "[[edit.expect]] no bound: expected at_most or at_least")
    elif None not in (expect.at_most, expect.at_least) and expect.at_least > expect.at_most:  # type: ignore[operator]
        yield Mistake(((*here, "at_least"), here), f"[[edit.expect]] nothing is {expect.bound}")
