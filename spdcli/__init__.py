"""spd: Stochastic Parameter Decomposition of transformers.

`spdcli.load("run")` opens a run directory with the objects that the commands use. It is looked up
on first use, so that `import spdcli` costs nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdcli.runs.loading import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from spdcli.runs.loading import load

        return load
    raise AttributeError(f"module 'spdcli' has no attribute {name!r}")
