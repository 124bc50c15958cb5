"""What the explorer shows: the importances, slices and next tokens that other ways give too."""

from __future__ import annotations

import pytest
import torch
from small_runs import model_recipe

import spdcli
from spdcli.explorer.exploration import WAYS, NextToken, NextTokens
from spdcli.explorer.rendering import bar, candidates, heat_cell, quoted, shade, shown_token

KOBE = "Kobe Bryant plays professional basketball"


def off_in(run, view):
    """Slices of two matrices, one of which has two of them."""
    first, second = run.matrices[:2]
    return [f"{first}:0", f"{second}:1", f"{second}:3"]


@pytest.mark.parametrize("kind", ["toy_run", "language_run"])
def test_a_map_is_the_sum_of_importances(kind, request):
    run = request.getfixturevalue(kind)
    exploration = run.explore()
    for number, text in enumerate(exploration.own.texts, 1):
        view = exploration.prompt(number)
        fed = text if kind == "toy_run" else text.rpartition(" ")[0]  # the answer is held out
        g = run.importances(fed)
        assert view.matrices == run.matrices
        torch.testing.assert_close(view.heat, torch.stack([g[name].sum(-1) for name in run.matrices]))
        assert (view.text, view.number, view.position) == (text, number, len(view.pieces) - 1)
    assert exploration.prompt(number + 1).number == 1


@pytest.mark.parametrize("kind", ["toy_run", "language_run"])
def test_nothing_off_is_the_model(kind, request):
    run = request.getfixturevalue(kind)
    exploration = run.explore()
    view = exploration.prompt(1)
    with torch.no_grad():
        logits = run.model(exploration.own.batch.tokens[:1, : len(view.pieces)])
    p = getattr(logits, "logits", logits)[0, -1].softmax(-1)
    said = exploration.next_tokens(view, top=3)
    assert [one.after for one in said.tokens[:3]] == pytest.approx(p.topk(3).values.tolist(), abs=1e-5)
    assert said.kl == 0
    (answer,) = [one for one in said.tokens if one.answer]
    assert answer.before == pytest.approx(p[view.answer].item(), abs=1e-5)


def test_slices_off_by_suppression_are_the_edited_model(language_run):
    exploration = language_run.explore()
    view = exploration.prompt(1)
    off = off_in(language_run, view)
    said = exploration.next_tokens(view, off)
    with torch.no_grad():
        edited = language_run.suppress(off)(language_run.tokens(view.text)[None, :-1]).logits[0, -1].softmax(-1)
    assert [one.after for one in said.tokens[:3]] == pytest.approx(edited.topk(3).values.tolist(), abs=1e-5)
    assert said.kl > 1e-6
    (effect,) = [one for one in language_run.suppression(off, facts=None).effects if one.prompt == view.text]
    (answer,) = [one for one in said.tokens if one.answer]
    wanted = (effect.before, effect.after, effect.kl)  # of batches of other sizes, in float32
    assert (answer.before, answer.after, said.kl) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("way", "others"), [("ablate", "on"), ("importance", "importance")])
@pytest.mark.parametrize("kind", ["toy_run", "language_run"])
def test_slices_off_by_ablation_are_what_ablate_says(kind, way, others, request):
    run = request.getfixturevalue(kind)
    exploration = run.explore()
    view = exploration.prompt(2)
    off = off_in(run, view)
    asked = view.text
    (effect,) = run.ablate(off, others=others, prompts=[asked], facts=None).effects
    said = exploration.next_tokens(view, off, way)
    (answer,) = [one for one in said.tokens if one.answer]
    wanted = (effect.before, effect.after, effect.kl)  # of batches of other sizes, in float32
    assert (answer.before, answer.after, said.kl) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert answer.before != answer.after


def test_the_slices_of_a_cell_are_those_of_inspect(language_run):
    exploration = language_run.explore(labels=5)
    view = exploration.prompt(1)
    for matrix, name in enumerate(language_run.matrices):
        inspected = language_run.inspect(matrices=[name]).occurrences[2]
        assert exploration.labelled(exploration.slices(view, matrix, 2)) == inspected.slices


def test_a_typed_text_is_fed_whole(language_run, toy_run):
    view = language_run.explore().typed("Kobe Bryant")
    assert ("".join(view.pieces), view.number, view.answer) == ("Kobe Bryant", None, None)
    toy = toy_run.explore().typed("3 s 1 4 s")
    assert list(toy.pieces) == ["3", "s", "1", "4", "s"]


def test_gates_in_the_span_of_the_prompts_are_told(tiny_gpt2_dir, tmp_path):
    run = spdcli.decompose(model_recipe(tiny_gpt2_dir, "importance.basis=span", folder=tmp_path))
    exploration = run.explore()
    assert "projection" in exploration.typed("Kobe Bryant").note
    assert not exploration.prompt(1).note


def test_mistakes(language_run):
    exploration = language_run.explore()
    with pytest.raises(spdcli.UsageError, match="no text"):
        exploration.typed("  ")
    with pytest.raises(spdcli.UsageError, match="is no slice"):
        exploration.next_tokens(exploration.prompt(1), ["nothing"])
    with pytest.raises(spdcli.UsageError, match=f"expected one of {', '.join(WAYS)}"):
        exploration.next_tokens(exploration.prompt(1), [], "break")


def test_the_ramp_is_told_apart_in_grey():
    """Relative luminance rises all the way, and ink stands out of it: contrast of 4.5 at least."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    shares = [step / 50 for step in range(51)]
    lights = [luminance(shade(share)) for share in shares]
    assert lights == sorted(lights)
    for share, light in zip(shares, lights, strict=True):
        ink = 0.0 if "black" in str(heat_cell(1.0, share).style) else 1.0
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.5, share


def test_pieces_of_the_screen():
    assert str(heat_cell(0.0, 0.0)) == "·"
    assert (str(heat_cell(1.25, 1.0)), str(heat_cell(12.3, 1.0))) == ("1.25", "12")
    assert (quoted(" a"), quoted("\n")) == ("' a'", "'\\n'")
    assert (str(shown_token(" ")), str(shown_token(" Bryant")), str(shown_token("a" * 20))) == (
        "' '", "Bryant", "a" * 11 + "…",
    )  # fmt: skip
    assert [bar(0.5, 0.25, 8), bar(0.25, 0.5, 8)] == ["██░░", "██▓▓"]


def test_the_answer_is_never_left_out():
    tokens = [NextToken(f" {n}", 0.1, 0.1, n == 5) for n in range(6)]
    lines = candidates(NextTokens("suppress", [], tokens, 0.0), "' x'", "gone", 60, 3).plain.splitlines()
    assert [line[:5].strip() for line in lines] == ["next,", "' 0", "' 1", "→ ' 5", "befor"]
    assert all(len(line) <= 60 for line in lines)
