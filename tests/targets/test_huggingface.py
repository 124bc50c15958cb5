"""Language models as targets: every architecture of the table, replay of blocks, refusals."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
from conftest import save_tiny_model
from transformers import AutoModelForCausalLM

from spdcli.errors import SpdError, UsageError
from spdcli.targets.architectures import ARCHITECTURES
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.prompts import encode

PROMPTS = ["Kobe Bryant plays golf", "Tiger Woods plays the sport of golf", "Woods plays"]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def directory(request, tmp_path_factory):
    """A tiny random model of every architecture in the table, so that a new entry is tested too."""
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def record_blocks(target, tokens):
    """What every block was called with, and the stream after the last: as the engine listens in."""
    calls, handles = [], []
    for block in target.blocks:
        hook = lambda module, args, kwargs: calls.append((args, kwargs))  # noqa: E731
        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    last = []
    note = lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles.append(target.blocks[-1].register_forward_hook(note))
    target.run(tokens)
    for handle in handles:
        handle.remove()
    return calls, last[0]


def gather(value, rows, size, key=""):
    if isinstance(value, tuple):
        return tuple(gather(item, rows, size) for item in value)
    if key == "alibi" and value is not None:  # a row for every head of a sequence
        return torch.cat([value.chunk(size)[row] for row in rows])
    batched = isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[0] == size
    return value[rows] if batched else value


def replay(target, calls, rows, size, start=0):
    """The recorded calls once more, from block `start`, on chosen rows of the batch."""
    hidden = calls[start][0][0][rows]
    for block, (args, kwargs) in list(zip(target.blocks, calls, strict=True))[start:]:
        others = [gather(value, rows, size) for value in args[1:]]
        hidden = block(hidden, *others, **{key: gather(value, rows, size, key) for key, value in kwargs.items()})
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def padded_batch(language_model):
    prompts = encode(language_model.tokenizer, PROMPTS)
    assert not prompts.batch.valid.all()
    return prompts.batch


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_can_be_replayed_by_row(directory, count):
    language_model = load_model(str(directory), "float64")
    target, batch = build_target(language_model, False), padded_batch(language_model)
    tokens = batch.tokens[:count]
    calls, last = record_blocks(target, tokens)
    rows = torch.tensor([2, 0, 0, 1, 2]) % count
    for start in range(len(target.blocks)):
        replayed = replay(target, calls, rows, count, start)
        # Norms of the Llama family round to float32, whatever the model's type.
        torch.testing.assert_close(replayed, last[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mistral", "sliding_window": 3},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ],
)
def test_masks_of_sliding_windows_are_replayed(tmp_path, settings):
    language_model = load_model(str(save_tiny_model(tmp_path, **settings)), "float64")
    target, batch = build_target(language_model, False), padded_batch(language_model)
    calls, last = record_blocks(target, batch.tokens)
    rows = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(replay(target, calls, rows, 3), last[rows], rtol=0, atol=1e-6)
    own = language_model.model.model(batch.tokens, attention_mask=batch.valid.long()).last_hidden_state
    torch.testing.assert_close(target.finish(last)[batch.valid], own[batch.valid], rtol=0, atol=1e-6)


def test_ends_make_the_models_own_logits(directory):
    language_model = load_model(str(directory), "float64")
    target, batch = build_target(language_model, False), padded_batch(language_model)
    _, last = record_blocks(target, batch.tokens)
    logits = target.outputs(last)
    own = language_model.model(batch.tokens, attention_mask=batch.valid.long()).logits
    torch.testing.assert_close(logits[batch.valid], own[batch.valid], rtol=0, atol=1e-6)
    for prompt in range(len(PROMPTS)):
        alone = language_model.model(batch.tokens[prompt : prompt + 1, batch.valid[prompt]]).logits[0]
        torch.testing.assert_close(logits[prompt, batch.valid[prompt]], alone, rtol=0, atol=1e-6)


def test_every_matrix_is_named_by_its_module(directory):
    language_model = load_model(str(directory), "float32")
    target = build_target(language_model, False)
    assert len(target.matrices) == len(target.blocks) * len(language_model.architecture.matrices)
    for name, matrix in target.matrices.items():
        assert language_model.base.get_submodule(name) is matrix.module
        x = torch.randn(2, matrix.d_in)
        bias = 0 if matrix.bias is None else matrix.bias
        torch.testing.assert_close(matrix.module(x), x @ matrix.weight + bias)
    inside_blocks = {id(module) for block in target.blocks for module in block.modules()}
    weights = [parameter for block in target.blocks for parameter in block.parameters() if parameter.ndim == 2]
    assert len(weights) == len(target.matrices), "a weight matrix of a block is not in the table"
    assert all(id(matrix.module) in inside_blocks for matrix in target.matrices.values())


def test_matrices_are_in_the_order_of_execution(directory):
    target = build_target(load_model(str(directory), "float32"), False)
    seen = []
    for name, matrix in target.matrices.items():
        matrix.module.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    target.run(torch.zeros(1, 3, dtype=torch.long))
    assert seen == list(target.matrices)


def test_the_model_is_frozen(tiny_gpt2_dir):
    model = load_model(str(tiny_gpt2_dir), "float32").model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_split_attention_covers_c_attn(tiny_gpt2_dir):
    language_model = load_model(str(tiny_gpt2_dir), "float32")
    whole, split = build_target(language_model, False), build_target(language_model, True)
    assert list(split.matrices)[:4] == [
        "h.0.attn.c_attn.q",
        "h.0.attn.c_attn.k",
        "h.0.attn.c_attn.v",
        "h.0.attn.c_proj",
    ]
    parts = [split.matrices[f"h.1.attn.c_attn.{part}"] for part in "qkv"]
    fused = whole.matrices["h.1.attn.c_attn"]
    assert torch.equal(torch.cat([part.weight for part in parts], dim=1), fused.weight)
    assert torch.equal(torch.cat([part.bias for part in parts]), fused.bias)


def test_split_attention_is_refused_where_nothing_is_fused(tiny_llama_dir):
    with pytest.raises(UsageError, match="'llama' keeps q, k and v apart already"):
        build_target(load_model(str(tiny_llama_dir), "float32"), True)


def test_gradients_are_exact_under_padding(tiny_gpt2_dir):
    """Against central differences: 1e-6 is their own error in float64 at this step."""
    language_model = load_model(str(tiny_gpt2_dir), "float64")
    target, batch = build_target(language_model, False), padded_batch(language_model)
    calls, _ = record_blocks(target, batch.tokens)
    probe = torch.randn(3, batch.tokens.shape[1], 32, dtype=torch.float64) * batch.valid[..., None]

    def value(step):
        moved = [((calls[0][0][0] + step * probe, *calls[0][0][1:]), calls[0][1]), *calls[1:]]
        return (replay(target, moved, torch.arange(3), 3) * probe).sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(step), step)
    with torch.no_grad():
        difference = (value(torch.tensor(1e-5)) - value(torch.tensor(-1e-5))) / 2e-5
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtype(tiny_llama_dir, dtype):
    assert build_target(load_model(str(tiny_llama_dir), dtype), False).unembedding.dtype == getattr(torch, dtype)


def test_loading_and_running_are_silent(tiny_gpt2_dir, capfd):
    language_model = load_model(str(tiny_gpt2_dir), "float32")
    batch = padded_batch(language_model)
    build_target(language_model, False).run(batch.tokens)
    assert capfd.readouterr() == ("", "")


def test_a_directory_is_loaded_without_the_network(tiny_llama_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("socket", "getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    load_model(str(tiny_llama_dir), "float32")


def edited_copy(source, folder, **changes):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_an_unknown_architecture_says_what_its_entry_needs(tiny_llama_dir, tmp_path):
    folder = edited_copy(tiny_llama_dir, tmp_path / "other", model_type="newfangled")
    with pytest.raises(
        SpdError, match="type 'newfangled' are not supported; known types: bloom, cohere, falcon"
    ) as caught:
        load_model(str(folder), "float32")
    assert "blocks, final norm, embedding and head" in caught.value.hint


def test_a_quantised_checkpoint_is_refused(tiny_llama_dir, tmp_path):
    folder = edited_copy(tiny_llama_dir, tmp_path / "quantised", quantization_config={"quant_method": "gptq"})
    with pytest.raises(SpdError, match="is quantised"):
        load_model(str(folder), "float32")


def test_missing_weights_are_named(tiny_llama_dir, tmp_path):
    folder = edited_copy(tiny_llama_dir, tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(SpdError, match=r"lacks weights: model\.layers\.3"):
        load_model(str(folder), "float32")


def test_a_damaged_weight_file_is_one_line(tiny_llama_dir, tmp_path):
    folder = edited_copy(tiny_llama_dir, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(SpdError, match=r"model\.safetensors: damaged") as caught:
        load_model(str(folder), "float32")
    assert "\n" not in caught.value.message


def test_a_damaged_config_is_one_line(tiny_llama_dir, tmp_path):
    folder = edited_copy(tiny_llama_dir, tmp_path / "damaged")
    (folder / "config.json").write_text("{")
    with pytest.raises(SpdError, match=r"config\.json: not a JSON object") as caught:
        load_model(str(folder), "float32")
    assert "\n" not in caught.value.message


def test_code_that_comes_with_a_model_never_runs(tiny_llama_dir, tmp_path):
    changes = {"auto_map": {"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"}}
    folder = edited_copy(tiny_llama_dir, tmp_path / "trap", **changes)
    (folder / "trap.py").write_text("raise SystemExit('code of the model ran')")
    assert type(load_model(str(folder), "float32").model).__name__ == "LlamaForCausalLM"


def test_same_logits_as_transformers(tiny_llama_dir):
    ours = load_model(str(tiny_llama_dir), "float32").model
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)  # float32 rounding
