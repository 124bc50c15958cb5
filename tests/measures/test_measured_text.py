"""What a language model is measured on: some of many prompts, part by part; the same numbers as of all at once."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from slow_evaluation import CPU, unsettle
from small_runs import model_recipe

from spdcli.commands.language_tables import language_tables
from spdcli.measures import evaluation_data
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evaluation_data import attacked_prompts, in_parts, measured_prompts
from spdcli.measures.evidence_choices import NO_SEARCH
from spdcli.records import plain
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject

PROMPTS = [f"The number {n} is {'very ' * (n % 3)}small" for n in range(12)]


@pytest.fixture(scope="module")
def subject(tiny_llama_dir, tmp_path_factory):
    changes = [f"data.prompts={PROMPTS}", "slices.delta=true"]
    return language_subject(model_recipe(tiny_llama_dir, *changes, folder=tmp_path_factory.mktemp("many")), CPU)


def test_a_sample_of_many_prompts_is_drawn_by_the_seed(subject, monkeypatch):
    length = int(subject.prompts.batch.valid.sum(1).float().mean())
    monkeypatch.setattr(evaluation_data, "TOKENS", 5 * length)
    some = measured_prompts(subject, None, 1)
    assert len(some.texts) == 5
    assert set(some.texts) < set(PROMPTS)
    assert [PROMPTS.index(text) for text in some.texts] == sorted(PROMPTS.index(text) for text in some.texts)
    assert measured_prompts(subject, None, 1).texts == some.texts != measured_prompts(subject, None, 2).texts
    assert measured_prompts(subject, 7, 1).batch.tokens.shape[0] == 7
    assert measured_prompts(subject, 99, 1) is subject.prompts
    for row, text in enumerate(some.texts):
        whole = PROMPTS.index(text)
        assert torch.equal(some.batch.tokens[row], subject.prompts.batch.tokens[whole])
        assert some.answer_at[row] == subject.prompts.answer_at[whole]


def test_masks_are_sought_on_a_few_tokens(subject, monkeypatch):
    assert attacked_prompts(subject, subject.prompts.select([0])).texts == PROMPTS[:1]
    monkeypatch.setattr(evaluation_data, "TOKENS_ATTACKED", 4)
    cut = attacked_prompts(subject, subject.prompts)
    assert cut.texts == PROMPTS[:1]
    assert torch.equal(cut.batch.tokens, subject.prompts.batch.tokens[:1, :4])
    assert cut.batch.answers.tolist() == subject.prompts.batch.tokens[:1, 4].tolist()  # what follows them
    assert cut.answer_at.tolist() == [3]
    assert cut.batch.looked[0, 3]
    assert subject.prompts.select([0]).cut(1000).batch.answers.equal(subject.prompts.batch.answers[:1])


def test_parts_give_the_numbers_of_the_whole(subject, tiny_llama_dir, tmp_path, monkeypatch):
    recipe = model_recipe(tiny_llama_dir, "slices.delta=true", folder=tmp_path)
    decomposition = unsettle(start_decomposition(recipe, subject, ["layers.0.mlp.up_proj", "layers.1.mlp.down_proj"]))
    monkeypatch.setattr(evaluation_data, "TOKENS_AT_ONCE", 10**6)
    whole = plain(evaluate(subject, decomposition, 12, 0.1, 0, NO_SEARCH))
    monkeypatch.setattr(evaluation_data, "TOKENS_AT_ONCE", 2 * subject.length)
    assert sum(1 for _ in in_parts(subject, subject.prompts)) == 6
    evaluation = evaluate(subject, decomposition, 12, 0.1, 0, NO_SEARCH)
    parts = plain(evaluation)
    # Masks are drawn part by part; a hidden loss is a mean over the places of a part.
    own = ("stochastic_recon", "stochastic_recon_layerwise", "stochastic", "hidden_recon")
    for one in (whole, parts):
        for section in (
            one["metrics"],
            one["standard_error"],
            one["evidence"]["standard_error"],
        ):
            for name in own:
                section.pop(name, None)
        for name in own:
            one["evidence"].pop(name, None)

    def differences(a, b, where=""):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            return [one for key in a for one in differences(a[key], b[key], f"{where}.{key}")]
        if isinstance(a, list):
            assert len(a) == len(b)
            return [one for n, pair in enumerate(zip(a, b, strict=True)) for one in differences(*pair, f"{where}.{n}")]
        alike = a == pytest.approx(b, rel=1e-4, abs=1e-6) if isinstance(a, float) else a == b
        return [] if alike else [(where, a, b)]

    assert differences(whole, parts) == []
    assert parts["measured_on"] == "prompts"
    assert parts["sequences"] == 12
    printed = Console(record=True, width=100)
    for part in language_tables(evaluation, subject):
        printed.print(part)
    lines = printed.export_text().splitlines()
    assert "12 sequences" in lines[0]
    assert len(lines) < 80  # however many prompts there are
    assert any("and 2 more" in line for line in lines)
