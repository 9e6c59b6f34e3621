"""How much memory a process really takes, and work in a process of its own, where nothing else adds to that."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import resource
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Callable, Optional

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, both of which can be pickled, computed by a new process.

    Raises what the function raises, and ChildProcessError when the process ends early. A script that calls this needs
    `if __name__ == "__main__"`: the new process imports it.
    """
    # not forked: a pool of threads that is in use does not survive that
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that measured memory ended early: see its messages, or it was killed for lack of memory"
            ) from error


def added_memory(work: Callable[[], Any]) -> Optional[int]:
    """Bytes that `work` adds at most to the resident memory of this process; None where the system does not say."""
    gc.collect()
    try:
        # memory that was freed before and not given back would be used again, unseen
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        _RESET.write_text("5")  # the peak begins anew
    except (OSError, AttributeError):  # not Linux, not glibc
        return None
    work()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    """Bytes of memory of this process: now (VmRSS), or at their peak (VmHWM)."""
    if _STATUS.exists():
        return int(re.search(rf"^{key}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE).group(1)) * 2**10
    # macOS has no /proc, and says the peak in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
