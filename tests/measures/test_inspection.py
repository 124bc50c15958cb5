"""`spd inspect` on decompositions whose gates were set by hand: exactly the planted slices, and what they do there."""

from __future__ import annotations

import pytest
from planted_gates import BRYANT, CPU, EVERYWHERE, FC, PLANTED, PROJ, plant_gates
from small_runs import loud_toy, model_recipe, toy_recipe

from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.measures.inspection import Query, inspect_slices, inspect_texts
from spdcli.measures.labels import TokenLens
from spdcli.measures.texts import own_texts, user_texts
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject, toy_subject


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    return plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))


def look(planted, token="Bryant", shown=None, **query):
    subject, decomposition, _ = planted
    own = own_texts(subject, seed=0)
    return inspect_slices(subject, decomposition, own, shown or own, Query(token, **query))


def names(occurrence):
    return [entry.slice for entry in occurrence.slices]


def test_a_token_has_exactly_the_planted_slices(planted):
    _, decomposition, inputs = planted
    (occurrence,) = look(planted).occurrences
    assert (occurrence.number, occurrence.position, occurrence.token) == (1, BRYANT[1], " Bryant")
    assert occurrence.text == "Kobe Bryant plays professional basketball"

    def written(index):
        slices = decomposition.of(PROJ)
        return ((inputs[PROJ][BRYANT] @ slices.U[:, index]).abs() * slices.V[index].norm()).item()

    # Importance first; the two that are clamped to 1 by how much they write.
    first = sorted([1, 4], key=written, reverse=True)
    expected = [f"{PROJ}:{first[0]}", f"{PROJ}:{first[1]}", f"{FC}:0", f"{FC}:1", f"{FC}:3"]
    assert names(occurrence) == expected
    importances = [entry.importance for entry in occurrence.slices]
    assert importances == pytest.approx([1, 1, 0.75, 0.5, 0.4], abs=1e-4)
    unique = {entry.slice for entry in occurrence.slices if entry.unique}
    assert unique == {f"{PROJ}:1", f"{PROJ}:4", f"{FC}:0"}


def test_the_activation_is_what_the_slice_reads(planted):
    _, decomposition, inputs = planted
    (occurrence,) = look(planted).occurrences
    for entry in occurrence.slices:
        name, index = entry.slice.rsplit(":", 1)
        expected = inputs[name][BRYANT] @ decomposition.of(name).U[:, int(index)]
        assert entry.activation == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_labels_follow_the_sign_of_the_activation(planted):
    """A slice that is read negatively writes against V: what it promotes is what V suppresses."""
    subject, decomposition, _ = planted
    lens = TokenLens(subject.target, subject.routes, subject.token_text)
    entries = [e for o in look(planted, None, labels=4).occurrences for e in o.slices]
    signs = set()
    for entry in entries:
        name, index = entry.slice.rsplit(":", 1)
        sign = -1.0 if entry.activation < 0 else 1.0
        signs.add(sign)
        slices, at = decomposition.of(name), slice(int(index), int(index) + 1)
        assert [entry.promotes] == lens.promotes(name, sign * slices.V[at], 4)
        assert [entry.reads] == lens.reads(name, sign * slices.U[:, at], 4)
        assert len(entry.promotes) == 4
    assert signs == {-1.0, 1.0}


def test_every_position_without_a_token(planted):
    inspection = look(planted, token=None)
    places = [(o.number - 1, o.position) for o in inspection.occurrences]
    assert places == [(0, t) for t in range(5)] + [(1, t) for t in range(7)]
    for occurrence in inspection.occurrences:
        place = (occurrence.number - 1, occurrence.position)
        expected = {f"{m}:{c}" for (m, c), wanted in PLANTED.items() if wanted == EVERYWHERE or place in wanted}
        assert set(names(occurrence)) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(FC, [0.4, 0.4, 1.65, 0.4, 0.4]), ("*proj", [0, 0, 2, 0, 0.3]), ("*", [0.4, 0.4, 3.65, 0.4, 0.7])],
)
def test_heat_is_the_sum_of_importances(planted, pattern, expected):
    """Of the chosen matrices, for the prompts that have the token, without their padding."""
    (heat,) = look(planted, matrices=(pattern,)).heat
    assert (heat.number, heat.tokens) == (1, ["K", "obe", " Bryant", " plays", " professional"])
    assert heat.importance == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"matrices": (FC,)}, {f"{FC}:0", f"{FC}:1", f"{FC}:3"}),
        ({"matrices": ("*.1.*", "nothing*")}, {f"{PROJ}:1", f"{PROJ}:4"}),
        ({"top": 2}, {f"{PROJ}:1", f"{PROJ}:4"}),
        ({"threshold": 0.45}, {f"{PROJ}:1", f"{PROJ}:4", f"{FC}:0", f"{FC}:1"}),
        ({"threshold": 1.0}, set()),
    ],
)
def test_narrowing(planted, query, expected):
    (occurrence,) = look(planted, **query).occurrences
    assert set(names(occurrence)) == expected


