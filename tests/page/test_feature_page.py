"""The page of a toy of sparse features: its parts, beside what `spd eval` measures of them, and features for tokens."""

from __future__ import annotations

import pytest
import torch
from page_tree import Tree
from small_runs import spd_here

import spdcli
from spdcli.measures.feature_evaluation import feature_importances
from spdcli.page.assemble import run_page
from spdcli.page.features import part_tables
from spdcli.page.render import html

SECTIONS = {
    "name": "small",
    "train": {"batch": 8, "steps": 2},
    "slices": {"C": 4},
    "importance": {"kind": "vector", "gate_width": 2},
    "losses": {"recon": 1.0, "faithfulness": 1.0},
    "decompose": {"batch": 4, "steps": 2},
}
TARGETS = {"tms": {"kind": "tms"}, "resid_mlp": {"kind": "resid_mlp", "features": 30, "d_model": 40, "d_mlp": 4}}


@pytest.fixture(scope="module", params=TARGETS)
def run(request, tmp_path_factory):
    return spdcli.decompose({**SECTIONS, "target": TARGETS[request.param]}, tmp_path_factory.mktemp("run") / "run")


def test_it_is_well_formed_and_speaks_of_features(run, tmp_path) -> None:
    page = run_page(run, tmp_path)
    text = html(page)
    tree = Tree(text)
    assert (tree.wrong, tree.open) == ([], [])
    ids = {attributes["id"] for _, attributes in tree.tags if "id" in attributes}
    links = {str(one["href"])[1:] for one in tree.of("a")}
    assert links <= ids
    assert ("map" in ids) == bool(page.maps) == (len(run.explore().own.texts) <= 24)
    assert "attention" not in ids
    assert "features that drive it most" in text
    assert "spd explore" not in text
    assert page.about["target"].startswith(f"{run.recipe.target.kind}: features {len(run.explore().own.texts)}, ")
    assert page.about["losses"] == "faithfulness 1, recon 1"
    assert len(tree.of("img")) == len([*page.curves, *page.part_pictures])


def test_its_parts_are_those_that_are_measured(run) -> None:
    evaluation = run.evaluate(16)
    alone = feature_importances(run.subject, run.decomposition)
    tables = {table.title.removeprefix("The parts of "): table for table in part_tables(run)}
    live = {name for name, found in evaluation.parts.items() if found.mean_max_cosine is not None}
    assert tables.keys() == live
    for name, table in tables.items():
        found = evaluation.parts[name]
        read = run.subject.feature_toy.reads()[name]
        parts, (U, V) = read @ run.subject.target.matrices[name].weight, run.slices(name)
        assert [row[0] for row in table.rows] == [str(feature) for feature in range(len(read))]
        for feature, (_, address, cosine, ratio, importance) in enumerate(table.rows):
            c = int(address.rpartition(":")[2])
            written = (read[feature] @ U[:, c]) * V[c]
            assert float(cosine) == pytest.approx(
                torch.cosine_similarity(written, parts[feature], dim=0).item(), abs=1e-3
            )
            assert float(ratio) == pytest.approx((written.norm() / parts[feature].norm()).item(), abs=1e-3)
            assert float(importance) == pytest.approx(alone[name][feature, c].item(), abs=1e-3)
        mean = sum(float(row[2]) for row in table.rows) / len(table.rows)
        assert mean == pytest.approx(found.mean_max_cosine, abs=1e-3)


def test_the_command_writes_it(run, monkeypatch, capsys) -> None:
    spd = spd_here(monkeypatch, capsys)
    code, out, err = spd("report", run.directory)
    assert (code, out.splitlines()[-1]) == (0, f"{run.directory}/report/report.html"), err
    assert "Recovered parts" in (run.directory / "report/report.html").read_text()
    figures = {path.name for path in (run.directory / "report").glob("*.svg")}
    assert {"features.svg", "decomposition.svg"} <= figures
    code, _, err = spd("report", run.directory, "--markdown")
    assert code == 2
    assert "--markdown is about facts" in err
