"""Writes every page that is generated: results, the recipe and command references, the paper's map, the tour, the README's parts.

    python docs/render.py            write what has changed
    python docs/render.py --check    write nothing; exit code 1 and a line for each page that would change
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generate.pages import rendered  # noqa: E402


def main() -> int:
    """Renders; the exit code says whether `--check` met a page that is not as it would be written."""
    check = "--check" in sys.argv[1:]
    changed = [path for path, text in rendered().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rendered()[path], encoding="utf-8")
        sys.stderr.write(f"{path.relative_to(ROOT)} {'is not what make results writes' if check else 'written'}\n")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
