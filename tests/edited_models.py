"""Language models and a toy that are edited by hand, and what they answer then by their own forward pass."""

from __future__ import annotations

import copy

import torch
from small_runs import loud_toy, model_recipe, toy_recipe

from spdcli.edits.answer_changes import AnswerChange
from spdcli.edits.prompts_and_answers import given_questions, own_questions
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject, toy_subject

CPU = torch.device("cpu")
DOUBLE = {"rel": 1e-9, "abs": 1e-12}  # float64, sums in another order
NORMED = {"rel": 2e-5, "abs": 1e-7}  # transformers' Llama norms round to float32 inside
PROMPTS = ["Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf", "the sport of golf"]

CASES = {
    "gpt2": ("tiny_gpt2_dir", [], ["h.0.mlp.c_fc", "h.0.attn.c_attn", "h.2.mlp.c_proj"], DOUBLE),
    "split": ("tiny_gpt2_dir", ["target.split_attention=true"], ["h.1.attn.c_attn.v", "h.1.attn.c_attn.q"], DOUBLE),
    "llama": ("tiny_llama_dir", [], ["layers.0.mlp.up_proj", "layers.1.self_attn.k_proj"], NORMED),
    "toy": (None, [], ["K0", "V0", "Q1"], DOUBLE),
}


def answer_change(ratio=1.0, **numbers):
    """An answer of probability ½ that goes to `ratio` times that, and whatever else a test says of it."""
    usual = {"group": "prompt", "prompt": f"{ratio}", "token": " x", "before": 0.5, "after": 0.5 * ratio}
    return AnswerChange(**usual | {"ratio": ratio, "rank_before": 1, "rank_after": 1, "kl": 0.0} | numbers)


def open_case(case, request, folder, *changes):
    directory, extra, names, tolerance = CASES[case]
    if directory is None:
        recipe = toy_recipe(*changes, folder=folder)
        subject = toy_subject(recipe, loud_toy(recipe, seed=2).double())
    else:
        source = request.getfixturevalue(directory)
        recipe = model_recipe(source, "target.dtype='float64'", "slices.init='svd'", *extra, *changes, folder=folder)
        subject = language_subject(recipe, CPU)
    torch.manual_seed(4)
    decomposition = start_decomposition(recipe, subject, names).requires_grad_(False)
    return subject, decomposition, names, tolerance


def ask_own(subject):
    if subject.toy is not None:
        return own_questions(subject, 5, seed=1)
    return given_questions(subject, PROMPTS)


def answers_of(subject, questions):
    """Log-probabilities of the model as it is now, one prompt at a time, by its own forward pass."""
    rows = []
    for tokens, valid in zip(questions.batch.tokens, questions.batch.valid, strict=True):
        tokens = tokens[valid][None]
        logits = subject.toy.logits(tokens) if subject.toy is not None else subject.target.model(tokens).logits[:, -1]
        rows.append(logits.log_softmax(-1)[0])
    return torch.stack(rows)


@torch.no_grad()
def in_place(subject, questions, change):
    """The answers of a model after `change`, which is undone."""
    kept = copy.deepcopy(subject.target.model.state_dict())
    try:
        change()
        return answers_of(subject, questions)
    finally:
        subject.target.model.load_state_dict(kept)
