"""A harvest in a run directory, and what it says of a slice in words.

harvest/harvest.safetensors   all of it, as tokens and numbers
harvest/slices.parquet        the same for tables, a row a slice, with texts; only where pyarrow is installed
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from spdcli.disk import write_directory
from spdcli.errors import SpdError, UsageError
from spdcli.files import Contents, Form, load_tensors, save_tensors
from spdcli.measures.harvest import AFTER, BEFORE, CONTEXTS, NO_TOKEN, PARTNERS, PREFERRED, Harvest, Preferred
from spdcli.records import plain
from spdcli.runs.directory import HARVEST, RunDirectory
from spdcli.runs.results import require_own

TENSORS, TABLE = "harvest.safetensors", "slices.parquet"
TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Context:
    """Where a slice is active: the `text`, its `tokens`, the `position` among them of the one that counts, and the
    slice's `importance` there."""

    text: str
    tokens: Sequence[str]
    position: int
    importance: float

    @property
    def marked(self) -> str:
        """The text with the token in double angle brackets."""
        before, after = "".join(self.tokens[: self.position]), "".join(self.tokens[self.position + 1 :])
        return f"{before}«{self.tokens[self.position]}»{after}"


@dataclass(frozen=True)
class Preference:
    """A token that a slice prefers: pointwise mutual `information` in nats, and how often they met."""

    token: str
    information: float
    count: int


@dataclass(frozen=True)
class Partner:
    """A slice that is active with another one: of the places where either is, the share where both are."""

    slice: str
    overlap: float


@dataclass(frozen=True)
class SliceInText:
    """What one slice does over a corpus, as in `Harvest`: its `examples` have the strongest first."""

    slice: str
    density: float
    importance: float
    examples: Sequence[Context]
    input_tokens: Sequence[Preference]
    next_tokens: Sequence[Preference]
    fires_with: Sequence[Partner]


def described(harvest: Harvest, number: int, token_text: TokenText) -> SliceInText:
    """What the slice of that `number` among all S does, in words."""
    addresses = harvest.slices
    contexts = zip(harvest.contexts[number].tolist(), harvest.strengths[number].tolist(), strict=True)
    partners = zip(harvest.partners[number].tolist(), harvest.overlaps[number].tolist(), strict=True)
    return SliceInText(
        slice=addresses[number],
        density=harvest.density[number].item(),
        importance=harvest.importance[number].item(),
        examples=[_context(tokens, strength, token_text) for tokens, strength in contexts if strength > 0],
        input_tokens=_preferences(harvest.inputs, number, token_text),
        next_tokens=_preferences(harvest.following, number, token_text),
        fires_with=[Partner(addresses[other], overlap) for other, overlap in partners if overlap > 0],
    )


def slice_number(harvest: Harvest, address: str) -> int:
    """The number among all S slices of the one at `address`; UsageError where the harvest has no such slice."""
    name, _, index = address.rpartition(":")
    count = harvest.matrices.get(name)
    if count is None:
        near = get_close_matches(name, harvest.matrices, n=2) or list(harvest.matrices)[:2]
        raise UsageError(f"the harvest has no slice {address!r}", f"an address is MATRIX:INDEX, such as {near[0]}:0")
    if not index.isdecimal() or int(index) >= count:
        raise UsageError(f"the harvest has no slice {address!r}", f"{name} has slices 0 to {count - 1}")
    return harvest.slices.index(f"{name}:{int(index)}")


def every_slice(harvest: Harvest, token_text: TokenText) -> Iterator[SliceInText]:
    """What each slice that is active anywhere does, in order."""
    for number in (harvest.density > 0).nonzero()[:, 0].tolist():
        yield described(harvest, number, token_text)


def _context(tokens: Sequence[int], strength: float, token_text: TokenText) -> Context:
    pieces = [token_text(token) for token in tokens if token != NO_TOKEN]
    position = sum(token != NO_TOKEN for token in tokens[:BEFORE])
    return Context("".join(pieces), pieces, position, strength)


def _preferences(preferred: Preferred, number: int, token_text: TokenText) -> list[Preference]:
    own = (each[number].tolist() for each in (preferred.tokens, preferred.information, preferred.counts))
    rows = zip(*own, strict=True)
    return [
        Preference(token_text(token), information, count) for token, information, count in rows if token != NO_TOKEN
    ]


