"""What the explorer shows, without a screen: where slices are active in a text, and what the model says without some.

T positions, M matrices, C slices of a matrix, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.edits.ablation import Masking, draw_masks, masked_answers, without
from spdcli.edits.answer_changes import divergence, predictions
from spdcli.edits.suppression import Address, by_matrix, edit_variants, find_slices, suppression
from spdcli.engine.forward import Clean, clean_pass
from spdcli.engine.tables import Choice
from spdcli.engine.target import Batch
from spdcli.errors import UsageError
from spdcli.measures.importances import warn_of_span
from spdcli.measures.inspection import ActiveSlices, Query, SliceActivity, with_labels
from spdcli.measures.texts import Texts, find_prompt, own_texts, user_texts
from spdcli.progress import Progress
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import require_tokens

if TYPE_CHECKING:
    from spdcli.explorer.features import OutputChanges

# What a slice that is switched off means.
WAYS: dict[str, Choice] = {
    "suppress": Choice("the weights lose its direction (suppress)"),
    "ablate": Choice("mask 0, others 1 (ablate)"),
    "importance": Choice("mask 0, others by importance"),
}
USUAL_WAY = "suppress"
OTHERS_OF = {"ablate": "on", "importance": "importance"}
MOST_SLICES = 200  # that are listed of one place
NEXT_TOKENS = 12


@dataclass(frozen=True)
class NextToken:
    """One candidate for the next token: its probability `before` and `after`, and whether it is the text's `answer`."""

    token: str
    before: float
    after: float
    answer: bool


@dataclass(frozen=True)
class NextTokens:
    """What a model says next, with and without the slices `off`: the likeliest tokens of both, the likeliest now first.

    `kl` is KL(before ‖ after) in nats.
    """

    way: str
    off: Sequence[str]
    tokens: Sequence[NextToken]
    kl: float


@dataclass(frozen=True)
class TextMap:
    """`spd.explore/2` but for the run's name: sums of importances at each of the `tokens`, by matrix, and the `next`
    token; `number` is that of the run's prompts, from 1, or None."""

    text: str
    number: int | None
    tokens: Sequence[str]
    importance: Mapping[str, Sequence[float]]
    next: NextTokens


@dataclass(frozen=True, eq=False)
class TextView:
    """One text of a run. `number` is that of the run's prompts, from 1; None for a text of the user's own.

    `heat` `[M, T]` are sums of importances, by the names in `matrices` and the tokens `pieces`. The next token is
    looked at after `position`; it should be `answer` (an id), where that is known. `note` is what one should know
    before believing the importances.
    """

    text: str
    number: int | None
    pieces: Sequence[str]
    matrices: Sequence[str]
    heat: Tensor
    position: int
    answer: int | None
    note: str
    active: ActiveSlices = field(repr=False)
    row: int = field(repr=False)
    clean: Clean = field(repr=False)


