"""The run directory: atomic writes, refusals, metrics cut back, checkpoints to the bit."""

from __future__ import annotations

import errno
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from small_runs import loud_toy, model_recipe, toy_recipe

from spdcli.disk import write_atomically, write_json
from spdcli.engine.fit import fit, start_fit
from spdcli.errors import SpdError, UsageError
from spdcli.files import load_tensors, save_tensors
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.directory import CHECKPOINT, HELD, METRICS, RECIPE, WRITTEN_BY_SPD, RunDirectory
from spdcli.runs.settings import fit_settings, optimiser_settings
from spdcli.runs.subject import toy_subject

A_BUG = ZeroDivisionError("a bug")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def recipe(tmp_path):
    return toy_recipe(folder=tmp_path)


@pytest.fixture
def run(tmp_path, recipe):
    return RunDirectory.create(tmp_path / "run", recipe)


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (FULL, r"file\.txt: cannot be written: No space left on device$"),
        (SafetensorError("I/O error: No room (os error 28)"), r"file\.txt: cannot be written: I/O error: No room"),
        (A_BUG, "^a bug$"),
    ],
    ids=["disk", "safetensors", "bug"],
)
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, before, raised, expected):
    path = tmp_path / "file.txt"
    if before:
        path.write_text(before)

    def write(beside: Path) -> None:
        beside.write_text("half of the n")
        raise raised

    with pytest.raises((SpdError, ZeroDivisionError), match=expected) as info:
        write_atomically(path, write)
    assert isinstance(info.value, SpdError) == (raised is not A_BUG)
    assert "\n" not in str(info.value)
    assert [file.name for file in tmp_path.iterdir()] == (["file.txt"] if before else [])
    assert not before or path.read_text() == before


def test_a_file_appears_whole_and_at_once(tmp_path):
    path = tmp_path / "new" / "file.txt"

    def write(beside: Path) -> None:
        beside.write_text("half")
        assert beside.parent.parent == path.parent  # a rename within one disk is atomic
        assert not path.exists()
        beside.write_text("half and half")

    write_atomically(path, write)
    assert path.read_text() == "half and half"
    assert list(path.parent.iterdir()) == [path]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [torch.tensor(2.0), float("-inf")], "c": Path("x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [2.0, None], "c": "x"}


def test_tensors_come_back_bit_for_bit(tmp_path):
    wide = torch.randn(4, 6, dtype=torch.float64)
    kept = {"a.b/c": wide.t(), "count": torch.tensor(3), "state": torch.Generator().manual_seed(1).get_state()}
    save_tensors(tmp_path / "t.safetensors", kept, {"step": "7"})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"step": "7"}
    assert loaded.keys() == kept.keys()
    for name, tensor in kept.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("cut", [None, 0, 100])
def test_a_missing_or_damaged_file_is_one_line(tmp_path, cut):
    path = tmp_path / "t.safetensors"
    if cut is not None:
        save_tensors(path, {"a": torch.randn(100)})
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SpdError, match="no such file" if cut is None else "damaged") as info:
        load_tensors(path)
    assert "\n" not in info.value.message
    assert str(path) in info.value.message


# --- the directory ---------------------------------------------------------------------------------


def test_a_run_holds_its_resolved_recipe_with_versions(tmp_path):
    recipe = toy_recipe("losses.minimality=0.7", "seed=11", folder=tmp_path)
    run = RunDirectory.create(tmp_path / "deep" / "run", recipe)
    assert RunDirectory.open(run.path).recipe == recipe
    text = (run / RECIPE).read_text()
    assert f"# torch: {torch.__version__}\n" in text
    assert 'schedule = "constant"' in text  # a default, written out


def test_local_files_of_a_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("broad")
    Path("generated").write_text("a file by the name of what is no file")
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    for stream, kept in (("text.txt", str(tmp_path / "text.txt")), ("generated", "generated"), ("nowhere", "nowhere")):
        recipe = model_recipe(Path("model"), f"data.stream={stream}", folder=tmp_path)
        kept_recipe = RunDirectory.create(tmp_path / "runs" / stream, recipe).recipe
        assert kept_recipe.data.stream == kept
        assert kept_recipe.target.model == str(tmp_path / "model")
        assert kept_recipe.data.prompts == recipe.data.prompts


