"""Causal language models of Hugging Face transformers as decomposition targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from spdcli.engine.target import Matrix, Target
from spdcli.errors import SpdError, UsageError
from spdcli.targets.architectures import architecture_of
from spdcli.targets.block_layout import Architecture, MatrixEntry, head_counts, part_widths
from spdcli.targets.model_files import ModelFiles, look_through, require_fit, staged
from spdcli.targets.prompts import EMBEDDED, token_text
from spdcli.targets.quiet import loading
from spdcli.targets.self_check import require_agreement
from spdcli.targets.sources import resolve

TRUSTING_NOBODY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


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
    """Loads `model` (see `sources.resolve` for its five spellings), frozen and in evaluation mode.

    `dtype` names a torch floating type. Only what `model_files` names is read, and no code that came with the
    model runs. Attention is torch's own kernel where the family has it (GPT-Neo, GPT-J, BLOOM and Gemma 2
    have transformers' eager one alone, which rounds to float32 inside, so that float64 is not exact; the
    norms of the Llama family do so too).
    Raises SpdError for a model that is absent, unsupported, quantised, incomplete or not finite.
    """
    files, architecture = _described(model)
    with loading(f"'{model}' cannot be loaded"), staged(files) as folder:
        _require_fit(files, architecture, folder)
        answer: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=_attention(_config(folder)),
            use_safetensors=True,
            output_loading_info=True,
            **TRUSTING_NOBODY,
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
    config = _config(folder)
    chosen: dict[str, Any] = {"dtype": dtype, "attn_implementation": _attention(config), "trust_remote_code": False}
    return AutoModelForCausalLM.from_config(config, **chosen)


def _config(folder: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(folder, **TRUSTING_NOBODY)


def _attention(config: PretrainedConfig) -> str:
    """The attention kernel of models of this `config`: never one that the configuration itself may name."""
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


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
    # BLOOM has no longest prompt.
    longest = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    setattr(tokenizer, EMBEDDED, model.get_input_embeddings().weight.shape[0])
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, architecture, files.folder)


def build_target(language_model: LanguageModel, split_attention: bool) -> Target:
    """The engine's view of a language model, with every matrix of every block.

    A matrix is named by its path below the base model. `split_attention` makes a matrix of every part of a fused
    one, as of `c_attn` those named `.q`, `.k` and `.v`; UsageError where there is none to split. SpdError where the
    engine does not give the model's own predictions (see `self_check`).
    """
    model, base = language_model.model, language_model.base
    if split_attention and not any(entry.parts for entry in language_model.architecture.matrices):
        raise UsageError(
            f"target.split_attention = true, but '{model.config.model_type}' keeps q, k and v apart already",
            "leave split_attention out",
        )
    fuse_activations(model)
    architecture = language_model.architecture
    head = model.get_submodule(architecture.head)
    embedding = base.get_submodule(architecture.embedding).get_parameter("weight")
    if embedding.shape[1] != model.config.hidden_size:
        raise SpdError(
            f"this model's embeddings have {embedding.shape[1]} numbers and its hidden states "
            f"{model.config.hidden_size}: the projections between them are not supported"
        )
    target = Target(
        model=model,
        blocks=language_model.blocks,
        # No mask: padding comes last, and causal attention shows no real position what comes later.
        run=lambda tokens: base(input_ids=tokens, use_cache=False),
        finish=language_model.final_norm,
        unembedding=head.get_parameter("weight"),
        unembedding_bias=None if head.bias is None else head.get_parameter("bias"),
        embedding=embedding,
        matrices={matrix.name: matrix for matrix, _, _ in walk_matrices(language_model, split_attention)},
        parts=block_parts(language_model),
        logit_map=architecture.logit_map(model.config),
        embedding_scale=architecture.embedding_scale(model.config),
        by_head=architecture.by_head,
    )
    require_agreement(target, model.config.model_type)
    return target


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
            columns = (0, width_out(module, architecture.transposed))
            whole = Matrix(name, module, index, columns, architecture.transposed)
            if split_attention and entry.parts:
                for part, matrix in matrix_parts(whole, entry, language_model).items():
                    yield matrix, entry, part
            else:
                yield whole, entry, None


def width_out(module: nn.Module, transposed: bool) -> int:
    return module.get_parameter("weight").shape[0 if transposed else 1]


def matrix_parts(whole: Matrix, entry: MatrixEntry, language_model: LanguageModel) -> dict[str, Matrix]:
    """The parts of a fused matrix, by name, in column order."""
    heads, kv_heads = head_counts(language_model.model.config)
    groups = kv_heads if entry.interleaved else 1
    widths = part_widths(entry, whole.d_out, heads, kv_heads)
    stops = list(accumulate(width // groups for width in widths))
    return {
        part: replace(whole, name=f"{whole.name}.{part}", columns=(stop - width // groups, stop), groups=groups)
        for (part, _), width, stop in zip(entry.parts, widths, stops, strict=True)
    }