class Exploration:
    """The texts of a run, of a toy of sparse features every feature alone, and what its slices do in them.

    A slice is active where its importance is above `threshold`, and is labelled with so many tokens; `seed` draws the
    toy's own sequences. `ways` are what off may mean, the usual one first.
    """

    ways: Mapping[str, Choice] = WAYS

    def __init__(self, run: LoadedRun, threshold: float = 0.0, labels: int = 6, seed: int | None = None) -> None:
        self.run = run
        self.query = Query(None, top=MOST_SLICES, labels=labels, threshold=threshold)
        self.own: Texts = own_texts(run.subject, run.seed_or(seed))
        self.activity = self._activity(self.own)  # of the run's own texts

    def prompt(self, number: int) -> TextView:
        """The run's own prompt of a number, from 1; one more than the last is the first again."""
        row = (number - 1) % len(self.own.texts)
        prompts, batch = self.run.subject.prompts, self.own.batch
        at = int(batch.valid[row].sum()) - 1 if prompts is None else int(prompts.answer_at[row])
        answer = None if batch.answers is None else int(batch.answers[row])
        return self._view(self.own, self.activity, row, row + 1, at, answer, "")

    def chosen(self, prompt: int | str) -> TextView:
        """The run's prompt of a number, from 1, or a text that is fed whole; UsageError where there is none."""
        if isinstance(prompt, int):
            return self.prompt(find_prompt(self.own.texts, prompt) + 1)
        return self.typed(prompt)

    def typed(self, text: str) -> TextView:
        """A text of the user's own, fed whole. UsageError, or SpdError, for one that the target cannot take."""
        if not text.strip():
            raise UsageError("there is no text", "type one")
        shown = user_texts(self.run.subject, [text], self.run.begin_token)
        said: list[Progress] = []
        warn_of_span(self.run.decomposition, said.append)
        note = " ".join(one.text for one in said)
        return self._view(shown, self._activity(shown), 0, None, len(shown.pieces[0]) - 1, None, note)

    def slices(self, view: TextView, matrix: int, position: int) -> list[SliceActivity]:
        """The active slices of a matrix (a row of the view) at a position, the most important first, not labelled."""
        return self.active_at(view, matrix, (view.row, position))

    def active_at(self, view: TextView, matrix: int, place: tuple[int, int]) -> list[SliceActivity]:
        """The active slices of a matrix at a sequence and position of what the view was made of, not labelled."""
        name = view.matrices[matrix]
        one = replace(view.active, g={name: view.active.g[name]})
        return one.slices_at(place, self.query.top)

    def labelled(self, slices: Sequence[SliceActivity]) -> list[SliceActivity]:
        """The same with the tokens that each one reads and promotes."""
        return with_labels(slices, self.run.subject, self.run.decomposition, self.query.labels)

    @torch.no_grad()
    def next_tokens(
        self, view: TextView, off: Sequence[str] = (), way: str = USUAL_WAY, top: int = NEXT_TOKENS
    ) -> NextTokens:
        """What follows the text with the slices `off` (addresses) switched off in a `way` of WAYS.

        UsageError for a slice that is not there, or has no direction, and for a toy of sparse features.
        """
        require_tokens(self.run.subject)
        if way not in WAYS:
            raise UsageError(f"{way!r}: expected one of {', '.join(WAYS)}")
        addresses = find_slices(self.run.decomposition, off)
        suppressed = way == "suppress"
        before, after = self._suppressed(view, addresses) if suppressed else self._ablated(view, addresses, way)
        chosen = torch.cat([after[0].topk(min(top, after.shape[1])).indices, before[0].topk(1).indices])
        ids = list(dict.fromkeys([*chosen.tolist(), *([] if view.answer is None else [view.answer])]))
        name = self.run.subject.token_text
        p, q = before[0].exp(), after[0].exp()
        tokens = [NextToken(name(i), p[i].item(), q[i].item(), i == view.answer) for i in ids]
        return NextTokens(way, list(map(str, addresses)), tokens, divergence(before, after).item())

    def said(self, view: TextView, off: Sequence[str], way: str) -> NextTokens | OutputChanges:
        """What stands beside the map: the next tokens, or of a toy of sparse features its outputs."""
        return self.next_tokens(view, off, way)

    def text_map(self, view: TextView, off: Sequence[str] = ()) -> TextMap:
        """The map of a text, and what follows it without the slices `off`, suppressed."""
        heat = dict(zip(view.matrices, view.heat.tolist(), strict=True))
        return TextMap(view.text, view.number, view.pieces, heat, self.next_tokens(view, off))

    def _suppressed(self, view: TextView, addresses: Sequence[Address]) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[1, N]` of the target, and of the target without the slices' directions."""
        target, before = self.run.subject.target, view.clean.log_probs.double()
        if not addresses:
            return before, before
        edit = suppression(target, self.run.decomposition, addresses)
        slices, variants = edit_variants(target, {"": edit})
        ((_, _, after),) = predictions(target, slices, view.clean, variants)
        return before, after

    def _ablated(self, view: TextView, addresses: Sequence[Address], way: str) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[1, N]` of a masked model, and of it with the slices' masks at 0."""
        target, decomposition = self.run.subject.target, self.run.decomposition
        length = len(view.pieces)
        g = {name: values[view.row : view.row + 1, :length] for name, values in view.active.g.items()}
        masks = draw_masks(decomposition, g, 1, Masking(OTHERS_OF[way]))
        if way == "ablate" and decomposition.delta:  # matrices that lose nothing are the target's own, exactly
            masks = [{name: one[name] for name in by_matrix(addresses)} for one in masks]
            before = view.clean.log_probs.double()
        else:
            before = masked_answers(target, decomposition, view.clean, masks, ())
        if not addresses:
            return before, before
        cut = [without(one, addresses) for one in masks]
        return before, masked_answers(target, decomposition, view.clean, cut, ())

    def _activity(self, shown: Texts) -> ActiveSlices:
        own = self.own
        return ActiveSlices.on(self.run.subject, self.run.decomposition, own, shown, self.query)

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
        """The view of one row of `texts`, whose next token is looked at after `position`."""
        length = len(texts.pieces[row])
        tokens, valid = texts.batch.tokens[row : row + 1, :length], texts.batch.valid[row : row + 1, :length]
        looked = torch.zeros_like(valid)
        looked[:, position] = True
        batch = Batch(tokens, valid, looked).to(self.run.subject.target.device)
        heat = torch.stack([g[row, :length].sum(-1) for g in active.g.values()]).cpu()
        return TextView(
            text=texts.texts[row],
            number=number,
            pieces=texts.pieces[row],
            matrices=list(active.g),
            heat=heat,
            position=position,
            answer=answer,
            note=note,
            active=active,
            row=row,
            clean=clean_pass(self.run.subject.target, batch, ()),
        )
