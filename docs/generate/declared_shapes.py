"""The shape of what each command prints with `--json`, read off the records in the sources: all of them, run or not.

A shape is a type; or a mapping of keys to shapes; or a list of one shape, for a list of such things; or a text that
stands for itself. A key ends in a question mark where it is left out when it does not apply.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from spdcli.records import SPREAD, Absent

WORDS = {int: "number", float: "number", str: "text", bool: "true or false", Path: "text", NoneType: "null", Any: "…"}
Keys = dict[str, Any]
Losses = dict[str, float]
RUN: Keys = {"run": Path}
FILES: Keys = {"saved": Path | None, "patch": Path | None}
TRACED: Keys = {"noise": float, "samples": int, "window": int}
KEPT: Keys = {"decomposition?": str, "checksum?": str}  # of what lies beside a run; older recordings have neither
RECIPE = "{the sections of a recipe}"


@cache
def outputs() -> dict[str, Keys]:
    """What every command prints, by the command, and by the kind of target or option where that decides."""
    return {**_learning(), **_looking(), **_changing(), **_costs(), **_files(), **_tests()}


def _learning() -> dict[str, Keys]:
    from spdcli.runs.watchdog import Alarm

    step: Keys = {"step": int, "losses": Losses, "total": float, "active": Losses, "gradients": Losses}
    signs: Keys = {"always_on?": Losses, "warnings?": [Alarm]}
    rates: Keys = {"rate": float, "p": float | None, "gamma?": float | None, "seconds": float}
    return {
        "spd train": _said(
            "train", RUN, {"loss": float, "accuracy": float | None, "error?": float | None, "steps": int}
        ),
        "spd decompose": _said("decompose", RUN, step, signs, rates),
        "spd import": _said("import", RUN, {"checkpoint": Path, "matrices": [str], "slices": int}),
        "spd export": _said("export", RUN, {"settings": {"<setting>": str}, "saved": Path}),
    }


def _looking() -> dict[str, Keys]:
    from spdcli.certification.certificate import Certificate
    from spdcli.certification.certify import Certifying
    from spdcli.explorer.exploration import TextMap
    from spdcli.explorer.features import FeatureMap
    from spdcli.location.locate import PromptSearch
    from spdcli.location.report import RunReport
    from spdcli.location.tracing import Trace
    from spdcli.measures.feature_evaluation import FeatureEvaluation
    from spdcli.measures.harvest_files import SliceInText
    from spdcli.measures.inspection import Heat, Inspection, Occurrence, SliceLabels
    from spdcli.measures.language_evaluation import LanguageEvaluation
    from spdcli.measures.slice_search import Match
    from spdcli.measures.svd import RankCurves
    from spdcli.measures.toy_evaluation import ToyEvaluation

    target, figures = {"target": str}, {"figures": [Path]}
    one_slice = keys_of(SliceInText) | keys_of(SliceLabels)
    nothing: Keys = {"token": None, "occurrences": [Occurrence], "heat": [Heat]}
    settings = {"settings": TRACED | {"random": int, "seed": int, "layers": int}}
    return {
        "spd eval, toy": _said("eval/2", RUN, target, keys_of(ToyEvaluation), KEPT),
        "spd eval, language model": _said("eval/2", RUN, target, keys_of(LanguageEvaluation), KEPT),
        "spd certify": _said("certify", RUN, keys_of(Certifying), keys_of(Certificate), KEPT),
        "spd eval, sparse features": _said("eval/2", RUN, target, keys_of(FeatureEvaluation), KEPT),
        "spd inspect": _said("inspect/2", RUN, keys_of(Inspection)),
        "spd explore": _said("explore/2", RUN, keys_of(TextMap)),
        "spd explore, sparse features": _said("explore.features", RUN, keys_of(FeatureMap)),
        "spd inspect --slice": _said("inspect/2", RUN, nothing, {"slices": [one_slice]}),
        "spd harvest": _said("harvest", RUN, {"tokens": int, "slices": [SliceInText]}),
        "spd search": _said("search", RUN, {"text": str, "matches": [Match]}),
        "spd graph": _said(
            "graph", RUN, {"prompt": str, "tokens": [str], "active": int, "nodes": int, "links": int, "saved": Path}
        ),
        "spd svd": _said("svd", RUN, keys_of(RankCurves), KEPT),
        "spd locate": _said("locate", RUN, keys_of(PromptSearch), {"located": [PromptSearch]}),
        "spd trace": _said("trace", {"model": str}, TRACED, {"seed": int, "layers": int, "prompts": [Trace]}, figures),
        "spd report": _said("report", RUN, settings, keys_of(RunReport), figures),
    }


def _changing() -> dict[str, Keys]:
    from spdcli.edits.ablation import AblationReport
    from spdcli.edits.edit_reports import PatchReport, SuppressionReport
    from spdcli.edits.expectations import ScriptReport
    from spdcli.edits.feature_ablation import FeatureAblation

    return {
        "spd suppress": _said("suppress", RUN, keys_of(SuppressionReport), FILES),
        "spd suppress --script": _said("suppress", RUN, keys_of(ScriptReport), FILES),
        "spd suppress --apply": _said("suppress", RUN, keys_of(PatchReport), FILES),
        "spd ablate": _said("suppress", RUN, keys_of(AblationReport), {"saved": None, "figures": [Path]}),
        "spd ablate, sparse features": _said("ablate.features", RUN, keys_of(FeatureAblation)),
    }


def _costs() -> dict[str, Keys]:
    from spdcli.comparison import SettingRun
    from spdcli.costs.bench import Measurement
    from spdcli.costs.doctor import Checkup
    from spdcli.costs.estimate import Estimate
    from spdcli.machine import Machine
    from spdcli.paper.drawn_facts import DrawnExperiment
    from spdcli.paper.fact_experiment import FactExperiment
    from spdcli.paper.induction_experiment import InductionExperiment
    from spdcli.paper.parts_experiment import PartsExperiment
    from spdcli.paper.planted_experiment import PlantedExperiment
    from spdcli.paper.toy_variants import ToyVariants

    measured = {f"{key.rstrip('?')}?": value for key, value in keys_of(Measurement).items()}
    case = {"way": str, "recipe": str, "settings": [str], "keep_freed": bool, "<label>?": int, "skipped?": str}
    bench = {"benchmark": str, "machine": Machine, "rows": [{"name": str} | measured | case], "ratios": Losses}
    compared = {"recipe": str, "settings": [str], "rows": [{"with": str} | keys_of(SettingRun)]}
    return {
        "spd reproduce induction": _said("reproduce", keys_of(InductionExperiment)),
        "spd reproduce variants": _said("variants", keys_of(ToyVariants)),
        "spd reproduce facts": _said("reproduce", keys_of(FactExperiment)),
        "spd reproduce drawn-facts": _said("facts.drawn", keys_of(DrawnExperiment)),
        "spd reproduce planted": _said("reproduce", keys_of(PlantedExperiment)),
        "spd reproduce tms": _said("reproduce", keys_of(PartsExperiment)),
        "spd reproduce resid-mlp": _said("reproduce", keys_of(PartsExperiment)),
        "spd plan": _said("plan", keys_of(Estimate)),
        "spd push": _said("push", RUN, {"place": str}),
        "spd doctor": _said("doctor", keys_of(Checkup)),
        "spd compare": _said("compare", compared),
        "spd compare, sparse features": _said("compare", compared),
        "spd bench": _said("bench", bench),
    }


def _files() -> dict[str, Keys]:
    from spdcli.edits.fact_check import FactCheck
    from spdcli.edits.facts_file import Fact, Known, Related
    from spdcli.errors import RecipeProblem

    listed = {"file": str, "models": [str], "known": Known, "facts": [Fact], "related": [Related]}
    checked = {
        "model": str,
        "file": str,
        "thresholds": Known,
        "known": int,
        "asked": int,
        "compared": int,
        "disagree": int,
    }
    problem = {name: one.annotation for name, one in inspect.signature(RecipeProblem, eval_str=True).parameters.items()}
    files = [{"file": str, "ok": bool, "problems": [problem], "recipe?": RECIPE}]
    return {
        "spd facts ls": _said("facts.ls", listed),
        "spd facts check": _said("facts.check", checked, {"facts": [FactCheck], "written": Path | None}),
        "spd recipe ls": _said("recipe.ls", {"recipes": [{"name": str, "about": str, "path": Path}]}),
        "spd recipe show": _said("recipe.show", {"path": Path, "recipe": RECIPE}),
        "spd recipe cp": _said("recipe.cp", {"source": Path, "path": Path}),
        "spd recipe check": _said("recipe.check", {"files": files}),
    }


def _tests() -> dict[str, Keys]:
    kind = {"kind": str, "tried": int, "failed": int, "seconds": float}
    step = {"command": str, "seconds": float, "processor_seconds": float, "exit": int, "last": str}
    return {
        "make soak": _said("soak", {"memory_gib": float, "hang_seconds": float, "kinds": [kind]}),
        "python -m walk.walk": _said("walk", {"steps": [step]}),
    }


def _said(schema: str, *parts: Keys) -> Keys:
    """The keys of an object by the name of its schema, whose number is 1 where the name has none."""
    keys: Keys = {"schema": f'"spd.{schema if "/" in schema else f"{schema}/1"}"'}
    for part in parts:
        keys |= part
    return keys


def keys_of(record: Any) -> Keys:
    """The keys of a record's JSON, as `spdcli.records.plain` writes it; those of a section of a file likewise."""
    kind = get_origin(record) or record
    if issubclass(kind, BaseModel):
        return {name: one.annotation for name, one in kind.model_fields.items()}
    stands_for = dict(zip(getattr(kind, "__parameters__", ()), get_args(record), strict=True))
    hints, keys = get_type_hints(kind), {}
    for one in fields(kind):
        hint = stands_for.get(hints[one.name], hints[one.name])
        if SPREAD in one.metadata:
            keys[one.metadata[SPREAD].format("<key>")] = get_args(hint)[1]
        else:
            keys[f"{one.name}?" if Absent in get_args(hint) else one.name] = hint
    return keys


