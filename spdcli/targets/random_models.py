"""Small models with random weights, `random:NAME`: to try every command on another family, without the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spdcli.errors import UsageError
from spdcli.targets.user_cache import cached

RANDOM = "random:"  # what the name of such a model starts with
BEGIN = "<s>"
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
# The settings of a configuration, and whether its tokenizer puts a begin-of-sequence token before a text.
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "pythia": ({"model_type": "gpt_neox", "intermediate_size": 256, "tie_word_embeddings": False} | SIZES, False),
    "gemma": (
        {
            "model_type": "gemma2",
            "intermediate_size": 192,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 8,
        }
        | SIZES,
        True,
    ),
}


def random_model(name: str) -> Path:
    """The checkpoint directory of `random:NAME`, in the user's cache, made now if it never was: the same weights and
    the same tokenizer, of bytes, on every machine."""
    kind = name.removeprefix(RANDOM)
    if kind not in SHAPES:
        raise UsageError(f"there is no model '{name}'", f"they are {', '.join(RANDOM + known for known in SHAPES)}")
    shape, begins = SHAPES[kind]
    digest = hashlib.sha256(json.dumps([shape, begins], sort_keys=True).encode()).hexdigest()
    return cached("random", f"{kind}-{digest[:16]}", lambda folder: make(folder, shape, begins))


def make(folder: Path, shape: dict[str, Any], begins: bool) -> None:
    """Writes a model of the configuration `shape`, with weights large enough to matter, and a tokenizer of bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spdcli.targets.quiet import quiet

    vocabulary = save_bytes(folder, begins)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(**shape, **special, vocab_size=vocabulary, initializer_range=0.2)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def save_bytes(folder: Path, begins: bool) -> int:
    """Writes a tokenizer whose tokens are bytes; gives their number, that of the begin-of-sequence token included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [BEGIN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN).save_pretrained(folder)
    return len(tokens)
