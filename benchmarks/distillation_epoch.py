"""An epoch of distillation with a warm teacher cache, beside an epoch of plain CTC fine-tuning of the same student.

    python benchmarks/distillation_epoch.py FOLDER TEACHER [--threads 1]

FOLDER is a manifest folder with letter labels, TEACHER a CTC checkpoint. Everything runs through fairseq-hydra-train;
an epoch is half the time between the ends of the first and the third one in fairseq's log. The runs are interleaved;
the first round, which fills the cache, does not count.
"""

import argparse
import datetime
import os
import re
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import List

import soundfile
from streaming import speech

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.data.manifest import localise_manifest
from fairseq_w2v2_light.study.experiment import train

# the student of examples/distill
STUDENT = [
    "model.recipe=pretraining/w2v2_light_tiny",
    "+model.recipe_overrides={encoder_layers:2,encoder_embed_dim:96,encoder_ffn_embed_dim:384,unique_layers:0,"
    "conv_feature_layers:'[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'}",
]
# the same without the keys that the recipe has already
DISTILLED = [
    "model.recipe_overrides.conv_feature_layers='[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'",
]
TERMS = ("ctc", "kl", "hidden", "mmi")
WAYS = {
    "plain CTC (fairseq's criterion)": None,
    "CTC + KL": ("ctc", "kl"),
    "CTC + hidden MSE + KL": ("ctc", "hidden", "kl"),
    "hidden MSE + LF-MMI": ("hidden", "mmi"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("outputs/distillation_epoch"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--utterances", type=int, default=300, help="how many of the training split make an epoch")
    parser.add_argument("--threads", type=int, help="of each training (default: OMP_NUM_THREADS, or all)")
    parser.add_argument("--smoke", action="store_true", help="two of the ways, on noise, once: whether they run at all")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.out = Path(folder)
            args.data = make_noise(args.out / "noise")
            args.teacher = train("finetuning/tiny", args.data, args.out / "teacher", STUDENT, max_update=10)
            compare(args, list(WAYS)[:2], rounds=1, uncounted=0)
    elif args.data is None or args.teacher is None:
        parser.error("FOLDER and TEACHER are needed; only --smoke does without")
    else:
        compare(args, list(WAYS), rounds=args.repeats, uncounted=1)


def compare(args, ways: List[str], rounds: int, uncounted: int) -> None:
    """Measures ways in turns, in so many rounds after those that do not count, and prints their table."""
    data = args.out / "data"
    if not (data / "train.tsv").is_file():
        localise_manifest(args.data, data)
        for suffix, header in (("tsv", 1), ("ltr", 0)):
            lines = (data / f"train.{suffix}").read_text().splitlines(keepends=True)
            (data / f"train.{suffix}").write_text("".join(lines[: args.utterances + header]))
        w2v2_light(["denominator", str(data), str(data / "graph.npz"), "--labels", "ltr"])

    seconds = {way: [] for way in ways}
    for number in range(uncounted + rounds):
        for way in ways:
            measured = epoch_seconds(WAYS[way], data, args)
            if number >= uncounted:
                seconds[way].append(measured)
    plain = statistics.median(seconds[ways[0]])
    print("\n| training | s an epoch, median | of plain CTC |\n|---|---|---|")
    for way, values in seconds.items():
        median = statistics.median(values)
        print(f"| {way} | {median:.1f} | {median / plain:.2f} |")


def make_noise(folder: Path) -> Path:
    """A manifest folder of six seconds of noise in each split, with letter labels."""
    folder.mkdir()
    for index in range(6):
        soundfile.write(str(folder / f"{index}.wav"), speech(1.0, seed=index), 16000)
    for split in ("train", "valid", "test"):
        (folder / f"{split}.tsv").write_text(f"{folder}\n" + "".join(f"{index}.wav\t16000\n" for index in range(6)))
        (folder / f"{split}.ltr").write_text("A B | A |\n" * 6)
    (folder / "dict.ltr.txt").write_text("| 12\nA 12\nB 6\n")
    return folder


def epoch_seconds(terms, data: Path, args) -> float:
    out = args.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    common = [
        "optimization.max_epoch=3",
        "dataset.disable_validation=true",
        "checkpoint.no_save=true",
        "model.apply_mask=false",
    ]
    if terms is None:
        train("finetuning/tiny", data, out, [*STUDENT, *common])
    else:
        weights = [f"criterion.{term}_weight={0.05 if term == 'hidden' else 1.0}" for term in terms]
        weights += [f"criterion.{term}_weight=0.0" for term in TERMS if term not in terms]
        settings = [
            f"criterion.teacher={args.teacher.resolve()}",
            f"criterion.teacher_cache={(args.out / 'cache').resolve()}",
            f"criterion.denominator={(data / 'graph.npz').resolve()}",
        ]
        train("distillation/tiny", data, out, [*DISTILLED, *weights, *settings, *common])
    times = re.findall(r"^\[([^\]]+)\]\[train\]\[INFO\] - epoch 00\d \|", (out / "train.log").read_text(), re.MULTILINE)
    assert len(times) == 3, f"expected three epochs in {out / 'train.log'}, found {len(times)}"
    first, _, last = (datetime.datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f") for time in times)
    return (last - first).total_seconds() / 2


if __name__ == "__main__":
    main()
