"""How much memory inference takes: the most bytes of activations that are alive at once, found by a dry run."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Dict, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..nn.backbone import Backbone
from ..nn.config import EncoderConfig
from ..nn.operating_point import OperatingPoint
from ..nn.streaming import Stream
from ..runtime.ctc import normalized

# what a stream does again and again after it has heard its left context: memory moves to new storage and fills it up
_STEPS_OF_A_STREAM = 8


class LiveMemory(TorchDispatchMode):
    """While active, counts the bytes of the tensors that are alive, of those that torch's operations return.

    Views and results in place are no new memory, nor are the tensors of `excluded` (a model's parameters). What an
    operation allocates inside, and frees before it returns, is not seen. peaks: part -> the most bytes that were alive
    at once since `begin(part)`.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()):
        super().__init__()
        self.live = 0
        self.peaks: Dict[str, int] = {}
        self._part = ""
        self._excluded = list(excluded)
        self._excluded_keys = {tensor.untyped_storage()._cdata for tensor in self._excluded}
        # storage -> how many tensors see it
        self._tensors: Dict[int, int] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.peaks.values(), default=0)

    def begin(self, part: str) -> None:
        """Counts from here on as `part`; what is alive already counts to it."""
        self._part = part
        self._note(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self._watch(value)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded_keys:
            return
        if key not in self._tensors:
            self._tensors[key] = 0
            self._note(storage.nbytes())
        self._tensors[key] += 1
        # of the tensor: torch 2.1 tells of the death of a storage late
        weakref.finalize(tensor, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.live -= size

    def _note(self, size: int) -> None:
        self.live += size
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self.live)


def activation_memory(
    config: EncoderConfig, samples: int, point: OperatingPoint, vocabulary: int = 0, normalizes: bool = False
) -> Dict[str, int]:
    """The most bytes of activations alive at once in inference, batch 1, fp32: in the frontend, in the Transformer.

    From the waveform, which counts, to the logits of `vocabulary` labels (0: to the frames), on a CPU, of the network
    as it stands, not laid out by `prepare_`, without gates. At a point with a chunk: of a stream, its state included.
    The network really runs, on tensors without values, so that this takes neither the memory nor the time.
    Attention counts as the CPU's kernel computes it: without a map, unless it has one (a mask; maps that layers share).
    Buffers inside of kernels are not counted. Raises ValueError for audio that is too short for a frame.
    """
    config = replace(config, prune_units=())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = Backbone(config).eval()
        head = nn.Linear(config.dim, vocabulary) if vocabulary else nn.Identity()
        return measure_activations(backbone, head, samples, point, normalizes)


def measure_activations(
    backbone: Backbone, head: nn.Module, samples: int, point: OperatingPoint, normalizes: bool = False
) -> Dict[str, int]:
    """As `activation_memory`, of modules in eval mode that are there, with their values or without."""
    parts = nn.ModuleDict({"backbone": backbone, "head": head})
    memory = LiveMemory([*parts.parameters(), *parts.buffers()])
    hook = backbone.encoder.pos_conv.register_forward_pre_hook(lambda *_: memory.begin("transformer"))
    try:
        with memory, torch.no_grad():
            if point.chunk:
                _run_stream(backbone, head, samples, point, memory)
            else:
                memory.begin("frontend")
                wave = torch.zeros(1, samples)
                heard = normalized(wave) if normalizes else wave
                head(backbone.encode(heard, None, point, keep_layers=False)[0].x)
    finally:
        hook.remove()
    return memory.peaks


def _run_stream(backbone: Backbone, head: nn.Module, samples: int, point: OperatingPoint, memory: LiveMemory) -> None:
    """Hears `samples` in steps, or as many as bring it to what it does from then on."""
    memory.begin("frontend")
    stream = Stream(backbone, point)
    state = stream.start()
    steps = backbone.config.left_context // point.chunk + _STEPS_OF_A_STREAM
    while samples >= stream.samples_needed(state) and steps:
        needed = stream.samples_needed(state)
        memory.begin("frontend")
        frames, state = stream.step(torch.zeros(1, needed), state)
        head(frames)
        del frames
        samples, steps = samples - needed, steps - 1
    if steps:
        memory.begin("frontend")
        head(stream.finish(torch.zeros(1, samples), state))
