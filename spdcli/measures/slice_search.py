"""Slices by what they do over text: those whose contexts have some words in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spdcli.measures.harvest_files import Context, SliceInText


@dataclass(frozen=True)
class Match:
    """A slice whose contexts have the words: in so many of its `contexts`, in `at_words` of them at the token that
    counts, which is within the words; `examples` are these contexts, those at the words first."""

    slice: str
    density: float
    contexts: int
    at_words: int
    examples: Sequence[Context]


def matching_slices(slices: Iterable[SliceInText], words: str, top: int) -> list[Match]:
    """The `top` slices whose contexts have `words`, whatever their case: those first that are active at the words
    most often, then those with more such contexts, then the rarer ones."""
    matches = []
    for one in slices:
        found = [context for context in one.examples if words.casefold() in context.text.casefold()]
        if found:
            at = [context for context in found if is_at(context, words)]
            examples = at + [context for context in found if context not in at]
            matches.append(Match(one.slice, one.density, len(found), len(at), examples))
    matches.sort(key=lambda match: (-match.at_words, -match.contexts, match.density))
    return matches[:top]


def is_at(context: Context, words: str) -> bool:
    """Whether the token that counts overlaps an occurrence of `words`."""
    text, wanted = context.text.casefold(), words.casefold()
    first = len("".join(context.tokens[: context.position]).casefold())
    last = len("".join(context.tokens[: context.position + 1]).casefold())
    start = text.find(wanted)
    while start >= 0:
        if start < last and start + len(wanted) > first:
            return True
        start = text.find(wanted, start + 1)
    return False
