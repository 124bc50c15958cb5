"""Text as sequences of one length: tokenised once into a file that is memory-mapped, and shuffled without a list.

W windows, n of them read at once, T positions of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from spdcli.errors import SpdError
from spdcli.progress import Progress, Report, silent
from spdcli.targets.prompts import require_embedded
from spdcli.targets.text_sources import PIECE, content_key, documents
from spdcli.targets.user_cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORED = np.dtype("<u4")
TOKENS = "tokens.bin"
ROUNDS = 4  # of the permutation; from the third on its output is as good as random
STEP = 0x9E3779B97F4A7C15  # odd, its bits even: multiplying by it mixes low bits into high ones


class Windows(Protocol):
    """Sequences of one length that can be read by their numbers."""

    def __len__(self) -> int: ...

    def read(self, numbers: Tensor) -> Tensor:
        """The tokens `[n, T]` of the sequences `numbers` `[n]`, on the processor."""
        ...


@dataclass(frozen=True, eq=False)
class PackedText:
    """The windows of a tokenised corpus, one after the other: `tokens` is memory-mapped, `begin` a token that every
    window starts with, where it is not None."""

    tokens: np.ndarray
    length: int
    begin: int | None = None

    @property
    def own(self) -> int:
        """How many tokens of the corpus a window has."""
        return self.length - (self.begin is not None)

    def __len__(self) -> int:
        return len(self.tokens) // self.own

    def read(self, numbers: Tensor) -> Tensor:
        places = numbers.numpy()[:, None] * self.own + np.arange(self.own)
        read = torch.from_numpy(self.tokens[places].astype(np.int64))
        if self.begin is None:
            return read
        return torch.cat([torch.full((len(read), 1), self.begin), read], dim=1)


@dataclass(frozen=True, eq=False)
class KeptText:
    """Windows that `make` gives as one tensor `[W, T]`, when the first of them is read; `count` is W."""

    make: Callable[[], Tensor]
    count: int

    @cached_property
    def tokens(self) -> Tensor:
        return self.make()

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: Tensor) -> Tensor:
        return self.tokens[numbers]


@dataclass(frozen=True, eq=False)
class Part:
    """Windows `start` to `stop` of a `whole` in the order that `seed` shuffles it into."""

    whole: Windows
    seed: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, numbers: Tensor) -> Tensor:
        return self.whole.read(shuffled(numbers + self.start, len(self.whole), self.seed))


@dataclass(frozen=True, eq=False)
class TextSplit:
    """The `training` sequences of a corpus, and those that are `held_out`: nothing is ever trained on them."""

    training: Windows
    held_out: Windows

    def minibatch(self, number: int, size: int, seed: int) -> Tensor:
        """The tokens `[size, T]` of the minibatch of that `number`, from 0: every sequence comes once an epoch, in an
        order that `seed` and the epoch's number give, so that any minibatch can be read without those before it."""
        count = len(self.training)
        places = torch.arange(number * size, (number + 1) * size)
        numbers = torch.empty_like(places)
        for epoch in range(int(places[0]) // count, int(places[-1]) // count + 1):
            here = places // count == epoch
            numbers[here] = shuffled(places[here] % count, count, seed, epoch + 1)
        return self.training.read(numbers)


def in_order(windows: Windows, count: int, at_once: int) -> Iterator[Tensor]:
    """The tokens `[n, T]` of the first `count` windows, or of all there are, `at_once` at a time."""
    count = min(count, len(windows))
    for start in range(0, count, at_once):
        yield windows.read(torch.arange(start, min(start + at_once, count)))


def split(whole: Windows, share: float, limit: int | None, seed: int, source: str) -> TextSplit:
    """At random by `seed`: the `share` of all windows (at least one) that is held out, and at most `limit` of the
    others. SpdError where there are fewer than those."""
    held = max(1, round(share * len(whole)))
    left = len(whole) - held
    if left < (limit or 1):
        raise SpdError(
            f"data.stream: {source} has {len(whole)} sequences, {held} of them held out: {left} are left to train on, "
            f"not {limit or 1}",
            "lower data.stream_sequences or data.stream_length, or give a longer text",
        )
    return TextSplit(Part(whole, seed, held, held + (limit or left)), Part(whole, seed, 0, held))


def shuffled(numbers: Tensor, count: int, seed: int, epoch: int = 0) -> Tensor:
    """Where a random permutation of 0 .. `count` - 1 takes `numbers`, both `[n]`; another one for every seed and epoch.

    It is computed and not kept: rounds of a Feistel network permute the numbers of 2k bits, the least that `count`
    fits, and what falls outside goes through them again until it is inside.
    """
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    values = numbers.numpy().astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _rounds(values[outside], keys, half)
        outside = values >= count
    return torch.from_numpy(values.astype(np.int64))


def _rounds(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(STEP)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(STEP)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << bits) | right


def packed_text(
    source: str,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    begin: int | None = None,
    report: Report = silent,
) -> PackedText:
    """The windows of `length` tokens of `source` (see `text_sources`), tokenised now if it never was.

    Documents follow each other, with the tokenizer's end-of-sequence token between them where it has one; what is left
    of the last window is dropped. The tokens lie in the user's cache, by the content of the source and the tokenizer.
    """
    end = tokenizer.eos_token_id
    name = hashlib.blake2b(
        json.dumps([content_key(source), field, _fingerprint(tokenizer), end]).encode(), digest_size=16
    ).hexdigest()

    def fill(folder: Path) -> None:
        report(Progress(f"tokenising {source}, once"))
        with (folder / TOKENS).open("wb") as file:
            for tokens in _tokenised(source, field, tokenizer):
                file.write(np.asarray(tokens, dtype=STORED).tobytes())

    place = cached("tokens", name, fill) / TOKENS
    if not place.stat().st_size:
        raise SpdError(f"data.stream: {source} holds no text")
    return PackedText(np.memmap(place, dtype=STORED, mode="r"), length, begin)


def _tokenised(source: str, field: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of all documents, in lists of bounded length."""
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting: list[tuple[list[int], str]] = []  # pieces of text, each with the tokens that go before it
    size = 0
    for number, document in enumerate(documents(source, field)):
        before = between if number else []
        for piece in document:
            waiting.append((before, piece))
            before, size = [], size + len(piece)
            if size >= PIECE:
                yield _joined(waiting, tokenizer)
                waiting, size = [], 0
    if waiting:
        yield _joined(waiting, tokenizer)


def _joined(waiting: list[tuple[list[int], str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # `verbose=False`: pieces are longer than what the model takes, and are meant to be.
    ids = tokenizer([piece for _, piece in waiting], add_special_tokens=False, verbose=False)["input_ids"]
    for own in ids:
        require_embedded(tokenizer, own, "data.stream")
    return [token for (before, _), own in zip(waiting, ids, strict=True) for token in (*before, *own)]


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal digits that stand for what the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab())}"
    return hashlib.blake2b(rules.encode(), digest_size=16).hexdigest()
