"""What one pre-training update costs, beside stock fairseq, and what memory shared layers save in it.

    python benchmarks/training.py [--recipe pretraining/w2v2_light_base] [--layers 12] [--batch-seconds 20]
        [--threads 2] [--repeats 5] [--cpu-time] [--profile] [--parts time memory] [model.key=value ...]

Time: ours (`W2V2LightModel`, `light_contrastive`), unshared and with every mechanism off, against fairseq's
`Wav2Vec2Model` and `Wav2vecCriterion`: one configuration, the same weights and batch, complete updates (masks,
negatives, forward, backward, gradient norm, fairseq's Adam) in turns in one process. First both compute the loss of one
set of masks and negatives without dropout; the last column is the relative difference. Layer drop is off unless
overridden, so that every update runs all layers.

Memory: the peak resident memory that two updates (with Adam's states from the first) add in a process of their own, for
the shared model of --memory-recipe as it is and with a map in every layer, and for the unshared one. "counted" is what
weights, gradients and Adam's two states take in fp32; the rest are activations, which sharing leaves as they are.

--cpu-time counts the time that this process computed (with --threads 1): for a machine that others use too. Exits with
1 when a limit of ours is missed, but not with --smoke.
"""

import argparse
import functools
import math
import statistics
import sys
import time
import warnings
from typing import Any, Dict, List

import torch
from limits import verdict

from fairseq_w2v2_light.study.experiment import PLAIN
from fairseq_w2v2_light.study.speed import in_turns
from fairseq_w2v2_light.study.training import PARTS, Side, batch, build, clip_norm, fixed_loss, peak_memory, update

# four numbers of fp32 for each weight: itself, its gradient and Adam's two averages
BYTES_OF_A_WEIGHT = 16
TINY = "pretraining/light_stochastic_tiny"
# times faster than stock fairseq, and of the unshared model's memory
LEAST_SPEED_UP, MOST_MEMORY = 1.25, 0.6
SMOKE = dict(
    recipe=TINY, layers=2, batch_seconds=2.0, repeats=1, memory_recipe=TINY, memory_layers=24, memory_seconds=1.0
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="model.key=value", help="for both sides of the time table")
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--recipe", default="pretraining/w2v2_light_base")
    parser.add_argument("--layers", type=int, help="fewer Transformer layers than the recipe's, to fit")
    parser.add_argument("--batch-seconds", type=float, default=20.0, help="audio of a batch, after cropping")
    parser.add_argument("--utterances", type=int, default=2)
    parser.add_argument("--padded", action="store_true", help="pad to the longest utterance (task.enable_padding)")
    parser.add_argument("--memory-recipe", default="pretraining/w2v2_light_large")
    parser.add_argument("--memory-layers", type=int, help="as --layers, of --memory-recipe")
    parser.add_argument("--memory-seconds", type=float, default=10.0, help="as --batch-seconds, of --memory-recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="time that this process computed, not the clock's")
    parser.add_argument("--profile", action="store_true", help="then show which operations one update of each spends")
    parser.add_argument("--smoke", action="store_true", help="tiny models, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    if args.cpu_time and args.threads > 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    warnings.filterwarnings("ignore", module=r"fairseq\.|torch\.")
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, {args.repeats} turns")
    missed: List[str] = []
    if "memory" in args.parts:
        share = compare_memory(args)
        missed += [f"memory {share:.2f} of {MOST_MEMORY:g}"] if share > MOST_MEMORY else []
    if "time" in args.parts:
        torch.set_num_threads(args.threads)
        speed_up = compare_time(args)
        missed += [f"time {speed_up:.2f} of {LEAST_SPEED_UP:g}"] if speed_up < LEAST_SPEED_UP else []
    return verdict(missed, args.smoke)


def compare_time(args) -> float:
    """Prints the table of updates of both sides, and with --profile their operations; how many times faster ours is."""
    plain = (*PLAIN, "model.encoder_layerdrop=0.0", *layers_override(args.layers), *args.overrides)
    sample = batch(args.recipe, args.batch_seconds, args.utterances, args.padded)
    sides = [build(args.recipe, plain, stock=True), build(args.recipe, plain, stock=False)]
    sides[1].model.load_state_dict(sides[0].model.state_dict(), strict=True)
    losses = [fixed_loss(side, sample) for side in sides]
    clock = time.process_time if args.cpu_time else time.perf_counter
    clip = clip_norm(args.recipe)

    updates = {side.name: functools.partial(update, side, sample, clip, clock) for side in sides}
    seconds = in_turns(updates, args.repeats)

    weights = sum(parameter.numel() for parameter in sides[1].model.parameters())
    shape = tuple(sample["net_input"]["source"].shape)
    print(f"\n{args.recipe} {' '.join(plain)}: {weights / 1e6:.1f} M, a batch of {shape[0]} x {shape[1]} samples\n")
    print("| update | s, median | s, min | forward | backward | norm and Adam | speed-up | loss, difference |")
    print("|---|---|---|---|---|---|---|---|")
    totals = {name: [sum(turn.values()) for turn in turns] for name, turns in seconds.items()}
    reference = statistics.median(totals[sides[0].name])
    for side, loss in zip(sides, losses):
        total = totals[side.name]
        parts = " | ".join(f"{statistics.median(turn[part] for turn in seconds[side.name]):.3f}" for part in PARTS)
        print(
            f"| {side.name} | {statistics.median(total):.3f} | {min(total):.3f} | {parts} "
            f"| {reference / statistics.median(total):.2f} | {abs(loss / losses[0] - 1):.1e} |"
        )
    if args.profile:
        for side in sides:
            print(f"\n{side.name}\n\n{operations(side, sample, clip)}")
    return reference / statistics.median(totals[sides[1].name])


def layers_override(layers) -> List[str]:
    return [f"model.encoder_layers={layers}"] if layers else []


def operations(side: Side, sample: Dict[str, Any], clip: float) -> str:
    """The operations of one update that take longest, as a table of torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        update(side, sample, clip)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)


def compare_memory(args) -> float:
    """Prints the table of peak memory: unshared, shared with a map in every layer, and as the recipe has it.

    Returns the last one's share of the first one's.
    """
    layers = layers_override(args.memory_layers)
    cases = {
        "unshared": (*layers, *PLAIN, "model.attention_map_every=1"),
        "shared, a map in every layer": (*layers, "model.attention_map_every=1"),
        "shared, as in the recipe": tuple(layers),
    }
    print(f"\n{args.memory_recipe} {' '.join(layers)}: a batch of {args.memory_seconds:g} s, MiB\n")
    print("| model | weights | counted | peak of an update | of the unshared model's |")
    print("|---|---|---|---|---|")
    reference = None
    for name, overrides in cases.items():
        overrides = (*overrides, "model.encoder_layerdrop=0.0")
        weights, peak = peak_memory(args.memory_recipe, overrides, args.memory_seconds, args.utterances, args.threads)
        peak = math.nan if peak is None else peak  # not Linux
        reference = reference or peak
        counted = BYTES_OF_A_WEIGHT * weights / 2**20
        print(f"| {name} | {weights / 1e6:.2f} M | {counted:.0f} | {peak / 2**20:.0f} | {peak / reference:.2f} |")
    return peak / reference


if __name__ == "__main__":
    sys.exit(main())
