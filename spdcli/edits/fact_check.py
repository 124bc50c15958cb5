"""What a model knows of a facts file, and whether the file's notes say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.edits.answer_changes import present_answers
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.edits.known_facts import fact_questions
from spdcli.engine.target import Target
from spdcli.progress import Report, silent


@dataclass(frozen=True)
class FactCheck:
    """One fact or related prompt put to a model: an entry of `spd facts check` (`spd.facts.check/1`).

    The answer `token` has probability `p` and rank `rank`, by which the model has it `known` or not. `noted` is what
    the file says of this model, None where it does not speak of it, and `agrees` whether that is right.
    """

    category: str
    prompt: str
    token: str
    p: float
    rank: int
    known: bool
    noted: bool | None
    agrees: bool | None


def check_facts(
    target: Target, tokenizer: Any, facts: Facts, begin_token: bool, name: str, known: Known, report: Report = silent
) -> list[FactCheck]:
    """What a model called `name` knows of a facts file, one entry a fact and a related prompt, in the file's order."""
    entries: list[Fact | Related] = [*facts.fact, *facts.related]
    questions = fact_questions(tokenizer, entries, begin_token, target.device)
    now = present_answers(target, questions, report)
    knows = known.holds(now.p, now.rank).tolist()
    checks = []
    for row, entry in enumerate(entries):
        noted = name in entry.known_by if name in facts.models else None
        checks.append(
            FactCheck(
                category=entry.category if isinstance(entry, Fact) else entry.kind,
                prompt=entry.prompt,
                token=questions.tokens[row],
                p=now.p[row].item(),
                rank=int(now.rank[row]),
                known=knows[row],
                noted=noted,
                agrees=None if noted is None else noted == knows[row],
            )
        )
    return checks


def renewed(facts: Facts, checks: Sequence[FactCheck], name: str, known: Known) -> Facts:
    """The facts with their notes about the model `name` as `check_facts` has them at the thresholds `known`."""
    knows = {check.prompt: check.known for check in checks}

    def noted(entry: Any) -> Any:
        others = [model for model in entry.known_by if model != name]
        return entry.model_copy(update={"known_by": [*others, *[name] * knows[entry.prompt]]})

    return facts.model_copy(
        update={
            "models": [*(model for model in facts.models if model != name), name],
            "known": known,
            "fact": [noted(fact) for fact in facts.fact],
            "related": [noted(related) for related in facts.related],
        }
    )
