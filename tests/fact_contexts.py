"""Two prompts of a tiny language model as the context of fact edits, with slices that a test switches on by hand."""

from __future__ import annotations

import torch
from small_runs import MODEL
from twins import exact_norm

from spdcli.edits.facts_file import Fact, Facts, Known
from spdcli.paper.fact_table import open_table
from spdcli.recipe.reading import load_recipe
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject

UP, DOWN, GATE = "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.0.mlp.gate_proj"
SETTINGS = [
    "target.dtype='float64'",
    "slices.matrices=['layers.[01].mlp.*']",
    "slices.C=16",
    "slices.init=dual_whitened",
    "slices.delta=true",
    "data.stream=generated",
    "data.stream_sequences=16",
    "data.stream_length=5",
]
SUBJECTS = (" Bryant", " Woods")
FACTS = Facts(
    known=Known(probability=1e-7, rank=10_000),
    fact=[Fact(category="x", prompt=prompt) for prompt in ("Tiger plays the sport of golf", "the sport of the Bryant")],
)


def context_of(folder, tmp_path, *settings, facts=FACTS):
    """A context whose slices are untrained duals, active at their own token alone."""
    path = tmp_path / "small.toml"
    path.write_text(MODEL)
    recipe = load_recipe(path, [f"target.model={folder}", *SETTINGS, *settings]).recipe
    subject = language_subject(recipe, torch.device("cpu"))
    for module in subject.target.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = exact_norm(module)
    names = [name for name in subject.target.matrices if name.startswith(("layers.0.mlp", "layers.1.mlp"))]
    decomposition = start_decomposition(recipe, subject, names)
    context = open_table(subject, decomposition, facts, SUBJECTS, recipe.slices.ridge, 0)
    for values in context.activity.g.values():
        values.zero_()
    return context


def switch(context, name, index, *places, importance=1.0):
    for row, position in places:
        context.activity.g[name][row, position, index] = importance
