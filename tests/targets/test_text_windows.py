"""Packed sequences against a list of all tokens; the shuffle is a permutation; the cache is made once."""

from __future__ import annotations

import pytest
import torch

from spdcli.errors import SpdError
from spdcli.targets import text_sources, text_windows
from spdcli.targets.huggingface import load_model
from spdcli.targets.prompts import EMBEDDED
from spdcli.targets.text_windows import KeptText, TextSplit, in_order, packed_text, shuffled, split

LINES = [f"line {n} of the {'text' * (n % 3)}\n" for n in range(40)]


@pytest.fixture
def tokenizer(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_model(str(tiny_llama_dir), "float32").tokenizer


def test_windows_are_the_tokens_of_all_documents_in_order(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = ["".join(LINES[:15]), "".join(LINES[15:])]
    for number, text in enumerate(documents):
        (folder / f"{number}.txt").write_text(text)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents)
    tokens = [*first, tokenizer.eos_token_id, *second]
    text = packed_text(str(folder), "text", tokenizer, 7)
    assert len(text) == len(tokens) // 7
    assert text.read(torch.arange(len(text))).flatten().tolist() == tokens[: 7 * len(text)]
    assert text.read(torch.tensor([2, 0])).tolist() == [tokens[14:21], tokens[:7]]
    begun = packed_text(str(folder), "text", tokenizer, 7, begin=3)
    assert begun.read(torch.tensor([1])).tolist() == [[3, *tokens[6:12]]]


def test_pieces_give_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(LINES))
    monkeypatch.setattr(text_sources, "PIECE", 30)
    monkeypatch.setattr(text_windows, "PIECE", 30)
    text = packed_text(str(tmp_path / "text.txt"), "text", tokenizer, 5)
    whole = tokenizer("".join(LINES), add_special_tokens=False)["input_ids"]
    assert text.tokens.tolist() == whole


def test_text_is_tokenised_once(tokenizer, tmp_path, monkeypatch):
    path, told = tmp_path / "text.txt", []
    path.write_text("".join(LINES))
    packed_text(str(path), "text", tokenizer, 5, report=told.append)
    monkeypatch.setattr(text_windows, "documents", None)
    packed_text(str(path), "text", tokenizer, 9, report=told.append)  # of any length
    assert len(told) == 1
    path.write_text("other")
    with pytest.raises(TypeError):
        packed_text(str(path), "text", tokenizer, 5)


def test_a_failure_leaves_no_cache(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good\n\xff\n")
    with pytest.raises(SpdError, match="line 2"):
        packed_text(str(path), "text", tokenizer, 5)
    assert not list((tmp_path / "cache" / "spd" / "tokens").iterdir())
    path.write_text("")
    with pytest.raises(SpdError, match="holds no text"):
        packed_text(str(path), "text", tokenizer, 5)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000, 4097])
def test_the_shuffle_is_a_permutation(count):
    orders = [shuffled(torch.arange(count), count, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(count))
    if count > 50:
        assert len({tuple(order.tolist()) for order in orders}) == 3
        some = torch.tensor([3, 1, 40])
        assert torch.equal(shuffled(some, count, 0), orders[0][some])  # of any of them


def test_the_shuffle_is_random():
    """Neighbours end as far apart as two random places do, count / 3 on average; no place keeps its number more often
    than chance has it."""
    count = 10_000
    order = shuffled(torch.arange(count), count, 5).double()
    assert abs(order.diff().abs().mean() - count / 3) < count / 50
    assert (order == torch.arange(count)).sum() < 8  # Poisson of mean 1
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(count).double()]))[0, 1]) < 0.04  # four deviations


def numbered(count):
    return KeptText(lambda: torch.arange(count)[:, None], count)


def test_a_split_keeps_sequences_apart():
    parts = split(numbered(100), 0.1, None, 3, "text")
    training, held_out = (
        [int(t) for t in torch.cat(list(in_order(p, 100, 7)))] for p in (parts.training, parts.held_out)
    )
    assert len(training) == 90
    assert sorted(training + held_out) == list(range(100))
    limited = split(numbered(100), 0.1, 20, 3, "text")
    assert [int(t) for t in torch.cat(list(in_order(limited.training, 100, 7)))] == training[:20]
    assert len(split(numbered(5), 0.01, None, 0, "text").held_out) == 1
    for count, limit in ((1, None), (10, 10)):
        with pytest.raises(SpdError, match=f"has {count} sequences, 1 of them held out"):
            split(numbered(count), 0.01, limit, 0, "text")


def test_minibatches_have_every_sequence_once_an_epoch():
    parts = TextSplit(numbered(10), numbered(1))
    batches = [parts.minibatch(number, 4, seed=2)[:, 0].tolist() for number in range(5)]
    order = [token for batch in batches for token in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert parts.minibatch(2, 4, seed=2)[:, 0].tolist() == batches[2]  # without those before it
    assert len(parts.minibatch(0, 25, seed=2)) == 25  # more than there are


def test_text_with_tokens_that_the_model_does_not_know_is_refused(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("golf")
    setattr(tokenizer, EMBEDDED, 10)
    with pytest.raises(SpdError, match=r"data\.stream has the token #\d+, but the model has embeddings of 10 tokens"):
        packed_text(str(tmp_path / "text.txt"), "text", tokenizer, 2)
