"""The transformer families that can be decomposed. A new one is one entry in the table at the end.

Any decoder fits whose blocks take the residual stream as their first argument and return it, with
one weight matrix per module (or equal parts side by side, as in GPT-2's `c_attn`).
"""

from __future__ import annotations

from dataclasses import dataclass

from spdcli.errors import SpdError

RESIDUAL = "the residual stream"


@dataclass(frozen=True)
class MatrixEntry:
    """One weight of a block, where its input comes from and where its output goes (for labels).

    Give `norm`, the block's norm through which it reads the residual stream, or `reads`, the matrix
    of the block whose output it reads. `writes` is RESIDUAL, or the matrix of the block that its
    output passes through, or None where the output only steers attention. A fused weight names its
    equal `parts` in column order, each with a `writes` of its own.
    """

    module: str  # path inside the block
    norm: str | None = None
    reads: str | None = None
    writes: str | None = None
    parts: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where a causal language model keeps its parts.

    `base` is a path below the whole model; `blocks`, `final_norm` and `embedding` are paths below
    `base`; `head` is a path below the whole model again. `attention` and `mlp` are the two modules of
    a block whose outputs are added to the residual stream. `transposed` is True where weights are
    stored `[O, I]` (nn.Linear). `matrices` are in the order of execution.
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


def architecture_of(model_type: str) -> Architecture:
    """The entry of a config's `model_type`. Raises SpdError for a family that the table lacks."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise SpdError(
        f"models of type '{model_type}' are not supported; known types: {', '.join(sorted(ARCHITECTURES))}",
        "a new type is one entry of ARCHITECTURES in spdcli/targets/architectures.py: the paths of its base model, "
        "blocks, final norm, embedding and head, a block's attention and MLP, and its matrices with where each reads "
        "and writes",
    )


GPT2 = Architecture(
    base="transformer",
    blocks="h",
    final_norm="ln_f",
    embedding="wte",
    head="lm_head",
    attention="attn",
    mlp="mlp",
    transposed=False,
    matrices=(
        MatrixEntry("attn.c_attn", norm="ln_1", parts=(("q", None), ("k", None), ("v", "attn.c_proj"))),
        MatrixEntry("attn.c_proj", reads="attn.c_attn.v", writes=RESIDUAL),
        MatrixEntry("mlp.c_fc", norm="ln_2", writes="mlp.c_proj"),
        MatrixEntry("mlp.c_proj", reads="mlp.c_fc", writes=RESIDUAL),
    ),
)

LLAMA = Architecture(
    base="model",
    blocks="layers",
    final_norm="norm",
    embedding="embed_tokens",
    head="lm_head",
    attention="self_attn",
    mlp="mlp",
    transposed=True,
    matrices=(
        MatrixEntry("self_attn.q_proj", norm="input_layernorm"),
        MatrixEntry("self_attn.k_proj", norm="input_layernorm"),
        MatrixEntry("self_attn.v_proj", norm="input_layernorm", writes="self_attn.o_proj"),
        MatrixEntry("self_attn.o_proj", reads="self_attn.v_proj", writes=RESIDUAL),
        MatrixEntry("mlp.gate_proj", norm="post_attention_layernorm", writes="mlp.down_proj"),
        MatrixEntry("mlp.up_proj", norm="post_attention_layernorm", writes="mlp.down_proj"),
        MatrixEntry("mlp.down_proj", reads="mlp.up_proj", writes=RESIDUAL),
    ),
)

ARCHITECTURES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
}
