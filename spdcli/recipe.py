"""What a recipe may say: the pydantic models, their defaults and their ranges.

Every key that the paper leaves open is here with its default; `recipe_file.py` reads TOML into it.
Knows neither torch nor transformers, so that a recipe's mistake is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    target: Annotated[InductionTarget | HuggingFaceTarget, Field(discriminator="kind")]
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


class Contradiction(NamedTuple):
    """Settings that are fine one by one and cannot be together."""

    keys: tuple[str, ...]  # dotted; the first is the one that the message starts with
    message: str


Sections = Mapping[str, Any]


def contradictions(recipe: Sections) -> list[Contradiction]:
    """Every contradiction in `recipe`, a dict of sections with their defaults filled in.

    A section or a key may be absent, as the malformed ones of a recipe with other mistakes are:
    a rule that needs it is silent then, so that all mistakes can be told at once.
    """
    found: list[Contradiction] = []
    for rule in RULES:
        with suppress(KeyError):
            found.extend(rule(recipe))
    return found


def _sections_fit_target(recipe: Sections) -> Iterator[Contradiction]:
    kind, data, train = recipe["target"]["kind"], recipe["data"], recipe["train"]
    if kind == "huggingface":
        if data is None:
            yield Contradiction(("data", "target.kind"), "missing section [data]: a huggingface target needs prompts")
        if train is not None:
            yield Contradiction(("train",), "[train] is for the induction toy; a huggingface target comes trained")
    if kind == "induction":
        if data is not None:
            yield Contradiction(("data",), "[data] is for language models; the induction toy makes its own sequences")
        if train is None and recipe["target"]["path"] is None:
            yield Contradiction(
                ("train", "target.kind"),
                "missing section [train]: an induction target is trained first, unless target.path names a trained one",
            )


def _heads_divide_width(recipe: Sections) -> Iterator[Contradiction]:
    heads, width = recipe["target"]["heads"], recipe["target"]["d_model"]
    if width % heads:
        yield Contradiction(
            ("target.heads", "target.d_model"), f"[target] heads = {heads} does not divide d_model = {width}"
        )


def _span_fits(recipe: Sections) -> Iterator[Contradiction]:
    importance = recipe["importance"]
    if importance["basis"] != "span":
        return
    if importance["kind"] != "vector":
        yield Contradiction(
            ("importance.basis", "importance.kind"),
            f"[importance] basis = 'span' is for kind = 'vector', not '{importance['kind']}'",
        )
    if recipe["target"]["kind"] == "induction":
        yield Contradiction(
            ("importance.basis", "target.kind"),
            "[importance] basis = 'span' needs a fixed set of prompts; the induction toy draws new sequences",
        )


def _dual_fits(recipe: Sections) -> Iterator[Contradiction]:
    init = recipe["slices"]["init"]
    if not init.startswith("dual"):
        return
    if recipe["target"]["kind"] == "induction":
        yield Contradiction(
            ("slices.init", "target.kind"),
            f"[slices] init = '{init}' needs a fixed set of prompts; the induction toy draws new sequences",
        )
    elif init == "dual_whitened" and recipe["data"] is not None and recipe["data"]["stream"] is None:
        yield Contradiction(
            ("slices.init", "data.stream"),
            "[slices] init = 'dual_whitened' needs broad text to whiten by: [data] stream = 'generated', or a file",
        )


def _targeted_fits(recipe: Sections) -> Iterator[Contradiction]:
    if not recipe["losses"]["targeted"]:
        return
    if not recipe["slices"]["delta"]:
        yield Contradiction(
            ("losses.targeted", "slices.delta"), "[losses] targeted keeps the delta on, and [slices] delta = false"
        )
    if recipe["data"] is None or recipe["data"]["stream"] is None:
        yield Contradiction(
            ("losses.targeted", "data.stream"),
            "[losses] targeted needs broad text beside the prompts: [data] stream = 'generated', or a file",
        )


def _local_start_fits(recipe: Sections) -> Iterator[Contradiction]:
    importance = recipe["importance"]
    if importance["relative_start"] == "local" and importance["relative"] != "scalar":
        yield Contradiction(
            ("importance.relative_start", "importance.relative"),
            f"[importance] relative_start = 'local' needs relative = 'scalar', not '{importance['relative']}'",
        )


def _backend_fits_device(recipe: Sections) -> Iterator[Contradiction]:
    if recipe["importance"]["backend"] == "flex" and recipe["device"] == "cpu":
        yield Contradiction(
            ("importance.backend", "device"), "[importance] backend = 'flex' needs a GPU, and device = 'cpu'"
        )


def _p_falls(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    start, final = losses["p_start"], losses["p_final"]
    if losses["anneal_p"] and final > start:
        yield Contradiction(
            ("losses.p_final", "losses.p_start"),
            f"[losses] p_final = {final} is above p_start = {start}; p is annealed downwards",
        )


def _something_to_train(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    terms = [name for name in Losses.model_fields if name == "faithfulness" or "recon" in name]
    if not any(losses[name] for name in terms):
        yield Contradiction(
            ("losses",),
            "[losses] faithfulness and every recon coefficient are 0: nothing holds the slices to the target",
        )


def _savings_fit(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    if losses["layerwise_matrices"] and not (losses["recon_layerwise"] or losses["stochastic_recon_layerwise"]):
        yield Contradiction(
            ("losses.layerwise_matrices",), "[losses] layerwise_matrices is set, but both layerwise losses are 0"
        )
    if losses["faithfulness_probes"] and not losses["faithfulness"]:
        yield Contradiction(
            ("losses.faithfulness_probes",), "[losses] faithfulness_probes is set, but faithfulness is 0"
        )


def _attention_fits(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    if not losses["attention"]:
        return
    if recipe["target"]["kind"] != "induction":
        yield Contradiction(("losses.attention",), "[losses] attention is for the induction toy")
    if not (losses["recon"] or losses["stochastic_recon"]):
        yield Contradiction(
            ("losses.attention",), "[losses] attention compares what recon and stochastic_recon run; both are 0"
        )


RULES: tuple[Callable[[Sections], Iterator[Contradiction]], ...] = (
    _sections_fit_target,
    _heads_divide_width,
    _span_fits,
    _dual_fits,
    _targeted_fits,
    _local_start_fits,
    _backend_fits_device,
    _p_falls,
    _something_to_train,
    _savings_fit,
    _attention_fits,
)
