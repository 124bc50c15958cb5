"""Settings that change nothing because another setting never asks for them: somebody meant something else.

A value that is the usual one is never told: a recipe that a run wrote has every value in it. Knows neither torch nor
pydantic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spdcli.engine.part_tables import IMPORTANCE_FUNCTIONS, STARTS
from spdcli.engine.tables import losses_where
from spdcli.recipe.contradiction import Contradiction, Sections, shown

SAMPLED = losses_where(lambda loss: loss.sampled)
PARTIAL = losses_where(lambda loss: loss.scope == "subset")
HIDDEN = losses_where(lambda loss: loss.hidden_of is not None)


@dataclass(frozen=True)
class Need:
    """Settings (dotted) that say something only where `met`; `words` say what they need, `key` is who decides."""

    settings: tuple[str, ...]
    key: str
    words: str
    met: Callable[[Sections], bool]


def _kinds(attribute: str) -> str:
    return " or ".join(f"'{name}'" for name, row in IMPORTANCE_FUNCTIONS.items() if getattr(row, attribute))


def _kind_has(*attributes: str) -> Callable[[Sections], bool]:
    return lambda recipe: any(
        getattr(IMPORTANCE_FUNCTIONS[recipe["importance"]["kind"]], attribute) for attribute in attributes
    )


def _any_of(*losses: str) -> Callable[[Sections], bool]:
    return lambda recipe: any(recipe["losses"][name] for name in losses)


def _penalised(penalty: str) -> Callable[[Sections], bool]:
    return lambda recipe: recipe["losses"]["penalty"] == penalty and _any_of("minimality", "frequency")(recipe)


NEEDS = (
    Need(
        ("importance.relative", "importance.relative_start", "importance.backend"),
        "importance.kind",
        f"kind = {_kinds('attends')}",
        _kind_has("attends"),
    ),
    Need(("importance.start",), "importance.kind", f"kind = {_kinds('reads_inner')}", _kind_has("reads_inner")),
    Need(
        ("importance.gate_bias", "importance.gate_spread"),
        "importance.start",
        "start = 'random'",
        lambda recipe: recipe["importance"]["start"] == "random",
    ),
    Need(
        ("importance.causal",),
        "importance.kind",
        f"kind = {_kinds('attends')} or {_kinds('joint')}",
        _kind_has("attends", "joint"),
    ),
    Need(
        ("importance.layers", "importance.width", "importance.heads"),
        "importance.kind",
        f"kind = {_kinds('joint')}",
        _kind_has("joint"),
    ),
    Need(
        ("slices.ridge",),
        "slices.init",
        "init = " + " or ".join(f"'{name}'" for name, start in STARTS.items() if start.needs_moment),
        lambda recipe: STARTS[recipe["slices"]["init"]].needs_moment,
    ),
    Need(
        ("slices.distinct", "slices.fill"),
        "slices.init",
        "init = " + " or ".join(f"'{name}'" for name, start in STARTS.items() if start.fixed_data),
        lambda recipe: STARTS[recipe["slices"]["init"]].fixed_data,
    ),
    Need(("losses.samples",), "losses", f"one of {', '.join(SAMPLED)}", _any_of(*SAMPLED)),
    Need(("losses.subset",), "losses", f"one of {', '.join(PARTIAL)}", _any_of(*PARTIAL)),
    Need(("losses.hidden_at", "losses.hidden_scale"), "losses", f"one of {', '.join(HIDDEN)}", _any_of(*HIDDEN)),
    Need(
        ("losses.penalty", "losses.penalty_final"),
        "losses",
        "minimality or frequency",
        _any_of("minimality", "frequency"),
    ),
    Need(
        ("losses.p_start", "losses.anneal_p", "losses.epsilon"),
        "losses.penalty",
        "penalty = 'power', and minimality or frequency",
        _penalised("power"),
    ),
    Need(
        ("losses.p_final",),
        "losses.penalty",
        "penalty = 'power' that is annealed, and minimality or frequency",
        lambda recipe: recipe["losses"]["anneal_p"] and _penalised("power")(recipe),
    ),
    Need(
        ("losses.gamma_start", "losses.gamma_final"),
        "losses.penalty",
        "penalty = 'smooth_l0', and minimality or frequency",
        _penalised("smooth_l0"),
    ),
    Need(("losses.frequency_tokens",), "losses.frequency", "frequency", _any_of("frequency")),
    Need(
        ("data.stream_sequences", "data.stream_length"),
        "data.stream",
        "data.stream",
        lambda recipe: recipe["data"]["stream"] is not None,
    ),
    Need(("decompose.stream_batch",), "losses.targeted", "losses.targeted", _any_of("targeted")),
    Need(
        ("decompose.prune_below",),
        "decompose.prune_at",
        "prune_at",
        lambda recipe: recipe["decompose"]["prune_at"] is not None,
    ),
)


def idle_settings(recipe: Sections, usual: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Every setting of `recipe` whose value is not the `usual` one (by its dotted key) and which nothing reads.

    The second key of each is the setting, or the section, that decides about it.
    """
    for need in NEEDS:
        for setting in need.settings:
            section, _, key = setting.partition(".")
            values = recipe[section]
            if values is None or values[key] == usual[setting] or need.met(recipe):
                continue
            message = f"[{section}] {key} = {shown(values[key])} changes nothing: it needs {need.words}"
            yield Contradiction((setting, need.key), message)
