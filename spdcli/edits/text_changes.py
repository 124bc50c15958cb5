"""How far an edit moves a model on ordinary text: the KL at every token, and its tail.

Facts are a few prompts; what an edit does elsewhere is asked of a text that nobody chose. N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.edits.choices import TEXT_MEASURES
from spdcli.edits.suppression import Edit, edit_variants
from spdcli.engine.forward import clean_pass, plan_pass, row_divergences
from spdcli.engine.masks import chunk_masks
from spdcli.engine.reconstruction import row_costs
from spdcli.engine.target import Batch, Target
from spdcli.engine.variants import chunks
from spdcli.errors import UsageError
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.schema import Recipe
from spdcli.runs.subject import Subject
from spdcli.runs.text_data import text_to_read
from spdcli.targets.text_windows import Windows, in_order

OWN_TEXT = "own"
TOKENS = 100_000
TOKENS_AT_ONCE = 512  # whose distributions `[tokens, N]` are held together
PLAN_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class TextToKeep:
    """A text that an edit should leave alone: its `windows`, of which about `tokens` tokens are read."""

    windows: Windows
    tokens: int

    def parts(self, report: Report = silent) -> Iterator[Tensor]:
        """The tokens `[n, T]` that are read, some sequences at a time; `report` hears how many are done."""
        length = self.windows.read(torch.arange(1)).shape[1]
        count, done = min(-(-self.tokens // length), len(self.windows)), 0
        for tokens in in_order(self.windows, count, max(1, TOKENS_AT_ONCE // length)):
            report(Progress("tokens of the text", done * length, count * length))
            yield tokens
            done += len(tokens)
        report(Progress("tokens of the text", done * length, count * length))


def text_to_keep(
    recipe: Recipe, subject: Subject, source: str, tokens: int = TOKENS, report: Report = silent
) -> TextToKeep:
    """The text `source`: a file, a directory, `.jsonl`, `.parquet`, `datasets:NAME`, or `own`, that part of the run's
    text that nothing is trained on. UsageError where the run has none, or is of no language model."""
    if source != OWN_TEXT:
        return TextToKeep(text_to_read(recipe, subject, source, "text", report), tokens)
    if subject.corpus is None:
        raise UsageError("the run has no text of its own (data.stream)", "--text FILE names a text that should stay")
    return TextToKeep(subject.corpus().held_out, tokens)


@dataclass(frozen=True)
class TextChange:
    """KL(before ‖ after) of next-token distributions, in nats, over `tokens` of a text, as `TEXT_MEASURES` has it."""

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float


@torch.no_grad()
def text_changes(target: Target, edits: Mapping[str, Edit], parts: Iterable[Tensor]) -> dict[str, TextChange]:
    """What each of the `edits`, by name, does at every position of the sequences `[n, T]` in `parts`.

    One clean pass a part for all edits; what is kept of a part is one number an edit and token.
    """
    slices, variants = edit_variants(target, edits)
    ordered = sorted(variants, key=lambda variant: variant.entry)
    divergences: dict[str, list[Tensor]] = {name: [] for name in edits}
    for tokens in parts:
        clean = clean_pass(target, Batch.everywhere(tokens).to(target.device), ())
        for chunk in chunks(ordered, len(tokens), row_costs(target, slices, tokens.shape[1]), PLAN_BYTES):
            hidden = plan_pass(target, slices, clean, chunk, chunk_masks(chunk, slices, {}))
            for piece, kl in zip(chunk, row_divergences(target, clean, chunk, hidden, False), strict=True):
                divergences[piece.variant.loss].append(kl.float().cpu())
    return {name: change_of(parts) for name, parts in divergences.items()}


def change_of(divergences: Sequence[Tensor]) -> TextChange:
    """The numbers of `TEXT_MEASURES` of the KLs at all tokens, given in parts."""
    kl = torch.cat(list(divergences)).double().clamp(min=0)
    return TextChange(len(kl), **{name: float(measure.of(kl)) for name, measure in TEXT_MEASURES.items()})
