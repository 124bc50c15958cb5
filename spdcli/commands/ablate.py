"""`spd ablate`: what a model says without some of its slices, matrices or MLP layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spdcli.commands.change import (
    FactsOption,
    NoFacts,
    Prompt,
    Sequences,
    SliceAddress,
    alone_table,
    ask_facts,
    ask_questions,
    effects_table,
    facts_tables,
    listed,
    mark_active,
    own_prompts,
    prompts_only,
    quiet_lines,
    read_facts,
    read_prompts,
    warn_of_span,
)
from spdcli.commands.options import Device, Json, Quiet, RunPath, Seed, Verbose, make_console
from spdcli.edits.choices import OTHERS, USUAL_OTHERS, in_words
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from spdcli.edits.ablation import Zeroed
    from spdcli.edits.answer_changes import Questions
    from spdcli.edits.known_facts import AskedFacts
    from spdcli.engine.target import Target
    from spdcli.runs.loading import LoadedRun


if TYPE_CHECKING:
    Others = str
else:
    Others = Literal[tuple(OTHERS)]

MatrixName = Annotated[
    list[str] | None,
    typer.Option("--matrix", "-m", help="Zero this whole matrix; may be repeated.", show_default=False),
]
Mlp = Annotated[
    list[str] | None,
    typer.Option("--mlp", help="Zero this MLP layer, from 0; 'all' is each; may be repeated.", show_default=False),
]
OthersOption = Annotated[
    Others | None,
    typer.Option("--others", help=f"Masks of the other slices: {in_words(OTHERS)}.", show_default=USUAL_OTHERS),
]
WithFigure = Annotated[
    bool, typer.Option("--figure", help="With --mlp, draw P(answer) against the zeroed layer into RUN/figures.")
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Draws of --others sampled.")]


def ablate(
    run: RunPath,
    slice: SliceAddress = None,
    matrix: MatrixName = None,
    mlp: Mlp = None,
    others: OthersOption = None,
    samples: Samples = 16,
    figure: WithFigure = False,
    prompt: Prompt = None,
    facts: FactsOption = None,
    no_facts: NoFacts = False,
    sequences: Sequences = 16,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Take slices out of the decomposed model, or matrices and MLP layers out of the target.

    Slices get the mask 0 in the decomposed model, the others --others. Without
    --slice, the target itself runs with the matrices or MLP layers zeroed
    (Figure 9). Several things are taken away together, then each alone. What
    that does to other facts is measured for all of them together.
    """
    console = make_console(json, quiet, verbose)
    if not (slice or matrix or mlp):
        raise UsageError("nothing to ablate", "give --slice ADDRESS, --matrix NAME or --mlp N")
    if others and not slice:
        raise UsageError("--others is about the slices of a decomposed model, and no --slice is given")
    if figure and not (mlp and (len(mlp) > 1 or mlp == ["all"])):
        raise UsageError("--figure draws one MLP layer after the other", "give --mlp all, or several --mlp")
    from spdcli.runs.loading import load

    texts = read_prompts(prompt)
    each_mlp = bool(mlp and "all" in mlp)
    file = read_facts(facts, no_facts or (each_mlp and facts is None))
    loaded = load(run, device)
    console.debug(str(loaded))
    seed = loaded.recipe.seed if seed is None else seed
    questions = ask_questions(loaded.subject, loaded.recipe, texts, sequences, seed)
    if slice:
        warn_of_span(console, loaded.recipe, texts)
    mode = (others or USUAL_OTHERS) if slice else None
    asked = ask_facts(console, loaded.subject, loaded.recipe, file, facts, own_prompts(loaded.recipe, texts))
    removed = (slice or [], matrix or [], mlp or [])
    found = take_away(loaded, questions, asked, removed, mode, samples, seed)
    if mode == "on" and not loaded.decomposition.delta:
        console.warn("this run has no delta component: with all slices on it is U V, before is not the target")
    head = {"schema": "spd.suppress/1", "run": str(run)}
    data = head | found | {"expectations": [], "saved": None}
    title = f"Without {listed(data['slices'] + data['zeroed'])}" + (f" (others {mode})" if mode else "")
    together = [] if each_mlp else [effects_table(title, prompts_only(data["effects"]))]
    told = facts_tables(data["facts"], data["effects"], verbose)
    drawn = draw_layers(loaded, data["alone"]) if figure else []
    console.show(data | {"figures": drawn}, *together, *alone_table(data["alone"]), *told)
    quiet_lines(console, data["effects"])
    for path in drawn[:1]:
        console.result(path)


def draw_layers(loaded: LoadedRun, alone: dict[str, Any]) -> list[Path]:
    """Figure 9 of the MLP layers among what was zeroed alone; a single layer of a model is all of them."""
    from spdcli.figures.facts import save_zeroed
    from spdcli.runs.directory import FIGURES

    layers = {label: effects for label, effects in alone.items() if label.startswith("mlp ")}
    if not layers:
        raise UsageError("--figure needs several layers, and this target has one")
    return save_zeroed(layers, loaded.home / FIGURES)


def take_away(
    loaded: LoadedRun,
    questions: Questions,
    facts: AskedFacts | None,
    removed: tuple[list[str], list[str], list[str]],
    others: str | None,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The effects of what the options name (slices, matrices, MLP layers) on questions and facts, and their names."""
    from spdcli.edits.ablation import ablate, ablate_facts, zeroed_matrix
    from spdcli.edits.suppression import find_slices

    target = loaded.subject.target
    slices, matrices, mlps = removed
    addresses = find_slices(loaded.decomposition, slices)
    zeroed = [zeroed_matrix(target, name) for name in dict.fromkeys(matrices)] + mlp_layers(target, mlps)
    way = others or USUAL_OTHERS
    found = ablate(loaded.subject, loaded.decomposition, questions, addresses, zeroed, way, samples, seed)
    if addresses:
        found["effects"] = mark_active(loaded, questions, addresses, found["effects"])
    summary = None
    if facts is not None:
        cut = (addresses, zeroed)
        moved = ablate_facts(loaded.subject, loaded.decomposition, facts.questions, cut, way, samples, seed)
        summary = facts.summary(moved, seed)
        found["effects"] += facts.marked(moved)
    names = {"slices": [str(address) for address in addresses], "zeroed": [one.label for one in zeroed]}
    return {**names, "others": others, **found, "facts": summary}


def mlp_layers(target: Target, wanted: list[str]) -> list[Zeroed]:
    """The MLP layers that `--mlp` names."""
    from spdcli.edits.ablation import zeroed_mlp

    layers: list[int] = []
    for text in wanted:
        if text == "all":
            layers += range(len(target.blocks))
        elif text.removeprefix("-").isdecimal():
            layers.append(int(text))
        else:
            raise UsageError(f"--mlp {text}: not a layer", f"give 0 to {len(target.blocks) - 1}, or all")
    return [zeroed_mlp(target, layer) for layer in dict.fromkeys(layers)]
