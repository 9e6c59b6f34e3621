"""`w2v2-light user-dir`: the path for fairseq's `common.user_dir`."""

import argparse

from fairseq_w2v2_light.paths import user_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Takes none."""


def run(args: argparse.Namespace) -> int:
    """Prints the absolute package directory."""
    print(user_dir())
    return 0
