"""A target that is somebody's own module, in its setting: the tokens it is decomposed on, as prompts or as a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.target import Batch, Target
from spdcli.errors import UsageError
from spdcli.recipe.schema import Recipe
from spdcli.runs.subject import Subject, some_of
from spdcli.targets.modules import NumberTokenizer
from spdcli.targets.prompts import Prompts, token_text
from spdcli.targets.routes import Route, unchanged

ModuleData = Tensor | Callable[[torch.Generator], Tensor]


def module_subject(recipe: Recipe, target: Target, data: ModuleData, tokenizer: Any = None) -> Subject:
    """The subject of a module's target.

    `data` are token ids `[B, T]`, a fixed set of which a step takes `decompose.batch`; or a function that draws them
    anew for every step from a generator on the processor. Commands and measurements look at the fixed set, or at one
    draw; a sequence's last token counts as its answer. `tokenizer` is one of transformers; without it tokens are
    numbers.
    """
    drawn = data(torch.Generator().manual_seed(recipe.seed)) if callable(data) else data
    whole = _looked_at(recipe, _checked(target, drawn))
    size, device = recipe.decompose.batch, target.device
    fixed = whole.to(device)

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        if callable(data):
            return _looked_at(recipe, _checked(target, data(generator))).to(device)
        return fixed if size >= len(whole.tokens) else some_of(whole, size, generator).to(device)

    length = whole.tokens.shape[1]
    words = tokenizer or NumberTokenizer(len(target.unembedding), length)
    name = lambda token: token_text(words, token)  # noqa: E731
    return Subject(
        target=target,
        batches=batches,
        length=length,
        token_text=name,
        routes={matrix: plain_route(target, matrix) for matrix in target.matrices},
        prompts=numbered_prompts(fixed, words, name),
    )


def _checked(target: Target, tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise UsageError(f"data is a {type(tokens).__name__}", "expected a tensor of token ids [B, T]")
    if not tokens.numel() or tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise UsageError(f"data of shape {tuple(tokens.shape)}", "expected token ids [B, T], at least two a sequence")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(target.unembedding):
        raise UsageError(f"data has token {int(tokens.max())}, but the unembedding has {len(target.unembedding)}")
    return tokens.cpu()


def _looked_at(recipe: Recipe, tokens: Tensor) -> Batch:
    """The losses look at every position, or with `last_token_only` at the last."""
    batch = Batch.everywhere(tokens)
    looked = batch.looked.clone()
    looked[:, :-1] = not recipe.losses.last_token_only
    return replace(batch, looked=looked, answers=tokens[:, -1])


def numbered_prompts(batch: Batch, tokenizer: Any, name: Callable[[int], str]) -> Prompts:
    """Sequences of one length as prompts, whose last token counts as their answer."""
    rows = batch.tokens.tolist()
    pieces = [[name(token) for token in row] for row in rows]
    answer_at = torch.full((len(rows),), batch.tokens.shape[1] - 2)
    texts = ["".join(words).strip() for words in pieces]
    return Prompts(batch, answer_at, texts, pieces, [words[-1] for words in pieces], tokenizer)


def plain_route(target: Target, name: str) -> Route:
    """Labels for matrices that touch the residual stream themselves; a module does not tell its norms."""
    width, matrix = target.embedding.shape[1], target.matrices[name]
    return Route(into=unchanged if matrix.d_in == width else None, out=unchanged if matrix.d_out == width else None)
