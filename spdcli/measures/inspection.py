"""Slices at a token: which are active, how strongly, for this prompt alone or not, and what they read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.labels import TokenLens
from spdcli.runs.subject import Subject
from spdcli.targets.sequences import find_toy_token, induction_batch, toy_tokens

TOY_SEQUENCES = 4


@dataclass(frozen=True, eq=False)
class Texts:
    """Sequences to look at: `batch`, and for people the text and the tokens of each; `find` finds a token's places."""

    batch: Batch
    texts: list[str]
    pieces: list[list[str]]
    find: Callable[[str], list[tuple[int, int]]]


def own_texts(subject: Subject, seed: int) -> Texts:
    """The prompts a language model was decomposed on, or a few seeded sequences of the toy."""
    if subject.prompts is not None:
        return _language_texts(subject.prompts)
    assert subject.toy is not None
    shape = subject.toy.shape
    generator = torch.Generator().manual_seed(seed)
    return _toy_texts(subject, induction_batch(TOY_SEQUENCES, shape.length, shape.vocabulary, generator))


def given_texts(subject: Subject, prompts: Sequence[str], begin_token: bool) -> Texts:
    """Texts of the user's own, fed whole. For the toy a text is its tokens, as in `3 s 17 4 s`.

    Raises UsageError for a text of the toy that it cannot take.
    """
    if subject.prompts is not None:
        from spdcli.targets.prompts import encode

        made = _language_texts(encode(subject.prompts.tokenizer, list(prompts), "fed", begin_token))
    else:
        assert subject.toy is not None
        rows = [toy_tokens(text, subject.toy.shape.vocabulary) for text in prompts]
        if len({len(row) for row in rows}) > 1:
            raise UsageError("the toy's prompts must be of one length")
        if len(rows[0]) > subject.length:
            raise UsageError(f"{len(rows[0])} tokens, but the toy takes {subject.length}", "give a shorter prompt")
        tokens = torch.tensor(rows)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        made = _toy_texts(subject, Batch(tokens, everywhere, everywhere))
    return made


def _language_texts(prompts: Any) -> Texts:
    from spdcli.targets.prompts import find_token

    return Texts(prompts.batch, prompts.texts, prompts.pieces, lambda query: find_token(prompts, query))


def _toy_texts(subject: Subject, batch: Batch) -> Texts:
    pieces = [[subject.token_text(token) for token in row] for row in batch.tokens.tolist()]
    vocabulary = subject.toy.shape.vocabulary  # type: ignore[union-attr]
    return Texts(
        batch, [" ".join(row) for row in pieces], pieces, lambda query: find_toy_token(pieces, query, vocabulary)
    )


@torch.no_grad()
def importances_of(subject: Subject, decomposition: Decomposition, batch: Batch) -> tuple[dict, dict]:
    """Importances g and inner activations x U of every matrix on `batch`, `[B, T, C]` each, 0 at padding.

    Raises UsageError for a text that the importance functions cannot see: too long for the run's attention tables.
    """
    batch = batch.to(subject.target.device)
    limit = decomposition.importances.settings.length
    if decomposition.importances.settings.kind == "attention" and batch.tokens.shape[1] > limit:
        raise UsageError(
            f"{batch.tokens.shape[1]} tokens, but this run's importance attention covers {limit}",
            "give a shorter prompt",
        )
    clean = clean_pass(subject.target, batch, decomposition.names)
    g, _ = decomposition.importance(clean.inputs, clean.padding)
    real = batch.valid[..., None]
    inner = {name: (clean.inputs[name] @ decomposition.of(name).U) * real for name in g}
    return {name: values * real for name, values in g.items()}, inner


