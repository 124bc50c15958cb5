"""Causal importance functions: what each matrix's slices are worth at each position (section 4.1, Eq. 4).

Eq. 4 reads `g = σ_H(γ_c(x̄_n))`. The kinds of γ and of what it reads are rows of `part_tables.IMPORTANCE_FUNCTIONS`:

    scalar     one MLP γ_c a slice on its inner activation x . U_c
    vector     one MLP γ_c a slice on the whole input x
    shared     one MLP for all slices of a matrix
    attention  Algorithm 1: attention over the sequence makes x̄ of x, then one MLP γ_c a slice
    global     one transformer reads every matrix's x, then one linear map a slice (`global_importance.py`)

`Importances` gives the values before the sigmoid, `[B, T, C]` a matrix; `leaky_hard_sigmoid` is σ_H, which makes
importances g of them. Letters: M matrices, B sequences, T positions, I d_in, C slices, G gate width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spdcli.engine.attention import importance_attention
from spdcli.engine.gates import scalar_gates, vector_gates
from spdcli.engine.global_importance import GlobalTransformer, at_unit_size
from spdcli.engine.part_tables import ACTIVATIONS, IMPORTANCE_FUNCTIONS

LOCAL_SLOPE = 0.5
MARGIN = 0.125  # how far below 0 and above 1 gates of the start "inner" reach
STEEPNESS = 4.0  # of its hidden units: at 4 gelu(x) + gelu(-x) is |x| to 3e-4
OFF = -1.0  # what a pruned slice has instead of a gate


@dataclass(frozen=True)
class ImportanceSettings:
    """How importance functions are built: the section [importance] of a recipe, but for its `basis`.

    `kind` is a key of `part_tables.IMPORTANCE_FUNCTIONS`; so are `activation`, `normalise`, `relative`,
    `relative_start` and `backend` of the tables of their names. Importances start around `gate_bias`, `gate_spread`
    times as far apart as unit-variance weights would put them; with `start` "inner", for scalar gates, by
    `Importances.start_from`. `relative`, `relative_start` and `backend` are for attention alone, as is `length`, the
    longest sequence (T) that its position tables cover; `layers`, `width` and `heads` are for the global transformer,
    whose MLPs have `gate_width` hidden units; `causal` is for both.
    """

    kind: str
    gate_width: int
    activation: str = "gelu"
    gate_bias: float = 0.5
    gate_spread: float = 1.0
    start: str = "random"
    normalise: str = "none"
    relative: str = "query"
    relative_start: str = "zero"
    causal: bool = False
    backend: str = "auto"
    layers: int = 2
    width: int = 64
    heads: int = 4
    length: int = 0


class _Gates(nn.Module):
    """The last layer that all gates share: `w2` and `b2`, without the slices that are switched off."""

    w2: nn.Parameter
    b2: nn.Parameter

    def last_layer(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """w2 and b2 as if slices that are not `alive` `[C]` always said OFF."""
        return self.w2 * alive, torch.where(alive, self.b2, OFF)


class VectorGates(_Gates):
    """C independent MLPs γ_c, I -> G -> 1, on one shared input.

    Its parameters: w1 `[I, G*C]`, b1 `[G*C]`, w2 `[G, C]`, b2 `[C]`.
    """

    def __init__(self, d_in: int, slices: int, settings: ImportanceSettings) -> None:
        super().__init__()
        width = settings.gate_width
        self.w1 = nn.Parameter(torch.randn(d_in, width * slices) / math.sqrt(d_in))
        self.b1 = nn.Parameter(torch.zeros(width * slices))
        self.w2 = nn.Parameter(settings.gate_spread * torch.randn(width, slices) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.full((slices,), settings.gate_bias))
        self.activation = settings.activation

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        """x `[B, T, I]` and which slices are left, `[C]`, to `[B, T, C]`."""
        flat = vector_gates(x.flatten(0, -2), self.w1, self.b1, *self.last_layer(alive), self.activation)
        return flat.unflatten(0, x.shape[:-1])


class ScalarGates(_Gates):
    """C independent MLPs γ_c, 1 -> G -> 1, each on its own inner activation.

    Its parameters: w1, b1, w2 `[G, C]`, b2 `[C]`, whatever d_in is.
    """

    def __init__(self, d_in: int, slices: int, settings: ImportanceSettings) -> None:
        super().__init__()
        width = settings.gate_width
        self.w1 = nn.Parameter(torch.randn(width, slices))
        self.b1 = nn.Parameter(torch.zeros(width, slices))
        self.w2 = nn.Parameter(settings.gate_spread * torch.randn(width, slices) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.full((slices,), settings.gate_bias))
        self.activation = settings.activation

    @torch.no_grad()
    def start_from(self, largest: Tensor) -> None:
        """γ_c(a) = (1 + 2 MARGIN) |a| / `largest`_c - MARGIN, and off for every a where `largest` `[C]` is 0.

        The first two hidden units make |a| of ±a; the others begin with no say.
        """
        live = largest > 0
        slope = STEEPNESS / torch.where(live, largest, 1.0)
        self.w1[0], self.w1[1] = slope, -slope
        self.w2.zero_()
        self.w2[:2] = torch.where(live, (1 + 2 * MARGIN) / STEEPNESS, 0.0)
        self.b2.fill_(-MARGIN)

    def forward(self, inner: Tensor, alive: Tensor) -> Tensor:
        """inner activations `[B, T, C]` and which slices are left, `[C]`, to `[B, T, C]`."""
        flat = scalar_gates(inner.flatten(0, -2), self.w1, self.b1, *self.last_layer(alive), self.activation)
        return flat.unflatten(0, inner.shape[:-1])


class SharedGates(_Gates):
    """One MLP for all slices, I -> G -> C. Its parameters: w1 `[I, G]`, b1 `[G]`, w2 `[G, C]`, b2 `[C]`."""

    def __init__(self, d_in: int, slices: int, settings: ImportanceSettings) -> None:
        super().__init__()
        width = settings.gate_width
        self.w1 = nn.Parameter(torch.randn(d_in, width) / math.sqrt(d_in))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(settings.gate_spread * torch.randn(width, slices) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.full((slices,), settings.gate_bias))
        self.act = ACTIVATIONS[settings.activation].load().value

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        """x `[B, T, I]` and which slices are left, `[C]`, to `[B, T, C]`."""
        w2, b2 = self.last_layer(alive)
        return self.act(x @ self.w1 + self.b1) @ w2 + b2


class Readout(_Gates):
    """One linear map a slice on what the global transformer gives. Its parameters: w2 `[D, C]`, b2 `[C]`."""

    def __init__(self, width: int, slices: int, settings: ImportanceSettings) -> None:
        super().__init__()
        self.w2 = nn.Parameter(settings.gate_spread * torch.randn(width, slices) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.full((slices,), settings.gate_bias))

    def forward(self, h: Tensor, alive: Tensor) -> Tensor:
        """h `[B, T, D]` and which slices are left, `[C]`, to `[B, T, C]`."""
        w2, b2 = self.last_layer(alive)
        return h @ w2 + b2


class AttentionMixer(nn.Module):
    """Lines 1 to 5 of Algorithm 1, for M matrices of one input width at once: x to x̄ of Eq. 4.

    Its parameters: Q, K, V `[M, 1, I, I]`, AbsPosEnc `[M, 1, length, I]` and RelPosEnc `[M, 2 length - 1, I]`, which is
    multiplied by the query, or `[M, 2 length - 1]`, numbers by themselves (`relative` scalar).
    """

    def __init__(self, matrices: int, d_in: int, settings: ImportanceSettings) -> None:
        super().__init__()
        offsets = 2 * settings.length - 1
        weight = lambda: nn.Parameter(torch.randn(matrices, 1, d_in, d_in) / math.sqrt(d_in))  # noqa: E731
        self.q, self.k, self.v = weight(), weight(), weight()
        self.absolute = nn.Parameter(0.02 * torch.randn(matrices, 1, settings.length, d_in))
        if settings.relative == "query":
            self.relative = nn.Parameter(0.02 * torch.randn(matrices, offsets, d_in))
        else:
            distance = (torch.arange(offsets) - (settings.length - 1)).abs()
            slope = LOCAL_SLOPE * math.sqrt(d_in) if settings.relative_start == "local" else 0.0
            self.relative = nn.Parameter((-slope * distance).repeat(matrices, 1))
        self.causal, self.backend = settings.causal, settings.backend

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """x `[M, B, T, I]` to x̄ `[M, B, T, 2 I]`; `valid` `[B, T]` is False at padding, None where there is none."""
        x_pos = x + self.absolute[:, :, : x.shape[2]]
        q, k, v = x @ self.q, x @ self.k, x_pos @ self.v
        x_mixed = importance_attention(q, k, v, self.relative, self.causal, self.backend, valid)
        return torch.cat([x_mixed, x_pos], dim=-1)


class Importances(nn.Module):
    """The importance functions of every decomposed matrix.

    `widths[m]` is the d_in of matrix m, `slices[m]` its C. With `bases[m]` `[r, I]` (vector gates alone) the gates of
    matrix m read coordinates `x @ bases[m].T` `[B, T, r]`, scaled to mean square 1 over the data: on data inside the
    span of the basis this is the same class of functions with d_in / r times fewer parameters.
    """

    def __init__(
        self,
        widths: dict[str, int],
        slices: dict[str, int],
        settings: ImportanceSettings,
        bases: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.names = list(widths)
        self.bases = nn.ParameterDict()
        if bases is not None:
            self.bases = nn.ParameterDict({_key(n): nn.Parameter(b, requires_grad=False) for n, b in bases.items()})
            widths = {name: bases[name].shape[0] for name in widths}
        self.alive = nn.ParameterDict(
            {
                _key(name): nn.Parameter(torch.ones(slices[name], dtype=torch.bool), requires_grad=False)
                for name in widths
            }
        )
        self.groups: dict[int, list[str]] = {}
        self.function = IMPORTANCE_FUNCTIONS[settings.kind]
        if self.function.attends:
            for name, width in widths.items():
                self.groups.setdefault(width, []).append(name)
        self.mixers = nn.ModuleDict(
            {str(width): AttentionMixer(len(group), width, settings) for width, group in self.groups.items()}
        )
        self.joint = GlobalTransformer(widths, settings) if self.function.joint else None
        gates, times = self.function.load(), 2 if self.function.attends else 1
        reads = {name: settings.width if self.function.joint else times * width for name, width in widths.items()}
        self.gates = nn.ModuleDict({_key(name): gates(reads[name], slices[name], settings) for name in widths})

    def forward(
        self, inputs: dict[str, Tensor], read: dict[str, Tensor], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The gates' values before the sigmoid σ_H, `[B, T, C]` a matrix.

        `inputs[m]` is the matrix's input `[B, T, I]` in the target; `read[m]` is `U` `[I, C]`, which scalar gates use.
        `valid` `[B, T]` is False at padding, which no attention sees; None where there is none.
        """
        x = {name: self._prepared(name, inputs[name]) for name in self.names}
        if self.function.reads_inner:
            x = {name: x[name] @ read[name] for name in self.names}
        for width, group in self.groups.items():
            x_bar = self.mixers[str(width)](torch.stack([x[name] for name in group]), valid)
            x.update(zip(group, x_bar.unbind(0), strict=True))
        if self.joint is not None:
            x = dict.fromkeys(self.names, self.joint(x, valid))
        return {n: self.gates[_key(n)](x[n], self.alive[_key(n)]) for n in self.names}

    @torch.no_grad()
    def start_from(self, inputs: dict[str, Tensor], read: dict[str, Tensor]) -> None:
        """Scalar gates as the start "inner" has them: a slice is on as far as its inner activation reaches towards its
        largest on the data. `inputs[m]` `[n, I]`, `read[m]` is `U` `[I, C]`."""
        for name in self.names:
            inner = self._prepared(name, inputs[name].to(read[name])) @ read[name]
            gates = self.gates[_key(name)]
            assert isinstance(gates, ScalarGates)
            gates.start_from(inner.abs().amax(0))

    def prune(self, frequent: dict[str, Tensor]) -> None:
        """Switch slices off for good: those where `frequent[m]` `[C]` is False."""
        for name, mask in frequent.items():
            self.alive[_key(name)].logical_and_(mask)

    def _prepared(self, name: str, x: Tensor) -> Tensor:
        if self.bases:
            x = x @ self.bases[_key(name)].t()
        if self.settings.normalise == "rms":
            x = at_unit_size(x)
        return x


def _key(name: str) -> str:
    """A matrix's name as a module's: torch allows no dots there."""
    return name.replace(".", "/")


def span_basis(x: Tensor, tolerance: float = 1e-5) -> Tensor:
    """An orthogonal basis `[r, I]` of the span of the rows of x `[n, I]`, r the numerical rank.

    Scaled so that the coordinates `x @ basis.T` have mean square 1.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision has no SVD
    _, values, directions = torch.linalg.svd(x, full_matrices=False)
    rank = int((values > tolerance * values[0]).sum())
    basis = directions[:rank]
    return basis / (x @ basis.t()).square().mean().sqrt()
