"""What a recipe may say: the pydantic models, their defaults, their ranges and what each key means.

`reading.py` reads TOML into them, and the descriptions here are the recipe reference. Every key that the paper leaves
open is here with its default. What can be chosen, and which losses there are, stands in `engine.tables`.
Knows neither torch nor transformers, so that a recipe's mistake is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spdcli.engine.part_tables import (
    ACTIVATIONS,
    BACKENDS,
    BASES,
    DISTINCT,
    GATE_STARTS,
    IMPORTANCE_FUNCTIONS,
    NORMS,
    RELATIVE_BIASES,
    RELATIVE_STARTS,
    STARTS,
)
from spdcli.recipe.bounds import Certify
from spdcli.recipe.choices import ANSWERS, DEVICES, DTYPES, POSITIONS
from spdcli.recipe.losses import Losses
from spdcli.recipe.planted import PlantedInductionTarget, PlantedLookupTarget
from spdcli.recipe.rules import contradictions
from spdcli.recipe.section import MOST, Coefficient, Few, OneOf, Positive, Rate, Section, Seed, Share, Size, Text
from spdcli.recipe.training import Adversary, Decompose, Train

GENERATED = "generated"  # the stream that is sampled from the model itself


class ToyTarget(Section):
    """A target that is trained on the spot."""

    kind: str
    path: Text | None = Field(
        None,
        description="A run directory that holds a trained toy: of `spd train`, or of `spd decompose`; or "
        "package:NAME/FOLDER, one of an installed package: package:spdcli/targets/paper_toy is the toy of Table 3, "
        "trained in full. Without it the toy is trained first, by [train].",
    )

    @property
    def matrix_names(self) -> list[str]:
        """The toy's matrices, in the order of execution."""
        raise NotImplementedError


class InductionTarget(ToyTarget):
    """The toy transformer of section 5.1, trained by `spd train`; its defaults are those of Table 3."""

    kind: Literal["induction"] = Field(description="This kind of target: the toy.")
    layers: Few = Field(2, description="How many blocks (section 5.1: 2).")
    heads: Few = Field(1, description="Attention heads of a block (section 5.1: 1); they divide d_model.")
    d_model: Size = Field(16, description="Width of the residual stream (Table 3: 16).")
    vocabulary: Annotated[int, Field(ge=2, le=MOST)] = Field(
        128, description="Number of tokens; the token s comes on top (Table 3: 128)."
    )
    length: Annotated[int, Field(ge=4, le=MOST)] = Field(64, description="Tokens of a sequence (Table 3: 64).")
    positions: Annotated[str, OneOf(POSITIONS)] = Field(
        "before", description="How a token's position enters (Table 3: Shortformer)."
    )
    layer_norm: bool = Field(
        False, description="A layer norm before every attention and MLP, and at the end (Table 3: no)."
    )
    feed_forward: bool = Field(False, description="An MLP of width 4 d_model in every block (Table 3: no).")
    output_projection: bool = Field(
        False, description="A matrix O after attention. Open in the paper, whose Table 1 lists Q, K and V alone."
    )
    begin_token: bool = Field(
        False,
        description="Begin every sequence with a token of its own, bos, as the authors' public code does. Not in the "
        "paper.",
    )

    @property
    def matrix_names(self) -> list[str]:
        """The toy's matrices, named as in Table 1, in the order of execution."""
        letters = ["Q", "K", "V", *["O"] * self.output_projection, *["Up", "Down"] * self.feed_forward]
        return [f"{letter}{layer}" for layer in range(self.layers) for letter in letters]


class TMSTarget(ToyTarget):
    """A toy model of superposition, ReLU(Wᵀ W x + b), of the first SPD paper; trained by `spd train`."""

    kind: Literal["tms"] = Field(description="This kind of target: a toy model of superposition.")
    features: Annotated[int, Field(ge=2, le=MOST)] = Field(
        5, description="Features, the numbers of an input, from 0 to 1."
    )
    hidden: Size = Field(2, description="Dimensions that W squeezes them into.")
    identity: bool = Field(False, description="A fixed identity matrix I between W and its transpose.")
    feature_probability: Share = Field(0.05, description="How often a feature is not 0, in training and in the data.")

    @property
    def matrix_names(self) -> list[str]:
        return ["W", *["I"] * self.identity, "WT"]


