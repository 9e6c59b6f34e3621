"""Linears with int8 weights: a quarter of the bytes, and products of integers, which a CPU computes faster.

Weights are quantised once, symmetrically, each output channel with its own scale (Shrinking Bigfoot, arXiv 2103.15760,
quantises every Linear of the network dynamically; convolutions and norms stay as they are, and so does the CTC head
here, which is small). Activations are quantised in every call, each frame with its own scale and offset. torch's own
dynamic Linears take one scale for a whole batch, so that the text of an utterance would depend on its neighbours and
their padding; here it does not.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple, Optional, Protocol, Tuple

import torch
from torch import Tensor, nn

from ..nn.gates import Gates
from ..nn.squeeze import Unsqueeze
from .cpu import random_tensors
from .ctc import CtcModel, require_finite
from .unsqueeze import WholeUnsqueeze

INT8 = "int8"
# of a weight: symmetric, so that no sum of two products of bytes leaves 16 bits at 127 levels of the activations
_LARGEST = 127


def quantize_weight(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """int8 values (out, in) and fp32 scales (out,) of a weight (out, in): weight is about values * scales[:, None].

    The largest magnitude of each row becomes 127; a row of zeros has scale 0. Raises ValueError for NaN and infinity.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("NaN or infinite weights cannot be quantised; take a checkpoint from before training diverged")
    largest = weight.abs().amax(dim=1) if weight.numel() else weight.new_zeros(len(weight))
    # in double: scales of rows near the smallest float would be denormal, and their quotients coarse
    scale = largest.double() / _LARGEST
    values = torch.round(weight.double() / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None])
    return values.clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale.float()


