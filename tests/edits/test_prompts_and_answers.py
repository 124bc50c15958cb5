"""Questions put together: picked, joined across lengths, asked about other tokens."""

from __future__ import annotations

import pytest
import torch
from edited_models import CPU, answers_of, open_case
from small_runs import model_recipe

from spdcli.edits.answer_changes import present_answers
from spdcli.edits.facts_file import load_facts
from spdcli.edits.known_facts import facts_beside
from spdcli.edits.prompts_and_answers import about_token, given_questions, join, own_questions, pick, token_id
from spdcli.errors import UsageError
from spdcli.runs.subject import language_subject

TEXTS = ["the sport of golf", "Kobe Bryant plays professional basketball", "Tiger Woods plays"]


@pytest.fixture
def subject(request, tmp_path):
    return open_case("gpt2", request, tmp_path)[0]


def test_joined_and_picked_questions_are_answered_as_alone(subject):
    alone = [given_questions(subject, [text]) for text in TEXTS]
    joined = join(alone)
    assert joined.texts == TEXTS
    now = present_answers(subject.target, joined)
    for row, question in enumerate(alone):
        wanted = answers_of(subject, question)[0, question.batch.answers[0]].exp()
        assert now.p[row].item() == pytest.approx(wanted.item(), rel=1e-9)
    back = pick(joined, [2, 0])
    assert back.texts == [TEXTS[2], TEXTS[0]]
    assert back.tokens == [" plays", " golf"]
    torch.testing.assert_close(present_answers(subject.target, back).p, now.p[[2, 0]])  # another batch rounds anew


def test_another_token_at_the_same_place(subject):
    questions = given_questions(subject, TEXTS[:2])
    other = about_token(subject, questions, "golf")
    assert other.tokens == [" golf", " golf"]
    log_p = answers_of(subject, questions)
    golf = token_id(subject, " golf")
    now = present_answers(subject.target, other)
    assert now.p.tolist() == pytest.approx(log_p[:, golf].exp().tolist(), rel=1e-9)
    assert about_token(subject, questions, " basketball").tokens == [" basketball", " basketball"]
    assert about_token(subject, questions, f"#{golf}").tokens == [" golf", " golf"]
    assert questions.tokens == [" golf", " basketball"], "the questions themselves stay"


def test_the_answer_is_meant_where_it_fits(subject):
    """'obe' is the answer's own text here, and not the nearest token with a space."""
    question = given_questions(subject, ["of Kobe"])
    assert question.tokens == ["obe"]
    assert about_token(subject, question, "obe").batch.answers.tolist() == question.batch.answers.tolist()


@pytest.mark.parametrize(("query", "said"), [("golfer", "is no single token, but"), ("#99999", "is no single token")])
def test_what_is_no_token_is_refused(subject, query, said):
    with pytest.raises(UsageError, match=said):
        token_id(subject, query)


def test_the_toy_has_tokens_too(request, tmp_path):
    subject = open_case("toy", request, tmp_path)[0]
    assert token_id(subject, "3") == 3
    assert token_id(subject, "s") == subject.toy.shape.vocabulary
    questions = own_questions(subject, 3, 1)
    assert about_token(subject, questions, "s").tokens == ["s"] * 3
    with pytest.raises(UsageError):
        token_id(subject, "3 4")


def test_texts_begin_as_the_runs_own_do(tiny_llama_dir, tmp_path):
    with_begin = language_subject(model_recipe(tiny_llama_dir, "data.begin_token=true", folder=tmp_path), CPU)
    plain = language_subject(model_recipe(tiny_llama_dir, folder=tmp_path), CPU)
    assert (with_begin.prompts.begin_token, plain.prompts.begin_token) == (True, False)
    long, short = (given_questions(subject, ["the sport of golf"]).batch.tokens[0] for subject in (with_begin, plain))
    assert long.tolist() == [with_begin.prompts.tokenizer.bos_token_id, *short.tolist()]
    facts = facts_beside(with_begin, load_facts(), ())
    assert set(facts.questions.batch.tokens[:, 0].tolist()) == {with_begin.prompts.tokenizer.bos_token_id}
