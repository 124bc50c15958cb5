"""The evaluation of a language model on its prompts: active slices by token, and what they still predict.

Section 6.2 counts 96 active subcomponents of GPT-2 on two prompts: `total_active` here. The two that are unique to
the name in the first MLP, `spd inspect` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import log_probabilities
from spdcli.measures.evaluation_data import (
    attacked_prompts,
    in_parts,
    looked_numbers,
    measured_prompts,
    with_importances,
)
from spdcli.measures.evaluation_totals import Evaluation, Sums
from spdcli.measures.evidence import CornerSums, search_masks
from spdcli.measures.evidence_choices import MaskSearch
from spdcli.measures.mean import Mean
from spdcli.measures.target_and_masked import TargetAndMasked
from spdcli.measures.target_share import ShareSums, TargetShare
from spdcli.progress import Report, counted, silent
from spdcli.records import ABSENT, Absent
from spdcli.runs.subject import Subject
from spdcli.targets.prompts import Prompts


@dataclass(frozen=True)
class AnswerProbability:
    """The probability of one prompt's `answer`, of the target and of the model of active slices alone."""

    prompt: str
    answer: str
    target: float
    masked: float


@dataclass(frozen=True, kw_only=True)
class LanguageEvaluation(Evaluation):
    """`spd.eval/2` of a language model: `active_at` counts active slices by matrix and `prompt:position`.

    Prompts are counted from 1, in the order of `prompts`, and positions from 0, as everywhere.

    `prompts` are the texts that it was measured on, by `measured_on`: "prompts", all of the run's or some, or "held-out
    text", which nothing was trained on; they have so many `tokens`. `cross_entropy` of the text is in nats a token;
    `accuracy` is the share of prompts whose answer is the most likely token; `answers` has its probability, prompt by
    prompt. `attention_kl` is empty: a language model's own kernels keep no attention pattern. `grounding` is how far
    active slices are parts of the target.
    """

    active_at: Mapping[str, Mapping[str, int]]
    cross_entropy: TargetAndMasked[float]
    attention_kl: Sequence[float]
    accuracy: TargetAndMasked[float]
    answers: Sequence[AnswerProbability]
    grounding: TargetShare
    measured_on: str | Absent = ABSENT  # of what was recorded before text, as those below
    tokens: int | Absent = ABSENT
    prompts: Sequence[str] | Absent = ABSENT


def evaluate_language_model(
    subject: Subject,
    decomposition: Decomposition,
    threshold: float,
    seed: int,
    adversary: MaskSearch,
    sequences: int | None = None,
    report: Report = silent,
) -> LanguageEvaluation:
    """A language model on so many `sequences` of its prompts or its held-out text (see `measured_prompts`), a part of
    them at a time: memory does not grow with their number."""
    prompts = measured_prompts(subject, sequences, seed)
    sums = Sums.start(subject.target, decomposition, threshold, seed)
    corners, shares, predictions = CornerSums(subject, decomposition), ShareSums(), PredictionSums()
    active_at: dict[str, dict[str, int]] = {}
    count = 0
    for part in counted(list(in_parts(subject, prompts)), "parts of the texts", report):
        ((clean, g),) = with_importances(part, decomposition, 0, seed)
        sums.add(clean, g)
        corners.subject = part
        corners.add(clean, g)
        masks = importance_masks(g, decomposition.delta)
        masked = log_probabilities(masked_logits(subject.target, decomposition, clean, masks))
        assert part.prompts is not None
        predictions.add(part.prompts, TargetAndMasked(clean.log_probs, masked))
        shares.add(subject.target, decomposition, clean, g, threshold)
        for name, places in _active_by_place(clean, g, threshold, count + 1).items():
            active_at.setdefault(name, {}).update(places)
        count += len(clean.batch.tokens)
    attacked = replace(subject, prompts=attacked_prompts(subject, prompts))
    found = search_masks(attacked, decomposition, adversary, count, seed, report)
    return LanguageEvaluation(
        seed=seed,
        threshold=threshold,
        **sums.totals(),
        evidence=corners.evidence(sums.reconstruction, found),
        active_at=active_at,
        measured_on="prompts" if subject.held_out_prompts is None else "held-out text",
        tokens=sums.positions,
        prompts=prompts.texts,
        cross_entropy=predictions.cross_entropy,
        attention_kl=[],
        accuracy=predictions.accuracy,
        answers=predictions.answers,
        grounding=shares.total(),
    )


def _active_by_place(clean: Clean, g: Mapping[str, Tensor], threshold: float, first: int) -> dict[str, dict[str, int]]:
    """How many slices are active at each real position: matrix -> `prompt:position` -> count; prompts are numbered from
    `first`."""
    places = clean.batch.valid.nonzero().tolist()
    counts = {name: (values > threshold).sum(-1).tolist() for name, values in g.items()}
    return {
        name: {f"{first + prompt}:{position}": rows[prompt][position] for prompt, position in places}
        for name, rows in counts.items()
    }


@dataclass
class PredictionSums:
    """How well both models predict the text of prompts, part by part; what comes out is as in `LanguageEvaluation`."""

    surprise: TargetAndMasked[Mean] = field(default_factory=lambda: TargetAndMasked(Mean(), Mean()))
    right: TargetAndMasked[Mean] = field(default_factory=lambda: TargetAndMasked(Mean(), Mean()))
    answers: list[AnswerProbability] = field(default_factory=list)

    def add(self, prompts: Prompts, log_probs: TargetAndMasked[Tensor]) -> None:
        """Some prompts, and the log-probabilities `[n, N]` of both models at their n looked-at positions."""
        batch = prompts.batch
        assert batch.answers is not None
        answers = batch.answers
        following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], dim=1)
        rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
        answer_at = prompts.answer_at.to(rows.device)
        following[rows, answer_at] = answers
        # An answer that is fed ends its prompt: nothing follows it.
        known = batch.looked & (torch.arange(batch.tokens.shape[1], device=rows.device) <= answer_at[:, None])
        numbers = looked_numbers(batch.looked)
        place, next_token, at_answer = numbers[known], following[known], numbers[rows, answer_at]
        chances = []
        for values, surprise, right in (
            (log_probs.target, self.surprise.target, self.right.target),
            (log_probs.masked, self.surprise.masked, self.right.masked),
        ):
            surprise.add(-values[place, next_token])
            right.add(values[at_answer].argmax(-1).eq(answers).float())
            chances.append(values[at_answer, answers].exp().tolist())
        self.answers += [
            AnswerProbability(*each) for each in zip(prompts.texts, prompts.answer_texts, *chances, strict=True)
        ]

    @property
    def cross_entropy(self) -> TargetAndMasked[float]:
        return TargetAndMasked(self.surprise.target.value, self.surprise.masked.value)

    @property
    def accuracy(self) -> TargetAndMasked[float]:
        return TargetAndMasked(self.right.target.value, self.right.masked.value)
