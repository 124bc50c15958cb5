"""What a recipe may say: the pydantic models, their defaults and their ranges.

Every key that the paper leaves open is here with its default; `recipe_file.py` reads TOML into it.
Knows neither torch nor transformers, so that a recipe's mistake is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InductionTarget(Section):
    """The toy transformer of section 5.1, trained by `spd train`."""

    kind: Literal["induction"]
    path: str | None = None  # a run of `spd train` (or a run that holds a toy); trained first when absent
    layers: Positive = 2
    heads: Positive = 1
    d_model: Positive = 16
    vocabulary: Annotated[int, Field(ge=2)] = 128  # the s token comes on top
    length: Annotated[int, Field(ge=4)] = 64
    positions: Literal["shortformer", "added"] = "shortformer"
    layer_norm: bool = False
    feed_forward: bool = False
    output_projection: bool = False  # open in the paper: its Table 1 lists Q, K and V alone

    @model_validator(mode="after")
    def heads_divide_width(self) -> InductionTarget:
        if self.d_model % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide d_model = {self.d_model}")
        return self


class HuggingFaceTarget(Section):
    """A causal language model of the GPT-2 or Llama family."""

    kind: Literal["huggingface"]
    model: str  # a hub id, a local directory, a .gguf file, or package:NAME/FILE.gguf
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    split_attention: bool = False  # GPT-2: decompose c_attn as its q, k and v parts


class Data(Section):
    """Prompts of a language-model target; the toy makes its own sequences."""

    prompts: Annotated[list[str], Field(min_length=1)]
    answers: Literal["held_out", "fed"] = "held_out"  # is a prompt's last token fed, or only predicted?
    begin_token: bool = False  # put the tokenizer's begin-of-sequence token before every prompt


class Optimisation(Section):
    """An optimizer and its schedule; `warmup` below 1 is a fraction of `steps`, else a number of steps."""

    batch: Positive
    steps: Positive
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: Rate = 1e-3
    weight_decay: Coefficient = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Coefficient = 0.0
    log_every: Positive = 50


class Train(Optimisation):
    """How the toy is trained (Table 3)."""


class Slices(Section):
    """The rank-1 subcomponents of every chosen matrix."""

    C: Positive
    matrices: Annotated[list[str], Field(min_length=1)] = ["*"]  # names or * patterns
    init: Literal["random", "svd", "svd_span"] = "random"  # open in the paper
    delta: bool = False  # W - UV as one more component with a mask of its own
    faithfulness_warmup: Annotated[int, Field(ge=0)] = 0  # steps on faithfulness alone before the run


class Importance(Section):
    """The causal importance functions (section 4.1, Algorithm 1)."""

    kind: Literal["scalar", "vector", "shared", "attention"]
    gate_width: Positive
    activation: Literal["relu", "gelu"] = "gelu"  # open in the paper
    gate_bias: float = 0.5  # where every importance starts, before the sigmoid; open in the paper
    normalise: Literal["none", "rms"] = "none"  # of the gates' input; open in the paper
    basis: Literal["full", "span"] = "full"  # span: vector gates see coordinates in the data's span
    relative: Literal["scalar", "query"] = "query"  # one bias an offset, or query . R[offset]
    relative_start: Literal["zero", "local"] = "zero"  # local: scalar biases start at -0.5 |offset|
    causal: bool = False  # Algorithm 1's 2s offsets look both ways
    backend: Literal["auto", "dense", "blocked", "flex"] = "auto"

    @model_validator(mode="after")
    def basis_fits_kind(self) -> Importance:
        if self.basis == "span" and self.kind != "vector":
            raise ValueError(f"basis = 'span' is for kind = 'vector', not '{self.kind}'")
        if self.relative_start == "local" and self.relative != "scalar":
            raise ValueError("relative_start = 'local' needs relative = 'scalar'")
        return self


class Losses(Section):
    """Coefficients of Eq. 1, 2, 3, 5, 6 (0 leaves a loss out) and how their masks are drawn."""

    faithfulness: Coefficient = 0.0
    minimality: Coefficient = 0.0
    recon: Coefficient = 0.0
    recon_layerwise: Coefficient = 0.0
    recon_partial: Coefficient = 0.0
    stochastic_recon: Coefficient = 0.0
    stochastic_recon_layerwise: Coefficient = 0.0
    stochastic_recon_partial: Coefficient = 0.0
    samples: Positive = 1  # S
    p_start: Rate = 0.9
    p_final: Rate = 0.1
    anneal_p: bool = True
    epsilon: Rate = 1e-12  # added to g before the power p
    last_token_only: bool = False
    subset: Literal["forward", "position"] = "forward"  # partial losses: one subset a forward, or a position
    kl: Literal["target_to_variant", "variant_to_target"] = "target_to_variant"

    @model_validator(mode="after")
    def p_falls(self) -> Losses:
        if self.anneal_p and self.p_final > self.p_start:
            raise ValueError(f"p_final = {self.p_final} is above p_start = {self.p_start}; p is annealed downwards")
        return self


class Decompose(Optimisation):
    """The training of a decomposition (Algorithm 3)."""

    clip_slices: Rate | None = None
    clip_gates: Rate | None = None
    checkpoint_every: Positive = 500
    plan_memory: Rate = 4.0  # GiB that the activations of one chunk of a plan may take


class Recipe(Section):
    """A whole recipe: what to take apart, into what, and how long."""

    name: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    target: Annotated[InductionTarget | HuggingFaceTarget, Field(discriminator="kind")]
    data: Data | None = None
    train: Train | None = None
    slices: Slices
    importance: Importance
    losses: Losses
    decompose: Decompose

    @model_validator(mode="after")
    def sections_fit_target(self) -> Recipe:
        if self.target.kind == "huggingface" and self.data is None:
            raise ValueError("a huggingface target needs [data] with prompts")
        if self.target.kind == "huggingface" and self.train is not None:
            raise ValueError("[train] is for the induction toy; a huggingface target comes trained")
        if self.target.kind == "induction" and self.data is not None:
            raise ValueError("[data] is for language models; the induction toy makes its own sequences")
        if self.target.kind == "induction" and self.train is None and self.target.path is None:
            raise ValueError("an induction target needs [train], or target.path naming a trained toy")
        if self.importance.basis == "span" and self.data is None:
            raise ValueError("basis = 'span' needs a fixed set of prompts in [data]")
        return self
