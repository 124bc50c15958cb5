"""Tables of `spd eval` of a language model: a summary first, and no more lines for more text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdcli.commands.evidence_tables import evidence_tables, grade_of
from spdcli.engine.tables import GRADES

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.measures.evaluation_totals import Evaluation
    from spdcli.measures.language_evaluation import LanguageEvaluation
    from spdcli.measures.target_share import TargetShare
    from spdcli.runs.subject import Subject

SHOWN_PROMPTS, SHOWN_TOKENS = 4, 24  # that have tables of their own
SHOWN_ANSWERS, SHOWN_TEXT = 10, 80  # answers in a table, and characters of their prompts


def language_tables(evaluation: LanguageEvaluation, subject: Subject) -> list[Table | str]:
    """What the model of active slices alone still predicts, and active slices: a summary, and each token's where there
    are few."""
    shown = evaluation.answers[:SHOWN_ANSWERS]
    answers = answers_table(evaluation)
    columns = [one.prompt for one in shown] if len(evaluation.answers) <= SHOWN_ANSWERS else []
    entropy = evaluation.cross_entropy
    return [
        f"Measured on {evaluation.tokens} tokens of {evaluation.measured_on}, {evaluation.sequences} sequences.",
        *active_tables(evaluation, subject),
        answers,
        *evidence_tables(evaluation.evidence, columns),
        losses_line(evaluation),
        *target_share_lines(evaluation.grounding),
        f"Cross-entropy of the text, nats a token: target {entropy.target:.3f}, "
        f"active slices alone {entropy.masked:.3f}.",
    ]


def answers_table(evaluation: LanguageEvaluation) -> Table:
    """The probability of the first prompts' answers."""
    from rich.table import Table

    rest = len(evaluation.answers) - SHOWN_ANSWERS
    table = Table(
        title=f"Probability of the answer; active slices alone: {GRADES['importance'].label}",
        caption=f"and {rest} more, in eval.json" if rest > 0 else None,
    )
    for heading in ("prompt", "answer", "target", "active slices alone"):
        table.add_column(heading, justify="left" if heading in ("prompt", "answer") else "right")
    for one in evaluation.answers[:SHOWN_ANSWERS]:
        text = " ".join(one.prompt.split())
        text = text if len(text) <= SHOWN_TEXT else f"…{text[-SHOWN_TEXT:]}"
        table.add_row(
            text, repr(one.answer) if one.answer.isspace() else one.answer, f"{one.target:.3f}", f"{one.masked:.3f}"
        )
    return table


def active_tables(evaluation: LanguageEvaluation, subject: Subject) -> list[Table | str]:
    """Active slices by matrix, then a table of every token's for each prompt, where there are few of both."""
    from rich.table import Table

    summary = Table(title="Active slices")
    for heading in ("matrix", "ever", "mean a token", "most at a token"):
        summary.add_column(heading, justify="left" if heading == "matrix" else "right")
    for name, counts in evaluation.active_at.items():
        mean, most = sum(counts.values()) / len(counts), max(counts.values())
        if most:
            summary.add_row(name, str(evaluation.unique[name]), f"{mean:.1f}", f"{most:g}")
    own = subject.prompts
    assert own is not None
    if len(own.texts) > SHOWN_PROMPTS or evaluation.prompts != own.texts or max(map(len, own.pieces)) > SHOWN_TOKENS:
        return [summary]
    return [summary, *(_token_table(evaluation, number, tokens) for number, tokens in enumerate(own.pieces, start=1))]


def _token_table(evaluation: LanguageEvaluation, number: int, tokens: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=f"Active slices a token, prompt {number}")
    table.add_column("matrix")
    for token in tokens:
        table.add_column(token.strip() or repr(token), justify="right")
    for name, counts in evaluation.active_at.items():
        row = [counts[f"{number}:{position}"] for position in range(len(tokens))]
        if any(row):
            table.add_row(name, *(str(count) if count else "·" for count in row))
    return table


def losses_line(evaluation: Evaluation) -> str:
    """How many slices are active anywhere, and every loss."""
    metrics = ", ".join(
        f"{name} {value:.2e}" + (f" ({grade_of(name)})" if grade_of(name) else "")
        for name, value in evaluation.metrics.items()
    )
    return f"{evaluation.total_active} of {evaluation.total_slices} slices are active somewhere. {metrics}."


def target_share_lines(share: TargetShare) -> list[str]:
    """How far active slices lie along the target's weights, and where they are."""
    if share.last_block is None:
        return []
    blocks = ", ".join(f"{block}: {count}" for block, count in share.blocks.items())
    return [
        f"Of an active slice {share.in_weights:.0%} is in the weights, of what active slices write "
        f"{share.in_outputs:.0%} lies along the target's own answer (means). Active slices by block: {blocks}."
    ]
