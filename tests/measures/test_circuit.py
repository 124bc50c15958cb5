"""The circuit's measurements against explicit loops, and on a toy whose circuit was put there by hand."""

from __future__ import annotations

import pytest
import torch
from small_circuits import ALL, SEQUENCES, planted_circuit, small_circuit, uneven_gates
from small_runs import loud_toy, toy_recipe

from spdcli.measures.circuit import circuit_attention, example, importance_profile, measure_circuit
from spdcli.measures.circuit_data import circuit_data, has_circuit
from spdcli.measures.circuit_identity import identity
from spdcli.measures.circuit_needs import needs
from spdcli.measures.circuit_offsets import by_offset, offset_profiles
from spdcli.measures.evaluation import evaluate_without_circuit
from spdcli.measures.gate_knowledge import CONTROLS, blind_gates, gate_controls, performance, without_context
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

FLOAT32 = {"rel": 1e-4, "abs": 1e-6}  # sums in another order


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- attention -------------------------------------------------------------------------------------


def test_a_planted_previous_token_head_loses_everything_with_the_querys_position(tmp_path):
    data = planted_circuit(tmp_path)
    uniform = (1 / (data.at["m"] + 1.0)).mean().item()
    for kind in (False, True):
        attention = circuit_attention(data, kind)
        assert attention.m_to_s1 == pytest.approx(1.0, abs=1e-4)
        for name in ("unplaced_query", "unplaced_query_and_s1", "content_only"):
            assert getattr(attention, f"m_to_s1_{name}") == pytest.approx(uniform, rel=1e-5)
        assert attention.s2_to_m == pytest.approx(1 / 8, rel=1e-5)  # nothing planted in the second layer


def slow_first_attention(data, row, masked, placed_query, placed_key):
    """Attention of m to s1 in one sequence, slice by slice."""
    toy, tokens = data.toy, data.clean.batch.tokens[row]
    m, s1 = int(data.at["m"][row]), int(data.at["s1"][row])

    def through(name, t, place):
        encoding = toy.positions[t] if place else torch.zeros(4)
        after = toy.shape.positions == "after"
        x = toy.embed.weight[tokens[t]] + (0 if after else encoding)
        weight = data.target.matrices[name].weight
        written = x @ weight
        if masked and name in data.g:
            own = data.decomposition.of(name)
            written = sum(data.g[name][row, t, c] * (x @ own.U[:, c]) * own.V[c] for c in range(3))
        return written + (encoding if after else 0)

    query = through("Q0", m, placed_query)
    scores = torch.stack([through("K0", t, placed_key(t, s1)) @ query / 2 for t in range(m + 1)])
    return scores.softmax(0)[s1].item()


@pytest.mark.parametrize("names", [ALL, ["K0", "V1"]], ids=["all", "some"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_attention_with_and_without_positions_by_hand(tmp_path, names, masked, place):
    data = small_circuit(tmp_path, f"target.positions='{place}'", names=names)
    attention = circuit_attention(data, masked)
    cases = {
        "m_to_s1": (True, lambda t, s1: True),
        "m_to_s1_unplaced_query": (False, lambda t, s1: True),
        "m_to_s1_unplaced_query_and_s1": (False, lambda t, s1: t != s1),
        "m_to_s1_content_only": (False, lambda t, s1: False),
    }
    for key, (query, placed) in cases.items():
        slow = sum(slow_first_attention(data, row, masked, query, placed) for row in range(SEQUENCES)) / SEQUENCES
        assert getattr(attention, key) == pytest.approx(slow, **FLOAT32), key
    assert len({round(getattr(attention, key), 5) for key in cases}) == 4  # the cases differ on this toy


def test_after_the_projections_the_encodings_match_as_they_are(tmp_path):
    data = small_circuit(tmp_path, "target.positions='after'")
    offsets, places = offset_profiles(data), data.toy.positions
    assert (offsets.slices, offsets.aligns) == ([], None)
    pairs = [(places[n + 1] @ places[n]).item() / 2 for n in range(len(places) - 1)]
    assert offsets.whole.scores[offsets.offsets.index(1)] == pytest.approx(sum(pairs) / len(pairs))
    assert offsets.whole.peak == 0  # sinusoids match themselves best


def test_positions_added_to_the_embedding_are_taken_away_too(tmp_path):
    data = small_circuit(tmp_path, "target.positions='added'")
    attention = circuit_attention(data, False)
    row_values = []
    for row in range(SEQUENCES):
        tokens, m = data.clean.batch.tokens[row], int(data.at["m"][row])
        x = data.toy.embed.weight[tokens]
        scores = (x @ data.target.matrices["K0"].weight) @ (x[m] @ data.target.matrices["Q0"].weight) / 2
        row_values.append(scores[: m + 1].softmax(0)[m - 1].item())
    assert attention.m_to_s1_content_only == pytest.approx(sum(row_values) / SEQUENCES, **FLOAT32)


# --- offsets ---------------------------------------------------------------------------------------


def test_scores_by_offset_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])  # [query, key]
    assert by_offset(scores, [-2, -1, 0, 1, 2]) == [3.0, 4.0, 5.0, 6.0, 7.0]


