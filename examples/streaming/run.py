"""Turn an offline student of real connected digits into streaming ones, with and without a teacher's help.

    python examples/streaming/run.py FOLDER [--teacher CHECKPOINT]

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Without --teacher, the plain model of examples/digits is trained first. Stage 1 distils an offline
student; stage 2 starts from it, for each chunk and look-ahead once with the losses of distillation, once with CTC
alone. Every step prints its command; a run that was stopped goes on where it was.
"""

import argparse
import json
import re
from pathlib import Path

from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.cost import load_subject
from fairseq_w2v2_light.study.experiment import decode, localised, train, train_plain
from fairseq_w2v2_light.study.latency import latency

STUDENT = [
    "task.normalize=false",  # it will stream; the teacher normalises its audio itself
    "model.recipe_overrides.conv_feature_layers='[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'",
    "model.recipe_overrides.encoder_layers=4",
    "model.recipe_overrides.encoder_embed_dim=128",
    "model.recipe_overrides.encoder_ffn_embed_dim=512",
    "criterion.hidden_map=every:1",
]
# the hidden states of a pre-LN teacher are large: their MSE starts near 60 here, the other terms below 2
DISTILLED = dict(ctc=1.0, hidden=0.05, kl=1.0)
ALONE = dict(ctc=1.0)
WAYS = {"CTC alone": ALONE, "distilled": DISTILLED}
SPLITS = ("valid", "test")
PAPER = (
    "relative: of the WER, to the offline student's. DistillW2V2 (arXiv 2303.09278) reports 9 to 23.4 % at 480 ms, on "
    "other data."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--teacher", type=Path, help="CTC checkpoint; default: trained first")
    parser.add_argument("--out", type=Path, default=Path("outputs/streaming"), help="where everything goes")
    parser.add_argument("--updates", type=int, nargs=2, default=(6000, 2000), metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--teacher-updates", type=int, nargs=2, default=(400, 3000), help="pre-training, fine-tuning")
    parser.add_argument(
        "--chunks", nargs="+", default=("32+16", "16+8", "8+4"), help="chunk+lookahead in frames of 20 ms, e.g. 24+0"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="of stage 2")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    data = localised(args.data, args.out)
    teacher = args.teacher or train_plain(data, args.out / "teacher", args.teacher_updates, say)
    teacher = teacher.resolve()

    results = {}
    offline = train_offline(data, teacher, args)
    record(results, "offline student", offline, data, args)
    for layout in args.chunks:
        chunk, ahead = (int(frames) for frames in layout.split("+"))
        for way in args.ways:
            name = f"{20 * (chunk + ahead)} ms ({layout} frames), {way}"
            record(results, name, train_streaming(name, way, chunk, ahead, offline, data, teacher, args), data, args)
    table = format_results(results)
    atomic_write_text(args.out / "results.md", table + "\n")
    say("\n" + table)


def train_offline(data: Path, teacher: Path, args) -> Path:
    """Stage 1: a student that hears whole utterances, from random weights."""
    settings = [*STUDENT, *losses(DISTILLED, teacher, args), f"common.seed={args.seed}"]
    return train("distillation/tiny", data, folder("offline student", args), settings, args.updates[0], say)


def train_streaming(name: str, way: str, chunk: int, ahead: int, offline: Path, data, teacher: Path, args) -> Path:
    """Stage 2: the offline student, made causal, learns to hear `chunk` frames at a time, and `ahead` more."""
    settings = [
        f"model.w2v_path={offline.resolve()}",
        f"model.chunk_frames=[{chunk}]",
        f"model.lookahead_frames={ahead}",
        *losses(WAYS[way], teacher, args),
        f"common.seed={args.seed}",
    ]
    return train("distillation/streaming_tiny", data, folder(name, args), settings, args.updates[1], say)


def losses(weights, teacher: Path, args):
    """Overrides of the criterion; `weights` are those of the terms, the others are 0."""
    needs_teacher = weights is not ALONE
    return [
        *(f"criterion.{term}_weight={weights.get(term, 0.0)}" for term in ("ctc", "hidden", "kl")),
        f"criterion.teacher={teacher if needs_teacher else ''}",
        f"criterion.teacher_cache={(args.out / 'cache').resolve() if needs_teacher else ''}",
    ]


def record(results, name: str, checkpoint: Path, data: Path, args) -> None:
    """Decodes a model with fairseq's own infer; adds its errors and words on each split, and its latency in ms."""
    row = {"latency_ms": (latency(load_subject(str(checkpoint), []))["points"][0]["ms"] or {}).get("total")}
    for split in SPLITS:
        decoded = decode(checkpoint, data, ["s1q1k1"], folder(name, args) / "decoded", split, report=say)[0]
        row[split] = {key: decoded[key] for key in ("errors", "words", "wer")}
    say(f"  {name}: " + ", ".join(f"{split} WER {row[split]['wer']:.2f} %" for split in SPLITS))
    results[name] = row
    atomic_write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")


def format_results(results) -> str:
    """A Markdown table; the first model is the one that the others are compared to."""
    both = " + ".join(SPLITS)
    lines = [
        f"| student | latency ms | valid WER % | test WER % | test, relative | {both}, relative |",
        "|---|---|---|---|---|---|",
    ]
    offline = next(iter(results.values()))
    for name, row in results.items():
        wait = "whole utterance" if row["latency_ms"] is None else f"{row['latency_ms']:.0f}"
        cells = [wait, *(f"{row[split]['wer']:.2f}" for split in SPLITS)]
        cells += ["" if row is offline else degradation(row, offline, splits) for splits in (["test"], SPLITS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    words = sum(offline[split]["words"] for split in SPLITS)
    sizes = f"one word is {100 / offline['test']['words']:.2f} % of the test split, {100 / words:.2f} % of both."
    return "\n".join([*lines, "", PAPER, sizes])


def degradation(row, offline, splits) -> str:
    """How many more errors than the offline student makes, in percent of those."""
    errors, before = (sum(model[split]["errors"] for split in splits) for model in (row, offline))
    return f"{100 * (errors / before - 1):+.1f} %" if before else "of no errors"


def folder(name: str, args) -> Path:
    return args.out / re.sub(r"\W+", "_", name).strip("_")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
