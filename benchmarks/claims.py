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
import statistics
import sys
from typing import Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from fairseq_w2v2_light.nn.counts import SAMPLE_RATE
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.half import multiplies_bfloat16
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.study.bench import format_machine, load_model, machine, timer
from fairseq_w2v2_light.study.cost import LETTERS, cost, load_subject
from fairseq_w2v2_light.study.peers import stock_fairseq
from fairseq_w2v2_light.study.speed import in_turns

LARGE, BASE = "pretraining/w2v2_light_large", "pretraining/w2v2_light_base"
# how often a map is computed, of LARGE's 24 layers; the recipe says 4
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


class Contender(NamedTuple):
    """What is timed: its name, precision, stored parameters, MACs, and a function that computes logits."""

    name: str
    dtype: str
    parameters: int
    macs: int
    run: Callable[[], Tensor]


class Claim(NamedTuple):
    """What a paper says, what was measured instead, its value, and the least that we accept."""

    paper: str
    says: str
    measured: str
    value: float
    least: float


Result = Tuple[List[Contender], Callable[[Dict[str, float]], List[Claim]]]


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
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    wave = torch.randn(1, round(args.seconds * SAMPLE_RATE))
    print(f"{format_machine(machine())}; {args.threads} threads, {args.seconds:g} s, {args.repeats} turns")
    claims: List[Claim] = []
    for family in args.families:
        contenders, judge = FAMILIES[family](wave, SMOKE if args.smoke else {})
        with torch.inference_mode():
            seconds = in_turns({one.name: timer(one.run) for one in contenders}, args.repeats)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = contenders[0]
        print(f"\n{family}\n")
        print("| model | precision | parameters | fewer | GMACs | fewer | ms | times faster | / MAC ratio |")
        print("|---|---|---|---|---|---|---|---|---|")
        for one in contenders:
            faster, lighter = medians[first.name] / medians[one.name], first.macs / one.macs
            smaller = first.parameters / one.parameters
            print(
                f"| {one.name} | {one.dtype} | {one.parameters / 1e6:.2f} M | {smaller:.2f} x | {one.macs / 1e9:.2f} "
                f"| {lighter:.2f} x | {1e3 * medians[one.name]:.1f} | {faster:.2f} | {faster / lighter:.2f} |",
                flush=True,
            )
        claims += judge({one.name: medians[first.name] / medians[one.name] for one in contenders})
    print("\nclaims\n\n| paper | claims | measured | least |\n|---|---|---|---|")
    for claim in claims:
        print(f"| {claim.paper} | {claim.says} | {claim.measured} | {claim.least:g} |")
    missed = [f"{claim.paper}: {claim.says}" for claim in claims if claim.value < claim.least]
    print(f"\nlimits: {'missed by ' + '; '.join(missed) if missed else 'met'}")
    return 1 if missed and not args.smoke else 0


