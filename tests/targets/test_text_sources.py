"""Documents of every kind of corpus, and one line for what cannot be read."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from spdcli.errors import SpdError, UsageError
from spdcli.targets import text_sources
from spdcli.targets.text_sources import content_key, documents


def texts(source, field="text"):
    return ["".join(document) for document in documents(str(source), field)]


def test_a_text_file_is_one_document_in_pieces(tmp_path, monkeypatch):
    text = "one\ntwo\n\n  three\nfour\r\nfive"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert texts(path) == [text]
    monkeypatch.setattr(text_sources, "PIECE", 5)
    (document,) = documents(str(path), "text")
    assert list(document) == ["one\ntwo\n\n  three\n", "four\r\n", "five"]  # never before a space


def test_json_lines_and_parquet_have_a_document_a_row(tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"n": n, "body": f"text {n}\n"}) + "\n\n" for n in range(3)))
    assert texts(lines, "body") == ["text 0\n", "text 1\n", "text 2\n"]
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "texts.parquet"
    parquet.write_table(arrow.table({"body": ["a", "b"], "n": [1, 2]}), table)
    assert texts(table, "body") == ["a", "b"]
    with pytest.raises(SpdError, match=r"texts\.parquet: no field 'text'; it has body, n"):
        texts(table)


def test_a_directory_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n')
    (tmp_path / "image.png").write_bytes(b"\xff")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    assert texts(tmp_path) == ["first", "second", "third"]


def test_a_dataset_of_the_library(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": "a row"}]

    saved = lambda path: {"train": [{"text": "saved"}], "test": [{"text": "tested"}]}  # noqa: E731
    stand_in = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=saved)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert texts("datasets:owner/name") == texts("datasets:owner/name:test") == ["a row"]
    texts("datasets:owner/name:small:test")
    assert asked == [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "small", "test")]
    assert texts(f"datasets:{tmp_path}:test") == ["tested"]
    with pytest.raises(SpdError, match="cannot be opened: 'dev'"):
        texts(f"datasets:{tmp_path}:dev")
    with pytest.raises(UsageError, match="is not of the form"):
        texts("datasets:a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpdError, match="needs the datasets library"):
        texts("datasets:owner/name")


def test_other_content_has_another_key(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one")
    key = content_key(str(path))
    (tmp_path / "again.txt").write_text("one")
    assert content_key(str(tmp_path / "again.txt")) == key
    path.write_text("two")
    assert content_key(str(path)) != key


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.txt", b"good\n\xff\n", "line 2: cannot be read: not text in UTF-8"),
        ("texts.jsonl", b'{"text": "a"}\nno\n', "line 2: not JSON"),
        ("texts.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no field 'text'; it has body"),
        ("texts.jsonl", b"[1]\n", "line 1: no field 'text'; it is no object"),
        ("texts.jsonl", b'{"text": 3}\n', "line 1: text is int, not text"),
        ("texts.parquet", b"not one", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(SpdError, match=said):
        texts(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(SpdError, match="there is no such file"):
        texts(tmp_path / "nowhere.txt")
    with pytest.raises(SpdError, match="holds no text"):
        texts(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path, make):
    make(tmp_path / "text.txt")
    for read in (texts, lambda path: content_key(str(path))):
        with pytest.raises(SpdError, match=r"text\.txt: a pipe or a device, not a file"):
            read(tmp_path / "text.txt")


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "LONGEST", 100)
    (tmp_path / "text.txt").write_text("a\n" + "b" * 101)
    with pytest.raises(SpdError, match=r"line 2 is longer than"):
        texts(tmp_path / "text.txt")
