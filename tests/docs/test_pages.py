"""The documents cannot drift: generated pages are as they would be written now, and what people wrote is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from generate.pages import rendered
from printed import DOCUMENTS, ROOT, blocks, mistakes, pasted_output, spd_commands, without_generated_parts

GENERATED = {path for path in rendered() if path.name != "README.md"}
WRITTEN = [path for path in DOCUMENTS if path not in GENERATED]
BUILT = ("reference/python.md", "reference/engine.md")  # whose anchors mkdocstrings makes


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", rendered(), ids=name_of)
def test_a_generated_page_is_as_it_would_be_rendered_now(path: Path) -> None:
    assert path.exists(), "make results"
    assert path.read_text(encoding="utf-8") == rendered()[path], f"{name_of(path)} is out of date: make results"


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_nobody_pasted_what_a_command_printed(path: Path) -> None:
    text = without_generated_parts(path.read_text(encoding="utf-8"))
    assert pasted_output(text) == [], "record it (docs/record.py) and let make results render it"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_printed_command_is_one(path: Path) -> None:
    assert [problem for line in spd_commands(path.read_text(encoding="utf-8")) for problem in mistakes(line)] == []


@pytest.mark.parametrize(
    ("text", "suspects"),
    [
        ("```console\n$ spd eval run\n117 slices are active\n```\n", ["117 slices are active"]),
        ("```text\nanything\n```\n", ["line 1: a block of text"]),
        ("```\nanything\n```\n", ["line 1: a block of no language"]),
        ("```bash\nspd eval run   # a comment\n# another\nfaithfulness 3e-9\n```\n", ["faithfulness 3e-9"]),
        ("┃ recon │ 9.1e-04 │\n", ["┃ recon │ 9.1e-04 │"]),
        ("```console\n$ spd eval \\\n  run\n```\n\nProse about `spd eval`.\n", []),
        ("```toml\nseed = 0\n```\n", []),
    ],
)
def test_what_counts_as_pasted(text: str, suspects: list[str]) -> None:
    assert pasted_output(text) == suspects


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("spd evaluate run", "no command evaluate"),
        ("spd eval", "Missing parameter"),
        ("spd eval run --fast", "No such option"),
        ("spd svd run --method svd", "is not one of"),
        ("spd decompose gpt2 --set losses.reccon=1", "no setting losses.reccon=1"),
    ],
)
def test_what_counts_as_no_command(command: str, problem: str) -> None:
    assert problem in mistakes(command)[0]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in blocks(text):
        text = text.replace(block.text, "")
    for target in re.findall(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{target} leads nowhere"
        if anchor and not name_of(file).endswith(BUILT):
            assert anchor in anchors(file), f"{name_of(file)} has no #{anchor}"


def anchors(path: Path) -> set[str]:
    """The places of a page that a link can name: explicit ones, and its headings."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))
