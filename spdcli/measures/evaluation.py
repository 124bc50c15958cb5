"""What a decomposition is worth: active slices, reconstruction, attention (Table 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spdcli.engine.forward import Clean, clean_pass, masked_logits
from spdcli.engine.losses import attention_divergence
from spdcli.engine.masks import Noise, importance_masks
from spdcli.engine.step import exact_faithfulness, reconstruction
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.tables import losses_where
from spdcli.engine.target import Batch, Target
from spdcli.engine.variants import Variant, draw_variants
from spdcli.measures.target_share import grounding
from spdcli.runs.subject import Subject
from spdcli.targets.induction import InductionToy, recorded_patterns
from spdcli.targets.sequences import POSITION_CLASSES, induction_batch

LOSSES = losses_where(lambda loss: loss.in_grid and loss.reported)
EVALUATION_SEED = 20_000_003  # its own stream: never the sequences of training
SEQUENCES_AT_ONCE = 512
PLAN_BYTES = 2 * 2**30


@dataclass
class Mean:
    """A mean over sequences and its standard error, fed in batches."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """One value a sequence."""
        wide = values.double()
        self.count += values.numel()
        self.total += wide.sum().item()
        self.squares += wide.square().sum().item()

    @property
    def value(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for fewer than two sequences."""
        if self.count < 2:
            return math.nan
        spread = max(0.0, self.squares / self.count - self.value**2)
        return math.sqrt(spread / (self.count - 1))


@dataclass
class Tally:
    """What `evaluate` gathers over batches."""

    reconstruction: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    by_matrix: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    attention: dict[int, Mean] = field(default_factory=lambda: defaultdict(Mean))
    attention_split: dict[tuple[int, str], Mean] = field(default_factory=lambda: defaultdict(Mean))
    seen: dict[str, Tensor] = field(default_factory=dict)  # matrix -> [C] bool: active somewhere
    class_active: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    class_positions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@torch.no_grad()
def evaluate(
    subject: Subject, decomposition: Decomposition, sequences: int, threshold: float, seed: int
) -> dict[str, Any]:
    """Everything `spd eval` reports, as in the contract of `spd.eval/1` but for the run's name.

    The toy is measured on `sequences` fresh sequences, a language model on its prompts. A slice is active where
    its importance is above `threshold`. Losses are in nats; every number of `metrics` has its standard error over
    sequences.
    """
    tally = Tally()
    noise = Noise(torch.Generator(subject.target.device).manual_seed(seed))
    found: dict[str, Any] = {}
    for batch in evaluation_batches(subject, sequences, seed):
        clean = clean_pass(subject.target, batch, decomposition.names)
        g, _ = decomposition.importance(clean.inputs, clean.padding)
        _count_active(tally, g, batch, threshold)
        _reconstruct(tally, subject.target, decomposition, clean, g, noise)
        logits = masked_logits(subject.target, decomposition, clean, importance_masks(g, decomposition.delta))
        if subject.toy is not None:
            _compare_attention(tally, subject, decomposition, clean, g)
            assert batch.answers is not None
            last = _numbered(batch.looked)[batch.classes["s2"]]
            tally.right["target"] += int((clean.log_probs[last].argmax(-1) == batch.answers).sum())
            tally.right["masked"] += int((logits[last].argmax(-1) == batch.answers).sum())
        else:
            found = _language_results(subject, clean, g, logits.log_softmax(-1), threshold)
            found["grounding"] = grounding(subject.target, decomposition, clean, g, threshold)
    return _summary(tally, subject, decomposition) | found


def evaluation_batches(subject: Subject, sequences: int, seed: int) -> Iterator[Batch]:
    """A language model's prompts, or `sequences` fresh ones of the toy, never those of training."""
    if subject.toy is None:
        assert subject.prompts is not None
        yield subject.prompts.batch
        return
    shape = subject.toy.shape
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        count = min(SEQUENCES_AT_ONCE, sequences - start)
        yield induction_batch(count, shape.length, shape.vocabulary, generator).to(subject.target.device)


def _count_active(tally: Tally, g: Mapping[str, Tensor], batch: Batch, threshold: float) -> None:
    for name, values in g.items():
        active = (values > threshold) & batch.valid[..., None]
        somewhere = active.flatten(0, 1).any(0)
        tally.seen[name] = somewhere | tally.seen.get(name, torch.zeros_like(somewhere))
        for kind, mask in batch.classes.items():
            tally.class_active[name, kind] += int(active[mask].sum())
    for kind, mask in batch.classes.items():
        tally.class_positions[kind] += int(mask.sum())


def _reconstruct(
    tally: Tally, target: Target, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor], noise: Noise
) -> None:
    """The four reconstruction losses of Table 1, a mean over looked-at positions for every sequence."""
    blocks = {name: target.matrices[name].block for name in decomposition.names}
    count = len(clean.batch.tokens)
    looked = clean.batch.looked
    owner = looked.nonzero()[:, 0]
    per_sequence = {loss: torch.zeros(count, device=target.device) for loss in LOSSES}

    def consume(variant: Variant, part: slice, divergence: Tensor) -> None:
        rows = owner[(owner >= part.start) & (owner < part.stop)]
        means = torch.zeros(count, device=target.device).index_add_(0, rows, divergence.float())
        means = (means / looked.sum(1).clamp(min=1))[part]
        per_sequence[variant.loss][part] += variant.weight * means
        if variant.loss == "recon_layerwise":
            tally.by_matrix[next(iter(variant.matrices))].add(means)

    shape = (count, clean.batch.tokens.shape[1])
    variants = draw_variants(LOSSES, blocks, 1, "forward", shape, torch.Generator())
    reconstruction(target, decomposition, clean, variants, g, noise, PLAN_BYTES, consume)
    for loss, values in per_sequence.items():
        tally.reconstruction[loss].add(values)