def fill(path: Path, names: list[str]) -> None:
    """Files, and directories where a name has no ending, with something in them."""
    path.mkdir(exist_ok=True)
    for name in names:
        if "." in name:
            (path / name).write_text(f"{WRITTEN_BY_SPD}0.0\nold" if name == RECIPE else "old")
        else:
            (path / name / "inner").mkdir(parents=True)


BEYOND_RECIPE = [name for name in HELD if name != RECIPE]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(
    ("names", "force"), [([], False), ([RECIPE], True), *(([RECIPE, name], True) for name in BEYOND_RECIPE)]
)
def test_a_new_run_replaces(tmp_path, recipe, names, force, link):
    """An empty directory, and with `force` any run."""
    place = path = tmp_path / "place"
    fill(path, names)
    if link:
        place = tmp_path / "link"
        place.symlink_to(path)
    assert RunDirectory.create(place, recipe, force).recipe == recipe
    assert [file.name for file in path.iterdir()] == [RECIPE]
    assert place.is_symlink() == link


@pytest.mark.parametrize(
    ("names", "force", "said"),
    [
        *(([RECIPE, name], False, "holds another run") for name in BEYOND_RECIPE),
        ([RECIPE], False, "holds another run"),
        (["thesis.tex"], False, "is not empty and holds no run"),
        (["thesis.tex"], True, "is not empty and holds no run"),
        (["toy"], True, "is not empty and holds no run"),
    ],
)
def test_a_new_run_refuses(tmp_path, recipe, names, force, said):
    path = tmp_path / "place"
    fill(path, names)
    with pytest.raises(UsageError, match=said):
        RunDirectory.create(path, recipe, force)
    assert sorted(file.name for file in path.iterdir()) == sorted(names)
    assert all((path / name).read_text().endswith("old") for name in names if "." in name)


def test_a_file_is_no_place_for_a_run(tmp_path, recipe):
    (tmp_path / "place").write_text("old")
    with pytest.raises(UsageError, match="place is a file"):
        RunDirectory.create(tmp_path / "place", recipe, force=True)
    assert (tmp_path / "place").read_text() == "old"


def test_force_leaves_files_of_others_alone(tmp_path, recipe):
    fill(tmp_path / "place", [*HELD, "thesis.tex"])
    RunDirectory.create(tmp_path / "place", recipe, force=True)
    assert sorted(file.name for file in (tmp_path / "place").iterdir()) == [RECIPE, "thesis.tex"]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_there_is_no_run_where_there_is_no_recipe(tmp_path, name):
    with pytest.raises(SpdError, match="no run here") as info:
        RunDirectory.open(tmp_path / name)
    assert info.value.exit_code == 2


# --- metrics ---------------------------------------------------------------------------------------


def records(*steps: int) -> list[dict[str, int]]:
    return [{"step": step, "loss": step * 10} for step in steps]


def test_metrics_are_appended_and_cut_back_to_a_step(run):
    assert run.metrics() == []
    run.start_metrics()
    for record in records(1, 2, 4, 6):
        run.add_metrics(record)
    assert run.metrics() == records(1, 2, 4, 6)
    run.start_metrics(after=4)
    assert run.metrics() == records(1, 2, 4)
    run.add_metrics({"step": 5, "loss": float("nan")})
    assert run.metrics()[-1] == {"step": 5, "loss": None}
    run.start_metrics()
    assert run.metrics() == []


@pytest.mark.parametrize("cut", [1, 2, 10, 20])
def test_a_line_that_a_crash_cut_short_costs_no_other(run, cut):
    """One byte missing is the newline alone: the record is whole, and the next must not be glued to it."""
    for record in records(1, 2, 3):
        run.add_metrics(record)
    path = run / METRICS
    path.write_bytes(path.read_bytes()[:-cut])
    whole = records(1, 2, 3) if cut == 1 else records(1, 2)
    assert run.metrics() == whole
    run.start_metrics(after=9)
    run.add_metrics(records(4)[0])
    assert run.metrics() == [*whole, *records(4)]


def test_a_full_disk_stops_the_metrics_in_one_line(run, monkeypatch):
    def refuse(path: Path, flags: int, mode: int) -> None:
        raise FULL

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(SpdError, match=r"metrics\.jsonl: cannot be written: No space left on device") as info:
        run.add_metrics({"step": 1})
    assert "\n" not in info.value.message


