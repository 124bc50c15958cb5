"""What measurements leave in a run's directory: the JSON of their commands, and the figures beside it."""

from __future__ import annotations

from typing import Any

from spdcli.figures.curves import save_rank_curves
from spdcli.files import write_json
from spdcli.measures.svd import RankCurves
from spdcli.records import plain
from spdcli.runs.directory import FIGURES, RunDirectory

SVD = f"{FIGURES}/svd.json"
SVD_FIGURE = f"{FIGURES}/svd.png"


def write_rank_curves(run: RunDirectory, curves: RankCurves) -> dict[str, Any]:
    """Writes `spd.svd/1` and Figure 2 into the run's figures; returns the JSON object."""
    data = {"schema": "spd.svd/1", "run": str(run.path)} | plain(curves)
    save_rank_curves(curves, run / FIGURES)
    write_json(run / SVD, data)
    return data
