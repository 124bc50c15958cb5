"""What the processes do that `tests/runs/test_processes.py` starts: the same runs, and then one of them dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from spdcli.api import decompose
from spdcli.files import save_tensors
from spdcli.progress import Report
from spdcli.runs.joining import met


def decompose_and_die(request: dict[str, Any], report: Report) -> None:
    """Makes every run of the `request`, leaves in its folder what this process has of it, and kills the second one."""
    for name, settings in request["runs"].items():
        run = decompose(request["recipe"], **settings)
        save_tensors(Path(request["folder"]) / f"{name}-{os.environ['RANK']}", run.decomposition.state_dict())
    with met("cpu") as meeting:
        if meeting.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        meeting.processes.any(False)
