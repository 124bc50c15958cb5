"""The rows of a report: one intervention each, and how far it moves a fact, the other prompts and the known facts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdcli.edits.answer_changes import AnswerChanges, measure_edits
from spdcli.edits.choices import STATISTICS
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import AskedFacts, ChangeSizes, fact_questions
from spdcli.edits.suppression import Address
from spdcli.location.fact_edits import Place, Scene, SideBySide, fact_edits
from spdcli.location.tracing import Trace

TRACED, ZEROED = "traced", "zeroed"
SITES = {"state": "hidden state", "mlp": "MLPs", "attention": "attention"}
LEAKS = ("rule", "effect", "direct")  # the edits that related prompts are asked after
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ZeroedLayers:
    """Effects of each zeroed MLP layer: on the run's `prompts` by its label, on the known `facts` by its number where
    they were asked; `needed` is, by prompt, the layer other than 0 that the answer needs most."""

    prompts: Mapping[str, AnswerChanges]
    facts: Mapping[int, AnswerChanges]
    needed: list[int]


def fact_entry(
    scene: Scene,
    row: int,
    entry: Mapping[str, Any],
    known: AskedFacts | None,
    zeroed: ZeroedLayers,
    facts: Facts,
    begin_token: bool,
) -> dict[str, Any]:
    """The part of a report on prompt `row` that is about interventions; `entry` is what is known of it before."""
    side = fact_edits(scene, row, entry["subject"], entry["tokens"], entry["second_matrix"])
    on_prompts = measure_edits(scene.target, scene.questions, side.edits)
    shown = {name: side.edits[name] for place in side.places for name in place.edits}
    on_facts = {} if known is None else measure_edits(scene.target, known.questions, shown)
    rows = traced_rows(entry["trace"])
    for layer in dict.fromkeys((0, zeroed.needed[row])):
        label = f"mlp {layer}"
        rows.append(one_row(f"MLP {layer} zeroed", ZEROED, zeroed.prompts[label], zeroed.facts.get(layer), row, known))
    for place in side.places:
        rows += place_rows(place, on_prompts, on_facts, row, known)
    return {
        "before": on_prompts["direct"][row].before,
        "chosen": {"rule": [str(one) for one in side.rule], "effect": [str(one) for one in side.effect]},
        "named_at": side.positions,
        "rows": rows,
        "slices": slice_effects(side, on_prompts, entry["tokens"]),
        "related": related_effects(scene, side, facts, entry["prompt"], begin_token),
    }


def traced_rows(trace: Trace) -> list[Row]:
    """The best site of each kind, as what its corrupted piece does in the clean run.

    That of the hidden state is sought among the subject's tokens: after them, the last one always decides.
    """
    rows = []
    for kind, words in SITES.items():
        sites = [site for site in trace.best if site.kind == kind]
        best = sites[0] if kind == "state" else max(sites, key=lambda site: site.effect)
        first, last = best.layers
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        name = f"tracing: {words} at {trace.tokens[best.position]!r}, {layers}"
        own = best.reverse / trace.clean - 1
        rows.append({"name": name, "kind": TRACED, "own": own, "others": None, "facts": None, "restores": best.effect})
    return rows


def one_row(
    name: str, kind: str, on_prompts: AnswerChanges, on_facts: AnswerChanges | None, row: int, known: AskedFacts | None
) -> Row:
    """The row of one intervention from its effects on the run's prompts and on the known facts."""
    others = [effect.ratio - 1 for number, effect in enumerate(on_prompts) if number != row]
    summary = None if known is None or on_facts is None else known.summary(on_facts, seed=0)
    return {
        "name": name,
        "kind": kind,
        "own": on_prompts[row].ratio - 1,
        "others": max(others, key=abs, default=None),
        "facts": summary,
    }


def place_rows(
    place: Place,
    on_prompts: Mapping[str, AnswerChanges],
    on_facts: Mapping[str, AnswerChanges],
    row: int,
    known: AskedFacts | None,
) -> list[Row]:
    """One row for a place of one edit; of several, one with their mean sizes and one with the largest of each."""
    rows = [one_row(place.name, place.kind, on_prompts[name], on_facts.get(name), row, known) for name in place.edits]
    if len(rows) == 1:
        return rows
    label = f"{place.name}, {{}} of {len(rows)}"
    mean = {"name": label.format("mean size"), "kind": place.kind, **combined(rows, statistics.fmean)}
    return [mean, {"name": label.format("largest"), "kind": place.kind, **combined(rows, max)}]


def combined(rows: Sequence[Row], join: Any) -> Row:
    """Sizes of changes, joined over rows: `own`, `others` and the statistics of the facts (without intervals)."""

    def over(values: Sequence[float | None]) -> float | None:
        sizes = [abs(value) for value in values if value is not None]
        return join(sizes) if sizes else None

    found: Row = {key: over([row[key] for row in rows]) for key in ("own", "others")}
    sizes = [row["facts"].relative_change for row in rows if row["facts"] is not None]
    joined = {name: over([one[name] for one in sizes]) for name in STATISTICS}
    found["facts"] = ChangeSizes(relative_change=joined) if sizes else None
    return found | {"sizes": True}


def slice_effects(
    side: SideBySide, on_prompts: Mapping[str, AnswerChanges], tokens: Sequence[str]
) -> list[dict[str, Any]]:
    """The rule's slices, each suppressed alone and then all together, on every prompt (Figures 3 and 4)."""

    def told(name: str, addresses: Sequence[Address], at: Sequence[int]) -> dict[str, Any]:
        effects = on_prompts[name]
        where = {"slices": [str(one) for one in addresses], "tokens": [tokens[position] for position in at]}
        return where | {key: [getattr(effect, key) for effect in effects] for key in ("before", "after", "ratio")}

    placed = sorted(side.rule.items(), key=lambda pair: pair[1])  # in the order of the prompt
    alone = [told(str(address), [address], [position]) for address, position in placed]
    if len(alone) < 2:
        return alone
    return [*alone, told("rule", [address for address, _ in placed], [position for _, position in placed])]


def related_effects(
    scene: Scene, side: SideBySide, facts: Facts, prompt: str, begin_token: bool
) -> list[dict[str, Any]]:
    """The fact in other words and asked in reverse, before and after the edits of LEAKS: what leaks."""
    related = facts.related_to(prompt)
    if not related:
        return []
    questions = fact_questions(scene.tokenizer, related, begin_token, scene.target.device)
    edits = {name: side.edits[name] for name in LEAKS if name in side.edits}
    measured = measure_edits(scene.target, questions, edits)
    found = []
    for number, one in enumerate(related):
        effects = {name: rows[number] for name, rows in measured.items()}
        first = next(iter(effects.values()))
        entry = {"kind": one.kind, "prompt": one.prompt, "token": first.token, "before": first.before}
        keys = ("after", "ratio", "rank_after")
        after = {name: {key: getattr(effect, key) for key in keys} for name, effect in effects.items()}
        found.append(entry | {"rank_before": first.rank_before, "edits": after})
    return found
