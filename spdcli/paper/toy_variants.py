"""The toy's variants side by side: where its sinusoids go, a begin token, an output projection.

The paper tells of its toy what Table 3 holds; its authors' public code differs. Every variant is trained, decomposed
and measured by one recipe, each into a folder of OUT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from spdcli.api import finished
from spdcli.disk import write_json
from spdcli.paper.induction_experiment import evaluation_of, seed_recipes
from spdcli.paper.table1 import FOUND_AT
from spdcli.paper.verdict import REPORT
from spdcli.progress import Progress, Report, silent
from spdcli.records import plain
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import claimed_run

SCHEMA = "spd.variants/1"
POSITIONS = ("before", "after")
LARGEST = 4  # singular values that are shown


@dataclass(frozen=True, kw_only=True)
class ToyVariant:
    """One variant of the toy: its switches, then what was measured.

    `accuracy` is the toy's on fresh sequences; `m_to_s1` and `s2_to_m` its attention in the circuit's two steps, and
    `m_to_s1_unplaced_query` the first without position encodings in m's query. `singular_values` are the largest ones
    of W by matrix. `unique` slices by matrix; `active` ones at the position class that the paper found the matrix's
    slices at, and `needs` is the KL (nats) of the target without the matrix there; `metrics` as in `spd.eval/2`;
    `minutes` that the decomposition trained.
    """

    positions: str
    begin_token: bool
    output_projection: bool
    run: str
    accuracy: float
    m_to_s1: float
    m_to_s1_unplaced_query: float
    s2_to_m: float
    singular_values: Mapping[str, Sequence[float]]
    unique: Mapping[str, int]
    active: Mapping[str, float]
    needs: Mapping[str, float]
    metrics: Mapping[str, float]
    minutes: float


@dataclass(frozen=True)
class ToyVariants:
    """`spd.variants/1`: every variant of the toy by one recipe, measured on so many fresh `sequences`."""

    recipe: str
    seed: int
    sequences: int
    variants: Sequence[ToyVariant]


def toy_variants(
    recipe: str,
    out: Path,
    sequences: int = 8192,
    settings: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> ToyVariants:
    """Every variant by `recipe` with `settings`, into OUT/POSITIONS[-begin][-output]; writes OUT/reproduce.json.

    What is finished is reused while its recipe is the same. Raises what `reproduce_induction` raises.
    """
    rows: list[ToyVariant] = []
    seed = 0
    for place, begun, projected in product(POSITIONS, (False, True), (False, True)):
        switches = {"positions": place, "begin_token": begun, "output_projection": projected}
        own = [*settings, *(f"target.{key}={json.dumps(value)}" for key, value in switches.items())]
        loaded = seed_recipes(recipe, own, device, 1, None)[0]
        seed = loaded.recipe.seed
        directory = claimed_run(out / (place + "-begin" * begun + "-output" * projected), loaded, force, report)
        report(Progress(f"variant {len(rows) + 1} of 8 in {directory.path}"))
        rows.append(_measured(finished(directory, loaded, report), sequences, report))
    variants = ToyVariants(recipe, seed, sequences, rows)
    write_json(out / REPORT, {"schema": SCHEMA, **plain(variants)})
    return variants


def _measured(run: LoadedRun, sequences: int, report: Report) -> ToyVariant:
    toy = run.subject.toy
    assert toy is not None
    evaluation = evaluation_of(run, sequences, report)
    attention = evaluation["circuit"]["attention"]["target"]
    weights = {name: run.subject.target.matrices[name].weight for name in ("Q0", "K0")}
    return ToyVariant(
        positions=toy.shape.positions,
        begin_token=toy.shape.begin_token,
        output_projection=toy.shape.output_projection,
        run=str(run.home.path),
        accuracy=evaluation["accuracy"]["target"],
        m_to_s1=attention["m_to_s1"],
        m_to_s1_unplaced_query=attention["m_to_s1_unplaced_query"],
        s2_to_m=attention["s2_to_m"],
        singular_values={name: torch.linalg.svdvals(w)[:LARGEST].tolist() for name, w in weights.items()},
        unique=evaluation["unique"],
        active={name: evaluation["active"][name][kind] for name, kind in FOUND_AT.items()},
        needs={name: evaluation["circuit"]["needs"][name][kind] for name, kind in FOUND_AT.items()},
        metrics=evaluation["metrics"],
        minutes=run.home.last_record["seconds"] / 60,
    )
