"""What an entry of the table of architectures is made of: where a family's blocks keep their matrices.

I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spdcli.engine.target import LogitMap

RESIDUAL = "the residual stream"


@dataclass(frozen=True)
class MatrixEntry:
    """One weight of a block, where its input comes from and where its output goes (for labels).

    `norms` are the block's norms through which it may read the residual stream, of which the first counts that a block
    has; without any it reads the stream itself, or `reads`, the matrix of the block whose output it reads. `writes` is
    RESIDUAL; a norm of the block that its output passes on the way there; the matrix that it passes through; or None
    where it only steers attention. A fused weight names its `parts` in column order, each with a `writes` of its own:
    q, k and v have the widths that the heads give them, others are equal. `interleaved`: the parts alternate, once for
    every key-value head.
    """

    module: str  # path inside the block
    norms: tuple[str, ...] = ()
    reads: str | None = None
    writes: str | None = None
    parts: tuple[tuple[str, str | None], ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where a causal language model keeps its parts.

    `base` is a path below the whole model; `blocks`, `final_norm` and `embedding` are paths below
    `base`; `head` is a path below the whole model again. `attention` and `mlp` are the two modules of
    a block whose outputs are added to the residual stream. `transposed` is True where weights are
    stored `[O, I]` (nn.Linear). `matrices` are in the order of execution. `known_as` names models of the family.

    Logits may be multiplied by `config.<scale>`, divided by `config.<divisor>`, and then held within `config.<cap>` by
    a hyperbolic tangent. `embedding_scale(config)` multiplies embeddings before the first block. `by_head` names
    arguments of a block that have a row for every head of a sequence.
    """

    base: str
    blocks: str
    final_norm: str
    embedding: str
    head: str
    attention: str
    mlp: str
    transposed: bool
    matrices: tuple[MatrixEntry, ...]
    known_as: str = ""
    scale: str | None = None
    divisor: str | None = None
    cap: str | None = None
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    by_head: frozenset[str] = frozenset()

    def logit_map(self, config: Any) -> LogitMap:
        """What a model of this `config` makes of its unembedding's output."""
        scale = 1.0 if self.scale is None else float(getattr(config, self.scale))
        if self.divisor is not None:
            scale /= getattr(config, self.divisor)
        return LogitMap(scale, None if self.cap is None else getattr(config, self.cap, None))


def head_counts(config: Any) -> tuple[int, int]:
    """How many heads have queries, and how many keys and values, in a model of this `config`."""
    heads = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return heads, 1  # Falcon 7B, whose num_kv_heads does not count then
    return heads, getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads


def part_widths(entry: MatrixEntry, d_out: int, heads: int, kv_heads: int) -> list[int]:
    """How many columns each of a fused matrix's parts has, of `d_out` in all."""
    shares = {"q": heads, "k": kv_heads, "v": kv_heads} if entry.parts[0][0] == "q" else {}
    weights = [shares.get(part, 1) for part, _ in entry.parts]
    return [d_out * weight // sum(weights) for weight in weights]


def attention_entries(
    where: str, norm: str | tuple[str, ...], out: str = "o_proj", writes: str = RESIDUAL
) -> tuple[MatrixEntry, ...]:
    """q, k, v and the matrix `out` behind them, each a module of its own below `where`."""
    norms = (norm,) if isinstance(norm, str) else norm
    return (
        MatrixEntry(f"{where}.q_proj", norms),
        MatrixEntry(f"{where}.k_proj", norms),
        MatrixEntry(f"{where}.v_proj", norms, writes=f"{where}.{out}"),
        MatrixEntry(f"{where}.{out}", reads=f"{where}.v_proj", writes=writes),
    )


def fused_attention(
    fused: str, norm: str | tuple[str, ...], out: str, interleaved: bool = False
) -> tuple[MatrixEntry, ...]:
    """q, k and v in the columns of one module, and the matrix `out` behind them."""
    norms = (norm,) if isinstance(norm, str) else norm
    parts = (("q", None), ("k", None), ("v", out))
    return (
        MatrixEntry(fused, norms, parts=parts, interleaved=interleaved),
        MatrixEntry(out, reads=f"{fused}.v", writes=RESIDUAL),
    )


def plain_mlp(first: str, second: str, norm: str | tuple[str, ...]) -> tuple[MatrixEntry, ...]:
    """An MLP of two matrices."""
    norms = (norm,) if isinstance(norm, str) else norm
    return (MatrixEntry(first, norms, writes=second), MatrixEntry(second, reads=first, writes=RESIDUAL))


def gated_mlp(norm: str | tuple[str, ...], writes: str = RESIDUAL) -> tuple[MatrixEntry, ...]:
    """An MLP whose hidden layer is a product of two."""
    norms = (norm,) if isinstance(norm, str) else norm
    return (
        MatrixEntry("mlp.gate_proj", norms, writes="mlp.down_proj"),
        MatrixEntry("mlp.up_proj", norms, writes="mlp.down_proj"),
        MatrixEntry("mlp.down_proj", reads="mlp.up_proj", writes=writes),
    )
