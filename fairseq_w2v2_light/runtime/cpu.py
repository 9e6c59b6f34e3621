"""Which CPU this is, and numbers to try out what this torch can do on it."""

import functools
import platform
import re
from pathlib import Path
from typing import List, Sequence

import torch
from torch import Tensor


def cpu_name() -> str:
    """The CPU's model, as Linux names it; elsewhere its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else f"{platform.machine()} {platform.processor()}".strip()


@functools.lru_cache(maxsize=None)
def multiplies_by_mkl() -> bool:
    """Whether torch's own products in fp32 are fast: they are MKL's, which is slow on CPUs that are not Intel's."""
    return torch.backends.mkl.is_available() and "Intel" in cpu_name()


def random_tensors(*shapes: Sequence[int]) -> List[Tensor]:
    """Normal ones, the same in every call; the caller's random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]
