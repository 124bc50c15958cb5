"""Checkpoints of goodfire-ai/spd: a hand-made one read, a round trip, and what cannot be read or written."""

from __future__ import annotations

import json

import pytest
import torch
from edited_models import open_case
from safetensors.torch import save_file
from small_runs import MODEL, model_recipe, one_line, spd_here
from torch import nn

from spdcli.engine.forward import clean_pass
from spdcli.errors import SpdError, UsageError
from spdcli.measures.importances import importances_of
from spdcli.runs.goodfire import components_in, export_run, exported_state, import_run, read_state
from spdcli.runs.loading import LoadedRun

NAMES = ["h.0.mlp.c_fc", "h.1.attn.c_proj"]
GATES = {"scalar": "mlp", "vector": "vector_mlp", "shared": "shared_mlp"}


def their_importance(kind, x, V, W1, b1, W2, b2):
    """Their importance functions by loops over slices: x `[T, I]` to values before the sigmoid `[T, C]`."""
    if kind == "shared":
        return nn.functional.gelu(x @ W1 + b1) @ W2 + b2
    columns = []
    for c in range(V.shape[1]):
        read = (x @ V[:, c])[:, None] if kind == "scalar" else x
        columns.append(nn.functional.gelu(read @ W1[c] + b1[c]) @ W2[c] + b2[c])
    return torch.cat(columns, dim=1)


