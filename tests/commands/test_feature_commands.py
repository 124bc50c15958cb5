"""Every command on toys of sparse features: what makes sense works, what does not is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import Spd, one_line, spd_here

import spdcli
from spdcli.errors import UsageError

RECIPE = """\
name = "small"
seed = 4
device = "cpu"

[target]
kind = "KIND"
features = 4

[train]
batch = 32
steps = 60
optimizer = "adamw"
learning_rate = 0.02
log_every = 20

[slices]
C = 6
delta = true

[importance]
kind = "scalar"
gate_width = 3

[losses]
stochastic_recon = 1
stochastic_recon_layerwise = 1
faithfulness = 1
minimality = 0.001

[decompose]
batch = 16
steps = 6
log_every = 3
"""
SIZES = {
    "tms": "hidden = 3\nidentity = true",
    "resid_mlp": "d_model = 8\nd_mlp = 3\nlayers = 2\nfeature_probability = 0.2",
}
MATRICES = {"tms": ["W", "I", "WT"], "resid_mlp": ["W_in0", "W_out0", "W_in1", "W_out1"]}
READ = {"tms": ["W"], "resid_mlp": ["W_in0", "W_in1"]}


@pytest.fixture(scope="module", params=["tms", "resid_mlp"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small toy, decomposed for a few steps."""
    folder = tmp_path_factory.mktemp(request.param)
    text = RECIPE.replace("KIND", request.param).replace("features = 4", f"features = 4\n{SIZES[request.param]}")
    (folder / "small.toml").write_text(text)
    spdcli.decompose(folder / "small.toml", out=folder / "run")
    return folder / "run"


@pytest.fixture
def spd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spd:
    return spd_here(monkeypatch, capsys)


def kind_of(run: Path) -> str:
    return spdcli.load(run).recipe.target.kind


