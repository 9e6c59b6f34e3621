"""Other implementations of wav2vec 2.0 with the weights of a CTC model of ours, to be compared with it.

Each function below makes one from a model as it was loaded (fp32, on the CPU, neither prepared nor quantised): a
function from waveforms (batch, samples), all samples of which are valid, to logits (batch, time, labels). Each raises
ValueError that says why where there is none: a package is missing, or that implementation lacks what the model has.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn

from ..export.huggingface import export_huggingface, lacking
from ..export.onnx import MODEL, export_onnx, open_session
from ..nn.config import EncoderConfig
from ..nn.operating_point import OperatingPoint
from ..runtime.ctc import CtcModel, normalized

Peer = Callable[[Tensor], Tensor]

_EXTRACTOR_MODES = {"group": "default", "layer": "layer_norm"}


def stock_fairseq(model: CtcModel, point: Optional[OperatingPoint] = None) -> StockFairseq:
    """fairseq's own Wav2Vec2Model with the CTC head, as a module; shared layers are there once for each depth."""
    try:
        wav2vec2 = importlib.import_module("fairseq.models.wav2vec.wav2vec2")
    except ImportError as error:
        raise ValueError(f"stock fairseq: not installed here ({error}): pip install fairseq-fixed") from error
    config, point = model.config, _at(model, point)
    reasons = lacking(config, point, "wav2vec2")
    if config.project_features and config.features_dim == config.dim:
        reasons.append(f"it has no projection between a frontend and a Transformer of {config.dim} channels both")
    if reasons:
        raise ValueError(f"stock fairseq cannot express this model: {'; '.join(reasons)}")
    try:
        stock = wav2vec2.Wav2Vec2Model(_stock_config(wav2vec2.Wav2Vec2Config, config))
    except RuntimeError as error:  # an activation that this fairseq does not know
        raise ValueError(f"stock fairseq cannot build this model: {error}") from error
    stock.remove_pretraining_modules()
    missing, unexpected = stock.load_state_dict(_unshared(model), strict=False)
    if unexpected or set(missing) - {"mask_emb"}:
        raise ValueError(
            "stock fairseq: the weights are not those of a plain fp32 model (quantised, or prepared for speed?): "
            f"missing {missing[:3]}, unknown {unexpected[:3]}; load the model that it was made from"
        )
    return StockFairseq(stock, model.head, model.normalize).eval().requires_grad_(False)


class StockFairseq(nn.Module):
    """fairseq's Wav2Vec2Model and a CTC head: see `stock_fairseq`."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, normalize: bool):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(head.in_features, head.out_features)
        self.head.load_state_dict(head.state_dict())
        self.normalize = normalize

    def forward(self, wave: Tensor) -> Tensor:
        """(batch, samples) -> (batch, time, labels)"""
        wave = normalized(wave) if self.normalize else wave
        return self.head(self.encoder(wave, mask=False, features_only=True)["x"])


def hugging_face(model: CtcModel, point: Optional[OperatingPoint] = None) -> HuggingFace:
    """transformers' Wav2Vec2ForCTC, or SEWForCTC for a squeezed model, with SDPA, as a module."""
    transformers = _import_transformers()
    with tempfile.TemporaryDirectory() as folder:
        name = export_huggingface(model, folder, str(_at(model, point)))
        theirs = getattr(transformers, name).from_pretrained(folder, attn_implementation="sdpa")
    return HuggingFace(theirs, model.normalize).eval().requires_grad_(False)


class HuggingFace(nn.Module):
    """A CTC model of transformers, its feature extractor's normalisation included: see `hugging_face`."""

    def __init__(self, model: nn.Module, normalize: bool):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, wave: Tensor) -> Tensor:
        """(batch, samples) -> (batch, time, labels)"""
        return self.model(normalized(wave) if self.normalize else wave).logits


def onnx_runtime(model: CtcModel, point: Optional[OperatingPoint] = None) -> OnnxRuntime:
    """onnxruntime on our export in fp32, on the CPU."""
    return OnnxRuntime(model, _at(model, point), int8=False)


def onnx_runtime_int8(model: CtcModel, point: Optional[OperatingPoint] = None) -> OnnxRuntime:
    """onnxruntime on our export with int8 Linears, on the CPU."""
    return OnnxRuntime(model, _at(model, point), int8=True)


class OnnxRuntime:
    """A graph of our export in onnxruntime, with as many threads as torch has in the call: see `onnx_runtime`."""

    def __init__(self, model: CtcModel, point: OperatingPoint, int8: bool):
        self._folder = tempfile.TemporaryDirectory()
        self._graph = Path(self._folder.name) / MODEL
        # whoever compares computes the difference anyway
        export_onnx(model, self._folder.name, str(point), int8=int8, check=False)
        self._threads, self._session = 0, None

    def __call__(self, wave: Tensor) -> Tensor:
        """(batch, samples) -> (batch, time, labels)"""
        if torch.get_num_threads() != self._threads:
            self._threads = torch.get_num_threads()
            self._session = open_session(self._graph, self._threads)
        lengths = torch.full((wave.size(0),), wave.size(1))
        return torch.from_numpy(self._session.run(["logits"], {"wave": wave.numpy(), "lengths": lengths.numpy()})[0])


# by the names that command lines have for them
PEERS: Dict[str, Callable[..., Peer]] = {
    "fairseq": stock_fairseq,
    "huggingface": hugging_face,
    "onnx": onnx_runtime,
    "onnx-int8": onnx_runtime_int8,
}


def _at(model: CtcModel, point: Optional[OperatingPoint]) -> OperatingPoint:
    return model.point if point is None else model.config.operating_points.check(point)


def _stock_config(config_class, config: EncoderConfig):
    """fairseq's configuration of a network that it can express."""
    return config_class(
        extractor_mode=_EXTRACTOR_MODES[config.extractor_norm],
        conv_feature_layers=str(list(config.conv_layers)),
        conv_bias=config.conv_bias,
        encoder_layers=config.depth,
        encoder_embed_dim=config.dim,
        encoder_ffn_embed_dim=config.ffn_of(0),
        encoder_attention_heads=config.heads_of(0),
        activation_fn=config.activation,
        layer_norm_first=config.norm_first,
        conv_pos=config.conv_pos,
        conv_pos_groups=config.conv_pos_groups,
        quantize_targets=False,
    )


def _unshared(model: CtcModel) -> Dict[str, Tensor]:
    """The backbone's weights with a layer for each depth; without the unsqueeze layer, which squeeze 1 does not use."""
    layers, state = "encoder.layers.", {}
    for name, value in model.backbone.state_dict().items():
        if name.startswith(layers):
            stored, _, rest = name[len(layers) :].partition(".")
            depths = [depth for depth, layer in enumerate(model.config.layer_map) if layer == int(stored)]
            state.update({f"{layers}{depth}.{rest}": value for depth in depths})
        elif not name.startswith("encoder.upsample."):
            state[name] = value
    return state


def _import_transformers():
    """transformers, with its warnings off."""
    # it looks for torchaudio, and fails where one is installed that does not fit this torch
    sys.modules.setdefault("torchaudio", None)
    try:
        transformers = importlib.import_module("transformers")
        importlib.import_module("safetensors")
    except ImportError as error:
        raise ValueError(f"Hugging Face: not installed here ({error}): pip install transformers safetensors") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
