"""Models by name: a run of something that is no language model says what it is a run of."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdcli.api import recipe_of
from spdcli.commands.trace import open_traceable
from spdcli.errors import UsageError
from spdcli.runs.directory import RunDirectory
from spdcli.runs.models import open_model

MODULE = {
    "name": "mine",
    "slices": {"C": 4},
    "importance": {"kind": "vector", "gate_width": 4},
    "losses": {"stochastic_recon": 1},
    "decompose": {"batch": 2, "steps": 2},
}


@pytest.fixture(params=["the induction toy", "a module of your own"])
def target_and_run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """What a run's target is, in words, and the run's directory."""
    module = request.param == "a module of your own"
    loaded = recipe_of(MODULE, own_target=True) if module else recipe_of("induction-quick")
    return request.param, str(RunDirectory.create(tmp_path / "run", loaded.recipe).path)


def test_facts_are_not_asked_of_it(target_and_run: tuple[str, str]) -> None:
    target, run = target_and_run
    with pytest.raises(UsageError, match=f"is a run of {target}, which knows no facts"):
        open_model(run)


def test_it_is_not_traced_by_the_command(target_and_run: tuple[str, str]) -> None:
    target, run = target_and_run
    with pytest.raises(UsageError, match=f"its target is {target}, and causal tracing needs a language model"):
        open_traceable(run, [], False, None)