def attention_patterns(
    toy: InductionToy, target: Target, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention log-probabilities `[B, H, T, T]` of every layer: of the target, and with importances g as masks."""
    with recorded_patterns(toy) as patterns:
        target.run(clean.batch.tokens)
        original = patterns.copy()
        patterns.clear()
        masked_logits(target, decomposition, clean, importance_masks(g, decomposition.delta))
        masked = patterns.copy()
    # Blocks before the first decomposed one are not run again: their attention is the target's.
    return original, original[: len(original) - len(masked)] + masked


def queries_that_matter(layers: int) -> dict[int, str]:
    """The position class whose attention the induction circuit lives by: m in the first layer, s2 in the last.

    Section 6.1: m must attend to s1, then s2 to m. What other queries attend to changes nothing at the last position,
    so that a decomposition which looks only there is free to give them any pattern.
    """
    return {0: "m", layers - 1: "s2"}


def _compare_attention(
    tally: Tally, subject: Subject, decomposition: Decomposition, clean: Clean, g: Mapping[str, Tensor]
) -> None:
    """KL of each layer's attention, target against masked model, mean over heads and queries; and by queries."""
    assert subject.toy is not None
    original, masked = attention_patterns(subject.toy, subject.target, decomposition, clean, g)
    matter = queries_that_matter(len(original))
    for layer, (log_p, log_q) in enumerate(zip(original, masked, strict=True)):
        divergence = attention_divergence(log_p, log_q).mean(1)  # [B, T]
        tally.attention[layer].add(divergence.mean(1))
        own = clean.batch.classes[matter[layer]] if layer in matter else torch.zeros_like(clean.batch.valid)
        for name, chosen in (("matters", own), ("rest", ~own)):
            if bool(chosen.any()):
                tally.attention_split[layer, name].add((divergence * chosen).sum(1) / chosen.sum(1))


def _numbered(looked: Tensor) -> Tensor:
    """`[B, T]`: the number of every position that is looked at, in order."""
    return looked.flatten().cumsum(0).sub(1).view_as(looked)


def _language_results(
    subject: Subject, clean: Clean, g: Mapping[str, Tensor], masked: Tensor, threshold: float
) -> dict[str, Any]:
    """Active slices a prompt's position, and how well target and masked model predict the text."""
    prompts = subject.prompts
    assert prompts is not None
    batch = prompts.batch
    following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], dim=1)
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    answer_at = prompts.answer_at.to(rows.device)
    assert batch.answers is not None
    following[rows, answer_at] = batch.answers
    # An answer that is fed ends its prompt: nothing follows it.
    known = batch.looked & (torch.arange(batch.tokens.shape[1], device=rows.device) <= answer_at[:, None])
    numbers = _numbered(batch.looked)
    place, wanted, at_answer = numbers[known], following[known], numbers[rows, answer_at]
    answers = batch.answers
    log_probs = {"target": clean.log_probs, "masked": masked}
    active = {
        name: {
            f"{prompt}:{position}": int((values[prompt, position] > threshold).sum())
            for prompt, position in batch.valid.nonzero().tolist()
        }
        for name, values in g.items()
    }
    return {
        "active": active,
        "cross_entropy": {k: -v[place, wanted].mean().item() for k, v in log_probs.items()},
        "attention_kl": [],  # a language model's own kernels keep no attention pattern
        "accuracy": {k: v[at_answer].argmax(-1).eq(answers).float().mean().item() for k, v in log_probs.items()},
        "answers": [
            {
                "prompt": prompts.texts[row],
                "answer": prompts.answer_texts[row],
                **{k: v[at_answer[row], answers[row]].exp().item() for k, v in log_probs.items()},
            }
            for row in range(len(rows))
        ],
    }


def _summary(tally: Tally, subject: Subject, decomposition: Decomposition) -> dict[str, Any]:
    unique = {name: int(seen.sum()) for name, seen in tally.seen.items()}
    means = {loss: tally.reconstruction[loss] for loss in LOSSES}
    result: dict[str, Any] = {
        "sequences": tally.reconstruction["recon"].count,
        "unique": unique,
        "total_active": sum(unique.values()),
        "total_slices": sum(seen.numel() for seen in tally.seen.values()),
        "metrics": {"faithfulness": exact_faithfulness(subject.target, decomposition).item()}
        | {loss: mean.value for loss, mean in means.items()},
        "standard_error": {"faithfulness": 0.0} | {loss: mean.error for loss, mean in means.items()},
        "recon_layerwise_by_matrix": {name: mean.value for name, mean in tally.by_matrix.items()},
    }
    if subject.toy is not None:
        count = result["sequences"]
        result["active"] = {
            name: {kind: tally.class_active[name, kind] / tally.class_positions[kind] for kind in POSITION_CLASSES}
            for name in decomposition.names
        }
        result["attention_kl"] = [mean.value for _, mean in sorted(tally.attention.items())]
        split = tally.attention_split
        result["attention_kl_split"] = [
            {"layer": layer + 1}
            | {kind: split[layer, kind].value if (layer, kind) in split else None for kind in ("matters", "rest")}
            for layer in sorted(tally.attention)
        ]
        result["accuracy"] = {kind: right / count for kind, right in tally.right.items()}
    return result
