"""The tables: every row's code is there, every loss is a cell of the grid, and nothing of it imports torch."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature

import pytest

from spdcli.engine import loss_choices, masks, tables, variants
from spdcli.engine.gates import Activation
from spdcli.engine.tables import LOSSES, SCOPES, SOURCES, Choice, losses_where

TABLES = {
    name: table
    for module in (tables, loss_choices)
    for name, table in vars(module).items()
    if name.isupper() and name != "LOSSES"
}
CODED = [(name, key) for name, table in TABLES.items() for key, row in table.items() if row.code]


@pytest.mark.parametrize("name", TABLES)
def test_every_choice_says_what_it_means(name):
    for row in TABLES[name].values():
        assert isinstance(row, Choice)
        assert row.about
        assert not row.about.endswith(".")


@pytest.mark.parametrize(("name", "key"), CODED)
def test_the_code_of_every_row_is_there(name, key):
    code = TABLES[name][key].load()
    assert callable(code) or isinstance(code, Activation)
    assert code.__doc__


def test_sources_and_scopes_are_called_alike():
    scopes = [scope.load() for scope in SCOPES.values()]
    assert all(list(signature(scope).parameters) == ["names", "drawing"] for scope in scopes)
    sources = [source.load() for source in SOURCES.values() if source.code]
    wanted = list(signature(masks.unmoved).parameters)
    assert all(list(signature(source).parameters) == wanted for source in sources)
    assert scopes[:3] == [variants.all_matrices, variants.each_alone, variants.random_subset]


def test_losses_are_cells_of_the_grid_or_of_another_kind():
    cells = [(loss.source, loss.scope) for loss in LOSSES.values() if loss.of_outputs]
    papers = [(source, scope) for source in ("importance", "stochastic") for scope in ("all", "each", "subset")]
    assert set(papers) <= set(cells)
    assert len(set(cells)) == len(cells)
    assert {"faithfulness", "minimality", "attention"} <= set(losses_where(lambda loss: not loss.in_grid))
    for name, loss in LOSSES.items():
        assert name == loss.name
        assert loss.equation
        assert (loss.source is None) == (loss.scope is None)
        assert loss.source is None or (loss.source in SOURCES and loss.scope in SCOPES)
        assert loss.of_outputs or not loss.attended
        if loss.hidden_of is not None:
            beside = LOSSES[loss.hidden_of]
            assert (loss.source, loss.scope, beside.hidden_of) == (beside.source, beside.scope, None)
            assert "KL" not in loss.about


def test_the_tables_import_no_torch():
    code = "import sys, spdcli.engine.tables, spdcli.costs.cases; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
