"""For the site's Python reference: examples in docstrings become blocks of code (an extension of griffe)."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class ExampleBlocks(Extension):
    """Puts a fence round every example, which would be read as Markdown, and its lists as links."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Changes the docstring of one object, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