class ResidMLPTarget(ToyTarget):
    """A residual MLP that learns x + ReLU(x) of more features than it has neurons, of the first SPD paper."""

    kind: Literal["resid_mlp"] = Field(description="This kind of target: a residual MLP.")
    features: Annotated[int, Field(ge=2, le=MOST)] = Field(
        100, description="Features, the numbers of an input, from -1 to 1."
    )
    d_model: Size = Field(1000, description="Width of the residual stream, where features have random directions.")
    d_mlp: Size = Field(50, description="Neurons of every layer.")
    layers: Few = Field(1, description="How many MLPs, one after the other.")
    feature_probability: Share = Field(0.01, description="How often a feature is not 0, in training and in the data.")

    @property
    def matrix_names(self) -> list[str]:
        return [f"{matrix}{layer}" for layer in range(self.layers) for matrix in ("W_in", "W_out")]


class HuggingFaceTarget(Section):
    """A causal language model of a family that the guide lists."""

    kind: Literal["huggingface"] = Field(description="This kind of target: a language model.")
    model: Text = Field(
        description="Where the model is: a hub id, a local directory, a .gguf file, package:NAME/FILE.gguf, a file of "
        "an installed package, or random:pythia or random:gemma, small ones with random weights."
    )
    dtype: Annotated[str, OneOf(DTYPES)] = Field(
        "float32", description="The numbers that the model is held in; slices and gates have float32 at least."
    )
    split_attention: bool = Field(
        False,
        description="Decompose every part of a fused weight as a matrix of its own: q, k and v of GPT-2's c_attn, gate "
        "and up of Phi-3's. Open in the paper.",
    )


class ModuleTarget(Section):
    """A module that Python gives: `spdcli.decompose(recipe, target=spdcli.module_target(...), data=tokens)`."""

    kind: Literal["module"] = Field(description="This kind of target: a module of your own, given in Python.")


class Data(Section):
    """Prompts of a language-model target, or text in their place; the toy makes its own sequences."""

    prompts: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None,
        description="The texts to decompose on (section 5.2 has two), or the name of a file with one a line; if not "
        "given, data.stream.",
    )
    answers: Annotated[str, OneOf(ANSWERS)] = Field(
        "held_out", description="What becomes of a prompt's last token, its answer."
    )
    begin_token: bool | None = Field(
        None,
        description="Whether the tokenizer's begin-of-sequence token stands before every prompt, and every sequence of "
        "a corpus; as the tokenizer itself does if it is left out (GPT-2's and SmolLM2's put none, Llama's and Gemma's "
        "do).",
    )
    stream: Text | None = Field(
        None,
        description="A corpus: what is decomposed on where there are no prompts; beside prompts, broad text for "
        "losses.targeted and slices.init = 'dual_whitened'. A text file, a directory of them, a .jsonl or .parquet "
        "file, datasets:NAME[:CONFIG][:SPLIT] of the datasets library, or 'generated', which samples text from the "
        "model itself. Not in the paper.",
    )
    stream_field: Text = Field("text", description="Where rows of a .jsonl, .parquet or dataset have their text.")
    stream_sequences: Positive | None = Field(
        None,
        description="How many sequences of the corpus are kept, chosen by the seed; if not given all, of 'generated' "
        "256 beside prompts and 4096 without any.",
    )
    stream_length: Annotated[int, Field(ge=2, le=MOST)] | None = Field(
        None, description="Tokens of each of them; if not given, 16 beside prompts, else 128."
    )
    stream_held_out: Share = Field(
        0.05,
        description="The share of a corpus that is never trained on, at least one sequence: spd eval measures there. "
        "Of 'generated' as much text is sampled anew.",
    )

    @property
    def length(self) -> int:
        """Tokens of a sequence of the corpus."""
        return self.stream_length or (128 if self.prompts is None else 16)

    @property
    def sequences(self) -> int | None:
        """How many sequences of the corpus are kept; None is all."""
        if self.stream not in (None, GENERATED):
            return self.stream_sequences
        return self.stream_sequences or (4096 if self.prompts is None else 256)


