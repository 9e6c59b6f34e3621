"""What the five papers claim of size and speed, beside what this machine measures.

    python benchmarks/claims.py [--threads 2] [--seconds 10] [--repeats 7] [--families large stochastic pruned]

Random weights, batch size 1, from waveform to logits of 32 labels. large: against stock fairseq's wav2vec 2.0 LARGE in
fp32 (24 layers, GroupNorm frontend: the 317 M of the papers), ours with everything off, W2V2-Light at each number of
attention maps, and the distilled students. stochastic: BASE at operating points, against its own s1q1k1. pruned: the
two architectures that HJ-Pruning's Fig. 5 shows, against the unpruned BASE. What a table compares takes turns in one
process; times are medians. Parameters are those of `w2v2-light cost`. Word error rates need the papers' data and are
not compared here. Exits with 1 when a limit of ours is missed.
"""

import argparse
import sys
from typing import Callable, Dict, List, NamedTuple, Tuple

from limits import verdict

from fairseq_w2v2_light.runtime.half import multiplies_bfloat16
from fairseq_w2v2_light.study.bench import Contender, Row, Setting, compare, format_machine, machine
from fairseq_w2v2_light.study.cost import LETTERS, cost, load_subject

LARGE, BASE = "pretraining/w2v2_light_large", "pretraining/w2v2_light_base"
# how often a map is computed, of LARGE's 24 layers; the recipe says 8
EVERY = (1, 2, 3, 4, 6, 8, 12, 24)
POINTS = ("s1q1k1", "s1q1k2", "s1q2k1", "s1q2k2", "s2q1k1", "s2q2k2", "s3q1k1", "s3q2k2", "s4q1k1", "s4q2k2")
STOCHASTIC = {"squeeze_factors": "[1,2,3,4]", "query_pools": "[1,2]", "kv_pools": "[1,2]"}
# HJ-Pruning, Fig. 5, read off its vector graphics
PRUNED = {
    "20 %": {
        "conv_feature_layers": "[(357,10,5),(371,3,2),(487,3,2),(509,3,2),(510,3,2),(506,2,2),(509,2,2)]",
        "layer_heads": "[8,11,12,12,12,12,12,12,11,10,8,5]",
        "layer_ffn": "[2723,2658,2734,2823,2876,2888,2947,2996,2927,2657,2161,2045]",
    },
    "40 %": {
        "conv_feature_layers": "[(297,10,5),(241,3,2),(407,3,2),(501,3,2),(510,3,2),(505,2,2),(509,2,2)]",
        "layer_heads": "[4,9,8,11,12,10,11,12,10,7,4,4]",
        "layer_ffn": "[2140,1862,2051,2193,2423,2494,2691,2825,2449,1672,932,763]",
    },
}
# layers that take no time, to see whether this runs at all
SMOKE = {"encoder_embed_dim": "64", "encoder_ffn_embed_dim": "128", "encoder_attention_heads": "2"}


class Claim(NamedTuple):
    """What a paper says, what was measured instead, its value, and the least that we accept."""

    paper: str
    says: str
    measured: str
    value: float
    least: float


