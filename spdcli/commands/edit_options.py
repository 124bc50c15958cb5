"""What commands that change a model share: the options that say what it is asked, and how these are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands import completion
from spdcli.commands.prompt_option import prompt_option, read_prompts
from spdcli.console import Console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from spdcli.edits.counterfact import Record
    from spdcli.edits.exam import Exam
    from spdcli.edits.facts_file import Facts
    from spdcli.edits.text_changes import TextToKeep
    from spdcli.engine.subcomponents import Decomposition
    from spdcli.progress import Report
    from spdcli.recipe.schema import Recipe
    from spdcli.runs.subject import Subject

SliceAddress = Annotated[
    list[str] | None,
    typer.Option(
        "--slice",
        "-s",
        help="MATRIX:INDEX, as spd inspect shows it; may be repeated.",
        autocompletion=completion.slices,
        show_default=False,
    ),
]
Prompt = Annotated[
    list[str] | None,
    prompt_option("Ask this instead of all of the run's prompts, whose last token is the answer"),
]
Answer = Annotated[
    list[str] | None,
    typer.Option(
        "--answer",
        help="What follows a --prompt, of one or several tokens; one a prompt, in their order.",
        show_default=False,
    ),
]
FactsOption = Annotated[
    str | None,
    typer.Option(
        "--facts",
        metavar="FILE|builtin",
        help="Facts that should stay as they are: a file, or those that come with spd.",
        show_default="builtin, for a language model",
    ),
]
NoFacts = Annotated[bool, typer.Option("--no-facts", help="Measure no facts.")]
KeptText = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE|own",
        help="A text that should stay as it is: a file, directory, .jsonl, .parquet, datasets:NAME, or the run's own.",
        show_default=False,
    ),
]
TextTokens = Annotated[
    int, typer.Option("--text-tokens", min=1, max=10**9, help="Read about so many tokens of it, or all there are.")
]
Sequences = Annotated[int, typer.Option("--sequences", min=1, max=10**6, help="Fresh toy sequences to measure on.")]


@dataclass(frozen=True)
class ExamOptions:
    """What a changed model is asked, as the options say it.

    `prompts` are those of `--prompt`, numbers or texts, `answers` those of `--answer`, and `facts` the facts of
    `--facts`, or those that come with spd; `named` says whether the option was given, without which the toy is asked no
    facts. `records` are those of `--counterfact`, and `text` that of `--text`, with its tokens. `sequences` is of the
    toy.
    """

    prompts: Sequence[int | str]
    facts: Facts | None
    named: bool
    sequences: int = 16
    answers: Sequence[str] = ()
    records: Sequence[Record] = ()
    text: tuple[str, int] | None = None

    def open(
        self, console: Console, recipe: Recipe, subject: Subject, seed: int, gates: Decomposition | None = None
    ) -> Exam:
        """The exam of a run's subject, with a warning where `gates`, by which it is read, do not see it whole."""
        from spdcli.edits.exam import open_exam
        from spdcli.measures.importances import warn_of_span

        facts = self.facts_for(subject)
        with console.progress() as report:
            if gates is not None and any(isinstance(prompt, str) for prompt in self.prompts):
                warn_of_span(gates, report)
            return open_exam(
                subject,
                self.prompts,
                facts,
                answers=self.answers,
                records=self.records,
                sequences=self.sequences,
                seed=seed,
                text=self.kept_text(recipe, subject, report),
                report=report,
            )

    def kept_text(self, recipe: Recipe, subject: Subject, report: Report, needed: bool = False) -> TextToKeep | None:
        """The text of `--text`; where it is not given, None, or if one is `needed` the run's own."""
        from spdcli.edits.text_changes import OWN_TEXT, TOKENS, text_to_keep

        if self.text is None and not needed:
            return None
        return text_to_keep(recipe, subject, *(self.text or (OWN_TEXT, TOKENS)), report)

    def facts_for(self, subject: Subject) -> Facts | None:
        """The facts to ask; none of the toy, which knows none, unless they were named."""
        return self.facts if self.named or subject.prompts is not None else None


def exam_options(
    prompts: Sequence[str] | None,
    answers: Sequence[str] | None,
    facts: str | None,
    no_facts: bool,
    sequences: int = 16,
    *,
    all_mlp: bool = False,
    counterfact: Path | None = None,
    text: tuple[str, int] | None = None,
) -> ExamOptions:
    """The options as they stand on the command line, their files and standard input read.

    Where every MLP layer is zeroed (`all_mlp`), facts are asked only if they are named.
    """
    from spdcli.edits.counterfact import load_records

    without = no_facts or (all_mlp and facts is None)
    texts, beside = read_prompts(prompts), list(answers or ())
    if beside and len(beside) != len(texts):
        raise UsageError(f"--answer is there {len(beside)} times, --prompt {len(texts)}", "give one a prompt, or none")
    if not all(answer.strip() for answer in beside):
        raise UsageError("--answer is blank", "give what follows the prompt")
    records = [] if counterfact is None else load_records(counterfact)
    return ExamOptions(texts, read_facts(facts, without), facts is not None, sequences, beside, records, text)


def read_facts(option: str | None, without: bool) -> Facts | None:
    """The facts of `--facts`, the shipped ones when nothing is said, or None with `--no-facts`."""
    from spdcli.edits.facts_file import load_facts

    if without:
        if option is not None:
            raise UsageError("--facts and --no-facts contradict each other", "give one of the two")
        return None
    return load_facts(None if option in (None, "builtin") else Path(option))
