"""Importance functions against a loop over slices; sigmoids by hand; spans, padding, pruning."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from twins import Watch, attention_loop, close, gradients

from spdcli.engine.importance import Importances, ImportanceSettings, span_basis
from spdcli.engine.part_tables import ACTIVATIONS, IMPORTANCE_FUNCTIONS
from spdcli.engine.sigmoid import leaky_hard_sigmoid

WIDTHS = {"h.0.a": 4, "h.0.b": 6, "h.1.c": 4}  # two matrices share a width, and so a mixer
SLICES = {"h.0.a": 3, "h.0.b": 2, "h.1.c": 5}
B, T, LONGEST = 2, 5, 7
KINDS = sorted(IMPORTANCE_FUNCTIONS)


def build(kind, **settings):
    torch.manual_seed(0)
    small = {"kind": kind, "gate_width": 3, "length": LONGEST, "width": 8, "heads": 2, "layers": 2}
    settings = ImportanceSettings(**small | settings)
    return Importances(WIDTHS, SLICES, settings).double()


def data():
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    inputs = {name: make(B, T, width) for name, width in WIDTHS.items()}
    return inputs, {name: make(width, SLICES[name]) for name, width in WIDTHS.items()}


def gate_loop(gate, c, read, activation):
    """One slice's MLP on what it reads, a vector."""
    act = getattr(F, activation)
    slices = gate.w2.shape[1]
    own = slice(c, None, slices)  # unit g of slice c is column g * C + c
    return act(read @ gate.w1[:, own] + gate.b1[own]) @ gate.w2[:, c] + gate.b2[c]


def turn_loop(x):
    """A head's coordinates `[T, K]`: k and k + K/2 are a point in a plane, turned by t / 10000^(2 k / K) radians."""
    half = x.shape[-1] // 2
    points = torch.complex(x[:, :half], x[:, half:])
    turns = torch.tensor([[t / 10000 ** (k / half) for k in range(half)] for t in range(len(x))], dtype=torch.float64)
    points = points * torch.polar(torch.ones_like(turns), turns)
    return torch.cat([points.real, points.imag], -1)


