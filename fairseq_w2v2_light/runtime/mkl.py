"""Products with a weight that MKL orders once, on Intel's CPUs with few threads the fastest that torch has in fp32.

torch offers them for one number of rows, which a weight is ordered for. The order does not depend on that number in
what it means, only in how it is divided among threads, and Paddle's recurrent layers rely on the same. MKL's manual
promises nothing for other numbers, so `mkl_serves` tries some.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import multiplies_by_mkl

# an order for so many rows is the fastest for 100 to 1000 of them, and as fast as any for fewer
_ROWS = 250
# with 8 and more, on 16 cores, oneDNN's products took 3 to 7 % less time, with up to 4 as much more
_MOST_THREADS = 4


class MklWeight:
    """The (out, in) weight of a Linear, fp32, in MKL's order; for as many threads as torch has when it is made.

    With more threads it is ordered again; with fewer it is nearly as fast as one that was made for them.
    """

    def __init__(self, weight: Tensor):
        self.shape = weight.shape
        self._order(weight)

    def _order(self, weight: Tensor) -> None:
        # for more rows than columns, MKL divides the rows among threads: fewer rows then take twice as long
        rows = max(1, min(_ROWS, 2 * weight.size(0) // 3))
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), torch.get_num_threads()

    def linear(self, x: Tensor, bias: Optional[Tensor]) -> Tensor:
        """(..., in) -> (..., out), as F.linear."""
        if torch.get_num_threads() > self._packed[1]:
            self._order(self.unpacked())
        return self._product(x, bias)

    def unpacked(self) -> Tensor:
        """The (out, in) weight."""
        return self._product(torch.eye(self.shape[1]), None).t().contiguous()

    def _product(self, x: Tensor, bias: Optional[Tensor]) -> Tensor:
        # of the weight as it was, torch reads the shape alone
        shape = x.new_empty(1).expand(self.shape)
        return torch.ops.mkl._mkl_linear(x, self._packed[0], shape, bias, x.numel() // self.shape[1])


def mkl_serves(outputs: int, inputs: int) -> bool:
    """Whether MKL's product with an (out, in) weight is there, is for this CPU, and right for any number of rows."""
    threads = torch.get_num_threads()
    return threads <= _MOST_THREADS and _serves(outputs, inputs, threads)


@functools.lru_cache(maxsize=None)
def _serves(outputs: int, inputs: int, threads: int) -> bool:
    if not multiplies_by_mkl():
        return False
    generator = torch.Generator().manual_seed(0)
    # of variance 1; normal ones take several times as long to draw, which would be felt when a model is loaded
    weight, bias, x = (
        (torch.rand(shape, generator=generator) - 0.5) * 12**0.5
        for shape in ((outputs, inputs), (outputs,), (4 * _ROWS + 3, inputs))
    )
    expected = F.linear(x, weight, bias)
    try:
        ordered = MklWeight(weight)
        for rows in (1, 7, 64, _ROWS, x.size(0)):
            found = ordered.linear(x[:rows], bias)
            if not torch.allclose(found, expected[:rows], rtol=1e-4, atol=1e-5 * inputs**0.5):
                return False
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True
