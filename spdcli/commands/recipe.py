"""`spd recipe`: find, read, copy and check recipes. Knows neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands import completion
from spdcli.commands.options import Force, Json, Quiet, Set, Verbose, make_console
from spdcli.disk import write_text
from spdcli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from spdcli.recipe.schema import Data, Recipe

app = typer.Typer(help="Find, read, copy and check recipes.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        help="A shipped recipe's name, or a file.",
        metavar="NAME",
        autocompletion=completion.recipes,
        show_default=False,
    ),
]
Files = Annotated[
    list[str], typer.Argument(help="Recipe files, or names of shipped ones.", metavar="FILE", show_default=False)
]
Destination = Annotated[
    Path | None, typer.Argument(help="A file or a directory; ./NAME.toml if not given.", show_default=False)
]


@app.command("ls", epilog="spd recipe ls\nspd recipe ls --json | jq -r '.recipes[].name'")
def list_recipes(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the recipes that come with spd."""
    from spdcli.recipe.reading import shipped

    console = make_console(json, quiet, verbose)
    recipes = [{"name": name, "about": _about(path), "path": path} for name, path in shipped().items()]
    console.debug(f"{len(recipes)} recipes")
    console.show({"schema": "spd.recipe.ls/1", "recipes": recipes}, *listing(shipped()))
    if quiet:
        for recipe in recipes:
            console.result(recipe["name"])


def listing(recipes: Mapping[str, Path]) -> list[str]:
    """A line a recipe: its name, and what it says of itself."""
    width = max(map(len, recipes), default=0)
    return [f"{name:<{width}}  {_about(path)}" for name, path in recipes.items()]


@app.command("show", epilog="spd recipe show gpt2\nspd recipe show induction-quick > mine.toml")
def show_recipe(name: Name, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print a recipe as it is written, comments and all."""
    from spdcli.recipe.reading import find_recipe, load_recipe

    console = make_console(json, quiet, verbose)
    path = find_recipe(name)
    console.debug(f"reading {path}")
    if json:
        recipe = load_recipe(path).recipe
        console.show({"schema": "spd.recipe.show/1", "path": path, "recipe": recipe.model_dump()})
    console.result(_text(path).rstrip("\n"))


@app.command("cp", epilog="spd recipe cp gpt2\nspd recipe cp induction-quick mine.toml")
def copy_recipe(
    name: Name,
    destination: Destination = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Copy a recipe, to change it."""
    from spdcli.recipe.reading import find_recipe

    console = make_console(json, quiet, verbose)
    source = find_recipe(name)
    console.debug(f"reading {source}")
    target = destination or Path(source.name)
    if target.is_dir():
        target /= source.name
    if target.exists() and not force:
        raise UsageError(f"{target}: is already there", "give another destination, or --force to replace it")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.parent}", "make it first, or give another destination")
    write_text(target, _text(source), "free some space, or give another destination")
    console.show({"schema": "spd.recipe.cp/1", "source": source, "path": target})
    console.result(target)


@app.command("check", epilog="spd recipe check mine.toml\nspd recipe check gpt2 --set target.model=./gpt2")
def check_recipes(
    files: Files, set_: Set = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Check recipes and tell every mistake, with its line."""
    from spdcli.recipe.reading import find_recipe, load_recipe

    console = make_console(json, quiet, verbose)
    reports: list[dict[str, Any]] = []
    lines: list[str] = []
    for file in files:
        try:
            recipe = load_recipe(file, set_ or ()).recipe
        except RecipeError as error:
            reports.append({"file": file, "ok": False, "problems": [vars(problem) for problem in error.problems]})
            if not json:
                console.error(error)
        else:
            reports.append({"file": file, "ok": True, "problems": [], "recipe": recipe.model_dump()})
            console.debug(f"{file} is {find_recipe(file)}")
            lines += summary(file, recipe)
    console.show({"schema": "spd.recipe.check/1", "files": reports}, *lines)
    if not all(report["ok"] for report in reports):
        raise typer.Exit(2)


def _data(data: Data) -> str:
    """What a language model is decomposed on."""
    if data.prompts is None:
        return f"{data.stream}, sequences of {data.length} tokens"
    beside = f", beside text: {data.stream}" if data.stream else ""
    return f"{len(data.prompts)} prompts{beside}"


def summary(file: str, recipe: Recipe) -> list[str]:
    """That a recipe is without mistakes, and what it comes to, one line a section."""
    terms = [f"{name} {size:g}" for name, size in recipe.losses.coefficients.items() if size]
    losses = recipe.losses
    penalty = f"p {losses.p_start:g}" + (f" to {losses.p_final:g}" if losses.anneal_p else "")
    if losses.penalty == "smooth_l0":
        penalty = f"smooth L0, gamma {losses.gamma_start:g} to {losses.gamma_final:g}"
    if losses.penalty_final != 1:
        penalty += f", {losses.penalty_final:g} times as much in the end"
    rows = {
        "target": _target(recipe),
        "data": _data(recipe.data) if recipe.data else "",
        "train": _steps(recipe.train) if recipe.train else "",
        "slices": f"{recipe.slices.C} a matrix, of {', '.join(recipe.slices.matrices)}; start {recipe.slices.init}",
        "importance": f"{recipe.importance.kind}, gate width {recipe.importance.gate_width}, "
        f"basis {recipe.importance.basis}",
        "losses": f"{', '.join(terms)}; {penalty}",
        "decompose": _steps(recipe.decompose),
    }
    return [f"{file}: ok", *(f"  {name:<10}  {text}" for name, text in rows.items() if text)]


def _target(recipe: Recipe) -> str:
    from spdcli.recipe.contradiction import shown

    target = recipe.target
    if target.kind == "huggingface":
        return f"{target.model}, {target.dtype}"
    if target.kind == "module":
        return "a module of your own, which Python gives"
    if target.kind != "induction":
        sizes = target.model_dump(exclude={"kind", "path"})
        place = getattr(target, "path", None) or target.kind
        return f"{place}: {', '.join(f'{name} {shown(size)}' for name, size in sizes.items())}"
    return f"{target.path or 'induction toy'}: {target.layers} layers, {target.heads} heads, width {target.d_model}"


def _steps(work: Any) -> str:
    return f"{work.steps} steps of {work.batch}, {work.optimizer}, learning rate {work.learning_rate:g} {work.schedule}"


def _about(path: Path) -> str:
    """A recipe's first comment."""
    first = _text(path).partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
