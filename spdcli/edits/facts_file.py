"""Facts that a language model may know: the shipped file, and files of the user's own.

A fact is a prompt whose last token is its answer, or a prompt with its `answer`, of one or several tokens, beside it.
Knows neither torch nor transformers, so that a mistake in a file is told at once; `edits/known_facts.py` puts facts to
a model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from spdcli.recipe.documents import Kind, load_document
from spdcli.recipe.section import Positive, Section, Text
from spdcli.recipe.toml_lines import KeyPath
from spdcli.recipe.wording import Mistake, did_you_mean

BUILTIN = Path(__file__).parent / "facts.toml"
KIND = Kind("a facts file", f"the facts that come with spd are an example: {BUILTIN}")


class Known(Section):
    """When a model knows a fact: the answer's probability is above `probability` and its rank at most `rank`."""

    probability: Annotated[float, Field(gt=0, lt=1)] = 0.2
    rank: Positive = 1

    def holds(self, probability: Any, rank: Any) -> Any:
        """Whether it knows an answer of this probability and rank; elementwise for tensors.

        >>> Known().holds(0.5, 1), Known().holds(0.5, 2)
        (True, False)
        """
        return (probability > self.probability) & (rank <= self.rank)


class Fact(Section):
    """A prompt, its last token being the answer unless there is an `answer`; two facts of one `pair` are sentences of
    one form.

    `subject` are the words that it is about, for causal tracing.
    """

    category: Text
    prompt: Text
    answer: Text | None = None  # what follows the prompt, of any number of tokens
    subject: Text | None = None
    pair: Text | None = None
    known_by: list[Text] = Field(default_factory=list)


class Related(Section):
    """A prompt that says what the fact `of` says in other words, or asks for its subject instead of its answer."""

    of: Text
    kind: Literal["paraphrase", "reversed"]
    prompt: Text
    answer: Text | None = None
    known_by: list[Text] = Field(default_factory=list)


class Facts(Section):
    """A facts file. `models` are the models that its `known_by` notes speak of; of others they say nothing."""

    models: list[Text] = Field(default_factory=list)
    known: Known = Known()
    fact: Annotated[list[Fact], Field(min_length=1)]
    related: list[Related] = Field(default_factory=list)

    def sections(self) -> dict[str, Sequence[Fact | Related]]:
        """Facts and related prompts, by the name of their section."""
        return {"fact": self.fact, "related": self.related}

    def related_to(self, prompt: str) -> list[Related]:
        """The paraphrases and reversals of one fact, by its prompt."""
        return [entry for entry in self.related if entry.of == prompt]

    def subjects(self) -> list[str]:
        """The subjects that facts name."""
        return [fact.subject for fact in self.fact if fact.subject is not None]

    def without(self, prompts: Sequence[str]) -> list[Fact]:
        """The facts whose text is none of `prompts`."""
        return [fact for fact in self.fact if fact.prompt not in prompts]


def load_facts(path: Path | None = None) -> Facts:
    """The facts in `path`, or those that come with spd. Raises RecipeError with every mistake and its line."""
    return load_document(path or BUILTIN, Facts, KIND, mistakes)[0]


def mistakes(facts: Facts) -> Iterator[Mistake]:
    """What types and ranges cannot say: a prompt that is there twice, a related prompt of no fact, a lone pair."""
    seen: dict[str, KeyPath] = {}
    prompts = [fact.prompt for fact in facts.fact]
    for section, entries in facts.sections().items():
        for number, entry in enumerate(entries):
            key: KeyPath = (section, number, "prompt")
            if entry.prompt in seen:
                yield Mistake(
                    (key,), f"[[{section}]] prompt = {entry.prompt!r}: is there already, as {_spot(seen, entry.prompt)}"
                )
            seen.setdefault(entry.prompt, key)
    for number, fact in enumerate(facts.fact):
        if fact.subject is not None and fact.subject not in fact.prompt:
            yield Mistake(
                (("fact", number, "subject"),),
                f"[[fact]] subject = {fact.subject!r}: expected words of its prompt, {fact.prompt!r}",
            )
    for number, related in enumerate(facts.related):
        if related.of not in prompts:
            meant = did_you_mean(related.of, prompts)
            yield Mistake(
                (("related", number, "of"),), f"[[related]] of = {related.of!r}: expected a fact's prompt{meant}"
            )
    pairs = [fact.pair for fact in facts.fact]
    for number, pair in enumerate(pairs):
        if pair is not None and pairs.count(pair) != 2:
            yield Mistake(
                (("fact", number, "pair"),),
                f"[[fact]] pair = {pair!r}: expected two facts of a pair, not {pairs.count(pair)}",
            )


def _spot(seen: Mapping[str, KeyPath], prompt: str) -> str:
    section, number, _ = seen[prompt]
    return f"[[{section}]] number {int(number) + 1}"


def dump_facts(facts: Facts, comments: list[str]) -> str:
    """The facts as TOML, under `comments`; `load_facts` of the result gives equal facts."""
    lines = [f"# {comment}" for comment in comments]
    lines += [f"models = {_list(facts.models)}", "", "[known]"]
    lines += [f"probability = {facts.known.probability!r}", f"rank = {facts.known.rank}", ""]
    for section, entries in facts.sections().items():
        for entry in entries:
            lines.append(f"[[{section}]]")
            for key, value in entry.model_dump(exclude_none=True).items():
                lines.append(f"{key} = {_list(value) if isinstance(value, list) else _text(value)}")
            lines.append("")
    return "\n".join(lines)


def first_comments(text: str) -> list[str]:
    """The comment lines that a file begins with, without their marks."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return [line.removeprefix("#").strip() for line in lines]


def _list(texts: list[str]) -> str:
    return f"[{', '.join(_text(text) for text in texts)}]"


def _text(text: str) -> str:
    # A JSON string is a TOML basic string, but for the one control character that JSON lets stand.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
