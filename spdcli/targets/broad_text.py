"""Broad text: sampled from the target itself, and the second moments of what matrices read on any.

These say what is usual in a matrix's input, so that a direction can be found that is special to a token.
S sequences, T positions, I d_in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.engine.forward import clean_pass
from spdcli.engine.target import Batch, Target
from spdcli.errors import SpdError
from spdcli.files import load_tensors, save_tensors
from spdcli.progress import Progress, Report, silent
from spdcli.targets.text_windows import KeptText, TextSplit
from spdcli.targets.user_cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SEED = 30_000_001  # its own stream: never the text of training
TOKENS = "tokens.safetensors"
SEQUENCES_AT_ONCE = 64  # that are sampled, or whose inputs are held, together


def generated_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    held_out: int,
    length: int,
    seed: int,
    kept: bool = False,
    report: Report = silent,
) -> TextSplit:
    """So many `sequences` of `length` tokens to train on, sampled from `model` when they are first read, and so many
    others that are `held_out`; with `kept` they stay in the user's cache. `report` hears how far the sampling is."""

    def part(count: int, seed: int) -> KeptText:
        def sample() -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return sampled(model, tokenizer.all_special_ids, count, length, generator, report)

        def read() -> Tensor:
            name = f"{_fingerprint(model)}-{seed}-{count}-{length}"
            place = cached("generated", name, lambda folder: save_tensors(folder / TOKENS, {"tokens": sample()}))
            return load_tensors(place / TOKENS)[0]["tokens"]

        return KeptText(read if kept else sample, count)

    return TextSplit(part(sequences, seed), part(held_out, seed + HELD_OUT_SEED))


def _fingerprint(model: PreTrainedModel) -> str:
    """Hexadecimal digits that stand for the model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_length(length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """SpdError for sequences that are longer than the model takes."""
    if length > tokenizer.model_max_length:
        raise SpdError(f"data.stream_length = {length}, but the model takes {tokenizer.model_max_length} tokens")


@torch.no_grad()
def sampled(
    model: PreTrainedModel,
    special: Sequence[int],
    sequences: int,
    length: int,
    generator: torch.Generator,
    report: Report = silent,
) -> Tensor:
    """Tokens `[S, T]` drawn from the model at temperature 1, on the CPU; no corpus is needed.

    A sequence begins with a token drawn uniformly, for variety. The ids in `special`, which are no text, never occur.
    """
    device = next(model.parameters()).device
    allowed = torch.ones(model.get_input_embeddings().weight.shape[0])  # [N]: 0 for a token that must not occur
    allowed[[token for token in special if token < len(allowed)]] = 0  # some are added to a tokenizer alone
    parts = []
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        count = min(SEQUENCES_AT_ONCE, sequences - start)
        columns = [torch.multinomial(allowed, count, replacement=True, generator=generator)]
        past = None
        while len(columns) < length:
            done = start * length + len(columns) * count
            report(Progress("tokens of text that the model writes", done, sequences * length))
            last = columns[-1][:, None].to(device)
            answer = model(input_ids=last, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            likely = answer.logits[:, -1].float().softmax(-1).cpu() * allowed
            columns.append(torch.multinomial(likely, 1, generator=generator)[:, 0])
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def second_moments(target: Target, stream: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean of x xᵀ over what each matrix reads at the real positions of `stream`: `[I, I]`, float64, by matrix.

    Matrices that read the same input (gate and up, the parts of a fused matrix) share one tensor.
    """
    sums: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for start in range(0, len(stream.tokens), SEQUENCES_AT_ONCE):
        part = stream.select(torch.arange(start, min(start + SEQUENCES_AT_ONCE, len(stream.tokens))))
        inputs = clean_pass(target, part, names, outputs=False).inputs
        for name in names:
            owner = owners.setdefault(name, next((o for o in sums if inputs[o] is inputs[name]), name))
            if owner != name:
                continue
            x = inputs[name][part.valid]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = (x.t() @ x).double() + sums.get(name, 0)
    count = int(stream.valid.sum())
    means = {name: total / count for name, total in sums.items()}
    return {name: means[owners[name]] for name in names}


def ridged(moment: Tensor, ridge: float) -> Tensor:
    """`moment` `[I, I]` with `ridge` times its mean eigenvalue added to every eigenvalue: safe to invert."""
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
