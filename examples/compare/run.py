"""Compare every way of compressing a recogniser on one corpus: one table, the mean of several seeds.

    python examples/compare/run.py FOLDER [--out outputs/compare] [--seeds 1 2 3] [--start OUT]

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. For each seed it trains the uncompressed model and from it, or beside it, a shared and stochastic one, a
distilled one and its streaming successor, a pruned one, and what no paper combines: a student that is shared,
stochastic and distilled at once. `w2v2-light tradeoff` measures everything in float32 and in int8, --others too.

With --start, the output folder of this example on another corpus, each model goes on from that corpus's model of its
way and seed instead of from random weights: for half an hour of speech from which nothing learns to spell. Every step
prints its command; a run that was stopped goes on where it was.
"""

import argparse
import csv
import shlex
import statistics
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.experiment import PLAIN, localised, train

# half the frontend's channels of the uncompressed model, and narrower layers
STUDENT = [
    "model.recipe_overrides.conv_feature_layers='[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'",
    "model.recipe_overrides.encoder_layers=4",
    "model.recipe_overrides.encoder_embed_dim=128",
    "model.recipe_overrides.encoder_ffn_embed_dim=512",
]
DISTILLED = [
    *STUDENT,
    "task.normalize=false",  # it will stream; the teacher normalises its audio itself
]
COMBINED = [
    *STUDENT,
    "model.recipe=pretraining/light_stochastic_tiny",
    "model.recipe_overrides.unique_layers=2",  # two stored layers serve four
]
# the hidden states of a pre-LN teacher are large: their MSE starts near 60 here, the other terms below 2
LOSSES = ["criterion.hidden_map=every:1", "criterion.hidden_weight=0.05"]
SHARED = ["model.unique_layers=2"]
# half an hour of speech is little: more masks and dropout than the recipe's serve every operating point
REGULARISED = ["model.mask_prob=0.35", "model.mask_channel_prob=0.2", "model.dropout=0.1"]
ALL_POINTS = ",".join(f"s{s}q{q}k{k}" for s in (1, 2, 3) for q in (1, 2) for k in (1, 2))
# way: (its name in the table, the updates of its trainings, the operating points to measure; empty: its only one)
WAYS = {
    "plain": ("uncompressed", (400, 3000), ""),
    "shared": ("shared, stochastic", (400, 3500), ALL_POINTS),
    "distilled": ("distilled", (4000,), ""),
    "streaming": ("distilled, streaming (480 ms)", (2000,), ""),
    "pruned": ("pruned by 40 % of the MACs", (900, 600), ""),
    "combined": ("shared, stochastic, distilled", (4000,), "s1q1k1,s1q2k2,s2q1k2,s3q2k2"),
}
# what a way goes on from, on a second corpus, besides its own; students have the uncompressed model as their teacher
STARTS = {
    "distilled": ["plain", "distilled"],
    "streaming": ["plain", "distilled"],
    "pruned": ["plain"],
    "combined": ["plain", "combined"],
}
# real-time factors are of one thread, which models as small as these can use
THREADS = "1"
DTYPES = "float32,int8"
SPLITS = ("valid", "test")
SEED = ", seed "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="where everything goes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--start", type=Path, help="this example's output folder on another corpus, to go on from")
    parser.add_argument("--scale", type=float, default=1.0, help="times the updates of every training")
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="overrides of every training by CTC")
    parser.add_argument(
        "--others", nargs="*", default=(), metavar="NAME=MODEL", help="more rows, e.g. other checkpoints"
    )
    parser.add_argument("--points", help="operating points of the stochastic models to measure")
    args = parser.parse_args()
    data = localised(args.data, args.out)

    own = [name for name, _, _ in WAYS.values()]
    if any(other.partition("=")[0] in own for other in args.others):
        raise SystemExit(f"--others: found {' '.join(args.others)}, expected other names than {', '.join(own)}")
    if args.start:  # before anything is trained for nothing
        for needed in {start for way in args.ways for start in STARTS.get(way, [way])}:
            [started(needed, seed, args) for seed in args.seeds]
    models = list(args.others)
    for way in args.ways:
        name, _, points = WAYS[way]
        for seed in args.seeds:
            checkpoint = model(way, seed, data, args).resolve()
            points = args.points or points if points else ""
            models.append(f"{name}{SEED}{seed}={checkpoint}" + (f"@{points}" if points else ""))
    results = {split: compare(models, data, split, args.out / split) for split in SPLITS}
    table = format_results(results)
    atomic_write_text(args.out / "results.md", table + "\n")
    say("\n" + table)


def model(way: str, seed: int, data: Path, args) -> Path:
    """The checkpoint of a way and a seed, trained if it is not yet."""
    return TRAININGS[way](seed, data, args)


def train_plain(seed: int, data: Path, args) -> Path:
    return pretrained_and_finetuned("plain", seed, data, args, list(PLAIN), [])


def train_shared(seed: int, data: Path, args) -> Path:
    return pretrained_and_finetuned("shared", seed, data, args, SHARED, REGULARISED)


def pretrained_and_finetuned(way: str, seed: int, data: Path, args, pretraining, finetuning) -> Path:
    out = folder(way, seed, args)
    if args.start:
        start = started(way, seed, args)
    else:
        recipe = "pretraining/light_stochastic_tiny"
        settings = [*pretraining, f"common.seed={seed}"]
        start = train(recipe, data, out / "pretrained", settings, updates(way, 0, args), say)
    settings = [f"model.w2v_path={start.resolve()}", *finetuning]
    return by_ctc("finetuning/tiny", data, out / "finetuned", settings, seed, updates(way, 1, args), args)


