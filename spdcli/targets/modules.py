"""Any module of your own as a target: one function says where its blocks, its matrices and its two ends are.

Letters: B sequences, T positions, D width of the residual stream, I d_in, O d_out, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.product import MaskedRows
from spdcli.engine.rows import hidden_of
from spdcli.engine.subcomponents import Slices, SliceSet
from spdcli.engine.target import Batch, Matrix, Target, log_probabilities
from spdcli.errors import UsageError

TRIED = (2, 5)  # sequences and positions of the random tokens that a new target is tried on
ROUNDING = 1e3  # how many times a dtype's precision log-probabilities may be apart

ModuleOrPath = nn.Module | str


def module_target(
    module: nn.Module,
    *,
    blocks: Sequence[ModuleOrPath],
    matrices: Mapping[str, ModuleOrPath],
    unembedding: ModuleOrPath,
    final_norm: ModuleOrPath | None = None,
    embedding: ModuleOrPath | None = None,
    run: Callable[[Tensor], object] | None = None,
) -> Target:
    """A target made of `module`, which is frozen and otherwise left as it is.

    Modules are given as such or by their path in `module`.

    - `blocks` are called one after the other; each takes the residual stream `[B, T, D]` as its first argument and
      returns it, alone or first in a tuple.
    - `matrices` names the weights that can be decomposed, in the order of execution: modules inside a block that
      compute `x @ W + b` on their only argument, with a `weight` `[O, I]` (nn.Linear) or `[I, O]` (GPT-2's Conv1D).
    - `unembedding` has a `weight` `[N, D]`, and a `bias` or none; `final_norm` comes before it.
    - `embedding` has a `weight` `[N, D]`; the unembedding's stands in for it, in labels alone.
    - `run(tokens)` calls the whole module on token ids `[B, T]`: `module(tokens)` if not given.

    Everything is tried once on random tokens: UsageError where a block is not called so, where a replaced matrix does
    not answer as its module does, or where the engine's next-token log-probabilities are not those of `module`, by more
    than rounding (only if `module` returns logits `[B, T, N]`, alone, first, or as `.logits`).
    """
    _check_kinds(module, blocks, matrices)
    chosen = [_submodule(module, block) for block in blocks]
    head = _submodule(module, unembedding)
    start = head if embedding is None else _submodule(module, embedding)
    weights = [getattr(part, "weight", None) for part in (head, start)]
    shapes = [tuple(weight.shape) for weight in weights if isinstance(weight, Tensor)]
    if len(shapes) < 2 or shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise UsageError(f"the unembedding and the embedding have weights of shape {shapes}", "expected [N, D] of both")
    target = Target(
        model=module.eval().requires_grad_(False),
        blocks=chosen,
        run=run or module,
        finish=nn.Identity() if final_norm is None else _submodule(module, final_norm),
        unembedding=head.get_parameter("weight"),
        unembedding_bias=getattr(head, "bias", None),
        embedding=start.get_parameter("weight"),
        matrices={name: _matrix(name, _submodule(module, place), chosen) for name, place in matrices.items()},
    )
    _try_blocks(target)
    _try_matrices(target)
    return target


def _check_kinds(module: object, blocks: object, matrices: object) -> None:
    """UsageError for arguments of another kind than `module_target` describes."""
    if not isinstance(module, nn.Module):
        raise UsageError(f"the module is a {type(module).__name__}", "give a torch.nn.Module")
    if isinstance(blocks, str) or not isinstance(blocks, Sequence | nn.ModuleList) or not len(blocks):
        raise UsageError("blocks= is no list of modules or of their paths", "as in ['layers.0', 'layers.1']")
    if not isinstance(matrices, Mapping) or not matrices or len(set(matrices.values())) < len(matrices):
        raise UsageError("matrices= does not name each matrix once", "give a dict, as in {'up0': 'layers.0.up'}")


def _submodule(module: nn.Module, place: ModuleOrPath) -> nn.Module:
    if isinstance(place, nn.Module):
        return place
    try:
        return module.get_submodule(place)
    except AttributeError as error:
        near = ", ".join(name for name, _ in module.named_children())
        raise UsageError(f"the module has no part {place!r}", f"its parts are {near}") from error


def _matrix(name: str, module: nn.Module, blocks: Sequence[nn.Module]) -> Matrix:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UsageError(f"matrix {name}: its module has no weight of two dimensions")
    block = next((number for number, block in enumerate(blocks) if module in set(block.modules())), None)
    if block is None:
        raise UsageError(f"matrix {name}: its module lies in none of the blocks")
    transposed = isinstance(module, nn.Linear)
    return Matrix(name, module, block, (0, weight.shape[0 if transposed else 1]), transposed)


@torch.no_grad()
def _try_blocks(target: Target) -> None:
    """UsageError unless the blocks are called once each, in order, and lead to the module's own answer."""
    calls: list[int] = []

    def note(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls.append(number)
            shapes = [tensor.shape if isinstance(tensor, Tensor) else None for tensor in (*args[:1], hidden_of(output))]
            if len(shapes) < 2 or None in shapes or shapes[0] != shapes[1]:
                raise UsageError(f"block {number} does not take the residual stream first and return it")

        return hook

    handles = [block.register_forward_hook(note(number)) for number, block in enumerate(target.blocks)]
    try:
        output = target.run(_random_tokens(target))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the module cannot be called with token ids {TRIED}: {reason}", "run= says how it is called"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if calls != list(range(len(target.blocks))):
        raise UsageError(f"blocks are called in the order {calls}", "list every block once, in the order of execution")
    answer = _logits_in(output)
    if answer is not None and answer.shape[-1] == len(target.unembedding):
        own = clean_pass(target, Batch.everywhere(_random_tokens(target)), ()).log_probs
        wanted = log_probabilities(answer.flatten(0, 1))
        _agree(target, own, wanted, "the blocks, the final norm and the unembedding give")


def _logits_in(output: Any) -> Tensor | None:
    """The logits `[B, T, N]` in what a module returns; None where it returns something else."""
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


@torch.no_grad()
def _try_matrices(target: Target) -> None:
    """UsageError unless every matrix, replaced by slices with the delta fully on, answers as its module does."""
    clean = clean_pass(target, Batch.everywhere(_random_tokens(target)), target.matrices)
    if [name for name in clean.inputs if name in target.matrices] != list(target.matrices):
        ran = ", ".join(clean.inputs)
        raise UsageError("matrices= are not in the order of execution, each once", f"they run in the order {ran}")
    rows = torch.arange(TRIED[0], device=target.device)
    for name, matrix in target.matrices.items():
        if clean.inputs[name].shape[-1] != matrix.d_in:
            raise UsageError(f"matrix {name}: its module is not called with [B, T, {matrix.d_in}]")
        nothing = Slices(matrix.weight.new_zeros(matrix.d_in, 1), matrix.weight.new_zeros(1, matrix.d_out))
        mask = matrix.weight.new_zeros(TRIED[0], 1, 1)
        whole = {name: MaskedRows(rows, mask, torch.ones_like(mask))}
        logits = masked_logits(target, SliceSet({name: nothing}, delta=True), clean, whole)
        _agree(target, log_probabilities(logits), clean.log_probs, f"matrix {name} as x W + b gives")


def _agree(target: Target, own: Tensor, wanted: Tensor, what: str) -> None:
    apart = (own - wanted).abs().max().item()
    if not apart <= ROUNDING * torch.finfo(target.unembedding.dtype).eps:
        raise UsageError(f"{what} log-probabilities that are {apart:.2g} nats from the module's own")


def _random_tokens(target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(target.unembedding), TRIED, generator=generator).to(target.device)


class NumberTokenizer:
    """Tokens that are written as their numbers: `3 17 4`. What prompts of a module without a tokenizer are read by."""

    bos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.model_max_length = vocabulary, length

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        ids = []
        for word in text.split():
            if not (word.isdecimal() and int(word) < self.vocabulary):
                raise UsageError(f"no token {word!r}", f"tokens are the numbers 0 to {self.vocabulary - 1}")
            ids.append(int(word))
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token) if token < self.vocabulary else ""

    def decode(self, tokens: Sequence[int], **options: object) -> str:
        return "".join(f" {token}" for token in tokens)
