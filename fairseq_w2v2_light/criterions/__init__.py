"""Losses."""

from .light_contrastive import LightContrastive, LightContrastiveConfig
from .light_distill import LightDistill, LightDistillConfig

__all__ = ["LightContrastive", "LightContrastiveConfig", "LightDistill", "LightDistillConfig"]
