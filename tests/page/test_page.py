"""The page of a run as a file: what stands in it, that it needs nothing else, that it is well formed and escaped."""

from __future__ import annotations

import re

import pytest
import torch
from page_tree import Tree

from spdcli.engine.tables import GRADES
from spdcli.figures.attention import mosaic
from spdcli.page.content import Table, evidence, token_map
from spdcli.page.render import word_columns
from spdcli.page.slices import slice_entries


@pytest.fixture(params=["toy_page", "language_page"])
def written(request):
    run, page, path = request.getfixturevalue(request.param)
    text = path.read_text(encoding="utf-8")
    return run, page, text, Tree(text)


def test_it_is_well_formed_and_needs_nothing_else(written):
    _, _, text, tree = written
    assert (tree.wrong, tree.open) == ([], [])
    addresses = [value for _, attributes in tree.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link", text)
    assert any("default-src 'none'" in (one.get("content") or "") for one in tree.of("meta"))
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address.startswith("#")} <= set(ids)
    assert len(text) < 4e6


def test_who_cannot_see_it_is_told(written):
    _, page, _, tree = written
    assert all(len(one["alt"] or "") > 30 for one in tree.of("img"))
    assert len(tree.of("img")) == len([*page.curves, *page.patterns, *page.fact_pictures]) + sum(
        len(fact.pictures) for fact in page.facts
    )
    controls = [one["aria-controls"] for one in tree.of("button") if "aria-controls" in one]
    assert len(controls) == len(page.slices) > 0
    assert {one["for"] for one in tree.of("label")} == {one["id"] for one in tree.of("input")}
    assert len(tree.of("main")) == len(tree.of("h1")) == 1
    assert tree.of("html") == [{"lang": "en"}]


def test_its_slices_are_those_of_inspect(written):
    run, page, _, _ = written
    by_slice = {}
    for place in run.inspect(top=10_000, labels=6).occurrences:
        for one in place.slices:
            by_slice.setdefault(one.slice, []).append((one.importance, place.number, one.reads, one.promotes))
    assert page.active == len(page.slices) == len(by_slice)
    assert [one.importance for one in page.slices] == sorted((one.importance for one in page.slices), reverse=True)
    for entry in page.slices:
        active = by_slice[entry.address]
        strongest = max(active, key=lambda one: one[0])
        assert entry.importance == pytest.approx(strongest[0])
        assert (entry.positions, entry.prompts) == (len(active), len({prompt for _, prompt, _, _ in active}))
        assert (list(entry.reads), list(entry.promotes)) in [
            (list(reads), list(promotes)) for g, _, reads, promotes in active if g == pytest.approx(strongest[0])
        ]
        assert entry.places[0].importance == pytest.approx(strongest[0])
    few, active = slice_entries(run.explore(), 2)
    assert (len(few), active) == (2, page.active)


def test_its_maps_are_sums_of_importances(written):
    run, page, _, _ = written
    view = run.explore().prompt(1)
    shown = page.maps[0]
    for name, cells in shown.rows:
        heat = view.heat[view.matrices.index(name)]
        assert [value for value, _ in cells] == pytest.approx([heat[at].item() for at in shown.positions])
        assert all(0 <= share <= 1 for _, share in cells)
    assert [view.pieces[at] for at in shown.positions] == list(shown.tokens)


def test_a_toy_has_its_table_and_no_facts(toy_page):
    run, page, path = toy_page
    table, losses = page.measured
    assert [row[0] for row in table.rows] == ["Q0", "K0", "V0", "Q1", "K1", "V1"]
    active = run.evaluate(512, adversary="none").active["Q0"]
    assert table.rows[0][1].split()[0] == f"{active['s1']:.3f}"
    assert losses.rows
    assert "(weakest)" in page.evidence[0].rows[0][1]
    assert page.facts == []
    text = path.read_text(encoding="utf-8")
    assert "<i>run" not in text
    assert "&lt;i&gt;run" in text


def test_a_language_model_has_its_facts(language_page):
    _, page, path = language_page
    text = path.read_text(encoding="utf-8")
    assert [fact.title for fact in page.facts] == [
        "Kobe Bryant plays professional basketball",
        "Tiger Woods plays the sport of golf",
    ]
    cuts, sought, leaks = page.facts[0].tables
    assert any("tracing" in row[0] for row in cuts.rows)
    assert all("optimised" in row[0] for row in sought.rows)
    assert leaks.rows[0][:2] == ["the professional Bryant plays basketball", "paraphrase"]
    assert page.measured[0].rows == [["recon", "1.25e-01", "exact"], ["stochastic_recon", "not finite", "exact"]]
    assert any("Not evidence." in kind and "*" not in kind for kind in page.kinds)
    for fact in page.facts:
        for table in fact.tables:
            assert table.rows[0][1] in text


def test_it_is_written_from_python_too(toy_page, tmp_path):
    run, page, _ = toy_page
    path = run.save_page(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert page.slices[0].address in path.read_text(encoding="utf-8")
    assert {one.name for one in path.parent.iterdir()} >= {"decomposition.png", "patterns.svg"}


def test_evidence_of_a_search_is_adversarial():
    graded = {"importance": 0.5, "grades": {"importance": "importance"}, "accuracy": {}}
    said = graded | {"pgd_shared": {"kl": 2, "accuracy": 0.25}}
    (table,) = evidence({"evidence": said})
    assert [row[1:] for row in table.rows] == [
        [GRADES["importance"].label, "0.5", ""],
        [GRADES["adversarial"].label, "2", "25.00%"],
    ]
    assert evidence({}) == []


def test_long_texts_show_the_tokens_at_which_something_is_active(toy_page, monkeypatch):
    view = toy_page[0].explore().prompt(1)
    monkeypatch.setattr("spdcli.page.content.WIDE", 3)
    view.heat[:, 2:5] = 0
    shown = token_map(view, "text")
    assert list(shown.positions) == [at for at in range(len(view.pieces)) if view.heat[:, at].any()]
    assert not {2, 3, 4} & set(shown.positions)


def test_words_stand_on_the_left_and_numbers_on_the_right():
    rows = [["recon", "random masks", "1.5", "exact"], ["hidden", "", "", "-0.5"]]
    assert word_columns(Table("Losses", ["loss", "evidence", "value", "error"], rows)) == [True, True, False, False]
    assert word_columns(Table("Nothing", ["a", "b"], [])) == [True, True]


def test_a_mosaic_has_a_tile_a_head():
    patterns = [torch.full((2, 3, 4, 4), 0.5).log(), torch.full((2, 3, 4, 4), 0.25).log()]
    tiles = mosaic(patterns)
    assert tiles.shape == (2 * 5 - 1, 3 * 5 - 1)
    assert torch.equal(tiles[:4, :4], torch.full((4, 4), 0.5))
    assert torch.equal(tiles[5:, 10:], torch.full((4, 4), 0.25))
    assert not (tiles[4] == 0.5).any()
