"""The JSON reference: the shape of what every command prints with `--json`, recorded or as the sources declare it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from generate.declared_shapes import lines_of, listed, nested, outputs
from generate.markdown import code, fenced, joined
from generate.recorded import recording, results

NOTE = "<!-- Generated from the recorded results and the sources by `make results`. -->"
ABOUT = """\
`--json` prints one object on standard output and nothing else. `schema` names what it is; keys are added and none goes
away, or the number after the slash changes. A number that is not finite is null. The shapes below are those of
[recorded results](../results/index.md), and where none is recorded with today's keys those that the sources declare:
`number` stands for a number, `[…]` for a list of such things, `<matrix>` and `<key>` for keys that depend on the run,
and `key?` for a key that is left out where it does not apply.

On the command line `jq` takes it from there; from Python the same numbers come as objects (see [Python](python.md)).
"""
WIDE = 8  # keys above this, all of one shape, are data rather than names


def page() -> str:
    """The whole page."""
    parts = [NOTE, "# JSON", ABOUT]
    for name, declared in outputs().items():
        verb, _, kind = name.partition(", ")
        origin, lines = "Not recorded: as declared in the sources.", lines_of(declared)
        if name in recorded_outputs():
            command, data = recorded_outputs()[name]
            origin, lines = f"As of {code(command)}.", shape(data)
        parts += [f"## {code(verb)}" + (f", {kind}" if kind else ""), origin, fenced("text", "\n".join(lines))]
    return joined(parts) + "\n"


def recorded_outputs() -> dict[str, tuple[str, Any]]:
    """The first command of each kind of output that was recorded with today's keys, and what it printed, by the kind's
    name in `outputs`."""
    firsts: dict[str, tuple[str, Any]] = {}
    for result in results().values():
        recorded = recording(result.name)
        if recorded is None:
            continue
        name = output_name(result.command, recorded.result)
        if outputs()[name]["schema"] == f'"{recorded.result["schema"]}"':
            firsts.setdefault(name, (result.command, recorded.result))
    return firsts


def output_name(command: str, data: Mapping[str, Any]) -> str:
    """The name in `outputs` of what a command printed."""
    words = command.split()
    if words[:2] == ["python", "-m"]:
        return {"soak.soak": "make soak", "walk.walk": "python -m walk.walk"}[words[2]]
    verb = " ".join(words[:3] if words[1] in ("facts", "reproduce", "recipe") else words[:2])
    option = next((f" {word}" for word in words if f"{verb} {word}" in outputs()), "")
    kinds = {"induction": ", toy", "huggingface": ", language model"}
    kind = (kinds | dict.fromkeys(("tms", "resid_mlp"), ", sparse features")).get(str(data.get("target", "")), "")
    if verb == "spd compare" and "parts" in data["rows"][0]:
        kind = ", sparse features"
    return f"{verb}{option}{kind}"


def shape(value: Any, indent: str = "") -> list[str]:
    """The lines that show what a value is made of."""
    if isinstance(value, Mapping) and value:
        entries = [(key, shape(item, f"{indent}  ")) for key, item in value.items()]
        if is_data(value, [lines for _, lines in entries]):
            name = "<matrix>" if all(re.search(r"\.|^[A-Z][a-z]*\d$", key) for key in value) else "<key>"
            entries = [(name, entries[0][1])]
        return nested(dict(entries), indent)
    if isinstance(value, list) and value:
        return listed(shape(fullest(value), indent))
    return [word(value)]


def fullest(items: list[Any]) -> Any:
    """The item that shows most: an object with the most keys."""
    return max(items, key=lambda item: len(item) if isinstance(item, Mapping | list) else 0)


def is_data(value: Mapping[str, Any], shapes: list[list[str]]) -> bool:
    """Whether an object's keys are data, such as names of matrices, rather than names that its reader knows."""
    named = any(re.search(r"[\s.:]|^\d|^[A-Z]", key) for key in value)
    return all(lines == shapes[0] for lines in shapes) and (named or len(value) > WIDE)


def word(value: Any) -> str:
    """What a value that holds no others is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list):
        return "[]"
    return {int: "number", float: "number", str: "text"}.get(type(value), "{}")
