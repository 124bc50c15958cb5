"""Model directories from strangers: what is read of them, and the one line that each kind of damage gets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import MODEL, one_line, spd_here

from spdcli.errors import SpdError
from spdcli.targets.huggingface import load_model, load_untrained
from spdcli.targets.model_files import CONFIG, INDEX, WEIGHTS
from spdcli.targets.prompts import encode

OUTSIDE = "../outside.safetensors"


@pytest.fixture
def model(tiny_gpt2_dir, tmp_path):
    """A copy of a whole model, to damage."""
    return Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "model"))


def configured(model: Path, **changes: object) -> Path:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(config | changes))
    return model


def sharded(model: Path, *names: str) -> Path:
    """The model's weights in files of these names, with their index."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    shards = {name: names[number % len(names)] for number, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, model / shard, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return model


def changed_weights(model: Path, name: str, tensor: torch.Tensor | None) -> Path:
    tensors = load_file(model / WEIGHTS)
    tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    return model


def refused(model: Path, *said: str) -> None:
    """Both ways to open the model say so in one line."""
    for load in (lambda: load_model(str(model), "float32"), lambda: load_untrained(str(model), "float32", META)):
        with pytest.raises(SpdError) as info:
            load()
        assert "\n" not in info.value.message
        assert all(text in info.value.message for text in said), info.value.message


META = torch.device("meta")
FC = "transformer.h.1.mlp.c_fc.weight"


# --- which files -------------------------------------------------------------------------------------------


def test_shards_are_read_by_their_index(model, tiny_gpt2_dir):
    whole = load_model(str(tiny_gpt2_dir), "float32").model.state_dict()
    shards = load_model(str(sharded(model, "a.safetensors", "b.safetensors")), "float32").model.state_dict()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_a_pickle_that_an_index_names_is_never_opened(model):
    """transformers would load it, whatever `use_safetensors` says, beside a decoy."""
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    (model / "decoy.safetensors").write_bytes(b"")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}))
    refused(model, "names 'pytorch_model.bin'", "never pickles")


@pytest.mark.parametrize("name", [OUTSIDE, "/etc/x.safetensors", "sub/x.safetensors"])
def test_weights_lie_beside_their_index(model, name):
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    (model / "decoy.safetensors").write_bytes(b"")
    save_file(tensors, model / OUTSIDE)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    refused(model, f"names '{name}'")


def test_links_do_not_lead_out_of_a_model(model):
    (model / WEIGHTS).rename(model / OUTSIDE)
    (model / WEIGHTS).symlink_to(OUTSIDE)
    refused(model, "a link to", "outside the model")


def test_the_hubs_cache_keeps_files_beside_their_snapshot(model, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(model.iterdir()):
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        file.rename(blobs / str(number))
    assert load_model(str(snapshot), "float32").tokenizer("golf")["input_ids"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_pipe_a_device_and_a_directory_are_no_files(model, name, make):
    (model / name).unlink()
    make(model / name)
    refused(model, name if name != CONFIG or make is os.mkfifo else "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b'{"weight_map": {"a": 1}}', b'{"weight_map": []}', b"[" * 99_999],
)
def test_an_index_that_is_none(model, content):
    sharded(model, "a.safetensors")
    (model / INDEX).write_bytes(content)
    refused(model, INDEX)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"weight_map": {"a": "old-00001.safetensors"}}'])
def test_a_stale_index_beside_the_whole_file_is_left_alone(model, content):
    (model / INDEX).write_bytes(content)
    load_model(str(model), "float32")


def test_an_adapter_and_what_it_adapts_are_not_looked_for(model):
    adapter = {"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "adapter_model.safetensors").write_bytes(b"")
    load_model(str(model), "float32")


# --- config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "not a JSON object, but a list"),
        (b"{", "not a JSON object"),
        (b"\xff", "not text in UTF-8"),
        (b'{"model_type": ["gpt2"]}', "are not supported"),
        (b'{"model_type": "gpt2", "layer_norm_epsilon": NaN}', "NaN is no number"),
    ],
)
def test_a_config_that_is_none(model, content, said):
    (model / CONFIG).write_bytes(content)
    refused(model, said)


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "eager"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation_internal": "eager"},
        {"output_attentions": True},
        {"return_dict": False, "torchscript": True},
        {"transformers_weights": "../other.safetensors"},
        {"auto_map": {"AutoConfig": "trap.Trap"}},
    ],
)
def test_a_config_does_not_say_how_a_model_is_run(model, tiny_gpt2_dir, changes):
    ours = load_model(str(configured(model, **changes)), "float32").model
    assert ours.config._attn_implementation == "sdpa"
    assert ours.config.return_dict
    tokens = torch.arange(6)[None]
    assert torch.equal(ours(tokens).logits, load_model(str(tiny_gpt2_dir), "float32").model(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 10**9}, "n_layer = 1000000000, but the weights are"),
        ({"n_layer": 2}, "h.2."),
        ({"n_layer": 0}, "h.0."),
        ({"n_embd": 64}, "has the shape"),
        ({"n_positions": 10**9}, "describes a model of"),
        ({"n_inner": 2**40}, "describes a model of"),
        ({"vocab_size": 7}, "has the shape"),
        ({"n_head": 5}, "cannot be loaded"),
        ({"n_embd": "wide"}, "cannot be loaded"),
        ({"activation_function": "none such"}, "cannot be loaded"),
    ],
)
def test_a_config_of_other_weights(model, changes, said):
    refused(configured(model, **changes), said)


