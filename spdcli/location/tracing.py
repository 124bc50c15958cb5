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
T tokens, L blocks, S draws, R rows of a batch, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.edits.facts_file import load_facts
from spdcli.engine.forward import clean_pass
from spdcli.engine.interchange import KINDS, STATE, Interchange, Recorded, Site, interchanged_run, recorded_run
from spdcli.engine.target import Batch, Target
from spdcli.errors import UsageError
from spdcli.location.subject_prompts import SubjectPrompt, subject_prompts
from spdcli.progress import Progress, Report, silent
from spdcli.targets.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_BYTES = 2.0**28  # of activations at once; larger chunks leave the processor's cache
ON_SUBJECT, AFTER = "subject", "after"  # where a site is


@dataclass(frozen=True)
class TraceSettings:
    """`noise` in standard deviations; `sigma` one of them (None: of the embedding matrix); `window` in blocks."""

    noise: float = 3.0
    sigma: float | None = None
    samples: int = 10
    window: int = 10
    seed: int = 0


@dataclass(frozen=True)
class SiteGrid:
    """All sites of one kind, `[T][L]`: P(answer) when the site is restored, the effect, and its standard error."""

    probability: list[list[float]]
    effect: list[list[float]]
    standard_error: list[list[float]]


@dataclass(frozen=True)
class BestSite:
    """The site of one kind with the largest mean effect, among the subject's tokens or after them (`where`).

    `layer` is the middle of its window and `layers` the first and the last block of it; `reverse` is P(answer) of the
    clean run with the corrupted piece put in at this site.
    """

    kind: str
    where: str
    position: int
    layer: int
    layers: tuple[int, int]
    effect: float
    standard_error: float
    reverse: float


@dataclass(frozen=True)
class Trace:
    """What causal tracing finds in one prompt: one entry of `spd.trace/1`.

    `clean` and `corrupted` (a mean over draws) are P(answer). `sigma` is the standard deviation that the noise is
    counted in; `sites` has a grid for every kind of site. Standard errors are of means over draws, nan of one draw.
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    subject: tuple[int, ...]
    sigma: float
    clean: float
    corrupted: float
    corrupted_standard_error: float
    sites: dict[str, SiteGrid]
    best: list[BestSite]

    @property
    def raised(self) -> bool:
        """Whether noise made the answer likelier: there is nothing to restore then, and effects say nothing."""
        return self.corrupted > self.clean

    def best_site(self, kind: str, where: str) -> BestSite:
        """The best site of one kind among the subject's tokens, or after them."""
        return next(site for site in self.best if (site.kind, site.where) == (kind, where))


@dataclass(frozen=True, eq=False)
class CleanAndCorrupted:
    """A prompt's clean run (one row) and its corrupted ones (S rows), and what the blocks were called with."""

    target: Target
    answer: int
    calls: list[tuple[tuple, dict]]
    clean: Recorded
    corrupted: Recorded

    def answers(self, hidden: Tensor) -> Tensor:
        """P(answer) `[R]`, float64, of rows `[R, T, D]` after the last block."""
        return self.target.log_probabilities(hidden[:, -1])[:, self.answer].double().exp()


def embedding_sigma(target: Target) -> float:
    """The standard deviation of the token embeddings' elements, as they enter the stream."""
    return target.embedding.double().std().item() * target.embedding_scale


