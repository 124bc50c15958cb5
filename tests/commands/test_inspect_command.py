"""`spd inspect`: what its JSON keeps, what people see, and what cannot be found."""

from __future__ import annotations

import json

import pytest
from command_runs import check_numbers
from small_runs import one_line


def test_inspect_keeps_the_contract(spd, model_run):
    code, printed, err = spd("inspect", model_run, "--token", "Bryant", "--json", "--top", 3, "--labels", 2)
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert (data["schema"], data["token"]) == ("spd.inspect/2", "Bryant")
    (occurrence,) = data["occurrences"]
    assert (occurrence["number"], occurrence["position"], occurrence["token"]) == (1, 2, " Bryant")
    assert len(occurrence["slices"]) == 3
    for entry in occurrence["slices"]:
        assert {"slice", "importance", "activation", "unique", "promotes", "reads"} <= entry.keys()
        assert isinstance(entry["unique"], bool)
        assert len(entry["reads"]) == 2
    check_numbers(data)


def test_inspect_for_people(spd, model_run):
    code, printed, _ = spd("inspect", model_run, "--token", "plays", "--matrix", "*c_fc", "--threshold", 0.2)
    assert code == 0
    assert printed.count("importance over prompt") == 2
    assert "' plays' at position 3 of prompt 1" in printed
    slices = [line.split("│")[1].strip(" *") for line in printed.splitlines() if line.startswith("│")]
    assert slices
    assert all(address.startswith("h.1.mlp.c_fc:") for address in slices)
    code, quiet, _ = spd("inspect", model_run, "--token", "plays", "--matrix", "*c_fc", "--threshold", 0.2, "-q")
    assert (code, quiet.split()) == (0, list(dict.fromkeys(slices)))
    nothing = spd("inspect", model_run, "-t", "plays", "--threshold", 1)[1]
    assert "No slice is active at position 3 of prompt 1: ' plays'\n" in nothing
    assert "No slice is active at position 3 of prompt 2: ' plays'\n" in nothing
    nothing = spd("inspect", model_run, "--threshold", 1)[1]
    assert "No slice is active at positions 0 to 4 of prompt 1: 'K' 'obe' ' Bryant' ' plays' ' professional'" in nothing


def test_inspect_of_another_text(spd, model_run):
    code, printed, err = spd("inspect", model_run, "-p", "Woods plays golf", "-p", "the sport", "--json", "-t", "plays")
    assert (code, err) == (0, "")
    data = json.loads(printed)
    assert [(o["number"], o["text"]) for o in data["occurrences"]] == [(1, "Woods plays golf")]


def test_inspect_warns_where_span_gates_look_outside_their_span(spd, model_recipe_file, tmp_path):
    out = tmp_path / "span"
    assert spd("decompose", model_recipe_file, "--out", out, "--set", "importance.basis=span")[0] == 0
    assert spd("inspect", out, "-q")[2] == ""
    assert "warning: this run's gates see only the span" in spd("inspect", out, "-q", "-p", "Woods plays golf")[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-t", "Jordan"], ("no prompt has the token 'Jordan'", "hint: the tokens are 'K'", "' Bryant'")),
        (["-t", "golf"], ("the token 'golf' is only an answer", "data.answers = 'fed'")),
        (["-m", "h.9.*"], ("no decomposed matrix matches 'h.9.*'", "the run has h.1.attn.c_attn")),
    ],
)
def test_what_inspect_cannot_find_is_one_line(spd, model_run, options, said):
    code, printed, err = spd("inspect", model_run, *options)
    assert (code, printed) == (2, "")
    one_line(err, *said)
