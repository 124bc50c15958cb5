"""Recipes as files: reads TOML and `--set` into a `Recipe`, and tells every mistake at once, with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from spdcli.disk import read_bytes
from spdcli.errors import RecipeError, RecipeProblem, SpdError
from spdcli.recipe.idle import idle_settings
from spdcli.recipe.losses import Losses
from spdcli.recipe.overrides import Override, lowered, parse_override, put
from spdcli.recipe.schema import Data, Importance, Recipe, Slices, ToyTarget
from spdcli.recipe.toml_lines import BeyondBounds, KeyPath, key_lines, read_tables
from spdcli.recipe.training import Decompose
from spdcli.recipe.wording import mistakes

MOST_PROMPTS = 2**24  # bytes of a file of prompts
USUAL = {  # the usual value of every setting of the sections that have one, by its dotted key
    f"{section}.{key}": field.default
    for section, model in (
        ("data", Data),
        ("slices", Slices),
        ("importance", Importance),
        ("losses", Losses),
        ("decompose", Decompose),
    )
    for key, field in model.model_fields.items()
}


@dataclass(frozen=True)
class Source:
    """Where a recipe's settings come from, so that a mistake can be blamed on a line or an option."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def problem(self, keys: Sequence[KeyPath], message: str) -> RecipeProblem:
        """Blames the first of `keys` that an option set, else the first that the file holds, else its section."""
        dotted = ".".join(str(part) for part in keys[0])
        if option := self._option_above(keys):
            return RecipeProblem(option, None, dotted, message)
        sections = [key[:length] for key in keys for length in range(len(key) - 1, 0, -1)]
        for path in (*keys, *sections):
            if path in self.lines:
                return RecipeProblem(self.name, self.lines[path], dotted, message)
            if option := self._option_within(path):
                return RecipeProblem(option, None, dotted, message)
        return RecipeProblem(self.name, None, dotted, message)

    def _option_above(self, keys: Sequence[KeyPath]) -> str | None:
        """The last option that set one of `keys`, or the whole section that one of them is in."""
        return next(
            (one.option for key in keys for one in reversed(self.overrides) if key[: len(one.path)] == one.path), None
        )

    def _option_within(self, section: KeyPath) -> str | None:
        """The last option that set something inside `section`."""
        return next((one.option for one in reversed(self.overrides) if one.path[: len(section)] == section), None)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that remembers where each of its settings stands."""

    recipe: Recipe
    source: Source

    def error(self, key: str | KeyPath, message: str, hint: str | None = None) -> RecipeError:
        """An error that blames one key (`"target.model"`, or `("data", "prompts", 1)`), by its line or its option."""
        path = tuple(key.split(".")) if isinstance(key, str) else key
        return RecipeError([self.source.problem([path], message)], hint)


def load_recipe(
    path_or_name: str | Path,
    overrides: Iterable[str | Override] = (),
    *,
    seed: int | None = None,
    device: str | None = None,
    written_by_a_run: bool = False,
) -> LoadedRecipe:
    """Reads a recipe file, or a shipped recipe by its name, and applies the command line on top.

    `overrides` are the values of `--set`: `a.b=value`, where a value that is no TOML literal is taken
    as text. `seed` and `device` are the options of those names. Raises RecipeError with every mistake.
    """
    path = find_recipe(path_or_name)
    text = read_toml(path)
    return checked_recipe(
        parse_toml(text, str(path)),
        str(path),
        key_lines(text),
        overrides,
        seed=seed,
        device=device,
        written_by_a_run=written_by_a_run,
    )


def checked_recipe(
    raw: dict[str, Any],
    name: str,
    lines: Mapping[KeyPath, int],
    overrides: Iterable[str | Override] = (),
    *,
    seed: int | None = None,
    device: str | None = None,
    written_by_a_run: bool = False,
) -> LoadedRecipe:
    """The recipe that the tables `raw` write, with the overrides of `load_recipe` on top, which are put into `raw`.

    Mistakes blame the file (or whatever else) called `name`, and `lines` says where its keys stand. A setting that
    changes nothing is one, unless an override made it so, or the recipe was `written_by_a_run`: then it is dropped.
    """
    applied = [parse_override(one) if isinstance(one, str) else one for one in overrides]
    if seed is not None:
        applied.append(Override(f"--seed {seed}", ("seed",), seed))
    if device is not None:
        applied.append(Override(f"--device {device}", ("device",), device))
    problems = [problem for override in applied if (problem := put(override, raw))]
    source = Source(name, dict(lines), tuple(applied))
    problems += _prompts_read(raw, source)
    try:
        recipe = Recipe.model_validate(raw)
        idle, dropped = _idle_problems(recipe, raw, source, written_by_a_run)
        problems += idle
        if not problems:
            loaded = LoadedRecipe(Recipe.model_validate(raw) if dropped else recipe, source)
            if isinstance(recipe.target, ToyTarget):  # whose matrices are known before it is trained
                select_matrices(loaded, recipe.target.matrix_names)
            return loaded
    except ValidationError as error:
        problems += [source.problem(mistake.keys, mistake.message) for mistake in mistakes(error, raw)]
    problems.sort(key=lambda problem: problem.line or 0)
    raise RecipeError(problems, _working_recipe(name, raw, problems, applied))


def _prompts_read(raw: dict[str, Any], source: Source) -> list[RecipeProblem]:
    """Prompts that `raw` names a file of are read into it, one a line; what is wrong with that file."""
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(file := data.get("prompts"), str):
        return []
    try:
        lines = read_bytes(Path(file), MOST_PROMPTS).decode().splitlines()
    except (SpdError, UnicodeDecodeError) as error:
        data["prompts"] = [file]  # so that the schema does not tell of it again
        said = error.message if isinstance(error, SpdError) else f"not text in UTF-8: {error.reason}"
        return [source.problem([("data", "prompts")], f"[data] prompts names a file with one a line: {said}")]
    data["prompts"] = [line.strip() for line in lines if line.strip()]
    return []


def _idle_problems(
    recipe: Recipe, raw: dict[str, Any], source: Source, written_by_a_run: bool
) -> tuple[list[RecipeProblem], bool]:
    """Settings that change nothing; those that the user is not to blame for are taken out of `raw` instead, and whether
    there were any."""
    problems, dropped = [], False
    overridden = [override.path for override in source.overrides]
    for idle in idle_settings(recipe.model_dump(), USUAL):
        setting, decider = (tuple(key.split(".")) for key in idle.keys)
        undone = setting not in overridden and any(path[0] == decider[0] for path in overridden)
        if written_by_a_run or undone:
            raw[setting[0]].pop(setting[1], None)
            dropped = True
        else:
            problems.append(source.problem([setting, decider], idle.message))
    return problems, dropped


def dump_recipe(recipe: Recipe, **header: object) -> str:
    """The recipe as TOML with every default written out; `header` becomes comments, as in `# torch: 2.13.0`.

    `load_recipe` of the result gives an equal recipe.
    """
    import tomli_w

    comments = [f"# {name}: {' '.join(str(value).split())}" for name, value in header.items()]
    return "\n".join([*comments, tomli_w.dumps(recipe.model_dump(exclude_none=True))])


def shipped() -> dict[str, Path]:
    """The recipes that come with spd, by name: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    for directory in (package / "recipes", package.parent / "recipes"):
        if directory.is_dir():
            return {path.stem: path for path in sorted(directory.glob("*.toml"))}
    return {}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file that is meant: an existing one, else the shipped recipe of that name.

    A directory may be called like a shipped recipe: runs often are.
    """
    path = Path(path_or_name)
    recipes = shipped()
    name = str(path_or_name).removesuffix(".toml")
    if path.is_file() or (path.exists() and name not in recipes):
        return path
    if name in recipes:
        return recipes[name]
    nearby = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), [*nearby, *recipes], n=2) or difflib.get_close_matches(
        path.stem, recipes, n=2
    )
    meant = f" (did you mean {' or '.join(repr(one) for one in near)}?)" if near else ""
    raise RecipeError(
        [RecipeProblem(str(path), None, "", f"no such recipe{meant}")],
        "`spd recipe ls` lists the shipped ones; each can be given by its name",
    )


def select_matrices(loaded: LoadedRecipe, names: Sequence[str]) -> list[str]:
    """The matrices of a target (`names`) that the recipe's `slices.matrices` ask for, in the target's order.

    A pattern is a name, or has `*`, `?` and `[0-5]`. Raises RecipeError for every pattern that matches none.
    """
    patterns = loaded.recipe.slices.matrices
    problems = [
        loaded.source.problem(
            [("slices", "matrices", index)],
            f"[slices] matrices: '{pattern}' matches no matrix of the target; {_nearest(pattern, names)}",
        )
        for index, pattern in enumerate(patterns)
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise RecipeError(problems, "a pattern is a matrix's name, or has * (anything), ? and [0-5]")
    return matching(patterns, names)


def matching(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that at least one of the patterns matches, in their order."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if near:
        return f"the nearest are {', '.join(near)}"
    return f"it has {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def read_toml(path: Path, kind: str = "a recipe") -> str:
    """The text of a file that `kind`, in words, is; RecipeError when it cannot be read."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        message = f"not a text file in UTF-8: {error.reason} at byte {error.start}"
    except IsADirectoryError:
        run_recipe = path / "recipe.toml"
        message = f"a directory, not {kind}" + (f" (did you mean '{run_recipe}'?)" if run_recipe.is_file() else "")
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    raise RecipeError([RecipeProblem(str(path), None, "", message)], f"{kind} is a TOML file")


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """TOML as tables; RecipeError with line and column where it is none. `source` is the file's name."""
    try:
        return read_tables(text)
    except (tomli.TOMLDecodeError, BeyondBounds) as error:
        message = f"not valid TOML: {lowered(error.msg)}"
        problem = RecipeProblem(source, error.lineno, "", message, error.colno)
    raise RecipeError([problem], "text is quoted, true and false are not, and a key stands once in its section")


def _working_recipe(
    name: str, raw: dict[str, Any], problems: Sequence[RecipeProblem], overrides: Sequence[Override]
) -> str:
    """The hint for mistakes in a recipe: where they are all on the command line, the file `name` itself is right."""
    options = [override.option for override in overrides]
    if all(problem.source in options for problem in problems) and Path(name).is_file():
        given = next((own for own, path in shipped().items() if str(path) == name), name)
        return f"`spd recipe show {given}` prints its settings"
    return f"`spd recipe show {_example(raw)}` prints a recipe that works"


def _example(raw: dict[str, Any]) -> str:
    """The shipped recipe that is nearest in kind to a broken one."""
    target = raw.get("target")
    examples = {
        "huggingface": "gpt2",
        "planted_induction": "planted-induction",
        "planted_lookup": "planted-lookup",
        "tms": "tms-5-2",
        "resid_mlp": "resid-mlp-1",
    }
    return examples.get(str(target.get("kind")), "induction") if isinstance(target, dict) else "induction"
