"""Runs on text: what is trained on and what is not, the same sequences after a resume, gates that hold anywhere."""

from __future__ import annotations

from random import Random

import pytest
import torch
from small_runs import MODEL, model_recipe

import spdcli
from spdcli.errors import RecipeError, SpdError, UsageError
from spdcli.recipe.reading import load_recipe
from spdcli.runs import text_data
from spdcli.runs.subject import language_subject
from spdcli.targets.text_windows import in_order

CPU = torch.device("cpu")
SETTINGS = (
    "data.stream_length=6",
    "decompose.batch=3",
    "losses.stochastic_recon=0",
    "losses.hidden_stochastic_recon=1",
)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "texts.txt"
    letters = Random(0)
    path.write_text("".join(letters.choice("abcdefghijklmnopqrstuvwxyz \n") for _ in range(900)))
    return path


def text_recipe(model, text, *settings, folder):
    recipe = folder / "text.toml"
    recipe.write_text(MODEL.replace("MODEL", str(model)))
    from spdcli.recipe.overrides import text_in_place_of_prompts

    return load_recipe(recipe, [*text_in_place_of_prompts(text), *SETTINGS, *settings])


def test_held_out_text_is_never_drawn(tiny_llama_dir, text, tmp_path):
    recipe = text_recipe(tiny_llama_dir, text, "data.stream_held_out=0.2", folder=tmp_path).recipe
    subject = language_subject(recipe, CPU)
    corpus = subject.corpus()
    held_out = {tuple(row) for row in torch.cat(list(in_order(corpus.held_out, 10**6, 50))).tolist()}
    steps = len(corpus.training) // 3 + 1
    drawn = {tuple(row) for step in range(steps) for row in subject.batches(torch.Generator(), step).tokens.tolist()}
    assert len(corpus.held_out) == round(0.2 * (len(corpus.held_out) + len(corpus.training)))
    assert len(drawn) == len(corpus.training)  # all of them, and
    assert not drawn & held_out
    assert len(subject.stream().tokens) == min(text_data.BROAD_TOKENS // 6, len(corpus.training))
    shown = subject.prompts
    assert {tuple(row) for row in shown.batch.tokens.tolist()} <= held_out
    assert len(subject.held_out_prompts(7).texts) == 7
    assert subject.batches(torch.Generator(), 0).looked.all()
    last = text_recipe(tiny_llama_dir, text, "losses.last_token_only=true", folder=tmp_path).recipe
    assert language_subject(last, CPU).batches(torch.Generator(), 0).looked.sum(1).tolist() == [1, 1, 1]


def test_a_run_goes_on_at_the_same_sequences(tiny_llama_dir, text, tmp_path):
    settings = ("decompose.steps=6", "decompose.prune_at=0.5", "decompose.prune_below=0.9", "decompose.log_every=1")
    settings += ("losses.anneal_p=false",)  # else it would hang on the number of steps
    loaded = text_recipe(tiny_llama_dir, text, *settings, folder=tmp_path)
    whole = spdcli.decompose(loaded, tmp_path / "whole").directory
    short = text_recipe(
        tiny_llama_dir, text, *settings, "decompose.steps=4", "decompose.prune_at=0.75", folder=tmp_path
    )
    spdcli.decompose(short, tmp_path / "parts")  # pruned at its third step, as the other
    parts = spdcli.decompose(loaded, tmp_path / "parts", resume=True).directory
    losses = [[record["losses"]["hidden_stochastic_recon"] for record in run.metrics()] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_later_blocks_and_the_unembedding_are_not_run(tiny_llama_dir, text, tmp_path):
    recipe = text_recipe(tiny_llama_dir, text, "slices.matrices=['layers.0.*']", folder=tmp_path)
    run = spdcli.decompose(recipe)
    ran = []
    for number, block in enumerate(run.subject.target.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    spdcli.runs.training.learned(spdcli.runs.memory.MemoryRun(), recipe, run.subject)
    assert set(ran) == {0, 1}  # the second is entered and left at once


def test_data_of_the_command_and_of_python(tiny_llama_dir, text, tmp_path):
    recipe = tmp_path / "prompts.toml"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_llama_dir)).replace('"vector"', '"vector"\nbasis = "span"'))
    small = {"data.stream_length": 6, "decompose.steps": 1}
    run = spdcli.decompose(recipe, data=text, **small)
    assert run.recipe.data.prompts is None
    assert run.recipe.importance.basis == "full"
    assert run.importances("A text that it never saw")["layers.1.mlp.up_proj"].shape[1] == 6
    with pytest.raises(UsageError, match="for a target of your own"):
        spdcli.decompose(recipe, data=torch.zeros(2, 2))
    with pytest.raises(SpdError, match="no such file"):
        spdcli.decompose(recipe, data=tmp_path / "nowhere", **small)


def test_prompts_in_front_of_text(tiny_llama_dir, text, tmp_path):
    changes = [f"data.stream={text}", "slices.delta=true", "losses.targeted=1", "data.stream_length=6"]
    subject = language_subject(model_recipe(tiny_llama_dir, *changes, folder=tmp_path), CPU)
    assert len(subject.prompts.texts) == 2
    assert subject.held_out_prompts is None
    assert len(subject.stream().tokens) == min(256, len(subject.corpus().training))
    assert subject.stream() is subject.stream()  # read once


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["importance.basis=span"], "'full' holds on any text"),
        (["slices.init=dual"], "needs a fixed set of prompts"),
        (["losses.targeted=1", "slices.delta=true"], "is for prompts in front of text"),
    ],
)
def test_what_text_cannot_have(settings, said, tiny_llama_dir, text, tmp_path):
    with pytest.raises(RecipeError, match=said):
        text_recipe(tiny_llama_dir, text, *settings, folder=tmp_path)


def test_data_without_either(tiny_llama_dir, tmp_path):
    path = tmp_path / "none.toml"
    path.write_text(MODEL.replace("MODEL", str(tiny_llama_dir)))
    with pytest.raises(RecipeError, match="neither prompts nor a stream"):
        load_recipe(path, [spdcli.recipe.overrides.Override("--x", ("data", "prompts"), None)])
