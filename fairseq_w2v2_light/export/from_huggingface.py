"""Hugging Face's Wav2Vec2, Hubert and SEW folders as fairseq checkpoints of ours.

Here and not beside models/convert.py because both directions share names, labels and reader; `export` is the room of
other projects' formats, and may use `models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.utils import get_available_activation_fns
from omegaconf import OmegaConf
from torch import Tensor

from ..compress.checkpoint import ctc_config, fresh_state
from ..files import atomic_path
from ..models.checkpoint import CTC_ENCODER, complete_model, require_finite_weights
from ..models.w2v2_light import PRETRAINING_HEADS, W2V2LightModel
from ..nn.config import EncoderConfig
from ..runtime.checkpoint import PathLike
from ..runtime.text import Labels
from .huggingface_folder import read_json, read_weights
from .huggingface_format import (
    ACTIVATIONS,
    CONFIG,
    FAMILIES,
    HEAD,
    PARAMETRISED,
    PREPROCESSOR,
    PROCESSOR,
    tensor_names,
)
from .huggingface_labels import HeadLabels, read_labels

# a logit that no softmax notices, and fp16 still holds: of the labels that a folder has no row for
ABSENT_LOGIT = -1e4
_MOST_LAYERS = 1000
_LARGEST = 1_000_000
_SEED = 1
_MASK = "masked_spec_embed"
_PRETRAINING_CRITERION = {"_name": "light_contrastive"}
# the heads of Wav2Vec2ForPreTraining, theirs: ours
_PRETRAINING = {
    "quantizer.codevectors": "quantizer.vars",
    "quantizer.weight_proj.weight": "quantizer.weight_proj.weight",
    "quantizer.weight_proj.bias": "quantizer.weight_proj.bias",
    "project_q.weight": "project_q.weight",
    "project_q.bias": "project_q.bias",
    "project_hid.weight": "final_proj.weight",
    "project_hid.bias": "final_proj.bias",
}
# what transformers' classes assume where config.json says nothing
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "feat_extract_norm": "group",
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.1,
    "layerdrop": 0.1,
    "num_codevectors_per_group": 320,
    "num_codevector_groups": 2,
    "codevector_dim": 256,
    "proj_codevector_dim": 256,
    "num_negatives": 100,
    "contrastive_logits_temperature": 0.1,
    "squeeze_factor": 2,
}
_SEW_DEFAULTS = {
    "conv_dim": [64, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512],
    "conv_kernel": [10, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1],
    "conv_stride": [5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1],
}
# what our network has no other way of; None stands for a key that is absent, or null
_REQUIRED = {
    "feat_extract_activation": ("gelu", None),
    "layer_norm_eps": (1e-5, None),
    "add_adapter": (False, None),
    "adapter_attn_dim": (None,),
    "conv_pos_batch_norm": (False, None),
    "feat_proj_layer_norm": (True, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
}
# what changes nothing of what the network computes: training, other heads, bookkeeping of all versions of transformers
_IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path adapter_kernel_size adapter_stride
    add_cross_attention apply_spec_augment architectures attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_proj_size cross_attention_hidden_size ctc_loss_reduction
    ctc_zero_infinity decoder_start_token_id diversity_loss_weight diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty feat_extract_dropout
    feat_quantizer_dropout finetuning_task forced_bos_token_id forced_eos_token_id freeze_feat_extract_train
    gradient_checkpointing hidden_dropout_prob id2label initializer_range label2id length_penalty mask_channel_length
    mask_channel_min_space mask_channel_other mask_channel_prob mask_channel_selection mask_feature_length
    mask_feature_min_masks mask_feature_prob mask_time_length mask_time_min_masks mask_time_min_space mask_time_other
    mask_time_prob mask_time_selection max_length min_length model_type no_mask_channel_overlap no_mask_time_overlap
    no_repeat_ngram_size num_adapter_layers num_beam_groups num_beams num_ctc_classes num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type processor_class
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params tdnn_dilation tdnn_dim tdnn_kernel temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache use_weighted_layer_sum xvector_output_dim
    """.split()
)


