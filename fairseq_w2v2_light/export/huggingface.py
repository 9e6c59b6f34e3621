"""A CTC model as a folder that Hugging Face's transformers loads (Wav2Vec2ForCTC, SEWForCTC), written without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import Tensor

from .. import __version__
from ..files import atomic_folder
from ..nn.config import EncoderConfig
from ..nn.operating_point import OperatingPoint
from ..runtime.checkpoint import PathLike
from ..runtime.ctc import CtcModel
from ..runtime.folder import save_weights
from ..runtime.text import Labels
from .huggingface_format import (
    ACTIVATIONS,
    CONFIG,
    FAMILIES,
    HEAD,
    PREPROCESSOR,
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCAB,
    WEIGHTS,
    tensor_names,
)
from .huggingface_labels import special_tokens, token_ids, tokens_of

CARD = "README.md"
FILES = (CONFIG, WEIGHTS, VOCAB, TOKENIZER, SPECIAL_TOKENS, PREPROCESSOR, CARD)


def export_huggingface(model: CtcModel, out: PathLike, operating_point: str = "") -> str:
    """Writes `model` as a folder for transformers; returns the name of the class that loads it.

    operating_point: which one the folder is to run at, for a model that was trained for several (text form, s2q1k1).
    At squeeze 1 the folder holds a Wav2Vec2ForCTC, else a SEWForCTC; shared layers are written once for each depth.
    The logits keep the order of `model.symbols`. An earlier export at `out` is replaced. Raises ValueError that says
    why for what Hugging Face has no model for, and for a folder that holds anything else.
    """
    point = _point(model, operating_point)
    family = "wav2vec2" if point.squeeze == 1 else "sew"
    architecture = f"{FAMILIES[family]}ForCTC"
    reasons = lacking(model.config, point, family)
    if reasons:
        raise ValueError(f"Hugging Face's {architecture} cannot express this model: {'; '.join(reasons)}")
    vocabulary = tokens_of(model.symbols)
    tensors = _tensors(model, point, family)
    with atomic_folder(out, FILES) as folder:
        save_weights(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / CONFIG, _config(model, point, family, vocabulary))
        _write_json(folder / VOCAB, {token: index for index, token in enumerate(vocabulary)})
        _write_json(folder / TOKENIZER, _tokenizer(model, vocabulary))
        _write_json(folder / SPECIAL_TOKENS, special_tokens(vocabulary))
        _write_json(folder / PREPROCESSOR, _preprocessor(model))
        (folder / CARD).write_text(_card(model, point, family, Path(out).name), encoding="utf-8")
    return architecture


def _point(model: CtcModel, operating_point: str) -> OperatingPoint:
    points = model.config.operating_points
    if operating_point:
        return points.check(OperatingPoint.parse(operating_point))
    if points.is_stochastic:
        known = ", ".join(str(point) for point in points.points())
        raise ValueError(
            "operating point: a Hugging Face model runs at one, but this model was trained for several; choose one of "
            f"{known} (by itself it would run at {model.point})"
        )
    return model.point


def lacking(config: EncoderConfig, point: OperatingPoint, family: str) -> List[str]:
    """Every feature of the network at a point that Hugging Face's classes of a family lack, for a message.

    family: "wav2vec2" (stock fairseq's model lacks the same) or "sew".
    """
    reasons = []

    def refuse(condition: bool, reason: str) -> None:
        if condition:
            reasons.append(reason)

    pools = [*point.query, *point.key_value]
    refuse(config.streams, "it is a streaming model: no causal positions, no attention by chunks")
    refuse(max(pools) > 1, f"operating point {point} pools queries or keys")
    refuse(
        config.attention_map_every > 1 and config.depth > 1,
        f"layers reuse attention maps (attention_map_every={config.attention_map_every})",
    )
    refuse(bool(config.prune_units), "it has gates: remove what they closed with `w2v2-light prune` first")
    heads = sorted({config.heads_of(stored) for stored in range(config.unique_layers)})
    widths = sorted({config.ffn_of(stored) for stored in range(config.unique_layers)})
    refuse(len(heads) > 1 or heads[0] < 1, f"its layers have {heads} attention heads, expected equally many in each")
    refuse(len(widths) > 1 or widths[0] < 1, f"the FFNs of its layers are {widths} wide, expected one width")
    refuse(
        len(heads) == 1 and heads[0] * config.head_size != config.dim,
        f"{heads[0]} heads of {config.head_size} channels are not the {config.dim} channels of its layers",
    )
    refuse(config.norm_dim not in (0, config.dim), f"LayerNorms are over {config.norm_dim} channels, not {config.dim}")
    wide = [width for width, layer in zip(config.conv_norm_dims, config.conv_layers) if width != layer[0]]
    refuse(bool(wide), f"LayerNorms of the frontend are over {wide[:1]} channels, more than there are")
    groups = set(config.conv_pos_group_dims)
    refuse(len(groups) > 1, "the groups of its positional convolution have unequal widths")
    refuse(config.activation not in ACTIVATIONS, f"activation '{config.activation}' is none of theirs")
    refuse(family == "wav2vec2" and point.squeeze > 1, f"operating point {point} squeezes")
    if family == "sew":
        refuse(config.norm_first, "SEW has post-LN layers only (layer_norm_first=false)")
        refuse(
            config.unsqueeze_residual,
            "SEW's upsampling adds no squeezed frame to its sub-frames (unsqueeze_residual=false)",
        )
        refuse(
            config.squeeze_tail != "drop",
            "SEW leaves out a last squeeze window that is not full (squeeze_tail=drop)",
        )
        refuse(
            config.project_features and config.features_dim == config.dim,
            f"SEW has no projection between a frontend and a Transformer of {config.dim} channels both",
        )
    return reasons


def _tensors(model: CtcModel, point: OperatingPoint, family: str) -> Dict[str, Tensor]:
    """The weights by Hugging Face's names, in fp32, each in memory of its own."""
    config = model.config
    own = {name: value for name, value in model.backbone.state_dict().items() if torch.is_tensor(value)}
    if family != "sew" and not config.projects:
        # theirs always has a projection; this one changes no bit
        own["post_extract_proj.weight"] = torch.eye(config.dim)
        own["post_extract_proj.bias"] = torch.zeros(config.dim)
    if config.unsqueeze_factor > 1:
        blocks = model.backbone.encoder.upsample.blocks(point.squeeze) if family == "sew" else []
        for part in ("weight", "bias"):
            name = f"encoder.upsample.0.{part}"
            value = own.pop(name, None)
            if blocks and value is not None:
                own[name] = value.unflatten(0, (config.unsqueeze_factor, config.dim))[blocks].flatten(0, 1)
    names = tensor_names(config, family)
    tensors = {f"{family}.{theirs}": own[ours] for theirs, ours in names.items() if ours in own}
    tensors.update({theirs: getattr(model.head, part, None) for theirs, part in HEAD.items()})
    lost = sorted(set(own) - set(names.values()))
    missing = sorted(set(names.values()) - set(own)) + [key for key in HEAD if not torch.is_tensor(tensors[key])]
    if lost or missing or not all(value.is_floating_point() for value in tensors.values()):
        raise ValueError(
            "Hugging Face export: the weights are not those of a plain fp32 model (quantised, or prepared for speed?): "
            f"missing {missing or 'none'}, unknown {lost or 'none'}; export the model that it was made from"
        )
    return {name: value.detach().to("cpu", torch.float32, copy=True).contiguous() for name, value in tensors.items()}


def _config(model: CtcModel, point: OperatingPoint, family: str, vocabulary: List[str]) -> Dict[str, Any]:
    network = model.config
    config = {
        "architectures": [f"{FAMILIES[family]}ForCTC"],
        "model_type": family,
        "hidden_size": network.dim,
        "num_hidden_layers": network.depth,
        "num_attention_heads": network.heads_of(0),
        "intermediate_size": network.ffn_of(0),
        "hidden_act": ACTIVATIONS[network.activation][0],
        "layer_norm_eps": 1e-5,
        "feat_extract_norm": network.extractor_norm,
        "feat_extract_activation": "gelu",
        "conv_dim": [layer[0] for layer in network.conv_layers],
        "conv_kernel": [layer[1] for layer in network.conv_layers],
        "conv_stride": [layer[2] for layer in network.conv_layers],
        "num_feat_extract_layers": len(network.conv_layers),
        "conv_bias": network.conv_bias,
        "num_conv_pos_embeddings": network.conv_pos,
        "num_conv_pos_embedding_groups": network.conv_pos_groups,
        "hidden_dropout": network.dropout,
        "attention_dropout": network.attention_dropout,
        "activation_dropout": network.activation_dropout,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": network.layerdrop,
        # there is no mask vector: what is loaded has none either, and fine-tuning does not mask unless it is asked to
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
        "vocab_size": len(vocabulary),
        **{f"{role}_token_id": index for role, index in token_ids(vocabulary).items() if role != "unk"},
        "torch_dtype": "float32",
    }
    if family == "sew":
        return {**config, "squeeze_factor": point.squeeze}
    return {**config, "do_stable_layer_norm": network.norm_first}


def _tokenizer(model: CtcModel, vocabulary: List[str]) -> Dict[str, Any]:
    is_letter = Labels(model.symbols, model.blank).kind == "letter"
    return {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        **special_tokens(vocabulary),
        "word_delimiter_token": "|" if is_letter else " ",
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
    }


def _preprocessor(model: CtcModel) -> Dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "processor_class": "Wav2Vec2Processor",
        "feature_size": 1,
        "sampling_rate": model.sample_rate,
        "do_normalize": model.normalize,
        "padding_side": "right",
        "padding_value": 0.0,
        # transformers' rule: a GroupNorm takes padding into its statistics, mask or not
        "return_attention_mask": model.config.extractor_norm == "layer",
    }


