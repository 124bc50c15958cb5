"""How the losses can be computed, a row each way: penalties, distances, and draws of masks.

As `tables`, which has the losses: torch-free, and a row's code is imported when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdcli.engine.tables import Choice


@dataclass(frozen=True)
class Penalty(Choice):
    """What minimality adds up of an importance g. `code` is a function of g, `parameter` and epsilon; `parameter` is
    the name of what is annealed: p or gamma."""

    parameter: str = ""


PENALTIES: dict[str, Penalty] = {
    "power": Penalty("(g + epsilon)^p - epsilon^p (Eq. 1)", "spdcli.engine.losses:power_penalty", "p"),
    "smooth_l0": Penalty(
        "g² / (g² + gamma²): flat at 0, near 1 above gamma", "spdcli.engine.losses:smooth_l0", "gamma"
    ),
}


@dataclass(frozen=True)
class OutputLoss(Choice):
    """How far a variant's outputs are from the target's, by what a target gives: logits of tokens, or vectors.

    `code` takes hidden states to one number a position, as `losses.unembed_kl` does. `distributions`: outputs are the
    log-probabilities of the next token; else they are the output vectors themselves.
    """

    distributions: bool = False


OUTPUT_LOSSES: dict[str, OutputLoss] = {
    "kl": OutputLoss("KL(target ‖ variant) of the next token, in nats", "spdcli.engine.losses:unembed_kl", True),
    "mse": OutputLoss("squared error of the output, a mean over its numbers", "spdcli.engine.losses:unembed_mse"),
}

# Where hidden losses compare: what listens to a plan pass.
HIDDEN_SITES: dict[str, Choice] = {
    "matrix": Choice("what each replaced matrix gives, x W and its bias", "spdcli.engine.hidden:MatrixWatch"),
    "block": Choice("the hidden state after each block that holds one", "spdcli.engine.hidden:BlockWatch"),
}
# What a squared error of hidden activations is divided by.
HIDDEN_SCALES: dict[str, Choice] = {
    "position": Choice(
        "the squared length of the target's own, position by position", "spdcli.engine.hidden:by_position"
    ),
    "sequence": Choice("the mean of that over the sequence", "spdcli.engine.hidden:by_sequence"),
}

SUBSETS: dict[str, Choice] = {
    "forward": Choice("one subset for all positions of a step's sample"),
    "position": Choice("another subset at every position"),
}


@dataclass(frozen=True)
class DeltaMasks(Choice):
    """How the delta's masks are drawn. `code` draws one for a whole pass; without any, the masks' source draws them.

    `everywhere`: importance-masked losses have one drawn too, which otherwise leave the delta off.
    """

    everywhere: bool = False


DELTA_MASKS: dict[str, DeltaMasks] = {
    "position": DeltaMasks("another number in [0, 1] at every position of every matrix"),
    "forward": DeltaMasks(
        "one number in [0, 1] for all positions and matrices of a pass", "spdcli.engine.variants:delta_anywhere"
    ),
    "corner": DeltaMasks(
        "one number for all positions and matrices of a pass, 0, 1 or one between, equally often; in importance-masked "
        "losses too, which otherwise leave the delta off",
        "spdcli.engine.variants:delta_at_corners",
        everywhere=True,
    ),
}

ADVERSARIES: dict[str, Choice] = {
    "fresh": Choice("masks drawn anew in every step, and then ascended"),
    "persistent": Choice("masks kept from step to step, and ascended a little in each"),
}
