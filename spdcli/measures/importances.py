"""Importances of slices on given texts: how much each is needed at every position, and where it is active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.texts import refuse_too_long
from spdcli.progress import Progress, Report, counted, silent
from spdcli.runs.subject import Subject, require_tokens
from spdcli.targets.sparse_features import read_features

OTHER_GATES = "spd decompose RECIPE --data TEXT, or --set importance.basis=full, makes gates that hold on any text"
TOKENS_AT_ONCE = 2048  # whose activations exist together
Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


def importances(
    subject: Subject, decomposition: Decomposition, text_or_ids: str | Ids, begin_token: bool = False
) -> dict[str, Tensor]:
    """The importance g of every slice, in [0, 1], by matrix: `[T, C]` for a text or ids `[T]`, `[B, T, C]` for ids
    `[B, T]`.

    A text is fed whole, after a language model's begin-of-sequence token if `begin_token`; ids are fed as they are. For
    a feature toy a text is such as `3 7:0.5`, and vectors `[F]` or `[B, F]` stand in place of ids: T is 1.
    UsageError for a text that is longer than the toy or the run's importance attention can take.
    """
    if subject.feature_toy is not None:
        inputs = feature_inputs(subject.feature_toy.features, text_or_ids)
        g, _ = importances_of(subject, decomposition, Batch.everywhere(inputs.reshape(-1, 1, inputs.shape[-1])))
        return g if inputs.dim() == 2 else {name: values[0] for name, values in g.items()}
    ids = (
        text_ids(subject, text_or_ids, begin_token)
        if isinstance(text_or_ids, str)
        else checked_ids(subject, text_or_ids)
    )
    refuse_too_long(subject, ids.shape[-1])
    g, _ = importances_of(subject, decomposition, Batch.everywhere(ids if ids.dim() == 2 else ids[None]))
    return g if ids.dim() == 2 else {name: values[0] for name, values in g.items()}


def checked_ids(subject: Subject, ids: Ids) -> Tensor:
    """Token ids `[T]` or `[B, T]` as a tensor; UsageError for what are none."""
    wanted = "give a text, ids [T] or ids [B, T] of one length"
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"no token ids: {' '.join(str(error).split())}", wanted) from error
    if tokens.dim() not in (1, 2) or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise UsageError(f"token ids of shape {tuple(tokens.shape)} and type {tokens.dtype}", wanted)
    size = len(subject.target.embedding)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise UsageError(f"token ids from {int(tokens.min())} to {int(tokens.max())}", f"the model has 0 to {size - 1}")
    return tokens.long()


def feature_inputs(features: int, text_or_values: str | Ids) -> Tensor:
    """Inputs of a feature toy, `[F]` or `[B, F]`: as a text writes them, or as they are; UsageError for others."""
    if isinstance(text_or_values, str):
        return read_features(text_or_values, features)
    try:
        values = torch.as_tensor(text_or_values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError("no values of features", f"give a text such as '3 7:0.5', or [{features}] values") from error
    if values.dim() not in (1, 2) or values.shape[-1] != features or not values.numel():
        raise UsageError(f"values of shape {tuple(values.shape)}", f"this toy reads [{features}] or [B, {features}]")
    return values


def text_ids(subject: Subject, text: str, begin_token: bool) -> Tensor:
    """The token ids `[T]` of a text; for the toy a text is such as `3 s 17 4 s`. UsageError for a feature toy."""
    require_tokens(subject)
    if subject.toy is not None:
        return torch.tensor(subject.toy.shape.sequences.prompt(text))
    from spdcli.targets.prompts import token_ids

    assert subject.prompts is not None
    return torch.tensor(token_ids(subject.prompts.tokenizer, text, begin_token, least=1))


@torch.no_grad()
def importances_of(
    subject: Subject, decomposition: Decomposition, batch: Batch, report: Report = silent
) -> tuple[dict, dict]:
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
    rows, at_once = torch.arange(len(batch.tokens)), max(1, TOKENS_AT_ONCE // batch.tokens.shape[1])
    parts = rows.to(batch.tokens.device).split(at_once)
    counts = counted(parts, "parts of the texts", report)
    own = [_importances_of(subject, decomposition, batch.select(part)) for part in counts]
    g, inner = ({name: torch.cat([each[which][name] for each in own]) for name in own[0][which]} for which in (0, 1))
    return g, inner


def _importances_of(subject: Subject, decomposition: Decomposition, batch: Batch) -> tuple[dict, dict]:
    clean = clean_pass(subject.target, batch, decomposition.names, outputs=False)
    g, _ = decomposition.importance(clean.inputs, clean.padding)
    real = batch.valid[..., None]
    inner = {name: (clean.inputs[name] @ decomposition.of(name).U) * real for name in g}
    return {name: values * real for name, values in g.items()}, inner


def active_in(g: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Whether each slice is active anywhere in each sequence, `[B, C]` bool a matrix."""
    return {name: (values > threshold).any(1) for name, values in g.items()}


def warn_of_span(decomposition: Decomposition, report: Report) -> None:
    """Say so, and what to do, where importances are read off text that a run's gates do not see whole."""
    if decomposition.importances.bases:
        text = "this run's gates see only the span of its own prompts; on other text they are a projection: "
        report(Progress(text + OTHER_GATES, warning=True))


def refuse_span(decomposition: Decomposition) -> None:
    """UsageError, with what to do, where a run's gates say nothing of text other than its own prompts."""
    if decomposition.importances.bases:
        raise UsageError(
            "this run's gates see only the span of its own prompts, and say nothing of other text", OTHER_GATES
        )
