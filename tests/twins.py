"""Slow, obvious references that the tests compare the engine with, and the tiny targets they run on.

Nothing here is clever: loops where the engine has kernels, whole models where the engine replays blocks, formed
matrices where the engine multiplies factors. Float64 throughout, so that a difference is a mistake and not rounding.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from spdcli.engine.importance import Importances, ImportanceSettings
from spdcli.engine.loss_settings import LossSettings
from spdcli.engine.losses import RECONSTRUCTION
from spdcli.engine.masks import Noise
from spdcli.engine.subcomponents import Decomposition, start_slices
from spdcli.engine.tables import LOSSES, SOURCES
from spdcli.engine.target import Batch, Target
from spdcli.engine.variants import Piece, Variant
from spdcli.targets.feature_toys import TMS, ResidMLP, ResidMLPShape, TMSShape, feature_target
from spdcli.targets.induction import InductionToy, ToyShape, toy_target

ROUNDING = 1e-10  # float64 has 16 digits; sums of some hundred terms of mixed sign lose a few of them


def close(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """Equal up to `tolerance` of the largest element: what is left of rounding after sums that cancel."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item() + 1e-300)


def gradients(value: Tensor, weights: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of `value`, so that no two elements of it count alike."""
    return torch.autograd.grad((value * weights).sum(), leaves)


def attention_loop(
    q: Tensor, k: Tensor, v: Tensor, relative: Tensor, causal: bool, valid: Tensor | None = None
) -> Tensor:
    """Line 4 of Algorithm 1, one query and one key at a time; keys where `valid` `[B, T]` is False are left out."""
    middle = (relative.shape[1] - 1) // 2
    out = torch.zeros_like(v)
    for m, b, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = [j for j in range(i + 1 if causal else k.shape[2]) if valid is None or valid[b, j]]
        scores = []
        for j in keys:
            bias = relative[m, middle + j - i]
            bias = bias if relative.dim() == 2 else q[m, b, i] @ bias
            scores.append((q[m, b, i] @ k[m, b, j] + bias) / math.sqrt(q.shape[-1]))
        weights = torch.stack(scores).softmax(0)
        place = torch.zeros_like(v)
        place[m, b, i] = 1
        out = out + place * sum(weight * v[m, b, j] for weight, j in zip(weights, keys, strict=True))
    return out


class Watch(TorchDispatchMode):
    """Watches all memory that is allocated inside it: `largest` bytes of one tensor, `peak` bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary(ref_type=weakref.ref)
        self.alive = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        weakref.finalize(storage, self.forget, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

    def forget(self, size: int) -> None:
        self.alive -= size


# A coefficient for every loss that is made of variants, whatever the table has, and for the two that are not. Masks of
# adversaries depend on the slices as they stand: `test_adversary.py` has them.
DRAWN = [name for name in RECONSTRUCTION if not LOSSES[name].ascended]
COEFFICIENTS = dict(zip(DRAWN, cycle((0.5, 0.3, 2, 1, 0.7, 3)), strict=False)) | {
    "minimality": 0.02,
    "frequency": 0.03,
    "faithfulness": 5,
    "relative_faithfulness": 0.4,
}


@dataclass(eq=False)
class Subject:
    """A tiny target in float64; `logits` runs the whole model on one unpadded sequence `[1, n]`: `[n, N]`, which are
    output vectors where the target gives no logits."""

    target: Target
    logits: Callable[[Tensor], Tensor]
    batch: Batch


def toy_subject(sequences: int = 3, length: int = 7, **shape) -> Subject:
    """A random toy; width 8, vocabulary 10 and the s token."""
    torch.manual_seed(5)
    toy = InductionToy(ToyShape(d_model=8, vocabulary=10, length=length, **shape)).double()
    tokens = torch.randint(11, (sequences, length))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    return Subject(toy_target(toy), lambda t: toy(t)[0], Batch(tokens, valid, valid))


def feature_subject(kind: str) -> Subject:
    """A random toy of 6 sparse features on 4 inputs of 3 positions: `tms` with an identity, `resid_mlp` twice."""
    torch.manual_seed(7)
    toy = {
        "tms": lambda: TMS(TMSShape(features=6, hidden=3, identity=True)),
        "resid_mlp": lambda: ResidMLP(ResidMLPShape(features=6, d_model=8, d_mlp=5, layers=2)),
    }[kind]().double()
    return Subject(feature_target(toy), lambda x: toy(x)[0], Batch.everywhere(torch.randn(4, 3, 6).double()))


def language_subject(folder: Path, split_attention: bool = False) -> Subject:
    """A saved tiny language model, on three random prompts of 6, 3 and 5 tokens, padded with token 0."""
    from spdcli.targets.huggingface import build_target, load_model

    language_model = load_model(str(folder), "float64")
    for module in language_model.model.modules():
        if hasattr(module, "variance_epsilon"):  # the Llama family rounds to float32 here
            module.forward = exact_norm(module)
    target = build_target(language_model, split_attention)
    lengths = torch.tensor([6, 3, 5])
    valid = torch.arange(6) < lengths[:, None]
    drawn = torch.randint(target.unembedding.shape[0], valid.shape, generator=torch.Generator().manual_seed(6))
    tokens = torch.where(valid, drawn, 0)
    return Subject(target, lambda t: language_model.model(t, use_cache=False).logits[0], Batch(tokens, valid, valid))


def exact_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A root-mean-square norm without the detour through float32."""
    return lambda x: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def looked_at(batch: Batch, which: str) -> Batch:
    """The batch with its losses at `all` real positions, at the `last` of every sequence, or at `some`, and nowhere in
    sequence 1."""
    looked = batch.valid.clone()
    if which == "last":
        looked[:, :-1] &= ~batch.valid[:, 1:]
    if which == "some":
        looked[:, 1::2] = False
        looked[1] = False
    return Batch(batch.tokens, batch.valid, looked)


def decompose(
    target: Target, names: Sequence[str] | None = None, slices: int = 5, delta: bool = True, seed: int = 0, **importance
) -> Decomposition:
    """Random slices and random importance functions, whose values fall on both sides of 0 and of 1."""
    torch.manual_seed(seed)
    matrices = {name: target.matrices[name] for name in names or target.matrices}
    settings = ImportanceSettings(**{"kind": "vector", "gate_width": 3, "length": 9} | importance)
    importances = Importances({n: m.d_in for n, m in matrices.items()}, dict.fromkeys(matrices, slices), settings)
    made = Decomposition(start_slices(matrices, slices, "random", None, seed), importances, delta)
    return made.to(target.unembedding.dtype)


class KeyedNoise(Noise):
    """Random numbers that depend on the variant, the matrix and the sequence alone, however a plan is cut.

    A variant is known by its loss, its matrices and which of the plan's variants with the same of both it is.
    """

    def __init__(self, sequences: int, seed: int = 0) -> None:
        self.sequences, self.seed = sequences, seed
        self.seen: dict[tuple, list[Variant]] = defaultdict(list)

    def __call__(self, out: Tensor, piece: Piece, name: str, kind: str) -> None:
        out.copy_(self.whole(piece.variant, name, kind, out.shape[1:])[piece.start : piece.stop])

    def whole(self, variant: Variant, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        """The numbers for all sequences, `[B, *shape]`."""
        key = (variant.loss, *sorted(variant.matrices))
        if variant not in self.seen[key]:
            self.seen[key].append(variant)
        words = "|".join([*key, str(self.seen[key].index(variant)), name, kind])
        generator = torch.Generator().manual_seed(self.seed + sum(ord(c) * 31**i % 2**40 for i, c in enumerate(words)))
        return torch.rand(self.sequences, *shape, generator=generator, dtype=torch.float64)


@contextmanager
def hooks(modules: Mapping[nn.Module, Callable]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrix_inputs(subject: Subject, tokens: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """What every matrix reads when the target runs on `tokens` `[1, n]`, and its logits."""
    inputs: dict[nn.Module, Tensor] = {}
    modules = {subject.target.matrices[name].module for name in names}
    keep = lambda module, args, output: inputs.__setitem__(module, args[0])  # noqa: E731
    with torch.no_grad(), hooks(dict.fromkeys(modules, keep)):
        logits = subject.logits(tokens)
    return {name: inputs[subject.target.matrices[name].module] for name in names}, logits


def heard(subject: Subject, tokens: Tensor, names: Iterable[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the matrices `names` give on tokens `[1, n]`, `[n, O]`, and the hidden states `[n, D]` before every block
    and after the last one, with whatever is swapped in at the time."""
    gave: dict[nn.Module, Tensor] = {}
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        gave[module] = output[0]

    def enter(module: nn.Module, args: tuple, output: Tensor) -> None:
        states.append(args[0][0])
        if module is subject.target.blocks[-1]:
            states.append((output[0] if isinstance(output, tuple) else output)[0])

    matrices = [subject.target.matrices[name] for name in names]
    with hooks({matrix.module: keep for matrix in matrices} | dict.fromkeys(subject.target.blocks, enter)):
        subject.logits(tokens)
    return {matrix.name: matrix.covered(gave[matrix.module]) for matrix in matrices}, states


Masks = Mapping[str, tuple[Tensor, Tensor, Tensor]]


def swapped(target: Target, decomposition: Decomposition, masks: Masks):
    """While open, a matrix with mask `m` `[n, C]`, delta mask `d` `[n]` and `where` `[n]` answers with
    `x (sum_c m_c U_c V_c + d (W - U V))`, a matrix of its own formed for every position."""
    parts = defaultdict(list)
    for name in masks:
        parts[target.matrices[name].module].append(target.matrices[name])

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        changed = output.clone()
        for matrix in parts[module]:
            m, d, where = masks[matrix.name]
            U, V = decomposition.of(matrix.name).U, decomposition.of(matrix.name).V
            formed = torch.einsum("ic,nc,co->nio", U, m, V) + d[:, None, None] * (matrix.weight - U @ V)
            out = torch.einsum("ni,nio->no", args[0][0], formed) + (0 if matrix.bias is None else matrix.bias)
            changed = matrix.with_covered(changed, torch.where(where[:, None], out, matrix.covered(output))[None])
        return changed

    return hooks(dict.fromkeys(parts, hook))


def filled(variant: Variant, name: str, kind: str, width: int, batch: Batch, noise: Noise) -> Tensor:
    """The numbers `[B, T, width]` by which a variant's source moves its masks, or the delta's masks."""
    out = torch.full((*batch.valid.shape, width), torch.nan, dtype=torch.float64)
    SOURCES[variant.source].load()(out, Piece(variant, 0, len(out)), name, kind, noise)
    return out


def one_by_one(
    subject: Subject,
    decomposition: Decomposition,
    settings: LossSettings,
    p: float,
    variants: Sequence[Variant],
    noise: KeyedNoise,
) -> dict[str, Tensor]:
    """All losses of a step, with their gradients sent backward, as the paper writes them: every variant on every
    sequence is one run of the whole model, without padding. A loss is the mean over its variants and positions."""
    target, batch = subject.target, subject.batch
    divergences: dict[Variant, list[Tensor]] = {variant: [] for variant in variants}
    hidden_errors: dict[Variant, list[Tensor]] = {variant: [] for variant in variants}
    costs = []
    penalty = {
        "power": lambda g, p: (g + settings.epsilon) ** p - settings.epsilon**p,
        "smooth_l0": lambda g, gamma: 1 - gamma**2 / (g**2 + gamma**2),
    }[settings.penalty]
    for b in range(len(batch.tokens)):
        real = batch.valid[b]
        tokens = batch.tokens[b, real][None]
        inputs, logits = matrix_inputs(subject, tokens, decomposition.names)
        clean_outputs, clean_states = heard(subject, tokens, decomposition.names)
        lower, upper = decomposition.importance(inputs)
        costs.append(torch.cat([penalty(g[0], p) for g in upper.values()], -1))
        for variant in variants:
            masks = {}
            for name in variant.matrices:
                g = lower[name][0]
                m, d = g, torch.zeros(len(g), dtype=g.dtype)
                if SOURCES[variant.source].code:
                    m = g + (1 - g) * filled(variant, name, "mask", g.shape[-1], batch, noise)[b, real]
                    if decomposition.delta:
                        d = filled(variant, name, "delta", 1, batch, noise)[b, real, 0]
                if variant.delta is not None and decomposition.delta:
                    d = torch.full_like(d, variant.delta)
                where = torch.ones(len(g), dtype=torch.bool)
                if variant.routed is not None:
                    where = variant.routed[name][b, real]
                masks[name] = (m, d, where)
            with swapped(target, decomposition, masks):
                changed = subject.logits(tokens)
                if variant.hidden:
                    outputs, states = heard(subject, tokens, variant.matrices)
                    if settings.hidden_at == "matrix":
                        gaps = [
                            ((outputs[name] - clean_outputs[name])[where], clean_outputs[name][where])
                            for name, (_, _, where) in masks.items()
                        ]
                    else:
                        gaps = [
                            (states[at + 1] - clean_states[at + 1], clean_states[at + 1] - clean_states[variant.entry])
                            for at in {target.matrices[name].block for name in variant.matrices}
                        ]
                    for gap, scale in gaps:
                        sizes = scale.norm(dim=-1).square()
                        if settings.hidden_scale == "sequence" and len(sizes):
                            sizes = torch.full_like(sizes, sizes.mean())
                        hidden_errors[variant].append(gap.norm(dim=-1).square() / sizes)
            if target.output_loss == "mse":
                divergence = ((changed - logits) ** 2).mean(-1)
            else:
                log_p, log_q = logits.log_softmax(-1), changed.log_softmax(-1)
                first, second = (log_q, log_p) if settings.reverse_kl else (log_p, log_q)
                divergence = (first.exp() * (first - second)).sum(-1)
            divergences[variant].append(divergence[batch.looked[b, real]])
    by_loss = defaultdict(list)
    for variant, pieces in divergences.items():
        if variant.compares_outputs:
            by_loss[variant.loss].append(torch.cat(pieces).mean())
        if variant.hidden:
            by_loss[variant.hidden].append(torch.cat(hidden_errors[variant]).mean())
    losses = {loss: torch.stack(values).mean() for loss, values in by_loss.items()}
    often = torch.cat(costs).mean(0)  # of every slice of every matrix
    losses["minimality"] = often.sum()
    losses["frequency"] = (often * torch.log1p(settings.frequency_tokens * often)).sum() / math.log(2)
    chosen = [(target.matrices[name].weight, decomposition.of(name)) for name in decomposition.names]
    errors = sum((weight - slices.U @ slices.V).square().sum() for weight, slices in chosen)
    losses["faithfulness"] = errors / sum(weight.numel() for weight, _ in chosen)
    shares = [((weight - slices.U @ slices.V).norm() / weight.norm()) ** 2 for weight, slices in chosen]
    losses["relative_faithfulness"] = sum(shares) / len(shares)
    sum(settings.coefficients.get(name, 0) * loss for name, loss in losses.items()).backward()
    return {name: loss.detach() for name, loss in losses.items()}
