"""What measurements leave in a run's directory: the JSON of their commands, and the figures beside it."""

from __future__ import annotations

from typing import Any

from spdcli.figures.circuit import save_circuit
from spdcli.figures.curves import save_rank_curves
from spdcli.figures.features import save_features
from spdcli.measures.circuit import circuit_example
from spdcli.measures.evaluation import AnyEvaluation
from spdcli.measures.evaluation_totals import EVALUATION_SCHEMA
from spdcli.measures.feature_evaluation import FeatureEvaluation, feature_importances
from spdcli.measures.svd import RankCurves
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.records import plain
from spdcli.runs.directory import EVAL, FIGURES
from spdcli.runs.loading import LoadedRun
from spdcli.runs.results import write_result

SVD = f"{FIGURES}/svd.json"
SVD_FIGURE = f"{FIGURES}/svd.png"


def write_evaluation(run: LoadedRun, evaluation: AnyEvaluation) -> dict[str, Any]:
    """Writes `spd.eval/2` into the run's eval.json; returns the JSON object.

    For a toy whose circuit was measured its figures are drawn (Figure 1 and section 6.1), for a feature toy what every
    slice answers to.
    """
    head = {"schema": EVALUATION_SCHEMA, "run": str(run.home.path), "target": run.recipe.target.kind}
    data = head | plain(evaluation)
    if isinstance(evaluation, ToyEvaluation) and evaluation.circuit:
        example = circuit_example(run.subject, run.decomposition, evaluation.threshold, evaluation.seed)
        names = [run.subject.token_text(token) for token in example.tokens]
        save_circuit(evaluation.circuit, example, names, run.home / FIGURES)
    if isinstance(evaluation, FeatureEvaluation):
        save_features(feature_importances(run.subject, run.decomposition), run.home / FIGURES)
    return write_result(run.home, run.decomposition, EVAL, data)


def write_rank_curves(run: LoadedRun, curves: RankCurves) -> dict[str, Any]:
    """Writes `spd.svd/1` and Figure 2 into the run's figures; returns the JSON object."""
    data = {"schema": "spd.svd/1", "run": str(run.home.path)} | plain(curves)
    save_rank_curves(curves, run.home / FIGURES)
    return write_result(run.home, run.decomposition, SVD, data)
