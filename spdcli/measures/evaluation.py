"""What a decomposition is worth: active slices, reconstruction, attention (Table 1), and how the circuit works.

every target        unique active slices, reconstruction losses    `evaluation_totals.py`   Tables 1b, 1c
every target        reconstruction by how strong the evidence is   `evidence.py`
the toy             active slices by position class, attention     `toy_evaluation.py`      Tables 1a, 1c
the paper's toy     the mechanism of its induction circuit         `circuit.py`             section 6.1
a feature toy       whether its known parts were found             `feature_evaluation.py`  the first SPD paper
a language model    active slices by token, what it predicts       `language_evaluation.py` section 6.2
a planted target    how well its slices are found                  `slice_recovery.py`
"""

from __future__ import annotations

from dataclasses import replace

import torch

from spdcli.engine.subcomponents import Decomposition
from spdcli.errors import SpdError
from spdcli.measures.circuit import circuit_of
from spdcli.measures.circuit_data import has_circuit
from spdcli.measures.evidence_choices import MaskSearch
from spdcli.measures.feature_evaluation import FeatureEvaluation, evaluate_features
from spdcli.measures.language_evaluation import LanguageEvaluation, evaluate_language_model
from spdcli.measures.slice_recovery import slice_recovery
from spdcli.measures.toy_evaluation import ToyEvaluation, evaluate_toy
from spdcli.progress import Progress, Report, silent
from spdcli.runs.subject import Subject

AnyEvaluation = ToyEvaluation | FeatureEvaluation | LanguageEvaluation
USUAL = MaskSearch()
FRESH = 8192  # sequences of a toy


@torch.no_grad()
def evaluate(
    subject: Subject,
    decomposition: Decomposition,
    sequences: int | None = None,
    threshold: float = 0.0,
    seed: int = 0,
    adversary: MaskSearch = USUAL,
    report: Report = silent,
) -> AnyEvaluation:
    """Everything `spd eval` reports (`spd.eval/2`) but for the run's name.

    A toy is measured on `sequences` fresh sequences (FRESH if None), a language model on so many of its prompts or of
    its held-out text (if None on as many as have a few hundred tokens), a planted target on a few sequences as if they
    were prompts, and its slices on `sequences` fresh ones. A slice is active where its importance is above `threshold`.
    `seed` draws sequences and the stochastic masks; `adversary` says how hard masks are sought that break it.
    `report` hears how far it is.
    """
    own = (subject, decomposition)
    evaluation = evaluate_without_circuit(*own, sequences, threshold, seed, adversary, sequences, report)
    if isinstance(evaluation, ToyEvaluation) and has_circuit(subject):
        report(Progress("the circuit", 0, 1))
        return replace(evaluation, circuit=circuit_of(subject, decomposition, threshold, seed))
    return evaluation


@torch.no_grad()
def evaluate_without_circuit(
    subject: Subject,
    decomposition: Decomposition,
    sequences: int | None,
    threshold: float,
    seed: int,
    adversary: MaskSearch = USUAL,
    texts: int | None = None,
    report: Report = silent,
) -> AnyEvaluation:
    """Table 1 and the evidence: what is quick, and is measured alike of every target. `sequences` are a toy's, `texts`
    how many prompts or held-out sequences a language model is measured on."""
    require_finite(decomposition)
    fresh = FRESH if sequences is None else sequences
    if subject.toy is not None:
        return evaluate_toy(subject, decomposition, fresh, threshold, seed, adversary, report)
    if subject.feature_toy is not None:
        return evaluate_features(subject, decomposition, fresh, threshold, seed, report)
    if subject.planted is None:
        return evaluate_language_model(subject, decomposition, threshold, seed, adversary, texts, report)
    evaluation = evaluate_language_model(subject, decomposition, threshold, seed, adversary, None, report)
    return replace(evaluation, recovery=slice_recovery(subject, decomposition, fresh, threshold, seed))


def require_finite(decomposition: Decomposition) -> None:
    """SpdError for a decomposition with a number that is none, naming where: whatever is measured of it is NaN."""
    for name, tensor in decomposition.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise SpdError(
                f"the decomposition cannot be measured: {bad} of {tensor.numel()} numbers of {name} are not finite",
                "run spd decompose again, with a lower decompose.learning_rate",
            )
