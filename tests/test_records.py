"""Records become JSON: what was never set is left out, null is null, and a spread mapping is fields."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spdcli.records import ABSENT, Absent, plain, spread


@dataclass(frozen=True)
class Result:
    name: str
    sizes: dict[str, float] = field(metadata=spread("{}_size"))
    p: float | None = None
    note: str | Absent | None = ABSENT


def test_a_field_is_left_out_until_it_is_set():
    result = Result("x", {"mean": 1.0})
    assert plain(result) == {"name": "x", "mean_size": 1.0, "p": None}
    assert plain(replace(result, note=None)) == {"name": "x", "mean_size": 1.0, "p": None, "note": None}
    assert plain([replace(result, note="y")])[0]["note"] == "y"
    assert not ABSENT


def test_everything_that_json_can_write():
    value = {1: (Path("a"), {3, 2}), "n": np.arange(2), "t": torch.tensor(0.5), "nan": float("nan"), "inf": [-1e999]}
    assert plain(value) == {"1": ["a", [2, 3]], "n": [0, 1], "t": 0.5, "nan": None, "inf": [None]}
    assert json.dumps(plain(value), allow_nan=False)
    with pytest.raises(TypeError, match="object has no form in JSON"):
        plain(object())