class Slices(Section):
    """The rank-1 subcomponents of every chosen matrix (section 4)."""

    C: Size = Field(description="Slices of every matrix (Table 4: 100, Figure 6: 768).")
    matrices: Annotated[list[Text], Field(min_length=1)] = Field(
        ["*"],
        description="Which matrices to decompose: names, or patterns with * (anything), ? (one letter) and [0-5].",
    )
    init: Annotated[str, OneOf(STARTS)] = Field("random", description="How U and V start. Open in the paper.")
    ridge: Rate = Field(
        0.3,
        description="init = 'dual_whitened': what is added to the second moment of the broad text's inputs, as a "
        "share of its mean eigenvalue.",
    )
    distinct: Share = Field(
        DISTINCT,
        description="init = 'dual' and 'dual_whitened': inputs that differ by no more than this share of the larger "
        "norm get one slice together.",
    )
    fill: Share | None = Field(
        None,
        description="init = 'dual' and 'dual_whitened': where more inputs are distinct than this share of C and of the "
        "matrix's input dimensions, those that differ least are taken together; if not given, all have to fit.",
    )
    delta: bool = Field(
        False,
        description="Whether the delta W - U V, which no slice holds, is one more component with a mask of its own. "
        "The paper has none.",
    )
    faithfulness_warmup: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="Steps on faithfulness alone before the run. Not in the paper."
    )


class Importance(Section):
    """The causal importance functions (section 4.1, Eq. 4, Algorithm 1)."""

    kind: Annotated[str, OneOf(IMPORTANCE_FUNCTIONS)] = Field(
        description="Which importance function (Table 4: attention, Figure 6: vector)."
    )
    gate_width: Size = Field(
        description="Hidden units of the MLP that tells a slice's importance (D_gate; Table 4: 16, Figure 6: 64); "
        "kind = 'global': of the MLP in each of its layers."
    )
    activation: Annotated[str, OneOf(ACTIVATIONS)] = Field(
        "gelu", description="The MLP's activation function. Open in the paper."
    )
    gate_spread: Coefficient = Field(
        1.0,
        description="How far apart importances start around gate_bias; 1 is what unit-variance weights give. Open in "
        "the paper.",
    )
    gate_bias: float = Field(
        0.5,
        description="Where importances start, before the leaky sigmoid σ_H: 0 is off, 1 on. Open in the paper.",
    )
    start: Annotated[str, OneOf(GATE_STARTS)] = Field(
        "random", description="Where importances start. Open in the paper."
    )
    normalise: Annotated[str, OneOf(NORMS)] = Field("none", description="What the input x is put through first.")
    basis: Annotated[str, OneOf(BASES)] = Field(
        "full", description="Which coordinates of x vector gates read; span is for a fixed set of prompts."
    )
    relative: Annotated[str, OneOf(RELATIVE_BIASES)] = Field(
        "query", description="kind = 'attention': the learned relative bias r (Algorithm 1, line 3: query)."
    )
    relative_start: Annotated[str, OneOf(RELATIVE_STARTS)] = Field(
        "zero", description="kind = 'attention': where relative biases start. Open in the paper."
    )
    causal: bool = Field(
        False,
        description="kind = 'attention' and 'global': hide later positions. Algorithm 1's 2s offsets look both ways.",
    )
    backend: Annotated[str, OneOf(BACKENDS)] = Field(
        "auto", description="kind = 'attention': which kernel computes line 4 of Algorithm 1; the result is the same."
    )
    layers: Few = Field(2, description="kind = 'global': layers of the transformer. Not in the paper.")
    width: Size = Field(64, description="kind = 'global': its width. Not in the paper.")
    heads: Few = Field(
        4, description="kind = 'global': attention heads of a layer; width is a multiple of twice their number."
    )


class Recipe(Section):
    """A whole recipe: what to take apart, into what, and how long."""

    name: Text = Field(description="The recipe's name.")
    seed: Seed = Field(0, description="Seed of every random choice.")
    device: Annotated[str, OneOf(DEVICES)] = Field("auto", description="Where to compute.")
    target: Annotated[
        InductionTarget
        | TMSTarget
        | ResidMLPTarget
        | HuggingFaceTarget
        | ModuleTarget
        | PlantedInductionTarget
        | PlantedLookupTarget,
        Field(discriminator="kind"),
    ] = Field(description="The model to take apart.")
    data: Data | None = Field(None, description="What a language model is decomposed on; of no other target.")
    train: Train | None = Field(None, description="How a toy is trained; not for a language model.")
    slices: Slices = Field(description="The slices of every matrix.")
    importance: Importance = Field(description="The importance functions.")
    losses: Losses = Field(description="The losses and how much each counts.")
    adversary: Adversary | None = Field(
        None, description="How the masks of adversarial losses are found; its defaults if not given."
    )
    decompose: Decompose = Field(description="The training of the decomposition.")
    certify: Certify | None = Field(None, description="What the finished run must hold.")

    @model_validator(mode="after")
    def settings_agree(self) -> Recipe:
        if problems := contradictions(self.model_dump()):
            raise ValueError("; ".join(contradiction.message for contradiction in problems))
        return self
