"""Compress a recogniser of real connected digits: plain, shared + stochastic, and fine-tuned for one operating point.

    python examples/digits/run.py FOLDER

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Trains three models (about an hour on two CPU cores), decodes each with fairseq's own infer, and writes
a table and a plot. Every step prints its command; a run that was stopped goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

from fairseq_w2v2_light.data.manifest import localise_manifest
from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.experiment import PLAIN, as_records, compare_points, format_table, train
from fairseq_w2v2_light.study.plot import plot_tradeoff

LIGHT = ["model.unique_layers=2"]  # two stored layers serve four
# half an hour of speech is little: more masks, dropout and updates than the recipe's serve every point
REGULARISED = ["model.mask_prob=0.35", "model.mask_channel_prob=0.2", "model.dropout=0.1"]
SPECIFIC = "s2q1k2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--out", type=Path, default=Path("outputs/digits"), help="where everything goes")
    parser.add_argument("--models", nargs="+", choices=("plain", "light"), default=("light", "plain"))
    parser.add_argument("--pretrain-updates", type=int, default=400)
    parser.add_argument("--plain-updates", type=int, default=3000, help="fine-tuning of the plain model")
    parser.add_argument("--light-updates", type=int, default=3500, help="fine-tuning of the shared, stochastic model")
    parser.add_argument("--specific-updates", type=int, default=1500, help="its fine-tuning for one operating point")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.time()
    data = args.out / "data"
    if not (data / "train.tsv").is_file():
        localise_manifest(args.data, data)

    rows = []
    if "light" in args.models:
        light = fit("light", data, args, LIGHT, REGULARISED, args.light_updates)
        rows += compare_points(light, data, all_points(light), args.out / "light/decoded", model="light", report=say)
        say(f"\nfine-tune the stochastic model for {SPECIFIC} only")
        specific = train(
            "finetuning/tiny",
            data,
            args.out / "light" / SPECIFIC,
            [
                f"model.w2v_path={light.resolve()}",
                f"model.operating_point={SPECIFIC}",
                # drawn operating points also regularise; without them, masks must do more
                "model.mask_prob=0.4",
                "model.mask_channel_prob=0.25",
                "model.dropout=0.1",
                "dataset.validate_interval_updates=250",
                f"common.seed={args.seed}",
            ],
            max_update=args.specific_updates,
            report=say,
        )
        rows += compare_points(
            specific, data, [SPECIFIC], args.out / "light/decoded-specific", model=f"light, {SPECIFIC} only", report=say
        )
    if "plain" in args.models:
        plain = fit("plain", data, args, list(PLAIN), [], args.plain_updates)
        rows += compare_points(plain, data, ["s1q1k1"], args.out / "plain/decoded", model="plain", report=say)

    say("\n" + format_table(rows))
    atomic_write_text(args.out / "tradeoff.json", json.dumps(as_records(rows), indent=2) + "\n")
    atomic_write_text(args.out / "tradeoff.md", format_table(rows) + "\n")
    plot_tradeoff(rows, args.out / "tradeoff.png", "Connected digits, test split")
    say(f"\nplot: {args.out / 'tradeoff.png'}; {time.time() - start:.0f} s in all")


def fit(name: str, data: Path, args, pretraining, finetuning, updates: int) -> Path:
    """Pre-trains and fine-tunes one model with overrides for either; returns its checkpoint."""
    say(f"\n{name}: pre-train")
    pretrained = train(
        "pretraining/light_stochastic_tiny",
        data,
        args.out / name / "pretrained",
        [*pretraining, f"common.seed={args.seed}"],
        max_update=args.pretrain_updates,
        report=say,
    )
    say(f"\n{name}: fine-tune")
    return train(
        "finetuning/tiny",
        data,
        args.out / name / "finetuned",
        [f"model.w2v_path={pretrained.resolve()}", f"common.seed={args.seed}", *finetuning],
        max_update=updates,
        report=say,
    )


def all_points(checkpoint: Path):
    """Every operating point that the checkpoint was trained for."""
    from fairseq_w2v2_light.study.cost import cost, load_subject

    return cost(load_subject(str(checkpoint), []))["operating_points"]


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
