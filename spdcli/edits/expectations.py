"""Edit scripts put to a run: their slices found, their expectations measured.

What can be expected of a prompt's answer (or another token) and of the known facts stands in `choices.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from spdcli.edits.answer_changes import AnswerChanges, Questions, given_questions, measure_edits
from spdcli.edits.choices import ANSWER_MEASURES
from spdcli.edits.known_facts import AskedFacts, Collateral, collateral
from spdcli.edits.prompts_and_answers import about_token, join, pick
from spdcli.edits.script import Edit as Written
from spdcli.edits.script import Expect, Script, Select
from spdcli.edits.selection import Activity, Rule, find_prompt, own_activity, select
from spdcli.edits.suppression import Address, Edit, describe, find_slices, suppression
from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import RecipeError, RecipeProblem, SpdError
from spdcli.recipe.reading import Source
from spdcli.recipe.toml_lines import KeyPath
from spdcli.runs.subject import Subject


@dataclass(frozen=True, eq=False)
class Planned:
    """A script on a run, nothing measured but what a selection by effect needs.

    `slices[i]` are edit i's; `rows[i][j]` is the row of `questions` that its expectation j looks at, None for facts.
    The run's own prompts come first in `questions`.
    """

    script: Script
    slices: list[list[Address]]
    questions: Questions
    rows: list[list[int | None]] = field(default_factory=list)


def plan_script(
    subject: Subject, decomposition: Decomposition, script: Script, source: Source, seed: int, begin_token: bool
) -> Planned:
    """Finds every slice, prompt and token of a script. Raises RecipeError with all that is not there, by line."""
    activity, own = own_activity(subject, decomposition, seed)
    asked = Asked(subject, own, begin_token)
    slices: list[list[Address]] = []
    rows: list[list[int | None]] = []
    problems: list[RecipeProblem] = []
    hints: list[str | None] = []

    def tried(key: KeyPath, work: Callable[[], Any], nothing: Any) -> Any:
        try:
            return work()
        except SpdError as error:
            section = ".".join(part for part in key[:-1] if isinstance(part, str))
            problems.append(source.problem([key], f"[[{section}]] {error.message}"))
            hints.append(error.hint)
            return nothing

    for number, edit in enumerate(script.edit):
        key: KeyPath = ("edit", number, "select" if edit.slices is None else "slices")
        slices.append(tried(key, partial(_slices_of, subject, decomposition, activity, own, edit), []))
        looked: list[int | None] = []
        for place, expect in enumerate(edit.expect):
            key = ("edit", number, "expect", place, "token" if expect.token else "prompt")
            looked.append(tried(key, partial(asked.row, expect), None))
        rows.append(looked)
    if problems:
        told = [hint for hint in hints if hint]
        raise RecipeError(
            sorted(problems, key=lambda problem: problem.line or 0), told[0] if len(problems) == 1 and told else None
        )
    return Planned(script, slices, asked.questions(), rows)


def _slices_of(
    subject: Subject, decomposition: Decomposition, activity: Activity, own: Questions, edit: Written
) -> list[Address]:
    if edit.slices is not None:
        return find_slices(decomposition, edit.slices)
    assert edit.select is not None
    return select(subject, decomposition, activity, own, rule_of(edit.select, own.texts))


def rule_of(wanted: Select, prompts: Sequence[str]) -> Rule:
    """A script's selection as a rule; UsageError for a prompt that the run does not have."""
    values = wanted.model_dump(exclude={"prompt"}) | {"matrices": tuple(wanted.matrices)}
    return Rule(row=find_prompt(prompts, wanted.prompt), **values)


