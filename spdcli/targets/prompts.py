"""Prompts of a language model: from text to a batch, and from a token's text to its places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.engine.target import Batch
from spdcli.errors import SpdError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded_tokens"  # the attribute of a tokenizer that says how many tokens its model has an embedding for
LISTED_TOKENS = 60  # of an error that lists the tokens there are


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokenised prompts. Letters: B prompts, T positions of the longest.

    `batch` holds what is fed, padded at the end; all real positions are looked at, and
    `batch.answers [B]` is each prompt's last token. `answer_at [B]` is the position whose next-token
    distribution predicts it: the last fed one when the answer is held out, the one before when it
    is fed too. `texts`, `pieces` (the fed tokens as text, one list a prompt) and `answer_texts` are
    for people. `begin_token` says whether the tokenizer's begin-of-sequence token comes first.
    """

    batch: Batch
    answer_at: Tensor
    texts: list[str]
    pieces: list[list[str]]
    answer_texts: list[str]
    tokenizer: PreTrainedTokenizerBase
    begin_token: bool = False

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts whose numbers are `rows`."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return replace(
            self,
            batch=self.batch.select(index.to(self.batch.tokens.device)),
            answer_at=self.answer_at[index],
            texts=[self.texts[row] for row in rows],
            pieces=[self.pieces[row] for row in rows],
            answer_texts=[self.answer_texts[row] for row in rows],
        )

    def cut(self, length: int) -> Prompts:
        """The prompts with at most their first `length` tokens, of which the next one is then the answer."""
        batch, at = self.batch, self.answer_at.clamp(max=length - 1)
        following, rows = batch.tokens[:, min(length, batch.tokens.shape[1] - 1)], torch.arange(len(at))
        shorter = (self.answer_at > at).to(batch.tokens.device)
        assert batch.answers is not None
        part = batch.map(lambda tensor: tensor[:, :length] if tensor.dim() > 1 else tensor)
        looked = part.looked.clone()
        looked[rows, at] = True
        return replace(
            self,
            batch=replace(part, looked=looked, answers=torch.where(shorter, following, batch.answers)),
            answer_at=at,
            pieces=[pieces[:length] for pieces in self.pieces],
        )

    def fed(self, prompt: int) -> list[int]:
        """The token ids of one prompt that are fed, without padding."""
        return self.batch.tokens[prompt][self.batch.valid[prompt]].tolist()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    answers: str = "held_out",
    begin_token: bool | None = None,
) -> Prompts:
    """Tokenises `prompts` into one batch.

    `answers` (a key of `recipe.choices.ANSWERS`) says whether a prompt's last token is fed or only predicted;
    `begin_token` puts the tokenizer's begin-of-sequence token first, or none; if None, as the tokenizer itself does.
    Raises SpdError naming a prompt that has fewer than two tokens or more than the model takes.
    """
    if not prompts:
        raise ValueError("no prompts")
    begin_token = begins_texts(tokenizer, begin_token)
    sequences = [token_ids(tokenizer, text, begin_token) for text in prompts]
    fed = [sequence[:-1] if answers == "held_out" else sequence for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in fed])
    valid = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    tokens = torch.zeros(valid.shape, dtype=torch.long)
    tokens[valid] = torch.tensor([token for sequence in fed for token in sequence])
    last = [sequence[-1] for sequence in sequences]
    return Prompts(
        batch=Batch(tokens, valid, looked=valid.clone(), answers=torch.tensor(last)),
        answer_at=lengths - (1 if answers == "held_out" else 2),
        texts=list(prompts),
        pieces=[[token_text(tokenizer, token) for token in sequence] for sequence in fed],
        answer_texts=[token_text(tokenizer, token) for token in last],
        tokenizer=tokenizer,
        begin_token=begin_token,
    )


def prompts_of_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, begin_token: bool = False) -> Prompts:
    """Sequences of a corpus, `tokens` `[B, T]`, as prompts that are fed whole; the last token counts as the answer."""
    rows = tokens.tolist()
    pieces = [[token_text(tokenizer, token) for token in row] for row in rows]
    return Prompts(
        batch=replace(Batch.everywhere(tokens), answers=tokens[:, -1]),
        answer_at=torch.full((len(rows),), tokens.shape[1] - 2),
        texts=[span_text(tokenizer, row) for row in rows],
        pieces=pieces,
        answer_texts=[words[-1] for words in pieces],
        tokenizer=tokenizer,
        begin_token=begin_token,
    )