def from_huggingface(source: PathLike, target: PathLike) -> str:
    """Writes the model in a Hugging Face folder as a checkpoint of ours; returns a summary.

    Wav2Vec2ForCTC, HubertForCTC and SEWForCTC become `light_ctc` with the labels in fairseq's order (see
    huggingface_labels), and a dictionary file is written beside the checkpoint, for the data folders of fine-tuning and
    `infer`. Wav2Vec2ForPreTraining, Wav2Vec2Model, HubertModel and SEWModel become pre-training checkpoints
    (`w2v2_light`, `stochastic_sew`), whose heads start anew where the folder has none. Raises FileNotFoundError for a
    missing file; ValueError that names file and key for unknown keys, values that our network does not have, weights
    that do not fit or are not finite, and whatever could run code.
    """
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise ValueError(f"'{target}': a folder; give the name of the checkpoint to write, like {target / 'model.pt'}")
    config = read_json(source, CONFIG)
    where = source / CONFIG
    if "format" in config:
        raise ValueError(
            f"{source}: a model folder of `w2v2-light export`, which is for inference; fine-tuning starts from the "
            "checkpoint that it was made of"
        )
    family, kind = _architecture(config, where)
    encoder = _encoder_section(config, family, kind, where)
    audio = _audio(source)
    model = _meta_model(encoder, where)
    weights, head = _our_weights(read_weights(source), model.config, family, kind, source)
    fresh = _fill(weights, model, encoder, kind, source)
    require_finite_weights({**weights, **head}, str(source))

    task = {"_name": "audio_pretraining", "data": "", **audio}
    run = {"common": {"seed": _SEED}, "task": task, "model": encoder}
    if kind == "ForCTC":
        labels = read_labels(source, config, _rows(config, head, where))
        state, notes = _write_ctc(target, run, weights, head, labels, _share(config, "final_dropout", where))
        became = "light_ctc"
    else:
        cfg = {**OmegaConf.to_container(OmegaConf.create(run), enum_to_str=True), "criterion": _PRETRAINING_CRITERION}
        _write(target, fresh_state(cfg, weights, {}))
        state, notes, became = weights, [f"new: {', '.join(fresh)}"] if fresh else [], encoder._name
    values = sum(value.numel() for value in state.values())
    what = f"{source} ({FAMILIES[family]}{kind}) -> {target} ({became})"
    return "\n".join([f"{what}: {len(state)} tensors, {values:,} values", *notes])


def _rows(config: Mapping[str, Any], head: Mapping[str, Tensor], where: Path) -> int:
    """How many labels the head has."""
    rows = len(head["bias"])
    if config.get("vocab_size", rows) != rows:
        raise ValueError(f"{where}: vocab_size: found {config['vocab_size']!r}, but lm_head has {rows} rows")
    return rows


def _write_ctc(
    target: Path, run: Dict[str, Any], weights: Mapping[str, Tensor], head, labels: HeadLabels, final_dropout: float
) -> Tuple[Dict[str, Tensor], List[str]]:
    """Writes a light_ctc checkpoint and its dictionary; returns its state dict, and what the user should know.

    run: the configuration of the encoder's run. head: the CTC projection with the folder's rows.
    """
    dictionary = Dictionary()
    for symbol in labels.symbols[len(dictionary) :]:
        dictionary.add_symbol(symbol)
    extension = {"letter": "ltr", "sentencepiece": "spm", "word": "wrd"}[Labels(labels.symbols).kind]
    finetuning = {
        "common": run["common"],
        "criterion": {"_name": "ctc"},
        "task": {**run["task"], "_name": "audio_ctc", "labels": extension},
        "model": {"final_dropout": final_dropout},
    }
    state = {f"{CTC_ENCODER}{name}": value for name, value in weights.items()}
    state.update({f"w2v_encoder.proj.{part}": value for part, value in _permuted(head, labels).items()})
    cfg = ctc_config(OmegaConf.create(finetuning), OmegaConf.create(run))
    _write(target, fresh_state(cfg, state, {"target_dictionary": dictionary}))
    dictionary_file = target.with_name(f"{target.stem}.dict.{extension}.txt")
    with atomic_path(dictionary_file) as temporary:
        dictionary.save(str(temporary))
    return state, _label_notes(labels, dictionary_file)


