"""A loaded model made fast on this machine, in the precision that is asked for."""

from __future__ import annotations

import torch

from .ctc import CtcModel
from .half import half_around_, half_linears_, multiplies_bfloat16
from .pack import pack_
from .quantized import INT8, dequantize_, pack_quantized_, quantize_, require_no_gates

DTYPES = ("auto", "float32", "bfloat16", INT8)
DEVICES = ("cpu", "cuda")
# compute capability of GPUs from which on they multiply bfloat16 (Ampere)
_BFLOAT16 = (8, 0)


def require_device(device: str) -> None:
    """Raises ValueError for a device that is not one of DEVICES, or not in this machine."""
    if device not in DEVICES:
        raise ValueError(f"device: found '{device}', expected one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device cuda: torch {torch.__version__} finds no GPU here; choose --device cpu, or install a torch for it"
        )


def prepare_(model: CtcModel, dtype: str = "auto", rows: int = 500, device: str = "cpu") -> str:
    """Lays a model out for fast inference on this CPU or GPU, in place, and returns the dtype of its products.

    dtype: "auto" is the one that the weights are stored in (bfloat16 only where the CPU multiplies it, else float32);
    "int8" also quantises a model of floats; "float32" and "bfloat16" run an int8 one with the weights that its integers
    stand for (bfloat16: with half the error, and twice the memory, of int8). rows: how many frames a call will mostly
    see. What int8 leaves, convolutions and attention, is computed in bfloat16 where the CPU has it. device: "cpu" or
    "cuda", where all of the network runs in the dtype (float32: with torch's default, convolutions in TF32), and an
    int8 model in bfloat16 ("auto", where the GPU has it) or float32.

    A prepared model runs at every operating point and in streams, but can be neither saved, trained, moved nor prepared
    again. One with gates stays in fp32 as it is. Raises ValueError for an unknown dtype, bfloat16 on a CPU without it,
    NaN or infinite weights to quantise, and, but for float32, a model with gates; for int8 on a GPU, and for a GPU
    that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found '{dtype}', expected one of {', '.join(DTYPES)}")
    require_device(device)
    if model.prepared:
        raise ValueError("the model is prepared already; load it again")
    if device != "cpu":
        return _move_(model, dtype, device)
    chosen = _automatic(model) if dtype == "auto" else dtype
    if chosen == "bfloat16" and not multiplies_bfloat16():
        raise ValueError(
            "dtype: bfloat16 was asked for, but this CPU has no instructions for it (AVX512-BF16, AMX, Arm BF16) and "
            "would be several times slower than in float32; choose float32, int8 or auto"
        )
    if chosen != "float32":
        require_no_gates(model, f"run in {chosen}")
    if chosen == INT8 and model.stored_dtype != INT8:
        quantize_(model)
    if chosen == INT8:
        pack_quantized_(model, rows)
    elif model.stored_dtype == INT8:
        dequantize_(model)
    if chosen == "bfloat16":
        half_linears_(model.backbone, rows)
    # as a whole only where it may be widened
    pack_(model if chosen == "float32" else model.backbone, rows)
    if chosen == "bfloat16" or chosen == INT8 and multiplies_bfloat16():
        half_around_(model.backbone, rows)
    model.prepared = True
    # modules that are new begin in training mode, with its dropout
    model.eval()
    return chosen


def _move_(model: CtcModel, dtype: str, device: str) -> str:
    """As `prepare_`, on a GPU."""
    if dtype == INT8:
        raise ValueError("dtype: int8 was asked for, which runs on CPUs; choose bfloat16 or float32 on a GPU")
    if dtype == "auto":
        halves = model.stored_dtype != "float32" and not model.config.prune_units
        dtype = "bfloat16" if halves and torch.cuda.get_device_capability() >= _BFLOAT16 else "float32"
    if dtype != "float32":
        require_no_gates(model, f"run in {dtype}")
    if model.stored_dtype == INT8:
        dequantize_(model)
    model.input_dtype = getattr(torch, dtype)
    model.to(device, model.input_dtype)
    model.prepared = True
    model.eval()
    return dtype


def _automatic(model: CtcModel) -> str:
    stored = model.stored_dtype
    if stored == "bfloat16" and (not multiplies_bfloat16() or model.config.prune_units):
        return "float32"
    return stored
