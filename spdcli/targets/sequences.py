"""Sequences of the induction task (Figure 1), seeded."""

from __future__ import annotations

import torch

from spdcli.engine.target import Batch
from spdcli.errors import UsageError

POSITION_CLASSES = ("s1", "m", "s2", "random")


def induction_batch(count: int, length: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """`count` sequences of the induction task, each `length` tokens.

    Ordinary tokens are `0 .. vocabulary-1`, drawn uniformly; the s token is `vocabulary`. It stands
    once at a random place (s1), followed by the m token, and once at the end (s2); the answer is m.
    Only the last position is looked at.

    Returns a Batch with `tokens` `[count, length]`, `answers` `[count]` and the classes s1, m, s2, random.
    """
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    s1 = torch.randint(length - 2, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, s1] = vocabulary
    tokens[:, -1] = vocabulary
    positions = torch.arange(length).expand(count, length)
    classes = {
        "s1": positions == s1[:, None],
        "m": positions == s1[:, None] + 1,
        "s2": positions == length - 1,
    }
    classes["random"] = ~(classes["s1"] | classes["m"] | classes["s2"])
    return Batch(
        tokens=tokens,
        valid=torch.ones_like(tokens, dtype=torch.bool),
        looked=classes["s2"],
        answers=tokens[rows, s1 + 1],
        classes=classes,
    )


def token_name(token: int, vocabulary: int) -> str:
    """How the toy's token is written: `s`, or its number."""
    return "s" if token == vocabulary else str(token)


def toy_tokens(text: str, vocabulary: int) -> list[int]:
    """The toy's tokens as written: numbers below `vocabulary`, and `s`. UsageError names the one that is neither."""
    tokens = []
    for word in text.split():
        if word != "s" and not (word.isdecimal() and int(word) < vocabulary):
            raise UsageError(f"the toy has no token {word!r}", f"its tokens are 0 to {vocabulary - 1} and s")
        tokens.append(vocabulary if word == "s" else int(word))
    if not tokens:
        raise UsageError("the prompt is empty", "write the toy's tokens, as in '3 s 17 4 s'")
    return tokens


def find_toy_token(pieces: list[list[str]], query: str, vocabulary: int) -> list[tuple[int, int]]:
    """Every `(sequence, position)` of a toy token; UsageError, listing tokens that are there, when it is nowhere."""
    wanted = token_name(toy_tokens(query, vocabulary)[-1], vocabulary)
    places = [(row, at) for row, tokens in enumerate(pieces) for at, token in enumerate(tokens) if token == wanted]
    if not places:
        there = sorted({token for tokens in pieces for token in tokens}, key=lambda t: (t != "s", len(t), t))
        raise UsageError(f"no sequence has the token {query!r}", f"the tokens are {', '.join(there[:60])}")
    return places
