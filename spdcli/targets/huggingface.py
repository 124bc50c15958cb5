"""Causal language models of Hugging Face transformers as decomposition targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from spdcli.engine.target import Matrix, Target
from spdcli.errors import SpdError, UsageError
from spdcli.targets.architectures import RESIDUAL, Architecture, MatrixEntry, architecture_of
from spdcli.targets.model_files import ModelFiles, look_through, require_fit, staged
from spdcli.targets.prompts import EMBEDDED, token_text
from spdcli.targets.quiet import loading
from spdcli.targets.routes import Map, Route, back_through, columns_only, detached, final_scale, through, unchanged
from spdcli.targets.sources import resolve

TRUSTING_NOBODY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
LOCALLY: dict[str, Any] = TRUSTING_NOBODY | {"attn_implementation": "sdpa"}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen causal language model with its tokenizer; `source` is the directory it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    source: Path

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.architecture.base)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.base.get_submodule(self.architecture.blocks).children())

    @property
    def final_norm(self) -> nn.Module:
        return self.base.get_submodule(self.architecture.final_norm)

    @property
    def head_width(self) -> int:
        """The width K of one attention head."""
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def token_text(self, token: int) -> str:
        """A token as a reader would recognise it, its leading space included."""
        return token_text(self.tokenizer, token)


def load_model(model: str, dtype: str) -> LanguageModel:
    """Loads `model` (see `sources.resolve` for its four spellings), frozen and in evaluation mode.

    `dtype` names a torch floating type. Only what `model_files` names is read, and no code that came with the
    model runs. Attention is torch's own kernel ("sdpa"): transformers' eager attention rounds to
    float32 inside, so that float64 would not be exact. (The norms of the Llama family do so still.)
    Raises SpdError for a model that is absent, unsupported, quantised, incomplete or not finite.
    """
    files, architecture = _described(model)
    with loading(f"'{model}' cannot be loaded"), staged(files) as folder:
        _require_fit(files, architecture, folder)
        answer: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **LOCALLY
        )
        loaded, report = answer
        loaded.config.name_or_path = str(files.folder)
        language_model = _frozen(loaded, _tokenizer_in(folder, files), architecture, files)
    if report["missing_keys"]:
        raise SpdError(f"'{model}' lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    for name, weight in loaded.state_dict().items():
        if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise SpdError(f"'{model}': a number of '{name}' is not finite in {dtype}", "get the model again")
    return language_model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model` alone; SpdError as `load_model`."""
    files, _ = _described(model)
    with loading(f"'{model}' cannot be loaded"), staged(files) as folder:
        return _tokenizer_in(folder, files)


def _tokenizer_in(folder: Path, files: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer in the `folder` that `files` were staged in; it names their own, where other tools look again."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **TRUSTING_NOBODY)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(files.folder)
    return tokenizer


def load_untrained(model: str, dtype: str, device: torch.device) -> LanguageModel:
    """As `load_model`, but the weights are not read: they are random, or on torch's `meta` device shapes alone."""
    files, architecture = _described(model)
    with loading(f"'{model}' cannot be loaded"), staged(files) as folder:
        _require_fit(files, architecture, folder)
        with device:
            untrained = _untrained(folder, getattr(torch, dtype))
        return _frozen(untrained, _tokenizer_in(folder, files), architecture, files)


def _described(model: str) -> tuple[ModelFiles, Architecture]:
    """What the directory of `model` holds, and how its kind is built."""
    files = look_through(resolve(model))
    kind = files.config.get("model_type", "without a model_type")
    if files.config.get("quantization_config") is not None:
        raise SpdError(f"'{model}' is quantised; a decomposition needs plain weights", "give its full-precision model")
    return files, architecture_of(str(kind))


def _untrained(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, **TRUSTING_NOBODY)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)


def _require_fit(files: ModelFiles, architecture: Architecture, folder: Path) -> None:
    with torch.device("meta"):
        model = _untrained(folder, torch.float32)
    tensors = dict(model.named_buffers()) | model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_fit(files, shapes, architecture.base, architecture.blocks)


def _frozen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture, files: ModelFiles
) -> LanguageModel:
    # So that whoever holds only the tokenizer can tell which prompts are too long, or not of this model.
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    setattr(tokenizer, EMBEDDED, model.get_input_embeddings().weight.shape[0])
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, architecture, files.folder)


