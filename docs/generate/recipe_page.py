"""The recipe reference: every key with its meaning, type, range and default, from the schema that reads recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import code, joined, prose, table
from spdcli.recipe.reading import shipped
from spdcli.recipe.schema import Recipe

NOTE = "<!-- Generated from `spdcli/recipe/schema.py` by `make results`. -->"
ABOUT = """\
A recipe is a TOML file: what to take apart, into what, and for how long. `spd recipe check FILE` tells every mistake at
once, with its line. `--set SECTION.KEY=VALUE` changes one setting of any recipe on the command line; what is said there
comes before the file, and the file before the defaults below.

`spd recipe cp NAME mine.toml` is the quickest way to one of your own. Each recipe says, value by value, what comes from
the paper.
"""
Schema = Mapping[str, Any]


def page() -> str:
    """The whole page: the shipped recipes, then a section of keys for each section of a recipe."""
    schema = Recipe.model_json_schema()
    plain = {name: entry for name, entry in schema["properties"].items() if not sections_of(entry)}
    parts = [NOTE, "# Recipes", ABOUT, shipped_table(), "## Top of the file", keys_table(plain, schema)]
    for name, entry in schema["properties"].items():
        for reference in sections_of(entry):
            definition = schema["$defs"][reference.rpartition("/")[2]]
            parts += section(name, definition, schema)
    return joined(parts) + "\n"


def shipped_table() -> str:
    """The recipes that come with spd, by the first comment of each; below a recipe its variants, NAME-WORD."""
    return table(["shipped recipe", "what it is"], [[code(name), about] for name, about in shipped_recipes()], words=2)


def shipped_families() -> str:
    """The same in short: a row a recipe, with the names of its variants."""
    recipes = dict(shipped_recipes())
    bases = [name for name in recipes if not any(name.startswith(f"{other}-") for other in recipes)]
    rows = []
    for base in bases:
        variants = [code(name.removeprefix(base)) for name in recipes if name.startswith(f"{base}-")]
        rows.append([code(base), ", ".join(variants), recipes[base]])
    return table(["shipped recipe", "its variants", "what it is"], rows, words=3)


def shipped_recipes() -> list[tuple[str, str]]:
    """Every shipped recipe's name, and what its first comment says."""
    return [
        (name, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip())
        for name, path in sorted(shipped().items())
    ]


def sections_of(entry: Schema) -> list[str]:
    """The sections that a key of the recipe's top stands for: none, one, or one a kind."""
    choices = entry.get("oneOf") or entry.get("anyOf") or [entry]
    return [choice["$ref"] for choice in choices if "$ref" in choice]


def section(name: str, definition: Schema, schema: Schema) -> list[str]:
    """One section: its heading, what it is about, its keys."""
    kind = definition["properties"].get("kind", {}).get("const")
    title = f"## `[{name}]`" + (f' with `kind = "{kind}"`' if kind else "")
    required = "" if name in schema["required"] else "Not every recipe needs it."
    return [title, prose(definition.get("description", "")), required, keys_table(definition["properties"], definition)]


def keys_table(keys: Mapping[str, Schema], owner: Schema) -> str:
    """A row a key."""
    rows = []
    for name, entry in keys.items():
        default = "**required**" if name in owner.get("required", ()) else literal(entry.get("default"))
        rows.append([code(name), values(entry), default, meaning(entry)])
    return table(["key", "values", "default", "meaning"], rows, words=4)


def meaning(entry: Schema) -> str:
    """What a key is for, and each of its choices."""
    choices = [f"{literal(name)}: {prose(about)}" for name, about in entry.get("choices", {}).items()]
    return "<br>".join([prose(entry.get("description", "")), *choices])


def values(entry: Schema) -> str:
    """What a key may hold, in words."""
    options = [option for option in entry.get("anyOf", [entry]) if option.get("type") != "null"]
    return " or ".join(one_type(option) for option in options)


def one_type(entry: Schema) -> str:
    """One type with its range or its choices."""
    if "const" in entry:
        return literal(entry["const"])
    if "enum" in entry:
        return ", ".join(literal(choice) for choice in entry["enum"])
    if entry["type"] == "array":
        return f"list of {one_type(entry['items'])}"
    word = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[entry["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {entry[key]:,g}" if entry[key] < 1e6 else f"{sign} {entry[key]:,}"
        for key, sign in signs.items()
        if key in entry
    ]
    return " ".join([word, " and ".join(bounds)]).strip()


def literal(value: Any) -> str:
    """A value as a recipe writes it; a key without one may be left out."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, list):
        return code("[" + ", ".join(f'"{one}"' for one in value) + "]")
    return code(f'"{value}"' if isinstance(value, str) else f"{value:g}")
