"""What a soak came to, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generate.markdown import duration, joined, table


def soak(data: Mapping[str, Any]) -> str:
    """`spd.soak/1`: a row a kind of damage."""
    rows = [[row["kind"], f"{row['tried']:,}", row["failed"], duration(row["seconds"])] for row in data["kinds"]]
    words = f"Under {data['memory_gib']:g} GiB of memory; a trial fails after {data['hang_seconds']:g} seconds."
    return joined([table(["damage to", "tried", "failed", "time"], rows), words])
