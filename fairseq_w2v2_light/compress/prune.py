"""Physical pruning: what closed gates left of a checkpoint, as an ordinary smaller one that computes the same.

The factor of an open gate goes into the weights that make its unit, so that nothing of the gates stays.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ..files import atomic_path
from ..models.checkpoint import CTC_ENCODER, CTC_MODELS, EncoderCheckpoint, load_encoder, load_state, model_name
from ..models.w2v2_light import PRETRAINING_HEADS, W2V2LightModel, network_config
from ..nn.config import EncoderConfig
from ..nn.gates import Gates
from ..nn.gating import GateValues
from .checkpoint import ctc_config, fresh_state, require_weights

Weights = Dict[str, Tensor]
_CTC_HEAD = "w2v_encoder.proj."
# what light_prune trains besides, by its key `loss`, and the criterion that trains that alone
_CRITERIONS = {"ctc": "ctc", "contrastive": "light_contrastive", "distill": "light_distill"}


class Kept(NamedTuple):
    """What is left of a dimension of `size` channels.

    index: (kept,) the channels, in order. factor: (kept,) fp32, what each of them is multiplied with.
    """

    index: Tensor
    factor: Tensor
    size: int

    @property
    def count(self) -> int:
        """How many are left."""
        return len(self.index)

    @property
    def is_all(self) -> bool:
        """Whether every channel is left, and none has a factor."""
        return self.count == self.size and bool((self.factor == 1).all())

    @property
    def unscaled(self) -> "Kept":
        """The same channels, where other weights have the factors."""
        return self._replace(factor=torch.ones_like(self.factor))

    def take(self, weight: Tensor, dim: int = 0) -> Tensor:
        """The kept channels of `weight` along `dim`."""
        return weight.index_select(dim, self.index)

    def fold(self, weight: Tensor, dim: int = 0) -> Tensor:
        """The kept channels of `weight` along `dim`, times their factors."""
        shape = [1] * weight.dim()
        shape[dim] = -1
        return self.take(weight, dim) * self.factor.view(shape)

    def spread(self, channels: int) -> "Kept":
        """Of a dimension with `channels` neighbours for each one of this: a head's channels."""
        index = self.index.unsqueeze(1) * channels + torch.arange(channels)
        return Kept(index.flatten(), self.factor.repeat_interleave(channels), self.size * channels)

    def repeated(self, times: int) -> "Kept":
        """Of a dimension that is this one `times` over: the blocks of the unsqueeze layer."""
        index = self.index + self.size * torch.arange(times).unsqueeze(1)
        return Kept(index.flatten(), self.factor.repeat(times), self.size * times)


class KeptUnits(NamedTuple):
    """What is left of a network: of each frontend layer, of each stored layer's heads and FFN, between the layers."""

    conv: List[Kept]
    heads: List[Kept]
    ffn: List[Kept]
    hidden: Kept


@dataclass(frozen=True)
class Pruned:
    """What `prune_checkpoint` did.

    model: the kind of checkpoint that was written. before, after: the complete `model` sections of its encoder.
    vocabulary: labels of its CTC head (0: a pre-training checkpoint). pretraining_heads: of a CTC model that kept them.
    """

    model: str
    before: DictConfig
    after: DictConfig
    vocabulary: int
    pretraining_heads: bool = False


def prune_checkpoint(source, target) -> Pruned:
    """Writes what the gates of the checkpoint `source` leave to `target`: the same outputs from fewer weights.

    The gates are those of evaluation (`Gates.decided`). A pre-training checkpoint stays one, a CTC one becomes a
    `light_ctc` checkpoint; both without gates, and as if after no update. Weights keep their dtype. Raises ValueError
    for a checkpoint without gates, of another model, that lacks weights or has ones that are not finite, and for a
    target that cannot be written.
    """
    _check_target(source, target)
    state = load_state(source)
    start = load_encoder(source)
    is_ctc = model_name(state["cfg"]) in CTC_MODELS
    pretraining_heads = is_ctc and bool(state["cfg"].model.get("keep_pretraining_heads", False))
    _require_gates(start, source)
    require_weights(start, is_ctc, source)
    _require_fit(start.model, start.cfg.model, is_ctc and not pretraining_heads, f"'{source}'")

    before, network = start.cfg.model, network_config(start.cfg.model)
    kept = kept_units(network, decided_gates(start.model, network))
    weights, changes = prune_weights(start.model, network, kept)
    after = OmegaConf.merge(before, {**changes, **_explicit_keys(before)})
    _require_fit(weights, after, is_ctc and not pretraining_heads, f"'{source}': what pruning left of it")

    encoder_cfg = OmegaConf.create({**OmegaConf.to_container(start.cfg), "model": OmegaConf.to_container(after)})
    cfg = ctc_config(state["cfg"], encoder_cfg) if is_ctc else OmegaConf.to_container(encoder_cfg, enum_to_str=True)
    cfg["criterion"] = _ungated_criterion(cfg.get("criterion"))
    vocabulary = 0
    if is_ctc:
        head = prune_reader(start.head, kept.hidden)
        weights = {**_named(CTC_ENCODER, weights), **_named(_CTC_HEAD, head)}
        vocabulary = head["weight"].size(0)
    with atomic_path(target) as temporary:
        torch.save(fresh_state(cfg, weights, dict(state.get("task_state") or {})), temporary)
    return Pruned(cfg["model"]["_name"], before, after, vocabulary, pretraining_heads)