def build_target(language_model: LanguageModel, split_attention: bool) -> Target:
    """The engine's view of a language model, with every matrix of every block.

    A matrix is named by its path below the base model. `split_attention` makes three matrices of a
    fused `c_attn`, named `.q`, `.k` and `.v`; UsageError where there is none to split.
    """
    model, base = language_model.model, language_model.base
    if split_attention and not any(entry.parts for entry in language_model.architecture.matrices):
        raise UsageError(
            f"target.split_attention = true, but '{model.config.model_type}' keeps q, k and v apart already",
            "leave split_attention out",
        )
    fuse_activations(model)
    head = model.get_submodule(language_model.architecture.head)

    return Target(
        model=model,
        blocks=language_model.blocks,
        # No mask: padding comes last, and causal attention shows no real position what comes later.
        run=lambda tokens: base(input_ids=tokens, use_cache=False),
        finish=language_model.final_norm,
        unembedding=head.get_parameter("weight"),
        unembedding_bias=None if head.bias is None else head.get_parameter("bias"),
        embedding=base.get_submodule(language_model.architecture.embedding).get_parameter("weight"),
        matrices={matrix.name: matrix for matrix, _, _ in walk_matrices(language_model, split_attention)},
        parts=block_parts(language_model),
    )


def block_parts(language_model: LanguageModel) -> dict[str, list[nn.Module]]:
    """The modules of every block whose outputs are added to the residual stream, by kind."""
    paths = {"attention": language_model.architecture.attention, "mlp": language_model.architecture.mlp}
    return {kind: [block.get_submodule(path) for block in language_model.blocks] for kind, path in paths.items()}


def fuse_activations(model: nn.Module) -> None:
    """Put torch's own GELU where transformers writes the same formula out, an operation at a time (GPT-2)."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def walk_matrices(
    language_model: LanguageModel, split_attention: bool
) -> Iterator[tuple[Matrix, MatrixEntry, str | None]]:
    """Every matrix in the order of execution, with its table entry and, where it is one, its part."""
    architecture = language_model.architecture
    for index, block in enumerate(language_model.blocks):
        for entry in architecture.matrices:
            module = block.get_submodule(entry.module)
            name = f"{architecture.blocks}.{index}.{entry.module}"
            if not (split_attention and entry.parts):
                columns = (0, width_out(module, architecture.transposed))
                yield Matrix(name, module, index, columns, architecture.transposed), entry, None
                continue
            for part, columns in part_columns(entry, width_out(module, architecture.transposed)).items():
                yield Matrix(f"{name}.{part}", module, index, columns, architecture.transposed), entry, part


def width_out(module: nn.Module, transposed: bool) -> int:
    return module.get_parameter("weight").shape[0 if transposed else 1]


def part_columns(entry: MatrixEntry, d_out: int) -> dict[str, tuple[int, int]]:
    """The output columns `[start, stop)` of each part of a fused matrix."""
    width = d_out // len(entry.parts)
    return {part: (i * width, (i + 1) * width) for i, (part, _) in enumerate(entry.parts)}


def build_routes(language_model: LanguageModel, split_attention: bool) -> dict[str, Route]:
    """The route of every matrix that `build_target` names, for the labels of its slices."""
    end = final_scale(language_model.final_norm)
    routes = {}
    for matrix, entry, part in walk_matrices(language_model, split_attention):
        block = language_model.blocks[matrix.block]
        weights = block_weights(block, language_model.architecture)
        norm = block_norm(block, entry, language_model.architecture)
        into = unchanged if entry.reads is None else back_through(weights[entry.reads], language_model.head_width)
        writes = dict(entry.parts)[part] if part is not None else entry.writes
        out = outward(writes, weights, end, language_model.head_width)
        if part is None and entry.parts:
            out = fused_outward(entry, matrix.d_out, weights, end, language_model.head_width)
        routes[matrix.name] = Route(norm, into, out)
    return routes


def block_weights(block: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """Every weight of a block as `[I, O]`, parts of fused ones included, by path inside the block."""
    weights = {}
    for entry in architecture.matrices:
        weight = block.get_submodule(entry.module).get_parameter("weight").detach()
        weights[entry.module] = weight.t() if architecture.transposed else weight
        if entry.parts:
            for part, (start, stop) in part_columns(entry, weights[entry.module].shape[1]).items():
                weights[f"{entry.module}.{part}"] = weights[entry.module][:, start:stop]
    return weights


def block_norm(block: nn.Module, entry: MatrixEntry, architecture: Architecture) -> Map:
    """The norm between the residual stream and a matrix, or and the matrix that it reads."""
    if entry.norm is not None:
        return detached(block.get_submodule(entry.norm))
    assert entry.reads is not None, f"{entry.module} names neither a norm nor a matrix that it reads"
    source = next(other for other in architecture.matrices if entry.reads.startswith(other.module))
    return block_norm(block, source, architecture)


def outward(writes: str | None, weights: dict[str, Tensor], end: Map, head_width: int) -> Map | None:
    """The way of a matrix's output to the final residual stream; None where there is none."""
    if writes is None:
        return None
    if writes == RESIDUAL:
        return end
    return through(weights[writes], end, head_width)


def fused_outward(entry: MatrixEntry, d_out: int, weights: dict[str, Tensor], end: Map, head_width: int) -> Map | None:
    """The way out of a fused matrix: that of its one part which has a way out."""
    for part, writes in entry.parts:
        out = outward(writes, weights, end, head_width)
        if out is not None:
            return columns_only(out, part_columns(entry, d_out)[part])
    return None
