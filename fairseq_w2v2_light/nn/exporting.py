"""Whether a call runs, or is recorded as a graph for audio of any length (torch.export, ONNX)."""

from __future__ import annotations

import torch

# torch before 2.7 only knows whether it compiles or exports, before 2.2 neither
_is_exporting = getattr(torch.compiler, "is_exporting", None) or getattr(torch.compiler, "is_compiling", bool)


def is_exporting() -> bool:
    """Whether torch.export records this call.

    The graph serves other lengths and values than those of the example, so that nothing may be decided by them: no
    check of the input, no short cut for a batch without padding.
    """
    return _is_exporting()
