"""Results of edits as Markdown: what `spd suppress` does to prompts, facts and weights, and whether a script holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import code, joined, number, percent, size, table

Data = Mapping[str, Any]


def suppression(data: Data) -> str:
    """`spd.suppress/1`: of slices or a patch what it does, of a script whether it holds."""
    if data.get("edits"):
        return script(data)
    parts = [effects(data), facts(data["facts"]), text({"this": data.get("text")})]
    if data["alone"]:
        answers = [code(effect["token"]) for effect in next(iter(data["alone"].values()))]
        rows = [[code(one), *(percent(e["ratio"] - 1) for e in every)] for one, every in data["alone"].items()]
        parts.append(joined(["Each alone:", table(["slice", *answers], rows)]))
    if data.get("matrices"):
        parts.append(cuts(data["matrices"], data["together"]))
    return joined(parts)


def cuts(matrices: list[Data], together: str) -> str:
    """What every form of the edit takes from each matrix, and how far it ends from the literal one."""
    forms = list(matrices[0]["forms"])
    rows = []
    for row in matrices:
        sizes = [row["forms"][form] for form in forms]
        removed = [f"{one['removed']:.3%}" for one in sizes]
        apart = [f" ({one['from_literal']:.3%})" if one["from_literal"] else "" for one in sizes]
        rows.append([code(row["matrix"]), str(len(row["slices"])), *map("".join, zip(removed, apart, strict=True))])
    words = (
        f"Taken from each matrix as a share of ‖W‖ (in brackets: how far from literal); what was done is {together}."
    )
    return joined([words, table(["matrix", "slices", *forms], rows)])


def text(edits: Mapping[str, Data | None]) -> str:
    """How far each edit, by name, moves a text; nothing where none was read."""
    rows = [
        [name, f"{one['tokens']:,}", *(number(one[f"kl_{kind}"]) for kind in ("mean", "median", "p99", "max"))]
        for name, one in edits.items()
        if one
    ]
    heads = ["edit", "tokens of text", "KL a token: mean", "median", "99 %", "max"]
    return table(heads, rows) if rows else ""


def effects(data: Data) -> str:
    """What every prompt's answer loses."""
    rows = [
        [
            effect["prompt"],
            code(effect["token"]),
            f"{effect['before']:.4f}",
            f"{effect['after']:.4f}",
            percent(effect["ratio"] - 1),
            f"{effect['rank_before']} → {effect['rank_after']}",
            number(effect["kl"]),
        ]
        for effect in data["effects"]
        if effect["group"] != "fact"
    ]
    heads = ["prompt", "answer", "before", "after", "change", "rank", "KL"]
    return joined([f"Suppressed: {', '.join(map(code, data['slices']))}.", table(heads, rows, words=2)])


def facts(summary: Data | None) -> str:
    """How far the facts moved that the model knows."""
    if summary is None or not summary["known"]:
        return ""
    rows = [
        [name, size(summary[f"{name}_relative_change"], 2), f"{low:.2%} to {high:.2%}"]
        for name, (low, high) in summary["interval"].items()
    ]
    moved = ", ".join(f"*{fact['prompt']}* {percent(fact['ratio'] - 1)}" for fact in summary["worst"])
    heads = ["of them", "size of change", f"{summary['level']:.0%} interval"]
    return joined(
        [
            f"The {summary['known']} of {summary['asked']} other facts that the model knows:",
            table(heads, rows),
            f"Most moved: {moved}.",
        ]
    )


def script(data: Data) -> str:
    """The edits of a script, and what is expected of them."""
    edits = [[edit["name"], ", ".join(map(code, edit["slices"]))] for edit in data["edits"]]
    verdicts = {None: "", True: "yes", False: "NO"}
    expectations = [
        [one["edit"], one["name"], number(one["value"]), one["bound"], verdicts[one["passed"]]]
        for one in data["expectations"]
    ]
    heads = ["edit", "expectation", "value", "bound", "holds"]
    beside = text({edit["name"]: edit.get("text") for edit in data["edits"]})
    return joined([table(["edit", "slices"], edits, words=2), table(heads, expectations, words=2), beside])
