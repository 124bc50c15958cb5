"""How a feature toy is trained: on fresh inputs, to the squared error of its labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from spdcli.engine.fit import FitState
from spdcli.engine.optimise import set_rate
from spdcli.targets.feature_toys import FeatureToy
from spdcli.targets.sparse_features import sparse_features
from spdcli.targets.toy_state import toy_diverged

ERROR_INPUTS = 20_000  # fresh inputs that a trained toy's error is measured on


def train_feature_toy(
    toy: FeatureToy, state: FitState, probability: float, batch: int, steps: int, log_every: int
) -> Iterator[dict[str, float] | None]:
    """Train a toy until `steps`, whose features are each on with `probability`.

    Yields after every step: `{step, loss, rate}` every `log_every` steps and after the last one, None elsewhere; loss
    is the squared error, a mean over inputs and features. `toy` and `state` are changed in place, so that the loop may
    be left after any step and gone on with later. Raises SpdError when the loss of such a step is not finite.
    """
    device = toy.embedding.device
    for step in range(state.step + 1, steps + 1):
        drawn = sparse_features(batch, toy.features, probability, toy.lowest, state.generators["data"])
        inputs = drawn.tokens.to(device)
        loss = F.mse_loss(toy.training_outputs(inputs), toy.labels(inputs))
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        rate = set_rate(state.optimiser, state.schedule, step - 1)
        state.optimiser.step()
        state.step = step
        if step % log_every and step not in (1, steps):
            yield None
            continue
        if not loss.isfinite():
            raise toy_diverged(f"the loss is {loss.item()}", step)
        toy.settle()
        yield {"step": step, "loss": loss.item(), "rate": rate}


@torch.no_grad()
def label_error(toy: FeatureToy, probability: float, generator: torch.Generator) -> float:
    """The toy's squared error on fresh inputs, a mean over inputs and features."""
    inputs = sparse_features(ERROR_INPUTS, toy.features, probability, toy.lowest, generator).tokens
    inputs = inputs.to(toy.embedding.device)
    return F.mse_loss(toy(inputs), toy.labels(inputs)).item()
