"""Settings of a recipe with a few possible values: those that only a recipe knows.

What the engine can be told stands in `engine.tables`.
"""

from __future__ import annotations

from spdcli.engine.tables import Choice

DEVICES: dict[str, Choice] = {
    "auto": Choice("a GPU if there is one, else the processor"),
    "cpu": Choice("the processor"),
    "cuda": Choice("an NVIDIA GPU"),
}

# The kinds of target that are trained on the spot, by [train].
TOYS: dict[str, Choice] = {
    "induction": Choice("the induction toy"),
    "tms": Choice("a toy model of superposition"),
    "resid_mlp": Choice("a toy residual MLP"),
}

POSITIONS: dict[str, Choice] = {
    "before": Choice("sinusoids added to what Q and K read, and to nothing else, as the paper's text says"),
    "after": Choice("sinusoids added to what Q and K write, and to nothing else, as its authors' public code does"),
    "added": Choice("sinusoids added to the embedding, before the first block"),
}

DTYPES: dict[str, Choice] = {
    "float32": Choice("4 bytes a number"),
    "float64": Choice("8 bytes a number"),
    "bfloat16": Choice("2 bytes a number, 8 bits of precision"),
}

ANSWERS: dict[str, Choice] = {
    "held_out": Choice("a prompt's last token is what has to be predicted, and is not fed"),
    "fed": Choice("the whole prompt is fed, its last token too"),
}

DIVERGENCES: dict[str, Choice] = {
    "target_to_variant": Choice("KL(target ‖ variant)"),
    "variant_to_target": Choice("KL(variant ‖ target)"),
}

PRECISIONS: dict[str, Choice] = {
    "float32": Choice("every product in float32"),
    "tf32": Choice("on a GPU, products by its tensor cores, whose factors have 10 bits"),
    "bf16": Choice("products in the plan's blocks in bfloat16; importances and losses in float32"),
}

COLLAPSES: dict[str, Choice] = {
    "warn": Choice("tell it, and go on"),
    "stop": Choice("save everything and stop"),
    "rewind": Choice("go on from the last checkpoint before it, at half the learning rate"),
}

USUAL_DELTA_MASKS = "corner"  # of DELTA_MASKS: the only ones that train a delta that is all on, or all off
