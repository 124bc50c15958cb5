"""Efficacy, paraphrase and specificity: by hand, against a model edited in place, from facts and from CounterFact."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from edited_models import answer_change, in_place, open_case

from spdcli.edits.ablation import ablate
from spdcli.edits.answer_changes import measure_edits, present_answers
from spdcli.edits.answer_text import with_answer
from spdcli.edits.counterfact import load_records
from spdcli.edits.edit_reports import report_suppression
from spdcli.edits.editing_scores import fact_scores, record_questions, record_scores
from spdcli.edits.exam import Exam, open_exam, script_exam
from spdcli.edits.expectations import report_script
from spdcli.edits.facts_file import Fact, Facts, Known, Related
from spdcli.edits.prompts_and_answers import given_questions
from spdcli.edits.script import load_script
from spdcli.edits.script_plan import plan_script
from spdcli.edits.suppression import Address, suppression
from spdcli.errors import RecipeError, SpdError, UsageError

PROMPTS = ["Kobe Bryant plays", "the sport of", "Tiger Woods"]
ANSWERS = ["professional basketball", "golf", "the golfer"]  # of 2, 1 and 4 tokens
RECORD = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "{} plays",
        "subject": "Kobe Bryant",
        "target_true": {"str": "professional basketball", "id": "Q1"},
        "target_new": {"str": "golf", "id": "Q2"},
    },
    "paraphrase_prompts": ["the sport of Kobe Bryant", "the professional sport of Bryant"],
    "neighborhood_prompts": ["Tiger Woods plays"],
}
OTHER = {
    "requested_rewrite": {
        "prompt": "the sport {} plays is",
        "subject": "Woods",
        "target_true": "golf",
        "target_new": "x",
    }
}


@pytest.fixture
def case(request, tmp_path):
    """A tiny GPT-2, its slices, and an edit of three of them that takes much."""
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path, "slices.delta=true")
    slices = [Address(names[0], 0), Address(names[0], 1), Address(names[1], 0)]
    return subject, decomposition, slices


@torch.no_grad()
def log_p(subject, prompt, answer):
    """The log-probability of an answer, its tokens fed one after the other, and whether greedy decoding gives it."""
    tokenizer, model = subject.prompts.tokenizer, subject.target.model
    fed, total, greedy = tokenizer(prompt)["input_ids"], 0.0, True
    for token in tokenizer(f" {answer}")["input_ids"]:
        row = model(torch.tensor([fed])).logits[0, -1].log_softmax(-1)
        total, greedy, fed = total + row[token].item(), greedy and row.argmax() == token, [*fed, token]
    return total, bool(greedy)


def cut(subject, edit):
    """What changes the weights of the target itself."""
    return lambda: [subject.target.matrices[name].weight.sub_(f.read @ f.write) for name, f in edit.items()]


def edited(subject, edit, questions, look):
    """What `look` gives while the model is edited."""
    seen = []
    in_place(subject, questions, lambda: (cut(subject, edit)(), seen.append(look())))
    return seen[0]


# --- answers of several tokens -----------------------------------------------------------------------------


def test_an_answer_of_several_tokens_has_their_joint_probability(case):
    subject, decomposition, slices = case
    questions = given_questions(subject, PROMPTS, ANSWERS)
    assert questions.tokens == [" professional basketball", " golf", " the golfer"]
    assert questions.batch.looked.sum(1).tolist() == [2, 1, 4]
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    now = [log_p(subject, *pair) for pair in pairs]
    present = present_answers(subject.target, questions)
    assert present.p.log().tolist() == pytest.approx([one for one, _ in now], rel=1e-9)
    assert (present.rank == 1).tolist() == [greedy for _, greedy in now]
    edit = suppression(subject.target, decomposition, slices)
    after = edited(subject, edit, questions, lambda: [log_p(subject, *pair) for pair in pairs])
    effects = measure_edits(subject.target, questions, {"": edit})[""]
    for effect, (before, _), (then, greedy) in zip(effects, now, after, strict=True):
        assert effect.before == pytest.approx(torch.tensor(before).exp().item(), rel=1e-6)
        assert effect.ratio == pytest.approx(torch.tensor(then - before).exp().item(), rel=1e-6)
        assert (effect.rank_after == 1) == greedy


def test_its_kl_is_that_of_the_first_token(case):
    subject, decomposition, slices = case
    edits = {"": suppression(subject.target, decomposition, slices)}
    one, several = (given_questions(subject, PROMPTS[:1], [answer]) for answer in ("professional", ANSWERS[0]))
    kl = [measure_edits(subject.target, questions, edits)[""][0].kl for questions in (one, several)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-9)


def test_an_ablation_scores_it_too(case):
    subject, decomposition, slices = case
    questions = given_questions(subject, PROMPTS, ANSWERS)
    effects = ablate(subject, decomposition, Exam(questions), slices[:1]).effects
    for effect, prompt, answer in zip(effects, PROMPTS, ANSWERS, strict=True):
        before = torch.tensor(log_p(subject, prompt, answer)[0]).exp().item()
        assert [effect.before, effect.target] == pytest.approx([before, before], rel=1e-5)


def test_prompt_and_answer_are_tokens_of_one_text(case):
    subject, *_ = case
    for prompt in ("the sport of", "the sport of "):  # the blank goes to the answer, which is one token with it
        questions = given_questions(subject, [prompt], ["golf"])
        assert questions.tokens == [" golf"]
        assert questions.batch.looked.sum().item() == 1
    assert with_answer("a", " b") == "a b"
    with pytest.raises(SpdError, match="has no token of its own before the answer"):
        given_questions(subject, [" "], ["plays golf"])


def test_a_blank_at_the_end_is_told(case):
    subject, *_ = case
    said = []
    open_exam(subject, ["the sport of ", "the sport of golf"], report=said.append)
    assert [one.warning for one in said] == [True]
    assert said[0].text.endswith("ends in a blank, which is now its answer; leave it out: 'the sport of'")
    open_exam(subject, ["the sport of "], answers=["golf"], report=said.append)
    assert len(said) == 1


# --- scores of facts ---------------------------------------------------------------------------------------


def test_shares_by_hand():
    """Of what the model said first: one of two answers is lost, no paraphrase, three of four others stay."""
    lost, kept, never = ({"rank_before": first, "rank_after": then} for first, then in ((1, 2), (1, 1), (2, 1)))
    scores = fact_scores(
        [answer_change(**lost), answer_change(**kept), answer_change(**never)],
        [answer_change(**kept)],
        [answer_change(**kept)] * 3 + [answer_change(**lost), answer_change(**never)],
    )
    shares = [scores.efficacy, scores.paraphrase, scores.specificity]
    assert [(one.before, one.after, one.prompts) for one in shares] == [(0, 0.5, 2), (0, 0, 1), (1, 0.75, 4)]
    assert scores.score == 0
    again = fact_scores(
        [answer_change(**lost)], [answer_change(**lost)], [answer_change(**kept), answer_change(**lost)]
    )
    assert again.score == pytest.approx(3 / (1 + 1 + 2))
    assert fact_scores([], [answer_change(**lost)], [answer_change(**kept)]).score is None


@torch.no_grad()
def said(subject, texts):
    """Whether the last token of each text is the one that the model gives first."""
    ids = [subject.prompts.tokenizer(text)["input_ids"] for text in texts]
    return [bool(subject.target.model(torch.tensor([own[:-1]])).logits[0, -1].argmax() == own[-1]) for own in ids]


def sayings(subject, starts):
    """Each text with the token that the model gives next."""
    tokenizer, model = subject.prompts.tokenizer, subject.target.model
    ids = [tokenizer(text)["input_ids"] for text in starts]
    return [tokenizer.decode([*own, model(torch.tensor([own])).logits[0, -1].argmax()]) for own in ids]


STARTS = [" ".join(words) for words in itertools.product(("plays", "golf", "the", "sport", "Bryant"), repeat=2)]


def test_facts_and_their_paraphrases_are_scored(case):
    subject, decomposition, slices = case
    texts = [text for text, right in ((text, said(subject, [text])[0]) for text in sayings(subject, STARTS)) if right]
    one, again, *others = texts
    assert len(others) >= 2
    unknown = "golf of the"
    assert not said(subject, [unknown])[0]
    facts = Facts(
        known=Known(probability=1e-9, rank=1),
        fact=[Fact(category="x", prompt=text) for text in (one, *others, unknown)],
        related=[
            Related(of=one, kind="paraphrase", prompt=again),
            Related(of=one, kind="reversed", prompt="golf of the sport"),
            Related(of=others[0], kind="paraphrase", prompt="the golf"),
        ],
    )
    exam = open_exam(subject, [one], facts)
    report = report_suppression(subject, decomposition, slices, "literal", exam)
    edit = suppression(subject.target, decomposition, slices)
    kept = edited(subject, edit, exam.questions, lambda: said(subject, texts))
    scores = report.scores["facts"]
    assert (scores.efficacy.after, scores.efficacy.prompts) == (float(not kept[0]), 1)
    assert (scores.paraphrase.after, scores.paraphrase.prompts) == (float(not kept[1]), 1)
    assert (scores.specificity.after, scores.specificity.prompts) == (sum(kept[2:]) / len(others), len(others))
    assert False in kept, "the edit is large enough to be seen"


def test_a_fact_is_found_by_its_prompt_and_answer(case):
    subject, *_ = case
    whole, other = "the sport of golf", "Tiger Woods plays golf"
    facts = Facts(
        fact=[Fact(category="x", prompt=text) for text in (whole, other)],
        related=[Related(of=whole, kind="paraphrase", prompt="the golf")],
    )
    exam = open_exam(subject, ["plays the", "the sport of"], facts, answers=["sport", "golf"])
    assert exam.facts.questions.texts == [other]
    assert (exam.paraphrases.questions.texts, exam.paraphrases.of) == (["the golf"], [1])


# --- CounterFact -------------------------------------------------------------------------------------------


def write(path, *records, lines=False):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def test_a_list_and_a_record_a_line_are_the_same(tmp_path):
    records = load_records(write(tmp_path / "list.json", RECORD, OTHER))
    assert load_records(write(tmp_path / "lines.jsonl", RECORD, OTHER, lines=True)) == records
    assert [one.requested_rewrite.text for one in records] == ["Kobe Bryant plays", "the sport Woods plays is"]
    assert [one.requested_rewrite.target_true for one in records] == ["professional basketball", "golf"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', ":1: requested_rewrite: missing"),
        (json.dumps(RECORD) + "\n" + json.dumps(RECORD).replace("{} plays", "plays"), ":2: requested_rewrite.prompt: "),
        (
            f"[{json.dumps(RECORD).replace(chr(34) + 'golf' + chr(34), '3')}]",
            "record 1: requested_rewrite.target_new: ",
        ),
        ("[\n1,,]", ":2:3: no JSON"),
        ("{", ":1:2: no JSON"),
        ("", "no records"),
        ("[]", "no records"),
        ("[3]", "record 1: the record: "),
    ],
)
def test_mistakes_have_their_place(tmp_path, text, said):
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(SpdError) as caught:
        load_records(path)
    assert said in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


def test_many_mistakes_are_counted(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_records(write(tmp_path / "bad.json", *[{}] * 30))
    assert len(caught.value.message.splitlines()) == 11
    assert caught.value.message.endswith("20 more mistakes")


def test_records_are_scored_as_in_an_edited_model(case, tmp_path):
    subject, decomposition, slices = case
    records = load_records(write(tmp_path / "records.json", RECORD, OTHER))
    edit = suppression(subject.target, decomposition, slices)
    asked = record_questions(subject, records)

    def shares():
        held = {"efficacy": [], "paraphrase": [], "specificity": []}
        for record in records:
            own = record.requested_rewrite
            for part, prompts in (
                ("efficacy", [own.text]),
                ("paraphrase", record.paraphrase_prompts),
                ("specificity", record.neighborhood_prompts),
            ):
                for prompt in prompts:
                    new, true = (log_p(subject, prompt, answer)[0] for answer in (own.target_new, own.target_true))
                    held[part].append(new > true if part != "specificity" else true > new)
        return [sum(values) / len(values) for values in held.values()]

    before, after = shares(), edited(subject, edit, asked.questions, shares)
    scores = record_scores(subject, asked, {"cut": edit, "again": edit})
    for name, then in (("cut", after), ("again", after)):
        found = [scores[name].efficacy, scores[name].paraphrase, scores[name].specificity]
        assert [one.before for one in found] == before
        assert [one.after for one in found] == then
        assert [one.prompts for one in found] == [2, 2, 1]


def test_the_toy_has_no_records(request, tmp_path):
    subject, *_ = open_case("toy", request, tmp_path)
    with pytest.raises(UsageError, match="CounterFact is about language models"):
        open_exam(subject, records=load_records(write(tmp_path / "records.json", RECORD)))


def test_every_edit_of_a_script_is_scored(case, tmp_path):
    subject, decomposition, slices = case
    (tmp_path / "edits.toml").write_text(
        f'[[edit]]\nname = "one"\nslices = ["{slices[0]}"]\n[[edit]]\nname = "two"\nslices = ["{slices[1]}"]\n'
    )
    plan = plan_script(subject, decomposition, *load_script(tmp_path / "edits.toml"), 0)
    records = load_records(write(tmp_path / "records.json", RECORD))
    texts = [*subject.prompts.texts, *sayings(subject, STARTS)]
    facts = Facts(fact=[Fact(category="x", prompt=text) for text in texts])
    exam = script_exam(subject, plan.questions, facts, records)
    report = report_script(subject, decomposition, plan, plan.edits(subject.target, decomposition), exam)
    for edit in report.edits:
        assert set(edit.scores) == {"facts", "counterfact"}
        assert edit.scores["counterfact"].paraphrase.prompts == 2
        assert edit.scores["facts"].efficacy.prompts + edit.scores["facts"].specificity.prompts == sum(
            said(subject, texts)
        )