# --- weights -----------------------------------------------------------------------------------------------


def test_a_tensor_of_another_shape_is_named(model):
    refused(changed_weights(model, FC, torch.zeros(3, 5)), f"'{FC}' has the shape [3, 5]", "[32, 128]")


def test_whole_numbers_are_no_weights(model):
    refused(changed_weights(model, FC, torch.zeros(32, 128, dtype=torch.int8)), f"'{FC}' holds I8")


def test_names_may_lack_the_base(model):
    """As in the hub's own gpt2."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    load_model(str(model), "float32")
    save_file(tensors | {"h.7.ln_1.weight": torch.zeros(32)}, model / WEIGHTS, {"format": "pt"})
    refused(model, "'h.7.ln_1.weight' is of a block that config.json does not describe")


@pytest.mark.parametrize(("number", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (1e9, "float16")])
def test_a_weight_that_is_not_finite_is_named(model, number, dtype):
    weights = load_file(model / WEIGHTS)[FC]
    weights[3, 4] = number
    changed_weights(model, FC, weights)
    with pytest.raises(SpdError, match=f"'{FC}' is not finite in {dtype}"):
        load_model(str(model), dtype)


# --- the tokenizer -----------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer(model):
    for file in model.glob("*token*"):
        file.unlink()
    refused(model, "holds no tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"model_max_length": "long"}'])
def test_an_odd_tokenizer_is_one_line(model, name, content):
    (model / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):  # which says nothing that is missing
        load_model(str(model), "float32")
    else:
        refused(model, "model")


def test_a_panic_of_the_tokenizers_library_is_one_line(model, monkeypatch, capfd):
    """A library in Rust that panics raises what is no `Exception`, and prints a page by itself."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["continuing_subword_prefix"] = "a longer prefix than any token"
    file.write_text(json.dumps(content))
    refused(model, "cannot be loaded: range")
    assert capfd.readouterr() == ("", "")


def test_a_panic_while_encoding_is_one_line(tiny_gpt2_dir):
    class Panic(BaseException):
        pass

    def panics(*arguments, **options):
        raise Panic("index out of range")

    with pytest.raises(SpdError, match="tokenizer fails on 'Kobe': index out of range"):
        encode(panics, ["Kobe"], begin_token=False)


def test_a_token_without_an_embedding(model, tmp_path, monkeypatch, capsys):
    """As a prompt's token and as its answer."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    size = len(content["model"]["vocab"])
    content["added_tokens"].append(
        {"id": size, "content": "Ladefoged", "special": False, "single_word": False}
        | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    )
    file.write_text(json.dumps(content))
    loaded = load_model(str(model), "float32")
    assert loaded.tokenizer("Ladefoged")["input_ids"] == [size]
    for prompt in ("Kobe Ladefoged plays", "Kobe plays Ladefoged"):
        with pytest.raises(SpdError, match=f"has the token #{size}, but the model has embeddings of {size} tokens"):
            encode(loaded.tokenizer, [prompt])
    spd = spd_here(monkeypatch, capsys)
    (tmp_path / "lm.toml").write_text(MODEL.replace("professional basketball", "Ladefoged"))
    code, _, err = spd("plan", tmp_path / "lm.toml", "--set", f"target.model={model}")
    assert code == 1
    one_line(err, "Ladefoged", f"has the token #{size}")
