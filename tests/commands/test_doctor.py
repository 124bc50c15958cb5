"""`spd doctor`: what is installed and at hand, by packages and caches made for the test."""

from __future__ import annotations

import json

import pytest
from small_runs import one_line, spd_here

from spdcli.costs import doctor
from spdcli.recipe.reading import shipped


@pytest.fixture
def spd(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "PRODUCTS", 1)
    return spd_here(monkeypatch, capsys)


def test_what_is_here(spd, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "models_at_hand", lambda: ["someone/model"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("name = 'mine'")
    code, out, _ = spd("doctor", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["packages"]["torch"].startswith("2.")
    assert {extra["name"] for extra in data["extras"]} >= {"gguf", "dev"}
    assert data["flops"] > 1e7
    assert data["runs"] == ["mine"]
    assert data["next"] == "spd inspect mine"
    assert "smollm2" not in data["recipes"]
    assert "induction-quick" in data["recipes"]
    table = spd("doctor")[1]
    assert "someone/model" in table
    assert table.splitlines()[-1] == "spd inspect mine"


def test_a_package_that_is_missing_is_told(spd, monkeypatch):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "scipy" else real(name))
    code, out, err = spd("doctor")
    assert code == 1
    assert "scipy MISSING" in out
    one_line(err, "not installed: scipy", "pip install scipy")


def test_models_of_packages_and_of_the_hubs_cache(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    refs = tmp_path / "models--someone--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    scan = doctor.scan_cache_dir
    monkeypatch.setattr(doctor, "scan_cache_dir", lambda: scan(tmp_path))
    assert list(doctor.cached_models()) == ["someone/model"]
    monkeypatch.setattr(doctor, "scan_cache_dir", lambda: scan(tmp_path / "none"))
    assert list(doctor.cached_models()) == []


def test_the_next_command_is_a_recipe_that_runs_here():
    assert doctor.next_command(["smollm2"], []) == "spd decompose smollm2 --out run"
    assert doctor.next_command([], []) == "spd decompose induction-quick --out run"
    assert {"smollm2", "induction-quick"} <= set(shipped())
