"""A decomposition in Python's hands: what the commands do with a run, as methods that print nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from spdcli.errors import UsageError
from spdcli.measures.evaluation import evaluate
from spdcli.measures.importances import Ids, importances, text_ids
from spdcli.measures.inspection import Inspection, Query, inspect_texts
from spdcli.measures.language_evaluation import LanguageEvaluation
from spdcli.measures.svd import RankCurves, svd_curves
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.progress import Report, silent
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

    def evaluate(
        self, sequences: int = 8192, *, threshold: float = 0.0, seed: int | None = None
    ) -> ToyEvaluation | LanguageEvaluation:
        """What the decomposition is worth, as `spd eval`: active and unique slices, reconstruction, attention, circuit.

        A toy is measured on `sequences` fresh sequences, a language model on its prompts; a slice is active where its
        importance is above `threshold`.
        """
        return evaluate(self.subject, self.decomposition, sequences, threshold, self.seed_or(seed))

    def inspect(
        self,
        token: str | None = None,
        *,
        prompts: Sequence[str] = (),
        matrices: Sequence[str] = ("*",),
        top: int = 20,
        labels: int = 5,
        threshold: float = 0.0,
        progress: Report = silent,
    ) -> Inspection:
        """The slices that are active at a token (None: everywhere), as `spd inspect`: what they read and promote.

        On the run's own prompts, or on `prompts`, fed whole. Of `matrices` (names or patterns) the `top` slices at each
        place, each with so many `labels`. UsageError for a token that is nowhere.
        """
        query = Query(token, list(matrices), top, labels, threshold)
        seed = self.recipe.seed
        return inspect_texts(self.subject, self.decomposition, query, prompts, self.begin_token, seed, progress)

    def svd(self, tolerance: float = 1e-3, *, sequences: int = 512, progress: Report = silent) -> RankCurves:
        """How small a model says the same, as `spd svd`: KL (nats) against rank, beside greedy SVD (Figure 2).

        `result` is what each method has left where its KL first exceeds `tolerance`.
        """
        return svd_curves(
            self.subject,
            self.decomposition,
            tolerance=tolerance,
            sequences=sequences,
            seed=self.recipe.seed,
            report=progress,
        )
