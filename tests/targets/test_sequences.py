"""The induction sequences: s twice, m after it, position classes, seeds, tokens as written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdcli.errors import UsageError
from spdcli.targets.sequences import POSITION_CLASSES, InductionSequences

PLAIN, BEGUN = InductionSequences(9, 6), InductionSequences(9, 6, begin_token=True)


def batch(count=50, length=9, vocabulary=6, seed=0):
    return InductionSequences(length, vocabulary).draw(count, torch.Generator().manual_seed(seed))


@given(st.integers(1, 20), st.integers(4, 30), st.integers(2, 40), st.integers(0, 2**31))
def test_a_sequence_is_figure_1(count, length, vocabulary, seed):
    made = batch(count, length, vocabulary, seed)
    assert made.tokens.shape == (count, length)
    assert made.valid.all()
    for tokens, answer in zip(made.tokens.tolist(), made.answers.tolist(), strict=True):
        assert tokens.count(vocabulary) == 2  # the s token
        assert tokens[-1] == vocabulary
        first = tokens.index(vocabulary)
        assert first + 1 < length - 1  # the m token is an ordinary one
        assert tokens[first + 1] == answer
        assert all(0 <= token <= vocabulary for token in tokens)
    assert (made.looked.sum(1) == 1).all()
    assert made.looked[:, -1].all()


@given(st.integers(1, 20), st.integers(4, 30), st.integers(0, 2**31))
def test_classes_say_what_stands_where(count, length, seed):
    made = batch(count, length, 6, seed)
    assert set(made.classes) == set(POSITION_CLASSES)
    assert (torch.stack(list(made.classes.values())).sum(0) == 1).all()  # every position is of one class
    assert torch.equal(made.classes["s1"] | made.classes["s2"], made.tokens == 6)
    assert torch.equal(made.classes["m"][:, 1:], made.classes["s1"][:, :-1])
    assert torch.equal(made.tokens[made.classes["m"]], made.answers)


def test_places_and_tokens_are_uniform():
    made = batch(7000)
    places = made.classes["s1"].sum(0)
    assert places[7:].tolist() == [0, 0]  # seven places leave room for m and the last s
    assert ((places[:7] - 1000).abs() < 5 * 30).all()  # sqrt(7000 / 7 * 6 / 7) = 29
    answers = made.answers.bincount(minlength=6)
    assert ((answers - 7000 / 6).abs() < 5 * 32).all()
    ordinary = made.tokens[made.classes["random"]].bincount(minlength=6)
    assert ((ordinary - 7000).abs() < 5 * 77).all()  # 6 * 7000 tokens


def test_the_generator_decides():
    assert torch.equal(batch(seed=3).tokens, batch(seed=3).tokens)
    assert not torch.equal(batch(seed=3).tokens, batch(seed=4).tokens)


def test_a_batch_of_chosen_sequences():
    made = batch()
    rows = torch.tensor([7, 2])
    chosen = made.select(rows)
    for name in ("tokens", "valid", "looked", "answers"):
        assert torch.equal(getattr(chosen, name), getattr(made, name)[rows])
    assert torch.equal(chosen.classes["m"], made.classes["m"][rows])


def test_tokens_are_written_and_read():
    assert PLAIN.read("3 s 5") == PLAIN.prompt("3 s 5") == [3, 6, 5]
    assert [PLAIN.name(token) for token in (3, 6, 5)] == ["3", "s", "5"]
    for wrong in ("3 6", "t", "-1", "bos", ""):
        with pytest.raises(UsageError):
            PLAIN.read(wrong)


def test_tokens_are_found_wherever_they_stand():
    sequences = [["3", "s", "5", "s"], ["5", "s", "1", "s"]]
    assert PLAIN.find(sequences, "5") == [(0, 2), (1, 0)]
    assert PLAIN.find(sequences, "s") == [(0, 1), (0, 3), (1, 1), (1, 3)]
    with pytest.raises(UsageError, match="'4'") as error:
        PLAIN.find(sequences, "4")
    assert error.value.hint == "the tokens are s, 1, 3, 5"


def test_a_begin_token_comes_first_and_an_ordinary_one_after_it():
    drawn = BEGUN.draw(7000, torch.Generator().manual_seed(0))
    assert drawn.tokens[:, 0].eq(7).all()
    assert not drawn.tokens[:, 1:].eq(7).any()
    places = drawn.classes["s1"].sum(0)
    assert places[:2].tolist() == places[7:].tolist() == [0, 0]
    assert ((places[2:7] - 1400).abs() < 5 * 34).all()  # sqrt(7000 / 5 * 4 / 5) = 33
    assert torch.stack(list(drawn.classes.values())).sum(0).eq(torch.arange(9) > 0).all()
    assert drawn.tokens.gather(1, drawn.classes["m"].int().argmax(1)[:, None])[:, 0].equal(drawn.answers)


def test_a_begin_token_is_written_read_and_put_in_front():
    assert BEGUN.tokens == 8
    assert BEGUN.name(7) == "bos"
    assert BEGUN.read("s 5") == [6, 5]
    assert BEGUN.prompt("s 5") == BEGUN.prompt("bos s 5") == [7, 6, 5]
    with pytest.raises(UsageError) as error:
        BEGUN.read("6")
    assert error.value.hint == "its tokens are 0 to 5 and s and bos"
