"""Checkpoint in, smaller checkpoint out."""
