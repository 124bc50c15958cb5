"""What a corpus is made of: documents, one after the other, from files or a dataset; never more than one in memory.

a text file, UTF-8         one document, in pieces of about PIECE characters that end where a line does
.jsonl, .ndjson            a document a line: the text in its field
.parquet                   a document a row: the text in its column (needs pyarrow)
a directory                every such file in it and below, in the order of their names
datasets:NAME[:CONFIG][:SPLIT]  a dataset of the `datasets` library, of the hub or saved to a directory
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spdcli.disk import require_regular
from spdcli.errors import Missing, SpdError, UsageError

DATASETS = "datasets:"  # what the name of a dataset of that library starts with
PIECE = 1 << 20  # characters
LONGEST = 1 << 28  # bytes of a line, which is held in memory
TEXT, LINES, TABLE = (".txt", ".md", ".rst", ".text"), (".jsonl", ".ndjson", ".json"), ".parquet"
Document = Iterator[str]  # its text, in pieces


def documents(source: str, field: str) -> Iterator[Document]:
    """The documents of `source`, each as the pieces of its text; `field` is where rows and objects have theirs.

    Raises SpdError, naming file and line, for what cannot be read, is no text or has no such field.
    """
    if source.startswith(DATASETS):
        for row in open_dataset(source):
            yield iter([_text_of(row, field, source)])
        return
    for path in files_of(source):
        if path.suffix in LINES:
            yield from ([text] for text in _lines(path, field))  # type: ignore[misc]
        elif path.suffix == TABLE:
            yield from ([text] for text in _rows(path, field))  # type: ignore[misc]
        else:
            yield _pieces(path)


def content_key(source: str) -> str:
    """Hexadecimal digits that stand for the content of `source`: other content has others."""
    digest = hashlib.blake2b(digest_size=16)
    if source.startswith(DATASETS):
        dataset = open_dataset(source)
        digest.update(str(getattr(dataset, "_fingerprint", None) or dataset).encode())
        return digest.hexdigest()
    for path in files_of(source):
        digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
        with _opened(path) as file:
            while block := file.read(PIECE):
                digest.update(block)
    return digest.hexdigest()


def files_of(source: str) -> list[Path]:
    """The file that `source` names, or those of the directory; SpdError where there is none to read."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if not path.exists():
            ways = "name a text file, a directory, a .jsonl or .parquet file, or datasets:NAME"
            raise Missing(f"{path}: cannot be read: there is no such file", ways)
        return [path]
    known = (*TEXT, *LINES, TABLE)
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in known and file.is_file() and not any(part.startswith(".") for part in file.parts[1:])
    )
    if not found:
        raise SpdError(f"{path} holds no text", f"its files end in none of {', '.join(known)}")
    return found


def open_dataset(source: str) -> Any:
    """The rows of `datasets:NAME[:CONFIG][:SPLIT]`: a directory made by `save_to_disk`, or a dataset of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise SpdError(f"'{source}' needs the datasets library", "pip install 'spd-cli[datasets]'") from error
    name, *rest = source.removeprefix(DATASETS).split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"data.stream = '{source}' is not of the form datasets:NAME[:CONFIG][:SPLIT]")
    split, config = (rest[-1] if rest else "train"), (rest[0] if len(rest) == 2 else None)
    try:
        if Path(name).expanduser().is_dir():
            saved = datasets.load_from_disk(str(Path(name).expanduser()))
            return saved[split] if isinstance(saved, dict) else saved
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # that library raises what the hub, the disk and its readers do
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise SpdError(f"'{source}' cannot be opened: {reason}", "datasets:NAME[:CONFIG][:SPLIT]") from error


def _opened(path: Path) -> Any:
    require_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise SpdError(f"{path}: cannot be read: {error.strerror}") from error


def _pieces(path: Path) -> Document:
    """The text of a file, cut at ends of lines that no blank line follows: a tokenizer sees what it would in one."""
    kept: list[str] = []
    size = 0
    for _, line in _decoded(path):
        if size >= PIECE and not line[:1].isspace():
            yield "".join(kept)
            kept, size = [], 0
        kept.append(line)
        size += len(line)
    yield "".join(kept)


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1, newlines as they stand."""
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise SpdError(f"{path}: line {number} is longer than {LONGEST / 2**20:g} MiB")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise SpdError(
                    f"{path}: line {number}: cannot be read: not text in UTF-8: {error.reason}",
                    "name a text file, or a directory of them",
                ) from error


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in _decoded(path):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SpdError(f"{path}: line {number}: not JSON: {error}", "one object a line") from error
            yield _text_of(row, field, f"{path}: line {number}")


def _rows(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SpdError(f"reading '{path.name}' needs pyarrow", "pip install 'spd-cli[text]'") from error
    try:
        table = ParquetFile(path)
        columns: list[str] = table.schema_arrow.names
    except (OSError, ValueError) as error:
        raise SpdError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if field not in columns:
        raise _no_field(field, columns, str(path))
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield _text_of({field: text}, field, f"{path}: row {number}")


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise _no_field(field, list(row) if isinstance(row, dict) else [], where)
    if not isinstance(row[field], str):
        raise SpdError(f"{where}: {field} is {type(row[field]).__name__}, not text")
    return row[field]


def _no_field(field: str, fields: list[str], where: str) -> SpdError:
    has = f"it has {', '.join(map(str, fields[:10]))}" if fields else "it is no object"
    return SpdError(f"{where}: no field '{field}'; {has}", "data.stream_field names the one with the text")
