"""Records results: runs their commands with `--json`, and keeps what they print with where and when it was.

    python docs/record.py demo-eval              the command that docs/results.toml lists under that name
    python docs/record.py demo-eval demo-svd     several, in this order
    python docs/record.py --missing              every result that is not recorded yet, in the order of the list

Commands run in the current folder, where those they build on have run before (`after` in docs/results.toml).
Then `make results` renders the pages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from generate.recorded import DOCS, RESULTS, ROOT, Result, recording, results


def main() -> int:
    """Records what the command line names; the exit code is the number of results that could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a result of the list")
    parser.add_argument("--missing", action="store_true", help="all that is not recorded yet")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in results()]:
        parser.error(f"docs/results.toml lists no {', '.join(unknown)}, but {', '.join(results())}")
    names = options.names or [name for name in results() if options.missing and recording(name) is None]
    failures = [name for name in names if not record(results()[name], Path.cwd())]
    return len(failures)


def record(result: Result, folder: Path) -> bool:
    """Runs one result's command in `folder` and writes its JSON; False, and a line, where it printed none."""
    for name in result.files:
        (folder / DOCS.name).mkdir(exist_ok=True)
        shutil.copyfile(DOCS / name, folder / DOCS.name / name)
    say(f"{result.name}: {result.command}")
    started = time.monotonic()
    words = shlex.split(result.command)
    module = words[1:] if words[0] == "python" else ["-m", "spdcli", *words[1:]]
    sources = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.Popen(
        [sys.executable, *module, "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": sources},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # what it and its children used, which Popen does not tell
    process.returncode = code = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if code not in (0, 1) or not printed:
        say(f"{result.name}: not recorded, exit code {code}")
        return False
    entry = {
        "name": result.name,
        "command": result.command,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        **surroundings(result.command),
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        "exit": code,
        "figures": keep_figures(result, folder),
        "result": json.loads(portable(printed, folder)),
    }
    write(RESULTS / f"{result.name}.json", entry)
    say(f"{result.name}: recorded after {seconds:.0f} seconds, exit code {code}")
    return True


def portable(text: str, folder: Path) -> str:
    """The command's JSON without the places of this machine: paths count from the folder, or from the sources."""
    for place in (folder.resolve(), ROOT.resolve()):
        text = text.replace(f"{place}/", "")
    return text


def commit() -> str:
    """The commit that is checked out, and whether the code differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changes = subprocess.run(
        [*git, "status", "--porcelain", "--", "spdcli", "recipes"], capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


def surroundings(command: str) -> dict[str, Any]:
    """The version of spd and the machine that the command ran on."""
    sys.path.insert(0, str(ROOT))
    from spdcli import __version__
    from spdcli.machine import describe
    from spdcli.records import plain
    from spdcli.runs.subject import choose_device

    words = shlex.split(command)
    device = words[words.index("--device") + 1] if "--device" in words else "auto"
    return {"version": __version__, "machine": plain(describe(choose_device(device)))}


def keep_figures(result: Result, folder: Path) -> list[str]:
    """Copies the result's figures beside its JSON; their names there."""
    names = []
    for figure in result.figures:
        name = f"{result.name}-{Path(figure).name}"
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(folder / figure, RESULTS / name)
        names.append(name)
    return names


def write(path: Path, entry: dict[str, Any]) -> None:
    """Writes a whole file or none; a list of numbers stays on one line."""
    text = json.dumps(entry, indent=1, allow_nan=False, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    beside = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def say(line: str) -> None:
    """What is going on, on standard error."""
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
