"""Manifests, labels and dictionaries from what people have."""
