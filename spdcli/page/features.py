"""What stands on the page of a toy of sparse features alone: whether its known parts were found, and which slice is
which feature's.

F features, C slices of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spdcli.explorer.exploration import Exploration
from spdcli.figures.features import save_features
from spdcli.measures.feature_evaluation import feature_importances, nearest_slices
from spdcli.page.content import WIDE, Picture, Table, TokenMap, shaded
from spdcli.runs.loading import LoadedRun


def found_parts(evaluation: Mapping[str, Any]) -> list[Table]:
    """How many slices live, and how well they are the parts, a row a matrix, from `spd.eval/2`; then the errors."""
    rows = []
    for name, live in evaluation["live"].items():
        parts, active = evaluation["parts"].get(name), evaluation["active"][name]
        found = ["", "", ""]
        if parts is not None:
            found = [str(parts["own"]), number(parts["mean_max_cosine"]), number(parts["l2_ratio"])]
        rows.append([name, str(live), f"{active['data']:.2f}", f"{active['single']:.2f}", *found])
    heads = ["matrix", "live", "active on data", "on one feature", "features of their own", "max cosine", "L2 ratio"]
    note = (
        f"A slice lives where its importance on one feature is above {evaluation['live_above']:g}. A part is what a "
        "matrix writes for one feature; the max cosine is that of a part with the live slice most like it, a mean."
    )
    errors = [[f"error to the labels, {name}", f"{value:.2e}"] for name, value in evaluation["error"].items()]
    return [
        Table("Slices that live, and the parts they are", heads, rows, note),
        Table("Squared error to what the toy was trained to answer", ["model", "error"], errors),
    ]


def part_tables(run: LoadedRun) -> list[Table]:
    """A row a feature for every matrix that reads features: the live slice that is most like its part, and how much."""
    toy, decomposition = run.subject.feature_toy, run.decomposition
    assert toy is not None
    alone = feature_importances(run.subject, decomposition)
    tables = []
    for name, read in toy.reads().items():
        if name not in alone:
            continue
        parts = read @ run.subject.target.matrices[name].weight
        nearest = nearest_slices(parts, read, decomposition.of(name), alone[name])
        if nearest is not None:
            importance = alone[name].gather(1, nearest.slice[:, None])[:, 0]
            columns = [nearest.slice, nearest.cosine, nearest.l2_ratio, importance]
            tables.append(Table(f"The parts of {name}", HEADS, part_rows(name, *columns)))
    return tables


HEADS = ["feature", "slice most like its part", "cosine", "L2 ratio", "importance on the feature alone"]


def part_rows(name: str, slices: Tensor, *numbers: Tensor) -> list[list[str]]:
    """A row a feature, from 0."""
    columns = [column.tolist() for column in numbers]
    return [
        [str(feature), f"{name}:{c}", *(f"{column[feature]:.3f}" for column in columns)]
        for feature, c in enumerate(slices.tolist())
    ]


def feature_picture(run: LoadedRun, folder: Path) -> Picture:
    """The importance of every slice on every feature alone."""
    alone = feature_importances(run.subject, run.decomposition)
    (_, file) = save_features(alone, folder)
    live = ", ".join(f"{name}: {int((g > 0).any(0).sum())} slices are on somewhere" for name, g in alone.items())
    caption = "The importance of slices (columns, those that are off left out) on every feature alone (rows)."
    return Picture(file, caption, f"{live}.")


def feature_maps(exploration: Exploration) -> list[TokenMap]:
    """Features, each alone, by matrices, where they are few: sums of importances."""
    g = exploration.activity.g
    features = len(exploration.own.texts)
    if features > WIDE:
        return []
    heat = {name: values[:, 0].sum(-1).tolist() for name, values in g.items()}
    return [TokenMap("Every feature alone", [str(f) for f in range(features)], range(features), shaded(heat))]


def number(value: float | None) -> str:
    """A number, where a slice lives."""
    return "none lives" if value is None else f"{value:.3f}"
