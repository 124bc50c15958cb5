"""The report on a run's facts: where each is, what suppressing it does to everything else, and what leaks.

One table a fact, with one row an intervention and three things that it changes: the fact's own answer, the answers of
the run's other prompts, and the other facts that the model knows. Changes are after / before - 1 of P(answer); over
the known facts it is the median, mean and largest of their absolute values, with bootstrap intervals.

Causal tracing's rows are no edits of the weights: in the clean run, the piece at the best site is replaced by that of
the run with the corrupted subject (mean over draws). They say nothing about other prompts, whose pieces they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spdcli.edits.ablation import Cut, ablate_facts, measure_cuts, zeroed_mlp
from spdcli.edits.answer_changes import AnswerChanges, own_questions, present_answers
from spdcli.edits.facts_file import Facts
from spdcli.edits.known_facts import AskedFacts, facts_beside, known_mask
from spdcli.edits.prompts_and_answers import pick
from spdcli.edits.selection import activity_of
from spdcli.errors import UsageError
from spdcli.location.fact_edits import Scene, chosen_matrix, matrix_like
from spdcli.location.report_rows import ZeroedLayers, fact_entry
from spdcli.location.subject_prompts import subject_prompts
from spdcli.location.tracing import TraceSettings, trace_prompt
from spdcli.measures.texts import own_texts
from spdcli.recipe.schema import GENERATED, Data
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import Subject
from spdcli.targets.broad_text import draw_stream, second_moments
from spdcli.targets.prompts import encode

HALVED = 0.5  # of another prompt's answer: a layer that costs more destroys the model
Tell = Callable[[str], object]


@dataclass(frozen=True)
class ReportSettings:
    """`trace` as for `spd trace`; `random` directions as a control; the matrix (None: see `chosen_matrix`)."""

    trace: TraceSettings
    random: int = 3
    matrix: str | None = None
    seed: int = 0


def make_report(
    loaded: LoadedRun, facts: Facts, subjects: Sequence[str], settings: ReportSettings, tell: Tell
) -> dict[str, Any]:
    """What `spd.report/1` says of a run, without its name and its figures; `tell` hears what is being measured."""
    subject, recipe = loaded.subject, loaded.recipe
    if subject.prompts is None or recipe.data is None:
        raise UsageError("a report is about facts, and the induction toy knows none", "spd eval explains the toy")
    begin = recipe.data.begin_token
    prompts = encode(subject.prompts.tokenizer, recipe.data.prompts, "held_out", begin)
    about = subject_prompts(prompts, subjects, facts.subjects())
    matrix = chosen_matrix(subject.target, loaded.decomposition.names, settings.matrix)
    tell("which facts the model knows")
    known = known_facts(subject, facts, recipe.data)
    traces = []
    for prompt in about:
        tell(f"causal tracing: {prompt.text}")
        traces.append(trace_prompt(subject.target, prompt, settings.trace))
    seconds = [matrix_like(subject.target, matrix, one.best_site("mlp", "subject").layer) for one in traces]
    tell("what is usual in broad text")
    scene = open_scene(loaded, matrix, seconds, settings)
    tell("MLP layers zeroed, one after the other")
    zeroed = zeroed_layers(loaded, scene, known)
    entries = []
    for row, prompt in enumerate(about):
        tell(f"edits: {prompt.text}")
        told: dict[str, Any] = {"prompt": prompt.text, "answer": prompt.answer_text}
        told |= {"tokens": list(prompt.pieces), "subject": list(prompt.subject)}
        told |= {"trace": traces[row], "second_matrix": seconds[row]}
        entries.append(told | fact_entry(scene, row, told, known, zeroed, facts, begin))
    count = {"asked": len(facts.without(recipe.data.prompts)), "known": len(known.questions.texts) if known else 0}
    return {"matrix": matrix, "facts": count, "mlp_zeroed": zeroed.prompts, "prompts": entries}


def known_facts(subject: Subject, facts: Facts, data: Data) -> AskedFacts | None:
    """The facts beside the run's prompts that the unchanged model knows."""
    beside, _ = facts_beside(subject, facts, data.prompts, data.begin_token)
    if beside is None:
        return None
    now = present_answers(subject.target, beside.questions)
    rows = known_mask(now["p"], now["rank"], beside.known).nonzero()[:, 0].tolist()
    return replace(beside, questions=pick(beside.questions, rows)) if rows else None


def open_scene(loaded: LoadedRun, matrix: str, seconds: Sequence[str], settings: ReportSettings) -> Scene:
    """What all facts share; broad text is the recipe's, or sampled from the target where it names none."""
    subject, recipe = loaded.subject, loaded.recipe
    assert subject.prompts is not None
    assert recipe.data is not None
    if subject.stream is not None:
        stream = subject.stream()
    else:
        shape = (recipe.data.stream_sequences, recipe.data.stream_length)
        model: Any = subject.target.model
        stream = draw_stream(GENERATED, model, subject.prompts.tokenizer, *shape, settings.seed)
        stream = stream.to(subject.target.device)
    return Scene(
        target=subject.target,
        decomposition=loaded.decomposition,
        activity=activity_of(subject, loaded.decomposition, own_texts(subject, settings.seed)),
        questions=own_questions(subject, 0, settings.seed),
        tokenizer=subject.prompts.tokenizer,
        matrix=matrix,
        moments=second_moments(subject.target, stream, list(dict.fromkeys([matrix, *seconds]))),
        ridge=recipe.slices.ridge,
        random=settings.random,
        seed=settings.seed,
    )


def zeroed_layers(loaded: LoadedRun, scene: Scene, known: AskedFacts | None) -> ZeroedLayers:
    """Every MLP layer on the prompts; layer 0, and each prompt's most needed other one, on the known facts too."""
    every = [zeroed_mlp(scene.target, layer) for layer in range(len(scene.target.blocks))]
    run = (loaded.subject, loaded.decomposition)
    cuts: dict[str, Cut] = {one.label: ((), [one]) for one in every}
    alone = measure_cuts(*run, scene.questions, cuts, others="on", samples=1, seed=0)
    needed = [most_needed(row, list(alone.values())) for row in range(len(scene.questions.texts))]
    if known is None:
        return ZeroedLayers(alone, {}, needed)
    asked = sorted({0, *needed})
    return ZeroedLayers(alone, {n: ablate_facts(*run, known.questions, ((), [every[n]])) for n in asked}, needed)


def most_needed(row: int, by_layer: Sequence[AnswerChanges]) -> int:
    """The layer other than 0 that lowers the answer of prompt `row` most, without halving that of another prompt.

    A layer that does destroys the model and tells no fact's place, as layer 0 does; where all are so, all count.
    """
    later = range(1, len(by_layer))

    def spares(layer: int) -> bool:
        return all(effect.ratio > HALVED for other, effect in enumerate(by_layer[layer]) if other != row)

    fair = [layer for layer in later if spares(layer)] or later
    return min(fair, key=lambda layer: by_layer[layer][row].ratio, default=0)