def lines_of(shape: Any, indent: str = "") -> list[str]:
    """The lines that show a shape."""
    if isinstance(shape, str):
        return [shape]
    if isinstance(shape, Mapping):
        return nested({key: lines_of(value, f"{indent}  ") for key, value in shape.items()}, indent)
    if isinstance(shape, list):
        return listed(lines_of(shape[0], indent))
    if shape is None or shape in WORDS:
        return [WORDS[shape or NoneType]]
    kind, inner = get_origin(shape) or shape, get_args(shape)
    for matches, lines in HINTS:
        if matches(kind):
            return lines(shape, inner, indent)
    raise TypeError(f"{shape} has no shape in JSON")


def nested(entries: Mapping[str, list[str]], indent: str) -> list[str]:
    """The lines of an object, from those of its values."""
    lines = ["{"]
    for key, inner in entries.items():
        lines += [f"{indent}  {key}: {inner[0]}", *inner[1:]]
    return [*lines, f"{indent}}}"]


def listed(inner: list[str]) -> list[str]:
    """The lines of a list, from those of one of its items."""
    return [f"[{inner[0]}", *inner[1:-1], f"{inner[-1]}, …]"] if len(inner) > 1 else [f"[{inner[0]}, …]"]


def _union(shape: Any, inner: Sequence[Any], indent: str) -> list[str]:
    """One of several; what is absent was said by the key."""
    first, *others = [one for one in inner if one not in (Absent, NoneType)] + [NoneType] * (NoneType in inner)
    lines = lines_of(first, indent)
    for other in others:
        lines[-1] += f" or {lines_of(other, indent)[0]}"
    return lines


def _tuple(shape: Any, inner: Sequence[Any], indent: str) -> list[str]:
    if Ellipsis in inner:
        return listed(lines_of(inner[0], indent))
    return [f"[{', '.join(lines_of(one, indent)[0] for one in inner)}]"]


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind) or issubclass(kind, BaseModel)


HINTS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Sequence[Any], str], list[str]]], ...] = (
    (lambda kind: kind in (Union, UnionType), _union),
    (lambda kind: kind is Annotated, lambda shape, inner, indent: lines_of(inner[0], indent)),
    (lambda kind: kind is Literal, lambda shape, inner, indent: ["text"]),
    (lambda kind: isinstance(kind, TypeVar), lambda shape, inner, indent: ["…"]),
    (_is_record, lambda shape, inner, indent: lines_of(keys_of(shape), indent)),
    (lambda kind: issubclass(kind, tuple), _tuple),
    (lambda kind: issubclass(kind, Mapping), lambda shape, inner, indent: lines_of({"<key>": inner[1]}, indent)),
    (lambda kind: issubclass(kind, Sequence), lambda shape, inner, indent: listed(lines_of(inner[0], indent))),
)
