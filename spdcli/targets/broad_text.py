"""Broad text beside a run's few prompts: sampled from the target itself or read from a file, and its second moments.

It says what is usual in a matrix's input, so that a direction can be found that is special to a token, and it is the
text on which a targeted decomposition must not change. S sequences, T positions, I d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spdcli.engine.target import Batch, Target
from spdcli.errors import SpdError
from spdcli.recipe.schema import GENERATED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SEED = 30_000_001  # its own stream: never the text of training
SEQUENCES_AT_ONCE = 64  # that are sampled, or whose inputs are held, together


def draw_stream(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    seed: int,
    held_out: bool = False,
) -> Batch:
    """`sequences` of `length` tokens, all looked at: sampled from `model` where `source` is `generated`, else cut from
    the text file `source`. With `held_out` others than without: of a file what is left of it, at most as many.

    Raises SpdError for a file that cannot be read or is too short, and for a length that the model does not take.
    """
    if length > tokenizer.model_max_length:
        raise SpdError(f"data.stream_length = {length}, but the model takes {tokenizer.model_max_length} tokens")
    generator = torch.Generator().manual_seed(seed + HELD_OUT_SEED * (held_out and source == GENERATED))
    if source == GENERATED:
        tokens = sampled(model, tokenizer.all_special_ids, sequences, length, generator)
    else:
        tokens = cut(Path(source), tokenizer, sequences, length, generator, held_out)
    return Batch.everywhere(tokens)


@torch.no_grad()
def sampled(
    model: PreTrainedModel, special: Sequence[int], sequences: int, length: int, generator: torch.Generator
) -> Tensor:
    """Tokens `[S, T]` drawn from the model at temperature 1, on the CPU; no corpus is needed.

    A sequence begins with a token drawn uniformly, for variety. The ids in `special`, which are no text, never occur.
    """
    device = next(model.parameters()).device
    allowed = torch.ones(model.get_input_embeddings().weight.shape[0])  # [N]: 0 for a token that must not occur
    allowed[list(special)] = 0
    parts = []
    for start in range(0, sequences, SEQUENCES_AT_ONCE):
        count = min(SEQUENCES_AT_ONCE, sequences - start)
        columns = [torch.multinomial(allowed, count, replacement=True, generator=generator)]
        past = None
        while len(columns) < length:
            last = columns[-1][:, None].to(device)
            answer = model(input_ids=last, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            likely = answer.logits[:, -1].float().softmax(-1).cpu() * allowed
            columns.append(torch.multinomial(likely, 1, generator=generator)[:, 0])
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def cut(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    generator: torch.Generator,
    held_out: bool = False,
) -> Tensor:
    """Tokens `[S, T]` of windows of the text in `path` that do not overlap, chosen by the generator; with `held_out`
    the next ones that it would choose, at least one."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpdError(f"data.stream: {path}: cannot be read: {error}", "name a text file, or 'generated'") from error
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(tokens) // length
    if windows < sequences + held_out:
        raise SpdError(
            f"data.stream: {path} has {windows} windows of {length} tokens, not {sequences + held_out}",
            "lower data.stream_sequences or data.stream_length, or give a longer text",
        )
    numbers = torch.randperm(windows, generator=generator)[sequences * held_out :][:sequences]
    return torch.tensor(tokens[: windows * length]).view(windows, length)[numbers]


class _Enough(Exception):
    """Ends a forward pass early: all inputs that it is run for have been read."""


@torch.no_grad()
def matrix_inputs(target: Target, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """What the matrices `names` read in the target, `[S, T, I]` each; blocks after the last of them are not run."""
    inputs: dict[str, Tensor] = {}
    handles = []

    def enough(module: object, args: object) -> None:
        raise _Enough

    def keep(name: str) -> Callable[[object, tuple], None]:
        def hook(module: object, args: tuple) -> None:
            inputs[name] = args[0]

        return hook

    for name in names:
        handles.append(target.matrices[name].module.register_forward_pre_hook(keep(name)))
    after = max(target.matrices[name].block for name in names) + 1
    if after < len(target.blocks):
        handles.append(target.blocks[after].register_forward_pre_hook(enough))
    try:
        with suppress(_Enough):
            target.run(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def second_moments(target: Target, stream: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean of x xᵀ over what each matrix reads at the real positions of `stream`: `[I, I]`, float64, by matrix.

    Matrices that read the same input (gate and up, the parts of a fused matrix) share one tensor.
    """
    sums: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for start in range(0, len(stream.tokens), SEQUENCES_AT_ONCE):
        part = stream.select(torch.arange(start, min(start + SEQUENCES_AT_ONCE, len(stream.tokens))))
        inputs = matrix_inputs(target, part, names)
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
