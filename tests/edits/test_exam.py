"""What a changed model is asked from Python: no console, no run directory; warnings go where they are wanted."""

from __future__ import annotations

import pytest
from edited_models import PROMPTS, open_case

from spdcli.edits.ablation import ablate
from spdcli.edits.edit_reports import report_suppression
from spdcli.edits.exam import open_exam
from spdcli.edits.facts_file import Fact, Facts, Known, load_facts
from spdcli.edits.suppression import Address
from spdcli.errors import UsageError
from spdcli.records import plain

FACTS = Facts(
    known=Known(probability=1e-9, rank=1000),
    fact=[
        Fact(category="own", prompt="Kobe Bryant plays professional basketball"),
        Fact(category="other", prompt="the sport of golf"),
        Fact(category="other", prompt="Tiger Woods plays"),
        Fact(category="long", prompt="x" * 70),
    ],
)


def test_facts_are_those_that_nobody_asks_for(request, tmp_path):
    subject, *_ = open_case("gpt2", request, tmp_path)
    said = []
    exam = open_exam(subject, facts=FACTS, report=said.append)
    assert exam.questions.texts == subject.prompts.texts
    assert exam.facts.questions.texts == ["the sport of golf", "Tiger Woods plays"]
    (told,) = said
    assert told.warning
    assert told.text == "1 facts are longer than this model takes, and are left out"
    exam = open_exam(subject, PROMPTS, FACTS)
    assert exam.questions.texts == PROMPTS
    assert exam.facts.questions.texts == ["Tiger Woods plays"]
    assert open_exam(subject, ["Tiger Woods plays", *PROMPTS], FACTS).facts is None
    assert open_exam(subject).facts is None


def test_the_toy_is_asked_fresh_sequences_and_no_facts(request, tmp_path):
    subject, *_ = open_case("toy", request, tmp_path)
    exams = [open_exam(subject, sequences=3, seed=seed) for seed in (1, 1, 2)]
    assert len(exams[0].questions.texts) == 3
    assert exams[0].questions.texts == exams[1].questions.texts != exams[2].questions.texts
    with pytest.raises(UsageError, match="the induction toy knows no facts"):
        open_exam(subject, facts=load_facts())


def test_both_changes_answer_the_same_exam(request, tmp_path):
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path, "slices.delta=true")
    exam = open_exam(subject, facts=FACTS)
    slices = [Address(names[0], 1), Address(names[2], 0)]
    for report in (
        report_suppression(subject, decomposition, slices, "literal", exam),
        ablate(subject, decomposition, exam, slices),
    ):
        assert report.slices == [str(one) for one in slices] == list(report.alone)
        assert [effect.group for effect in report.effects] == ["prompt"] * 2 + ["fact"] * 2
        assert [effect.prompt for effect in report.effects[2:]] == exam.facts.questions.texts
        assert all(set(effect.active) <= set(report.slices) for effect in report.effects[:2])
        assert report.facts.known == 2
        sizes = [abs(effect.ratio - 1) for effect in report.effects[2:]]
        assert report.facts.relative_change["max"] == pytest.approx(max(sizes))
        written = plain(report)
        assert written["facts"]["max_relative_change"] == report.facts.relative_change["max"]
        assert "active" in written["effects"][0]
        assert "active" not in written["effects"][2]
