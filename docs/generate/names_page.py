"""The Python references: for the site the directives that read docstrings, and above each a table of what they show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from generate.markdown import code, joined, table
from generate.recorded import ROOT

NOTE = "<!-- Generated from the docstrings by `make results`. -->"
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

PYTHON = {
    "What `import spdcli` offers. Names are looked up on first use, so that the import costs nothing.": (
        "spdcli.api",
        "spdcli.targets.modules.module_target",
        "spdcli.run.Run",
        "spdcli.progress",
        "spdcli.errors",
    ),
    "What its functions and methods return. `spdcli.records.plain` makes of each the JSON that the command prints.": (
        "spdcli.runs.training.TrainedToy",
        "spdcli.measures.evaluation_totals.Totals",
        "spdcli.measures.evaluation_totals.Evaluation",
        "spdcli.measures.toy_evaluation.ToyEvaluation",
        "spdcli.measures.language_evaluation.LanguageEvaluation",
        "spdcli.measures.feature_evaluation.FeatureEvaluation",
        "spdcli.measures.evidence.Evidence",
        "spdcli.measures.attacks.Attack",
        "spdcli.certification.certificate.Certificate",
        "spdcli.certification.certificate.CertificateRow",
        "spdcli.measures.inspection.Inspection",
        "spdcli.measures.inspection.Occurrence",
        "spdcli.measures.inspection.SliceActivity",
        "spdcli.explorer.exploration.Exploration",
        "spdcli.explorer.exploration.TextView",
        "spdcli.explorer.exploration.NextTokens",
        "spdcli.explorer.exploration.NextToken",
        "spdcli.explorer.features.FeatureExploration",
        "spdcli.explorer.features.OutputChanges",
        "spdcli.explorer.features.OutputChange",
        "spdcli.measures.harvest.Harvest",
        "spdcli.measures.slice_graph.SliceGraph",
        "spdcli.measures.slice_graph.GraphNode",
        "spdcli.measures.slice_graph.GraphLink",
        "spdcli.measures.svd.RankCurves",
        "spdcli.edits.exam.ChangeReport",
        "spdcli.edits.edit_reports.SuppressionReport",
        "spdcli.edits.ablation.AblationReport",
        "spdcli.edits.feature_ablation.FeatureAblation",
        "spdcli.edits.answer_changes.AnswerChange",
        "spdcli.edits.collateral.Collateral",
        "spdcli.edits.editing_scores.EditingScores",
        "spdcli.edits.editing_scores.PromptShare",
        "spdcli.location.locate.PromptSearch",
        "spdcli.location.tracing.Trace",
        "spdcli.location.report.RunReport",
        "spdcli.runs.directory.RunDirectory",
    ),
    "What its methods take as settings.": (
        "spdcli.certification.certify.Certifying",
        "spdcli.measures.evidence_choices.MaskSearch",
        "spdcli.location.locate.Search",
        "spdcli.location.tracing.TraceSettings",
        "spdcli.location.report.ReportSettings",
    ),
}
ENGINE = {
    "The method itself: plain functions over tensors that know no recipe, no file and no console.": (
        "spdcli.engine.part_tables",
        "spdcli.engine.tables",
        "spdcli.engine.loss_choices",
        "spdcli.engine.target",
        "spdcli.engine.subcomponents",
        "spdcli.engine.importance",
        "spdcli.engine.losses",
        "spdcli.engine.variants",
        "spdcli.engine.masks",
        "spdcli.engine.forward",
        "spdcli.engine.reconstruction",
        "spdcli.engine.step",
        "spdcli.engine.fit",
    ),
}


@dataclass(frozen=True)
class Name:
    """A function, a class or a method: its name, how it is called, and the first sentence that it says.

    A class's name is followed by those that it inherits from, whose fields it has too.
    """

    name: str
    signature: str
    about: str


def python_page() -> str:
    """The reference of the Python door."""
    return page("Python", PYTHON)


def engine_page() -> str:
    """The reference of the engine."""
    return page("Engine", ENGINE)


def page(title: str, parts: Mapping[str, Sequence[str]]) -> str:
    """A page of paragraphs, each with the places that it is about."""
    texts = [NOTE, f"# {title}"]
    for about, places in parts.items():
        texts.append(about)
        for place in places:
            rows = [[code(one.name), code(one.signature) if one.signature else "", one.about] for one in names(place)]
            heads = ["name", "signature", "what it is"]
            options = "\n    options:\n      inherited_members: true" if bases(place) else ""
            texts += [f"**{code(place)}**", table(heads, rows, words=3), f"::: {place}{options}"]
    return joined(texts) + "\n"


def names(place: str) -> list[Name]:
    """What a module or a class or function of one (by its dotted path) offers, in the order of the source.

    After a class's own methods come those of its bases in the same room, as its own.
    """
    module, name = source_of(place)
    nodes = [node for node in parsed(module).body if isinstance(node, FUNCTIONS | ast.ClassDef)]
    own = [one for node in nodes if name in ("", node.name) for one in of_node(node)]
    inherited = [one for base in bases(place) for one in names(base)[1:]]
    return own + [replace(one, name=f"{name}.{one.name.partition('.')[2]}") for one in inherited]


def bases(place: str) -> list[str]:
    """The dotted paths of what a class inherits from within its own room: to a reader it is one class with these."""
    module, name = source_of(place)
    room, body = place.rpartition(".")[0], parsed(module).body
    homes = {each.name: f"{one.module}" for one in body if isinstance(one, ast.ImportFrom) for each in one.names}
    classes = [one for one in body if isinstance(one, ast.ClassDef) and one.name == name]
    inherited = [ast.unparse(base) for one in classes for base in one.bases]
    return [f"{homes[base]}.{base}" for base in inherited if homes.get(base, "").startswith(f"{room}.")]


def source_of(place: str) -> tuple[Path, str]:
    """The file that a dotted path lies in, and the name in it: none for a module."""
    path = ROOT.joinpath(*place.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py"), ""
    room = path.parent / "__init__.py"
    return room if room.exists() else path.parent.with_suffix(".py"), path.name


@cache
def parsed(module: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(module.read_text(encoding="utf-8"))


def of_node(node: ast.stmt) -> Iterator[Name]:
    """A public function or class that says something, and a class's public methods."""
    if not isinstance(node, FUNCTIONS | ast.ClassDef) or node.name.startswith("_"):
        return
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        yield Name(f"{node.name}({bases})" if bases else node.name, class_signature(node), sentence(node))
    else:
        yield Name(node.name, call(node, node.args), sentence(node))
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, FUNCTIONS) and not method.name.startswith("_") and ast.get_docstring(method):
            yield Name(f"{node.name}.{method.name}", method_signature(method), sentence(method))


