"""The sections of a recipe that say how something is trained: [train], [decompose] and [adversary]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spdcli.engine.loss_choices import ADVERSARIES
from spdcli.engine.part_tables import OPTIMIZERS, SCHEDULES
from spdcli.recipe.choices import COLLAPSES, PRECISIONS
from spdcli.recipe.section import Coefficient, Few, OneOf, Positive, Rate, Section, Share, Size


class Optimisation(Section):
    """An optimizer and its schedule."""

    batch: Size = Field(
        description="Sequences of a step: fresh ones of a toy; as many prompts of a language model, drawn anew "
        "where there are more."
    )
    steps: Positive = Field(description="How many steps to train.")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field("adam", description="Which optimizer moves the parameters.")
    learning_rate: Rate = Field(1e-3, description="The highest learning rate.")
    weight_decay: Coefficient = Field(0.0, description="Weight decay, as the optimizer understands it.")
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(
        "constant", description="What becomes of the learning rate after the warm-up."
    )
    warmup: Coefficient = Field(
        0.0,
        description="Steps in which the learning rate climbs from 0; below 1 it is a fraction of all steps.",
    )
    log_every: Positive = Field(50, description="Steps between two lines of the log.")


class Train(Optimisation):
    """How a toy is trained, before it is decomposed (Table 3)."""


class Adversary(Section):
    """How the masks of the adversarial losses are found: projected sign ascent between importance and 1."""

    masks: Annotated[str, OneOf(ADVERSARIES)] = Field("fresh", description="Where a step's ascent starts.")
    steps: Few = Field(4, description="Steps of ascent before every step of training.")
    size: Share = Field(0.25, description="How far one of them moves a mask, as a share of the way from g to 1.")
    shared: bool = Field(
        True, description="Whether all sequences and positions share a slice's number, or have another one each."
    )
    delta: bool = Field(True, description="slices.delta: whether the delta's masks are ascended too, or stay as drawn.")


class Decompose(Optimisation):
    """The training of a decomposition (Algorithm 3)."""

    clip_slices: Rate | None = Field(None, description="The largest gradient norm of all U and V; none if not given.")
    clip_gates: Rate | None = Field(
        None, description="The largest gradient norm of the importance functions; none if not given."
    )
    prune_at: Share | None = Field(
        None, description="The share of the steps after which rare slices are switched off; never if not given."
    )
    prune_below: Share = Field(
        0.01, description="prune_at: rare is a slice that is active in fewer than this share of sequences."
    )
    slice_rate: Rate = Field(1.0, description="Multiplies the learning rate of U and V.")
    stream_batch: Size = Field(4, description="Sequences of data.stream in a step, for losses.targeted.")
    tensorboard: bool = Field(
        False, description="Write the log for TensorBoard too, into RUN/tensorboard; needs spd-cli[tensorboard]."
    )
    checkpoint_every: Positive = Field(500, description="Steps between two checkpoints, from which --resume goes on.")
    on_collapse: Annotated[str, OneOf(COLLAPSES)] = Field(
        "warn",
        description="What to do where no slice is on any more, or where the losses are as bad as with none: such a run "
        "comes to nothing. Not in the paper.",
    )
    precision: Annotated[str, OneOf(PRECISIONS)] = Field("float32", description="How products are computed.")
    plan_memory: Rate | Literal["auto"] = Field(
        4.0,
        description="GiB that the activations of one chunk of a step's variants may take; 'auto': half of what is "
        "free, at most 4. How a plan is cut decides which random number goes where: a run that another machine shall "
        "repeat names a size.",
    )
