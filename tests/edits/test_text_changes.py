"""What an edit does to a text, against a model changed by hand; and what scripts may expect of it."""

from __future__ import annotations

import json

import pytest
import torch
from edited_models import open_case
from small_runs import MODEL, spd_here

from spdcli.edits.suppression import Address, suppression
from spdcli.edits.text_changes import TextToKeep, change_of, text_changes

FC = "h.1.mlp.c_fc"


class Kept:
    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def read(self, numbers):
        return self.tokens[numbers]


def test_every_token_against_edited_weights(request, tmp_path):
    """KL(before ‖ after) at every position, from the logits of a model whose weights were changed in place."""
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path)
    target, tokens = subject.target, torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(0))
    edits = {
        "both": suppression(target, decomposition, [Address(names[0], 1), Address(names[2], 0)]),
        "whole": suppression(target, decomposition, [Address(names[0], 1)], "whole"),
    }
    measured = text_changes(target, edits, [tokens[:2], tokens[2:]])
    with torch.no_grad():
        before = target.model(tokens).logits.log_softmax(-1)
        for name, edit in edits.items():
            kept = {matrix: target.matrices[matrix].weight.clone() for matrix in edit}
            for matrix, factors in edit.items():
                target.matrices[matrix].weight.sub_(factors.read @ factors.write)
            after = target.model(tokens).logits.log_softmax(-1)
            for matrix, weight in kept.items():
                target.matrices[matrix].weight.copy_(weight)
            kl = (before.exp() * (before - after)).sum(-1).flatten().sort().values
            assert kl.max() > 1e-4
            change = measured[name]
            assert change.tokens == 35
            expected = [kl.mean(), kl[17], kl[34], kl[34]]
            numbers = [change.kl_mean, change.kl_median, change.kl_p99, change.kl_max]
            assert numbers == pytest.approx([float(one) for one in expected], rel=1e-4)


def test_percentiles_by_hand():
    """Of 0, 1, ..., 199 two numbers exceed the 99th percentile, which is the 198th: 197."""
    change = change_of([torch.arange(150.0).flip(0), torch.arange(150.0, 200.0)])
    assert (change.tokens, change.kl_mean, change.kl_median) == (200, 99.5, 99.5)
    assert (change.kl_p99, change.kl_max) == (197.0, 199.0)


def test_no_more_is_read_than_asked_for():
    text = TextToKeep(Kept(torch.arange(60).view(10, 6)), tokens=20)
    assert torch.cat(list(text.parts())).tolist() == torch.arange(24).view(4, 6).tolist()


SCRIPT = """
[[edit]]
name = "cut"
slices = ["h.1.mlp.c_fc:0"]

[[edit.expect]]
text = "corpus"
measure = "kl_p99"
at_most = 100

[[edit.expect]]
text = "corpus"
measure = "kl_max"
at_most = 0
"""


def test_a_script_may_bound_the_tail_over_a_text(tmp_path, tiny_gpt2_dir, monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    (tmp_path / "model.toml").write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    run = tmp_path / "run"
    assert spd("decompose", tmp_path / "model.toml", "--out", run, "--set", "slices.init='svd'")[0] == 0
    (tmp_path / "text.txt").write_text("the sport of golf and basketball " * 40)
    (tmp_path / "edits.toml").write_text(SCRIPT)
    code, out, err = spd(
        "suppress", run, "--script", tmp_path / "edits.toml", "--text", tmp_path / "text.txt", "--json"
    )
    assert code == 1, err
    data = json.loads(out)
    assert [one["passed"] for one in data["expectations"]] == [True, False]
    assert data["text"]["kl_max"] == data["expectations"][1]["value"] > data["expectations"][0]["value"] > 0
    one = json.loads(
        spd("suppress", run, "--slice", f"{FC}:0", "--no-facts", "--text", tmp_path / "text.txt", "--json")[1]
    )
    assert one["text"] == data["text"]
    assert "KL a token of the text" in spd("suppress", run, "--slice", f"{FC}:0", "--text", tmp_path / "text.txt")[1]
    code, _, err = spd("suppress", run, "--script", tmp_path / "edits.toml")
    assert code == 2
    assert "the run has no text of its own" in err


def test_locate_and_report_tell_of_a_text_too(tmp_path, tiny_llama_dir, monkeypatch, capsys):
    """The same numbers as suppress, of each slice that is told."""
    spd = spd_here(monkeypatch, capsys)
    (tmp_path / "model.toml").write_text(MODEL.replace("MODEL", str(tiny_llama_dir)))
    run, text = tmp_path / "run", tmp_path / "text.txt"
    changes = ["--set", "slices.init='svd'", "--set", "data.stream=generated", "--set", "losses.targeted=1"]
    changes += ["--set", "slices.delta=true", "--set", "data.stream_sequences=16", "--set", "data.stream_length=8"]
    assert spd("decompose", tmp_path / "model.toml", "--out", run, *changes)[0] == 0
    text.write_text("the sport of golf and basketball " * 40)
    asked = ["--text", text, "--text-tokens", "64", "--no-facts", "--json"]
    located = json.loads(spd("locate", run, "--prompt", "1", "--top", "2", "--paired", "2", *asked)[1])
    for entry in located["slices"]:
        alone = json.loads(spd("suppress", run, "--slice", entry["slice"], *asked)[1])
        assert entry["text"] == pytest.approx(alone["text"], rel=1e-4, abs=1e-9)
    assert "text: KL, 99 %" in spd("locate", run, "--prompt", "1", *asked[:-1])[1]
    own = json.loads(spd("suppress", run, "--slice", located["slices"][0]["slice"], "--text", "own", "--json")[1])
    assert own["text"]["tokens"] == 16 * 8
