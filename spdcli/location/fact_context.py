"""What all edits of a run's facts share: its prompts, the tokens of their subjects, a matrix, facts that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spdcli.edits.known_facts import OtherFacts
from spdcli.edits.prompts_and_answers import Questions
from spdcli.edits.selection import Activity, own_activity
from spdcli.edits.suppression import find_matrix
from spdcli.edits.text_changes import TextToKeep
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch, Target
from spdcli.errors import UsageError
from spdcli.runs.subject import Subject
from spdcli.targets.broad_text import second_moments

NAMING_TOKENS = 2  # of a subject: a first and a last name
NamingTokens = Sequence[tuple[int, ...]]  # of one prompt: the tokens that name its subject, each by its positions


@dataclass(frozen=True, eq=False)
class FactContext:
    """A run of a language model, and what edits of its facts share. I is d_in.

    `activity` is what its slices do on its prompts, `prompts` are the same as questions about their answers, and
    `known` the other facts that the unchanged model knows (None where it knows none). `naming[row]` are the tokens
    that name the subject of prompt `row`: there the rule looks for slices. `matrix` is the one that is edited, and
    `moments` has its second moment `[I, I]` on broad text, and those of further matrices; duals are whitened with
    `ridge` times its mean eigenvalue added. `seed` is that of every edit that is drawn. `text` should
    stay as it is, too.
    """

    subject: Subject
    decomposition: Decomposition
    activity: Activity
    prompts: Questions
    known: OtherFacts | None
    naming: Sequence[NamingTokens]
    matrix: str
    moments: Mapping[str, Tensor]
    ridge: float
    seed: int
    text: TextToKeep | None = None

    @property
    def target(self) -> Target:
        """The model that is edited."""
        return self.subject.target


def fact_context(
    subject: Subject,
    decomposition: Decomposition,
    known: OtherFacts | None,
    naming: Sequence[NamingTokens],
    matrices: Sequence[str],
    broad_text: Batch,
    ridge: float,
    seed: int,
    text: TextToKeep | None = None,
) -> FactContext:
    """The context of a run's own prompts; the first of `matrices` is the edited one."""
    activity, prompts = own_activity(subject, decomposition, seed)
    moments = second_moments(subject.target, broad_text, list(dict.fromkeys(matrices)))
    return FactContext(
        subject, decomposition, activity, prompts, known, naming, matrices[0], moments, ridge, seed, text
    )


def naming_tokens(subject: Sequence[int]) -> NamingTokens:
    """The last tokens of a subject, at most NAMING_TOKENS, in order.

    A prompt's first token is none, since every prompt parks attention there, so that what is there is not the fact's
    own (unless the subject is nothing else).
    """
    later = [position for position in subject if position > 0]
    return [(position,) for position in later[-NAMING_TOKENS:] or [max(subject)]]


def mlp_matrices(target: Target, block: int) -> list[str]:
    """The matrices of a block's MLP, in order; the last one writes for all of it."""
    if not target.parts:
        raise UsageError("a report needs a language model")
    inside = set(target.parts["mlp"][block].modules())
    return [name for name, matrix in target.matrices.items() if matrix.module in inside]


def chosen_matrix(target: Target, names: Sequence[str], wanted: str | None) -> str:
    """`wanted` if the run decomposes it; else the last matrix before the output of the first MLP that it decomposes."""
    if wanted is not None:
        return find_matrix(names, wanted, "the run decomposes")
    for block in range(len(target.blocks)):
        own = [name for name in mlp_matrices(target, block)[:-1] if name in names]
        if own:
            return own[-1]
    raise UsageError("the run decomposes no MLP matrix that reads the residual stream", "name one with --matrix")


def matrix_like(target: Target, name: str, block: int) -> str:
    """The matrix of another block that stands where `name` does in its own."""
    own = [other for other, matrix in target.matrices.items() if matrix.block == target.matrices[name].block]
    there = [other for other, matrix in target.matrices.items() if matrix.block == block]
    return there[own.index(name)]