def _architecture(config: Mapping[str, Any], where: Path) -> Tuple[str, str]:
    """(family, kind): a key of FAMILIES, and ForCTC, ForPreTraining or Model."""
    known = {f"{name}{kind}": (family, kind) for family, name in FAMILIES.items() for kind in ("ForCTC", "Model")}
    known["Wav2Vec2ForPreTraining"] = ("wav2vec2", "ForPreTraining")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{where}: architectures: found {name!r}, expected one of {', '.join(known)}")
    family, kind = known[name]
    if config.get("model_type", family) != family:
        raise ValueError(f"{where}: model_type: found {config['model_type']!r}, but {name} is of type '{family}'")
    if "auto_map" in config:
        raise ValueError(f"{where}: auto_map: the model is code of the folder's own, which is not run here")
    return family, kind


def _encoder_section(config: Mapping[str, Any], family: str, kind: str, where: Path):
    """The model section of a pre-training run: our keys, complete."""
    _check_keys(config, family, where)

    def number(key: str, most: int = _LARGEST, least: int = 1) -> int:
        value = _value(config, key, family)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{where}: {key}: found {value!r}, expected a number from {least} to {most:,}")
        return value

    activation = _value(config, "hidden_act", family)
    # fairseq's configurations allow some of ours only
    ours = {theirs: name for name in get_available_activation_fns() for theirs in ACTIVATIONS.get(name, ())}
    if not isinstance(activation, str) or activation not in ours:
        raise ValueError(f"{where}: hidden_act: found {activation!r}, expected one of {', '.join(sorted(ours))}")
    norm = _value(config, "feat_extract_norm", family)
    if norm not in ("group", "layer"):
        raise ValueError(f"{where}: feat_extract_norm: found {norm!r}, expected 'group' or 'layer'")
    convolutions = _convolutions(config, family, where)
    dim = number("hidden_size")
    keys = {
        "extractor_mode": "layer_norm" if norm == "layer" else "default",
        "conv_feature_layers": str(convolutions),
        "conv_bias": _flag(config, "conv_bias", family, where),
        "encoder_layers": number("num_hidden_layers", _MOST_LAYERS),
        "encoder_embed_dim": dim,
        "encoder_ffn_embed_dim": number("intermediate_size"),
        "encoder_attention_heads": number("num_attention_heads"),
        "activation_fn": ours[activation],
        "layer_norm_first": _flag(config, "do_stable_layer_norm", family, where),
        "conv_pos": number("num_conv_pos_embeddings"),
        "conv_pos_groups": number("num_conv_pos_embedding_groups"),
        "dropout": _share(config, "hidden_dropout", where),
        "attention_dropout": _share(config, "attention_dropout", where),
        "activation_dropout": _share(config, "activation_dropout", where),
        "dropout_input": _share(config, "feat_proj_dropout", where),
        "encoder_layerdrop": _share(config, "layerdrop", where),
        "quantize_targets": True,
    }
    if family == "sew":
        squeeze = number("squeeze_factor", _MOST_LAYERS, least=2)
        keys.update(
            squeeze_factors=[squeeze],
            query_pools=[1],
            kv_pools=[1],
            unsqueeze_factor=squeeze,
            unsqueeze_residual=False,
            squeeze_tail="drop",
        )
        return complete_model(keys, "stochastic_sew")
    # theirs always projects; stock fairseq only where the widths differ
    keys["project_features"] = convolutions[-1][0] == dim
    if kind == "ForPreTraining":
        keys.update(
            final_dim=number("proj_codevector_dim"),
            latent_vars=number("num_codevectors_per_group"),
            latent_groups=number("num_codevector_groups"),
            latent_dim=number("codevector_dim"),
            num_negatives=number("num_negatives", least=0),
            logit_temp=_value(config, "contrastive_logits_temperature", family),
        )
        if type(keys["logit_temp"]) not in (int, float) or not keys["logit_temp"] > 0:
            raise ValueError(
                f"{where}: contrastive_logits_temperature: found {keys['logit_temp']!r}, expected a number above 0"
            )
        if keys["latent_dim"] % keys["latent_groups"]:
            raise ValueError(
                f"{where}: codevector_dim: found {keys['latent_dim']}, expected a multiple of num_codevector_groups="
                f"{keys['latent_groups']}"
            )
    return complete_model(keys, "w2v2_light")


def _value(config: Mapping[str, Any], key: str, family: str) -> Any:
    defaults = {**_DEFAULTS, **_SEW_DEFAULTS} if family == "sew" else _DEFAULTS
    return config.get(key, defaults[key])


