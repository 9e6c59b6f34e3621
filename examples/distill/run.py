"""Distil a small student of real connected digits in several ways, and see which of them help.

    python examples/distill/run.py FOLDER [--teacher CHECKPOINT]

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Without --teacher, the plain model of examples/digits is trained first (about 20 minutes on two CPU
cores). Every student has the same shape, the same random weights for a seed, and as many updates. Every step prints
its command; a run that was stopped goes on where it was.
"""

import argparse
import json
import statistics
from pathlib import Path

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.experiment import decode, localised, train, train_plain

STUDENT = [
    "model.recipe_overrides.conv_feature_layers='[(16,10,5),(32,3,2),(48,3,2),(64,3,2),(96,3,2),(96,2,2),(96,2,2)]'",
]
# the hidden states of a pre-LN teacher are large: their MSE starts near 60 here, the other terms below 2
HIDDEN = 0.05
WAYS = {
    "from scratch (CTC)": dict(ctc=1.0),
    "CTC + KL": dict(ctc=1.0, kl=1.0),
    "CTC + hidden MSE + KL": dict(ctc=1.0, hidden=HIDDEN, kl=1.0),
    "CTC + hidden MSE + LF-MMI": dict(ctc=1.0, hidden=HIDDEN, mmi=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--teacher", type=Path, help="CTC checkpoint; default: trained first")
    parser.add_argument("--out", type=Path, default=Path("outputs/distill"), help="where everything goes")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--teacher-updates", type=int, nargs=2, default=(400, 3000), help="pre-training, fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    data = localised(args.data, args.out)
    teacher = args.teacher or train_plain(data, args.out / "teacher", args.teacher_updates, say)
    teacher = teacher.resolve()
    graph = data / "denominator.npz"
    if not graph.is_file():
        w2v2_light(["denominator", str(data), str(graph), "--labels", "ltr"])

    results = {}
    for way in args.ways:
        for seed in args.seeds:
            out = args.out / way.replace(" ", "_").replace("(", "").replace(")", "") / f"seed{seed}"
            checkpoint = train_student(WAYS[way], data, out, teacher, graph, seed, args)
            wers = {
                split: decode(checkpoint, data, ["s1q1k1"], out / "decoded", split, report=say)[0]["wer"]
                for split in ("valid", "test")
            }
            results.setdefault(way, {})[seed] = wers
            say(f"  {way}, seed {seed}: " + ", ".join(f"{split} WER {wer:.2f} %" for split, wer in wers.items()))
            atomic_write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    table = format_results(results)
    atomic_write_text(args.out / "results.md", table + "\n")
    say("\n" + table)


def train_student(weights, data: Path, out: Path, teacher: Path, graph: Path, seed: int, args) -> Path:
    """Trains one student; `weights` are those of the terms, the others are 0."""
    needs_teacher = set(weights) - {"ctc"}
    settings = [
        f"common.seed={seed}",
        *STUDENT,
        *(f"criterion.{term}_weight={weights.get(term, 0.0)}" for term in ("ctc", "kl", "hidden", "mmi")),
        f"criterion.teacher={teacher if needs_teacher else ''}",
        f"criterion.teacher_cache={(args.out / 'cache').resolve() if needs_teacher else ''}",
        f"criterion.denominator={graph.resolve() if 'mmi' in weights else ''}",
    ]
    return train("distillation/tiny", data, out, settings, max_update=args.updates, report=say)


def format_results(results) -> str:
    """Mean, and lowest to highest, over the seeds, as a Markdown table."""
    lines = ["| student | valid WER % | test WER % |", "|---|---|---|"]
    for way, seeds in results.items():
        cells = []
        for split in ("valid", "test"):
            wers = [wers[split] for wers in seeds.values()]
            cells.append(f"{statistics.mean(wers):.2f} ({min(wers):.2f} to {max(wers):.2f})")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
