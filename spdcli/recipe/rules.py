"""Settings of a recipe that are fine one by one and cannot be together.

Knows neither torch nor pydantic: a recipe is a dict of sections here. What losses, importance functions and starts
need stands in their rows of `engine.tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

from spdcli.engine.part_tables import IMPORTANCE_FUNCTIONS, STARTS
from spdcli.engine.tables import losses_where
from spdcli.recipe.choices import TOYS, USUAL_DELTA_MASKS
from spdcli.recipe.contradiction import Contradiction, Sections
from spdcli.recipe.planted_rules import maker_of_sequences, planted_fits

HOLDING = losses_where(lambda loss: loss.holds)  # the losses that hold slices to the target
LAYERWISE = losses_where(lambda loss: loss.scope == "each")
SAMPLED = losses_where(lambda loss: loss.sampled)
ASCENDED = losses_where(lambda loss: loss.ascended)
ATTENDED = losses_where(lambda loss: loss.attended)
BEGUN_LENGTH = 5  # a begin token, an ordinary one, s, m and s


def contradictions(recipe: Sections) -> list[Contradiction]:
    """Every contradiction in `recipe`, a dict of sections with their defaults filled in.

    A section or a key may be absent, as the malformed ones of a recipe with other mistakes are:
    a rule that needs it is silent then, so that all mistakes can be told at once.
    """
    problems: list[Contradiction] = []
    for rule in RULES:
        with suppress(KeyError):
            problems.extend(rule(recipe))
    return problems


def _sections_fit_target(recipe: Sections) -> Iterator[Contradiction]:
    kind, data, train = recipe["target"]["kind"], recipe["data"], recipe["train"]
    if kind == "huggingface":
        if data is None:
            yield Contradiction(
                ("data", "target.kind"), "missing section [data]: a huggingface target needs prompts, or text"
            )
        elif data["prompts"] is None and data["stream"] is None:
            yield Contradiction(
                ("data.prompts", "data"), "[data] has neither prompts nor a stream, the text to decompose on"
            )
        if train is not None:
            yield Contradiction(("train",), "[train] is for toys; a huggingface target comes trained")
    if kind != "huggingface" and kind not in TOYS and (data is not None or train is not None):
        section = "data" if data is not None else "train"
        own = "a module's data are given in Python" if kind == "module" else "a planted model makes its own sequences"
        yield Contradiction((section,), f"[{section}] is for other kinds of target; {own}")
    if kind in TOYS:
        if data is not None:
            yield Contradiction(("data",), "[data] is for language models; a toy draws its own data")
        if train is None and recipe["target"]["path"] is None:
            yield Contradiction(
                ("train", "target.kind"),
                f"missing section [train]: a target of kind '{kind}' is trained first, unless target.path names a "
                "trained one",
            )


def _features_fit(recipe: Sections) -> Iterator[Contradiction]:
    if recipe["target"]["kind"] not in ("tms", "resid_mlp"):
        return
    if IMPORTANCE_FUNCTIONS[recipe["importance"]["kind"]].attends:
        yield Contradiction(
            ("importance.kind", "target.kind"),
            "[importance] kind = 'attention' looks over a sequence; inputs of this target have one position",
        )
    if recipe["losses"]["kl"] != "target_to_variant":
        yield Contradiction(
            ("losses.kl", "target.kind"), "[losses] kl is the order of two distributions; this target gives vectors"
        )


def _heads_divide_width(recipe: Sections) -> Iterator[Contradiction]:
    heads, width = recipe["target"]["heads"], recipe["target"]["d_model"]
    if width % heads:
        yield Contradiction(
            ("target.heads", "target.d_model"), f"[target] heads = {heads} does not divide d_model = {width}"
        )


def _s_fits_between(recipe: Sections) -> Iterator[Contradiction]:
    length, begun = recipe["target"]["length"], recipe["target"]["begin_token"]
    if begun and length < BEGUN_LENGTH:
        yield Contradiction(
            ("target.length", "target.begin_token"),
            f"[target] length = {length}: with a begin token a sequence has {BEGUN_LENGTH} tokens at least",
        )


def _span_fits(recipe: Sections) -> Iterator[Contradiction]:
    importance = recipe["importance"]
    if importance["basis"] != "span":
        return
    if not IMPORTANCE_FUNCTIONS[importance["kind"]].spans:
        spanning = " or ".join(f"'{name}'" for name, row in IMPORTANCE_FUNCTIONS.items() if row.spans)
        yield Contradiction(
            ("importance.basis", "importance.kind"),
            f"[importance] basis = 'span' is for kind = {spanning}, not '{importance['kind']}'",
        )
    if maker := maker_of_sequences(recipe["target"]["kind"]):
        yield Contradiction(
            ("importance.basis", "target.kind"),
            f"[importance] basis = 'span' needs a fixed set of prompts; {maker} draws new sequences",
        )
    if _only_text(recipe):
        yield Contradiction(
            ("importance.basis", "data.stream"),
            "[importance] basis = 'span' needs a fixed set of prompts, and [data] has none: 'full' holds on any text",
        )


def _global_heads_fit(recipe: Sections) -> Iterator[Contradiction]:
    importance = recipe["importance"]
    heads, width = importance["heads"], importance["width"]
    if IMPORTANCE_FUNCTIONS[importance["kind"]].joint and width % (2 * heads):
        yield Contradiction(
            ("importance.width", "importance.heads"),
            f"[importance] width = {width} is no multiple of twice the heads = {heads}: a head's coordinates are pairs",
        )


def _start_fits(recipe: Sections) -> Iterator[Contradiction]:
    init, kind = recipe["slices"]["init"], recipe["target"]["kind"]
    start = STARTS[init]
    if start.fixed_data and (maker := maker_of_sequences(kind)):
        yield Contradiction(
            ("slices.init", "target.kind"),
            f"[slices] init = '{init}' needs a fixed set of prompts; {maker} draws new sequences",
        )
    elif start.fixed_data and _only_text(recipe):
        yield Contradiction(
            ("slices.init", "data.stream"),
            f"[slices] init = '{init}' needs a fixed set of prompts, and [data] has none; 'svd' needs none",
        )
    elif start.needs_moment and kind != "huggingface":
        own, other = ("a module", "dual") if kind == "module" else ("this target", "svd")
        yield Contradiction(
            ("slices.init", "target.kind"),
            f"[slices] init = '{init}' needs broad text to whiten by, and {own} has none; '{other}' needs none",
        )
    elif start.needs_moment and recipe["data"] is not None and recipe["data"]["stream"] is None:
        yield Contradiction(
            ("slices.init", "data.stream"),
            f"[slices] init = '{init}' needs broad text to whiten by: [data] stream = 'generated', or a file",
        )


def _only_text(recipe: Sections) -> bool:
    """Whether what is decomposed on is a corpus, and no prompts."""
    return recipe["data"] is not None and recipe["data"]["prompts"] is None


def _targeted_fits(recipe: Sections) -> Iterator[Contradiction]:
    if not recipe["losses"]["targeted"]:
        return
    if _only_text(recipe):
        yield Contradiction(
            ("losses.targeted", "data.prompts"),
            "[losses] targeted is for prompts in front of text, and [data] has none",
        )
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
    if importance["start"] == "inner" and importance["gate_width"] < 2:
        yield Contradiction(
            ("importance.gate_width", "importance.start"), "[importance] start = 'inner' needs gate_width = 2 or more"
        )
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


def _gamma_falls(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    start, final = losses["gamma_start"], losses["gamma_final"]
    if losses["penalty"] == "smooth_l0" and final > start:
        yield Contradiction(
            ("losses.gamma_final", "losses.gamma_start"),
            f"[losses] gamma_final = {final} is above gamma_start = {start}; gamma is annealed downwards",
        )


def _something_to_train(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    if not any(losses[name] for name in HOLDING):
        yield Contradiction(
            ("losses",),
            "[losses] faithfulness and every recon coefficient are 0: nothing holds the slices to the target",
        )


def _savings_fit(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    if losses["layerwise_matrices"] and not any(losses[name] for name in LAYERWISE):
        yield Contradiction(
            ("losses.layerwise_matrices",),
            f"[losses] layerwise_matrices is set, but {_all_of(LAYERWISE)} layerwise losses are 0",
        )
    if losses["faithfulness_probes"] and not (losses["faithfulness"] or losses["relative_faithfulness"]):
        yield Contradiction(
            ("losses.faithfulness_probes",), "[losses] faithfulness_probes is set, but faithfulness is 0"
        )


def _attention_fits(recipe: Sections) -> Iterator[Contradiction]:
    losses = recipe["losses"]
    if not losses["attention"]:
        return
    if recipe["target"]["kind"] != "induction":
        yield Contradiction(("losses.attention",), "[losses] attention is for the induction toy")
    if not any(losses[name] for name in ATTENDED):
        yield Contradiction(
            ("losses.attention",),
            f"[losses] attention compares what {' and '.join(ATTENDED)} run; {_all_of(ATTENDED)} are 0",
        )


def _delta_masks_fit(recipe: Sections) -> Iterator[Contradiction]:
    losses, how = recipe["losses"], recipe["losses"]["delta_masks"]
    if how == USUAL_DELTA_MASKS:
        return
    key = "losses.delta_masks"
    if not recipe["slices"]["delta"]:
        yield Contradiction(
            (key, "slices.delta"), f"[losses] delta_masks = '{how}' draws the delta's masks, and [slices] delta = false"
        )
    if not any(losses[name] for name in SAMPLED):
        yield Contradiction((key,), f"[losses] delta_masks = '{how}' is for {', '.join(SAMPLED)}, and all are 0")


def _adversary_fits(recipe: Sections) -> Iterator[Contradiction]:
    section = recipe["adversary"]
    if section is None:
        return
    if not any(recipe["losses"][name] for name in ASCENDED):
        yield Contradiction(
            ("adversary",),
            f"[adversary] is given, but {_all_of(ASCENDED)} adversarial losses are 0: {', '.join(ASCENDED)}",
        )
    if section["masks"] == "persistent" and not section["shared"]:
        yield Contradiction(
            ("adversary.shared", "adversary.masks"),
            "[adversary] masks = 'persistent' keeps masks for sequences to come, which have to share them",
        )
    if not section["delta"] and not recipe["slices"]["delta"]:
        yield Contradiction(
            ("adversary.delta", "slices.delta"), "[adversary] delta is set, but [slices] delta = false: it has no masks"
        )


def _all_of(names: Collection[str]) -> str:
    return "both" if len(names) == 2 else "all"


RULES: tuple[Callable[[Sections], Iterator[Contradiction]], ...] = (
    _sections_fit_target,
    _features_fit,
    _heads_divide_width,
    _s_fits_between,
    planted_fits,
    _span_fits,
    _global_heads_fit,
    _start_fits,
    _targeted_fits,
    _local_start_fits,
    _backend_fits_device,
    _p_falls,
    _gamma_falls,
    _something_to_train,
    _savings_fit,
    _attention_fits,
    _delta_masks_fit,
    _adversary_fits,
)
