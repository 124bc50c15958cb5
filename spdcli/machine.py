"""This machine: its name and threads, the memory that is used and left, what training asks of it, its allocator."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spdcli.records import ABSENT, Absent

PRODUCT_SIZE = 1536  # of the square products that the matrix-product rate is measured on
LARGE_MOMENTS = 1 << 30  # bytes, from which on processes divide them
STATUS = Path("/proc/self/status")
STATES = 3  # that training keeps of every parameter besides its value: its gradient and Adam's two moments
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BELOW = 1 << 30  # bytes; larger blocks still go back to the system at once


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def used_bytes(device: torch.device) -> int:
    """Memory of this process now, in bytes: resident, or what its tensors hold of a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _highest_resident()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had at once, in bytes, from its start on."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where the other is to be had: that one begins with the peak of the process that forked us.
    return _status("VmHWM") or _highest_resident()


def _status(key: str) -> int:
    if not STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024 if key in lines else 0


def _highest_resident() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Machine:
    """What a measurement has to be read with: the processor's name and cores, torch's threads, the versions of system,
    Python and torch, the device (cpu or cuda), and a GPU's name."""

    processor: str
    cores: int | None
    threads: int
    system: str
    python: str
    torch: str
    device: str
    gpu: str | Absent = ABSENT


def describe(device: torch.device) -> Machine:
    """This machine, for a measurement on `device`."""
    return Machine(
        processor=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        torch=torch.__version__,
        device=device.type,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else ABSENT,
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read next to this call is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two random `[PRODUCT_SIZE, PRODUCT_SIZE]` matrices: the product by which this machine's rate is measured."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype, device=device).unbind(0)
    return a, b


def training_bytes(parameters: int, element: int, processes: int = 1) -> int:
    """Bytes that `parameters` trained numbers of `element` bytes each take while they are trained, in each of so many
    `processes`.

    Their values, their gradients and Adam's two moments: what a run needs whatever its batch is.
    """
    return element * parameters + _trained_bytes(element * parameters, processes)


def state_bytes(module: nn.Module, processes: int = 1) -> int:
    """Bytes that training a module takes besides the module itself, in each of so many `processes`: the gradients and
    Adam's two moments of its trained parameters, which come into being with the first step."""
    return _trained_bytes(sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad), processes)


def divides_moments(parameters: int, processes: int) -> bool:
    """Whether so many `processes` divide the moments of trained parameters of so many bytes."""
    return processes > 1 and (STATES - 1) * parameters >= LARGE_MOMENTS


def _trained_bytes(parameters: int, processes: int) -> int:
    moments = (STATES - 1) * parameters
    return parameters + (math.ceil(moments / processes) if divides_moments(parameters, processes) else moments)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse freed blocks up to 1 GiB instead of returning them; True where it has heard it.

    With its defaults every tensor above 32 MiB is mapped anew and cleared page by page by the kernel.
    """
    if not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BELOW)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BELOW))