def train_distilled(seed: int, data: Path, args) -> Path:
    return train_student("distilled", DISTILLED, seed, data, args)


def train_combined(seed: int, data: Path, args) -> Path:
    return train_student("combined", COMBINED, seed, data, args)


def train_student(way: str, shape: List[str], seed: int, data: Path, args) -> Path:
    start = [f"model.w2v_path={started(way, seed, args).resolve()}"] if args.start else []
    settings = [*shape, *LOSSES, *teacher(data, args), *start]
    out = folder(way, seed, args)
    return by_ctc("distillation/tiny", data, out, settings, seed, updates(way, 0, args), args)


def train_streaming(seed: int, data: Path, args) -> Path:
    """What the distilled model becomes when it hears 320 ms at a time, and 160 ms more."""
    start = train_distilled(seed, data, args)
    settings = [f"model.w2v_path={start.resolve()}", *LOSSES, *teacher(data, args)]
    out = folder("streaming", seed, args)
    return by_ctc("distillation/streaming_tiny", data, out, settings, seed, updates("streaming", 0, args), args)


def train_pruned(seed: int, data: Path, args) -> Path:
    out = folder("pruned", seed, args)
    settings = [f"model.w2v_path={train_plain(seed, data, args).resolve()}", "criterion.method=mac"]
    settings += ["criterion.target=0.4"]
    gated = by_ctc("pruning/tiny", data, out / "gated", settings, seed, updates("pruned", 0, args), args)
    pruned = out / "pruned.pt"
    if not pruned.is_file():
        run(["prune", str(gated), str(pruned)])
    # the learning rate is a third of the first phase's, as in the paper
    settings = [f"model.w2v_path={pruned.resolve()}", "optimization.lr=[0.0003]"]
    return by_ctc("finetuning/tiny", data, out / "finetuned", settings, seed, updates("pruned", 1, args), args)


TRAININGS = {
    "plain": train_plain,
    "shared": train_shared,
    "distilled": train_distilled,
    "streaming": train_streaming,
    "pruned": train_pruned,
    "combined": train_combined,
}


def by_ctc(recipe: str, data: Path, out: Path, settings: Iterable[str], seed: int, count: int, args) -> Path:
    return train(recipe, data, out, [*settings, *args.set, f"common.seed={seed}"], count, say)


def teacher(data: Path, args) -> List[str]:
    """The criterion's: the uncompressed model of the first seed, of all students."""
    checkpoint = train_plain(args.seeds[0], data, args)
    cache = (args.out / f"cache_seed{args.seeds[0]}").resolve()
    return [f"criterion.teacher={checkpoint.resolve()}", f"criterion.teacher_cache={cache}"]


def updates(way: str, training: int, args) -> int:
    return max(2, round(args.scale * WAYS[way][1][training]))


def folder(way: str, seed: int, args) -> Path:
    return args.out / way / f"seed{seed}"


def started(way: str, seed: int, args) -> Path:
    """The other corpus's model of a way and a seed."""
    found = args.start / way / f"seed{seed}"
    for checkpoint in (found / "finetuned" / "checkpoint_last.pt", found / "checkpoint_last.pt"):
        if checkpoint.is_file():
            return checkpoint
    raise SystemExit(
        f"--start: found no model in {found}; run this example on the other corpus first, with --out there"
    )


def run(command: List[str]) -> None:
    say("\n$ " + shlex.join(["w2v2-light", *command]))
    if w2v2_light(command) != 0:
        raise SystemExit(2)


def compare(models: List[str], data: Path, split: str, out: Path) -> List[Dict[str, str]]:
    """The rows that `w2v2-light tradeoff` finds on a split."""
    options = ["--split", split, "--dtype", DTYPES, "--threads", THREADS, "--out", str(out)]
    run(["tradeoff", str(data), *models, *options])
    with open(out / "tradeoff.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def format_results(results: Dict[str, List[Dict[str, str]]]) -> str:
    """A row for each model, operating point and precision, the mean over its seeds, as a Markdown table."""
    groups: Dict[Tuple[str, ...], Dict[str, List[Dict[str, str]]]] = {}
    for split, rows in results.items():
        for row in rows:
            key = (row["model"].partition(SEED)[0], row["operating_point"], row["dtype"])
            groups.setdefault(key, {}).setdefault(split, []).append(row)
    last = SPLITS[-1]
    head = ["model", "operating point", "weights", "seeds", "parameters", "MiB", "GMACs (10 s)", "real-time factor"]
    head += [*(f"{split} WER %" for split in results), f"{last} CER %"]
    lines = [head, ["---"] * len(head)]
    for key, found in groups.items():
        counted = [mean(found[last], column) for column in ("parameters", "bytes", "macs", "real_time_factor")]
        cells = [f"{counted[0] / 1e6:.2f} M", f"{counted[1] / 2**20:.2f}", f"{counted[2] / 1e9:.2f}"]
        cells += [f"{counted[3]:.5f}", *(spread(found[split], "wer") for split in results), spread(found[last], "cer")]
        lines.append([*key, str(len(found[last])), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mean(rows: List[Dict[str, str]], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)


def spread(rows: List[Dict[str, str]], column: str) -> str:
    """The mean over the seeds, and from the lowest to the highest."""
    values = [float(row[column]) for row in rows]
    text = f"{mean(rows, column):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
