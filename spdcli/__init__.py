"""spd: Stochastic Parameter Decomposition of transformers.

    run = spdcli.decompose("induction-quick", out="run", progress=print)
    run = spdcli.load("run")
    run.importances("3 s 17 4 s")     # matrix -> [T, C]

Names are looked up on first use, so that `import spdcli` costs nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdcli.api import decompose, from_pretrained, import_checkpoint, load, train_toy
    from spdcli.errors import Interrupted, RecipeError, SpdError, UsageError
    from spdcli.progress import Progress
    from spdcli.run import Run
    from spdcli.targets.modules import module_target

HOMES = {  # of the public names
    "decompose": "spdcli.api",
    "load": "spdcli.api",
    "from_pretrained": "spdcli.api",
    "import_checkpoint": "spdcli.api",
    "train_toy": "spdcli.api",
    "module_target": "spdcli.targets.modules",
    "Run": "spdcli.run",
    "Progress": "spdcli.progress",
    "SpdError": "spdcli.errors",
    "UsageError": "spdcli.errors",
    "RecipeError": "spdcli.errors",
    "Interrupted": "spdcli.errors",
}
__all__ = [
    "Interrupted",
    "Progress",
    "RecipeError",
    "Run",
    "SpdError",
    "UsageError",
    "__version__",
    "decompose",
    "from_pretrained",
    "import_checkpoint",
    "load",
    "module_target",
    "train_toy",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'spdcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
