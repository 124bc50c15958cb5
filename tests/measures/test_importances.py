"""Importances of a text or of token ids: those of the same tokens in a run's own prompts."""

from __future__ import annotations

import pytest
import torch
from planted_gates import BRYANT, FC, PROJ, plant_gates
from small_runs import loud_toy, toy_recipe

from spdcli.errors import SpdError, UsageError
from spdcli.measures.importances import importances, importances_of
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import toy_subject

KOBE = "Kobe Bryant plays professional basketball"


@pytest.fixture(scope="module")
def planted(tiny_gpt2_dir, tmp_path_factory):
    return plant_gates(tiny_gpt2_dir, tmp_path_factory.mktemp("planted"))


@pytest.fixture
def toy(tmp_path):
    recipe = toy_recipe(folder=tmp_path)
    subject = toy_subject(recipe, loud_toy(recipe))
    return subject, start_decomposition(recipe, subject, ["Q0", "V1"]).requires_grad_(False)


def test_a_text_is_fed_whole_and_ids_as_they_are(planted):
    subject, decomposition, _ = planted
    own, _ = importances_of(subject, decomposition, subject.prompts.batch)
    by_text = importances(subject, decomposition, KOBE)
    fed = subject.prompts.fed(0)  # without the answer
    for name in (FC, PROJ):
        assert by_text[name].shape == (len(fed) + 1, 6)
        torch.testing.assert_close(by_text[name][: len(fed)], own[name][0, : len(fed)], atol=1e-5, rtol=1e-4)
        assert by_text[name][BRYANT[1]].count_nonzero() > 0
        for ids in (fed, torch.tensor(fed)):
            torch.testing.assert_close(importances(subject, decomposition, ids)[name], own[name][0, : len(fed)])
    both = importances(subject, decomposition, [fed, fed[::-1]])
    assert both[FC].shape == (2, len(fed), 6)
    torch.testing.assert_close(both[FC][0], own[FC][0, : len(fed)])


def test_the_begin_token_comes_first(planted):
    subject, decomposition, _ = planted
    ids = [0, *subject.prompts.tokenizer("Woods plays")["input_ids"]]
    begun = importances(subject, decomposition, "Woods plays", begin_token=True)
    assert all(torch.equal(g, begun[name]) for name, g in importances(subject, decomposition, ids).items())


def test_one_token_is_enough_and_none_is_not(planted):
    subject, decomposition, _ = planted
    assert importances(subject, decomposition, " Bryant")[FC].shape == (1, 6)
    with pytest.raises(SpdError, match="has 0 tokens; at least 1 is needed"):
        importances(subject, decomposition, "")
    for ids in ([], torch.zeros(2, 2, 2, dtype=torch.long)):
        with pytest.raises(UsageError, match=r"token ids of shape \("):
            importances(subject, decomposition, ids)


def test_the_toys_tokens(toy):
    subject, decomposition = toy
    g = importances(subject, decomposition, "3 s 1 4 s")
    assert g["Q0"].shape == (5, 5)
    assert torch.equal(g["V1"], importances(subject, decomposition, [3, 6, 1, 4, 6])["V1"])
    with pytest.raises(UsageError, match="the toy has no token 'x'"):
        importances(subject, decomposition, "3 x")
    for longer in ("1 " * 9, [1] * 9):
        with pytest.raises(UsageError, match="9 tokens, but the toy takes 8"):
            importances(subject, decomposition, longer)
