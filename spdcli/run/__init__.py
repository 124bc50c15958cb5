"""A decomposition in Python's hands: what the commands do with a run, as methods that print nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spdcli.edits.suppression import find_matrix
from spdcli.errors import UsageError
from spdcli.explorer.exploration import Exploration
from spdcli.explorer.features import exploration_of
from spdcli.files import save_tensors
from spdcli.location.report import RunReport
from spdcli.measures.importances import Ids, importances, text_ids
from spdcli.page.assemble import write_page
from spdcli.progress import Report, silent
from spdcli.run.editable import EditableRun
from spdcli.run.measurable import MeasurableRun
from spdcli.runs.directory import TOY, TOY_WEIGHTS, RunDirectory
from spdcli.runs.fingerprint import keep_fingerprint
from spdcli.runs.goodfire import export_run
from spdcli.runs.opening import opened_run
from spdcli.runs.sharing import push, write_shared
from spdcli.targets.masking import importance_masks_of, masked_module


class Run(MeasurableRun, EditableRun):
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
        own = self.decomposition.of(find_matrix(self.matrices, matrix, "the run decomposes"))
        return own.U.detach(), own.V.detach()

    def tokens(self, text: str) -> Tensor:
        """The token ids `[T]` of a text, fed whole (of the toy a text is such as `3 s 17 4 s`, of a module without a
        tokenizer such as `3 17 4`).

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
        if masks is not None and not (isinstance(masks, Mapping) and masks):
            raise UsageError("masks= names no matrix", f"give a dict, as in {{{self.matrices[0]!r}: mask}}")
        if not isinstance(delta, int | float):
            raise UsageError(f"delta={delta!r} is no number", "0 leaves slices alone, 1 is the target with masks of 1")
        target, decomposition = self.subject.target, self.decomposition
        masks_of = importance_masks_of(target, decomposition) if masks is None else lambda batch: masks
        with masked_module(target, decomposition, masks_of, delta):
            yield self.model

    def explore(self, threshold: float = 0.0, labels: int = 6) -> Exploration:
        """What `spd explore` shows, without a screen: `prompt(1)` or `typed(text)` is a text's map of importance,
        `slices` those of one of its cells, `next_tokens` what follows without some of them; `outputs`, of a toy of
        sparse features."""
        return exploration_of(self, threshold, labels)

    def save_page(self, folder: str | Path, facts: RunReport | None = None, *, progress: Report = silent) -> Path:
        """Write the run's page, as `spd report`, with its figures into `folder`: one file of HTML that needs nothing
        else. `facts` is what `report` gives, and without it the page says nothing of facts."""
        return write_page(self, Path(folder), facts, report=progress)[0]

    def save(self, path: str | Path, *, force: bool = False) -> RunDirectory:
        """Write a run that was kept in memory to a directory, for `load` and for the commands; it cannot go on there.

        UsageError for a directory that holds another run, unless `force` replaces it.
        """
        directory = RunDirectory(Path(path))
        with opened_run(directory, self.recipe, force):
            if self.subject.trained_toy is not None:
                save_tensors(directory / TOY / TOY_WEIGHTS, self.subject.trained_toy.state_dict())
            keep_fingerprint(directory.path, self.subject.target)
            directory.save_decomposition(self.decomposition)
        return directory

    def save_pretrained(self, path: str | Path, *, force: bool = False) -> None:
        """Write the run for others, with a model card: a directory that `load` and `from_pretrained` read."""
        write_shared(self, Path(path), force)

    def export(self, path: str | Path, *, force: bool = False) -> None:
        """Write the run as a checkpoint of goodfire-ai/spd, as `spd export`: torch.save's form, or `.safetensors`.

        UsageError for importance functions that its code does not have, and for a file that is there without `force`.
        """
        export_run(self, Path(path), force)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the run with a model card to OWNER/NAME on the Hugging Face hub; gives its address."""
        return push(self, repository, private)