def active_in(g: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Whether each slice is active anywhere in each sequence, `[B, C]` bool a matrix."""
    return {name: (values > threshold).any(1) for name, values in g.items()}


@dataclass(frozen=True)
class Query:
    """What `spd inspect` asks: a token (None: every position), matrices, how many slices and labels, a threshold."""

    token: str | None
    matrices: tuple[str, ...] = ("*",)
    top: int = 20
    labels: int = 5
    threshold: float = 0.0


def inspect_slices(
    subject: Subject, decomposition: Decomposition, own: Texts, shown: Texts, query: Query
) -> dict[str, Any]:
    """The occurrences of a token in `shown` with their active slices (contract `spd.inspect/1`), and a heat a prompt.

    A slice is unique to a prompt when it is active in no other one, of those shown and of the run's `own`. Slices are
    ordered by importance, unique ones first, then by the norm of what they write; `active` counts those that `top`
    leaves out too. `heat[prompt]` is the sum of importances a position.
    """
    g, inner = importances_of(subject, decomposition, shown.batch)
    chosen = matching(list(g), query.matrices)
    if query.token is None:
        places = [(row, position) for row, position in shown.batch.valid.nonzero().tolist()]
    else:
        places = shown.find(query.token)
    unique = _unique(subject, decomposition, own, shown, g, query.threshold)
    lens = TokenLens(subject.target, subject.routes, subject.token_text)
    occurrences = [
        {
            "prompt": row,
            "text": shown.texts[row],
            "position": position,
            "token": shown.pieces[row][position],
            "active": sum(int((g[name][row, position] > query.threshold).sum()) for name in chosen),
            "slices": _slices_at(decomposition, g, inner, unique, chosen, (row, position), query),
        }
        for row, position in places
    ]
    _label([entry for occurrence in occurrences for entry in occurrence["slices"]], decomposition, lens, query.labels)
    heat = torch.stack([g[name].sum(-1) for name in chosen]).sum(0)
    lengths = [len(tokens) for tokens in shown.pieces]
    rows = sorted({row for row, _ in places})
    return {
        "token": query.token,
        "occurrences": occurrences,
        "heat": [{"prompt": r, "tokens": shown.pieces[r], "importance": heat[r, : lengths[r]].tolist()} for r in rows],
    }


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The matrices among a run's `names` that one of `patterns` matches; UsageError where there is none."""
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise UsageError(
            f"no decomposed matrix matches {' or '.join(repr(p) for p in patterns)}",
            f"the run has {', '.join(names[:6])}{' …' if len(names) > 6 else ''}",
        )
    return chosen


def _unique(
    subject: Subject,
    decomposition: Decomposition,
    own: Texts,
    shown: Texts,
    g: Mapping[str, Tensor],
    threshold: float,
) -> dict[str, Tensor]:
    """Whether each slice is active in this prompt and no other, `[B, C]` bool a matrix."""
    here = active_in(g, threshold)
    counts = {name: active.sum(0) for name, active in here.items()}
    others = [row for row, text in enumerate(own.texts) if text not in shown.texts]
    if own is not shown and others:
        elsewhere, _ = importances_of(subject, decomposition, own.batch.select(torch.tensor(others)))
        counts = {name: counts[name] + active.sum(0) for name, active in active_in(elsewhere, threshold).items()}
    return {name: active & (counts[name] == 1) for name, active in here.items()}


def _slices_at(
    decomposition: Decomposition,
    g: Mapping[str, Tensor],
    inner: Mapping[str, Tensor],
    unique: Mapping[str, Tensor],
    names: Sequence[str],
    place: tuple[int, int],
    query: Query,
) -> list[dict[str, Any]]:
    """The active slices at one place, most important first."""
    row, position = place
    found: list[tuple[float, bool, float, str, int]] = []
    for name in names:
        here = g[name][row, position]
        written = inner[name][row, position].abs() * decomposition.of(name).V.norm(dim=1)
        found += [
            (here[c].item(), bool(unique[name][row, c]), written[c].item(), name, c)
            for c in (here > query.threshold).nonzero()[:, 0].tolist()
        ]
    found.sort(key=lambda entry: (-entry[0], not entry[1], -entry[2]))
    return [
        {
            "slice": f"{name}:{index}",
            "importance": importance,
            "unique": alone,
            "activation": inner[name][row, position, index].item(),
        }
        for importance, alone, _, name, index in found[: query.top]
    ]


def _label(entries: Sequence[dict[str, Any]], decomposition: Decomposition, lens: TokenLens, top: int) -> None:
    """Add to every entry the tokens that its slice promotes and reads, for the sign of its activation.

    One product with the vocabulary a matrix, however many of its slices are shown, and wherever.
    """
    by_matrix: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_matrix.setdefault(entry["slice"].rpartition(":")[0], []).append(entry)
    for name, own in by_matrix.items():
        slices = decomposition.of(name)
        index = torch.tensor([int(entry["slice"].rpartition(":")[2]) for entry in own], device=slices.U.device)
        signs = torch.tensor([-1.0 if entry["activation"] < 0 else 1.0 for entry in own], device=slices.U.device)
        promoted = lens.promotes(name, slices.V[index], top, signs)
        read = lens.reads(name, slices.U[:, index], top, signs)
        for entry, promotes, reads in zip(own, promoted, read, strict=True):
            entry |= {"promotes": promotes, "reads": reads}
