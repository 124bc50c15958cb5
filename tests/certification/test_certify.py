"""`spd certify` on decompositions that are right and on ones broken by hand, from Python and from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from right_decompositions import hide_a_pair, right_run
from slow_evaluation import CPU
from small_runs import MODEL, one_line, spd_here

import spdcli
from spdcli.certification.certify import Certifying
from spdcli.certification.held_out import held_out
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.masks import held_masks
from spdcli.errors import UsageError
from spdcli.measures.evidence_choices import NO_SEARCH, MaskSearch
from spdcli.recipe.bounds import BOUNDS
from spdcli.recipe.reading import load_recipe
from spdcli.runs.subject import language_subject

QUICK = Certifying(8, adversary=MaskSearch("quick", 2))
BOUND = {"l0": 48, "delta_share": 1e-6, "kl_importance": 1e-6, "accuracy_corners": 0, "pgd_shared": 0.1}


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


def test_a_right_decomposition_passes_and_one_with_a_hidden_pair_does_not(tmp_path):
    run = right_run(tmp_path)
    right = run.certify(bounds=BOUND, settings=QUICK)
    assert right.passed
    assert {row.name: row.passed for row in right.rows if row.bound} == dict.fromkeys(BOUND, True)
    assert next(row.value for row in right.rows if row.name == "l0") == 48
    broken = hide_a_pair(run).certify(bounds=BOUND, settings=QUICK)
    assert not broken.passed
    assert [row.name for row in broken.failures] == ["pgd_shared"]
    assert "20 steps of 0.1, 2 random starts and 2 corners" in broken.failures[0].budget


def test_what_a_bound_names_and_nothing_measured_fails(tmp_path):
    run, none = right_run(tmp_path), Certifying(8, adversary=NO_SEARCH)
    certificate = run.certify(bounds={"pgd_curve": 1, "matched_U": 0.5, "kl_held_out_1": 1}, settings=none)
    assert {row.name: row.value for row in certificate.failures} == dict.fromkeys(
        ["pgd_curve", "matched_U", "kl_held_out_1"]
    )
    assert run.certify(settings=none).passed  # the recipe sets no bound
    with pytest.raises(UsageError, match="'kl': expected one of l0, "):
        run.certify(bounds={"kl": 1})
    same = run.certify(run, bounds={"matched_U": 0.99, "matched_V": 0.99}, settings=none)
    assert same.passed
    assert [row.name for row in same.rows if "matched" in row.name] == [
        "matched_U:memory", "matched_U", "matched_V:memory", "matched_V"
    ]  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A right run in a directory, whose recipe sets bounds."""
    run = right_run(tmp_path, "certify.kl_importance=1e-6", "certify.pgd_shared=0.1")
    return run.save(tmp_path / "run").path


OPTIONS = ("--adversary", "quick", "--starts", 2, "--sequences", 8)


def test_the_command_says_what_holds_and_keeps_the_contract(spd, saved):
    code, out, err = spd("certify", saved, *OPTIONS, "--json")
    assert (code, err.splitlines()[1:]) == (0, [])
    data = json.loads(out)
    assert json.loads((saved / "certificate.json").read_text()) == data
    assert (data["schema"], data["run"], data["passed"]) == ("spd.certify/1", str(saved), True)
    assert all({"name", "value", "bound", "passed", "budget"} <= row.keys() for row in data["rows"])
    assert {row["name"].partition(":")[0] for row in data["rows"]} <= set(BOUNDS)
    code, out, _ = spd("certify", saved, *OPTIONS)
    assert code == 0
    assert "2 of 2 bounds hold" in out
    assert "adversarial" in out
    assert out.splitlines()[-1] == str(saved / "certificate.json")
    assert spd("certify", saved, *OPTIONS, "-q") == (0, f"{saved / 'certificate.json'}\n", "")


def test_every_bound_that_fails_is_told_with_its_line(spd, saved, tmp_path):
    lines = (saved / "recipe.toml").read_text().splitlines()
    line = 1 + lines.index("pgd_shared = 0.1")
    run = spdcli.load(saved)
    hide_a_pair(run).save(tmp_path / "broken")
    code, out, err = spd("certify", tmp_path / "broken", *OPTIONS, "--set", "certify.l0=1", "-q")
    assert (code, out) == (1, f"{tmp_path / 'broken' / 'certificate.json'}\n")
    first, second = err.splitlines()
    assert first.startswith("error: --set certify.l0=1: [certify] l0 is 48 (8 fresh sequences")
    assert second.startswith(f"error: {tmp_path / 'broken' / 'recipe.toml'}:{line}: [certify] pgd_shared is ")
    assert second.endswith("expected ≤ 0.1")


