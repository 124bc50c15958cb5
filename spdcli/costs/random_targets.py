"""Targets with random weights, of the size that a recipe asks for: speed does not depend on what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spdcli.engine.target import Batch
from spdcli.recipe.schema import HuggingFaceTarget, Recipe, ToyTarget
from spdcli.runs.subject import Subject, empty_toy, language_subject, open_subject, toy_subject
from spdcli.targets.prompts import Prompts


def untrained_subject(recipe: Recipe, device: torch.device) -> Subject:
    """The subject of a recipe with random weights, or on torch's `meta` device as shapes alone.

    The prompts of a language model are read; its corpus is random tokens.
    """
    if isinstance(recipe.target, ToyTarget):
        with device:
            toy = empty_toy(recipe.target)
        return toy_subject(recipe, toy.eval())
    if recipe.target.kind.startswith("planted"):
        return open_subject(recipe, device)
    return language_subject(recipe, device, trained=False)


def random_subject(recipe: Recipe, device: torch.device, prompts: tuple[int, int] = (2, 9)) -> Subject:
    """As `untrained_subject`, but a language model is a GPT-2 small on `prompts`, (sequences, tokens in each) random
    tokens: nothing is read from anywhere."""
    torch.manual_seed(recipe.seed)
    if not isinstance(recipe.target, HuggingFaceTarget):
        return untrained_subject(recipe, device)
    return random_gpt2(recipe, device, prompts)


def random_gpt2(recipe: Recipe, device: torch.device, shape: tuple[int, int]) -> Subject:
    """GPT-2 small with random weights, on random tokens `[B, T]`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from spdcli.targets.architectures import architecture_of
    from spdcli.targets.huggingface import LanguageModel, build_target

    config = GPT2Config(attn_implementation="sdpa")
    with device:
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    no_tokenizer: Any = None
    language_model = LanguageModel(model, no_tokenizer, architecture_of(config.model_type), Path())
    tokens = torch.randint(config.vocab_size, shape)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    looked = valid.clone()
    looked[:, :-1] = not recipe.losses.last_token_only
    batch = Batch(tokens, valid, looked, answers=tokens[:, -1]).to(device)

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        return batch

    return Subject(
        target=build_target(language_model, split_attention=False),
        batches=batches,
        length=shape[1],
        token_text=str,
        routes={},
        prompts=Prompts(batch, torch.full((len(tokens),), shape[1] - 1), [], [], [], no_tokenizer),
    )