def _check_keys(config: Mapping[str, Any], family: str, where: Path) -> None:
    """Raises ValueError for the first key that is unknown, or has a value which our network does not have."""
    for key, expected in _REQUIRED.items():
        if config.get(key) not in expected:
            raise ValueError(f"{where}: {key}: found {_short(config[key])}, expected {expected[0]!r}: we have no other")
    checked = {"num_feat_extract_layers", "output_hidden_size", "vocab_size"}
    for key in config:
        if key not in _DEFAULTS and key not in _REQUIRED and key not in _IGNORED and key not in checked:
            raise ValueError(f"{where}: '{key}': unknown key (value {_short(config[key])}); it may change the network")
    if family == "sew" and config.get("do_stable_layer_norm"):
        raise ValueError(f"{where}: do_stable_layer_norm: found true, but SEW has post-LN layers only")
    if family != "sew" and "squeeze_factor" in config:
        raise ValueError(f"{where}: squeeze_factor: {FAMILIES[family]} has no such key, only SEW")
    widths = (config.get("output_hidden_size"), config.get("hidden_size", _DEFAULTS["hidden_size"]))
    if widths[0] is not None and widths[0] != widths[1]:
        raise ValueError(f"{where}: output_hidden_size: found {widths[0]!r}, expected hidden_size={widths[1]}")


def _convolutions(config: Mapping[str, Any], family: str, where: Path) -> List[Tuple[int, int, int]]:
    """(channels, kernel, stride) of each frontend layer."""
    keys = ("conv_dim", "conv_kernel", "conv_stride")
    lists = [_value(config, key, family) for key in keys]
    for key, values in zip(keys, lists):
        fits = isinstance(values, list) and 1 <= len(values) <= _MOST_LAYERS
        if not fits or not all(type(value) is int and 1 <= value <= _LARGEST for value in values):
            raise ValueError(f"{where}: {key}: found {_short(values)}, expected a list of positive numbers")
        if len(values) != len(lists[0]):
            raise ValueError(f"{where}: {key}: found {len(values)} numbers, expected {len(lists[0])} as in conv_dim")
    count = config.get("num_feat_extract_layers", len(lists[0]))
    if count != len(lists[0]):
        raise ValueError(f"{where}: num_feat_extract_layers: found {count!r}, but conv_dim has {len(lists[0])}")
    return list(zip(*lists))


def _flag(config: Mapping[str, Any], key: str, family: str, where: Path) -> bool:
    value = _value(config, key, family)
    if type(value) is not bool:
        raise ValueError(f"{where}: {key}: found {value!r}, expected true or false")
    return value


def _share(config: Mapping[str, Any], key: str, where: Path) -> float:
    value = config.get(key, _DEFAULTS[key])
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{where}: {key}: found {value!r}, expected a number from 0 to 1")
    return float(value)


def _meta_model(encoder, where: Path) -> W2V2LightModel:
    """The network without weights: names and shapes only."""
    try:
        with torch.device("meta"):
            return W2V2LightModel(encoder)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{where}: describes no network that can be built: {error}") from error


def _audio(folder: Path) -> Dict[str, Any]:
    """normalize and sample_rate of the task, from the feature extractor's file (or where transformers 5 has it)."""
    name, settings = PREPROCESSOR, None
    if (folder / PREPROCESSOR).exists() or not (folder / PROCESSOR).exists():
        settings = read_json(folder, PREPROCESSOR)
    else:
        name, settings = PROCESSOR, read_json(folder, PROCESSOR).get("feature_extractor")
    where = folder / name
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: feature_extractor: found {_short(settings)}, expected an object")
    kind = settings.get("feature_extractor_type", "Wav2Vec2FeatureExtractor")
    if kind != "Wav2Vec2FeatureExtractor":
        raise ValueError(f"{where}: feature_extractor_type: found {kind!r}, expected 'Wav2Vec2FeatureExtractor'")
    if settings.get("feature_size", 1) != 1:
        raise ValueError(f"{where}: feature_size: found {settings['feature_size']!r}, expected 1: waveforms")
    normalize, rate = settings.get("do_normalize", True), settings.get("sampling_rate", 16000)
    if type(normalize) is not bool:
        raise ValueError(f"{where}: do_normalize: found {normalize!r}, expected true or false")
    if type(rate) is not int or not 1 <= rate <= _LARGEST:
        raise ValueError(f"{where}: sampling_rate: found {rate!r}, expected a number of Hz such as 16000")
    return {"normalize": normalize, "sample_rate": rate}


