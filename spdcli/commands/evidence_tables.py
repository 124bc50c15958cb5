"""Tables of what a decomposition's reconstruction is worth, the weakest evidence first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdcli.engine.tables import GRADES, LOSSES
from spdcli.measures.evidence_choices import MASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from spdcli.measures.attacks import Attack
    from spdcli.measures.evidence import Evidence

MEANING = (
    "A decomposition claims that any masks between importance and 1, and any delta, leave the target as it is. "
    "A small KL under importance masks alone says little."
)


def grade_of(loss: str) -> str:
    """What a loss is worth as evidence, in a word or two; nothing for one of another kind."""
    grade = LOSSES[loss].grade if loss in LOSSES else None
    return grade.label if grade else ""


def evidence_tables(evidence: Evidence, prompts: Sequence[str] = ()) -> list[Table | str]:
    """KL and what is still told right under every kind of mask; `prompts` name the columns of answers, of a language
    model. Then the curve, where there is one, and what the searches were allowed."""
    from rich.table import Table

    table = Table(title="Evidence: KL to the target (nats), by how masks are chosen")
    for heading in ("masks", "evidence"):
        table.add_column(heading)
    heads = [f"P(answer {number})" for number in range(1, len(prompts) + 1)] if evidence.answers else []
    for heading in ("KL", "right", *heads):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, kl in evidence.kl.items():
        right = evidence.accuracy.get(name)
        chances = [f"{value:.3f}" for value in evidence.answers.get(name, ())] if evidence.answers else []
        shown = "" if right is None else f"{right:.2%}"
        table.add_row(MASKS[name], GRADES[evidence.grades[name]].label, f"{kl:.1e}", shown, *chances)
    searches = {name: found for name, found in evidence.attacks.items() if name in MASKS}
    for name, found in searches.items():
        table.add_row(MASKS[name], GRADES["adversarial"].label, f"{found.kl:.1e}", f"{found.accuracy:.2%}")
    allowed = [f"{MASKS[name]}: {found.allowed}." for name, found in searches.items()]
    return [table, *curve_tables(evidence.pgd_curve or ()), *allowed, MEANING]


def curve_tables(curve: Sequence[Attack]) -> list[Table | str]:
    """The largest KL by how many steps of what size the search had."""
    from rich.table import Table

    if not curve:
        return []
    table = Table(title="The same search with more and smaller steps: KL and what is still told right")
    for heading in ("steps", "size", "KL", "right"):
        table.add_column(heading, justify="right")
    for point in curve:
        table.add_row(str(point.steps), f"{point.size:.4g}", f"{point.kl:.1e}", f"{point.accuracy:.2%}")
    return [table, f"{curve[0].starts} random starts and the corners."]