def call(node: ast.FunctionDef | ast.AsyncFunctionDef, arguments: ast.arguments) -> str:
    """What a function takes and gives."""
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    takes = ast.unparse(arguments).replace("=", " = ")  # every argument has its type
    return f"({takes}){gives}"


def method_signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """What a method takes besides its object, and gives; of a property what it holds."""
    decorators = {ast.unparse(one) for one in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return ast.unparse(node.returns) if node.returns else ""
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    if "staticmethod" not in decorators:
        (arguments.posonlyargs or arguments.args).pop(0)
    return call(node, arguments)


def class_signature(node: ast.ClassDef) -> str:
    """What a class is made of: its fields, or the arguments that it takes."""
    made = next((one for one in node.body if isinstance(one, FUNCTIONS) and one.name == "__init__"), None)
    if made is not None:
        return method_signature(made).removesuffix(" -> None")
    fields = [f"{one.target.id}: {ast.unparse(one.annotation)}" for one in node.body if is_field(one)]  # type: ignore[attr-defined]
    return f"({', '.join(fields)})" if fields else ""


def is_field(node: ast.stmt) -> bool:
    """Whether a line of a class declares one of its fields."""
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.unparse(node)


def sentence(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The first sentence of a docstring, in one line."""
    first = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!Eq)\. (?=[A-Z`])", first)[0].rstrip(".:") + "." * bool(first)
