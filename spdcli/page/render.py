"""A run's page as one file of HTML: nothing is fetched, and its scripts only sort, search and open what is there."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spdcli.page.content import Page, Table

HERE = Path(__file__).parent


def html(page: Page) -> str:
    """The whole page; text of the run is escaped, figures lie inside."""
    loader = FileSystemLoader(HERE, encoding="utf-8")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"picture": picture, "visible": visible, "word_columns": word_columns}
    parts = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("page.html.jinja").render(page=page, **parts)


def picture(file: Path) -> str:
    """An SVG file as a data address, without the lines at its head that name places elsewhere."""
    text = file.read_text(encoding="utf-8")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()}"


def word_columns(table: Table) -> list[bool]:
    """Of each column whether it has no number: numbers stand on the right, words on the left."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.heads)
    return [all(cell[:1].isalpha() or not cell for cell in column) for column in columns]


def visible(token: str) -> str:
    """A token with what cannot be seen written out."""
    return token if token.isprintable() else repr(token)[1:-1]
