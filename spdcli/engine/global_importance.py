"""One importance function for all matrices: a small transformer that reads what every matrix reads (kind "global").

At each position, with x_m what matrix m reads there (or its coordinates in a basis), at root mean square 1,

    h = sum_m x_m E_m / sqrt(M)
    h = h + Attention(norm h),    h = h + act(norm h w1 + b1) w2        `layers` times
    value of slice c of matrix m  = norm h · r_mc + b_mc

so that a slice may be told from what other matrices read, at other positions too, where the paper's functions (section
4.1) see their own matrix alone. Attention looks both ways unless `causal`, and knows offsets by turning queries and
keys: pairs of their coordinates by an angle that grows with the position. Nothing is as large as [T, T], or as the
slices times a hidden width. M matrices, B sequences, T positions, I d_in, D width, G gate width, K head width,
C slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spdcli.engine.part_tables import ACTIVATIONS

if TYPE_CHECKING:
    from spdcli.engine.importance import ImportanceSettings

SLOWEST_TURN = 1e4  # positions that the slowest pair of coordinates needs for one radian, about


def at_unit_size(x: Tensor) -> Tensor:
    """x `[..., I]` with every row divided by its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def turned(x: Tensor) -> Tensor:
    """Queries or keys `[..., T, K]`, K even, with their pairs of coordinates (k, k + K/2) at position t turned by
    `t / 10000^(2 k / K)` radians: the product of two then depends on their offset alone."""
    half, precise = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)  # half precision cannot count far
    positions = torch.arange(x.shape[-2], device=x.device, dtype=precise)
    speeds = SLOWEST_TURN ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angles = positions[:, None] * speeds
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class TransformerLayer(nn.Module):
    """Attention and an MLP, each on a normed h and added to it.

    Its parameters: qkv `[D, 3 D]`, out `[D, D]`, w1 `[D, G]`, b1 `[G]`, w2 `[G, D]`.
    """

    def __init__(self, settings: ImportanceSettings) -> None:
        super().__init__()
        width, hidden = settings.width, settings.gate_width
        quiet = 1 / math.sqrt(2 * settings.layers)  # so that h does not grow with the number of layers
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / math.sqrt(width))
        self.out = nn.Parameter(quiet * torch.randn(width, width) / math.sqrt(width))
        self.w1 = nn.Parameter(torch.randn(width, hidden) / math.sqrt(width))
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(quiet * torch.randn(hidden, width) / math.sqrt(hidden))
        self.heads, self.causal = settings.heads, settings.causal
        self.act = ACTIVATIONS[settings.activation].load().value

    def forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        """h `[B, T, D]` to the same; keys where `valid` `[B, T]` is False are not seen (None: there are none)."""
        h = h + self._attention(at_unit_size(h), valid) @ self.out
        return h + self.act(at_unit_size(h) @ self.w1 + self.b1) @ self.w2

    def _attention(self, x: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (x @ self.qkv).chunk(3, dim=-1))
        # Padding is at the end: a query that looks back does not see it.
        seen = None if valid is None or self.causal else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=seen, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2)


class GlobalTransformer(nn.Module):
    """What all matrices read, `[B, T, I]` each, to one h `[B, T, D]` for all of them.

    Its parameters: E `[I, D]` a matrix and those of its layers; `widths[m]` is the I of matrix m.
    """

    def __init__(self, widths: Mapping[str, int], settings: ImportanceSettings) -> None:
        super().__init__()
        self.embeddings = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.randn(width, settings.width) / math.sqrt(width))
                for name, width in widths.items()
            }
        )
        self.layers = nn.ModuleList(TransformerLayer(settings) for _ in range(settings.layers))

    def forward(self, x: Mapping[str, Tensor], valid: Tensor | None) -> Tensor:
        """x `[B, T, I]` a matrix to norm h `[B, T, D]`; `valid` `[B, T]` is False at padding, None without any."""
        read = [at_unit_size(values) @ self.embeddings[name.replace(".", "/")] for name, values in x.items()]
        h = sum(read[1:], read[0]) / math.sqrt(len(read))
        for layer in self.layers:
            h = layer(h, valid)
        return at_unit_size(h)
