"""GGUF files: converted once into a plain checkpoint directory in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path

from spdcli.errors import SpdError
from spdcli.targets.user_cache import cached


def converted(path: Path) -> Path:
    """The checkpoint directory (float32) made of a `.gguf` file, converted now if it never was.

    It lies in the user's cache under the file's name, size and content hash. The directory appears
    whole or not at all; of two processes that convert at once, the first to finish wins.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SpdError(f"'{path}' is not a GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{path.stem}-{path.stat().st_size}-{digest[:16]}"

    def fill(folder: Path) -> None:
        require_libraries(path)
        convert(path, folder)

    return cached("gguf", name, fill)


def require_libraries(path: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise SpdError(f"reading '{path.name}' needs {' and '.join(missing)}", "pip install 'spd-cli[gguf]'")


def convert(path: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a `.gguf` file into `folder`, as float32 safetensors."""
    # Here, not above: only a first conversion pays for these imports.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spdcli.targets.quiet import loading

    with (
        loading(f"'{path}' cannot be converted", "give a safetensors directory instead"),
        tempfile.TemporaryDirectory(prefix="spd-") as alone,  # nothing that lies beside the file is read
    ):
        (Path(alone) / path.name).symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            alone, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
        # A model read from GGUF refuses to be saved; a clean one of the same config and weights does not.
        config = loaded.config
        del config.quantization_config
        with torch.device("meta"):
            clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        clean.load_state_dict(loaded.state_dict(), assign=True)
        clean.tie_weights()
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