def _write_json(file: Path, values: Dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(model: CtcModel, point: OperatingPoint, family: str, name: str) -> str:
    config = model.config
    architecture = f"{FAMILIES[family]}ForCTC"
    shared = "" if config.unique_layers == config.depth else f" ({config.unique_layers} of them shared, written out)"
    notes = ["The logits are those of the model it was made from, in the order of `vocab.json`."]
    if config.extractor_norm == "group":
        notes.append(
            "Its frontend has a GroupNorm over time, into which transformers takes the padding of a batch: decode one "
            "utterance at a time, or utterances of one length, where results must not depend on the batch."
        )
    if family == "sew":
        notes.append(
            f"transformers attends to a squeezed frame that is partly padding: in a padded batch, utterances whose "
            f"number of frames is no multiple of {point.squeeze} get slightly other logits than alone."
        )
    if "|" in model.symbols and Labels(model.symbols, model.blank).kind != "letter":
        notes.append("The label `|` is spelled as a space by transformers 5.")
    if model.normalize:
        notes.append(
            "The feature extractor normalises an utterance with an epsilon of 1e-7, fairseq with 1e-5: speech with a "
            "standard deviation of 0.05 (samples -1 to 1) comes out 0.2 % louder, quieter audio more. For the "
            "original's numbers, pass `torch.nn.functional.layer_norm(wave, wave.shape)` of each utterance as "
            "`input_values`."
        )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: automatic-speech-recognition",
        "tags:",
        "- automatic-speech-recognition",
        f"- {family}",
        "---",
        "",
        f"# {name}",
        "",
        f"`{architecture}`, {config.depth} layers{shared} of {config.dim} channels, {len(model.symbols)} labels, audio "
        f"of {model.sample_rate} Hz"
        + (f"; operating point {point}." if config.operating_points.is_stochastic or point.squeeze > 1 else "."),
        "",
        "```python",
        f"from transformers import {architecture}, Wav2Vec2Processor",
        "",
        f'processor = Wav2Vec2Processor.from_pretrained("{name}")',
        f'model = {architecture}.from_pretrained("{name}")',
        f'inputs = processor(samples, sampling_rate={model.sample_rate}, return_tensors="pt")',
        "text = processor.batch_decode(model(**inputs).logits.argmax(-1))",
        "```",
        "",
        *(f"- {note}" for note in notes),
        "",
        f"Written by fairseq_w2v2_light {__version__}.",
        "",
    ]
    return "\n".join(lines)
