"""Examples in docstrings: every module of spdcli that has some is run, in a folder of its own."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    """The modules whose text holds a prompt of Python."""
    paths = sorted((ROOT / "spdcli").rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths if ">>> " in texts[path]
    ]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_do_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert tried > 0
    assert failed == 0
