"""What the explorer shows of a toy of sparse features, without a screen: inputs by matrices, and the toy's outputs.

The inputs are every feature alone, or one of the user's own. F features, B inputs, M matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spdcli.edits.ablation import Masking
from spdcli.edits.feature_ablation import outputs_without
from spdcli.edits.suppression import find_slices
from spdcli.engine.forward import clean_pass
from spdcli.errors import UsageError
from spdcli.explorer.exploration import OTHERS_OF, WAYS, Exploration, TextView
from spdcli.measures.inspection import ActiveSlices, SliceActivity
from spdcli.measures.texts import Texts
from spdcli.runs.loading import LoadedRun


@dataclass(frozen=True)
class OutputChange:
    """One output of a toy: `before` and `after`, and whether its feature is `on` in the input."""

    feature: int
    before: float
    after: float
    on: bool


@dataclass(frozen=True)
class OutputChanges:
    """The outputs for one `input` with and without the slices `off`, the largest of both first; `squared` is the mean
    squared change of all outputs."""

    way: str
    off: Sequence[str]
    input: str
    outputs: Sequence[OutputChange]
    squared: float


@dataclass(frozen=True)
class FeatureMap:
    """`spd.explore.features/1` but for the run's name: sums of importances on each of the `inputs`, by matrix, and the
    `output` for the one that is looked at."""

    inputs: Sequence[str]
    importance: Mapping[str, Sequence[float]]
    output: OutputChanges


class FeatureExploration(Exploration):
    """The inputs of a toy of sparse features, and what its slices do to the outputs.

    A view holds all features, each alone, or the one input that was typed: `pieces` are the inputs, `heat` is `[M, B]`
    and `position` the input that is looked at.
    """

    ways = {way: WAYS[way] for way in OTHERS_OF}  # noqa: RUF012  # a table, as its base's

    def slices(self, view: TextView, matrix: int, position: int) -> list[SliceActivity]:
        """The active slices of a matrix (a row of the view's heat) on an input, the most important first."""
        return self.active_at(view, matrix, (position, 0))

    @torch.no_grad()
    def outputs(self, view: TextView, off: Sequence[str] = (), way: str = "ablate") -> OutputChanges:
        """The outputs for the input that a view looks at, with the slices `off` (addresses) switched off in a `way` of
        its `ways`. UsageError for a slice that is not there."""
        if way not in self.ways:
            raise UsageError(f"{way!r}: expected one of {', '.join(self.ways)}")
        decomposition, row = self.run.decomposition, view.position
        addresses = find_slices(decomposition, off)
        masking, target = Masking(OTHERS_OF[way]), self.run.subject.target
        both = outputs_without(target, decomposition, view.clean, view.active.g, (addresses, ()), masking)
        before, after = (outputs[row] for outputs in both)
        order = torch.maximum(before.abs(), after.abs()).argsort(descending=True, stable=True).tolist()
        on = view.clean.batch.tokens[row, 0] != 0
        changes = [OutputChange(f, before[f].item(), after[f].item(), bool(on[f])) for f in order]
        squared = (after - before).square().mean().item()
        return OutputChanges(way, list(map(str, addresses)), view.pieces[row], changes, squared)

    def said(self, view: TextView, off: Sequence[str], way: str) -> OutputChanges:
        """The outputs for the input that a view looks at."""
        return self.outputs(view, off, way)

    def feature_map(self, view: TextView, off: Sequence[str] = ()) -> FeatureMap:
        """The map of a view, and the outputs for the input that it looks at without the slices `off`."""
        heat = dict(zip(view.matrices, view.heat.tolist(), strict=True))
        return FeatureMap(view.pieces, heat, self.outputs(view, off))

    def _view(
        self,
        texts: Texts,
        active: ActiveSlices,
        row: int,
        number: int | None,
        position: int,
        answer: int | None,
        note: str,
    ) -> TextView:
        """The view of all inputs that `texts` holds, which looks at that of a row."""
        own = texts is self.own
        return TextView(
            text=f"each of {len(texts.texts)} features alone" if own else texts.texts[row],
            number=number,
            pieces=[str(feature) for feature in range(len(texts.texts))] if own else texts.texts,
            matrices=list(active.g),
            heat=torch.stack([g[:, 0].sum(-1) for g in active.g.values()]).cpu(),
            position=row,
            answer=None,
            note=note,
            active=active,
            row=row,
            clean=clean_pass(self.run.subject.target, texts.batch.to(self.run.subject.target.device), ()),
        )


def exploration_of(run: LoadedRun, threshold: float = 0.0, labels: int = 6, seed: int | None = None) -> Exploration:
    """What is explored of a run: texts, or of a toy of sparse features its inputs."""
    kind = Exploration if run.subject.feature_toy is None else FeatureExploration
    return kind(run, threshold, labels, seed)