def answer(spd: Spd, *arguments: object) -> dict:
    code, out, err = spd(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_toy_lies_in_the_run_and_can_be_decomposed_again(run: Path, spd: Spd, tmp_path: Path) -> None:
    again = ["decompose", run / "recipe.toml", "--out", tmp_path / "again", "--set", f"target.path={run}"]
    assert answer(spd, *again)["step"] == 6
    first, second = (spdcli.load(path) for path in (run, tmp_path / "again"))
    for name in first.matrices:
        assert torch.equal(first.slices(name)[0], second.slices(name)[0]), "the same toy, data and noise"
    trained = answer(spd, "train", run / "recipe.toml", "--out", tmp_path / "toy")
    assert (trained["accuracy"], trained["steps"]) == (None, 60)
    assert 0 < trained["error"] < 1
    assert (tmp_path / "toy/figures/training.png").exists()


def test_plan_counts_and_times_a_step(run: Path, spd: Spd) -> None:
    costs = answer(spd, "plan", run / "recipe.toml")
    matrices = [spdcli.load(run).subject.target.matrices[name] for name in MATRICES[kind_of(run)]]
    assert costs["parameters"]["slices"] == 6 * sum(matrix.d_in + matrix.d_out for matrix in matrices)
    assert costs["fits"]
    assert costs["toy_steps"] == 60
    assert costs["seconds_per_step"] > 0


def test_eval_tells_of_parts(run: Path, spd: Spd) -> None:
    data = answer(spd, "eval", run, "--sequences", 40)
    kind = kind_of(run)
    assert (data["schema"], data["target"], data["output_loss"]) == ("spd.eval/2", kind, "mse")
    assert list(data["live"]) == list(data["active"]) == list(data["unique"]) == MATRICES[kind]
    assert list(data["parts"]) == READ[kind]
    assert (run / "figures/features.png").exists()
    assert data["error"]["target"] > 0
    loaded = spdcli.load(run)
    by_hand = loaded.importances(0.75 * torch.eye(4))
    assert data["live"] == {name: int((g > 0.1).any(0).any(0).sum()) for name, g in by_hand.items()}
    assert data["active"][READ[kind][0]]["single"] == pytest.approx((by_hand[READ[kind][0]] > 0).sum().item() / 4)


def test_recon_is_the_squared_error_of_the_masked_toy(run: Path) -> None:
    """The reported loss against the module itself, masked by its importances, on the same inputs."""
    loaded = spdcli.load(run)
    evaluation = loaded.evaluate(64)
    assert loaded.subject.draw is not None
    from spdcli.measures.evaluation_data import evaluation_batches

    (batch,) = evaluation_batches(loaded.subject, 64, loaded.recipe.seed)
    plain = loaded.model(batch.tokens)
    with loaded.masked(active=True) as masked:
        changed = masked(batch.tokens)
    expected = (changed - plain).square().mean().item()
    assert evaluation.metrics["recon"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_inspect_shows_a_feature(run: Path, spd: Spd) -> None:
    data = answer(spd, "inspect", run, "--token", "2")
    (place,) = data["occurrences"]
    assert (place["text"], place["position"]) == ("2:0.75", 0)
    slices = spdcli.load(run).slices
    assert place["slices"]
    for one in place["slices"]:
        name, _, c = one["slice"].rpartition(":")
        assert sorted(one["reads"]) == sorted(one["promotes"]) == ["0", "1", "2", "3"]
        if name == "W":
            assert one["activation"] == pytest.approx(0.75 * slices(name)[0][2, int(c)].item(), abs=1e-5)
    own = answer(spd, "inspect", run, "--prompt", "0 3:-0.5")
    assert own["occurrences"][0]["token"] == "0:0.75 3:-0.5"
    assert answer(spd, "inspect", run, "--prompt", "3")["occurrences"][0]["text"] == "2:0.75"  # the third one
    one_line(spd("inspect", run, "--prompt", "9")[2], "prompt 9: expected one of the run's prompts, 1 to 4")
    one_line(spd("inspect", run, "--prompt", "=9")[2], "no feature '9'", "the features are 0 to 3")


def test_ablate_takes_a_slice_from_every_feature(run: Path, spd: Spd) -> None:
    name = MATRICES[kind_of(run)][0]
    data = answer(spd, "ablate", run, "--slice", f"{name}:1")
    assert data["schema"] == "spd.ablate.features/1"
    loaded = spdcli.load(run)
    mask = torch.ones(6)
    mask[1] = 0
    inputs = 0.75 * torch.eye(4)[:, None]
    before = loaded.model(inputs)[:, 0]
    with loaded.masked({name: mask}, delta=1) as model:
        after = model(inputs)[:, 0]
    for one in data["effects"]:
        f = one["feature"]
        change = (after - before)[f].abs()
        others = torch.cat([change[:f], change[f + 1 :]])
        assert one["before"] == pytest.approx(before[f, f].item(), abs=1e-5)
        assert one["after"] == pytest.approx(after[f, f].item(), abs=1e-5)
        assert one["another"] == pytest.approx(others.max().item(), abs=1e-5)
        assert one["squared"] == pytest.approx(change.square().mean().item(), abs=1e-6)
    squares = [one["squared"] for one in data["effects"]]
    assert squares == sorted(squares, reverse=True)
    assert squares[0] > 0
    assert data["reconstruction"] == pytest.approx(0, abs=1e-10)  # all on, and the delta: the toy itself


def test_ablate_takes_a_whole_matrix(run: Path, spd: Spd) -> None:
    name = MATRICES[kind_of(run)][-1]
    lost = answer(spd, "ablate", run, "--matrix", name)
    loaded = spdcli.load(run)
    inputs = 0.75 * torch.eye(4)[:, None]
    module = loaded.subject.target.matrices[name].module
    after = loaded.model(inputs)[:, 0].diagonal()
    module.weight.data.zero_()
    zero = loaded.model(inputs)[:, 0].diagonal()
    assert not torch.allclose(after, zero)
    assert {one["feature"]: one["after"] for one in lost["effects"]} == pytest.approx(
        dict(enumerate(zero.tolist())), abs=1e-5
    )
    one_line(spd("ablate", run, "--matrix", name, "--prompt", "1")[2], "every feature is looked at")


def test_svd_compares_by_squared_error(run: Path, spd: Spd) -> None:
    data = answer(spd, "svd", run, "--sequences", 20)
    assert data["output_loss"] == "mse"
    full = data["curves"]["greedy_svd"][0]
    assert full["kl"] == pytest.approx(0, abs=1e-10)
    assert "squared error" in spd("svd", run, "--sequences", 20)[1]


def test_explore_prints_the_map_and_what_becomes_of_the_outputs(run: Path, spd: Spd) -> None:
    name = MATRICES[kind_of(run)][0]
    data = answer(spd, "explore", run, "--prompt", "3", "--slice", f"{name}:0")
    assert (data["inputs"], list(data["importance"])) == (list("0123"), MATRICES[kind_of(run)])
    assert (data["output"]["input"], data["output"]["off"]) == ("2", [f"{name}:0"])
    assert len(data["output"]["outputs"]) == 4


@pytest.mark.parametrize(
    "command",
    [
        ("suppress", "RUN", "--slice", "W:0"),
        ("suppress", "RUN", "--slice", "W_in0:0"),
        ("locate", "RUN"),
        ("trace", "RUN"),
        ("facts", "check", "--model", "RUN"),
    ],
)
def test_what_makes_no_sense_is_one_line(command: tuple[str, ...], run: Path, spd: Spd) -> None:
    if command[-1].partition(":")[0] not in (MATRICES[kind_of(run)][0], command[-1]):
        return
    code, _, err = spd(*(str(run) if word == "RUN" else word for word in command))
    assert code == 2
    one_line(err)


def test_python_says_the_same() -> None:
    sections = {
        "name": "small",
        "target": {"kind": "tms"},
        "train": {"batch": 8, "steps": 2},
        "slices": {"C": 4},
        "importance": {"kind": "vector", "gate_width": 2},
        "losses": {"recon": 1.0, "faithfulness": 1.0},
        "decompose": {"batch": 4, "steps": 2},
    }
    run = spdcli.decompose(sections)
    assert run.importances("3 1:0.2")["W"].shape == (1, 4)
    assert run.importances(torch.zeros(3, 5))["WT"].shape == (3, 1, 4)
    assert run.ablate(["W:0"]).effects[0].squared > 0
    for wrong, words in ((torch.zeros(4), "values of shape"), ([[1.0, "a"]], "no values of features")):
        with pytest.raises(UsageError, match=words):
            run.importances(wrong)  # type: ignore[arg-type]
    for call in (lambda: run.suppression(["W:0"]), lambda: run.trace(), lambda: run.tokens("3"), lambda: run.locate()):
        with pytest.raises(UsageError, match="a toy of sparse features has no tokens"):
            call()
