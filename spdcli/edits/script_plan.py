"""Edit scripts put to a run: the slices of every edit, and the question of every expectation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from spdcli.edits.exam import Expectation
from spdcli.edits.prompts_and_answers import Questions, about_token, given_questions, join, pick
from spdcli.edits.script import Expect, Script, ScriptEdit, Select
from spdcli.edits.selection import Activity, Rule, own_activity, select
from spdcli.edits.suppression import Address, Edit, find_slices, suppression
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Target
from spdcli.errors import RecipeError, RecipeProblem, SpdError
from spdcli.measures.texts import find_prompt
from spdcli.recipe.reading import Source
from spdcli.recipe.toml_lines import KeyPath
from spdcli.runs.subject import Subject


@dataclass(frozen=True, eq=False)
class ScriptPlan:
    """A script on a run, nothing measured but what a selection by effect needs.

    `slices[i]` are edit i's; `rows[i][j]` is the row of `questions` that its expectation j looks at, None for facts and
    text. The run's own prompts come first in `questions`; `edited[i]` says which of them edit i is about: the one that
    its slices are selected in, or those that they are active in.
    """

    script: Script
    slices: list[list[Address]]
    questions: Questions
    rows: list[list[int | None]] = field(default_factory=list)
    edited: list[list[bool]] = field(default_factory=list)

    def edits(self, target: Target, decomposition: Decomposition) -> dict[str, Edit]:
        """Every edit by its name, each of the original weights."""
        return {
            edit.name: suppression(target, decomposition, slices, edit.together, edit.strength)
            for edit, slices in zip(self.script.edit, self.slices, strict=True)
        }

    def expectation(self, edit: ScriptEdit, expect: Expect, row: int | None) -> Expectation:
        """One expectation in words, not measured yet; `row` is the question that it looks at."""
        unasked = "the text" if expect.text else "other facts" if expect.facts == "others" else "all facts"
        subject = unasked if row is None else f"{self.questions.tokens[row]!r} of {self.questions.texts[row]!r}"
        return Expectation(
            edit=edit.name,
            name=expect.name or f"{expect.measure} of {subject}",
            bound=expect.bound,
            at_least=expect.at_least,
            at_most=expect.at_most,
        )

    def expectations(self) -> list[Expectation]:
        """Every expectation of the script, not measured yet."""
        return [
            self.expectation(edit, expect, row)
            for edit, rows in zip(self.script.edit, self.rows, strict=True)
            for expect, row in zip(edit.expect, rows, strict=True)
        ]


class ScriptProblems:
    """What a script names and the run does not have, collected by line so that all of it is told at once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[RecipeProblem] = []
        self.hints: list[str] = []

    def attempt(self, key: KeyPath, work: Callable[[], Any], otherwise: Any) -> Any:
        """What `work` gives; where it fails, `otherwise`, and a problem at `key`."""
        try:
            return work()
        except SpdError as error:
            section = ".".join(part for part in key[:-1] if isinstance(part, str))
            self.problems.append(self.source.problem([key], f"[[{section}]] {error.message}"))
            self.hints += [error.hint] if error.hint else []
            return otherwise

    def check(self) -> None:
        """RecipeError with every problem, if there is one; a hint goes with a single problem alone."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem.line or 0)
            raise RecipeError(ordered, self.hints[0] if len(ordered) == 1 and self.hints else None)


def plan_script(
    subject: Subject, decomposition: Decomposition, script: Script, source: Source, seed: int
) -> ScriptPlan:
    """Finds every slice, prompt and token of a script. Raises RecipeError with all that is not there, by line."""
    activity, own = own_activity(subject, decomposition, seed)
    sheet, problems = QuestionSheet(subject, own), ScriptProblems(source)
    slices: list[list[Address]] = []
    rows: list[list[int | None]] = []
    for number, edit in enumerate(script.edit):
        key: KeyPath = ("edit", number, "select" if edit.slices is None else "slices")
        slices.append(problems.attempt(key, partial(_slices_of, subject, decomposition, activity, own, edit), []))
        looked: list[int | None] = []
        for place, expect in enumerate(edit.expect):
            key = ("edit", number, "expect", place, "token" if expect.token else "prompt")
            looked.append(problems.attempt(key, partial(sheet.row, expect), None))
        rows.append(looked)
    problems.check()
    edited = [_edited(activity, own, edit, each) for edit, each in zip(script.edit, slices, strict=True)]
    return ScriptPlan(script, slices, sheet.questions(), rows, edited)


def _edited(activity: Activity, own: Questions, edit: ScriptEdit, slices: Sequence[Address]) -> list[bool]:
    """Which of the run's `own` prompts an edit of these slices is about."""
    if edit.select is not None:
        chosen = find_prompt(own.texts, edit.select.prompt)
        return [row == chosen for row in range(len(own.texts))]
    active = [activity.g[one.matrix][:, :, one.index].amax(1) > 0 for one in slices]
    return torch.stack(active).any(0).tolist()


def _slices_of(
    subject: Subject, decomposition: Decomposition, activity: Activity, own: Questions, edit: ScriptEdit
) -> list[Address]:
    if edit.slices is not None:
        return find_slices(decomposition, edit.slices)
    assert edit.select is not None
    return select(subject, decomposition, activity, own, rule_of(edit.select, own.texts))


def rule_of(section: Select, prompts: Sequence[str]) -> Rule:
    """A script's selection as a rule; UsageError for a prompt that the run does not have."""
    values = section.model_dump(exclude={"prompt"}) | {"matrices": tuple(section.matrices)}
    return Rule(row=find_prompt(prompts, section.prompt), **values)


class QuestionSheet:
    """The questions that a script asks, each once: the run's `own` first."""

    def __init__(self, subject: Subject, own: Questions) -> None:
        self.subject, self.own = subject, own
        self.parts = [own]
        self.rows: dict[tuple[int | str, str | None], int] = {}

    def row(self, expect: Expect) -> int | None:
        """The row of an expectation's question, None for facts and text; UsageError where it cannot be asked."""
        if expect.prompt is None:
            return None
        key = (expect.prompt, expect.token)
        if key not in self.rows:
            self.rows[key] = self._add(expect.prompt, expect.token)
        return self.rows[key]

    def _add(self, prompt: int | str, token: str | None) -> int:
        if isinstance(prompt, int) or prompt in self.own.texts:
            number = find_prompt(self.own.texts, prompt)
            if token is None:
                return number
            question = pick(self.own, [number])
        else:
            question = given_questions(self.subject, [prompt])
        if token is not None:
            question = about_token(self.subject, question, token)
        self.parts.append(question)
        return sum(len(part.texts) for part in self.parts) - 1

    def questions(self) -> Questions:
        return join(self.parts)
