"""A decomposition in Python's hands: what the commands do with a run, as methods that print nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from spdcli.errors import UsageError
from spdcli.measures.importances import Ids, importances, text_ids
from spdcli.runs.loading import LoadedRun
from spdcli.targets.masking import importance_masks_of, masked_module


class Run(LoadedRun):
    """A target taken apart: `recipe`, `subject` (target and data), `decomposition` (slices and importance functions).

    `directory` is None for a run that is kept in memory. Letters: B sequences, T positions, I d_in, O d_out,
    C slices of a matrix.
    """

    @property
    def model(self) -> nn.Module:
        """The target itself, an ordinary module: hooks of other tools work on it, and its weights never change."""
        return self.subject.target.model

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer; None for the toy."""
        return None if self.subject.prompts is None else self.subject.prompts.tokenizer

    @property
    def matrices(self) -> list[str]:
        """The names of the decomposed matrices, in the order of execution."""
        return self.decomposition.names

    def slices(self, matrix: str) -> tuple[Tensor, Tensor]:
        """`U` `[I, C]` and `V` `[C, O]` of one matrix: slice c reads `x @ U[:, c]` and writes along `V[c]`."""
        own = self.decomposition.of(matrix)
        return own.U.detach(), own.V.detach()

    def tokens(self, text: str) -> Tensor:
        """The token ids `[T]` of a text, fed whole (of the toy a text is such as `3 s 17 4 s`).

        A language model's begin-of-sequence token comes first where the recipe says so.
        """
        return text_ids(self.subject, text, self.begin_token).to(self.subject.target.device)

    def importances(self, text: str | Ids) -> dict[str, Tensor]:
        """The importance g of every slice, in [0, 1], by matrix: `[T, C]` for a text or ids `[T]`, `[B, T, C]` for
        ids `[B, T]`.

        Gates in the span of the prompts (`importance.basis = "span"`) see a projection of any other text.
        UsageError for a text that is longer than the run's importance attention.
        """
        return importances(self.subject, self.decomposition, text, self.begin_token)

    @contextmanager
    def masked(
        self, masks: Mapping[str, Tensor] | None = None, *, active: bool = False, delta: float = 0.0
    ) -> Iterator[nn.Module]:
        """While open, `run.model` answers with masked slices in the place of its matrices; afterwards it is as before.

        With `active` every decomposed matrix is made of its active slices alone: their masks are their importances on
        the tokens that the model is called with. Or `masks[m]` `[C]`, `[T, C]` or `[B, T, C]` for the matrices m that
        are to be replaced. `delta` multiplies `W - U V`, what no slice holds; with 1, masks of 1 are the target itself.
        """
        if active == (masks is not None):
            raise UsageError("a masked model needs masks, or active=True", "give one of the two")
        target, decomposition = self.subject.target, self.decomposition
        masks_of = importance_masks_of(target, decomposition) if masks is None else lambda batch: masks
        with masked_module(target, decomposition, masks_of, delta):
            yield self.model
