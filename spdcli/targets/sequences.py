"""Sequences of the induction task (Figure 1), seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spdcli.engine.target import Batch
from spdcli.errors import UsageError

POSITION_CLASSES = ("s1", "m", "s2", "random")


@dataclass(frozen=True)
class InductionSequences:
    """The sequences of a toy: `length` tokens each, of `vocabulary` ordinary tokens `0 .. vocabulary-1` and s, which is
    the number `vocabulary`. With `begin_token` every sequence starts with one more token, `bos`, after them."""

    length: int
    vocabulary: int
    begin_token: bool = False

    @property
    def tokens(self) -> int:
        """How many different tokens there are."""
        return self.vocabulary + 1 + self.begin_token

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` sequences of the induction task.

        Ordinary tokens are drawn uniformly. The s token stands once at a random place (s1), followed by the m token,
        and once at the end (s2); the answer is m. After a begin token at least one ordinary token comes before s1.
        Only the last position is looked at.

        Returns a Batch with `tokens` `[count, length]`, `answers` `[count]` and the classes s1, m, s2, random; a begin
        token is of no class.
        """
        tokens = torch.randint(self.vocabulary, (count, self.length), generator=generator)
        first = 2 * self.begin_token
        s1 = torch.randint(first, self.length - 2, (count,), generator=generator)
        rows = torch.arange(count)
        tokens[rows, s1] = self.vocabulary
        tokens[:, -1] = self.vocabulary
        positions = torch.arange(self.length).expand(count, self.length)
        classes = {
            "s1": positions == s1[:, None],
            "m": positions == s1[:, None] + 1,
            "s2": positions == self.length - 1,
        }
        ordinary = ~(classes["s1"] | classes["m"] | classes["s2"])
        if self.begin_token:
            tokens[:, 0] = self.vocabulary + 1
            ordinary = ordinary & (positions > 0)
        return Batch(
            tokens=tokens,
            valid=torch.ones_like(tokens, dtype=torch.bool),
            looked=classes["s2"],
            answers=tokens[rows, s1 + 1],
            classes={**classes, "random": ordinary},
        )

    def name(self, token: int) -> str:
        """How a token is written: `s`, `bos`, or its number."""
        return {self.vocabulary: "s", self.vocabulary + 1: "bos"}.get(token, str(token))

    def read(self, text: str) -> list[int]:
        """Tokens as written: numbers below `vocabulary`, `s`, and `bos` where there is a begin token.

        UsageError names the one that is none of them.
        """
        special = {"s": self.vocabulary} | ({"bos": self.vocabulary + 1} if self.begin_token else {})
        tokens = []
        for word in text.split():
            if word not in special and not (word.isdecimal() and int(word) < self.vocabulary):
                raise UsageError(
                    f"the toy has no token {word!r}",
                    f"its tokens are 0 to {self.vocabulary - 1} and {' and '.join(special)}",
                )
            tokens.append(special[word] if word in special else int(word))
        if not tokens:
            raise UsageError("the prompt is empty", "write the toy's tokens, as in '3 s 17 4 s'")
        return tokens

    def prompt(self, text: str) -> list[int]:
        """A whole sequence as written; a begin token that the text leaves out is put in front."""
        tokens = self.read(text)
        begin = self.vocabulary + 1
        return [begin, *tokens] if self.begin_token and tokens[0] != begin else tokens

    def find(self, pieces: list[list[str]], query: str) -> list[tuple[int, int]]:
        """Every `(sequence, position)` of a token; UsageError, listing tokens that are there, when it is nowhere."""
        wanted = self.name(self.read(query)[-1])
        places = [(row, at) for row, tokens in enumerate(pieces) for at, token in enumerate(tokens) if token == wanted]
        if not places:
            there = sorted({t for tokens in pieces for t in tokens}, key=lambda t: (t.isdecimal(), len(t), t))
            raise UsageError(f"no sequence has the token {query!r}", f"the tokens are {', '.join(there[:60])}")
        return places