def test_the_planted_keys_peak_one_position_on(tmp_path):
    data = planted_circuit(tmp_path)
    offsets = offset_profiles(data)
    assert offsets.whole.peak == 1
    assert offsets.whole.cosine == pytest.approx(1.0, abs=1e-5)
    assert offsets.aligns.startswith("K0:")
    for name in ("Q0", "K0"):  # the slices are the whole matrix, and scores are linear in each
        parts = [entry.scores for entry in offsets.slices if entry.slice.startswith(name)]
        assert len(parts) == 8
        assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(
            offsets.whole.scores, rel=1e-3, abs=1e-3
        )


def test_a_slices_offset_profile_by_hand(tmp_path):
    data = small_circuit(tmp_path)
    offsets = offset_profiles(data)
    positions, own = data.toy.positions, data.decomposition.of("K0")
    assert [entry.slice for entry in offsets.slices if entry.slice[0] == "K"] == ["K0:0", "K0:1"]
    entry = next(entry for entry in offsets.slices if entry.slice == "K0:1")
    query = positions @ data.target.matrices["Q0"].weight
    for offset, score in zip(offsets.offsets, entry.scores, strict=True):
        pairs = [(n + offset, n) for n in range(8) if 0 <= n + offset < 8]
        slow = [(positions[n] @ own.U[:, 1]) * (own.V[1] @ query[later]) / 2 for later, n in pairs]
        assert score == pytest.approx(torch.stack(slow).mean().item(), **FLOAT32)
    cosines = []
    for n in range(7):
        key = (positions[n] @ own.U[:, 1]) * own.V[1]
        cosines.append((key @ query[n + 1] / key.norm() / query[n + 1].norm()).item())
    assert entry.cosine == pytest.approx(sum(cosines) / 7, **FLOAT32)
    tokens = data.toy.embed.weight @ own.U[:, 1]
    assert entry.reads.s == pytest.approx(tokens[5].item())
    assert entry.reads.tokens.mean == pytest.approx(tokens[:5].mean().item(), abs=1e-6)
    assert entry.reads.positions.std == pytest.approx((positions @ own.U[:, 1]).std(correction=0).item())


# --- identity and importance -----------------------------------------------------------------------


def test_identity_by_hand(tmp_path):
    data = small_circuit(tmp_path)
    v1 = identity(data)
    own = data.decomposition.of("V1")
    assert data.active["V1"] == [0, 1]
    values = torch.linalg.svdvals(own.U[:, :2] @ own.V[:2])
    assert v1.singular_values == pytest.approx(values.tolist(), abs=1e-5)
    a, b = (value.item() ** 2 for value in values[:2])
    assert v1.participation == pytest.approx((a + b) ** 2 / (a * a + b * b), rel=1e-3)
    assert v1.above_one_percent == 2
    written = []
    for row in range(SEQUENCES):
        m = data.at["m"][row]
        x, g = data.clean.inputs["V1"][row, m], data.g["V1"][row, m]
        written.append(sum(g[c] * (x @ own.U[:, c]) * own.V[c] for c in range(3)))
    right = 0
    for row, one in enumerate(written):  # all directions: nothing is cut away
        logits = data.toy.unembed.weight @ (data.clean.entries[1][row, -1] + one)
        right += int(logits.argmax() == data.clean.batch.answers[row])
    assert v1.decoding[-1] == pytest.approx(right / SEQUENCES)
    assert len(v1.decoding) == 4


@pytest.mark.parametrize("names", [[*ALL, "O1"], ALL], ids=["decomposed", "whole"])
def test_s2_gets_what_v1_writes_through_the_output_projection(tmp_path, names):
    data = small_circuit(tmp_path, "target.output_projection=true", names=names)
    O, own_V = data.target.matrices["O1"].weight, data.decomposition.of("V1")
    for row, carried in enumerate(data.carried()):
        m = data.at["m"][row]
        x, g = data.clean.inputs["V1"][row, m], data.g["V1"][row, m]
        written = sum(g[c] * (x @ own_V.U[:, c]) * own_V.V[c] for c in range(3))
        if "O1" in names:
            own, at_s2 = data.decomposition.of("O1"), data.g["O1"][row, -1]
            expected = sum(at_s2[c] * (written @ own.U[:, c]) * own.V[c] for c in range(3))
        else:
            expected = written @ O
        torch.testing.assert_close(carried, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["before", "after", "added"])
