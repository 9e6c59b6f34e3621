"""How fast the runtime is on this CPU, beside stock fairseq and Hugging Face with the same weights, in fp32.

    python benchmarks/inference.py [--models base large sew_tiny digits ...] [--threads 2] [--seconds 10] [--repeats 9]

`w2v2-light bench` (study/bench.py) with models that have names here: batch size 1, waveform to logits. "ours" is a
loaded model as it is, "ours, packed" the same laid out for this CPU. Weights are random: speed does not depend on them.

--cpu-time counts the time that this process computed (with --threads 1): for a machine that others use too. Exits with
1 when a limit of ours is missed, but not with --smoke.
"""

import argparse
import sys
import time
from typing import Iterator, List, Tuple

from limits import verdict

from fairseq_w2v2_light.study.bench import (
    LOADED,
    OURS,
    Contender,
    Setting,
    Table,
    compare,
    format_machine,
    format_table,
    machine,
)
from fairseq_w2v2_light.study.experiment import PLAIN

TINY = "pretraining/light_stochastic_tiny"
# as `w2v2-light prune` left the digits model at 40 % of the MACs: two of 16 heads, one hidden channel less
PRUNED = (
    "model.conv_feature_layers=[(32,10,5),(64,3,2),(96,3,2),(128,3,2),(192,3,2),(192,2,2),(191,2,2)]",
    "model.conv_norm_dims=[32,64,96,128,192,192,192]",
    "model.encoder_embed_dim=191",
    "model.norm_dim=192",
    "model.head_dim=48",
    f"model.conv_pos_group_dims={[12] * 15 + [11]}",
    "model.layer_heads=[1,0,1,0]",
    "model.layer_ffn=[595,590,603,591]",
)
# wav2vec 2.0 LARGE as trained on 60,000 hours
PRE_NORM = ("model.layer_norm_first=true", "model.extractor_mode=layer_norm", "model.conv_bias=true")
# (recipe, overrides) of models that others have, too
MODELS = {
    "base": ("pretraining/w2v2_light_base", ("model.unique_layers=12",)),
    "large": ("pretraining/w2v2_light_large", ("model.unique_layers=24", "model.attention_map_every=1", *PRE_NORM)),
    "sew_tiny": ("pretraining/sew_tiny", ()),
    "digits": (TINY, PLAIN),
}
# (recipe, overrides, operating points; the first one is what the others are compared with)
POINTS = {
    "stochastic_tiny": (TINY, (), ("s1q1k1", "s1q2k2", "s2q1k1", "s2q1k2", "s2q2k2", "s3q2k2")),
    "stochastic_base": (
        "pretraining/w2v2_light_base",
        ("model.unique_layers=12", "model.squeeze_factors=[1,2,3]", "model.query_pools=[1,2]", "model.kv_pools=[1,2]"),
        ("s1q1k1", "s1q2k2", "s2q1k1", "s2q2k2", "s3q2k2"),
    ),
}
STOCK, HUGGING_FACE, PACKED = "stock fairseq", "Hugging Face, SDPA", "ours, packed"
# how many times as fast as others the packed model is at least
LEAST = {
    "base": {STOCK: 1.15, HUGGING_FACE: 1.0},
    "large": {STOCK: 1.05, HUGGING_FACE: 1.0},
    "sew_tiny": {HUGGING_FACE: 1.2},
    "digits": {STOCK: 1.15, HUGGING_FACE: 1.0},
}
# of the machine's fastest product, in the best runs; of the MAC ratio, at every operating point
LEAST_OF_PRODUCT, LEAST_OF_MACS = {"large": 0.85}, 0.8
SMOKE = dict(models=["digits", "stochastic_tiny", "pruned"], seconds=1.0, repeats=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*MODELS, *POINTS, "pruned"]
    parser.add_argument("--models", nargs="+", choices=known, default=["base", "large", "sew_tiny", "digits", "pruned"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="the peak of memory, too, each in a process of its own")
    parser.add_argument("--cpu-time", action="store_true", help="time that this process computed, not the clock's")
    parser.add_argument("--smoke", action="store_true", help="tiny models, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    if args.cpu_time and args.threads > 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{format_machine(machine())}; {args.repeats} turns")
    missed: List[str] = []
    for name in args.models:
        table = compare(contenders(name), Setting(args.seconds, 1, args.threads), args.repeats, clock, args.memory)
        print(f"\n{name}: {format_table(table)}", flush=True)
        missed += [
            f"{name}: {what} {found:.3f} of {least:g}" for what, found, least in limits(name, table) if found < least
        ]
    return verdict(missed, args.smoke)


def contenders(name: str) -> List[Contender]:
    """The rows of a named model's table."""
    if name == "pruned":
        shapes = {"unpruned": PLAIN, "pruned": (*PLAIN, *PRUNED)}
        return [row for shape, overrides in shapes.items() for row in packed_and_not(shape, TINY, overrides)]
    if name in POINTS:
        recipe, overrides, points = POINTS[name]
        return [Contender(point, recipe, overrides, point=point) for point in points]
    recipe, overrides = MODELS[name]
    others = {STOCK: "fairseq", HUGGING_FACE: "huggingface"}
    rows = [Contender(title, recipe, overrides, peer) for title, peer in others.items()]
    return [*rows, *packed_and_not("ours", recipe, overrides)]


def limits(name: str, table: Table) -> Iterator[Tuple[str, float, float]]:
    """(what, what was measured, the least that we accept) of a model's table."""
    rows = {row.contender.name: row for row in table.rows}
    for other, least in LEAST.get(name, {}).items():
        if other in rows:
            yield f"times as fast as {other}", rows[other].median / rows[PACKED].median, least
        else:
            print(f"\n{name}: not compared with {other}")
    if name in LEAST_OF_PRODUCT:
        yield "of the product's speed at best", rows[PACKED].best_fraction, LEAST_OF_PRODUCT[name]
    if name in POINTS:
        for point, row in rows.items():
            yield f"{point}, of its MAC ratio", row.speed_up / row.mac_ratio, LEAST_OF_MACS


def packed_and_not(name: str, recipe: str, overrides) -> List[Contender]:
    return [Contender(name, recipe, overrides, LOADED), Contender(f"{name}, packed", recipe, overrides, OURS)]


if __name__ == "__main__":
    sys.exit(main())
