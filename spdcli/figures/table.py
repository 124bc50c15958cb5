"""The paper's figures: what each shows, what draws it here, and the command that does; read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperFigure:
    """One figure of the paper, by its `number`: what it `shows`, and the `command` that draws or shows it.

    `drawn_by` is the function, as `module:name`. A figure that is a list of settings or of sentences is a `file` here,
    by its path in the repository.
    """

    number: int
    shows: str
    command: str
    drawn_by: str = ""
    file: str = ""


FIGURES = (
    PaperFigure(
        1,
        "a sequence of the induction task, and what attends to what in it",
        "spd eval RUN",
        drawn_by="spdcli.figures.circuit:save_sequence",
    ),
    PaperFigure(
        2,
        "SPD against greedy SVD pruning: KL by what is left of the matrices",
        "spd svd RUN",
        drawn_by="spdcli.figures.curves:save_rank_curves",
    ),
    PaperFigure(
        3,
        "suppressed slices change the answer of their own prompt, and hardly those of others",
        "spd report RUN",
        drawn_by="spdcli.figures.facts:save_slices",
    ),
    PaperFigure(
        4,
        "the probability of a prompt's answer without the slice of each part of a name, and without both",
        "spd report RUN",
        drawn_by="spdcli.figures.facts:save_names",
    ),
    PaperFigure(
        5,
        "the toy's loss and accuracy while it trains: a plateau, then the phase change",
        "spd train RECIPE",
        drawn_by="spdcli.figures.curves:save_training_curve",
    ),
    PaperFigure(6, "the settings of GPT-2's decomposition", "spd recipe show gpt2", file="recipes/gpt2.toml"),
    PaperFigure(
        7,
        "causal tracing of the first prompt: the answer's probability after restoring each place",
        "spd trace RUN",
        drawn_by="spdcli.figures.facts:save_trace",
    ),
    PaperFigure(
        8,
        "causal tracing of the second prompt",
        "spd trace RUN",
        drawn_by="spdcli.figures.facts:save_trace",
    ),
    PaperFigure(
        9,
        "the probability of the answer with each MLP layer zeroed",
        "spd ablate RUN --mlp all --figure",
        drawn_by="spdcli.figures.facts:save_zeroed",
    ),
    PaperFigure(10, "sentences of the dataset of facts", "spd facts ls", file="spdcli/edits/facts.toml"),
)