def test_bounds_of_another_recipe_and_mistakes_in_them(spd, saved, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text((saved / "recipe.toml").read_text().replace("pgd_shared = 0.1", "faithfulness = 0.0"))
    code, _, err = spd("certify", saved, *OPTIONS, "--recipe", other, "-q")
    assert code == 1
    one_line(err, f"{other}:", "[certify] faithfulness is")
    code, _, err = spd("certify", saved, "--set", "certify.pgd_share=1")
    assert code == 2
    one_line(err, "unknown key 'pgd_share'", "did you mean")
    code, _, err = spd("certify", saved, "--set", "slices.C=1")
    assert code == 2
    one_line(err, "only bounds can be set")
    assert spd("certify", tmp_path / "nowhere")[0] == 2


@pytest.fixture
def model_run(tiny_gpt2_dir, tmp_path):
    path = tmp_path / "model.toml"
    stream = 'stream = "generated"\nstream_sequences = 9\nstream_length = 6\n\n[slices]\ndelta = true'
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)).replace("[slices]", stream))
    return spdcli.decompose(path)


@torch.no_grad()
def test_held_out_text_is_other_text_and_measured_at_every_position(model_run):
    subject, decomposition = model_run.subject, model_run.decomposition
    trained, fresh = subject.stream().tokens, subject.held_out().tokens
    assert fresh.shape == trained.shape == (9, 6)
    assert not torch.equal(fresh, trained)
    measured = held_out(subject, decomposition, lambda progress: None)
    clean = clean_pass(subject.target, subject.held_out(), decomposition.names)
    g, _ = decomposition.importance(clean.inputs)
    for name, delta in (("kl_held_out_0", 0.0), ("kl_held_out_1", 1.0)):
        log_q = masked_logits(subject.target, decomposition, clean, held_masks(g, delta)).log_softmax(-1)
        slow = (clean.log_probs.exp() * (clean.log_probs - log_q)).sum(-1).mean()
        assert measured[name].value == pytest.approx(slow.item(), rel=1e-4)
        assert "9 sequences of 6 tokens" in measured[name].budget


def test_an_edit_script_brings_bounds_of_its_own(model_run, tmp_path):
    script = tmp_path / "edits.toml"
    script.write_text("""
[[edit]]
name = "one slice"
slices = ["h.1.mlp.c_fc:0"]

[[edit.expect]]
prompt = 1
measure = "ratio"
at_most = 100.0

[[edit.expect]]
prompt = 2
measure = "change"
at_least = 1000.0
""")
    certificate = model_run.certify(script=script, settings=Certifying(adversary=NO_SEARCH))
    rows = {row.name: row for row in certificate.rows if row.name.startswith("edit:one slice: ")}
    assert [row.passed for row in rows.values()] == [True, False]
    assert not certificate.passed
    assert {row.budget for row in rows.values()} == {f"edit script {script}"}
    assert {"kl_held_out_0", "kl_held_out_1"} <= {row.name for row in certificate.rows}


def test_a_text_file_without_more_windows_has_nothing_held_out(tiny_gpt2_dir, tmp_path):
    text, path, said = tmp_path / "text.txt", tmp_path / "model.toml", []
    text.write_text("basketball and golf " * 3)
    many = f'stream = "{text}"\nstream_sequences = SIZE\nstream_length = 6\n\n[slices]'
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)).replace("[slices]", many.replace("SIZE", "2")))
    subject = language_subject(load_recipe(path).recipe, CPU)
    windows = [tuple(row) for row in [*subject.stream().tokens.tolist(), *subject.held_out().tokens.tolist()]]
    assert len(windows) == 2 + 1  # of what is left a twentieth, at least one
    count = len(subject.prompts.tokenizer(text.read_text())["input_ids"]) // 6
    path.write_text(path.read_text().replace("stream_sequences = 2", f"stream_sequences = {count}"))
    subject = language_subject(load_recipe(path).recipe, CPU)
    assert held_out(subject, None, lambda progress: said.append(progress.text)) == {}
    assert said[0].startswith("no held-out text: data.stream: ")
