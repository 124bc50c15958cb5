"""How a feature toy is trained: on fresh inputs, to the squared error of its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from spdcli.engine.optimise import OptimiserSettings, make_optimiser, set_rate
from spdcli.errors import SpdError
from spdcli.targets.feature_toys import FeatureToy
from spdcli.targets.sparse_features import sparse_features

ERROR_INPUTS = 20_000  # fresh inputs that a trained toy's error is measured on


def train_feature_toy(
    make: Callable[[], FeatureToy],
    probability: float,
    settings: OptimiserSettings,
    batch: int,
    steps: int,
    seed: int,
    log_every: int,
    device: torch.device,
) -> Iterator[tuple[FeatureToy, dict[str, float]]]:
    """Train the toy that `make` gives, whose features are each on with `probability`.

    Yields `(toy, {step, loss, rate})` every `log_every` steps and after the last one; loss is the squared error, a mean
    over inputs and features. Raises SpdError when it stops being finite.
    """
    torch.manual_seed(seed)
    toy = make().to(device)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in toy.parameters() if parameter.requires_grad]
    optimiser = make_optimiser([{"params": trained}], settings)
    for step in range(1, steps + 1):
        inputs = sparse_features(batch, toy.features, probability, toy.lowest, generator).tokens.to(device)
        loss = F.mse_loss(toy.training_outputs(inputs), toy.labels(inputs))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        rate = set_rate(optimiser, settings, step - 1)
        optimiser.step()
        if step % log_every == 0 or step in (1, steps):
            if not loss.isfinite():
                raise SpdError(
                    f"training the toy: the loss is {loss.item()} at step {step}",
                    "lower train.learning_rate or lengthen train.warmup",
                )
            toy.settle()
            yield toy, {"step": step, "loss": loss.item(), "rate": rate}


@torch.no_grad()
def label_error(toy: FeatureToy, probability: float, generator: torch.Generator) -> float:
    """The toy's squared error on fresh inputs, a mean over inputs and features."""
    inputs = sparse_features(ERROR_INPUTS, toy.features, probability, toy.lowest, generator).tokens
    inputs = inputs.to(toy.embedding.device)
    return F.mse_loss(toy(inputs), toy.labels(inputs)).item()