def window_of(block: int, window: int, blocks: int) -> tuple[int, int]:
    """The first and the last block of the window around `block`."""
    return max(0, block - window // 2), min(blocks - 1, block + (window - 1) // 2)


def site_at(kind: str, token: int, block: int, window: int, blocks: int) -> Site:
    """The site of one kind at a token and a block, which is the middle of its window."""
    first, last = (block, block) if kind == STATE else window_of(block, window, blocks)
    return Site(kind, token, first, last)


def clean_and_corrupted(
    target: Target, prompt: SubjectPrompt, sigma: float, settings: TraceSettings
) -> CleanAndCorrupted:
    """The clean and the corrupted runs of a prompt; a seed always draws the same noise."""
    if not target.parts:
        raise UsageError("causal tracing needs a language model")
    tokens = prompt.tokens[None].to(target.device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    clean = clean_pass(target, Batch(tokens, real, real), ())
    entering = clean.entries[0]
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.samples, len(prompt.subject), entering.shape[-1])
    noise = settings.noise * sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    corrupted = entering.repeat(settings.samples, 1, 1)
    corrupted[:, list(prompt.subject)] += noise.to(entering)
    calls = clean.calls
    return CleanAndCorrupted(
        target, prompt.answer, calls, recorded_run(target, calls, entering), recorded_run(target, calls, corrupted)
    )


def all_sites(tokens: Sequence[int], blocks: int, window: int) -> list[Site]:
    """Every kind of site at every (token, block), in that order; two blocks of one window are two equal sites."""
    return [
        site_at(kind, token, block, window, blocks) for kind in KINDS for token in tokens for block in range(blocks)
    ]


def row_bytes(target: Target, positions: int) -> float:
    """About how many bytes one row of `positions` tokens needs at the moment when it needs most.

    These are the outputs of all matrices of the widest block with a few copies of the residual stream, and the answer's
    distribution over the vocabulary in float64.
    """
    widths = [0] * len(target.blocks)
    for matrix in target.matrices.values():
        widths[matrix.block] += matrix.d_out
    vocabulary, width = target.unembedding.shape
    return target.unembedding.element_size() * positions * (8.0 * width + max(widths)) + 24.0 * vocabulary


def patched_answers(
    runs: CleanAndCorrupted, base: Recorded, source: Recorded, sites: Sequence[Site], text: str, report: Report = silent
) -> Tensor:
    """P(answer) `[sites, S]` of the run `base` when its piece at a site is replaced by that of the run `source`.

    Each site is replaced by itself, and once for every draw of the noise. `base` is the clean run and `source` the
    corrupted one, or the other way round; the one row of the clean run is paired with the row of every draw.
    `text` is what `report` hears.
    """
    draws = len(runs.corrupted.states[0])
    distinct = list(dict.fromkeys(sorted(sites, key=lambda site: site.entry)))
    row = lambda run, draw: 0 if run is runs.clean else draw  # noqa: E731
    interchanges = [Interchange(site, row(base, d), row(source, d)) for site in distinct for d in range(draws)]
    size = max(1, int(CHUNK_BYTES // row_bytes(runs.target, runs.clean.states[0].shape[1])))
    answers = []
    for start in range(0, len(interchanges), size):
        chunk = interchanges[start : start + size]
        answers.append(runs.answers(interchanged_run(runs.target, runs.calls, base, source, chunk)))
        report(Progress(text, min(start + size, len(interchanges)), len(interchanges)))
    by_site = torch.cat(answers).view(len(distinct), draws)
    place = {site: number for number, site in enumerate(distinct)}
    return by_site[[place[site] for site in sites]]


def trace(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    subjects: Sequence[str] = (),
    settings: TraceSettings | None = None,
    begin_token: bool | None = None,
    report: Report = silent,
) -> list[Trace]:
    """Causal tracing of each of `texts`, whose last token is its answer and is not fed.

    `subjects` are words to corrupt, and those that the shipped facts name come after them (see `subject_prompts`);
    `begin_token` feeds the tokenizer's begin-of-sequence token first (see `encode`). UsageError for a target that is no
    language model, and for a text without a subject.
    """
    prompts = encode(tokenizer, list(texts), "held_out", begin_token)
    about = subject_prompts(prompts, subjects, load_facts().subjects())
    return [trace_prompt(target, prompt, settings or TraceSettings(), report) for prompt in about]


def trace_prompt(target: Target, prompt: SubjectPrompt, settings: TraceSettings, report: Report = silent) -> Trace:
    """Every site of one prompt restored, one by one. UsageError for a target that is no language model."""
    sigma = embedding_sigma(target) if settings.sigma is None else settings.sigma
    runs = clean_and_corrupted(target, prompt, sigma, settings)
    length, blocks, start = len(prompt.tokens), len(target.blocks), min(prompt.subject)
    sites = all_sites(range(start, length), blocks, settings.window)
    restored = patched_answers(runs, runs.corrupted, runs.clean, sites, prompt.text, report).cpu()
    corrupted = runs.answers(runs.corrupted.states[-1]).cpu()
    effects = (restored - corrupted).view(len(KINDS), length - start, blocks, settings.samples)
    before_subject = effects.new_zeros(len(KINDS), start, blocks, settings.samples)
    grids = torch.cat([before_subject, effects], dim=1)
    mean, error = grids.mean(-1), standard_error(grids)
    return Trace(
        prompt=prompt.text,
        answer=prompt.answer_text,
        tokens=prompt.pieces,
        subject=prompt.subject,
        sigma=sigma,
        clean=runs.answers(runs.clean.states[-1]).item(),
        corrupted=corrupted.mean().item(),
        corrupted_standard_error=standard_error(corrupted).item(),
        sites={
            kind: SiteGrid((corrupted.mean() + mean[number]).tolist(), mean[number].tolist(), error[number].tolist())
            for number, kind in enumerate(KINDS)
        },
        best=best_sites(runs, prompt, settings.window, mean, error),
    )


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over the last dimension; nan of a single draw."""
    count = draws.shape[-1]
    return draws.std(-1) / math.sqrt(count) if count > 1 else draws.new_full(draws.shape[:-1], math.nan)


def best_sites(
    runs: CleanAndCorrupted, prompt: SubjectPrompt, window: int, mean: Tensor, error: Tensor
) -> list[BestSite]:
    """The best site of every kind, on the subject and after it; `mean` and `error` are `[kinds, T, L]`."""
    last, blocks = max(prompt.subject), mean.shape[2]
    groups = {ON_SUBJECT: list(prompt.subject), AFTER: list(range(last + 1, mean.shape[1]))}
    places = []
    for number, kind in enumerate(KINDS):
        for where, tokens in groups.items():
            if tokens:
                row, block = divmod(int(mean[number, tokens].argmax()), blocks)
                places.append((number, kind, where, tokens[row], block))
    sites = [site_at(kind, token, block, window, blocks) for _, kind, _, token, block in places]
    reverse = patched_answers(runs, runs.clean, runs.corrupted, sites, prompt.text).mean(1).tolist()
    return [
        BestSite(
            kind=kind,
            where=where,
            position=token,
            layer=block,
            layers=(site.first, site.last),
            effect=mean[number, token, block].item(),
            standard_error=error[number, token, block].item(),
            reverse=p,
        )
        for (number, kind, where, token, block), site, p in zip(places, sites, reverse, strict=True)
    ]
