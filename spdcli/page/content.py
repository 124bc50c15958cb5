"""What stands on the page of a run, as records of text and numbers; `page/render.py` makes HTML of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdcli.engine.tables import GRADES, LOSSES
from spdcli.explorer.exploration import Exploration, TextView
from spdcli.measures.evidence_choices import MASKS
from spdcli.page.slices import SliceEntry
from spdcli.runs.loading import LoadedRun

MEANING = (
    "A decomposition claims that any masks between importance and 1, and any delta, leave the target as it is. "
    "A small KL under importance masks alone says little."
)
MOST_MAPS = 8  # prompts whose map is shown
WIDE = 24  # tokens, above which only those are shown at which something is active


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row names it, the others are numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure: the `file` (SVG), what it shows in a `caption`, and in words for who cannot see it."""

    file: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class TokenMap:
    """Tokens by matrices: sums of importances, each with how dark it is, from 0 to 1, the largest one. `positions` are
    those of the tokens, from 0; `text` is the whole text where the title has not room for it."""

    title: str
    tokens: Sequence[str]
    positions: Sequence[int]
    rows: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    text: str = ""


@dataclass(frozen=True)
class Fact:
    """Everything about one prompt's fact: its slices, its tables and its figures."""

    title: str
    about: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Page:
    """All that the page of a run shows; `token` and `text` are what the target reads, in words."""

    title: str
    about: Mapping[str, str]
    commands: Sequence[str]
    curves: Sequence[Picture]
    measured: Sequence[Table]
    evidence: Sequence[Table]
    maps: Sequence[TokenMap]
    slices: Sequence[SliceEntry]
    active: int
    patterns: Sequence[Picture] = ()
    facts: Sequence[Fact] = ()
    fact_pictures: Sequence[Picture] = ()
    kinds: Sequence[str] = ()
    parts: Sequence[Table] = ()
    part_pictures: Sequence[Picture] = ()
    token: str = "token"
    text: str = "prompt"


def about(run: LoadedRun) -> dict[str, str]:
    """What was taken apart and how, in pairs of a word and what is said of it."""
    recipe, matrices = run.recipe, run.decomposition.names
    slices = sum(run.decomposition.of(name).U.shape[1] for name in matrices)
    target = recipe.target.model_dump()
    shape = ", ".join(
        f"{key} {value}" for key, value in target.items() if isinstance(value, int | str) and key != "kind"
    )
    losses = recipe.losses.model_dump()
    weighted = {name: losses[name] for name in LOSSES if losses.get(name)}
    facts = {
        "recipe": recipe.name,
        "target": f"{target['kind']}: {shape}",
        "matrices": f"{len(matrices)}: {', '.join(matrices)}",
        "slices": f"{slices}, at most {max(run.decomposition.of(name).U.shape[1] for name in matrices)} a matrix",
        "trained": f"{recipe.decompose.steps} steps, seed {recipe.seed}, importance: {recipe.importance.kind}",
        "losses": ", ".join(f"{name} {value:g}" for name, value in weighted.items()),
    }
    if recipe.data is not None and recipe.data.prompts is not None:
        facts["prompts"] = f"{len(recipe.data.prompts)}"
    return facts | versions(run)


def versions(run: LoadedRun) -> dict[str, str]:
    """The versions of what made the run, from the head of its recipe."""
    from spdcli.runs.directory import RECIPE

    if run.directory is None:
        return {}
    lines = (run.home / RECIPE).read_text(encoding="utf-8").splitlines()
    said = [line.removeprefix("# ").replace(":", "") for line in lines if line.startswith("# ")]
    return {"made with": ", ".join(said)} if said else {}


def commands(run: LoadedRun) -> list[str]:
    """How to do it again, and how to look further."""
    place = "run" if run.directory is None else str(run.directory)
    again = [] if run.recipe.target.kind == "module" else [f"spd decompose {place}/recipe.toml --out again"]
    further = ("eval", "inspect", "report") if run.subject.feature_toy is not None else ("eval", "explore", "report")
    return [*again, *(f"spd {verb} {place}" for verb in further)]


def active_slices(evaluation: Mapping[str, Any], paper: Mapping[str, Sequence[float]]) -> list[Table]:
    """Table 1 of a toy from `spd.eval/2`, the `paper`'s numbers in brackets; nothing of a language model."""
    active, classes = evaluation.get("active", {}), ("s1", "m", "s2", "random")
    if not active or not all(kind in next(iter(active.values())) for kind in classes):
        return []
    rows = []
    for name, counts in active.items():
        ours = [f"{counts[kind]:.3f}" for kind in classes] + [str(evaluation["unique"][name])]
        theirs = [f" ({value:g})" for value in paper[name]] if name in paper else [""] * 5
        rows.append([name, *(mine + other for mine, other in zip(ours, theirs, strict=True))])
    note = "s1: the first special token; m: the token after it; s2: the special token at the end. "
    title = "Active slices a position, and unique slices (Table 1; the paper's in brackets)"
    return [Table(title, ["matrix", *classes, "unique"], rows, note)]


def metrics(evaluation: Mapping[str, Any]) -> Table:
    """Every loss of `spd.eval/2`, with its standard error."""
    errors = evaluation.get("standard_error", {})
    rows = []
    for name, value in evaluation["metrics"].items():
        error = f"{errors[name]:.0e}" if errors.get(name) else "exact"
        rows.append([name, "not finite" if value is None else f"{value:.2e}", error])
    return Table("Losses", ["loss", "value", "standard error"], rows)


def evidence(evaluation: Mapping[str, Any]) -> list[Table]:
    """KL by how masks are chosen, the weakest evidence first, from `spd.eval/2`."""
    said = evaluation.get("evidence") or {}
    rows = []
    for name, words in MASKS.items():
        one = said.get(name)
        if isinstance(one, Mapping):  # a search, which says what it found
            grade, kl, right = "adversarial", one["kl"], one["accuracy"]
        else:
            grade, kl, right = said.get("grades", {}).get(name, ""), one, said.get("accuracy", {}).get(name)
        if kl is not None:
            label = GRADES[grade].label if grade in GRADES else ""
            rows.append([words, label, f"{kl:.2g}", "" if right is None else f"{right:.2%}"])
    title = "KL to the target (nats), by how masks are chosen"
    return [Table(title, ["masks", "evidence", "KL", "right"], rows, MEANING)] if rows else []


def token_map(view: TextView, title: str) -> TokenMap:
    """The map of one text; matrices in which nothing is active are left out, and of a text of more than WIDE tokens
    those at which nothing is."""
    wide = len(view.pieces) > WIDE
    positions = [at for at in range(len(view.pieces)) if not wide or bool(view.heat[:, at].any())]
    rows = shaded(dict(zip(view.matrices, view.heat[:, positions].tolist(), strict=True)))
    pieces = [view.pieces[at] for at in positions]
    return TokenMap(title if wide else f"{title}: {view.text}", pieces, positions, rows, view.text if wide else "")


def shaded(heat: Mapping[str, Sequence[float]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """The rows of a map: sums of importances by matrix, each with how dark it is; without rows of zeros."""
    most = max((max(values) for values in heat.values()), default=0.0) or 1.0
    return [(name, [(v, math.sqrt(v / most)) for v in values]) for name, values in heat.items() if any(values)]


def token_maps(exploration: Exploration) -> list[TokenMap]:
    """The maps of the run's first prompts."""
    numbers = range(1, min(len(exploration.own.texts), MOST_MAPS) + 1)
    return [token_map(exploration.prompt(number), f"Prompt {number}") for number in numbers]