def test_a_begin_token_is_of_no_class_and_the_whole_circuit_is_measured(tmp_path, place):
    settings = (f"target.positions='{place}'", "target.begin_token=true", "target.output_projection=true")
    data = small_circuit(tmp_path, *settings, names=[*ALL, "O0", "O1"])
    assert data.clean.batch.tokens[:, 0].eq(6).all()
    circuit = measure_circuit(data, 0)
    assert 0 <= circuit.attention.masked.m_to_s1 <= 1
    assert set(circuit.importance.classes) == {*ALL, "O0", "O1"}
    if circuit.offsets is not None and circuit.offsets.slices:
        tokens = data.toy.embed.weight @ data.decomposition.of("K0").U[:, 1]
        entry = next(one for one in circuit.offsets.slices if one.slice == "K0:1")
        assert entry.reads.s == pytest.approx(tokens[5].item())


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_the_target_loses_without_a_matrix_by_hand(tmp_path, place):
    data = small_circuit(tmp_path, f"target.positions='{place}'")
    toy, tokens = data.toy, data.clean.batch.tokens
    for name, kind in (("Q0", "m"), ("V0", "s1"), ("K1", "random"), ("Q1", "s2")):
        hidden, positions = toy.embed(tokens), toy.positions[None, : tokens.shape[1]]
        for layer, block in enumerate(toy.blocks):
            read = hidden if place == "after" else hidden + positions
            q, k, v = block.q(read), block.k(read), block.v(hidden)
            written = {f"Q{layer}": q, f"K{layer}": k, f"V{layer}": v}
            if name in written:
                written[name][data.clean.batch.classes[kind]] = 0
            if place == "after":
                q, k = q + positions, k + positions
            hidden = hidden + (block.scores(q, k).softmax(-1) @ block.split(v))[:, 0]
        log_q, log_p = (toy.unembed(hidden)[:, -1].log_softmax(-1), toy.logits(tokens).log_softmax(-1))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert needs(data)[name][kind] == pytest.approx(expected.item(), **FLOAT32)
        assert expected > 1e-6


def test_importance_by_class_and_by_distance_by_hand(tmp_path):
    data = small_circuit(tmp_path, sequences=40)
    profile = importance_profile(data)
    total = data.g["V1"].sum(-1)
    by_class: dict[str, list] = {"s1": [], "m": [], "s2": [], "random": []}
    by_distance: dict[int, list] = {distance: [] for distance in profile.distances}
    for row in range(40):
        s1 = int(data.at["s1"][row])
        for t in range(8):
            kind = "s2" if t == 7 else {s1: "s1", s1 + 1: "m"}.get(t, "random")
            by_class[kind].append(total[row, t].item())
            if kind != "s2" and t - s1 in by_distance:
                by_distance[t - s1].append(total[row, t].item())
    for kind, values in by_class.items():
        assert profile.classes["V1"][kind] == pytest.approx(sum(values) / len(values), **FLOAT32)
    for distance, value in zip(profile.distances, profile.by_distance["V1"], strict=True):
        assert value == pytest.approx(sum(by_distance[distance]) / len(by_distance[distance]), **FLOAT32)


def test_only_the_papers_kind_of_toy_has_the_circuit(tmp_path):
    def of(*settings):
        recipe = toy_recipe(*settings, folder=tmp_path)
        return has_circuit(toy_subject(recipe, loud_toy(recipe)))

    assert of()
    for setting in ("positions='added'", "output_projection=true", "begin_token=true"):
        assert of(f"target.{setting}")
    for setting in ("layers=3", "heads=2", "layer_norm=true", "feed_forward=true"):
        assert not of(f"target.{setting}")


# --- controls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", ["scalar", "query"])
def test_blind_gates_are_those_that_may_attend_to_themselves_alone(tmp_path, relative):
    data = small_circuit(tmp_path, f"importance.relative={relative}")
    changed = CONTROLS["no_context"](data, torch.Generator())
    for t in range(8):
        only = torch.zeros(SEQUENCES, 8, dtype=torch.bool)
        only[:, t] = True
        slow, _ = data.decomposition.importance(data.clean.inputs, only)
        for name in ALL:
            torch.testing.assert_close(changed[name][:, t], slow[name][:, t], atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(changed[name], data.g[name], atol=1e-2) for name in ALL)
    again, _ = data.decomposition.importance(data.clean.inputs)
    assert all(torch.equal(again[name], data.g[name]) for name in ALL)  # their sight is back