def test_the_threshold_decides_uniqueness_too(planted):
    """A slice that is weakly active in the other prompt is unique once that no longer counts."""
    (occurrence,) = look(planted, threshold=0.3).occurrences
    assert {entry.slice: entry.unique for entry in occurrence.slices}[f"{FC}:1"]


@pytest.mark.parametrize("query", ["Bryant", " Bryant", "#ID", "ID"])
def test_ways_to_name_a_token(planted, query):
    token = int(planted[0].prompts.batch.tokens[BRYANT])
    inspection = look(planted, query.replace("ID", str(token)))
    assert [(o.number - 1, o.position) for o in inspection.occurrences] == [BRYANT]


def test_a_token_of_both_prompts_is_found_in_both(planted):
    inspection = look(planted, "plays")
    assert [(o.number, o.position) for o in inspection.occurrences] == [(1, 3), (2, 3)]
    assert [heat.number for heat in inspection.heat] == [1, 2]


def test_an_absent_token_lists_those_there_are(planted):
    with pytest.raises(UsageError, match="no prompt has the token 'Jordan'") as info:
        look(planted, "Jordan")
    assert info.value.exit_code == 2
    assert all(repr(token) in info.value.hint for token in ("K", " Bryant", " sport", " of"))


def test_a_pattern_that_matches_nothing_names_the_matrices(planted):
    with pytest.raises(UsageError, match=r"no decomposed matrix matches 'h\.7\.\*'") as info:
        look(planted, matrices=("h.7.*",))
    assert FC in info.value.hint
    assert PROJ in info.value.hint


# --- texts of the user's own -----------------------------------------------------------------------


def test_another_text_is_fed_whole(planted):
    """Its importances are those of the same tokens in the run's own prompt; the longer prompt is no hindrance."""
    subject = planted[0]
    own_text = "Kobe Bryant plays professional"
    shown = user_texts(subject, [own_text], begin_token=False)
    (occurrence,) = look(planted, shown=shown).occurrences
    assert (occurrence.number, occurrence.position, occurrence.text) == (1, 2, own_text)
    before = look(planted).occurrences[0].slices
    for entry, other in zip(occurrence.slices, before, strict=True):
        assert entry.slice == other.slice
        assert entry.importance == pytest.approx(other.importance, abs=1e-4)
        assert not entry.unique  # the run's own prompt has them too


def test_a_text_is_not_compared_with_itself(planted):
    subject = planted[0]
    shown = user_texts(subject, ["Kobe Bryant plays professional basketball"], begin_token=False)
    (occurrence,) = look(planted, shown=shown).occurrences
    assert {entry.slice for entry in occurrence.slices if entry.unique} >= {f"{PROJ}:4", f"{FC}:0"}
    assert not any(entry.unique for entry in occurrence.slices if entry.slice == f"{FC}:1")


def test_a_begin_token_comes_first_when_asked_for(planted):
    shown = user_texts(planted[0], ["Woods plays"], begin_token=True)
    assert shown.pieces == [["<s>", "W", "o", "o", "d", "s", " plays"]]


def test_padding_has_no_importance(planted):
    subject, decomposition, _ = planted
    g, inner = importances_of(subject, decomposition, subject.prompts.batch)
    padding = ~subject.prompts.batch.valid
    assert padding.sum() == 2
    for name in (FC, PROJ):
        assert not g[name][padding].any()
        assert not inner[name][padding].any()
        assert inner[name][~padding].all()


def test_one_call_reports_what_the_command_shows(planted):
    subject, decomposition, _ = planted
    query = Query("Bryant", top=2)
    assert inspect_texts(subject, decomposition, query) == look(planted, top=2)
    shown = user_texts(subject, ["Kobe Bryant plays"], begin_token=True)
    own = own_texts(subject, seed=0)
    again = inspect_texts(subject, decomposition, query, ["Kobe Bryant plays"], begin_token=True)
    assert again == inspect_slices(subject, decomposition, own, shown, query)
    assert again.occurrences[0].position == 3
    assert plain(again)["occurrences"][0]["slices"][0]["slice"] == again.occurrences[0].slices[0].slice