# --- checkpoints -----------------------------------------------------------------------------------


def started(recipe, seed=0):
    """Target, batches, a decomposition at step 0 and the state of its training."""
    subject = toy_subject(recipe, loud_toy(recipe))
    decomposition = start_decomposition(recipe, subject, list(subject.target.matrices))
    state = start_fit(decomposition, optimiser_settings(recipe.decompose), seed, subject.target.device)
    return subject, decomposition, state


def learn(recipe, subject, decomposition, state, steps):
    for _ in islice(fit(subject.target, decomposition, subject.batches, state, fit_settings(recipe)), steps):
        pass


def everything(decomposition, state):
    """All numbers that decide how training goes on."""
    numbers = {f"parameters {name}": tensor for name, tensor in decomposition.state_dict().items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        numbers |= {f"optimizer {index} {name}": torch.as_tensor(value) for name, value in moments.items()}
    numbers |= {f"generator {name}": generator.get_state() for name, generator in state.generators.items()}
    numbers |= {f"adversary {name}": tensor for name, tensor in state.adversary.items()}
    return {name: tensor.clone() for name, tensor in numbers.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, optimizer):
    recipe = toy_recipe(f"decompose.optimizer={optimizer}", "decompose.weight_decay=0.1", folder=tmp_path)
    run = RunDirectory.create(tmp_path / "run", recipe)
    subject, decomposition, state = started(recipe)
    learn(recipe, subject, decomposition, state, 3)
    run.save_checkpoint(decomposition, state)
    then = everything(decomposition, state)
    kinds = {name.rsplit(" ", 1)[-1] for name in then if name.startswith("optimizer")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}

    _, other, fresh = started(recipe, seed=99)
    assert not same(everything(other, fresh), then)
    run.load_checkpoint(other, fresh)
    assert same(everything(other, fresh), then)
    assert (fresh.step, fresh.seconds) == (3, state.seconds)

    learn(recipe, subject, decomposition, state, 2)
    learn(recipe, subject, other, fresh, 2)
    assert fresh.step == 5
    assert same(everything(other, fresh), everything(decomposition, state))
    assert not same(everything(other, fresh), then)


def test_an_adversary_goes_on_where_it_stopped(tmp_path):
    settings = ("losses.adversarial_recon=1", "losses.adversarial_recon_partial=1", "adversary.masks=persistent")
    recipe = toy_recipe(*settings, "slices.delta=true", folder=tmp_path)
    run = RunDirectory.create(tmp_path / "run", recipe)
    subject, decomposition, state = started(recipe)
    learn(recipe, subject, decomposition, state, 3)
    run.save_checkpoint(decomposition, state)
    then = everything(decomposition, state)
    assert sum(name.startswith("adversary adversarial_recon.") for name in then) == 2 * len(decomposition.names)
    _, other, fresh = started(recipe, seed=99)
    run.load_checkpoint(other, fresh)
    assert same(everything(other, fresh), then)
    learn(recipe, subject, decomposition, state, 2)
    learn(recipe, subject, other, fresh, 2)
    assert same(everything(other, fresh), everything(decomposition, state))
    assert any(not torch.equal(fresh.adversary[n.split(" ")[1]], then[n]) for n in then if n.startswith("adversary"))


def test_a_checkpoint_of_another_kind_of_device_goes_on_with_fresh_noise(recipe, run):
    """A CUDA generator's state is 16 bytes, a CPU's some thousand."""
    subject, decomposition, state = started(recipe)
    learn(recipe, subject, decomposition, state, 2)
    run.save_checkpoint(decomposition, state)
    tensors, metadata = load_tensors(run / CHECKPOINT)
    save_tensors(run / CHECKPOINT, tensors | {"generator.noise": torch.zeros(16, dtype=torch.uint8)}, metadata)
    _, other, fresh = started(recipe, seed=99)
    noise = fresh.generators["noise"].get_state()
    run.load_checkpoint(other, fresh)
    assert torch.equal(fresh.generators["noise"].get_state(), noise)
    assert torch.equal(fresh.generators["data"].get_state(), state.generators["data"].get_state())
    assert fresh.step == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, recipe, run, monkeypatch):
    subject, decomposition, state = started(recipe)
    learn(recipe, subject, decomposition, state, 1)
    run.save_checkpoint(decomposition, state)
    saved = (run / CHECKPOINT).read_bytes()

    def refuse(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise FULL

    monkeypatch.setattr("spdcli.files.save_file", refuse)
    learn(recipe, subject, decomposition, state, 1)
    with pytest.raises(SpdError, match=r"state\.safetensors: cannot be written: No space left on device"):
        run.save_checkpoint(decomposition, state)
    assert (run / CHECKPOINT).read_bytes() == saved
    assert len(list((run / CHECKPOINT).parent.iterdir())) == 1


def flip(path: Path) -> None:
    """Damage one bit of a file's last numbers."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def saved_twice(recipe, run):
    """The state at steps 1 and 2, each in a checkpoint."""
    subject, decomposition, state = started(recipe)
    states = []
    for _ in range(2):
        learn(recipe, subject, decomposition, state, 1)
        run.save_checkpoint(decomposition, state)
        states.append(everything(decomposition, state))
    return states


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["damaged", "missing"])
def test_a_bad_checkpoint_falls_back_to_the_one_before(recipe, run, damage):
    first, second = saved_twice(recipe, run)
    _, other, fresh = started(recipe, seed=99)
    RunDirectory(run.path).load_checkpoint(other, fresh)
    assert same(everything(other, fresh), second)

    damage(run / CHECKPOINT)
    told = []
    resumed = RunDirectory(run.path)
    assert resumed.has_checkpoint
    resumed.load_checkpoint(other, fresh, told.append)
    assert fresh.step == 1
    assert same(everything(other, fresh), first)
    (warning,) = told
    assert warning.warning
    assert str(run / CHECKPOINT) in warning.text

    # The one before is not lost to the bad one when the next is saved.
    fresh.step = 5
    resumed.save_checkpoint(other, fresh)
    damage(run / CHECKPOINT)
    RunDirectory(run.path).load_checkpoint(other, fresh)
    assert fresh.step == 1


def test_two_bad_checkpoints_are_one_line(recipe, run):
    saved_twice(recipe, run)
    for path in (run / CHECKPOINT, run.checkpoint_before):
        flip(path)
    _, other, fresh = started(recipe)
    with pytest.raises(SpdError, match=r"state-before\.safetensors: damaged"):
        run.load_checkpoint(other, fresh)


def test_a_checkpoint_of_the_same_step_does_not_push_out_the_one_before(recipe, run):
    first, _ = saved_twice(recipe, run)
    resumed = RunDirectory(run.path)
    _, other, fresh = started(recipe)
    resumed.load_checkpoint(other, fresh)
    resumed.save_checkpoint(other, fresh)
    flip(run / CHECKPOINT)
    resumed = RunDirectory(run.path)
    resumed.load_checkpoint(other, fresh)
    assert same(everything(other, fresh), first)


def test_a_checkpoint_of_something_else_is_one_line(tmp_path, recipe, run):
    saved_twice(recipe, run)
    other_recipe = toy_recipe("slices.C=4", folder=tmp_path)
    _, other, fresh = started(other_recipe)
    run.checkpoint_before.unlink()
    with pytest.raises(SpdError, match=r"state\.safetensors: '.*' has the shape \[.*5\], not \[.*4\]$"):
        run.load_checkpoint(other, fresh)


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(recipe, run, monkeypatch):
    synced = []
    monkeypatch.setattr("spdcli.runs.directory.sync", lambda path: synced.append((path.name, run.has_checkpoint)))
    run.add_metrics({"step": 1})
    _, decomposition, state = started(recipe)
    run.save_checkpoint(decomposition, state)
    assert synced == [(METRICS, False)]


def test_a_directory_that_is_removed_under_its_run_is_not_made_again(recipe, run):
    _, decomposition, state = started(recipe)
    for file in run.path.iterdir():
        file.unlink()
    run.path.rmdir()
    for write in (lambda: run.add_metrics({"step": 1}), lambda: run.save(decomposition, state)):
        with pytest.raises(SpdError, match="run: was removed while the run went on"):
            write()
    assert not run.path.exists()
