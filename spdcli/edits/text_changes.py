"""How far an edit moves a model on ordinary text: the KL at every token, and its tail.

Facts are a few prompts; what an edit does elsewhere is asked of a text that nobody chose. A published bound for edits of
weights is 1e-2 nats. N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.edits.choices import TEXT_MEASURES
from spdcli.edits.suppression import Edit, edit_variants
from spdcli.engine.forward import clean_pass, plan_pass, row_divergences
from spdcli.engine.masks import chunk_masks
from spdcli.engine.step import row_costs
from spdcli.engine.target import Batch, Target
from spdcli.engine.variants import chunks
from spdcli.targets.text_windows import Windows, in_order

TOKENS_AT_ONCE = 512  # whose distributions `[tokens, N]` are held together
PLAN_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class TextToKeep:
    """A text that an edit should leave alone: its `windows`, of which about `tokens` tokens are read."""

    windows: Windows
    tokens: int

    def parts(self) -> Iterable[Tensor]:
        """The tokens `[n, T]` that are read, some sequences at a time."""
        length = self.windows.read(torch.arange(1)).shape[1]
        return in_order(self.windows, -(-self.tokens // length), max(1, TOKENS_AT_ONCE // length))


@dataclass(frozen=True)
class TextChange:
    """KL(before ‖ after) of the next-token distribution, in nats, over `tokens` of a text, as `TEXT_MEASURES` has it."""

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
