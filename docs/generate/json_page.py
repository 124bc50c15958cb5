"""The JSON reference: the shape of what every command prints with `--json`, read off its recorded results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from generate.markdown import code, fenced, joined
from generate.recorded import recording, results

NOTE = "<!-- Generated from the recorded results by `make results`. -->"
ABOUT = """\
`--json` prints one object on standard output and nothing else. `schema` names what it is; keys are added and none goes
away, or the number after the slash changes. A number that is not finite is null. The shapes below are those of the
[recorded results](../results/index.md): `number` stands for a number, `[…]` for a list of such things, `<matrix>` and
`<key>` for keys that depend on the run.

On the command line `jq` takes it from there; from Python the same numbers come as objects (see [Python](python.md)).
"""
WIDE = 8  # keys above this, all of one shape, are data rather than names


def page() -> str:
    """The whole page."""
    shapes: dict[tuple[str, str], tuple[str, Any]] = {}
    for result in results().values():
        recorded = recording(result.name)
        if recorded is not None:
            words = result.command.split()
            verb = " ".join(words[:3] if words[1] in ("facts", "reproduce", "recipe") else words[:2])
            kind = str(recorded.result.get("target", ""))
            shapes.setdefault((verb, kind), (result.command, recorded.result))
    parts = [NOTE, "# JSON", ABOUT]
    for (verb, kind), (command, data) in shapes.items():
        title = f"## {code(verb)}" + (f", {'toy' if kind == 'induction' else 'language model'}" if kind else "")
        parts += [title, f"As of {code(command)}.", fenced("text", "\n".join(shape(data)))]
    return joined(parts) + "\n"


def shape(value: Any, indent: str = "") -> list[str]:
    """The lines that show what a value is made of."""
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        entries = [(key, shape(item, deeper)) for key, item in value.items()]
        if is_data(value, [lines for _, lines in entries]):
            name = "<matrix>" if all(re.search(r"\.|^[A-Z][a-z]*\d$", key) for key in value) else "<key>"
            entries = [(name, entries[0][1])]
        lines = ["{"]
        for key, inner in entries:
            lines += [f"{deeper}{key}: {inner[0]}", *inner[1:]]
        return [*lines, f"{indent}}}"]
    if isinstance(value, list) and value:
        inner = shape(fullest(value), indent)
        return [f"[{inner[0]}", *inner[1:-1], f"{inner[-1]}, …]"] if len(inner) > 1 else [f"[{inner[0]}, …]"]
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
