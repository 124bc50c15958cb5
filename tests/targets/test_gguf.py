"""GGUF files: converted once, atomically, to the same logits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.errors import SpdError
from spdcli.targets.gguf import converted
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.prompts import encode
from spdcli.targets.user_cache import cache_folder

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="module")
def gguf_file(tiny_llama_dir, tmp_path_factory):
    """The tiny Llama's weights as a GGUF file (its rotary layout ignored: any weights do here)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((tiny_llama_dir / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(tokenizer["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    stem, ending = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{ending}"
    _, _, index, inside = stem.split(".", 3)
    return f"blk.{index}.{NAMES[inside]}.{ending}"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spd" / "gguf"


def test_conversion_keeps_the_logits(gguf_file, empty_cache):
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ours = load_model(str(gguf_file), "float32")
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(ours.model(tokens).logits, direct(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    text = "Kobe Bryant plays golf"
    assert ours.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert encode(ours.tokenizer, [text]).pieces == [["K", "obe", " Bryant", " plays"]]


def test_nothing_beside_the_file_is_read(gguf_file, empty_cache, tmp_path):
    copy = Path(shutil.copy(gguf_file, tmp_path))
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text('{"tokenizer_class": "BertTokenizer"')
    assert load_model(str(copy), "float32").tokenizer("golf")["input_ids"]


def test_the_result_is_a_plain_checkpoint_directory(gguf_file, empty_cache):
    folder = converted(gguf_file)
    assert folder.parent == empty_cache
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert [file.name for file in empty_cache.iterdir()] == [folder.name], "nothing temporary is left"


def test_a_file_is_converted_once(gguf_file, empty_cache, monkeypatch, tmp_path):
    folder = converted(gguf_file)
    monkeypatch.setattr("spdcli.targets.gguf.convert", lambda path, folder: pytest.fail("converted again"))
    assert converted(gguf_file) == folder
    changed = tmp_path / gguf_file.name
    changed.write_bytes(gguf_file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        converted(changed)


def test_a_failed_conversion_leaves_nothing(gguf_file, empty_cache, monkeypatch):
    def fail(path, folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("spdcli.targets.gguf.convert", fail)
    with pytest.raises(KeyboardInterrupt):
        converted(gguf_file)
    assert list(empty_cache.iterdir()) == []


def test_two_at_once_share_the_winners(gguf_file, empty_cache, monkeypatch):
    import threading

    both_are_converting = threading.Barrier(2, timeout=10)

    def convert(path, folder):
        (folder / "config.json").write_text(folder.name)
        both_are_converting.wait()

    monkeypatch.setattr("spdcli.targets.gguf.convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(converted, [gguf_file, gguf_file])
    assert first == second
    assert [file.name for file in first.iterdir()] == ["config.json"]
    assert list(empty_cache.iterdir()) == [first]


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_missing_libraries_are_named(gguf_file, empty_cache, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(SpdError, match=f"needs {missing}") as caught:
        converted(gguf_file)
    assert caught.value.hint == "pip install 'spd-cli[gguf]'"


@pytest.mark.parametrize("length", [200, 8000, 60000])
def test_what_is_not_gguf_is_one_line(tmp_path, gguf_file, empty_cache, length):
    assert length < gguf_file.stat().st_size
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(SpdError, match="is not a GGUF file"):
        load_model(str(tmp_path / "text.gguf"), "float32")
    (tmp_path / "short.gguf").write_bytes(gguf_file.read_bytes()[:length])
    with pytest.raises(SpdError, match="cannot be converted") as caught:
        load_model(str(tmp_path / "short.gguf"), "float32")
    assert "\n" not in caught.value.message


def test_a_cache_that_cannot_be_written(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SpdError, match="the cache cannot be written"):
        converted(gguf_file)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("gguf") == tmp_path / ".cache" / "spd" / "gguf"


def test_conversion_is_silent(gguf_file, empty_cache, capfd):
    load_model(str(gguf_file), "float32")
    assert capfd.readouterr() == ("", "")


def test_smollm2_knows_its_sports(smollm2):
    """The probabilities that transformers' own GGUF loading gives, to the three digits noted."""
    prompts = encode(
        smollm2.tokenizer, ["Kobe Bryant plays professional basketball", "Tiger Woods plays professional golf"]
    )
    probabilities = smollm2.model(prompts.batch.tokens).logits.softmax(-1)
    answers = probabilities[torch.arange(2), prompts.answer_at, prompts.batch.answers]
    torch.testing.assert_close(answers, torch.tensor([0.475, 0.308]), rtol=0, atol=5e-4)
    assert len(build_target(smollm2, False).matrices) == 30 * 7


def test_removing_the_file_does_not_matter_once_loaded(gguf_file, empty_cache, tmp_path):
    copy = tmp_path / "copy.gguf"
    shutil.copy(gguf_file, copy)
    language_model = load_model(str(copy), "float32")
    copy.unlink()
    assert load_model(str(language_model.source), "float32").model.num_parameters() > 0