class Asked:
    """The questions that a script asks, each once: the run's own first."""

    def __init__(self, subject: Subject, own: Questions, begin_token: bool) -> None:
        self.subject, self.own, self.begin_token = subject, own, begin_token
        self.parts = [own]
        self.known: dict[tuple[int | str, str | None], int] = {}

    def row(self, expect: Expect) -> int | None:
        """The row of an expectation's question; UsageError where it cannot be asked."""
        if expect.prompt is None:
            return None
        key = (expect.prompt, expect.token)
        if key not in self.known:
            self.known[key] = self._new(expect.prompt, expect.token)
        return self.known[key]

    def _new(self, prompt: int | str, token: str | None) -> int:
        if isinstance(prompt, int) or prompt in self.own.texts:
            number = find_prompt(self.own.texts, prompt)
            if token is None:
                return number
            question = pick(self.own, [number])
        else:
            question = given_questions(self.subject, [prompt], self.begin_token)
        if token is not None:
            question = about_token(self.subject, question, token)
        self.parts.append(question)
        return sum(len(part.texts) for part in self.parts) - 1

    def questions(self) -> Questions:
        return join(self.parts)


def measure_script(
    subject: Subject, decomposition: Decomposition, planned: Planned, facts: AskedFacts | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Edit]]:
    """What every edit of a script does, each from the original weights, and the edits by name.

    `effects` of an entry are those on the run's own prompts, then on the script's, then on `facts`; `facts` is their
    summary without the run's own prompts; `expectations` are `{edit, name, passed, value, bound}`.
    """
    script = planned.script
    edits = {
        edit.name: suppression(subject.target, decomposition, slices, edit.together)
        for edit, slices in zip(script.edit, planned.slices, strict=True)
    }
    measured = measure_edits(subject.target, planned.questions, edits)
    moved = measure_edits(subject.target, facts.questions, edits) if facts is not None else {}
    report = []
    for edit, slices, rows in zip(script.edit, planned.slices, planned.rows, strict=True):
        effects, on_facts = measured[edit.name], moved.get(edit.name, [])
        if facts is not None:
            on_facts = facts.marked(on_facts)
        summaries = _summaries(facts, on_facts, subject, seed)
        report.append(
            {
                "name": edit.name,
                "slices": [str(address) for address in slices],
                "together": edit.together,
                "matrices": describe(subject.target, decomposition, slices, edits[edit.name]),
                "effects": effects + on_facts,
                "facts": summaries.get("others"),
                "expectations": [
                    verdict(edit, expect, _value(expect, row, effects, summaries), planned.questions, row)
                    for expect, row in zip(edit.expect, rows, strict=True)
                ],
            }
        )
    return report, edits


def _summaries(facts: AskedFacts | None, effects: AnswerChanges, subject: Subject, seed: int) -> dict[str, Collateral]:
    if facts is None:
        return {}
    own = subject.prompts.texts if subject.prompts is not None else []
    every = facts.summary(effects, seed)
    others = [effect for effect in effects if effect.prompt not in own]
    return {"all": every, "others": collateral(others, seed)}


def _value(
    expect: Expect, row: int | None, effects: AnswerChanges, summaries: Mapping[str, Collateral]
) -> float | None:
    if row is not None:
        return ANSWER_MEASURES[expect.measure](effects[row])
    assert expect.facts is not None
    return summaries[expect.facts].relative_change[expect.measure] if summaries else None


def promise(edit: Written, expect: Expect, questions: Questions, row: int | None) -> dict[str, Any]:
    """One expectation, not measured yet, in the shape of `spd.suppress/1`."""
    facts = "other facts" if expect.facts == "others" else "all facts"
    subject = facts if row is None else f"{questions.tokens[row]!r} of {questions.texts[row]!r}"
    name = expect.name or f"{expect.measure} of {subject}"
    bounds = {"bound": expect.bound, "at_least": expect.at_least, "at_most": expect.at_most}
    return {"edit": edit.name, "name": name, "passed": None, "value": None, **bounds}


def promises(planned: Planned) -> list[dict[str, Any]]:
    """Every expectation of a script, not measured yet."""
    return [
        promise(edit, expect, planned.questions, row)
        for edit, rows in zip(planned.script.edit, planned.rows, strict=True)
        for expect, row in zip(edit.expect, rows, strict=True)
    ]


def verdict(
    edit: Written, expect: Expect, value: float | None, questions: Questions, row: int | None
) -> dict[str, Any]:
    """One expectation, held against what was measured; no value (no fact is known) passes no bound."""
    return promise(edit, expect, questions, row) | {"passed": expect.holds(value), "value": value}
