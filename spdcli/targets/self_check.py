"""Whether the engine says what the model says: tried on a few random tokens whenever a language model is loaded.

Two things are compared with the model's own log-probabilities: those of a clean pass, which go through the blocks, the
final norm and the unembedding that the table of architectures names; and those of a plan pass in which every matrix is
replaced by nothing but its delta W - 0, whose rows are the sequences in another order and number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass, plan_pass
from spdcli.engine.product import MaskedRows
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.target import Batch, Target, log_probabilities
from spdcli.engine.variants import Piece, Variant
from spdcli.errors import SpdError

SEQUENCES, POSITIONS = 2, 5
NARROW, WIDE = 2, 30  # roundings of the largest log-probability that a mean may be apart, and those in float32
REPORT = "please report the model's config.json; its entry in spdcli/targets/architectures.py does not describe it"


@torch.no_grad()
def require_agreement(target: Target, model_type: str) -> None:
    """SpdError with the number of nats where the engine and the model disagree by more than rounding.

    Nothing is done for a model without numbers, on torch's `meta` device.
    """
    if target.unembedding.is_meta:
        return
    try:
        _compare_all(target, model_type)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SpdError(f"the engine cannot run models of type '{model_type}': {reason}", REPORT) from error


def _compare_all(target: Target, model_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, POSITIONS)
    known = min(len(target.embedding), len(target.unembedding))
    tokens = torch.randint(known, shape, generator=generator).to(target.device)
    model: Any = target.model
    own = log_probabilities(model(input_ids=tokens, use_cache=False).logits)
    clean = clean_pass(target, Batch.everywhere(tokens), target.matrices)
    _compare(clean.log_probs.view_as(own), own, target, f"the engine reads models of type '{model_type}' wrongly")
    if list(clean.inputs) != list(target.matrices):
        raise SpdError(f"the matrices of '{model_type}' run in another order: {', '.join(clean.inputs)}", REPORT)
    order = [1, 0, 1]
    replaced = log_probabilities(target.outputs(_all_replaced(target, clean, order)))
    _compare(replaced, own[order], target, f"matrices of '{model_type}' models cannot be replaced")


def _all_replaced(target: Target, clean: Clean, order: list[int]) -> Tensor:
    """Hidden states after the last block, `[R, T, D]`, of the sequences `order` with nothing but deltas."""
    precise: dict[str, Any] = {"dtype": target.precision, "device": target.device}
    nothing = {
        name: Slices(torch.zeros(matrix.d_in, 1, **precise), torch.zeros(1, matrix.d_out, **precise))
        for name, matrix in target.matrices.items()
    }
    rows, mask = torch.arange(len(order), device=target.device), torch.zeros(len(order), 1, 1, **precise)
    masks = {name: MaskedRows(rows, mask, torch.ones_like(mask)) for name in nothing}
    variant = Variant("", "importance", frozenset(nothing), 0, 1.0)
    pieces = [Piece(variant, sequence, sequence + 1) for sequence in order]
    return plan_pass(target, SliceSet(nothing, delta=True), clean, pieces, masks)


def _compare(ours: Tensor, own: Tensor, target: Target, what: str) -> None:
    rounding = max(NARROW * torch.finfo(target.unembedding.dtype).eps, WIDE * torch.finfo(torch.float32).eps)
    apart = (ours - own).abs()
    if not apart.mean().item() <= rounding * own.abs().max().item():
        raise SpdError(
            f"{what}: log-probabilities are up to {apart.max().item():.2g} nats from the model's own", REPORT
        )
