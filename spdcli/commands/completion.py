"""What the Tab key offers in a shell: recipes, runs, matrices and slices. `spd --install-completion` sets it up.

A shell asks at every press of the key, so nothing here imports torch, and what cannot be read offers nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

RECIPE, SLICES = "recipe.toml", "decomposition.safetensors"
LONGEST_HEADER = 10**7  # bytes


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes, and recipe files where the path so far leads."""
    from spdcli.recipe.reading import shipped

    files = [path for path in _beside(incomplete) if path.suffix == ".toml"]
    return [name for name in shipped() if name.startswith(incomplete)] + [str(path) for path in files]


def runs(incomplete: str) -> list[str]:
    """Directories where the path so far leads; those that are no run end in a slash, to be looked into."""
    folders = [path for path in _beside(incomplete) if path.is_dir()]
    return [str(path) if (path / RECIPE).is_file() else f"{path}/" for path in folders]


def matrices(ctx: typer.Context, incomplete: str) -> list[str]:
    """The decomposed matrices of the run that the command line names."""
    return [name for name in slices_of(_run(ctx)) if name.startswith(incomplete)]


def slices(ctx: typer.Context, incomplete: str) -> list[str]:
    """Slices of that run: first the matrix with its colon, then numbers."""
    counts = slices_of(_run(ctx))
    matrix, colon, number = incomplete.partition(":")
    if colon:
        return [f"{matrix}:{n}" for n in range(counts.get(matrix, 0)) if str(n).startswith(number)]
    return [f"{name}:" for name in counts if name.startswith(matrix)]


def slices_of(run: Path) -> dict[str, int]:
    """How many slices each decomposed matrix of a run has; empty where there is no such run.

    Read off the header that a safetensors file begins with: eight bytes of its length, then JSON.
    """
    try:
        with (run / SLICES).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        stems = [key[:-2] for key in header if key.startswith("slices.") and key.endswith(".U")]
        return {stem.removeprefix("slices.").replace("/", "."): header[f"{stem}.U"]["shape"][1] for stem in stems}
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return {}


def _run(ctx: typer.Context) -> Path:
    """The run of a command line that ends in an option without its value, at which parsing stops."""
    return Path(ctx.params.get("run") or next(iter(ctx.args), ""))


def _beside(incomplete: str) -> list[Path]:
    """What begins with the path so far."""
    path = Path(incomplete)
    folder, start = (path, "") if incomplete.endswith("/") else (path.parent, path.name)
    try:
        return sorted(found for found in folder.iterdir() if found.name.startswith(start))
    except OSError:
        return []