def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def transformer_loop(joint, inputs, activation, causal, valid):
    """The global transformer, a sequence, a head and a query at a time; keys that are padding are left out."""
    act = getattr(F, activation)
    h = sum(unit(x) @ joint.embeddings[name.replace(".", "/")] for name, x in inputs.items()) / len(inputs) ** 0.5
    for layer in joint.layers:
        mixed = []
        for b in range(B):
            heads = []
            for part in (unit(h[b]) @ layer.qkv).split(h.shape[-1] // layer.heads, -1):
                heads.append(part)
            q, k, v = heads[: layer.heads], heads[layer.heads : 2 * layer.heads], heads[2 * layer.heads :]
            own = []
            for q_head, k_head, v_head in zip(map(turn_loop, q), map(turn_loop, k), v, strict=True):
                rows = []
                for i in range(T):
                    keys = [j for j in range(T) if (j <= i if causal else valid is None or valid[b, j])]
                    weights = (k_head[keys] @ q_head[i] / q_head.shape[-1] ** 0.5).softmax(0)
                    rows.append(weights @ v_head[keys])
                own.append(torch.stack(rows))
            mixed.append(torch.cat(own, -1))
        h = h + torch.stack(mixed) @ layer.out
        h = h + act(unit(h) @ layer.w1 + layer.b1) @ layer.w2
    return unit(h)


def slow(importances, inputs, read, kind, activation, causal, valid):
    """Eq. 4 and its simpler kin, for one slice at one position at a time."""
    act = getattr(F, activation)
    out = {}
    if kind == "global":
        h = transformer_loop(importances.joint, inputs, activation, causal, valid)
        gates = {name: importances.gates[name.replace(".", "/")] for name in WIDTHS}
        return {name: h @ gate.w2 + gate.b2 for name, gate in gates.items()}
    for name in WIDTHS:
        x, gate = inputs[name], importances.gates[name.replace(".", "/")]
        if kind == "attention":
            mixer = importances.mixers[str(WIDTHS[name])]
            at = [other for other in WIDTHS if WIDTHS[other] == WIDTHS[name]].index(name)
            placed = x + mixer.absolute[at, 0, :T]
            q, k, v = x @ mixer.q[at, 0], x @ mixer.k[at, 0], placed @ mixer.v[at, 0]
            mixed = attention_loop(q[None], k[None], v[None], mixer.relative[at][None], causal, valid)[0]
            x = torch.cat([mixed, placed], -1)
        columns = []
        for c in range(SLICES[name]):
            if kind in ("vector", "attention"):
                columns.append(gate_loop(gate, c, x, activation))
            elif kind == "shared":
                columns.append(act(x @ gate.w1 + gate.b1) @ gate.w2[:, c] + gate.b2[c])
            else:
                inner = (x * read[name][:, c]).sum(-1, keepdim=True)
                columns.append(act(inner * gate.w1[:, c] + gate.b1[:, c]) @ gate.w2[:, c] + gate.b2[c])
        out[name] = torch.stack(columns, -1)
    return out


CASES = [
    *((kind, "scalar", False) for kind in KINDS),
    ("attention", "query", False),
    ("attention", "query", True),
    ("global", "scalar", True),
]


@pytest.mark.parametrize(("kind", "relative", "causal"), CASES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("lengths", [None, (5, 3)])
def test_every_kind_slice_by_slice(lengths, kind, relative, causal, activation):
    importances = build(kind, relative=relative, causal=causal, activation=activation, gate_bias=0.25)
    for name, parameter in importances.named_parameters():
        if name.endswith(("b1", "b2", "relative")):  # constants at the start, which would hide a transposed table
            torch.nn.init.normal_(parameter)
    inputs, read = data()
    valid = None if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    out = importances(inputs, read, valid)
    expected = slow(importances, inputs, read, kind, activation, causal, valid)
    leaves = [
        *(p for p in importances.parameters() if p.requires_grad),
        *inputs.values(),
        *(read.values() if kind == "scalar" else ()),
    ]
    flat, wanted = (torch.cat([values[name].flatten() for name in WIDTHS]) for values in (out, expected))
    close(flat, wanted)
    weights = torch.randn_like(flat)
    for a, b in zip(gradients(flat, weights, leaves), gradients(wanted, weights, leaves), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("x", "value", "raising", "lowering"),
    # Descent raises x where the gradient is -1. Below 0 only that leaks through; above 1 nothing does.
    [(-0.5, 0, -0.01, 0), (0.0, 0, -1, 1), (0.3, 0.3, -1, 1), (1.0, 1, -1, 1), (1.5, 1, 0, 0)],
)
def test_importances_for_masks(x, value, raising, lowering):
    for gradient, expected in ((-1.0, raising), (1.0, lowering)):
        leaf = torch.tensor(x, requires_grad=True)
        out, _ = leaky_hard_sigmoid(leaf)
        out.backward(torch.tensor(gradient))
        assert out.item() == pytest.approx(value)
        assert leaf.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize(("x", "value", "slope"), [(-0.5, 0, 0), (0.3, 0.3, 1), (1.5, 1.005, 0.01), (3.0, 1.02, 0.01)])
def test_importances_for_minimality(x, value, slope):
    leaf = torch.tensor(x, requires_grad=True)
    _, out = leaky_hard_sigmoid(leaf)
    out.backward()
    assert out.item() == pytest.approx(value)
    assert leaf.grad.item() == pytest.approx(slope)


def test_both_importances_together():
    """Their gradients add up, whichever are asked for."""
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    down = torch.tensor([-1.0, 2.0, 3.0, -4.0, 5.0], dtype=torch.float64)
    up = torch.tensor([7.0, -11.0, 13.0, 17.0, 19.0], dtype=torch.float64)
    lower, upper = leaky_hard_sigmoid(x)
    (lower * down + upper * up).sum().backward()
    assert x.grad.tolist() == pytest.approx([-0.01, 2 - 11, 3 + 13, -4 + 17, 0.19])


def reach(importances, position):
    """Which positions' values change when the inputs change at `position`."""
    inputs, read = data()
    before = importances(inputs, read)
    other = {name: x.detach().clone() for name, x in inputs.items()}
    for x in other.values():
        x[:, position] += 1
    after = importances(other, read)
    changed = [(before[name] != after[name]).any(-1).any(0) for name in WIDTHS]
    assert all((c == changed[0]).all() for c in changed)
    return changed[0].tolist()


@pytest.mark.parametrize("kind", ["scalar", "vector", "shared"])
def test_without_attention_a_position_sees_itself_alone(kind):
    assert reach(build(kind), 2) == [False, False, True, False, False]


def test_attention_sees_the_whole_sequence_or_what_came_before():
    assert reach(build("attention"), 2) == [True] * 5
    assert reach(build("attention", causal=True), 2) == [False, False, True, True, True]


def test_the_global_transformer_sees_all_positions_and_all_matrices():
    assert reach(build("global"), 2) == [True] * 5
    assert reach(build("global", causal=True), 2) == [False, False, True, True, True]
    inputs, read = data()
    before = build("global")(inputs, read)
    inputs["h.1.c"] = inputs["h.1.c"] + torch.randn(4, dtype=torch.float64)
    after = build("global")(inputs, read)
    assert all((before[name] != after[name]).all() for name in WIDTHS)


def test_the_global_transformer_knows_offsets_and_no_places():
    """Ten times the same input: a query's surroundings are alike but for how far the ends are, and heads see that."""
    importances = build("global", layers=1)
    x = {name: torch.randn(1, 1, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    other = {name: torch.randn(1, 1, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    alike = {name: torch.cat([x[name]] * 3 + [other[name]] + [x[name]] * 3, 1) for name in WIDTHS}
    values = importances(alike, {})["h.0.a"][0]
    assert (values[2] - values[4]).abs().max() > 1e-3  # before and after the other are not the same
    shifted = {name: torch.cat([x[name]] * 2 + [other[name]] + [x[name]] * 4, 1) for name in WIDTHS}
    causal = build("global", layers=1, causal=True)
    first = {name: values[:, 3:] for name, values in alike.items()}
    second = {name: values[:, 2:6] for name, values in shifted.items()}
    close(causal(first, {})["h.0.a"], causal(second, {})["h.0.a"])


def test_the_global_transformer_keeps_nothing_of_the_square_of_the_length():
    importances = Importances({"m": 8}, {"m": 4}, ImportanceSettings("global", 8, width=8, heads=2)).double()
    length, widest = 2048, 3 * 8
    x = {"m": torch.randn(1, length, 8, dtype=torch.float64)}
    valid = torch.arange(length)[None] < 2000
    for padding in (None, valid):
        with Watch() as watch:
            importances(x, {}, padding)["m"].sum().backward()
        assert watch.largest < 16 * length * widest * 8 < length**2 * 8


def test_a_local_start_halves_the_log_weight_at_each_step_away():
    importances = build("attention", relative="scalar", relative_start="local")
    mixer = importances.mixers["6"]
    with torch.no_grad():
        for parameter in (mixer.q, mixer.k, mixer.absolute):
            parameter.zero_()
        mixer.v.copy_(torch.eye(6))
        weights = mixer(torch.eye(6, dtype=torch.float64)[None, None], None)[0, 0, :, :6]
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs().double()
    close(weights, (-0.5 * distance).softmax(-1), 1e-6)  # the table is made in float32
    flat = build("attention", relative="scalar")
    assert not flat.mixers["6"].relative.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gates_start_around_the_gate_bias_as_far_apart_as_asked(kind):
    inputs, read = data()
    plain, moved = (build(kind, **start)(inputs, read) for start in ({"gate_bias": 0.0}, {"gate_spread": 0.25}))
    for name in WIDTHS:  # the default bias is 0.5
        close(moved[name], 0.5 + 0.25 * plain[name])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_inner_start_follows_the_inner_activation(activation):
    """γ = 1.25 |a| / largest - 0.125 for every slice, and off where the data give a slice nothing; gradients flow."""
    importances = build("scalar", activation=activation, start="inner")
    inputs, read = data()
    with torch.no_grad():
        read["h.0.a"][:, 1] = 0
    rows = {name: x.detach().flatten(0, 1) for name, x in inputs.items()}
    importances.start_from(rows, {name: U.detach() for name, U in read.items()})
    gates = importances(inputs, read)
    for name, U in read.items():
        for c in range(SLICES[name]):
            inner = [(x @ U[:, c]).item() for x in rows[name]]
            largest = max(abs(a) for a in inner)
            expected = [1.25 * abs(a) / largest - 0.125 if largest else -0.125 for a in inner]
            torch.testing.assert_close(
                gates[name][..., c].flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.12
            )
            if largest:
                assert gates[name][..., c].max().item() == pytest.approx(1.125, abs=1e-3)
    torch.autograd.backward([gate.sum() for gate in gates.values()])
    assert all(gates.w2.grad.abs().sum() > 0 for gates in importances.gates.values())


def test_pruned_slices_are_off_for_good():
    importances = build("vector")
    inputs, read = data()
    before = importances(inputs, read)["h.1.c"]
    importances.prune({"h.1.c": torch.tensor([True, False, True, True, False])})
    importances.prune({"h.1.c": torch.tensor([True, True, False, True, True])})
    after = importances(inputs, read)["h.1.c"]
    assert torch.equal(after[..., [0, 3]], before[..., [0, 3]])
    assert all((g[..., [1, 2, 4]] == 0).all() for g in leaky_hard_sigmoid(after))
    after.sum().backward()
    gate = importances.gates["h/1/c"]
    assert [bool(row.any()) for row in gate.w2.grad.t()] == [True, False, False, True, False]
    other = build("vector")
    other.load_state_dict(importances.state_dict())  # a saved run stays pruned
    assert torch.equal(other(inputs, read)["h.1.c"], after)


@pytest.mark.parametrize("kind", KINDS)
def test_rms_divides_by_the_root_of_the_mean_square(kind):
    inputs, read = data()
    scaled = {name: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) for name, x in inputs.items()}
    normalised, plain = build(kind, normalise="rms")(inputs, read), build(kind)(scaled, read)
    for name in WIDTHS:
        close(normalised[name], plain[name])


def spanned(rank=3, width=8, rows=12):
    generator = torch.Generator().manual_seed(2)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(rows, rank) @ make(rank, width) * 7


def test_a_span_basis_spans_the_data_at_unit_mean_square():
    x = spanned()
    basis = span_basis(x)
    assert basis.shape == (3, 8)
    close(x @ torch.linalg.pinv(basis) @ basis, x)
    assert (x @ basis.t()).square().mean().item() == pytest.approx(1)
    gram = basis @ basis.t()
    close(gram, gram[0, 0] * torch.eye(3, dtype=torch.float64))


def test_a_span_basis_of_half_precision_data():
    basis = span_basis(spanned().bfloat16(), tolerance=0.05)  # rounding to 8 bits fills the other directions a little
    assert basis.shape == (3, 8)
    assert (spanned() @ basis.double().t()).square().mean().item() == pytest.approx(1, rel=0.02)


def test_on_the_span_a_span_gate_is_a_full_gate():
    x = spanned()
    basis = span_basis(x)
    settings = ImportanceSettings(kind="vector", gate_width=3)
    full = Importances({"m": 8}, {"m": 5}, settings).double()
    small = Importances({"m": 8}, {"m": 5}, settings, {"m": basis}).double()
    weights = dict(full.gates["m"].named_parameters())
    read = {"m": torch.zeros(8, 5)}
    assert small.gates["m"].w1.shape == (3, 15)
    assert not any(parameter is small.bases["m"] for parameter in small.parameters() if parameter.requires_grad)
    for name, parameter in small.gates["m"].named_parameters():
        parameter.data = weights[name].data.clone()
    small.gates["m"].w1.data = torch.linalg.pinv(basis).t() @ full.gates["m"].w1.data
    close(small({"m": x[None]}, read)["m"], full({"m": x[None]}, read)["m"])
    # And back: every span gate is the full gate with w1 = basis^T w1, everywhere.
    small.gates["m"].w1.data.normal_()
    full.gates["m"].w1.data = basis.t() @ small.gates["m"].w1.data
    anywhere = torch.randn(1, 9, 8, dtype=torch.float64)
    close(small({"m": anywhere}, read)["m"], full({"m": anywhere}, read)["m"])


def test_query_biases_score_like_keys():
    # Zero keys and a query-dependent bias that is one number an offset for this query: then it is the scalar form.
    query, scalar = build("attention", relative="query"), build("attention", relative="scalar")
    inputs, read = data()
    ones = {name: torch.ones_like(x) for name, x in inputs.items()}
    for importances in (query, scalar):
        for mixer in importances.mixers.values():
            mixer.k.data.zero_()
            mixer.q.data.copy_(torch.eye(mixer.q.shape[-1]))
    for width, mixer in scalar.mixers.items():
        mixer.relative.data.normal_()
        query.mixers[width].relative.data.copy_(mixer.relative.data[..., None] / int(width))
        query.mixers[width].v.data.copy_(mixer.v.data)
        query.mixers[width].absolute.data.copy_(mixer.absolute.data)
    query.gates.load_state_dict(scalar.gates.state_dict())
    for name in WIDTHS:
        close(query(ones, read)[name], scalar(ones, read)[name])
    assert math.isfinite(query(ones, read)["h.0.a"].sum().item())