def test_the_runs_own_prompts_are_chosen_by_number_and_keep_it(planted):
    """Fed as the run feeds them, and compared with all of the run's prompts."""
    subject, decomposition, _ = planted
    query = Query("plays")
    both = inspect_texts(subject, decomposition, query)
    (second,) = inspect_texts(subject, decomposition, query, [2]).occurrences
    assert second.number == 2
    assert [one.slice for one in second.slices] == [one.slice for one in both.occurrences[1].slices]
    assert [one.unique for one in second.slices] == [one.unique for one in both.occurrences[1].slices]
    with pytest.raises(UsageError, match="prompt 3: expected one of the run's prompts, 1 to 2"):
        inspect_texts(subject, decomposition, query, [3])
    with pytest.raises(UsageError, match="are not looked at together"):
        inspect_texts(subject, decomposition, query, [1, "Woods plays"])


# --- the toy ---------------------------------------------------------------------------------------


@pytest.fixture(params=["attention", "vector"])
def toy(request, tmp_path):
    recipe = toy_recipe(f"importance.kind={request.param}", folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    return subject, start_decomposition(recipe, subject, ["Q0", "V1"]).requires_grad_(False), None


def test_the_toys_s_token_is_found_twice_a_sequence(toy):
    inspection = look(toy, "s")
    assert [o.token for o in inspection.occurrences] == ["s"] * 8
    assert [o.number for o in inspection.occurrences] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [o.position for o in inspection.occurrences][1::2] == [7] * 4
    for occurrence in inspection.occurrences:
        assert occurrence.text.split()[occurrence.position] == "s"


def test_the_seed_draws_the_toys_sequences(toy):
    one, again, other = (own_texts(toy[0], seed).texts for seed in (1, 1, 2))
    assert one == again != other


def test_the_toys_sequences_are_chosen_by_number(toy):
    subject, decomposition, _ = toy
    own = own_texts(subject, seed=0)
    places = inspect_texts(subject, decomposition, Query("s"), [4, 2]).occurrences
    assert [(o.number, o.text) for o in places] == [(4, own.texts[3])] * 2 + [(2, own.texts[1])] * 2


def test_a_sequence_of_the_users_own(toy):
    shown = user_texts(toy[0], ["3 s 1 4 s"], begin_token=False)
    inspection = look(toy, "1", shown)
    assert [(o.number, o.position, o.text) for o in inspection.occurrences] == [(1, 2, "3 s 1 4 s")]
    assert inspection.heat[0].tokens == ["3", "s", "1", "4", "s"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["3 s 9 s"], "the toy has no token '9'"),
        (["3 ² s"], "the toy has no token '²'"),
        (["  "], "the prompt is empty"),
        (["1 s", "1 2 s"], "must be of one length"),
        (["1 2 3 4 5 1 2 3 s"], "9 tokens, but the toy takes 8"),
    ],
)
def test_a_sequence_that_cannot_be_is_one_line(toy, texts, said):
    with pytest.raises(UsageError, match=said):
        user_texts(toy[0], texts, begin_token=False)


def test_an_absent_toy_token_lists_those_there_are(toy):
    shown = user_texts(toy[0], ["3 s 1 3 s"], begin_token=False)
    with pytest.raises(UsageError, match="no sequence has the token '5'") as info:
        look(toy, "5", shown)
    assert info.value.hint == "the tokens are s, 1, 3"


def test_a_text_too_long_for_the_attention_tables_is_one_line(tmp_path, tiny_gpt2_dir):
    recipe = model_recipe(tiny_gpt2_dir, "importance.kind=attention", folder=tmp_path)
    subject = language_subject(recipe, CPU)
    decomposition = start_decomposition(recipe, subject, [FC])
    own = own_texts(subject, 0)
    fits = user_texts(subject, ["Tiger Woods plays the sport of"], begin_token=False)
    assert look((subject, decomposition, None), " of", fits).occurrences
    long = user_texts(subject, ["Tiger Woods plays the sport of golf"], begin_token=False)
    with pytest.raises(UsageError, match=r"^8 tokens, but this run's importance attention covers 7$"):
        inspect_slices(subject, decomposition, own, long, Query(None))
