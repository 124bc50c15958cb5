"""Results about facts of a language model as Markdown: what is in a run, what carries a fact, what an edit does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.evidence_results import evidence
from generate.markdown import code, joined, number, percent, size, table
from spdcli.commands.evidence_tables import grade_of
from spdcli.commands.reproduce_tables import NAMES
from spdcli.engine.tables import GRADES
from spdcli.location.report_rows import SITES

Data = Mapping[str, Any]

TOKENS_SHOWN = 3


def ending(text: str, most: int = 100) -> str:
    """A prompt, or where it is a piece of a corpus its last words."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"… {words[-most:].partition(' ')[2]}"


def evaluation(data: Data) -> str:
    """`spd.eval/2` of a language model: what the model of active slices alone still predicts."""
    answers = [
        [ending(entry["prompt"]), code(entry["answer"]), number(entry["target"]), number(entry["masked"])]
        for entry in data["answers"]
    ]
    weakest = GRADES["importance"].label
    measured = [[name, grade_of(name), number(value)] for name, value in data["metrics"].items()]
    for name, value in data["cross_entropy"].items():
        graded = weakest if name == "masked" else ""
        measured.append([f"cross-entropy of the text, {name}", graded, number(value)])
    return joined(
        [
            f"{data['total_active']} of {data['total_slices']} slices are active somewhere.",
            table(["prompt", "answer", "target", f"active slices alone, {weakest}"], answers, words=2),
            table(["metric", "evidence", "value"], measured, words=2),
            evidence(data),
            grounding(data["grounding"]),
        ]
    )


def grounding(data: Data) -> str:
    """How far active slices lie along the target's weights, and in which blocks they are."""
    if data["last_block"] is None:
        return ""
    blocks = ", ".join(f"{count} in block {block}" for block, count in data["blocks"].items())
    return (
        f"Of an active slice {data['in_weights']:.0%} is in the weights; of what active slices write "
        f"{data['in_outputs']:.0%} lies along the target's own answer (means). Active slices: {blocks}."
    )


def inspection(data: Data) -> str:
    """`spd.inspect/2`: the slices that are active at a token; `/1` counted prompts from 0, as `prompt`."""
    parts = []
    for place in data["occurrences"]:
        rows = [
            [
                code(entry["slice"]),
                "unique" if entry["unique"] else "",
                words(entry["promotes"]),
                words(entry["reads"]),
                number(entry["importance"]),
                number(entry["activation"]),
            ]
            for entry in place["slices"]
        ]
        heads = ["slice", "in this prompt alone", "promotes", "reads", "importance", "activation"]
        prompt = place["number"] if "number" in place else place["prompt"] + 1
        where = f"{code(place['token'])} at position {place['position']} of prompt {prompt}"
        parts += [f"{where}: {place['active']} active slices.", table(heads, rows, words=4)]
    return joined(parts)


def words(tokens: list[str]) -> str:
    """The first few tokens of a label."""
    return " ".join(code(token) for token in tokens[:TOKENS_SHOWN])


def known_facts(data: Data) -> str:
    """`spd.facts.check/1`: how many facts of each category the model knows."""
    categories = list(dict.fromkeys(entry["category"] for entry in data["facts"]))
    rows = []
    for category in categories:
        entries = [entry for entry in data["facts"] if entry["category"] == category]
        rows.append([category, sum(entry["known"] for entry in entries), len(entries)])
    least = data["thresholds"]
    sentence = (
        f"{data['model']} knows {data['known']} of {data['asked']}: the answer has a probability of at least "
        f"{least['probability']:g} and rank {least['rank']} or better. {data['disagree']} notes of the file are wrong."
    )
    return joined([sentence, table(["category", "known", "asked"], rows)])


def location(data: Data) -> str:
    """`spd.locate/1`: the slices, and the pairs, that take most of an answer."""
    parts = []
    for entry in data["located"]:
        limit = f", {entry['statistic']} collateral at most {entry['limit']:g}" if entry["limit"] is not None else ""
        parts.append(
            f"{code(entry['token'])} of *{entry['prompt']}*: {entry['before']:.4f} before; "
            f"{entry['candidates']} active slices{limit}."
        )
        parts.append(table(["slice", *LOCATED], [[code(one["slice"]), *located(one)] for one in entry["slices"]]))
        if entry["pairs"]:
            counts = f"{entry['pairs_above_sum']} of {entry['pairs_measured']} pairs"
            above = f"{counts} do more than their sum in log-probability."
            pairs = [[" and ".join(map(code, one["slices"])), *located(one)] for one in entry["pairs"]]
            parts += [above, table(["pair", *LOCATED], pairs)]
    return joined(parts)


LOCATED = ("after", "change", "KL", "other prompts", "facts: median, mean, max", "collateral")


def located(entry: Data) -> list[str]:
    """What becomes of the answer, of the other prompt that moves most, and of the known facts."""
    most = size(max(entry["others"])) if entry["others"] else ""
    facts = ", ".join(size(value) for value in (entry["facts"] or {}).values())
    return [
        f"{entry['after']:.4f}",
        percent(entry["ratio"] - 1),
        number(entry["kl"]),
        most,
        facts,
        size(entry["collateral"]),
    ]