def save_harvest(run: Path, harvest: Harvest, token_text: TokenText, decomposition: str = "") -> bool:
    """Write both files into the run directory `run`, in place of a harvest that is there; False where there is no
    pyarrow, and so no table. `decomposition` is the checksum of the one whose slices they are."""
    tabled = importlib.util.find_spec("pyarrow") is not None
    about = {
        "matrices": json.dumps(harvest.matrices),
        "tokens": str(harvest.tokens),
        "threshold": repr(harvest.threshold),
        "missed": str(harvest.missed),
        "decomposition": decomposition,
    }

    def write(folder: Path) -> None:
        save_tensors(folder / TENSORS, _tensors(harvest), about)
        if tabled:
            _write_table(folder / TABLE, harvest, token_text)

    write_directory(run / HARVEST, write)
    return tabled


def _tensors(harvest: Harvest) -> dict[str, Tensor]:
    own = {name: getattr(harvest, name) for name in ("density", "importance", "contexts", "strengths", "partners")}
    for which in ("inputs", "following"):
        preferred: Preferred = getattr(harvest, which)
        own |= {f"{which}.{name}": getattr(preferred, name) for name in ("tokens", "information", "counts")}
    return own | {"overlaps": harvest.overlaps}


def _write_table(path: Path, harvest: Harvest, token_text: TokenText) -> None:
    import pyarrow as arrow
    from pyarrow.parquet import write_table

    text, number, count = arrow.string(), arrow.float32(), arrow.int64()
    context = [("text", text), ("tokens", arrow.list_(text)), ("position", count), ("importance", number)]
    preference = [("token", text), ("information", number), ("count", count)]
    columns = {
        "slice": text,
        "density": number,
        "importance": number,
        "examples": arrow.list_(arrow.struct(context)),
        "input_tokens": arrow.list_(arrow.struct(preference)),
        "next_tokens": arrow.list_(arrow.struct(preference)),
        "fires_with": arrow.list_(arrow.struct([("slice", text), ("overlap", number)])),
    }
    rows = [plain(one) for one in every_slice(harvest, token_text)]
    write_table(arrow.Table.from_pylist(rows, arrow.schema(list(columns.items()))), path)


def load_harvest(run: Path) -> Harvest:
    """The harvest of the run directory `run`; SpdError where there is none, none that `save_harvest` wrote, or one of
    another decomposition than the run has now."""
    path, again = run / HARVEST / TENSORS, f"spd harvest {run} gathers what its slices do over text"
    if not path.exists():
        RunDirectory.open(run)  # a missing run is told as such
        raise SpdError(f"{run}: no harvest yet", again)
    tensors, about = load_tensors(path, _contents, again)
    require_own(path, about.get("decomposition"), run, again)

    def preferred(which: str) -> Preferred:
        return Preferred(*(tensors[f"{which}.{name}"] for name in ("tokens", "information", "counts")))

    try:
        harvest = Harvest(
            matrices={str(name): int(count) for name, count in json.loads(about["matrices"]).items()},
            tokens=int(about["tokens"]),
            threshold=float(about["threshold"]),
            missed=int(about["missed"]),
            inputs=preferred("inputs"),
            following=preferred("following"),
            **{name: tensor for name, tensor in tensors.items() if "." not in name},
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise SpdError(f"{path}: does not say what it is of", again) from error
    total, partners = sum(harvest.matrices.values()), harvest.partners
    tokens = [harvest.contexts, harvest.inputs.tokens, harvest.following.tokens]
    if total != len(harvest.density) or any((each < NO_TOKEN).any() for each in tokens):
        raise SpdError(f"{path}: is not of {total} slices, or of no tokens", again)
    if partners.numel() and not 0 <= int(partners.min()) <= int(partners.max()) < total:
        raise SpdError(f"{path}: names slices that are not there", again)
    return harvest


def _contents(found: Mapping[str, Tensor]) -> Contents:
    """What a harvest's file holds, of as many slices as it tells the density of."""
    count = found["density"].numel() if "density" in found else 0
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "density": ((), torch.float32),
        "importance": ((), torch.float32),
        "contexts": ((CONTEXTS, BEFORE + 1 + AFTER), torch.int64),
        "strengths": ((CONTEXTS,), torch.float32),
        "partners": ((min(PARTNERS, count),), torch.int64),
        "overlaps": ((min(PARTNERS, count),), torch.float32),
    }
    for which in ("inputs", "following"):
        for name, dtype in (("tokens", torch.int64), ("information", torch.float32), ("counts", torch.int64)):
            shapes[f"{which}.{name}"] = ((PREFERRED,), dtype)
    return Contents({name: Form((count, *shape), dtype) for name, (shape, dtype) in shapes.items()})
