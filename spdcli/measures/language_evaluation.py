"""The evaluation of a language model on its prompts: active slices by token, and what they still predict.

Section 6.2 counts 96 active subcomponents of GPT-2 on two prompts: `total_active` here. The two that are unique to
the name in the first MLP, `spd inspect` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.subcomponents import Decomposition
from spdcli.measures.evaluation_data import looked_numbers, with_importances
from spdcli.measures.evaluation_totals import Evaluation, Sums
from spdcli.measures.evidence import CornerSums, search_masks
from spdcli.measures.evidence_choices import MaskSearch
from spdcli.measures.target_and_masked import TargetAndMasked
from spdcli.measures.target_share import TargetShare, target_share
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
    """`spd.eval/1` of a language model: `active` by matrix and `prompt:position`, both counted from 0.

    `cross_entropy` of the text is in nats a token; `accuracy` is the share of prompts whose answer is the most likely
    token; `answers` has its probability, prompt by prompt. `attention_kl` is empty: a language model's own kernels
    keep no attention pattern. `grounding` is how far active slices are parts of the target.
    """

    cross_entropy: TargetAndMasked[float]
    attention_kl: Sequence[float]
    accuracy: TargetAndMasked[float]
    answers: Sequence[AnswerProbability]
    grounding: TargetShare


def evaluate_language_model(
    subject: Subject, decomposition: Decomposition, threshold: float, seed: int, adversary: MaskSearch
) -> LanguageEvaluation:
    """A language model on its prompts, which are one batch."""
    assert subject.prompts is not None
    sums = Sums.start(subject.target, decomposition, threshold, seed)
    ((clean, g),) = with_importances(subject, decomposition, 0, seed)
    sums.add(clean, g)
    corners = CornerSums(subject, decomposition)
    corners.add(clean, g)
    found = search_masks(subject, decomposition, adversary, len(clean.batch.tokens), seed)
    masks = importance_masks(g, decomposition.delta)
    masked = masked_logits(subject.target, decomposition, clean, masks).log_softmax(-1)
    predictions = _predictions(subject.prompts, TargetAndMasked(clean.log_probs, masked))
    return LanguageEvaluation(
        seed=seed,
        threshold=threshold,
        **sums.totals(),
        evidence=corners.evidence(sums.reconstruction, found),
        active=_active_by_place(clean, g, threshold),
        cross_entropy=predictions.cross_entropy,
        attention_kl=[],
        accuracy=predictions.accuracy,
        answers=predictions.answers,
        grounding=target_share(subject.target, decomposition, clean, g, threshold),
    )


def _active_by_place(clean: Clean, g: Mapping[str, Tensor], threshold: float) -> dict[str, dict[str, int]]:
    """How many slices are active at each real position: matrix -> `prompt:position` -> count."""
    places = clean.batch.valid.nonzero().tolist()
    return {
        name: {f"{prompt}:{position}": int((values[prompt, position] > threshold).sum()) for prompt, position in places}
        for name, values in g.items()
    }


@dataclass(frozen=True)
class Predictions:
    """How well both models predict the text of the prompts; fields as in `LanguageEvaluation`."""

    cross_entropy: TargetAndMasked[float]
    accuracy: TargetAndMasked[float]
    answers: Sequence[AnswerProbability]


def _predictions(prompts: Prompts, log_probs: TargetAndMasked[Tensor]) -> Predictions:
    """From the log-probabilities `[n, N]` of both models at the n looked-at positions."""
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

    def cross_entropy(values: Tensor) -> float:
        return -values[place, next_token].mean().item()

    def accuracy(values: Tensor) -> float:
        return values[at_answer].argmax(-1).eq(answers).float().mean().item()

    def probability(values: Tensor, row: int) -> float:
        return values[at_answer[row], answers[row]].exp().item()

    target, masked = log_probs.target, log_probs.masked
    return Predictions(
        TargetAndMasked(cross_entropy(target), cross_entropy(masked)),
        TargetAndMasked(accuracy(target), accuracy(masked)),
        [
            AnswerProbability(
                prompts.texts[row], prompts.answer_texts[row], probability(target, row), probability(masked, row)
            )
            for row in range(len(rows))
        ],
    )