class QuantizedLinear(nn.Module):
    """nn.Linear with int8 weights, for inference on a CPU; fp32 (or bf16) in, fp32 out.

    State names: weight (out, in) int8, weight_scale (out,) fp32, bias (out,) fp32 where the Linear has one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._product: Optional[Product] = None

    @classmethod
    def like(cls, linear: nn.Linear) -> QuantizedLinear:
        """One of the shape of a Linear, without values (on the meta device)."""
        with torch.device("meta"):
            return cls(linear.in_features, linear.out_features, linear.bias is not None)

    @classmethod
    def of(cls, linear: nn.Linear) -> QuantizedLinear:
        """A Linear, quantised; raises ValueError when its weight has NaN or infinite values."""
        quantized = cls.like(linear)
        quantized.weight, quantized.weight_scale = quantize_weight(linear.weight)
        quantized.bias = None if linear.bias is None else linear.bias.detach().float().clone()
        return quantized

    def dequantized(self) -> nn.Linear:
        """The fp32 Linear whose weights are exactly those that the int8 values stand for."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(self.weight.float() * self.weight_scale[:, None], requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    def pack_(self, rows: int) -> None:
        """Lays the weight out for inputs of about `rows` frames, and frees it: it can be saved no more."""
        self._product = best_method().make(self, rows)
        self.weight = self.weight.new_empty(0, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self._product is None:
            self._product = best_method().make(self, max(1, x[..., 0].numel()))
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.float32)
        return self._product(x.float().reshape(-1, self.in_features)).unflatten(0, x.shape[:-1])

    def _apply(self, function, recurse=True):
        self._product = None  # it does not move
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args):
        self._product = None
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Product(Protocol):
    """A QuantizedLinear laid out for one way to compute it: (rows, in) -> (rows, out), fp32."""

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), at least one row."""


class _IntegerProduct:
    """The product of bytes, in oneDNN.

    A row x of activations is about scale * bytes + offset, so that its product with the weights w is
    scale * (w bytes) + offset * (sum of w) + bias.
    """

    def __init__(self, linear: QuantizedLinear, rows: int, levels: int, fp32_output):
        self._packed = torch.ops.onednn.qlinear_prepack(linear.weight.contiguous(), [rows, linear.in_features])
        self._scale = linear.weight_scale.contiguous()
        self._zeros = torch.zeros(linear.out_features, dtype=torch.long)
        self._sums = linear.weight.sum(dim=1, dtype=torch.int64) * self._scale
        self._bias = linear.bias
        self._levels = levels
        self._fp32_output = fp32_output

    def __call__(self, x: Tensor) -> Tensor:
        values, scale, offset = quantize_rows(x, self._levels)
        y = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, 0, self._packed, self._scale, self._zeros, None, 1.0, 0, self._fp32_output, "none", [], ""
        )
        y = y.mul_(scale) if self._bias is None else torch.addcmul(self._bias, y, scale, out=y)
        return y.addcmul_(offset, self._sums)


class _FloatProduct:
    """The product in fp32, with the same weights."""

    def __init__(self, linear: QuantizedLinear, rows: int):
        self._linear = linear.dequantized()

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x)


def quantize_rows(x: Tensor, levels: int = 255) -> Tuple[Tensor, Tensor, Tensor]:
    """Bytes (rows, channel), scales (rows, 1), offsets (rows, 1) of fp32 rows: x is about bytes * scale + offset.

    The smallest value of a row becomes 0, the largest `levels`.
    """
    if levels == 255 and _has_row_quantizer():
        packed = torch.ops.quantized.embedding_bag_byte_prepack(x)
        # a copy, also of a single row, which begins where four bytes may
        ends = packed[:, -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return packed[:, :-8], ends[:, :1], ends[:, 1:]
    smallest, largest = torch.aminmax(x, dim=1, keepdim=True)
    scale = (largest - smallest) / levels
    steps = (x - smallest).div_(scale.clamp(min=torch.finfo(torch.float32).tiny))
    return steps.round_().to(torch.uint8), scale, smallest


@functools.lru_cache(maxsize=None)
def _has_row_quantizer() -> bool:
    """Whether this torch quantises rows in one pass (for embeddings; several times faster than its parts)."""
    (x,) = random_tensors((3, 16))
    try:
        packed = torch.ops.quantized.embedding_bag_byte_prepack(x)
        ends = packed[:, -8:].contiguous().view(torch.float32)
        return torch.allclose(packed[:, :-8] * ends[:, :1] + ends[:, 1:], x, atol=0.05)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


class Method(NamedTuple):
    """A way to compute QuantizedLinears on this machine; `make` is given the Linear and the rows it will see."""

    name: str
    make: Callable[[QuantizedLinear, int], Product]


@functools.lru_cache(maxsize=None)
def best_method() -> Method:
    """The fastest way that gives the right results here.

    CPUs without instructions for products of bytes (VNNI, AMX) add two such products in 16 bits, which overflow with
    255 levels of activations, but not with 127. Where torch has no such product at all it is computed in fp32.
    """
    for levels in (255, 127):
        for fp32_output in (torch.float32, True):  # True: torch 2.1
            make = functools.partial(_IntegerProduct, levels=levels, fp32_output=fp32_output)
            if _is_right(make, levels):
                return Method(f"int8 products, {levels + 1} levels", make)
    return Method("fp32 products", _FloatProduct)


def _is_right(make: Callable[[QuantizedLinear, int], Product], levels: int) -> bool:
    """Whether a way to compute a Linear computes it, with the largest sums that there are, too."""
    weight, x = random_tensors((32, 128), (5, 128))
    linear = nn.utils.skip_init(nn.Linear, 128, 32)
    linear.bias.data.zero_()
    linear.weight.data = weight
    linear.weight.data[:2] = torch.tensor([[1.0], [-1.0]])
    x[0], x[0, 0] = 1.0, 0.0
    linear = QuantizedLinear.of(linear)
    values, scale, offset = quantize_rows(x, levels)
    with torch.no_grad():
        expected = linear.dequantized()(values * scale + offset)
        try:
            found = make(linear, len(x))(x)
        except (AttributeError, RuntimeError, NotImplementedError, TypeError, ValueError):
            return False
    return found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def quantize_(model: CtcModel) -> CtcModel:
    """Quantises the Linears of a network in place, but not its CTC head; returns the model.

    A layer that serves several depths is quantised once. Raises ValueError for NaN or infinite weights, and names
    their parameter, and for a model that is quantised already, prepared, or has gates.
    """
    if model.stored_dtype == INT8:
        raise ValueError("the model is quantised already")
    require_no_gates(model, "quantised")
    require_finite(model, "quantize")
    _replace(model.backbone, QuantizedLinear.of)
    model.stored_dtype = INT8
    return model


def shape_quantized_(model: CtcModel) -> CtcModel:
    """As `quantize_`, of a model without values (on the meta device): the names and dtypes of a quantised one."""
    _replace(model.backbone, QuantizedLinear.like)
    model.stored_dtype = INT8
    return model


def dequantize_(model: CtcModel) -> CtcModel:
    """Turns int8 weights into the fp32 ones that they stand for, in place; returns the model."""
    _restore(model.backbone)
    model.stored_dtype = "float32"
    return model


def pack_quantized_(model: nn.Module, rows: int) -> None:
    """Lays all int8 weights out for inputs of about `rows` frames, in place: they can be saved no more."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.pack_(rows)


def require_no_gates(model: nn.Module, purpose: str) -> None:
    """Raises ValueError for a model with gates, which change its weights in every call."""
    if any(isinstance(module, Gates) for module in model.modules()):
        raise ValueError(
            f"the model has gates, and cannot be {purpose}; remove what they closed first: w2v2-light prune CHECKPOINT "
            "OUT"
        )


def _replace(module: nn.Module, make: Callable[[nn.Linear], QuantizedLinear]) -> None:
    """Puts `make(linear)` in the place of every Linear, however deep."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        elif isinstance(child, Unsqueeze):
            setattr(module, name, WholeUnsqueeze(child, make(child[0])))
        else:
            _replace(child, make)


def _restore(module: nn.Module) -> None:
    """Undoes `_replace`."""
    for name, child in module.named_children():
        if isinstance(child, QuantizedLinear):
            setattr(module, name, child.dequantized())
        elif isinstance(child, WholeUnsqueeze):
            with torch.device("meta"):
                unsqueeze = Unsqueeze(child.dim, child.factor, child.residual)
            unsqueeze[0] = child.linear.dequantized()
            setattr(module, name, unsqueeze)
        else:
            _restore(child)