def tracing(data: Data) -> str:
    """`spd.trace/1`: the best places of every prompt (Figures 7 and 8)."""
    parts = [
        f"Noise of {data['noise']:g} standard deviations of the embeddings, {data['samples']} draws, windows of "
        f"{data['window']} of {data['layers']} layers."
    ]
    heads = ["restored", "best at", "token", "layer", "P", "indirect effect", "in reverse, P"]
    for entry in data["prompts"]:
        rows = [
            [
                SITES[best["kind"]],
                {"subject": "the subject", "after": "after it"}[best["where"]],
                code(entry["tokens"][best["position"]]),
                best["layer"],
                f"{entry['corrupted'] + best['effect']:.4f}",
                f"{best['effect']:+.4f} ± {best['standard_error']:.4f}",
                f"{best['reverse']:.4f}",
            ]
            for best in entry["best"]
        ]
        corrupted = f"{entry['corrupted']:.4f} ± {entry['corrupted_standard_error']:.4f}"
        answer = f"P({code(entry['answer'])}) = {entry['clean']:.4f}, corrupted {corrupted}"
        parts += [f"*{entry['prompt']}*: {answer}.", table(heads, rows, words=3)]
    return joined(parts)


def report(data: Data) -> str:
    """`spd.report/1`: every way to cut a fact in one table, then what leaks."""
    parts = []
    known = f"{data['facts']['known']} known facts: median"
    for entry in data["prompts"]:
        rows = [[row["kind"], row["name"], *moved(row)] for row in entry["rows"]]
        heads = ["", "edit, or intervention", "this fact", "other prompts", known, "mean", "max"]
        parts += [
            f"*{entry['prompt']}*: P({code(entry['answer'])}) = {entry['before']:.4f}.",
            table(heads, rows, words=2),
            related(entry),
        ]
    return joined([*parts, evidence(data)])


def moved(row: Data) -> list[str]:
    """How far a row's edit moves its fact, the other prompts and the known facts."""
    show = size if row.get("sizes") else percent
    changes = row["facts"] or {}
    statistics = [size(changes.get(f"{name}_relative_change")) for name in ("median", "mean", "max")]
    return [show(row["own"]), show(row["others"]), *statistics]


def related(entry: Data) -> str:
    """The fact in other words, and in reverse: what is left after each edit."""
    if not entry["related"]:
        return ""
    edits = list(entry["related"][0]["edits"])
    rows = [
        [one["kind"], one["prompt"], f"{one['before']:.4f}", *(percent(e["ratio"] - 1) for e in one["edits"].values())]
        for one in entry["related"]
    ]
    heads = ["what leaks", "prompt", "before", *(NAMES.get(edit, edit) for edit in edits)]
    return table(heads, rows, words=2)


def reproduction(data: Data) -> str:
    """`spd.reproduce/1` of facts: every method on every prompt over the seeds, then the bounds."""
    several = len(data["seeds"]) > 1
    parts = [
        f"Means over {len(data['seeds'])} seeds, with the least and the largest; *other* and *max*: the largest."
    ] * several
    for prompt in dict.fromkeys(row["prompt"] for row in data["methods"]):
        rows = []
        for row in (row for row in data["methods"] if row["prompt"] == prompt):
            own, statistics = row["own"], [row[f"{name}_relative_change"]["mean"] for name in ("median", "mean")]
            extent = f" ({percent(own['min'], 0)} to {percent(own['max'], 0)})" if several else ""
            rows.append(
                [
                    NAMES.get(row["method"], row["method"]),
                    percent(own["mean"], 0) + extent,
                    size(row["others"]["max"]),
                    *map(size, statistics),
                    size(row["max_relative_change"]["max"], 0),
                ]
            )
        heads = ["edit", "own answer", "other prompt", "facts: median", "mean", "max"]
        parts += [f"*{prompt}*: relative changes.", table(heads, rows)]
    return joined([*parts, bounds(data["rows"])])


def drawn_facts(data: Data) -> str:
    """`spd.facts.drawn/1`: how many facts each method cuts, then what the edit by rule does to each."""
    total = len(data["facts"])
    counts = [
        [
            NAMES.get(row["method"], row["method"]),
            row["edits"],
            row["cut"],
            f"{row['cut_and_spared']} of {total}",
            row["cut_and_tail_spared"],
        ]
        for row in data["methods"]
    ]
    rows = []
    for fact in data["facts"]:
        rule = fact["edits"].get("rule")
        if rule is None:
            rows.append([fact["prompt"], "0", *["–"] * 7, "no"])
            continue
        known = [size(rule["known"][name]) for name in ("mean", "p99", "max")]
        akin = "–" if rule["akin"]["max"] is None else size(rule["akin"]["max"])
        holds = "yes" if rule["cut"] and rule["spares"] else "no"
        rows.append(
            [
                fact["prompt"],
                len(rule["slices"]),
                percent(rule["own"], 0),
                size(rule["others"]["max"]),
                *known,
                akin,
                number(rule["text"]["kl_p99"]),
                holds,
            ]
        )
    heads = ["fact", "slices", "own answer", "other prompts", "facts: mean", "99 %", "max"]
    return joined(
        [
            table(["method", "edits", "cut by 60 %", "and the others spared", "and the tail"], counts),
            "By rule; *same subject*: the largest change of a fact about it, which no bound is on; *text*: the KL that "
            "one token of ordinary text in a hundred exceeds.",
            table([*heads, "same subject", "text, 99 %", "holds"], rows),
        ]
    )


def bounds(rows: list[Data]) -> str:
    """What must hold, and on how many seeds it does."""
    cells = [
        [
            row["name"],
            "no slice" if row["ours"] is None else percent(row["ours"]),
            row["bound"] or f"({row['agreement']})",
            f"{row['share']:.0%}",
        ]
        for row in rows
    ]
    return joined(["Bounds (in brackets: not stated ones):", table(["", "ours", "bound", "holds on"], cells)])
