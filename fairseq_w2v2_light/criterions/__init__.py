"""Losses."""

from .light_contrastive import LightContrastive, LightContrastiveConfig

__all__ = ["LightContrastive", "LightContrastiveConfig"]
