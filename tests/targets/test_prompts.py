"""Prompts: padding, answers, and tokens found by text or id."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from spdcli.errors import SpdError, UsageError
from spdcli.targets.prompts import encode, find_token, token_text

KOBE, TIGER = "Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2_dir):
    return AutoTokenizer.from_pretrained(tiny_gpt2_dir, local_files_only=True)


def test_held_out_answers_are_not_fed(tokenizer):
    prompts = encode(tokenizer, [KOBE, TIGER])
    assert prompts.pieces == [
        ["K", "obe", " Bryant", " plays", " professional"],
        ["T", "iger", " Woods", " plays", " the", " sport", " of"],
    ]
    assert prompts.answer_texts == [" basketball", " golf"]
    assert prompts.batch.valid.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    assert torch.equal(prompts.batch.looked, prompts.batch.valid)
    assert prompts.answer_at.tolist() == [4, 6]
    assert [token_text(tokenizer, token) for token in prompts.batch.answers.tolist()] == [" basketball", " golf"]


def test_fed_answers_are_predicted_one_position_before(tokenizer):
    prompts = encode(tokenizer, [KOBE, TIGER], answers="fed")
    assert prompts.pieces[0][-1] == " basketball"
    assert prompts.answer_at.tolist() == [4, 6]
    assert prompts.batch.tokens[0, 5] == prompts.batch.answers[0]
    assert prompts.batch.valid.sum(1).tolist() == [6, 8]


def test_begin_token_comes_first_only_when_asked_for(tokenizer):
    assert encode(tokenizer, [KOBE], begin_token=True).pieces[0][:2] == ["<s>", "K"]
    assert encode(tokenizer, [KOBE]).pieces[0][0] == "K"


def test_a_begin_token_that_the_tokenizer_puts_itself_is_fed_unless_refused(tokenizer, tmp_path):
    """As Llama's and Gemma's do; a tokenizer that is left to itself here puts none."""
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    begin = {"id": "<s>", "ids": [0], "tokens": ["<s>"]}
    pieces = {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    saved["post_processor"] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"<s>": begin}} | pieces
    path.write_text(json.dumps(saved))
    begins = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    prompts = encode(begins, [KOBE])
    assert prompts.begin_token
    assert prompts.pieces[0][:2] == ["<s>", "K"]
    assert encode(begins, [KOBE], begin_token=False).pieces[0][0] == "K"
    assert not encode(tokenizer, [KOBE]).begin_token


def test_begin_token_needs_a_tokenizer_that_has_one(tiny_gpt2_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir, local_files_only=True)
    tokenizer.bos_token = None
    with pytest.raises(SpdError, match="no begin-of-sequence token"):
        encode(tokenizer, [KOBE], begin_token=True)


@pytest.mark.parametrize("text", ["", " golf"])
def test_a_prompt_too_short_is_named(tokenizer, text):
    with pytest.raises(SpdError, match=f"the prompt '{text}' has [01] token"):
        encode(tokenizer, [KOBE, text])


def test_one_token_is_enough_after_a_begin_token(tokenizer):
    assert encode(tokenizer, [" golf"], begin_token=True).pieces == [["<s>"]]


def test_a_prompt_too_long_is_named(tiny_gpt2_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir, local_files_only=True, model_max_length=5)
    with pytest.raises(SpdError, match=r"'Kobe Bryant.*' has 6 tokens; the model takes 5"):
        encode(tokenizer, [KOBE])


@pytest.mark.parametrize(
    ("query", "places"),
    [
        ("Bryant", [(0, 2)]),
        (" Bryant", [(0, 2)]),
        ("Kobe", [(0, 1)]),  # several tokens: the last of them
        ("obe", [(0, 1)]),
        (" obe", None),  # there is no space before it
        ("plays", [(0, 3), (1, 3)]),
        ("plays the", [(1, 4)]),
        (" sport of", [(1, 6)]),
        ("Kob", None),  # ends inside a token
        ("golf", None),  # held out
    ],
)
def test_find_token_by_text(tokenizer, query, places):
    prompts = encode(tokenizer, [KOBE, TIGER])
    if places is None:
        with pytest.raises(UsageError):
            find_token(prompts, query)
    else:
        assert find_token(prompts, query) == places


def test_find_token_by_id(tokenizer):
    prompts = encode(tokenizer, [KOBE, TIGER])
    token = tokenizer(" Bryant")["input_ids"][0]
    assert find_token(prompts, f"#{token}") == [(0, 2)]
    assert find_token(prompts, str(token)) == [(0, 2)]


def test_digits_that_are_a_token_are_text_first(tokenizer):
    prompts = encode(tokenizer, ["7 plays golf golf"])
    seven = tokenizer("7")["input_ids"][0]
    assert find_token(prompts, "7") == [(0, 0)]
    assert find_token(prompts, f"#{seven}") == [(0, 0)]


def test_padding_is_never_found(tokenizer):
    prompts = encode(tokenizer, [KOBE, TIGER])
    assert prompts.batch.tokens[0, -1] == 0
    with pytest.raises(UsageError):
        find_token(prompts, "#0")
    with pytest.raises(UsageError):
        find_token(prompts, "#" + "9" * 40)


def test_a_character_of_several_tokens_is_found_at_its_last(tokenizer):
    prompts = encode(tokenizer, ["a € plays"])
    assert len(prompts.pieces[0]) == 5  # a, the space, and the three bytes of the euro sign
    assert find_token(prompts, "€") == [(0, 4)]
    assert "\ufffd" not in "".join(prompts.pieces[0])


def test_an_absent_token_lists_those_there_are(tokenizer):
    prompts = encode(tokenizer, [KOBE])
    with pytest.raises(UsageError, match="no prompt has the token 'Jordan'") as caught:
        find_token(prompts, "Jordan")
    assert caught.value.hint.startswith("the tokens are 'K' (#")
    assert "' Bryant'" in caught.value.hint
    with pytest.raises(UsageError, match="only an answer"):
        find_token(prompts, "basketball")


def test_a_space_that_sentencepiece_would_drop_is_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({"?": 0, "▁Kobe": 1, "▁Bryant": 2, "▁plays": 3}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    prompts = encode(tokenizer, ["Kobe Bryant plays"])
    assert prompts.pieces == [[" Kobe", " Bryant"]]
    assert find_token(prompts, "Bryant") == find_token(prompts, " Bryant") == [(0, 1)]
    assert find_token(prompts, "Kobe Bryant") == [(0, 1)]
    assert token_text(tokenizer, 99) == "#99"


def test_smollm2_prompts(smollm2):
    prompts = encode(smollm2.tokenizer, [KOBE])
    assert prompts.pieces == [["K", "obe", " Bryant", " plays", " professional"]]
    assert find_token(prompts, "Bryant") == find_token(prompts, "#46289") == find_token(prompts, "46289") == [(0, 2)]