def _our_weights(
    found: Dict[str, Tensor], network: EncoderConfig, family: str, kind: str, folder: Path
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """The encoder's weights (and heads of pre-training) by our names, and those of the CTC head, in fp32."""
    weights: Dict[str, Tensor] = {}
    for name, value in found.items():
        for parametrised, plain in PARAMETRISED.items():
            name = name[: -len(parametrised)] + plain if name.endswith(parametrised) else name
        weights[name] = value
    prefix = f"{family}." if kind != "Model" or any(name.startswith(f"{family}.") for name in weights) else ""
    names = {f"{prefix}{theirs}": ours for theirs, ours in tensor_names(network, family).items()}
    mask = f"{prefix}{_MASK}"
    if mask in weights:  # only models that mask while training have one
        names[mask] = "mask_emb"
    if kind == "ForPreTraining":
        names.update(_PRETRAINING)
    heads = HEAD if kind == "ForCTC" else {}
    what = f"{FAMILIES[family]}{kind}"
    missing = [name for name in (*names, *heads) if name not in weights]
    if missing:
        raise ValueError(f"{folder}: parameter '{missing[0]}' of {what} is missing ({len(missing)} in all)")
    unknown = [name for name in weights if name not in names and name not in heads]
    if unknown:
        raise ValueError(
            f"{folder}: parameter '{unknown[0]}' has no place in the {what} that {CONFIG} describes "
            f"({len(unknown)} in all)"
        )

    def own(name: str) -> Tensor:
        return weights[name].to(torch.float32, copy=True)

    head = {part: own(name) for name, part in heads.items()}
    if head and (head["weight"].dim() != 2 or head["weight"].size(1) != network.dim):
        raise ValueError(
            f"{folder}: parameter 'lm_head.weight': found shape {tuple(head['weight'].shape)}, expected rows of "
            f"hidden_size={network.dim}"
        )
    if head and head["bias"].shape != head["weight"].shape[:1]:
        raise ValueError(
            f"{folder}: parameter 'lm_head.bias': found shape {tuple(head['bias'].shape)}, expected "
            f"({len(head['weight'])},) as lm_head.weight has rows"
        )
    return {ours: own(theirs) for theirs, ours in names.items()}, head


def _fill(weights: Dict[str, Tensor], model: W2V2LightModel, encoder, kind: str, folder: Path) -> List[str]:
    """Checks shapes, and initialises what the folder does not have, in place; returns what that was.

    model: the network of the checkpoint, on the meta device.
    """
    if kind == "ForCTC":
        model.remove_pretraining_modules()
    expected = model.state_dict()
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{folder}: our parameter '{name}': found shape {tuple(value.shape)}, but {CONFIG} asks for "
                f"{tuple(expected[name].shape)}"
            )
    missing = [name for name in expected if name not in weights]
    if not missing:
        return []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if missing == ["mask_emb"]:
            weights["mask_emb"] = torch.rand(encoder.encoder_embed_dim)
        else:
            fresh = W2V2LightModel(encoder).state_dict()
            weights.update({name: fresh[name].clone() for name in missing})
    return sorted({name.split(".")[0] for name in missing}, key=(*PRETRAINING_HEADS, "mask_emb").index)


def _permuted(head: Mapping[str, Tensor], labels: HeadLabels) -> Dict[str, Tensor]:
    """The head whose row i makes the logit of label i."""
    weight = head["weight"].new_zeros(len(labels.rows), head["weight"].size(1))
    bias = head["bias"].new_full((len(labels.rows),), ABSENT_LOGIT)
    for place, row in enumerate(labels.rows):
        if row is not None:
            weight[place], bias[place] = head["weight"][row], head["bias"][row]
    return {"weight": weight, "bias": bias}


def _label_notes(labels: HeadLabels, dictionary_file: Path) -> List[str]:
    notes = [f"{len(labels.symbols)} labels, also in {dictionary_file}: copy it to data folders of this model"]
    absent = [symbol for symbol, row in zip(labels.symbols, labels.rows) if row is None]
    if absent:
        notes.append(f"not in the folder, and never the output: {', '.join(absent)}")
    if labels.unnamed:
        notes.append(f"{labels.unnamed} outputs without a token: madeupword0000 and on")
    return notes


def _write(target: Path, state: Dict[str, Any]) -> None:
    with atomic_path(target) as temporary:
        torch.save(state, temporary)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
