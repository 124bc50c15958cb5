"""A harvest against loops over every token and slice; what is kept of it; what a search finds."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from small_runs import MODEL, one_line, spd_here

import spdcli
from spdcli.errors import SpdError, UsageError
from spdcli.files import checksum, load_tensors, save_tensors
from spdcli.measures.harvest import AFTER, BEFORE, NO_TOKEN, OFTEN, Harvester
from spdcli.measures.harvest_files import Context, SliceInText, described, load_harvest, save_harvest, slice_number
from spdcli.measures.pair_counts import PairCounts
from spdcli.measures.slice_search import is_at, matching_slices

SIZES = {"a": 3, "b": 2}
WORDS = 5  # of the vocabulary


def drawn(sequences, length=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (sequences, length), generator=generator)
    g = {name: torch.rand(sequences, length, count, generator=generator) - 0.6 for name, count in SIZES.items()}
    g["a"][..., 2] = -1.0  # never active
    return tokens, {name: values.clamp(min=0) for name, values in g.items()}


@pytest.fixture(scope="module")
def gathered():
    tokens, g = drawn(23)
    harvester = Harvester(SIZES, WORDS, 0.1)
    for start in range(0, 23, 5):
        harvester.add(tokens[start : start + 5], {name: values[start : start + 5] for name, values in g.items()})
    values = torch.cat(list(g.values()), -1)
    return harvester.result(), tokens, values


def test_shares_and_means(gathered):
    harvest, tokens, values = gathered
    assert harvest.tokens == tokens.numel()
    assert harvest.slices == ["a:0", "a:1", "a:2", "b:0", "b:1"]
    for s in range(5):
        own = values[..., s].flatten().tolist()
        assert harvest.density[s].item() == pytest.approx(sum(g > 0.1 for g in own) / len(own))
        assert harvest.importance[s].item() == pytest.approx(sum(own) / len(own))


def test_contexts_are_the_strongest_of_every_sequence(gathered):
    harvest, tokens, values = gathered
    for s in (0, 1, 3, 4):
        places = sorted(
            ((row[:, s].max().item(), int(row[:, s].argmax()), b) for b, row in enumerate(values)), reverse=True
        )
        for rank, (strength, position, b) in enumerate(places[: harvest.strengths.shape[1]]):
            assert harvest.strengths[s, rank].item() == pytest.approx(strength)
            around = range(position - BEFORE, position + AFTER + 1)
            expected = [int(tokens[b, t]) if 0 <= t < tokens.shape[1] else NO_TOKEN for t in around]
            assert harvest.contexts[s, rank].tolist() == expected
    assert not harvest.strengths[2].any()


@pytest.mark.parametrize(("which", "shift"), [("inputs", 0), ("following", 1)])
def test_preferred_tokens_by_their_definition(gathered, which, shift):
    harvest, tokens, values = gathered
    length = tokens.shape[1]
    pairs = [(b, t) for b in range(len(tokens)) for t in range(length - shift)]
    seen = Counter(int(tokens[b, t + shift]) for b, t in pairs)
    for s in range(5):
        active = Counter(int(tokens[b, t + shift]) for b, t in pairs if values[b, t, s] > 0.1)
        expected = {
            token: math.log((count / active.total()) / (seen[token] / seen.total()))
            for token, count in active.items()
            if count >= OFTEN
        }
        best = sorted(expected, key=expected.__getitem__, reverse=True)
        found = getattr(harvest, which)
        assert [token for token in found.tokens[s].tolist() if token != NO_TOKEN] == best
        assert found.information[s, : len(best)].tolist() == pytest.approx([expected[t] for t in best], abs=1e-6)
        assert found.counts[s, : len(best)].tolist() == [active[t] for t in best]


def test_partners_by_the_places_where_both_are_active(gathered):
    harvest, _, values = gathered
    on = values.flatten(0, 1) > 0.1
    for s in (0, 3):
        overlap = {
            o: (on[:, s] & on[:, o]).sum().item() / (on[:, s] | on[:, o]).sum().item() for o in range(5) if o != s
        }
        best = max(overlap, key=overlap.__getitem__)
        assert harvest.partners[s, 0].item() == best
        assert harvest.overlaps[s, 0].item() == pytest.approx(overlap[best])
        assert harvest.overlaps[s, -1] == 0  # itself, or one that is never active


def test_pairs_are_exact_while_there_is_room_and_short_by_little_after():
    numbers = np.random.default_rng(0)
    keys = numbers.zipf(1.5, size=20_000).astype(np.int64)
    truth = Counter(keys.tolist())
    for room in (10**6, 200):
        pairs = PairCounts(room)
        for part in np.array_split(keys, 50):
            pairs.add(part)
        pairs.settle()
        assert len(pairs.keys) <= room
        assert (pairs.missed == 0) == (room > len(truth))
        found = dict(zip(pairs.keys.tolist(), pairs.counts.tolist(), strict=True))
        assert all(truth[key] - pairs.missed <= count <= truth[key] for key, count in found.items())
        assert set(found) >= {key for key, count in truth.items() if count > pairs.missed}


def test_a_harvest_is_kept_whole(gathered, tmp_path):
    harvest, _, _ = gathered
    tabled = save_harvest(tmp_path, harvest, "abcde".__getitem__)
    again = load_harvest(tmp_path)
    assert (again.matrices, again.tokens, again.threshold) == (SIZES, harvest.tokens, 0.1)
    assert [described(again, s, "abcde".__getitem__) for s in range(5)] == [
        described(harvest, s, "abcde".__getitem__) for s in range(5)
    ]
    if tabled:
        from pyarrow.parquet import read_table

        rows = read_table(tmp_path / "harvest" / "slices.parquet").to_pylist()
        assert [row["slice"] for row in rows] == ["a:0", "a:1", "b:0", "b:1"]  # that are active anywhere
        assert rows[0]["examples"][0]["text"] == described(harvest, 0, "abcde".__getitem__).examples[0].text
    assert slice_number(again, "b:1") == 4
    for address, said in (("b:2", "slices 0 to 1"), ("c:0", "MATRIX:INDEX"), ("b", "MATRIX:INDEX")):
        with pytest.raises(UsageError) as error:
            slice_number(again, address)
        assert said in str(error.value.hint)
    with pytest.raises(SpdError, match="no run here"):
        load_harvest(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.toml").write_text("")
    with pytest.raises(SpdError, match="no harvest yet"):
        load_harvest(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("contexts", lambda tensor: tensor[:, :3], "has the shape"),
        ("partners", lambda tensor: tensor + 9, "slices that are not there"),
        ("inputs.tokens", lambda tensor: tensor - 9, "no tokens"),
        ("density", lambda tensor: tensor * float("nan"), "not finite"),
    ],
)
def test_a_harvest_that_was_not_written_so_is_refused(gathered, tmp_path, name, change, said):
    save_harvest(tmp_path, gathered[0], "abcde".__getitem__)
    path = tmp_path / "harvest" / "harvest.safetensors"
    tensors, about = load_tensors(path)
    save_tensors(path, tensors | {name: change(tensors[name])}, about)
    with pytest.raises(SpdError, match=said):
        load_harvest(tmp_path)


def test_a_harvest_of_another_decomposition_is_refused(gathered, tmp_path):
    run = tmp_path / "decomposition.safetensors"
    save_tensors(run, {"a": torch.ones(2)})
    save_harvest(tmp_path, gathered[0], "abcde".__getitem__, checksum({"a": torch.ones(2)}))
    assert load_harvest(tmp_path).matrices == SIZES
    save_tensors(run, {"a": torch.zeros(2)})
    with pytest.raises(SpdError, match="of another decomposition") as refused:
        load_harvest(tmp_path)
    assert refused.value.hint == f"spd harvest {tmp_path} gathers what its slices do over text"


def in_text(name, *contexts):
    examples = [Context("".join(words), words, at, 1.0) for words, at in contexts]
    return SliceInText(name, 0.1, 0.1, examples, [], [], [])


def test_a_search_puts_slices_at_the_words_first():
    near = in_text("near", (["New", " York", " is"], 2), (["in", " new", " york", "!"], 3))
    at = in_text("at", (["a", " New", " York"], 2))
    other = in_text("other", (["Old", " York"], 0))
    found = matching_slices([near, other, at], "new york", 5)
    assert [(match.slice, match.at_words, match.contexts) for match in found] == [("at", 1, 1), ("near", 0, 2)]
    assert len(matching_slices([near, at], "york", 1)) == 1
    assert is_at(Context("York York", ["York", " York"], 1, 1.0), "york")
    assert found[0].examples[0].marked == "a New« York»"


def test_the_commands_on_a_run(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("The cat sat. The dog ran away from the cat.\n" * 30)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_llama_dir)).replace('"vector"', '"vector"\ngate_bias = 1.0'))
    small = {"data.stream_length": 10, "decompose.steps": 1}
    spdcli.decompose(recipe, "run", data="texts.txt", **small)
    spd = spd_here(monkeypatch, capsys)
    code, out, err = spd("search", "run", "cat")
    assert code == 1
    one_line(err, "no harvest yet", "spd harvest run")
    code, out, err = spd("harvest", "run", "--tokens", 200, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["schema"] == "spd.harvest/1"
    assert data["tokens"] == 200
    first = data["slices"][0]
    assert {"slice", "density", "importance", "examples"} <= set(first)
    example = first["examples"][0]
    assert example["text"] == "".join(example["tokens"])
    code, out, err = spd("search", "run", "CAT", "--json")
    assert code == 0, err
    assert "cat" in json.loads(out)["matches"][0]["examples"][0]["text"]
    code, out, err = spd("search", "run", "zebra")
    assert code == 1
    one_line(err, "no slice has a context with 'zebra'")
    code, out, err = spd("inspect", "run", "--slice", first["slice"], "--json")
    assert code == 0, err
    (shown,) = json.loads(out)["slices"]
    assert shown["examples"] == first["examples"]
    assert len(shown["promotes"]) in (0, 5)
    code, out, err = spd("inspect", "run", "--slice", first["slice"])
    assert "«" in out
    code, out, err = spd("inspect", "run", "--slice", "nothing:0")
    assert code == 2
    code, out, err = spd("harvest", "run", "--matrix", "*up_proj", "--tokens", 50, "--data", "texts.txt")
    assert code == 0, err
    assert out.splitlines()[-1] == "run/harvest"
    prompts = {"importance.basis": "span", "decompose.steps": 1}
    spdcli.decompose(recipe, "span", **prompts)
    code, out, err = spd("harvest", "span", "--data", "texts.txt")
    assert code == 2
    one_line(err, "see only the span of its own prompts", "--data TEXT")
