"""The cases of every benchmark: a new one is a function that gives groups, and a row in the table at the end.

Importance functions, backends and losses are those of `engine.tables`. Nothing that takes time is imported, so that
the command line's help can be made from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from spdcli.costs.groups import Case, Group, Way
from spdcli.engine.part_tables import BACKENDS, IMPORTANCE_FUNCTIONS
from spdcli.engine.tables import LOSSES, losses_where

MAX_BATCH, LONG, LONG_BATCH = 64, 10240, 4  # Table 2: batch 64, and 4 at length 10240
CASE_SECONDS = 10.0  # that the measured steps of one case of Table 2 may take in all, if they are more than one
DEFAULT_TOKENS = 4096  # in a batch of Table 2, unless --batch says otherwise: what two cores do in a moment
RECONSTRUCTION = losses_where(lambda loss: loss.of_outputs and not loss.ascended)  # the paper's grid
ALL_LOSSES = tuple(f"losses.{name}=1" for name in RECONSTRUCTION)
EVERY = {6: "six"}.get(len(RECONSTRUCTION), str(len(RECONSTRUCTION)))  # how many losses the paper's grid has, in words
TOY = ("importance.kind=vector",)  # on induction.toml: 6 matrices, C 100, gate width 16, the losses of Table 4
SHARED = ("importance.kind=shared",)  # on gpt2.toml: 48 matrices, gate width 64, its six losses
PROBES = "losses.faithfulness_probes=32"
CHEAP = ("losses.layerwise_matrices=8", PROBES)


@dataclass(frozen=True)
class Options:
    """The command line's options of a benchmark: lengths and batch of `importance` (None: the defaults), device,
    patterns of names (an empty list: every case), and whether every loss is measured by itself."""

    lengths: Sequence[int] = (16, 64, 1024, LONG)
    batch: int | None = None
    device: str = "cpu"
    patterns: Sequence[str] = ()
    per_loss: bool = False


def batch_at(length: int, batch: int | None) -> int:
    """Sequences of a batch at `length`: few enough for DEFAULT_TOKENS, or `batch`, cut at LONG as in Table 2."""
    if batch is None:
        return max(1, min(MAX_BATCH, DEFAULT_TOKENS // length))
    return max(1, batch * LONG_BATCH // MAX_BATCH) if length >= LONG else batch


def kinds_and_backends() -> list[tuple[str, str]]:
    """The importance functions to time, one that attends by each of its backends."""
    backends = [name for name in BACKENDS if name != "auto"]
    return [
        (kind, backend)
        for kind, function in IMPORTANCE_FUNCTIONS.items()
        for backend in (backends if function.attends else ["auto"])
        if function.benchmarked
    ]


def importance_groups(options: Options) -> list[Group]:
    """Table 2: a decomposition step of the induction toy by kind of importance function and length."""
    from spdcli.engine.attention import DENSE_LENGTH

    groups = []
    for length in options.lengths:
        batch = batch_at(length, options.batch)
        shape = (f"target.length={length}", f"decompose.batch={batch}")
        labels = {"length": length, "batch": batch}
        cases = []
        for kind, backend in kinds_and_backends():
            if backend == "flex" and (options.device != "cuda" or length <= DENSE_LENGTH):
                continue  # no backward on the processor; for short sequences dense is what it would be measured against
            name = f"{kind} {backend}".removesuffix(" auto")
            relative = ("importance.relative=scalar",) if backend == "flex" else ()
            function = (f"importance.kind={kind}", f"importance.backend={backend}", *relative)
            large = backend == "dense" and length > DENSE_LENGTH  # grows with the square of the length
            cases.append(Case(f"{name}, length {length}", "induction", (*function, *shape), large=large, labels=labels))
        groups.append(Group(cases, seconds=CASE_SECONDS))
    return groups


def step_groups(options: Options) -> list[Group]:
    """A whole step: the plan pass against every variant by itself."""
    groups = [
        _ways("toy-256", "induction", (*TOY, "decompose.batch=256"), ("plan", "one by one", "plain")),
        _ways("toy-64", "induction", (*TOY, "decompose.batch=64"), ("plan", "one by one", "plain")),
        _ways(f"toy-256 all {EVERY}", "induction", (*TOY, *ALL_LOSSES, "decompose.batch=256"), ("plan", "one by one")),
        _ways("gpt2-C64", "gpt2", (*SHARED, "slices.C=64"), ("plan", "one by one"), cheap=True),
        _ways("gpt2-C768", "gpt2", (*SHARED, "slices.C=768"), ("plan", "one by one"), cheap=True),
    ]
    if not options.per_loss:
        return groups
    several = groups[2:]  # the toy with every loss, and GPT-2
    return [alone for group in several for loss in RECONSTRUCTION for alone in _of_one_loss(group, loss)]


def _ways(name: str, recipe: str, settings: tuple[str, ...], ways: Sequence[Way], cheap: bool = False) -> Group:
    cases = [Case(f"{name} {way}", recipe, settings, way, keep_freed=way != "plain") for way in ways]
    ratios = {f"{name} {way} / plan": (f"{name} {way}", f"{name} plan") for way in ways[1:]}
    if cheap:
        cases.append(Case(f"{name} plan, sampled", recipe, (*settings, *CHEAP)))
        ratios[f"{name} plan / sampled"] = (f"{name} plan", f"{name} plan, sampled")
    return Group(cases, ratios)


def _of_one_loss(group: Group, loss: str) -> list[Group]:
    """The group with one loss alone and no other term; none where its recipe does not use that loss."""
    from spdcli.recipe.reading import load_recipe

    recipe = load_recipe(group.cases[0].recipe, group.cases[0].settings).recipe
    if not recipe.losses.coefficients[loss]:
        return []
    others = tuple(f"losses.{name}=0" for name in LOSSES if name != loss)
    cases = [
        replace(case, name=f"{case.name}, {loss}", settings=(*(s for s in case.settings if s != PROBES), *others))
        for case in group.cases
        if "sampled" not in case.name or LOSSES[loss].scope == "each"
    ]
    names = {case.name for case in cases}
    ratios = {
        f"{name}, {loss}": (f"{above}, {loss}", f"{below}, {loss}")
        for name, (above, below) in group.ratios.items()
        if {f"{above}, {loss}", f"{below}, {loss}"} <= names
    }
    return [Group(cases, ratios)]


def scaling_groups(options: Options) -> list[Group]:
    """Time and memory against matrices, tokens and C, around a toy of 6 matrices, 16 x 64 tokens and C 50."""
    middle = {"target.layers": 2, "decompose.batch": 16, "slices.C": 50}
    runs = {"target.layers": (1, 2, 4, 8), "decompose.batch": (4, 16, 64), "slices.C": (25, 50, 100, 200)}
    words = {"target.layers": ("matrices", 3), "decompose.batch": ("tokens", 64), "slices.C": ("C", 1)}
    groups = []
    for key, values in runs.items():
        word, unit = words[key]
        cases = []
        for value in values:
            settings = tuple(f"{name}={size}" for name, size in (middle | {key: value}).items())
            labels = {words[name][0]: size * words[name][1] for name, size in (middle | {key: value}).items()}
            cases.append(Case(f"{word} {value * unit}", "induction", (*TOY, *settings), labels=labels))
        first, last = cases[0].name, cases[-1].name
        pair = f"{last} / {first}"
        groups.append(Group(cases, {f"{pair}, seconds": (last, first)}, {f"{pair}, peak": (last, first)}))
    return groups


def allocator_groups(options: Options) -> list[Group]:
    """The allocator's thresholds: the same step with freed memory kept, and with glibc's defaults."""
    groups = []
    for name, recipe, settings in (
        ("toy-64", "induction", (*TOY, "decompose.batch=64")),
        ("gpt2-C64", "gpt2", (*SHARED, "slices.C=64")),
    ):
        for way in ("plan", "plain") if recipe == "induction" else ("plan",):
            with_it, default = f"{name} {way}, freed memory kept", f"{name} {way}, glibc's defaults"
            cases = [Case(with_it, recipe, settings, way), Case(default, recipe, settings, way, keep_freed=False)]
            groups.append(Group(cases, {f"{name} {way}, defaults / kept": (default, with_it)}))
    return groups


def memory_groups(options: Options) -> list[Group]:
    """Attention importances at 2560, 5120 and 10240 positions: memory that grows linearly with the length."""
    cases, batch = [], batch_at(LONG, options.batch)
    for length in (LONG // 4, LONG // 2, LONG):
        shape = (f"target.length={length}", f"decompose.batch={batch}")
        settings = ("importance.kind=attention", "importance.backend=blocked", *shape)
        labels = {"length": length, "batch": batch}
        cases.append(Case(f"attention blocked, length {length}", "induction", settings, labels=labels))
    small, middle, large = (case.name for case in cases)
    growth = {"peak: growth from 5120 to 10240 / from 2560 to 5120": (small, middle, large)}
    return [Group(cases, {"length 10240 / 5120, seconds": (large, middle)}, growth=growth)]


def groups_of(what: str, options: Options) -> list[Group]:
    """The groups of benchmark `what`, cut to the cases whose names match one of the patterns."""
    groups = []
    for group in BENCHMARKS[what].groups(options):
        cases = [case for case in group.cases if _matches(case.name, options.patterns)]
        names = {case.name for case in cases}
        if cases:
            ratios = {name: pair for name, pair in group.ratios.items() if names.issuperset(pair)}
            memory = {name: pair for name, pair in group.memory.items() if names.issuperset(pair)}
            growth = {name: three for name, three in group.growth.items() if names.issuperset(three)}
            groups.append(replace(group, cases=cases, ratios=ratios, memory=memory, growth=growth))
    return groups


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, f"{pattern}*") for pattern in patterns)


class Benchmark(NamedTuple):
    """A benchmark: what it is about, in a few words, and the function that gives its groups."""

    about: str
    groups: Callable[[Options], list[Group]]


BENCHMARKS: dict[str, Benchmark] = {
    "importance": Benchmark("Table 2", importance_groups),
    "step": Benchmark("one plan against one by one", step_groups),
    "scaling": Benchmark("with matrices, tokens, C", scaling_groups),
    "allocator": Benchmark("with and without its thresholds", allocator_groups),
    "memory": Benchmark("attention at 5120 and 10240 positions", memory_groups),
}
