"""The pages of results: one a subject, from `docs/results.toml` and what was recorded of each result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from generate import (
    cost_results,
    edit_results,
    evidence_results,
    fact_results,
    feature_results,
    planted_results,
    soak_results,
    text_results,
    toy_results,
    walk_results,
)
from generate.markdown import duration, fenced, joined
from generate.recorded import Page, Recording, Result, pages, recording, results, sentence

NOTE = "<!-- Rendered from the JSON beside it by `make results`: change docs/results.toml or record again. -->"
INDEX_ABOUT = """\
Every number of these pages was written by a command, as JSON, into `docs/results/`, with the commit, the machine and
the date; `make results` renders the pages from it, and a test renders them again and compares. None is typed.

`python docs/record.py NAME` runs the command of a result and keeps what it prints.
"""


def written() -> dict[Path, str]:
    """Every page of results, by its path inside `docs/`."""
    every = {Path("results") / f"{page.name}.md": page_text(page) for page in pages()}
    return {Path("results/index.md"): index(), **every}


def index() -> str:
    """The list of pages and of their results."""
    parts = [NOTE, "# Results", INDEX_ABOUT]
    for page in pages():
        own = [result for result in results().values() if result.page == page.name]
        lines = [f"- [{result.title}]({page.name}.md#{result.name}): `{result.command}`" for result in own]
        parts += [f"## [{page.title}]({page.name}.md)", page.about, "\n".join(lines)]
    return joined(parts) + "\n"


def page_text(page: Page) -> str:
    """One page: its results in the order of the list."""
    own = [result for result in results().values() if result.page == page.name]
    return joined([NOTE, f"# {page.title}", page.about, *map(section, own)]) + "\n"


def section(result: Result) -> str:
    """One result: its command, what was recorded of it, where and when, and what it shows."""
    heading = f'## {result.title} <a id="{result.name}"></a>'
    command = fenced("console", f"$ {result.command}")
    recorded = recording(result.name)
    if recorded is None:
        return joined([heading, command, f"Not recorded yet: `python docs/record.py {result.name}` does it."])
    figures = "\n".join(f"![{result.title}]({name})" for name in recorded.figures)
    return joined([heading, command, provenance(recorded), sentence(result, recorded), body(recorded.result), figures])


def provenance(recorded: Recording) -> str:
    """Where and when a result was made, and how long it took."""
    machine = recorded.machine
    place = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    ended = f", exit code {recorded.exit}" if recorded.exit else ""
    used = ""
    if recorded.processor_seconds is not None and recorded.peak_mib is not None:
        used = f" ({duration(recorded.processor_seconds)} of processor time, at most {recorded.peak_mib:,} MiB)"
    return (
        f"*{duration(recorded.seconds)}{used}{ended}; {recorded.date}, commit {recorded.commit}, {place}, "
        f"torch {machine['torch']}; [JSON]({recorded.name}.json)*"
    )


def body(result: Mapping[str, Any]) -> str:
    """A result as Markdown, by its schema."""
    return RENDERERS[result["schema"]](result)


def evaluation(result: Mapping[str, Any]) -> str:
    """`spd eval` of a toy, of sparse features or of a language model."""
    if "parts" in result:
        return feature_results.evaluation(result)
    toy = result["target"] == "induction"
    return toy_results.evaluation(result) if toy else fact_results.evaluation(result)


def reproduction(result: Mapping[str, Any]) -> str:
    """`spd reproduce induction`, `facts`, `planted`, `tms` or `resid-mlp`."""
    if "recovery" in result:
        return planted_results.reproduction(result)
    if "recipes" in result:
        return feature_results.reproduction(result)
    return fact_results.reproduction(result) if "methods" in result else toy_results.reproduction(result)


RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "spd.train/1": toy_results.training,
    "spd.decompose/1": toy_results.decomposing,
    "spd.eval/1": evaluation,
    "spd.eval/2": evaluation,
    "spd.certify/1": evidence_results.certificate,
    "spd.svd/1": toy_results.ranks,
    "spd.reproduce/1": reproduction,
    "spd.variants/1": toy_results.variants,
    "spd.facts.drawn/1": fact_results.drawn_facts,
    "spd.inspect/1": fact_results.inspection,
    "spd.inspect/2": fact_results.inspection,
    "spd.facts.check/1": fact_results.known_facts,
    "spd.locate/1": fact_results.location,
    "spd.harvest/1": text_results.harvest,
    "spd.search/1": text_results.search,
    "spd.suppress/1": edit_results.suppression,
    "spd.trace/1": fact_results.tracing,
    "spd.report/1": fact_results.report,
    "spd.bench/1": cost_results.benchmark,
    "spd.plan/1": cost_results.cost,
    "spd.compare/1": cost_results.comparison,
    "spd.soak/1": soak_results.soak,
    "spd.walk/1": walk_results.walk,
}
