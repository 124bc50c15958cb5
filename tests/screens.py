"""The explorer's screen without a terminal: driven by keys, and read."""

from __future__ import annotations

import asyncio

from rich.text import Text
from textual.widgets import Static

from spdcli.explorer.app import Explorer


def drive(run, size, script, off=(), folder=None):
    """Runs `script(app, pilot)` on the explorer of a run."""

    async def session():
        exploration = run.explore()
        path = (folder / "edits.toml") if folder else None
        app = Explorer(exploration, exploration.prompt(1), *([path] if path else []), off=off)
        async with app.run_test(size=size) as pilot:
            await settled(app, pilot)
            await script(app, pilot)

    asyncio.run(session())


async def settled(app, pilot):
    """Waits for all that a key set off; a request that a newer one replaced is cancelled."""
    for _ in range(2):
        await pilot.pause()
        while not all(worker.is_finished for worker in app.workers):
            await asyncio.sleep(0.01)
        await pilot.pause()


async def press(app, pilot, *keys):
    await pilot.press(*keys)
    await settled(app, pilot)


def said(app, name):
    content = app.query_one(name, Static).content
    return content.plain if isinstance(content, Text) else str(content)
