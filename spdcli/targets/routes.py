"""How a matrix is tied to the residual stream: where its input comes from, where its output goes.

Independent of any model library, so that the toy and the language models share the labels made
from it. Letters: N vocabulary, D width of the residual stream, C slices, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


def unchanged(directions: Tensor) -> Tensor:
    """The map of a matrix that touches the residual stream directly."""
    return directions


@dataclass(frozen=True)
class Route:
    """The linear way between one matrix and the two ends of the residual stream.

    `norm` turns residual-stream vectors `[N, D]` into what the matrix's block reads of them.
    `into` carries read directions `U [I, C]` back to that stream, `[D, C]`; None where nothing is known.
    `out` carries write directions `V [C, O]` on to the final residual stream, scaled by the final
    norm's weight, `[C, D]`; None where the output only steers attention (queries and keys).
    Position mixing by attention and activation functions on the way are left out.
    The defaults are a matrix that reads and writes a stream without norms.
    """

    norm: Map = unchanged
    into: Map | None = unchanged
    out: Map | None = unchanged


def final_scale(norm: nn.Module) -> Map:
    """The linear part of a final norm, for write directions `[C, D]`.

    Root-mean-square norms scale by a weight, or one more than it (Gemma); a LayerNorm removes the mean first, and may
    have no weight (OLMo). Which it is, is seen from what the norm makes of numbers of one size and alternating sign.
    The division by the stream's own length is left out: it is one positive number for all tokens of a position.
    """

    @torch.no_grad()
    def scaled(directions: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(directions.shape[-1], device=directions.device) % 2).to(directions)
        large = 1024 * signs  # beside which the norm's epsilon is nothing
        up, down = norm(large), norm(-large)
        if not torch.allclose(norm(large + 512), up, rtol=0.05, atol=0.05):
            return directions * ((up - down) / 2 * signs)
        centred = signs - signs.mean()
        weight = (up - down) / 2 * centred.square().mean().sqrt() / centred
        return (directions - directions.mean(-1, keepdim=True)) * weight

    return scaled


def widen_heads(directions: Tensor, width: int, head_width: int) -> Tensor:
    """Write directions of shared value heads `[C, O]` as the query heads see them, `[C, width]`.

    Each value head is repeated for the `width / O` query heads that share it, neighbours first.
    """
    slices, d_out = directions.shape
    heads = directions.view(slices, d_out // head_width, head_width)
    return heads.repeat_interleave(width // d_out, dim=1).reshape(slices, width)


def narrow_heads(directions: Tensor, width: int, head_width: int) -> Tensor:
    """Read directions of the query heads `[I, C]` summed over those that share a value head, `[width, C]`."""
    d_in, slices = directions.shape
    heads = directions.reshape(width // head_width, d_in // width, head_width, slices)
    return heads.sum(1).reshape(width, slices)


def sum_of_columns(ways: Sequence[tuple[Map, Map]]) -> Map:
    """`out` of a fused matrix: for each of its parts with a way out, what takes its columns, and that way."""
    return lambda directions: torch.stack([out(columns(directions)) for columns, out in ways]).sum(0)


def through(weight: Tensor, onward: Map, head_width: int) -> Map:
    """`out` of a matrix whose output another matrix `weight [I, O]` carries on, then `onward`."""
    d_in = weight.shape[0]

    def out(directions: Tensor) -> Tensor:
        if directions.shape[1] != d_in:
            directions = widen_heads(directions, d_in, head_width)
        return onward(directions @ weight)

    return out


def back_through(weight: Tensor, head_width: int) -> Map:
    """`into` of a matrix that reads the output of another matrix `weight [I, O]`."""
    d_out = weight.shape[1]

    def into(directions: Tensor) -> Tensor:
        if directions.shape[0] != d_out:
            directions = narrow_heads(directions, d_out, head_width)
        return weight @ directions

    return into


def detached(norm: nn.Module) -> Map:
    """`norm` as a plain function without gradient."""

    def apply(stream: Tensor) -> Tensor:
        with torch.no_grad():
            return norm(stream)

    return apply
