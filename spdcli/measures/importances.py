"""Importances of slices on given texts: how much each is needed at every position, and where it is active."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.progress import Progress, Report
from spdcli.runs.subject import Subject


@torch.no_grad()
def importances_of(subject: Subject, decomposition: Decomposition, batch: Batch) -> tuple[dict, dict]:
    """Importances g and inner activations x U of every matrix on `batch`, `[B, T, C]` each, 0 at padding.

    Raises UsageError for a text that the importance functions cannot see: too long for the run's attention tables.
    """
    batch = batch.to(subject.target.device)
    limit = decomposition.importances.settings.length
    if decomposition.importances.settings.kind == "attention" and batch.tokens.shape[1] > limit:
        raise UsageError(
            f"{batch.tokens.shape[1]} tokens, but this run's importance attention covers {limit}",
            "give a shorter prompt",
        )
    clean = clean_pass(subject.target, batch, decomposition.names)
    g, _ = decomposition.importance(clean.inputs, clean.padding)
    real = batch.valid[..., None]
    inner = {name: (clean.inputs[name] @ decomposition.of(name).U) * real for name in g}
    return {name: values * real for name, values in g.items()}, inner


def active_in(g: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Whether each slice is active anywhere in each sequence, `[B, C]` bool a matrix."""
    return {name: (values > threshold).any(1) for name, values in g.items()}


def warn_of_span(decomposition: Decomposition, report: Report) -> None:
    """Say so where importances are read off text that a run's gates do not see whole."""
    if decomposition.importances.bases:
        text = "this run's gates see only the span of its own prompts; on other text they are a projection"
        report(Progress(text, warning=True))
