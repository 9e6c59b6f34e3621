"""`w2v2-light config-dir`: the path for fairseq's `--config-dir`."""

import argparse

from fairseq_w2v2_light.paths import config_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One optional group."""
    parser.add_argument("group", nargs="?", help="a group of recipes, such as pretraining or finetuning (default: all)")


def run(args: argparse.Namespace) -> int:
    """Prints the absolute directory of the recipes."""
    print(config_dir(args.group))
    return 0