def large(wave: Tensor, changes: Dict[str, str]) -> Result:
    """LARGE, shared and distilled."""
    whole = {"unique_layers": "24", "attention_map_every": "1", **changes}
    stock = stock_fairseq(load_model(LARGE, overrides(whole)))
    counted = counts(LARGE, whole, wave)
    contenders = [Contender("stock fairseq LARGE", "float32", *counted, lambda: stock(wave))]
    contenders.append(contender("everything off", LARGE, whole, wave))
    for every in EVERY:
        name = f"W2V2-Light, {24 // every} of 24 maps"
        contenders.append(contender(name, LARGE, {"attention_map_every": str(every), **changes}, wave))
    halves = ("bfloat16",) if multiplies_bfloat16() else ()
    recipes = {"W2V2-Light": LARGE}
    recipes.update({f"bigfoot_{layers}": f"distillation/bigfoot_{layers}" for layers in (12, 4)})
    recipes.update({f"distillw2v2_s{size}": f"distillation/distillw2v2_s{size}" for size in (3, 5)})
    for name, recipe in recipes.items():
        dtypes = (*halves, "int8") if recipe == LARGE else ("float32", *halves, "int8")
        contenders += [contender(f"{name}, {dtype}", recipe, changes, wave, dtype) for dtype in dtypes]

    def judge(faster: Dict[str, float]) -> List[Claim]:
        fewer = {one.name: counted[0] / one.parameters for one in contenders}
        shared = 100 * (1 - 1 / fewer["W2V2-Light, int8"])
        light = {24 // every: faster[f"W2V2-Light, {24 // every} of 24 maps"] for every in EVERY}
        reduced = max(faster[f"W2V2-Light, {dtype}"] for dtype in (*halves, "int8"))
        curve = ", ".join(f"{maps}: {ratio:.2f}" for maps, ratio in light.items())
        return [
            ratio("none", "everything off", faster["everything off"], 1.05),
            Claim("W2V2-Light", "91 % fewer parameters", f"{shared:.2f} %", shared, 91.2),
            Claim("W2V2-Light", "1.31 x faster", f"by the maps computed: {curve}", max(light.values()), 1.31),
            ratio("W2V2-Light", "not in the paper: bfloat16 or int8", reduced, 2.6),
            ratio("Shrinking Bigfoot", "4.8 x smaller", fewer["bigfoot_4, float32"], 4.84),
            ratio("Shrinking Bigfoot", "2 x faster", faster["bigfoot_4, float32"], 2.0),
            ratio("DistillW2V2 (S3)", "12 x smaller", fewer["distillw2v2_s3, float32"], 11.8),
            ratio("DistillW2V2 (S5, float32)", "8 x faster", faster["distillw2v2_s5, float32"], 8.0),
        ]

    return contenders, judge


def stochastic(wave: Tensor, changes: Dict[str, str]) -> Result:
    """BASE at operating points, against its least reduction."""
    whole = {"unique_layers": "12", **STOCHASTIC, **changes}
    model = load_model(BASE, overrides(whole))
    prepare_(model, "float32", rows=model.config.frames(wave.size(1)))
    contenders = []
    for text in POINTS:
        counted = counts(BASE, whole, wave, text)
        point = OperatingPoint.parse(text)
        contenders.append(Contender(text, "float32", *counted, lambda point=point: model(wave, point=point)[0]))

    def judge(faster: Dict[str, float]) -> List[Claim]:
        shares = {one.name: faster[one.name] * one.macs / contenders[0].macs for one in contenders}
        worst = min(shares, key=shares.get)
        measured = f"speed-up of its MAC ratio, least: {shares[worst]:.2f} ({worst})"
        return [Claim("Stochastic wav2vec 2.0", "compute on demand", measured, shares[worst], 0.8)]

    return contenders, judge


def pruned(wave: Tensor, changes: Dict[str, str]) -> Result:
    """BASE as HJ-Pruning left it."""
    whole = {"unique_layers": "12"}
    contenders = [contender("unpruned BASE", BASE, whole, wave)]
    contenders += [contender(f"pruned by {share}", BASE, {**whole, **keys}, wave) for share, keys in PRUNED.items()]

    def judge(faster: Dict[str, float]) -> List[Claim]:
        last = contenders[-1]
        macs = 100 * (1 - last.macs / contenders[0].macs)
        share = faster[last.name] * last.macs / contenders[0].macs
        measured = f"{macs:.1f} % fewer, {faster[last.name]:.2f} x faster ({share:.2f} of its MAC ratio)"
        return [Claim("HJ-Pruning", "40 % fewer MACs", measured, share, 0.85)]

    return contenders, judge


def ratio(paper: str, says: str, value: float, least: float) -> Claim:
    return Claim(paper, says, f"{value:.2f} x", value, least)


FAMILIES = {"large": large, "stochastic": stochastic, "pruned": pruned}


def contender(name: str, recipe: str, changes: Dict[str, str], wave: Tensor, dtype: str = "float32") -> Contender:
    """A recipe's model, prepared for this machine."""
    model = load_model(recipe, overrides(changes))
    prepare_(model, dtype, rows=model.config.frames(wave.size(1)))
    return Contender(name, dtype, *counts(recipe, changes, wave), lambda: model(wave)[0])


def counts(recipe: str, changes: Dict[str, str], wave: Tensor, point: str = "") -> Tuple[int, int]:
    """Stored parameters of a recipe's model, and its MACs with a CTC head."""
    counted = cost(load_subject(recipe, overrides(changes), LETTERS), wave.size(1) / SAMPLE_RATE, point)
    return counted["parameters"], counted["macs"]


def overrides(changes: Dict[str, str]) -> List[str]:
    return [f"model.{key}={value}" for key, value in changes.items()]


if __name__ == "__main__":
    sys.exit(main())
