"""What a recipe may say: the pydantic models, their defaults and their ranges.

Every key that the paper leaves open is here with its default; `recipe_file.py` reads TOML into it.
Knows neither torch nor transformers, so that a recipe's mistake is told at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spdcli.recipe.rules import contradictions

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(pattern=r"\S")]
GENERATED = "generated"  # the stream that is sampled from the model itself


class Section(BaseModel):
    """A table of a recipe: no key but its own, no value that has to be bent into its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class InductionTarget(Section):
    """The toy transformer of section 5.1, trained by `spd train`."""

    kind: Literal["induction"]
    path: Text | None = None  # a run of `spd train` (or a run that holds a toy); trained first when absent
    layers: Positive = 2
    heads: Positive = 1
    d_model: Positive = 16
    vocabulary: Annotated[int, Field(ge=2)] = 128  # the s token comes on top
    length: Annotated[int, Field(ge=4)] = 64
    positions: Literal["shortformer", "added"] = "shortformer"
    layer_norm: bool = False
    feed_forward: bool = False
    output_projection: bool = False  # open in the paper: its Table 1 lists Q, K and V alone

    @property
    def matrix_names(self) -> list[str]:
        """The toy's matrices, named as in Table 1, in the order of execution."""
        letters = ["Q", "K", "V", *["O"] * self.output_projection, *["Up", "Down"] * self.feed_forward]
        return [f"{letter}{layer}" for layer in range(self.layers) for letter in letters]


class HuggingFaceTarget(Section):
    """A causal language model of the GPT-2 or Llama family."""

    kind: Literal["huggingface"]
    model: Text  # a hub id, a local directory, a .gguf file, or package:NAME/FILE.gguf
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    split_attention: bool = False  # GPT-2: decompose c_attn as its q, k and v parts


class ModuleTarget(Section):
    """A module that Python gives: `spdcli.decompose(recipe, target=spdcli.module_target(...), data=tokens)`."""

    kind: Literal["module"]


class Data(Section):
    """Prompts of a language-model target; the toy makes its own sequences."""

    prompts: Annotated[list[Text], Field(min_length=1)]
    answers: Literal["held_out", "fed"] = "held_out"  # is a prompt's last token fed, or only predicted?
    begin_token: bool = False  # put the tokenizer's begin-of-sequence token before every prompt
    stream: Text | None = None  # broad text: 'generated' (sampled from the model itself), or a text file
    stream_sequences: Positive = 256  # how many sequences of it
    stream_length: Annotated[int, Field(ge=2)] = 16  # and how many tokens each


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
    matrices: Annotated[list[Text], Field(min_length=1)] = ["*"]  # names or * patterns
    init: Literal["random", "svd", "svd_span", "dual", "dual_whitened"] = "random"  # open in the paper
    ridge: Rate = 0.3  # dual_whitened: added to the stream's second moment, as a share of its mean eigenvalue
    delta: bool = False  # W - UV as one more component with a mask of its own
    faithfulness_warmup: Annotated[int, Field(ge=0)] = 0  # steps on faithfulness alone before the run


class Importance(Section):
    """The causal importance functions (section 4.1, Algorithm 1)."""

    kind: Literal["scalar", "vector", "shared", "attention"]
    gate_width: Positive
    activation: Literal["relu", "gelu"] = "gelu"  # open in the paper
    gate_spread: Coefficient = 1.0  # how far apart importances start around gate_bias; open in the paper
    gate_bias: float = 0.5  # where every importance starts, before the sigmoid; open in the paper
    normalise: Literal["none", "rms"] = "none"  # of the gates' input; open in the paper
    basis: Literal["full", "span"] = "full"  # span: vector gates see coordinates in the data's span
    relative: Literal["scalar", "query"] = "query"  # one bias an offset, or query . R[offset]
    relative_start: Literal["zero", "local"] = "zero"  # local: scalar biases start at -0.5 |offset|
    causal: bool = False  # Algorithm 1's 2s offsets look both ways
    backend: Literal["auto", "dense", "blocked", "flex"] = "auto"


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
    attention: Coefficient = 0.0  # KL of the attention patterns of recon and stochastic_recon; the toy alone
    targeted: Coefficient = 0.0  # what minimality and recon losses count on data.stream, where the delta stays on
    samples: Positive = 1  # S
    p_start: Rate = 0.9
    p_final: Rate = 0.1
    anneal_p: bool = True
    epsilon: Rate = 1e-12  # added to g before the power p
    last_token_only: bool = False
    layerwise_matrices: Positive | None = None  # of layerwise losses, so many drawn every step; unbiased, not exact
    faithfulness_probes: Positive | None = None  # random vectors a matrix in place of U V; unbiased, not exact
    subset: Literal["forward", "position"] = "forward"  # partial losses: one subset a forward, or a position
    kl: Literal["target_to_variant", "variant_to_target"] = "target_to_variant"


class Decompose(Optimisation):
    """The training of a decomposition (Algorithm 3)."""

    clip_slices: Rate | None = None
    clip_gates: Rate | None = None
    prune_at: Annotated[float, Field(gt=0, lt=1)] | None = None  # share of the steps after which rare slices end
    prune_below: Annotated[float, Field(gt=0, lt=1)] = 0.01  # rare: active in fewer than this share of sequences
    slice_rate: Rate = 1.0  # multiplies the learning rate of U and V
    stream_batch: Positive = 4  # sequences of data.stream in a step, for losses.targeted
    checkpoint_every: Positive = 500
    # GiB that the activations of one chunk of a plan may take; auto: half of what is free, at most 4. How a plan is cut
    # decides which random number goes where: a run that another machine shall repeat names a size.
    # float32: products as torch does them; tf32: on a GPU, its tensor cores; bf16: in the blocks, losses in float32.
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    plan_memory: Rate | Literal["auto"] = 4.0


class Recipe(Section):
    """A whole recipe: what to take apart, into what, and how long."""

    name: Text
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    target: Annotated[InductionTarget | HuggingFaceTarget | ModuleTarget, Field(discriminator="kind")]
    data: Data | None = None
    train: Train | None = None
    slices: Slices
    importance: Importance
    losses: Losses
    decompose: Decompose

    @model_validator(mode="after")
    def settings_agree(self) -> Recipe:
        if found := contradictions(self.model_dump()):
            raise ValueError("; ".join(contradiction.message for contradiction in found))
        return self
