"""The network: plain torch, tensors in, tensors out. Imports neither fairseq nor hydra.

Shapes are (batch, time, channel) everywhere.
"""

from .backbone import Backbone
from .config import EncoderConfig, encoder_config, parse_conv_layers
from .encoder import Encoder, EncoderOutput
from .frontend import Frontend, frame_lengths, receptive_field
from .layer_map import format_layer_map, parse_layer_map
from .masks import FrameMask
from .operating_point import OperatingPoint, OperatingPointSpace

__all__ = [
    "Backbone",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "FrameMask",
    "Frontend",
    "OperatingPoint",
    "OperatingPointSpace",
    "encoder_config",
    "format_layer_map",
    "frame_lengths",
    "parse_conv_layers",
    "parse_layer_map",
    "receptive_field",
]