def _check_target(source, target) -> None:
    target = Path(target)
    if target.is_dir():
        raise ValueError(f"'{target}': a folder; name the checkpoint to write, e.g. {target / 'pruned.pt'}")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ValueError(f"'{target}': the pruned checkpoint would overwrite its source; choose another name")


def _require_gates(start: EncoderCheckpoint, source) -> None:
    if not start.cfg.model.prune_units:
        raise ValueError(
            f"'{source}': found no gates (model.prune_units is empty), which say what to remove; train it with "
            "criterion light_prune first, as config/pruning/hj_mac.yaml does"
        )


def _ungated_criterion(criterion: Optional[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The criterion of a run without gates, which fairseq-validate takes from the checkpoint."""
    if not criterion or criterion.get("_name") != "light_prune":
        return criterion
    name = _CRITERIONS[criterion["loss"]]
    known = CRITERION_DATACLASS_REGISTRY[name].__dataclass_fields__
    return {**{key: value for key, value in criterion.items() if key in known}, "_name": name}


def _explicit_keys(model: DictConfig) -> Dict[str, Any]:
    """Keys that would follow from encoder_embed_dim otherwise."""
    return {"final_dim": model.encoder_embed_dim} if model.final_dim <= 0 else {}


def _require_fit(weights: Weights, model_cfg: DictConfig, without_heads: bool, what: str) -> None:
    """Raises ValueError that names `what` unless `weights` are all that the model has, and nothing else."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = W2V2LightModel(model_cfg)
    if without_heads:
        model.remove_pretraining_modules()
    try:
        # fairseq's own has no `assign`
        torch.nn.Module.load_state_dict(model, weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: not the model that its configuration describes: {reason}") from error


def decided_gates(weights: Weights, config: EncoderConfig) -> GateValues:
    """The gates of evaluation that an encoder's state dict holds; `config` is that of the gated network."""
    gates = Gates(config)
    gates.load_state_dict(_within(weights, "gates."))
    return gates.decided()


def kept_units(config: EncoderConfig, gates: GateValues) -> KeptUnits:
    """What `gates` leave of a network; everything of units without gates.

    A frontend layer, or the channels between the layers, of which nothing is open keep one channel with factor 0: a
    network without channels is none.
    """
    stored = range(config.unique_layers)
    widths = [channels for channels, _, _ in config.conv_layers]
    return KeptUnits(
        [_kept(gates.conv and gates.conv[index], width, 1) for index, width in enumerate(widths)],
        [_kept(gates.heads and gates.heads[index], config.heads_of(index)) for index in stored],
        [_kept(gates.ffn and gates.ffn[index], config.ffn_of(index)) for index in stored],
        _kept(gates.hidden, config.dim, 1),
    )


def _kept(gate: Optional[Tensor], size: int, fewest: int = 0) -> Kept:
    if gate is None:
        return Kept(torch.arange(size), torch.ones(size), size)
    gate = gate.detach().float().cpu()
    index = (gate > 0).nonzero().flatten()
    if len(index) < fewest:
        index = torch.arange(fewest)
    return Kept(index, gate[index], size)


def prune_weights(weights: Weights, config: EncoderConfig, kept: KeptUnits) -> Tuple[Weights, Dict[str, Any]]:
    """An encoder's state dict without what is closed, and the model keys that describe the smaller network.

    `config` is that of the gated network. Factors are folded in fp32; every tensor keeps its dtype. Raises ValueError
    for a quantiser whose own width depends on the frontend's.
    """
    dtypes = {name: value.dtype for name, value in weights.items()}
    usual = dtypes["encoder.layer_norm.weight"]
    weights = {name: value.detach().float() for name, value in weights.items()}
    features, hidden = kept.conv[-1], kept.hidden
    # without a projection, closed channels are gone where the encoder starts, but factors are not there yet
    entry = hidden if config.projects else hidden._replace(factor=(hidden.factor > 0).float())
    pruned = {
        "mask_emb": entry.fold(weights["mask_emb"]),
        **_named("feature_extractor.", prune_frontend(_within(weights, "feature_extractor."), kept.conv)),
        **_named("layer_norm.", prune_norm(_within(weights, "layer_norm."), features)),
        **_named("post_extract_proj.", prune_projection(_within(weights, "post_extract_proj."), features, entry)),
        **_named("encoder.pos_conv.0.", prune_positions(_within(weights, "encoder.pos_conv.0."), config, hidden)),
        **_named("encoder.layer_norm.", prune_norm(_within(weights, "encoder.layer_norm."), hidden)),
        **_named("encoder.upsample.0.", prune_unsqueeze(_within(weights, "encoder.upsample.0."), config, hidden)),
        **prune_pretraining_heads(weights, features, hidden),
    }
    for index, (heads, ffn) in enumerate(zip(kept.heads, kept.ffn)):
        prefix = f"encoder.layers.{index}."
        pruned.update(_named(prefix, prune_layer(_within(weights, prefix), config, heads, ffn, hidden)))
    changes = changed_keys(config, kept, "post_extract_proj.weight" in pruned)
    return {name: value.to(dtypes.get(name, usual)) for name, value in pruned.items()}, changes


def changed_keys(config: EncoderConfig, kept: KeptUnits, projects: bool) -> Dict[str, Any]:
    """The model keys of the smaller network; `projects`: whether it has a Linear between frontend and Transformer."""
    conv, hidden = [layer.count for layer in kept.conv], kept.hidden.count
    changes: Dict[str, Any] = {"prune_units": [], "project_features": projects and conv[-1] == hidden}
    if conv != [channels for channels, _, _ in config.conv_layers]:
        shapes = [(channels, kernel, stride) for channels, (_, kernel, stride) in zip(conv, config.conv_layers)]
        changes["conv_feature_layers"] = str(shapes)
        changes["conv_norm_dims"] = list(config.conv_norm_dims) or [channels for channels, _, _ in config.conv_layers]
    for key, units in (("layer_heads", kept.heads), ("layer_ffn", kept.ffn)):
        if any(unit.count < unit.size for unit in units):
            changes[key] = [unit.count for unit in units]
    if hidden != config.dim:
        groups = [channels.count for _, channels in _position_groups(config, kept.hidden)]
        changes.update(
            encoder_embed_dim=hidden,
            head_dim=config.head_size,
            norm_dim=config.norm_dim or config.dim,
            conv_pos_groups=len(groups),
            conv_pos_group_dims=groups if len(set(groups)) > 1 else [],
        )
    return changes


def prune_frontend(weights: Weights, conv: Sequence[Kept]) -> Weights:
    """The frontend's layers, each hearing what is left of the one before."""
    pruned: Weights = {}
    before = None
    for index, channels in enumerate(conv):
        prefix = f"conv_layers.{index}."
        pruned.update(_named(prefix, _prune_convolution(_within(weights, prefix), before, channels)))
        before = channels
    return pruned


def _prune_convolution(weights: Weights, before: Optional[Kept], channels: Kept) -> Weights:
    # a GroupNorm takes factors of its own channels out again: there is no gate before it
    produced = channels.take if "2.weight" in weights else channels.fold
    pruned = {name: (produced if name.startswith("0.") else channels.fold)(value) for name, value in weights.items()}
    if before is not None:
        pruned["0.weight"] = before.take(pruned["0.weight"], 1)
    return pruned


def prune_norm(weights: Weights, channels: Kept) -> Weights:
    """A norm whose output has gates."""
    return {name: channels.fold(value) for name, value in weights.items()}


def prune_projection(weights: Weights, features: Kept, entry: Kept) -> Weights:
    """The Linear between frontend and Transformer; a selection where there was none, but one is needed now."""
    if not weights:
        if torch.equal(features.index, entry.index):
            return {}
        weights = {"weight": torch.eye(entry.size), "bias": torch.zeros(entry.size)}
    return _prune_linear(weights, features.unscaled, entry)


def prune_positions(weights: Weights, config: EncoderConfig, hidden: Kept) -> Weights:
    """The positional convolution; groups that keep unequally many channels are padded with zeros to the largest.

    Its weights are normalised anew (as for causal ones, nn.positions.causal_weights); a tap of zeros has g = 0.
    """
    if hidden.is_all:
        return weights
    groups = _position_groups(config, hidden)
    v = weights["weight_v"].double()
    whole = v * (weights["weight_g"].double() / torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True))
    before, after = whole.size(1), max(channels.count for _, channels in groups)
    kernel = whole.new_zeros(len(groups) * after, after, whole.size(2))
    bias = weights["bias"].new_zeros(len(groups) * after)
    for place, (number, channels) in enumerate(groups):
        source = slice(number * before, number * before + before)
        target = slice(place * after, place * after + channels.count)
        kernel[target, : channels.count] = channels.take(channels.fold(whole[source]), 1)
        bias[target] = channels.fold(weights["bias"][source])
    norm = torch.linalg.vector_norm(kernel, dim=(0, 1), keepdim=True)
    # any direction, but one: zeros cannot be normalised
    direction = torch.where(norm > 0, kernel, torch.ones_like(kernel))
    return {"weight_g": norm.float(), "weight_v": direction.float(), "bias": bias}


def _position_groups(config: EncoderConfig, hidden: Kept) -> List[Tuple[int, Kept]]:
    """What is left of each group of the positional convolution, and its number; without those that are gone."""
    dims = config.conv_pos_group_dims or (config.dim // config.conv_pos_groups,) * config.conv_pos_groups
    groups, start = [], 0
    for number, dim in enumerate(dims):
        inside = (hidden.index >= start) & (hidden.index < start + dim)
        if bool(inside.any()):
            groups.append((number, Kept(hidden.index[inside] - start, hidden.factor[inside], dim)))
        start += dim
    return groups


def prune_unsqueeze(weights: Weights, config: EncoderConfig, hidden: Kept) -> Weights:
    """The unsqueeze layer's blocks, one for each sub-frame."""
    return _prune_linear(weights, hidden.unscaled, hidden.repeated(config.unsqueeze_factor)) if weights else {}


def prune_layer(weights: Weights, config: EncoderConfig, heads: Kept, ffn: Kept, hidden: Kept) -> Weights:
    """A Transformer layer without the blocks of which nothing is left; in post-LN their norms stay."""
    pruned: Weights = {}
    for block, units, norm, prune in (
        ("self_attn.", heads.spread(config.head_size), "self_attn_layer_norm.", prune_attention),
        ("", ffn, "final_layer_norm.", prune_ffn),
    ):
        if units.count:
            pruned.update(_named(block, prune(_within(weights, block), units, hidden)))
        if units.count or not config.norm_first:
            pruned.update(_named(norm, prune_norm(_within(weights, norm), hidden)))
    return pruned


def prune_attention(weights: Weights, inner: Kept, hidden: Kept) -> Weights:
    """Self-attention; `inner` are the channels of all its heads."""
    pruned = _named("out_proj.", _prune_linear(_within(weights, "out_proj."), inner, hidden))
    for name in ("q_proj.", "k_proj.", "v_proj."):
        pruned.update(_named(name, _prune_linear(_within(weights, name), hidden.unscaled, inner.unscaled)))
    return pruned


def prune_ffn(weights: Weights, inner: Kept, hidden: Kept) -> Weights:
    """The feed-forward block: its two Linears, fc1 and fc2."""
    return {
        **_named("fc1.", _prune_linear(_within(weights, "fc1."), hidden.unscaled, inner.unscaled)),
        **_named("fc2.", _prune_linear(_within(weights, "fc2."), inner, hidden)),
    }


def _prune_linear(weights: Weights, before: Kept, after: Kept) -> Weights:
    """A Linear from what is left of `before` to what is left of `after`."""
    return {"weight": before.fold(after.fold(weights["weight"]), 1), "bias": after.fold(weights["bias"])}


def prune_reader(weights: Weights, before: Kept) -> Weights:
    """A head that hears gated channels and has none of its own: a Linear, or SEW's projection (nn.heads)."""
    return {
        name: before.take(value, 1) if name in ("weight", "net.0.weight") else value for name, value in weights.items()
    }


def prune_pretraining_heads(weights: Weights, features: Kept, hidden: Kept) -> Weights:
    """Quantiser and projections of pre-training, those that there are."""
    heads = {name: value for name, value in weights.items() if name.startswith(PRETRAINING_HEADS)}
    quantizes = any(name.startswith("quantizer.") for name in heads)
    first = "quantizer.weight_proj." if quantizes else "project_q."
    if quantizes and f"{first}weight" not in heads and features.count < features.size:
        raise ValueError(
            "model.quantizer_depth: found more than 1, where the quantiser's inner width follows from the frontend's; "
            "pruning 'conv' needs 1"
        )
    for prefix, before in ((first, features), ("final_proj.", hidden)):
        heads.update(_named(prefix, prune_reader(_within(heads, prefix), before)))
    return heads


def _within(weights: Weights, prefix: str) -> Weights:
    """The weights of a module, by their names in it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _named(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}
