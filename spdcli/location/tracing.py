"""Causal tracing (Meng et al., 2022; the paper's Figures 7 and 8): which places of a run restore a corrupted fact.

    corrupted   the subject's tokens get Gaussian noise, `noise` standard deviations of the embedding matrix's elements
                (its mean taken off), where they enter the first block; `samples` draws
    restored    the corrupted run, with one clean piece put back at one token: what leaves a block (state), what the
                MLPs or what the attention of a window of blocks write (mlp, attention)
    effect      the indirect effect: P(answer) restored − P(answer) corrupted, draw by draw
    reverse     the same piece the other way round: the clean run, into which the corrupted piece is put

Noise goes into the stream as it enters the first block; adding it to the token embeddings, before positions, is the
same sum. Tokens before the subject are the same in all runs, and so have no effect. The window of `window` blocks
around block l is l − window // 2 to l + (window − 1) // 2, cut off at the model's ends.
T tokens, L blocks, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcli.edits.answer_changes import log_probabilities
from spdcli.engine.forward import clean_pass
from spdcli.engine.interchange import KINDS, STATE, Patch, Recorded, Site, patched_run, recorded_run
from spdcli.engine.target import Batch, Target
from spdcli.errors import UsageError
from spdcli.targets.prompts import Prompts, find_spans, listing

CHUNK_BYTES = 2.0**28  # of activations at once; larger chunks leave the processor's cache
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class TraceSettings:
    """`noise` in standard deviations; `sigma` one of them (None: of the embedding matrix); `window` in blocks."""

    noise: float = 3.0
    sigma: float | None = None
    samples: int = 10
    window: int = 10
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt to trace: `tokens` `[T]` that are fed, the `answer` that the last of them predicts, and the positions
    of the `subject`."""

    tokens: Tensor
    answer: int
    subject: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Runs:
    """A question's clean run (one row), its corrupted ones (S rows), and what their blocks were called with."""

    target: Target
    answer: int
    calls: list[tuple[tuple, dict]]
    clean: Recorded
    corrupted: Recorded

    def answers(self, hidden: Tensor) -> Tensor:
        """P(answer) `[R]`, float64, of rows `[R, T, D]` after the last block."""
        return log_probabilities(self.target, hidden[:, -1])[:, self.answer].exp()


def embedding_sigma(target: Target) -> float:
    """The standard deviation of the token embeddings' elements."""
    return target.embedding.double().std().item()


