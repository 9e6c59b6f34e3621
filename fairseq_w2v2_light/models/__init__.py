"""fairseq's view of `nn/`: configurations, registered models, checkpoint naming."""

from . import stock_ctc  # noqa: F401 - lets wav2vec_ctc start from CTC checkpoints
from .light_ctc import LightCtc, LightCtcConfig
from .w2v2_light import (
    StochasticSEWConfig,
    StochasticSEWModel,
    W2V2LightConfig,
    W2V2LightModel,
    network_config,
)

__all__ = [
    "LightCtc",
    "LightCtcConfig",
    "StochasticSEWConfig",
    "StochasticSEWModel",
    "W2V2LightConfig",
    "W2V2LightModel",
    "network_config",
]
