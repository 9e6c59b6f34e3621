"""Losses."""

from .light_contrastive import LightContrastive, LightContrastiveConfig
from .light_distill import LightDistill, LightDistillConfig
from .light_prune import LightPrune, LightPruneConfig

__all__ = [
    "LightContrastive",
    "LightContrastiveConfig",
    "LightDistill",
    "LightDistillConfig",
    "LightPrune",
    "LightPruneConfig",
]
