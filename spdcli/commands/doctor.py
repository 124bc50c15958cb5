"""`spd doctor`: what is installed, what this machine can do, which models are at hand, and what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spdcli.commands.options import Device, Json, Quiet, Verbose, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.costs.doctor import Checkup


def doctor(device: Device = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Say what is installed, what this machine can do, and what to try next.

    Reads what packages say of themselves, measures matrix products for a moment, and looks for
    models that need no network and for runs in the current directory. Exit code 1 where a package
    that spd needs is missing.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.costs.doctor import checkup
    from spdcli.errors import SpdError
    from spdcli.records import plain
    from spdcli.runs.subject import choose_device

    found = checkup(Path.cwd(), choose_device(device or "auto"))
    console.show({"schema": "spd.doctor/1", **plain(found)}, doctor_table(found))
    console.result(found.next)
    if missing := [name for name, version in found.packages.items() if version is None]:
        raise SpdError(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def doctor_table(found: Checkup) -> Table:
    """A row a subject."""
    from rich.table import Table

    machine = found.machine
    cores = f"{machine.threads} threads on {machine.cores} cores"
    memory = f"{found.memory / 2**30:.1f} GiB free; disk {found.disk / 2**30:.0f} GiB free here"
    packages = [f"{name} {version or 'MISSING'}" for name, version in found.packages.items()]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("spd", f"{found.spd}, Python {machine.python}, {machine.system}")
    table.add_row("packages", ", ".join(packages))
    for extra in found.extras:
        missing = ", ".join(name for name, version in extra.packages.items() if version is None)
        table.add_row(
            f"extra {extra.name}", f"lacks {missing}: pip install 'spd-cli[{extra.name}]'" if missing else "yes"
        )
    table.add_row("processor", f"{machine.processor}, {cores}")
    table.add_row(
        "device", f"{machine.device}{f', {machine.gpu}' if machine.gpu else ''}: {found.flops / 1e9:.0f} GFLOP/s"
    )
    table.add_row("memory", memory)
    table.add_row("models at hand", "\n".join(found.models) or "none; target.model may be a directory or a .gguf file")
    table.add_row("recipes that run", ", ".join(found.recipes))
    table.add_row("runs here", ", ".join(found.runs) or "none")
    table.add_row("try", found.next)
    return table
