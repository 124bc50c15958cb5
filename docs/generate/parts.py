"""Generated parts of written pages, between `<!-- NAME -->` and `<!-- /NAME -->`: from results and sources."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generate import edit_results, recipe_page, toy_results
from generate.markdown import code, duration, fenced, joined, size, table, threads
from generate.recorded import DOCS, ROOT, recording
from spdcli.engine.tables import GRADES

if TYPE_CHECKING:
    from spdcli.targets.block_layout import Architecture

WRITTEN = (ROOT / "README.md", DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md")))


def filled() -> dict[Path, str]:
    """Every written page that has generated parts, with those parts written anew."""
    texts = {path: path.read_text(encoding="utf-8") for path in WRITTEN}
    return {path: with_parts(text) for path, text in texts.items() if PART.search(text)}


PART = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)


def with_parts(text: str) -> str:
    """A page with every part of it written anew; KeyError for a part that is none."""
    return PART.sub(lambda match: part(match["name"]), text)


def part(name: str) -> str:
    """One part between its marks."""
    return f"<!-- {name} -->\n\n{PARTS[name]()}\n\n<!-- /{name} -->"


def demo() -> str:
    """What `make demo` prints in the end, in short: Table 1, and three numbers."""
    trained, measured = recording("demo-decompose"), recording("demo-eval")
    if trained is None or measured is None:
        return "*Not recorded yet: `python docs/record.py demo-decompose demo-eval`.*"
    took = duration(trained.seconds + measured.seconds)
    accuracy = f"{measured.result['accuracy']['masked']:.2%}"
    where = f"{trained.machine['processor']}, {threads(trained.machine['threads'])}"
    sentence = (
        f"It took {took} ({where}). Under {GRADES['importance'].label} the model of active slices alone is right on "
        f"{accuracy} of fresh sequences{worst(measured.result)}."
    )
    return joined([sentence, toy_results.active_slices(measured.result)])


def worst(result: Mapping[str, Any]) -> str:
    """What is left of it under the strongest evidence; nothing where a recording is older than that."""
    if "pgd_shared" not in result.get("evidence", {}):
        return ""
    found = result["evidence"]["pgd_shared"]
    words = f"under the worst masks in [importance, 1] that a search of {found['steps']} steps finds"
    return f"; {words}, {GRADES['adversarial'].label}, on {found['accuracy']:.2%}"


def cut() -> str:
    """What one slice taken out of the language model does."""
    recorded = recording("athletes-suppress")
    if recorded is None:
        return "*Not recorded yet: `python docs/record.py athletes-decompose athletes-suppress`.*"
    facts = recorded.result["facts"]
    sizes = ", ".join(f"{name} {size(facts[f'{name}_relative_change'])}" for name in facts["interval"])
    beside = f"Of {facts['asked']} other facts it knows {facts['known']}; sizes of their changes: {sizes}."
    return joined([edit_results.effects(recorded.result), beside])


def edits() -> str:
    """The edit script of the chain, in full."""
    return fenced("toml", (DOCS / "edits.toml").read_text(encoding="utf-8"))


def recipes() -> str:
    """The recipes that come with spd, in short."""
    return recipe_page.shipped_families()


def models() -> str:
    """The model families that can be decomposed, by the `model_type` of their `config.json`."""
    from spdcli.targets.architectures import ARCHITECTURES

    heads = ["`model_type`", "models", "matrices of a block", "`split_attention` makes", "logits"]
    rows = [
        [
            code(name),
            family.known_as,
            ", ".join(code(entry.module) for entry in family.matrices),
            ", ".join(part for entry in family.matrices for part, _ in entry.parts),
            logits_of(family),
        ]
        for name, family in ARCHITECTURES.items()
    ]
    return table(heads, rows, words=5)


def logits_of(family: Architecture) -> str:
    """What a family makes of its unembedding's output, by the names in its `config.json`."""
    parts = [f"times {code(family.scale)}"] if family.scale else []
    parts += [f"over {code(family.divisor)}"] if family.divisor else []
    parts += [f"within ± {code(family.cap)}"] if family.cap else []
    return ", ".join(parts)


def rooms() -> str:
    """A line a room of the package, in the order in which they may import each other: the first of its docstring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rows = []
    for layer in layers:
        path = ROOT / "spdcli" / layer
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        rows.append([code(f"{layer}/" if path.is_dir() else module.name), about(module)])
    return table(["", ""], rows, words=2)


def about(module: Path) -> str:
    """The first sentence that a module says about itself."""
    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]


PARTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "cut": cut,
    "edits": edits,
    "models": models,
    "recipes": recipes,
    "rooms": rooms,
}