def begins_texts(tokenizer: PreTrainedTokenizerBase, begin_token: bool | None = None) -> bool:
    """Whether a begin-of-sequence token stands before a text: as `begin_token` says, or where it is None, as the
    tokenizer does if it is left to itself."""
    if begin_token is not None:
        return begin_token
    begin = tokenizer.bos_token_id
    if begin is None:
        return False
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return whole[:1] == [begin]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, begin_token: bool, least: int = 2) -> list[int]:
    """The tokens of one prompt, at least `least` and at most as many as the model takes; SpdError otherwise."""
    require_unicode(text)
    tokens = plain_ids(tokenizer, text)
    if begin_token:
        if tokenizer.bos_token_id is None:
            raise SpdError("data.begin_token = true, but this model's tokenizer has no begin-of-sequence token")
        tokens = [tokenizer.bos_token_id, *tokens]
    require_embedded(tokenizer, tokens, f"the prompt {text!r}")
    if len(tokens) < least:
        count = f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
        raise SpdError(
            f"the prompt {text!r} has {count}; at least {least} {'is' if least == 1 else 'are'} needed",
            "the last token is the answer, and at least one before it is fed" if least > 1 else None,
        )
    if len(tokens) > tokenizer.model_max_length:
        raise SpdError(
            f"the prompt {_start(text)!r} has {len(tokens)} tokens; the model takes {tokenizer.model_max_length}"
        )
    return tokens


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text alone, however many; SpdError where the tokenizer's own tables fail on it."""
    try:
        # `verbose=False`: a prompt that is too long gets an error of spd's, not a warning as well.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (SpdError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics, past every `Exception`
        raise SpdError(f"the model's tokenizer fails on {_start(text)!r}: {error}") from error
    return ids


def require_embedded(tokenizer: PreTrainedTokenizerBase, tokens: list[int], what: str) -> None:
    """SpdError where `what` has a token that the tokenizer knows and its model does not."""
    known = getattr(tokenizer, EMBEDDED, None)
    if known is not None and max(tokens, default=0) >= known:
        raise SpdError(
            f"{what} has the token #{max(tokens)}, but the model has embeddings of {known} tokens",
            "its tokenizer is of another model, or has tokens that were added to it alone",
        )


def _start(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def require_unicode(text: str, what: str = "the prompt") -> None:
    """UsageError where `text` came from bytes that are not UTF-8, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} {text!r} is not text in UTF-8") from None


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as a reader would recognise it, its leading space included.

    A token that is only part of a character is shown in the tokenizer's own spelling; an id that
    the tokenizer does not know (models pad their vocabulary) as `#id`.
    """
    raw = raw_token(tokenizer, token)
    if not raw:
        return f"#{token}"
    text = span_text(tokenizer, [token])
    return raw if not text or "\ufffd" in text else text


def raw_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token in the tokenizer's own spelling; empty where it does not know the id."""
    raw = tokenizer.convert_ids_to_tokens(token)
    return raw if isinstance(raw, str) else ""


def span_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Neighbouring tokens as text, exactly as they stood in the prompt."""
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # SentencePiece tokenizers drop the space of a text's first token, which "▁" stands for.
    space_first = raw_token(tokenizer, tokens[0]).startswith("▁")
    return f" {text}" if space_first and not text.startswith(" ") else text


def find_token(prompts: Prompts, query: str) -> list[tuple[int, int]]:
    """Where a token is: `(prompt, position)` of every occurrence among the fed tokens, in order.

    `query` is text, with or without the leading space, or a token id (`#39812`, or digits that are
    no token's text). Text that is several tokens is found at the last of them. Raises UsageError,
    listing the tokens there are, where nothing is found.
    """
    places = find_id(prompts, query[1:]) if query.startswith("#") else []
    places = places or find_text(prompts, query) or find_id(prompts, query)
    if places:
        return places
    if query.strip() and query.strip() in [text.strip() for text in prompts.answer_texts]:
        raise UsageError(
            f"the token {query!r} is only an answer, which is predicted and not fed",
            "set data.answers = 'fed' to feed it too; " + listing(prompts),
        )
    raise UsageError(f"no prompt has the token {query!r}", listing(prompts))


def find_id(prompts: Prompts, digits: str) -> list[tuple[int, int]]:
    if not (digits.isascii() and digits.isdigit()):
        return []
    hits = (prompts.batch.tokens == min(int(digits), 2**62)) & prompts.batch.valid
    return [(prompt, position) for prompt, position in hits.nonzero().tolist()]


def find_text(prompts: Prompts, query: str) -> list[tuple[int, int]]:
    """The last positions of every run of tokens whose text is `query`."""
    spans = [(prompt, span) for prompt in range(len(prompts.texts)) for span in find_spans(prompts, prompt, query)]
    return sorted({(prompt, span[-1]) for prompt, span in spans})


def find_spans(prompts: Prompts, prompt: int, query: str) -> list[range]:
    """The positions of every run of fed tokens of one prompt whose text is `query`, with or without leading space."""
    fed, spans = prompts.fed(prompt), []
    for start in range(len(fed)):
        for stop in range(start + 1, len(fed) + 1):
            text = span_text(prompts.tokenizer, fed[start:stop])
            if text == query or text == f" {query}":
                spans.append(range(start, stop))
                break
            # Half a character may show as up to three marks that one character replaces later.
            if len(text) > len(query) + 4:
                break
    return spans


def listing(prompts: Prompts) -> str:
    """The distinct fed tokens with their ids, for an error."""
    ids = {token: None for prompt in range(len(prompts.texts)) for token in prompts.fed(prompt)}
    named = [f"{token_text(prompts.tokenizer, token)!r} (#{token})" for token in list(ids)[:LISTED_TOKENS]]
    more = f" and {len(ids) - LISTED_TOKENS} more" if len(ids) > LISTED_TOKENS else ""
    return f"the tokens are {', '.join(named)}{more}"