def window_of(block: int, window: int, blocks: int) -> tuple[int, int]:
    """The first and the last block of the window around `block`."""
    return max(0, block - window // 2), min(blocks - 1, block + (window - 1) // 2)


def open_runs(target: Target, question: Question, sigma: float, settings: TraceSettings) -> Runs:
    """The clean and the corrupted runs; the same seed gives the same noise whatever else is asked."""
    if not target.parts:
        raise UsageError("causal tracing needs a language model")
    tokens = question.tokens[None].to(target.device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    clean = clean_pass(target, Batch(tokens, real, real), ())
    entering = clean.entries[0]
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.samples, len(question.subject), entering.shape[-1])
    noise = settings.noise * sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    corrupted = entering.repeat(settings.samples, 1, 1)
    corrupted[:, list(question.subject)] += noise.to(entering)
    calls = clean.calls
    return Runs(
        target, question.answer, calls, recorded_run(target, calls, entering), recorded_run(target, calls, corrupted)
    )


def all_sites(tokens: Sequence[int], blocks: int, window: int) -> list[Site]:
    """Every kind of site at every (token, block), in that order; equal windows stay apart."""
    sites = []
    for kind in KINDS:
        for token in tokens:
            for block in range(blocks):
                reach = (block, block) if kind == STATE else window_of(block, window, blocks)
                sites.append(Site(kind, token, *reach))
    return sites


def row_bytes(target: Target, positions: int) -> float:
    """What one row takes at once, roughly: all outputs of the widest block, and log-probabilities in float64."""
    widths = [0] * len(target.blocks)
    for matrix in target.matrices.values():
        widths[matrix.block] += matrix.d_out
    vocabulary, width = target.unembedding.shape
    return target.unembedding.element_size() * positions * (8.0 * width + max(widths)) + 24.0 * vocabulary


def patched_answers(
    runs: Runs, base: Recorded, source: Recorded, sites: Sequence[Site], progress: Progress | None = None
) -> Tensor:
    """P(answer) `[sites, S]` with the piece at each site of `source` put into `base`, in every draw.

    One of the two runs is the clean one, whose only row goes with each of the other's. Equal sites are run once.
    """
    draws = len(runs.corrupted.states[0])
    distinct = list(dict.fromkeys(sorted(sites, key=lambda site: site.entry)))
    row = lambda run, draw: 0 if run is runs.clean else draw  # noqa: E731
    patches = [Patch(site, row(base, d), row(source, d)) for site in distinct for d in range(draws)]
    size = max(1, int(CHUNK_BYTES // row_bytes(runs.target, runs.clean.states[0].shape[1])))
    answers = []
    for start in range(0, len(patches), size):
        chunk = patches[start : start + size]
        answers.append(runs.answers(patched_run(runs.target, runs.calls, base, source, chunk)))
        if progress is not None:
            progress(min(start + size, len(patches)), len(patches))
    found = torch.cat(answers).view(len(distinct), draws)
    place = {site: number for number, site in enumerate(distinct)}
    return found[[place[site] for site in sites]]


def trace(
    target: Target, question: Question, settings: TraceSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """One prompt's part of `spd.trace/1`: the grids `[T][L]` of every kind of site, and the best sites.

    Standard errors are those of the mean over draws; nan for a single draw.
    """
    sigma = embedding_sigma(target) if settings.sigma is None else settings.sigma
    runs = open_runs(target, question, sigma, settings)
    length, blocks, start = len(question.tokens), len(target.blocks), min(question.subject)
    sites = all_sites(range(start, length), blocks, settings.window)
    restored = patched_answers(runs, runs.corrupted, runs.clean, sites, progress).cpu()
    corrupted = runs.answers(runs.corrupted.states[-1]).cpu()
    effects = (restored - corrupted).view(len(KINDS), length - start, blocks, settings.samples)
    unmoved = effects.new_zeros(len(KINDS), start, blocks, settings.samples)
    grids = torch.cat([unmoved, effects], dim=1)
    mean, error = grids.mean(-1), standard_error(grids)
    return {
        "sigma": sigma,
        "clean": runs.answers(runs.clean.states[-1]).item(),
        "corrupted": corrupted.mean().item(),
        "corrupted_standard_error": standard_error(corrupted).item(),
        "sites": {
            kind: {
                "probability": (corrupted.mean() + mean[number]).tolist(),
                "effect": mean[number].tolist(),
                "standard_error": error[number].tolist(),
            }
            for number, kind in enumerate(KINDS)
        },
        "best": best_sites(runs, question, settings.window, mean, error),
    }


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over the last dimension."""
    count = draws.shape[-1]
    return draws.std(-1) / math.sqrt(count) if count > 1 else draws.new_full(draws.shape[:-1], math.nan)


def best_sites(runs: Runs, question: Question, window: int, mean: Tensor, error: Tensor) -> list[dict[str, Any]]:
    """The site with the largest mean effect of every kind, among the subject's tokens and among those after it.

    `mean` and `error` are `[kinds, T, L]`. `reverse` is P(answer) in the clean run with the corrupted piece put in.
    """
    last, blocks = max(question.subject), mean.shape[2]
    groups = {"subject": list(question.subject), "after": list(range(last + 1, mean.shape[1]))}
    found: list[dict[str, Any]] = []
    sites = []
    for number, kind in enumerate(KINDS):
        for where, tokens in groups.items():
            if not tokens:
                continue
            row, block = divmod(int(mean[number, tokens].argmax()), blocks)
            token = tokens[row]
            reach = (block, block) if kind == STATE else window_of(block, window, blocks)
            sites.append(Site(kind, token, *reach))
            effect, uncertain = mean[number, token, block].item(), error[number, token, block].item()
            place = {"kind": kind, "where": where, "position": token, "layer": block, "layers": list(reach)}
            found.append(place | {"effect": effect, "standard_error": uncertain})
    reverse = patched_answers(runs, runs.clean, runs.corrupted, sites).mean(1).tolist()
    return [entry | {"reverse": p} for entry, p in zip(found, reverse, strict=True)]


def find_questions(prompts: Prompts, subjects: Sequence[str], known: Sequence[str] = ()) -> list[Question]:
    """Every prompt and where its subject is: all occurrences of the first of `subjects`, then `known`, that it has.

    `prompts` hold their answers out. Raises UsageError for one of `subjects` that is in no prompt, and for a prompt
    without a subject.
    """
    for subject in subjects:
        if not any(subject_positions(prompts, number, subject) for number in range(len(prompts.texts))):
            raise UsageError(f"no prompt has the subject {subject!r} as whole tokens", listing(prompts))
    assert prompts.batch.answers is not None
    questions = []
    for number, text in enumerate(prompts.texts):
        places = [subject_positions(prompts, number, subject) for subject in [*subjects, *known]]
        own = next((positions for positions in places if positions), None)
        if own is None:
            raise UsageError(f"which words of {text!r} are its subject?", "give them, as in --subject 'Kobe Bryant'")
        questions.append(Question(torch.tensor(prompts.fed(number)), int(prompts.batch.answers[number]), own))
    return questions


def subject_positions(prompts: Prompts, number: int, subject: str) -> tuple[int, ...]:
    """The positions of all occurrences of `subject` in one prompt."""
    words = subject.strip()
    spans = find_spans(prompts, number, words) if words else []
    return tuple(sorted({position for span in spans for position in span}))
