"""A loss, an importance function and a benchmark of one's own are one row each: everything else picks them up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, TOY, save_toy, toy_recipe

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
OWN = {
    "losses.half_recon": "0.5",
    "importance.kind": "affine",
    "slices.init": "all_ones",
    "decompose.schedule": "steep",
    "decompose.steps": "2",
}


def with_added_rows(*commands: list[object]) -> list[tuple[int | None, str, str]]:
    """Runs `spd` once for each of `commands`, in a process whose tables have the rows of `added_rows.py`."""
    process = subprocess.run(
        [sys.executable, ROOT / "tests/added_rows.py"],
        input=json.dumps([[str(part) for part in command] for command in commands]),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | None, str, str]]:
    folder = tmp_path_factory.mktemp("added")
    recipe, run = folder / "toy.toml", folder / "run"
    toy = save_toy(folder / "trained", toy_recipe(folder=folder))
    recipe.write_text(TOY)
    settings = [part for key, value in (OWN | {"target.path": toy}).items() for part in ("--set", f"{key}={value}")]
    commands = {
        "check": ["recipe", "check", recipe, *settings],
        "misspelt": ["recipe", "check", recipe, "--set", "losses.half_recn=1", "--set", "importance.kind=affin"],
        "plan": ["plan", recipe, *settings, "--json"],
        "decompose": ["decompose", recipe, *settings, "--out", run, "-q"],
        "eval": ["eval", run, "--sequences", "8", "--json"],
        "bench": ["bench", "halves", "--rounds", "1", "--json"],
        "no bench": ["bench", "halfs"],
        "help": ["bench", "--help"],
    }
    given = dict(zip(commands, with_added_rows(*commands.values()), strict=True))
    given["metrics"] = (0, (run / "metrics.jsonl").read_text(), "")
    return given


def test_a_recipe_that_names_the_rows_is_checked(answers):
    code, out, err = answers["check"]
    assert (code, err) == (0, "")
    assert "half_recon 0.5" in out
    assert "affine" in out
    assert "start all_ones" in out


def test_a_wrong_name_still_gives_the_right_one(answers):
    code, _, err = answers["misspelt"]
    assert code == 2
    assert "[losses] unknown key 'half_recn' (did you mean 'half_recon'?)" in err
    assert "'global', 'affine' (did you mean 'affine'?)" in err
    code, _, err = answers["no bench"]
    assert code == 2
    assert "'memory', 'halves'" in err
    assert "halves: a loss of one's own" in " ".join(answers["help"][1].replace("│", " ").split())


def test_it_is_planned_and_trained(answers):
    code, out, _ = answers["plan"]
    assert code == 0
    assert json.loads(out)["fits"]
    code, _, err = answers["decompose"]
    assert code == 0, err
    last = json.loads(answers["metrics"][1].splitlines()[-1])
    assert last["step"] == 2
    assert 0 < last["losses"]["half_recon"] < 100
    assert last["rate"] == pytest.approx(0.01 / 4)  # half of the steps are done: (1 - 1/2)^2


def test_evaluation_reports_the_loss(answers):
    code, out, err = answers["eval"]
    assert code == 0, err
    report = json.loads(out)
    assert report["metrics"]["half_recon"] > 0
    assert report["standard_error"]["half_recon"] > 0
    assert list(report["metrics"])[-2:] == ["half_recon", "hidden_recon"]  # hidden ones come last


def test_benchmarks_measure_the_rows(answers):
    code, out, err = answers["bench"]
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]] == ["affine by half"]
    names = (
        "import added_rows; from spdcli.costs.cases import Options, groups_of; "
        "groups = [*groups_of('importance', Options()), *groups_of('step', Options(per_loss=True))]; "
        "print(*(case.name for group in groups for case in group.cases), sep='\\n')"
    )
    listing = subprocess.run([sys.executable, "-c", names], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert {"affine, length 64", "toy-256 all 7 plan, half_recon"} <= set(listing.stdout.splitlines())


def test_the_parametrised_tests_pick_them_up(tmp_path: Path) -> None:
    """Parity with one run a variant, padding, shares of a plan, the recipe's way to the engine, and starts."""
    files = ["engine/test_parity.py", "engine/test_variants.py", "engine/test_subcomponents.py", "runs/test_subject.py"]
    options = ["-q", "-p", "added_rows", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}"]
    paths = [f"tests/{file}" for file in files]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", "half_recon or affine or all_ones", *paths],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert "6 passed" in process.stdout, process.stdout