def test_global_gates_that_are_blind_see_their_own_position_alone(tmp_path):
    data = small_circuit(tmp_path, "importance.kind=global")
    expected = {name: torch.empty_like(g) for name, g in data.g.items()}
    for b, t in torch.cartesian_prod(*map(torch.arange, data.clean.batch.tokens.shape)).tolist():
        alone = {name: x[b : b + 1, t : t + 1] for name, x in data.clean.inputs.items()}
        for name, g in data.decomposition.importance(alone)[0].items():
            expected[name][b, t] = g[0, 0]
    blind = without_context(data)
    for name, g in expected.items():
        torch.testing.assert_close(blind[name], g)
    assert any((blind[name] != data.g[name]).any() for name in expected)


def test_gates_without_attention_are_blind_already(tmp_path):
    data = small_circuit(tmp_path, "importance.kind=vector")
    with blind_gates(data.decomposition):
        g, _ = data.decomposition.importance(data.clean.inputs)
    assert all(torch.equal(g[name], data.g[name]) for name in ALL)


def test_importances_come_from_where_the_controls_say(tmp_path):
    data = small_circuit(tmp_path)
    generator = torch.Generator().manual_seed(0)
    neighbour, shifted, on = (
        CONTROLS[name](data, generator) for name in ("other_sequences", "other_positions", "always_on")
    )
    shifts = set()
    for row in range(SEQUENCES):
        assert torch.equal(neighbour["Q0"][row], data.g["Q0"][row - 1])
        shift = [k for k in range(8) if all(torch.equal(shifted[n][row], data.g[n][row].roll(k, 0)) for n in ALL)]
        assert len(shift) == 1  # the same shift for all matrices
        shifts |= set(shift)
    assert 0 not in shifts
    assert len(shifts) > 1
    assert torch.equal(on["K1"], torch.tensor([1.0, 1.0, 0.0]).expand(SEQUENCES, 8, 3))


def test_performance_agrees_with_the_evaluation(tmp_path):
    recipe = toy_recipe("target.vocabulary=5", "slices.C=3", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe, seed=1))
    decomposition = uneven_gates(start_decomposition(recipe, subject, ALL))
    evaluation = evaluate_without_circuit(subject, decomposition, 64, 0.0, seed=1)  # the sequences of seed 0 below
    data = circuit_data(subject, decomposition, 64, 0.0, seed=0)
    controls = gate_controls(data, seed=0)
    assert controls["own"].all.accuracy == pytest.approx(evaluation.accuracy.masked)
    assert controls["own"].all.kl == pytest.approx(evaluation.metrics["recon"], rel=1e-4)
    masked = circuit_attention(data, True)
    for step in ("m_to_s1", "s2_to_m"):
        assert getattr(controls["own"].all, step) == pytest.approx(getattr(masked, step), rel=1e-5)
    assert controls["own"].matrices == {}
    assert controls["own"].layers == []
    first, second = (
        {name: CONTROLS["always_on"](data, torch.Generator())[name] for name in names} for names in (ALL[:3], ALL[3:])
    )
    assert controls["always_on"].layers == [performance(data, data.g | part) for part in (first, second)]
    own, on = controls["own"].all, controls["always_on"].matrices["V1"]
    assert on.m_to_s1 == pytest.approx(own.m_to_s1)  # V1 alone is changed: attention stays
    assert on.s2_to_m == pytest.approx(own.s2_to_m)
    assert on.kl != own.kl
    assert controls["always_on"].importance["Q0"] == {"s1": 2, "m": 2, "s2": 2, "random": 2}


def test_a_decomposition_of_the_second_layer_alone_has_the_targets_first_attention(tmp_path):
    data = small_circuit(tmp_path, names=["K1", "V1"])
    attention = performance(data, data.g)
    assert attention.m_to_s1 == pytest.approx(circuit_attention(data, False).m_to_s1, rel=1e-5)
    assert measure_circuit(data, seed=0).offsets is None


# --- one sequence to draw ---------------------------------------------------------------------------


def test_the_example_is_one_of_the_sequences(tmp_path):
    data = small_circuit(tmp_path)
    shown = example(data)
    at = shown.at
    assert shown.tokens[at["s1"]] == shown.tokens[at["s2"]] == 5
    assert (at["m"], at["s2"]) == (at["s1"] + 1, 7)
    for pattern in (*shown.target, *shown.masked):
        assert pattern.shape == (8, 8)
        assert pattern.sum(1) == pytest.approx(torch.ones(8).numpy(), abs=1e-5)
