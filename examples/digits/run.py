"""Compress a recogniser of real connected digits: plain, shared + stochastic, and fine-tuned for one operating point.

    python examples/digits/run.py FOLDER

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Trains three models (about an hour on two CPU cores), and compares them with `w2v2-light tradeoff`: a
table, a plot and a page. Every step prints its command; a run that was stopped goes on where it was.
"""

import argparse
import shlex
import time
from pathlib import Path

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.study.experiment import PLAIN, localised, train

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
    data = localised(args.data, args.out)

    models = {}
    if "light" in args.models:
        light = models["light"] = fit("light", data, args, LIGHT, REGULARISED, args.light_updates)
        say(f"\nfine-tune the stochastic model for {SPECIFIC} only")
        models[f"light, {SPECIFIC} only"] = train(
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
    if "plain" in args.models:
        models["plain"] = fit("plain", data, args, list(PLAIN), [], args.plain_updates)

    command = ["tradeoff", str(data), *(f"{name}={path}" for name, path in models.items()), "--out", str(args.out)]
    command += ["--title", "Connected digits, test split"]
    say("\n$ " + shlex.join(["w2v2-light", *command]))
    if w2v2_light(command) != 0:
        raise SystemExit(2)
    say(f"\nplot: {args.out / 'tradeoff.png'}, {args.out / 'tradeoff.html'}; {time.time() - start:.0f} s in all")


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


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
