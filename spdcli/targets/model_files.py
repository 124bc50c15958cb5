"""What is read of a model's directory, which may come from anybody: the one place that names its files.

transformers opens what it finds: a pickle that an index names, an adapter's own base model, a kernel that a
configuration asks for. It is therefore given a folder of spd's own, in which only what stands here has a name.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from spdcli.disk import read_bytes, read_object, require_regular
from spdcli.errors import SpdError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ENDING = ".safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them there must be
TEXTS = (*TOKENIZERS, "merges.txt", "chat_template.jinja")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
LARGEST_TEXT = 2**28  # bytes
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# Settings by which a config.json would change how a model is run, or have other files opened, than was asked for.
NOT_OF_A_CONFIG = {
    "adapter_name",
    "attn_implementation",
    "auto_map",
    "distributed_config",
    "dtype",
    "experts_implementation",
    "extra_files",
    "fusion_config",
    "gguf_file",
    "kernel_config",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pruned_heads",
    "return_dict",
    "torch_dtype",
    "torchscript",
    "transformers_weights",
    "use_kernels",
    "use_return_dict",
}
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # how configurations call the number of blocks


class Header(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory, looked through: `config` is its config.json without what is not its own to say, `tensors`
    are those of its weights by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Header]

    @property
    def numbers(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(header.shape) for header in self.tensors.values())


def is_local(model: str) -> bool:
    """Whether a model's spelling means a place on this disk: a path, a file, or a directory that holds a model.

    One that merely is called like a model on the hub (where its results go, say) does not hide that one.
    """
    here = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    return here or Path(model).is_file() or (Path(model) / CONFIG).exists()


def look_through(folder: Path) -> ModelFiles:
    """What a model's directory holds, weights unread. SpdError, naming the file, where it is not what it should be."""
    config = read_config(folder)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise SpdError(f"'{folder}' holds no tokenizer, which is one of {', '.join(TOKENIZERS)}")
    tensors: dict[str, Header] = {}
    for file in weight_files(folder):
        for name, header in tensor_headers(file).items():
            if name in tensors:
                raise SpdError(f"{file}: holds '{name}', which {tensors[name].file.name} holds too")
            tensors[name] = header
    for key in BLOCKS:
        count = config.get(key, 1)
        if isinstance(count, int) and count > len(tensors):
            raise SpdError(f"{folder / CONFIG}: {key} = {count}, but the weights are {len(tensors)} tensors in all")
    return ModelFiles(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """A directory's config.json without what is not a model's own to say: how it is run, and from which files."""
    content = read_object(own_file(folder, CONFIG))
    return {key: value for key, value in content.items() if key not in NOT_OF_A_CONFIG and not key.startswith("_")}


def weight_files(folder: Path) -> list[Path]:
    """The files of a directory's weights: model.safetensors, or else those that its index names.

    SpdError where one is not there, ends in anything but .safetensors or lies elsewhere.
    """
    if (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        index = read_object(own_file(folder, INDEX)).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise SpdError(f"{folder / INDEX}: names no files of weights in a weight_map")
        names = sorted(set(index.values()))
    else:
        raise SpdError(f"'{folder}' holds neither {WEIGHTS} nor {INDEX}")
    for name in names:
        if not name.endswith(ENDING) or Path(name).name != name:
            raise SpdError(f"{folder / INDEX}: names '{name}'; only *{ENDING} beside it are read, never pickles")
        if not (folder / name).exists():
            raise SpdError(f"'{folder}' does not hold all of its *{ENDING} files: {name} is missing")
    return [own_file(folder, name) for name in names]


def own_file(folder: Path, name: str) -> Path:
    """The regular file `name` of a directory; SpdError where a link leads out of it.

    The hub's cache keeps a model's files beside the directory, in `blobs`, and only links in it.
    """
    path = folder / name
    require_regular(path)
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise SpdError(
            f"{path}: a link to {path.resolve()}, outside the model's directory", "put the file itself there"
        )
    return path


def tensor_headers(file: Path) -> dict[str, Header]:
    """What a safetensors file says of its tensors; their numbers are not read."""
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: Header(file, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SpdError(f"{file}: damaged: {error}", "get the model again") from error


@contextmanager
def staged(files: ModelFiles) -> Iterator[Path]:
    """A folder for transformers to load from, while open: the weights by name, the rest as it was checked."""
    with tempfile.TemporaryDirectory(prefix="spd-") as place:
        folder = Path(place)
        write = lambda name, content: (folder / name).write_text(json.dumps(content), encoding="utf-8")  # noqa: E731
        write(CONFIG, files.config)
        for file in {header.file for header in files.tensors.values()}:
            (folder / file.name).symlink_to(file.resolve())
        if not (folder / WEIGHTS).exists():
            write(INDEX, {"metadata": {}, "weight_map": {name: one.file.name for name, one in files.tensors.items()}})
        for name in filter(lambda name: (files.folder / name).exists(), TEXTS):
            (folder / name).write_bytes(read_bytes(own_file(files.folder, name), LARGEST_TEXT))
        for name in filter(lambda name: (files.folder / name).exists(), SETTINGS):
            write(name, settings(files.folder, name))
        yield folder


def settings(folder: Path, name: str) -> dict[str, Any]:
    """A file of a tokenizer's settings, or of generation, without code to run and files to open."""
    content = read_object(own_file(folder, name))
    return {key: value for key, value in content.items() if key != "auto_map" and not key.endswith(("_file", "_path"))}


def require_fit(files: ModelFiles, expected: Mapping[str, tuple[int, ...]], base: str, blocks: str) -> None:
    """SpdError unless the weights fit a model of the shapes `expected`, whose blocks lie at `base`.`blocks`.

    A checkpoint may name its tensors without `base`. What else it holds is left alone, unless it is of a block that
    the model does not have. A model far larger than its weights is refused before anything is allocated.
    """
    size = sum(map(math.prod, expected.values()))
    if size > 4 * files.numbers + 2**24:
        raise SpdError(
            f"{files.folder / CONFIG}: describes a model of {size:.1e} numbers, but the weights are {files.numbers:.1e}"
        )
    beyond = f"{base}.{blocks}."
    present = {name.removeprefix(beyond).split(".")[0] for name in expected if name.startswith(beyond)}
    for name, header in files.tensors.items():
        inside = name if name in expected or name.startswith(f"{base}.") else f"{base}.{name}"
        where = f"{header.file}: '{name}'"
        if inside in expected and header.dtype not in FLOATING:
            raise SpdError(f"{where} holds {header.dtype}; a decomposition needs plain weights", "give the full model")
        if inside in expected and expected[inside] != header.shape:
            raise SpdError(
                f"{where} has the shape {list(header.shape)}, but {CONFIG} describes {list(expected[inside])}",
                "get both from one place",
            )
        if inside.startswith(beyond) and inside.removeprefix(beyond).split(".")[0] not in present:
            raise SpdError(f"{where} is of a block that {CONFIG} does not describe", "get both from one place")