def random_state(kind, slices, width=3):
    """A checkpoint of two matrices of the tiny GPT-2, with so many slices each, in float64."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    sizes = {"transformer-h-0-mlp-c_fc": (32, 128), "transformer-h-1-attn-c_proj": (32, 32)}
    state = {"target_model.transformer.wte.weight": draw(3, 3)}
    for (path, (d_in, d_out)), C in zip(sizes.items(), slices, strict=True):
        state |= {f"_components.{path}.V": draw(d_in, C), f"_components.{path}.U": draw(C, d_out)}
        reads = {"scalar": 1, "vector": d_in}.get(kind)
        shapes = (
            [(C, reads, width), (C, width), (C, width, 1), (C, 1)]
            if reads
            else [(d_in, width), (width,), (width, C), (C,)]
        )
        layers = ("layers.0.W", "layers.0.b", "layers.2.W", "layers.2.b")
        state |= {f"_ci_fns.{path}.{layer}": draw(*shape) for layer, shape in zip(layers, shapes, strict=True)}
    return state


def their_values(kind, state, inputs):
    """What their functions give, clamped, by our names of matrices."""
    values = {}
    for name in NAMES:
        path = f"transformer-{name.replace('.', '-')}"
        layers = [state[f"_ci_fns.{path}.layers.{layer}"] for layer in ("0.W", "0.b", "2.W", "2.b")]
        values[name] = their_importance(kind, inputs[name], state[f"_components.{path}.V"], *layers).clamp(0, 1)
    return values


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("form", ["model_10.pth", "model.safetensors"])
def test_a_hand_made_checkpoint_is_read(kind, form, request, tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, "target.dtype='float64'", folder=tmp_path)
    state = random_state(kind, (4, 2))
    (save_file if form.endswith("safetensors") else torch.save)(state, tmp_path / form)
    run = import_run(recipe, tmp_path / form, "cpu")
    assert run.decomposition.names == NAMES
    assert (run.recipe.slices.C, run.recipe.importance.kind, run.recipe.importance.gate_width) == (4, kind, 3)
    U = run.decomposition.of(NAMES[0]).U
    torch.testing.assert_close(U, nn.Parameter(state["_components.transformer-h-0-mlp-c_fc.V"], requires_grad=False))
    batch = run.subject.prompts.batch
    inputs = {name: x[0] for name, x in clean_pass(run.subject.target, batch, NAMES).inputs.items()}
    g, _ = importances_of(run.subject, run.decomposition, batch)
    real = int(batch.valid[0].sum())
    for name, value in their_values(kind, state, inputs).items():
        torch.testing.assert_close(g[name][0, :real, : value.shape[1]], value[:real], rtol=1e-9, atol=1e-9)
    assert not g[NAMES[1]][..., 2:].any(), "slices that the checkpoint does not have are off"
    again = exported_state(run)
    for key, value in state.items():
        if not key.startswith("target_model.") and "c_proj" not in key:
            torch.testing.assert_close(again[key], value)
    assert again["_components.transformer-h-0-mlp-c_fc.bias"].shape == (128,)


@pytest.mark.parametrize(
    ("kind", "more"), [("scalar", ()), ("shared", ()), ("vector", ()), ("vector", ("importance.basis='span'",))]
)
def test_a_run_comes_back_as_it_was(kind, more, request, tmp_path):
    settings = (f"importance.kind='{kind}'", "importance.gate_width=3", *more)
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path, *settings)
    decomposition.importances.prune({name: torch.arange(decomposition.of(name).U.shape[1]) != 1 for name in names})
    recipe = recipe_of_case(request, tmp_path, *settings)
    run = LoadedRun(None, recipe, subject, decomposition)
    export_run(run, tmp_path / "model.pth")
    back = import_run(recipe, tmp_path / "model.pth", "cpu")
    batch = subject.prompts.batch
    before, after = (importances_of(one.subject, one.decomposition, batch)[0] for one in (run, back))
    for name in names:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back.decomposition.of(name).V, decomposition.of(name).V)
    with pytest.raises(UsageError, match="is there already"):
        export_run(run, tmp_path / "model.pth")
    target = {key for key in read_state(tmp_path / "model.pth") if key.startswith("target_model.")}
    assert {key.removeprefix("target_model.") for key in target} == set(subject.target.model.state_dict())


def recipe_of_case(request, folder, *settings):
    model = request.getfixturevalue("tiny_gpt2_dir")
    return model_recipe(model, "target.dtype='float64'", *settings, folder=folder)


def test_older_and_newer_names_of_gates(tmp_path):
    state = random_state("vector", (4, 4))
    for prefix in ("_gates.", "ci_fn._ci_fns."):
        renamed = {key.replace("_ci_fns.", prefix, 1): value for key, value in state.items()}
        assert set(components_in(renamed, tmp_path)) == {f"transformer.{name}" for name in NAMES}


def test_what_is_no_checkpoint_is_one_line(request, tmp_path, tiny_gpt2_dir):
    path, state = tmp_path / "model.pth", random_state("vector", (4, 4))

    class Code:
        def __reduce__(self):
            return (print, ("this is run",))

    deeper = {key.replace("layers.2", "layers.4"): value for key, value in state.items()}
    strange = {key.replace("transformer-h", "gpt-h"): value for key, value in state.items()}
    for content, said in (
        (Code(), "not tensors that torch.save wrote"),
        ({"a": [1]}, "not a state dict"),
        ({"a": torch.ones(1)}, "no checkpoint of goodfire-ai/spd"),
        (deeper, "expected layers.0.W, layers.0.b, layers.2.W, layers.2.b"),
        (strange, "decomposes gpt.h.0.mlp.c_fc, which"),
    ):
        torch.save(content, path)
        with pytest.raises(SpdError) as caught:
            import_run(recipe_of_case(request, tmp_path), path, "cpu")
        assert said in caught.value.message
        assert "\n" not in caught.value.message
    path.write_bytes(b"nothing")
    with pytest.raises(SpdError, match=r"not tensors that torch\.save wrote"):
        read_state(path)


def test_embeddings_are_left_out_with_a_warning(request, tmp_path):
    state = random_state("scalar", (4, 4))
    own = {key: value for key, value in state.items() if "c_proj" in key}
    state |= {key.replace("transformer-h-1-attn-c_proj", "transformer-wte"): value for key, value in own.items()}
    torch.save(state, tmp_path / "model.pth")
    said = []
    run = import_run(recipe_of_case(request, tmp_path), tmp_path / "model.pth", "cpu", said.append)
    assert run.decomposition.names == NAMES
    assert [one.warning for one in said] == [True]
    assert said[0].text.startswith("1 modules are left out, as transformer.wte")


def test_what_their_code_does_not_have_is_refused(request, tmp_path):
    settings = ("importance.kind='attention'", "importance.gate_width=3")
    subject, decomposition, *_ = open_case("gpt2", request, tmp_path, *settings)
    run = LoadedRun(None, recipe_of_case(request, tmp_path, *settings), subject, decomposition)
    with pytest.raises(UsageError, match="importance functions of kind attention"):
        exported_state(run)


def test_from_the_command_line_and_back(monkeypatch, capsys, tmp_path, tiny_gpt2_dir):
    spd = spd_here(monkeypatch, capsys)
    recipe, state = tmp_path / "model.toml", random_state("vector", (4, 4))
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    torch.save({key: value.float() for key, value in state.items()}, tmp_path / "model_5.pth")
    code, out, err = spd("import", tmp_path / "model_5.pth", recipe, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["matrices"] == NAMES
    code, _, err = spd("import", tmp_path / "model_5.pth", recipe, "--out", tmp_path / "run")
    assert code == 2
    one_line(err, "holds a run", "--force replaces it, or name another with --out")
    code, out, err = spd("export", tmp_path / "run", "--out", tmp_path / "again.safetensors", "--json")
    assert code == 0, err
    assert json.loads(out)["settings"] == {
        "C": 4,
        "ci_fn_type": "vector_mlp",
        "ci_fn_hidden_dims": [3],
        "sigmoid_type": "leaky_hard",
    }
    again = read_state(tmp_path / "again.safetensors")
    for key, value in state.items():
        if not key.startswith("target_model."):
            torch.testing.assert_close(again[key], value.float())
    code, _, err = spd("import", tmp_path / "none.pth", recipe, "--out", tmp_path / "other")
    assert code == 2
    one_line(err, "none.pth: no such file")
