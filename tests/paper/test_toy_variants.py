"""The toy's variants side by side: each is what its switches say, and measured as `spd eval` measures it."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import TOY, spd_here

from spdcli.api import load
from spdcli.paper import toy_variants


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`spd reproduce variants` on a tiny recipe, of the encodings after Q and K alone: its recipe and OUT."""
    path = tmp_path_factory.mktemp("variants")
    (path / "tiny.toml").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_variants, "POSITIONS", ("after",))
        toy_variants.toy_variants(str(path / "tiny.toml"), path / "out", sequences=40)
    return path


@pytest.fixture
def again(folder, monkeypatch, capsys):
    """The command itself, on what is there."""
    monkeypatch.setattr(toy_variants, "POSITIONS", ("after",))
    spd = spd_here(monkeypatch, capsys)
    common = ("--recipe", folder / "tiny.toml", "--out", folder / "out", "--sequences", "40")
    return lambda *arguments: spd("reproduce", "variants", *common, *arguments)


def test_every_variant_is_a_run_and_its_numbers_are_its_own(folder, again):
    out = folder / "out"
    data = json.loads((out / "reproduce.json").read_text())
    names = ["after", "after-output", "after-begin", "after-begin-output"]
    assert [row["run"].split("/")[-1] for row in data["variants"]] == names
    for name, row in zip(names, data["variants"], strict=True):
        run = load(out / name)
        shape = run.subject.toy.shape
        assert (shape.positions, shape.begin_token, shape.output_projection) == (
            "after",
            "-begin" in name,
            "-output" in name,
        )
        evaluation = json.loads((out / name / "eval.json").read_text())
        assert row["unique"] == evaluation["unique"]
        assert row["active"]["V1"] == evaluation["active"]["V1"]["m"]
        assert row["m_to_s1"] == evaluation["circuit"]["attention"]["target"]["m_to_s1"]
        largest = torch.linalg.svdvals(run.subject.toy.blocks[0].q.weight)[:4]
        assert row["singular_values"]["Q0"] == pytest.approx(largest.tolist(), rel=1e-5)
        assert ("O1" in row["unique"]) == shape.output_projection
    code, text, _ = again()  # everything is there
    assert code == 0
    assert "after, begin, output" in text


def test_what_the_variants_have_no_use_for_is_refused(again):
    for option in (("--pair", "athletes"), ("--same-toy",), ("--seeds", "2")):
        code, _, error = again(*option)
        assert code == 2
        assert "variants" in error
