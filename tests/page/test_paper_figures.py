"""The paper's figures by their numbers: of which run each is drawn, and what is said where it is not."""

from __future__ import annotations

import pytest

import spdcli
from spdcli.edits.facts_file import load_facts
from spdcli.figures.table import FIGURES
from spdcli.page.paper_figures import DRAWN, draw_figure


def test_every_figure_that_is_a_drawing_has_a_function():
    assert set(DRAWN) == {figure.number for figure in FIGURES if figure.drawn_by}


@pytest.mark.parametrize(("number", "names"), [(1, ["sequence"]), (2, ["svd"])])
def test_figures_of_the_toy(toy_page, tmp_path, number, names):
    paths = draw_figure(toy_page[0], number, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize(("number", "name"), [(8, "trace-2"), (9, "mlp-zeroed")])
def test_figures_of_a_language_model(language_page, tmp_path, number, name):
    paths = draw_figure(language_page[0], number, tmp_path)
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]


@pytest.mark.parametrize("number", [3, 4])
def test_without_slices_by_rule_there_is_nothing_to_draw(language_page, tmp_path, number):
    run, page, path = language_page
    assert all("none was found" in fact.about[1] for fact in page.facts)
    with pytest.raises(spdcli.UsageError, match="finds no slice"):
        draw_figure(run, number, tmp_path, load_facts(path.parent / "facts.toml"))


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "no Figure 0"), (6, "no drawing"), (10, "no drawing"), (7, "of a language model"), (5, "no record of one")],
)
def test_what_cannot_be_drawn_is_told(toy_page, tmp_path, number, said):
    with pytest.raises(spdcli.UsageError, match=said):
        draw_figure(toy_page[0], number, tmp_path)


def test_figure_1_is_the_toys(language_page, tmp_path):
    with pytest.raises(spdcli.UsageError, match="of the induction toy"):
        draw_figure(language_page[0], 1, tmp_path)