# the contenders of a table, and what its rows and their stored parameters, by name, say of the claims
Family = Tuple[List[Contender], Callable[[Dict[str, Row], Dict[str, int]], List[Claim]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="narrow layers, one turn: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(seconds=1.0, repeats=1)
        args = parser.parse_args()
    print(f"{format_machine(machine())}; {args.threads} threads, {args.seconds:g} s, {args.repeats} turns")
    claims: List[Claim] = []
    for family in args.families:
        contenders, judge = FAMILIES[family](SMOKE if args.smoke else {})
        table = compare(contenders, Setting(args.seconds, 1, args.threads), args.repeats, memory=False)
        parameters = {row.contender.name: stored(row.contender) for row in table.rows}
        print(f"\n{family}\n\n{format_rows(table.rows, parameters)}", flush=True)
        claims += judge({row.contender.name: row for row in table.rows}, parameters)
    print("\nclaims\n\n| paper | claims | measured | least |\n|---|---|---|---|")
    for claim in claims:
        print(f"| {claim.paper} | {claim.says} | {claim.measured} | {claim.least:g} |")
    missed = [f"{claim.paper}: {claim.says}" for claim in claims if claim.value < claim.least]
    return verdict(missed, args.smoke)


def large(changes: Dict[str, str]) -> Family:
    """LARGE, shared and distilled."""
    whole = overrides({"unique_layers": "24", "attention_map_every": "1", **changes})
    stock = Contender("stock fairseq LARGE", LARGE, whole, "fairseq")
    contenders = [stock, Contender("everything off", LARGE, whole)]
    for every in EVERY:
        maps = overrides({"attention_map_every": str(every), **changes})
        contenders.append(Contender(light(24 // every), LARGE, maps))
    halves = ("bfloat16",) if multiplies_bfloat16() else ()
    recipes = {"W2V2-Light": LARGE}
    recipes.update({f"bigfoot_{layers}": f"distillation/bigfoot_{layers}" for layers in (12, 4)})
    recipes.update({f"distillw2v2_s{size}": f"distillation/distillw2v2_s{size}" for size in (3, 5)})
    for name, recipe in recipes.items():
        dtypes = (*halves, "int8") if recipe == LARGE else ("float32", *halves, "int8")
        contenders += [Contender(f"{name}, {one}", recipe, overrides(changes), dtype=one) for one in dtypes]

    def judge(rows: Dict[str, Row], parameters: Dict[str, int]) -> List[Claim]:
        fewer = {name: parameters[stock.name] / count for name, count in parameters.items()}
        faster = {name: row.speed_up for name, row in rows.items()}
        shared = 100 * (1 - 1 / fewer["W2V2-Light, int8"])
        reduced = max(faster[f"W2V2-Light, {dtype}"] for dtype in (*halves, "int8"))
        curve = ", ".join(f"{24 // every}: {faster[light(24 // every)]:.2f}" for every in EVERY)
        own = faster[light(cost(load_subject(LARGE, []))["attention_maps"])]
        return [
            ratio("none", "everything off", faster["everything off"], 1.05),
            Claim("W2V2-Light", "91 % fewer parameters", f"{shared:.2f} %", shared, 91.2),
            Claim("W2V2-Light", "1.31 x faster", f"{own:.2f} x (recipe); by the maps computed: {curve}", own, 1.31),
            ratio("W2V2-Light", "not in the paper: bfloat16 or int8", reduced, 2.6),
            ratio("Shrinking Bigfoot", "4.8 x smaller", fewer["bigfoot_4, float32"], 4.84),
            ratio("Shrinking Bigfoot", "2 x faster", faster["bigfoot_4, float32"], 2.0),
            ratio("DistillW2V2 (S3)", "12 x smaller", fewer["distillw2v2_s3, float32"], 11.8),
            ratio("DistillW2V2 (S5, float32)", "8 x faster", faster["distillw2v2_s5, float32"], 8.0),
        ]

    return contenders, judge


def light(maps: int) -> str:
    return f"W2V2-Light, {maps} of 24 maps"


def stochastic(changes: Dict[str, str]) -> Family:
    """BASE at operating points, against its least reduction."""
    whole = overrides({"unique_layers": "12", **STOCHASTIC, **changes})

    def judge(rows: Dict[str, Row], parameters: Dict[str, int]) -> List[Claim]:
        shares = {name: row.speed_up / row.mac_ratio for name, row in rows.items()}
        worst = min(shares, key=shares.get)
        measured = f"speed-up of its MAC ratio, least: {shares[worst]:.2f} ({worst})"
        return [Claim("Stochastic wav2vec 2.0", "compute on demand", measured, shares[worst], 0.8)]

    return [Contender(point, BASE, whole, point=point) for point in POINTS], judge


def pruned(changes: Dict[str, str]) -> Family:
    """BASE as HJ-Pruning left it."""
    shapes = {"unpruned BASE": {}, **{f"pruned by {share}": keys for share, keys in PRUNED.items()}}

    def judge(rows: Dict[str, Row], parameters: Dict[str, int]) -> List[Claim]:
        row = rows["pruned by 40 %"]
        macs, share = 100 * (1 - 1 / row.mac_ratio), row.speed_up / row.mac_ratio
        measured = f"{macs:.1f} % fewer, {row.speed_up:.2f} x faster ({share:.2f} of its MAC ratio)"
        return [Claim("HJ-Pruning", "40 % fewer MACs", measured, share, 0.85)]

    return [Contender(name, BASE, overrides({"unique_layers": "12", **keys})) for name, keys in shapes.items()], judge


def ratio(paper: str, says: str, value: float, least: float) -> Claim:
    return Claim(paper, says, f"{value:.2f} x", value, least)


FAMILIES = {"large": large, "stochastic": stochastic, "pruned": pruned}


def overrides(changes: Dict[str, str]) -> Tuple[str, ...]:
    return tuple(f"model.{key}={value}" for key, value in changes.items())


def stored(contender: Contender) -> int:
    """Stored parameters of a contender's recipe, as `w2v2-light cost` counts them."""
    return cost(load_subject(contender.source, list(contender.overrides), LETTERS))["parameters"]


def format_rows(rows: List[Row], parameters: Dict[str, int]) -> str:
    """A Markdown table against the first row."""
    lines = [
        "| model | precision | parameters | fewer | GMACs | fewer | ms | times faster | / MAC ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = parameters[rows[0].contender.name]
    for row in rows:
        count = parameters[row.contender.name]
        lines.append(
            f"| {row.contender.name} | {row.contender.dtype} | {count / 1e6:.2f} M | {first / count:.2f} x "
            f"| {row.macs / 1e9:.2f} | {row.mac_ratio:.2f} x | {1e3 * row.median:.1f} | {row.speed_up:.2f} "
            f"| {row.speed_up / row.mac_ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
