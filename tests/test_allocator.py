"""The machine's switch: heard by glibc, and freed memory really is used again."""

import os
import subprocess
import sys

import pytest

GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
FAULTS = """
import resource, sys, torch
from spdcli.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(30):
    torch.ones(12_000_000).sum()  # 48 MB: mapped anew every time by default
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_memory_is_used_again():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, check=True).stdout)
        for way in ("keep", "default")
    }
    assert faults["keep"] < 0.5 * faults["default"], faults


def test_elsewhere_it_says_no(monkeypatch):
    from spdcli import machine

    monkeypatch.setattr(os, "confstr_names", {})
    assert not machine.keep_freed_memory()
