"""What each of a run's files holds is checked on the way in: one line that names file and tensor, and a way back."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import TOY, model_recipe, one_line, save_toy, spd_here, toy_recipe

from spdcli.engine.fit import start_fit
from spdcli.errors import SpdError
from spdcli.files import load_tensors, save_tensors
from spdcli.recipe.reading import load_recipe
from spdcli.runs.decomposition import read_decomposition, start_decomposition
from spdcli.runs.directory import CHECKPOINT, DECOMPOSITION, METRICS, TOY_WEIGHTS, RunDirectory
from spdcli.runs.loading import load
from spdcli.runs.settings import optimiser_settings
from spdcli.runs.subject import language_subject
from spdcli.runs.training import learned, prepared_subject

SETTINGS = ("decompose.steps=4", "decompose.checkpoint_every=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a toy that was not trained."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "toy.toml").write_text(TOY)
    toy = save_toy(folder / "toy", toy_recipe(folder=folder))
    loaded = load_recipe(folder / "toy.toml", [f"target.path={toy}", *SETTINGS])
    run = RunDirectory.create(folder / "run", loaded.recipe)
    learned(run, loaded, prepared_subject(run, loaded))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to damage."""
    return RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))


def changed(path, **tensors):
    """The file without a checksum, as others write it, with some tensors changed, or taken out by None."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("checksum", None)
    kept = load_file(path) | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata)


U = "slices.Q1.U"
NAN = torch.full((8, 5), float("nan"))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({U: None}, f"lacks the tensor '{U}'"),
        ({"slices.Q7.U": torch.zeros(8, 5)}, "holds 'slices.Q7.U', which is no part of it"),
        ({U: torch.zeros(5, 8)}, f"'{U}' has the shape [5, 8], not [8, 5]"),
        ({U: torch.zeros(8, 5, dtype=torch.float64)}, f"'{U}' holds torch.float64, not torch.float32"),
        ({U: NAN}, f"a number of '{U}' is not finite"),
        ({U: None, "slices.Q1.V": None}, "lacks the tensor"),
    ],
)
def test_a_decomposition_is_what_its_recipe_makes(run, tensor, said):
    changed(run / DECOMPOSITION, **tensor)
    with pytest.raises(SpdError) as info:
        load(run.path)
    assert info.value.message.startswith(f"{run / DECOMPOSITION}: ")
    assert said in info.value.message
    assert "--resume writes it again from the checkpoint" in info.value.hint


def test_a_decomposition_of_spans_is_checked_by_its_own_ranks(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, "importance.basis=span", "slices.matrices=['h.1.*']", folder=tmp_path)
    subject = language_subject(recipe, torch.device("cpu"))
    names = [name for name in subject.target.matrices if name.startswith("h.1.")]
    made, path = start_decomposition(recipe, subject, names), tmp_path / "d.safetensors"
    save_tensors(path, made.state_dict())
    loaded = read_decomposition(path, recipe, subject)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in made.state_dict().items())
    basis = "importances.bases.h/1/mlp/c_fc"
    changed(path, **{basis: made.state_dict()[basis][:-1].contiguous()})
    with pytest.raises(SpdError, match=r"'importances\.gates\.h/1/mlp/c_fc\.w1' has the shape"):
        read_decomposition(path, recipe, subject)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({f"parameters.{U}": None}, f"lacks the tensor 'parameters.{U}'"),
        ({f"parameters.{U}": NAN}, f"'parameters.{U}' is not finite"),
        ({"optimizer.0.exp_avg": torch.zeros(3)}, "'optimizer.0.exp_avg' has the shape [3]"),
        ({"optimizer.999.exp_avg": torch.zeros(3)}, "holds 'optimizer.999.exp_avg'"),
        ({"generator.data": torch.zeros(5056)}, "'generator.data' holds torch.float32"),
        ({"generator.noise": None}, "lacks the tensor 'generator.noise'"),
        ({"weights": torch.zeros(1)}, "holds 'weights', which is no part of it"),
    ],
)
def test_a_checkpoint_is_what_training_goes_on_from(run, tensor, said):
    """A bad one falls back to the one before, and the message says why."""
    loaded = load(run.path)
    decomposition = start_decomposition(run.recipe, loaded.subject, loaded.decomposition.names)
    state = start_fit(decomposition, optimiser_settings(run.recipe.decompose), 0, torch.device("cpu"))
    changed(run / CHECKPOINT, **tensor)
    told = []
    RunDirectory(run.path).load_checkpoint(decomposition, state, told.append)
    assert state.step == 2
    assert said in told[0].text
    assert told[0].text.startswith(f"{run / CHECKPOINT}: ")
    run.checkpoint_before.unlink()
    with pytest.raises(SpdError) as info:
        RunDirectory(run.path).load_checkpoint(decomposition, state)
    assert said in info.value.message
    assert info.value.hint == "--force begins the run anew"


def test_metadata_are_counted_in_the_checksum(run):
    """Otherwise one bit makes another step of it."""
    content = (run / CHECKPOINT).read_bytes()
    (run / CHECKPOINT).write_bytes(content.replace(b'"step":"4"', b'"step":"5"'))
    assert (run / CHECKPOINT).read_bytes() != content
    with pytest.raises(SpdError, match="damaged: it does not hold what was written"):
        load_tensors(run / CHECKPOINT)


@pytest.mark.parametrize("metadata", [{}, {"step": "soon", "seconds": "1"}, {"step": "2"}])
def test_a_checkpoint_says_of_which_step_it_is(run, metadata, tmp_path, monkeypatch, capsys):
    save_file(load_file(run / CHECKPOINT), run / CHECKPOINT, metadata)
    spd = spd_here(monkeypatch, capsys)
    code, _, err = spd("decompose", run / "recipe.toml", "--out", run, "--resume", "-q")
    assert (code, err.splitlines()) == (
        0,
        [f"warning: {run / CHECKPOINT}: does not say of which step it is; going on from the checkpoint before it"],
    )


def test_a_toy_is_the_one_that_the_recipe_describes(run):
    changed(run / "toy" / TOY_WEIGHTS, **{"embed.weight": torch.zeros(3, 3)})
    with pytest.raises(SpdError, match=r"toy/target\.safetensors: 'embed\.weight' has the shape \[3, 3\]"):
        load(run.path)


@pytest.mark.parametrize(
    "line", [b"5", b"[1]", b'{"step": "1"}', b'{"step": true}', b"\xff", b"\x00", b"[" * 99_999, b""]
)
def test_a_damaged_line_of_metrics_costs_that_line(run, line):
    before = run.metrics()
    lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    (run / METRICS).write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    assert run.metrics() == before
    run.start_metrics(after=2)
    assert run.metrics() == before[:2]
    assert (run / METRICS).read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize(
    "line", [None, '{"step": 4}', '{"step": 4, "total": 1, "seconds": 1, "active": 3}', '{"step": 4, "total": null}']
)
def test_a_run_without_its_last_record_says_so(run, monkeypatch, capsys, line):
    (run / METRICS).write_text(f"{line}\n") if line else (run / METRICS).unlink()
    spd = spd_here(monkeypatch, capsys)
    code, _, err = spd("decompose", run / "recipe.toml", "--out", run, "--resume", "-q")
    assert code == 1
    one_line(err, f"{METRICS}: holds no record of the training", f"spd eval {run}")


@pytest.mark.parametrize("name", [DECOMPOSITION, CHECKPOINT, f"toy/{TOY_WEIGHTS}", METRICS])
@pytest.mark.parametrize("damage", ["pipe", "device", "directory"])
def test_what_is_no_file_is_never_waited_for(run, name, damage, monkeypatch, capsys):
    (run / name).unlink()
    make = {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "directory": os.mkdir}
    make[damage](run / name)
    if name == CHECKPOINT:
        run.checkpoint_before.unlink()
    spd = spd_here(monkeypatch, capsys)
    code, _, err = spd("decompose", run / "recipe.toml", "--out", run, "--resume", "-q")
    if name == DECOMPOSITION and damage != "directory":  # it is written anew
        assert (code, err) == (0, "")
    else:
        assert code == 1
        one_line(err, f"{run / name}: ")


def test_the_hint_of_a_damaged_file_is_a_way_back(run, monkeypatch, capsys):
    """What it says does what it says: no hint goes in a circle."""
    spd = spd_here(monkeypatch, capsys)
    whole = (run / DECOMPOSITION).read_bytes()
    (run / DECOMPOSITION).write_bytes(whole[:-40] + bytes(40))
    code, _, err = spd("inspect", run)
    assert code == 1
    command = err.splitlines()[-1].removeprefix("hint: spd ").split(" writes it again")[0].split()
    assert spd(*command, "-q")[0] == 0
    assert (run / DECOMPOSITION).read_bytes() == whole

    for path in (run / CHECKPOINT, run.checkpoint_before):
        path.write_bytes(path.read_bytes()[:500])
    code, _, err = spd(*command)
    assert code == 1
    one_line("".join(line for line in err.splitlines(True) if line.startswith(("error", "hint"))), "state-before")
    assert err.splitlines()[-1] == "hint: --force begins the run anew"
    assert json.loads(spd(*command[:-1], "--force", "--json")[1])["step"] == 4
