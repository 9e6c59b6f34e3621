"""What Hugging Face's wav2vec 2.0 and SEW folders and ours have in common: names of files, tensors and functions."""

from __future__ import annotations

from typing import Dict, Sequence

from ..nn.config import EncoderConfig

CONFIG, VOCAB, PREPROCESSOR, TOKENIZER, SPECIAL_TOKENS = (
    "config.json",
    "vocab.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
ADDED_TOKENS, PROCESSOR = "added_tokens.json", "processor_config.json"
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
WEIGHTS_INDEX, PICKLED_INDEX = (f"{name}.index.json" for name in (WEIGHTS, PICKLED))
# model_type of config.json, which is also the prefix of the encoder's tensors in a model with a head
FAMILIES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "sew": "SEW"}
# ours: theirs; the first is what we write, the others are the same function under other names
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_accurate": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "gelu_fast": ("gelu_new",),
    "relu": ("relu",),
    "relu_squared": ("relu2",),
    "swish": ("silu", "swish"),
    "tanh": ("tanh",),
    "linear": ("linear",),
}
# their names of the head's tensors
HEAD = {"lm_head.weight": "weight", "lm_head.bias": "bias"}
# the norm of weights, where torch parametrises modules: as transformers saves it, and as every version of it reads it
PARAMETRISED = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}


def tensor_names(config: EncoderConfig, family: str) -> Dict[str, str]:
    """Hugging Face's name of every tensor of an encoder, without prefix, and the name that nn.Backbone has for it.

    One of ours may serve several of theirs: they have no shared layers. family: a key of FAMILIES.
    """
    names: Dict[str, str] = {}

    def add(theirs: str, ours: str, parts: Sequence[str] = ("weight", "bias")) -> None:
        names.update({f"{theirs}.{part}": f"{ours}.{part}" for part in parts})

    for index in range(len(config.conv_layers)):
        layer = f"feature_extractor.conv_layers.{index}"
        add(f"{layer}.conv", f"{layer}.0", ("weight", "bias") if config.conv_bias else ("weight",))
        if config.extractor_norm == "layer":
            add(f"{layer}.layer_norm", f"{layer}.2.1")
        elif index == 0:
            add(f"{layer}.layer_norm", f"{layer}.2")
    if family == "sew":
        add("layer_norm", "layer_norm")
        if config.features_dim != config.dim:
            add("feature_projection", "post_extract_proj")
        add("encoder.upsample.projection", "encoder.upsample.0")
    else:
        add("feature_projection.layer_norm", "layer_norm")
        add("feature_projection.projection", "post_extract_proj")
    add("encoder.pos_conv_embed.conv", "encoder.pos_conv.0", ("weight_g", "weight_v", "bias"))
    add("encoder.layer_norm", "encoder.layer_norm")
    for depth, stored in enumerate(config.layer_map):
        theirs, ours = f"encoder.layers.{depth}", f"encoder.layers.{stored}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{theirs}.attention.{projection}", f"{ours}.self_attn.{projection}")
        add(f"{theirs}.layer_norm", f"{ours}.self_attn_layer_norm")
        add(f"{theirs}.feed_forward.intermediate_dense", f"{ours}.fc1")
        add(f"{theirs}.feed_forward.output_dense", f"{ours}.fc2")
        add(f"{theirs}.final_layer_norm", f"{ours}.final_layer_norm")
    return names
