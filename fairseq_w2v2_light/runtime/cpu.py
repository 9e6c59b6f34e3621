"""Which CPU this is."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The CPU's model, as Linux names it; elsewhere its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else f"{platform.machine()} {platform.processor()}".strip()
