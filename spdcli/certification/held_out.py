"""A language model's decomposition on broad text that it was not trained on."""

from __future__ import annotations

import torch

from spdcli.certification.certificate import Measured
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.losses import divergence
from spdcli.engine.masks import held_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import log_probabilities
from spdcli.errors import SpdError
from spdcli.measures.mean import Mean
from spdcli.progress import Progress, Report, counted
from spdcli.runs.subject import Subject

SEQUENCES = 32  # at most
AT_ONCE = 8  # whose logits exist together
DELTAS = {"kl_held_out_0": 0.0, "kl_held_out_1": 1.0}


@torch.no_grad()
def held_out(subject: Subject, decomposition: Decomposition, report: Report) -> dict[str, Measured]:
    """KL under importance masks with the delta at 0 and at 1, a mean over all positions of other broad text.

    Nothing where the recipe has no broad text, or its file no more of it, which `report` hears.
    """
    if subject.held_out is None:
        return {}
    try:
        batch = subject.held_out()
    except SpdError as error:
        report(Progress(f"no held-out text: {error.message}"))
        return {}
    batch = batch.select(torch.arange(min(SEQUENCES, len(batch.tokens)), device=batch.tokens.device))
    means = {name: Mean() for name in DELTAS}
    parts = torch.arange(len(batch.tokens), device=batch.tokens.device).split(AT_ONCE)
    for rows in counted(parts, "parts of held-out text", report):
        clean = clean_pass(subject.target, batch.select(rows), decomposition.names)
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        for name, delta in DELTAS.items():
            logits = masked_logits(subject.target, decomposition, clean, held_masks(g, delta))
            means[name].add(divergence(clean.log_probs, log_probabilities(logits)))
    count, length = batch.tokens.shape
    return {
        name: Measured(mean.value, f"{count} sequences of {length} tokens of broad text, none of them trained on")
        for name, mean in means.items()
    }
