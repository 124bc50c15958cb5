"""The transformer families that can be decomposed. A new one is one entry in the table at the end.

Any decoder fits whose blocks take the residual stream as their first argument and return it, with one weight matrix per
module, or several in one module's columns (as in GPT-2's `c_attn`). Whether an entry fits a checkpoint is tried when it
is loaded (`targets/self_check.py`), so that a wrong one is refused and never used.
"""

from __future__ import annotations

from dataclasses import replace

from spdcli.errors import SpdError
from spdcli.targets.block_layout import (
    RESIDUAL,
    Architecture,
    MatrixEntry,
    attention_entries,
    fused_attention,
    gated_mlp,
    plain_mlp,
)

BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"  # as Llama calls them

GPT2 = Architecture(
    base="transformer",
    blocks="h",
    final_norm="ln_f",
    embedding="wte",
    head="lm_head",
    attention="attn",
    mlp="mlp",
    transposed=False,
    matrices=(*fused_attention("attn.c_attn", "ln_1", "attn.c_proj"), *plain_mlp("mlp.c_fc", "mlp.c_proj", "ln_2")),
    known_as="GPT-2",
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
    matrices=(*attention_entries("self_attn", BEFORE_ATTENTION), *gated_mlp(BEFORE_MLP)),
    known_as="Llama, SmolLM2",
)

# A norm behind attention and MLP, before their outputs are added.
NORMS_BEHIND = replace(
    LLAMA,
    attention="post_attention_layernorm",
    mlp="post_feedforward_layernorm",
    matrices=(
        *attention_entries("self_attn", (), writes="post_attention_layernorm"),
        *gated_mlp((), "post_feedforward_layernorm"),
    ),
)
NORMS_AROUND = replace(
    NORMS_BEHIND,
    matrices=(
        *attention_entries("self_attn", BEFORE_ATTENTION, writes="post_attention_layernorm"),
        *gated_mlp("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    cap="final_logit_softcapping",
    embedding_scale=lambda config: config.hidden_size**0.5,
)

GPT_NEOX = replace(
    LLAMA,
    base="gpt_neox",
    final_norm="final_layer_norm",
    embedding="embed_in",
    head="lm_head",
    attention="attention",
    matrices=(
        *fused_attention("attention.query_key_value", BEFORE_ATTENTION, "attention.dense", interleaved=True),
        *plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", BEFORE_MLP),
    ),
    known_as="Pythia, GPT-NeoX",
)

FALCON = replace(
    LLAMA,
    base="transformer",
    blocks="h",
    final_norm="ln_f",
    embedding="word_embeddings",
    attention="self_attention",
    matrices=(
        *fused_attention(
            "self_attention.query_key_value", ("ln_attn", BEFORE_ATTENTION), "self_attention.dense", interleaved=True
        ),
        *plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ("ln_mlp", BEFORE_MLP, BEFORE_ATTENTION)),
    ),
    known_as="Falcon",
    by_head=frozenset({"alibi"}),
)

# Its attention and its MLP add the stream to their own outputs: what is added is their last matrix's output.
BLOOM = replace(FALCON, attention="self_attention.dense", mlp="mlp.dense_4h_to_h", known_as="BLOOM")

GPTJ = replace(
    GPT2,
    transposed=True,
    matrices=(
        *attention_entries("attn", "ln_1", "out_proj"),
        *plain_mlp("mlp.fc_in", "mlp.fc_out", "ln_1"),
    ),
    known_as="GPT-J",
)

GPT_NEO = replace(
    GPTJ,
    matrices=(
        *attention_entries("attn.attention", "ln_1", "out_proj"),
        *plain_mlp("mlp.c_fc", "mlp.c_proj", "ln_2"),
    ),
    known_as="GPT-Neo, TinyStories",
)

OPT = replace(
    LLAMA,
    base="model.decoder",
    final_norm="final_layer_norm",
    mlp="fc2",
    matrices=(
        *attention_entries("self_attn", "self_attn_layer_norm", "out_proj"),
        *plain_mlp("fc1", "fc2", "final_layer_norm"),
    ),
    known_as="OPT, Galactica",
)

PHI = replace(
    LLAMA,
    final_norm="final_layernorm",
    matrices=(
        *attention_entries("self_attn", BEFORE_ATTENTION, "dense"),
        *plain_mlp("mlp.fc1", "mlp.fc2", BEFORE_ATTENTION),
    ),
    known_as="Phi-1.5, Phi-2",
)

PHI3 = replace(
    LLAMA,
    matrices=(
        *fused_attention("self_attn.qkv_proj", BEFORE_ATTENTION, "self_attn.o_proj"),
        MatrixEntry("mlp.gate_up_proj", (BEFORE_MLP,), parts=(("gate", "mlp.down_proj"), ("up", "mlp.down_proj"))),
        MatrixEntry("mlp.down_proj", reads="mlp.gate_up_proj.up", writes=RESIDUAL),
    ),
    known_as="Phi-3, Phi-4",
)

STARCODER2 = replace(
    LLAMA,
    matrices=(
        *attention_entries("self_attn", BEFORE_ATTENTION),
        *plain_mlp("mlp.c_fc", "mlp.c_proj", BEFORE_MLP),
    ),
    known_as="StarCoder2",
)

# Attention and MLP side by side, behind one norm, unless there are two.
STABLELM = replace(
    LLAMA,
    matrices=(
        *attention_entries("self_attn", BEFORE_ATTENTION),
        *gated_mlp((BEFORE_MLP, BEFORE_ATTENTION)),
    ),
    known_as="StableLM",
)

ARCHITECTURES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": replace(LLAMA, known_as="Mistral"),
    "qwen2": replace(LLAMA, known_as="Qwen2"),
    "qwen3": replace(LLAMA, known_as="Qwen3"),
    "smollm3": replace(LLAMA, known_as="SmolLM3"),
    "gpt_neox": GPT_NEOX,
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "opt": OPT,
    "bloom": BLOOM,
    "falcon": FALCON,
    "phi": PHI,
    "phi3": PHI3,
    "olmo": replace(LLAMA, known_as="OLMo"),
    "olmo2": replace(NORMS_BEHIND, known_as="OLMo 2"),
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
    "gemma": replace(LLAMA, known_as="Gemma", embedding_scale=NORMS_AROUND.embedding_scale),
    "gemma2": replace(NORMS_AROUND, known_as="Gemma 2"),
    "gemma3_text": replace(NORMS_AROUND, known_as="Gemma 3 (text)"),
    "granite": replace(
        LLAMA,
        known_as="Granite",
        divisor="logits_scaling",
        embedding_scale=lambda config: config.embedding_multiplier,
    ),
    "cohere": replace(STABLELM, known_as="Command R", scale="logit_scale"),
}

UNFIT = {
    "its experts see tokens of their choice, so that their matrices have no input at every position": (
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "phimoe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "dbrx",
        "jamba",
    ),
    "it is a state space model, whose blocks have neither attention nor an MLP": (
        "mamba",
        "mamba2",
        "falcon_mamba",
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """The entry of a config's `model_type`. Raises SpdError for a family that the table lacks."""
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    for reason, types in UNFIT.items():
        if model_type in types:
            raise SpdError(f"models of type '{model_type}' cannot be decomposed: {reason}")
    raise SpdError(
        f"models of type '{model_type}' are not supported; known types: {', '.join(sorted(ARCHITECTURES))}",
        "a new type is one entry of ARCHITECTURES in spdcli/targets/architectures.py: the paths of its base model, "
        "blocks, final norm, embedding and head, a block's attention and MLP, and its matrices with where each reads "
        "and writes",
    )
