"""Long work tells how far it is: how many are done of how many, never backwards, up to the end."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from door_checks import KOBE

from spdcli.certification.certify import Certifying
from spdcli.measures.evidence_choices import MaskSearch
from spdcli.progress import Progress, counted

FC = ["h.1.mlp.c_fc:0", "h.1.mlp.c_fc:1"]
WORK = {
    "evaluate": lambda run, tell: run.evaluate(4, progress=tell),
    "certify": lambda run, tell: run.certify(
        settings=Certifying(4, adversary=MaskSearch("quick", 1)), facts=None, progress=tell
    ),
    "inspect": lambda run, tell: run.inspect(prompts=[KOBE], progress=tell),
    "locate": lambda run, tell: run.locate(1, progress=tell),
    "suppression": lambda run, tell: run.suppression(FC, progress=tell),
    "ablate": lambda run, tell: run.ablate(FC, progress=tell),
}


def test_what_is_counted_by_hand() -> None:
    told: list[Progress] = []
    seen = [(item, len(told)) for item in counted("ab", "letters", told.append)]
    assert seen == [("a", 1), ("b", 2)], "it is told before each is handed out"
    assert [(one.done, one.total, one.text) for one in told] == [
        (0, 2, "letters"),
        (1, 2, "letters"),
        (2, 2, "letters"),
    ]
    told.clear()
    assert list(counted([], "nothing", told.append)) == []
    assert told == []


@pytest.mark.parametrize("name", WORK)
def test_work_on_a_language_model_is_counted(name, language_run) -> None:
    told: list[Progress] = []
    WORK[name](language_run, told.append)
    assert_counted(told)


@pytest.mark.parametrize("name", ["evaluate", "certify"])
def test_work_on_a_toy_is_counted(name, toy_run) -> None:
    told: list[Progress] = []
    WORK[name](toy_run, told.append)
    assert_counted(told)
    assert {"sequences", "steps of a search for masks that break it"} <= {one.text for one in told}


def test_facts_are_counted(language_run) -> None:
    told: list[Progress] = []
    language_run.locate(1, progress=told.append)
    language_run.suppression(FC, progress=told.append)
    assert {"facts that it knows", "answers of prompts", "answers of facts"} <= {one.text for one in told}


def assert_counted(told: list[Progress]) -> None:
    steps = [one for one in told if one.total]
    assert steps, "nothing was counted"
    assert all(0 <= one.done <= one.total for one in steps)
    for _, phase in groupby(steps, key=lambda one: (one.text, one.total)):
        done = [one.done for one in phase]
        assert all(now >= before or now == 0 for before, now in pairwise(done)), f"backwards: {done}"
