"""Combine what no paper combines: a student that is shared, stochastic and distilled at once, and then int8.

    python examples/combine/run.py FOLDER [--teacher CHECKPOINT] [--others NAME=MODEL ...]

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Without --teacher, the plain model of examples/digits is trained first. The student has half the
teacher's frontend channels and four layers of 128 that two stored ones serve; it draws an operating point in every
update while it imitates the teacher. `w2v2-light tradeoff` then measures everything in float32 and in int8, --others
too, such as a pruned model of examples/pruning. Every step prints its command; a run that was stopped goes on where it
was.
"""

import argparse
import csv
import shlex
import statistics
from pathlib import Path
from typing import Dict, List, Tuple

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.data.manifest import localise_manifest
from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.experiment import train, train_plain

STUDENT = [
    "model.recipe=pretraining/light_stochastic_tiny",
    "model.recipe_overrides.conv_feature_layers='[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'",
    "model.recipe_overrides.encoder_layers=4",
    "model.recipe_overrides.unique_layers=2",
    "model.recipe_overrides.encoder_embed_dim=128",
    "model.recipe_overrides.encoder_ffn_embed_dim=512",
    "criterion.hidden_map=every:1",
    # the hidden states of a pre-LN teacher are large: their MSE starts near 60 here, the other terms below 2
    "criterion.hidden_weight=0.05",
]
POINTS = "s1q1k1,s1q2k2,s2q1k2,s3q2k2"
DTYPES = "float32,int8"
SPLITS = ("valid", "test")
SEED = ", seed "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--teacher", type=Path, help="CTC checkpoint; default: trained first")
    parser.add_argument("--others", nargs="*", default=(), metavar="NAME=MODEL", help="more rows, e.g. a pruned model")
    parser.add_argument("--out", type=Path, default=Path("outputs/combine"), help="where everything goes")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--teacher-updates", type=int, nargs=2, default=(400, 3000), help="pre-training, fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--points", default=POINTS, help="operating points of the student to measure")
    args = parser.parse_args()
    data = args.out / "data"
    if not (data / "train.tsv").is_file():
        localise_manifest(args.data, data)
    teacher = args.teacher or train_plain(data, args.out / "teacher", args.teacher_updates, say)

    models = [f"teacher={teacher.resolve()}", *args.others]
    for seed in args.seeds:
        student = train_student(data, teacher.resolve(), seed, args)
        models.append(f"shared, stochastic, distilled{SEED}{seed}={student.resolve()}@{args.points}")
    results = {split: compare(models, data, split, args.out / split) for split in SPLITS}
    table = format_results(results)
    atomic_write_text(args.out / "results.md", table + "\n")
    say("\n" + table)


def train_student(data: Path, teacher: Path, seed: int, args) -> Path:
    settings = [
        *STUDENT,
        f"criterion.teacher={teacher}",
        f"criterion.teacher_cache={(args.out / 'cache').resolve()}",
        f"common.seed={seed}",
    ]
    return train("distillation/tiny", data, args.out / f"student{seed}", settings, args.updates, say)


def compare(models: List[str], data: Path, split: str, out: Path) -> List[Dict[str, str]]:
    """The rows that `w2v2-light tradeoff` finds on a split."""
    command = ["tradeoff", str(data), *models, "--split", split, "--dtype", DTYPES, "--out", str(out)]
    say("\n$ " + shlex.join(["w2v2-light", *command]))
    if w2v2_light(command) != 0:
        raise SystemExit(2)
    with open(out / "tradeoff.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def format_results(results: Dict[str, List[Dict[str, str]]]) -> str:
    """A row for each model, operating point and precision, the mean over its seeds, as a Markdown table."""
    groups: Dict[Tuple[str, ...], Dict[str, List[Dict[str, str]]]] = {}
    for split, rows in results.items():
        for row in rows:
            key = (row["model"].partition(SEED)[0], row["operating_point"], row["dtype"])
            groups.setdefault(key, {}).setdefault(split, []).append(row)
    head = ["model", "operating point", "weights", "parameters", "MiB", "GMACs (10 s)", "real-time factor"]
    head += [f"{split} WER %" for split in results]
    lines = [head, ["---"] * len(head)]
    for key, found in groups.items():
        first = found[SPLITS[-1]][0]
        factor = statistics.mean(float(row["real_time_factor"]) for row in found[SPLITS[-1]])
        cells = [*key, f"{int(first['parameters']) / 1e6:.2f} M", f"{int(first['bytes']) / 2**20:.2f}"]
        cells += [f"{int(first['macs']) / 1e9:.2f}", f"{factor:.4f}"]
        lines.append([*cells, *(_spread([float(row["wer"]) for row in found[split]]) for split in results)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(wers: List[float]) -> str:
    mean = f"{statistics.mean(wers):.2f}"
    return mean if len(wers) == 1 else f"{mean} ({min(wers):.2f} to {max(wers):.2f})"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
