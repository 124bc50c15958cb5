"""What a language model is decomposed on: prompts, the text of a corpus, or prompts in front of one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from spdcli.engine.target import Batch, Batches
from spdcli.errors import SpdError, UsageError
from spdcli.progress import Report, silent
from spdcli.recipe.schema import GENERATED, Data, Recipe
from spdcli.runs.subject import Subject, some_of
from spdcli.targets.broad_text import generated_text, require_length
from spdcli.targets.prompts import Prompts, begins_texts, encode, prompts_of_tokens
from spdcli.targets.text_windows import KeptText, Part, TextSplit, Windows, packed_text, split

if TYPE_CHECKING:
    from spdcli.targets.huggingface import LanguageModel

LENGTH = 128  # tokens of a sequence of other text, of a run on prompts
SHOWN = 4  # held-out sequences that stand for the prompts of a recipe without any
BROAD = 256  # sequences that stand for the corpus beside prompts, where what is usual in it is measured
BROAD_TOKENS = 16384  # the same of a corpus by itself, whose sequences are longer


def with_data(recipe: Recipe, subject: Subject, model: LanguageModel, trained: bool, report: Report) -> Subject:
    """`subject`, a language model, with its data. Unless `trained`, no text is read: a corpus is random tokens."""
    data, device = recipe.data, subject.target.device
    assert data is not None

    @cache
    def corpus() -> TextSplit:
        if not trained:
            return _random_text(recipe, data.length, len(subject.target.unembedding))
        return corpus_of(data, model, recipe.seed, report)

    def first(held_out: bool) -> Batch:
        part = corpus().held_out if held_out else corpus().training
        wanted = max(1, BROAD_TOKENS // data.length) if data.prompts is None else data.sequences or BROAD
        count = min(len(part), wanted)
        return Batch.everywhere(part.read(torch.arange(count))).to(device)

    if data.stream is not None:
        subject = replace(
            subject, corpus=corpus, stream=cache(partial(first, False)), held_out=cache(partial(first, True))
        )
    if data.prompts is not None:
        return _on_prompts(recipe, subject, encode(model.tokenizer, data.prompts, data.answers, data.begin_token))

    def held_out_prompts(count: int) -> Prompts:
        part = corpus().held_out
        tokens = part.read(torch.arange(min(count, len(part))))
        prompts = prompts_of_tokens(model.tokenizer, tokens, begins_texts(model.tokenizer, data.begin_token))
        return replace(prompts, batch=_looked(prompts.batch, recipe).to(device))

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        tokens = corpus().minibatch(number, recipe.decompose.batch, recipe.seed)
        return _looked(Batch.everywhere(tokens), recipe).to(device)

    return replace(
        subject,
        batches=batches,
        length=data.length,
        prompts=held_out_prompts(SHOWN),
        held_out_prompts=held_out_prompts,
    )


def _on_prompts(recipe: Recipe, subject: Subject, prompts: Prompts) -> Subject:
    """All prompts in every step, or as many as its batch has, drawn anew."""
    whole, device, size = prompts.batch, subject.target.device, recipe.decompose.batch
    if recipe.losses.last_token_only:
        last = torch.zeros_like(whole.looked)
        last[torch.arange(len(last)), prompts.answer_at] = True
        whole = replace(whole, looked=last)
    fixed = whole.to(device)

    def batches(generator: torch.Generator, number: int = 0) -> Batch:
        return fixed if size >= len(whole.tokens) else some_of(whole, size, generator).to(device)

    return replace(subject, batches=batches, length=fixed.tokens.shape[1], prompts=replace(prompts, batch=fixed))


def _looked(batch: Batch, recipe: Recipe) -> Batch:
    """The batch of whole sequences with its losses at every position, or at the last."""
    looked = torch.ones_like(batch.valid)
    looked[:, :-1] = not recipe.losses.last_token_only
    return replace(batch, looked=looked)


def corpus_of(data: Data, model: LanguageModel, seed: int, report: Report = silent) -> TextSplit:
    """The text that `data` names as sequences; SpdError where it cannot be read or is too short."""
    assert data.stream is not None
    require_length(data.length, model.tokenizer)
    if data.stream == GENERATED:
        count, alone = data.sequences, data.prompts is None
        assert count is not None
        held_out = max(1, round(data.stream_held_out * count)) if alone else count
        return generated_text(model.model, model.tokenizer, count, held_out, data.length, seed, alone, report)
    begin = model.tokenizer.bos_token_id if begins_texts(model.tokenizer, data.begin_token) else None
    text = packed_text(data.stream, data.stream_field, model.tokenizer, data.length, begin, report)
    return split(text, data.stream_held_out, data.sequences, seed, data.stream)


def text_to_read(recipe: Recipe, subject: Subject, source: str | None, field: str, report: Report = silent) -> Windows:
    """The sequences of the corpus `source`, in an order by the recipe's seed; without one, what the run was trained on.

    UsageError for a run that has no text, or is not of a language model.
    """
    if recipe.data is None or subject.prompts is None:
        raise UsageError("only runs of a language model can be asked about text")
    if source is None and subject.corpus is not None:
        return subject.corpus().training
    if source is None:
        raise UsageError("this run was decomposed on prompts alone", "--data TEXT names a text to read")
    tokenizer, data = subject.prompts.tokenizer, recipe.data
    length = data.length if subject.held_out_prompts is not None else min(LENGTH, tokenizer.model_max_length)
    begin = tokenizer.bos_token_id if begins_texts(tokenizer, data.begin_token) else None
    whole = packed_text(source, field, tokenizer, length, begin, report)
    if not len(whole):
        raise SpdError(f"{source} has fewer than {length} tokens, a sequence")
    return Part(whole, recipe.seed, 0, len(whole))


def _random_text(recipe: Recipe, length: int, tokens: int) -> TextSplit:
    """Sequences of so many different `tokens` for a step, drawn at random."""
    count = max(recipe.decompose.batch, recipe.decompose.stream_batch, SHOWN)
    text = KeptText(lambda: torch.randint(tokens, (count, length)), count)
    return TextSplit(text, text)


def stream_batches(recipe: Recipe, subject: Subject) -> Batches | None:
    """What draws the broad text of a step of a targeted decomposition; None where the recipe wants none."""
    if not recipe.losses.targeted or subject.corpus is None:
        return None
    training, device, size = subject.corpus().training, subject.target.device, recipe.decompose.stream_batch

    def draw(generator: torch.Generator, number: int = 0) -> Batch:
        chosen = torch.randperm(len(training), generator=generator)[:size]
        return Batch.everywhere(training.read(chosen)).to(device)

    return draw
