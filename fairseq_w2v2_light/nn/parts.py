"""The parts of a wav2vec 2.0 model that counts and reports name."""

PARTS = ("frontend", "projection", "positions", "layers", "unsqueeze", "norms", "heads")

_PREFIXES = (
    ("feature_extractor.", "frontend"),
    ("post_extract_proj.", "projection"),
    ("encoder.pos_conv.", "positions"),
    ("encoder.layers.", "layers"),
    ("encoder.upsample.", "unsqueeze"),
    ("encoder.layer_norm.", "norms"),
    ("layer_norm.", "norms"),
    ("mask_emb", "norms"),
    ("gates.", "gates"),
)


def part_of(name: str) -> str:
    """The part that a parameter of W2V2LightModel belongs to; the mask vector is with the norms.

    Gates are "gates", which is none of PARTS: pruning removes them.
    """
    return next((part for prefix, part in _PREFIXES if name.startswith(prefix)), "heads")
