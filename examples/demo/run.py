"""From nothing to a compressed speech recogniser: synthesise, pre-train, fine-tune, decode, compare.

`make demo` runs this. About ten minutes on two CPU cores; every step is a command that is printed, so that you can
run it yourself with other data. A run that was stopped goes on where it was.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from fairseq_w2v2_light.study.experiment import train

TITLE = "One checkpoint, four operating points (synthetic digits, unseen voices)"
POINTS = ("s1q1k1", "s1q2k2", "s2q1k2", "s3q2k2")
BATCH = "dataset.max_tokens=200000"  # 12.5 seconds: many small updates learn faster from little speech than few large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="where everything goes")
    parser.add_argument("--pretrain-updates", type=int, default=150)
    parser.add_argument("--finetune-updates", type=int, default=1800)
    parser.add_argument("--utterances", type=int, nargs=3, default=(900, 60, 100), metavar=("TRAIN", "VALID", "TEST"))
    args = parser.parse_args()
    start = time.time()
    data, out = args.out / "data", args.out

    step(1, "synthesise connected digits: espeak-ng voices, the test voices never in training")
    if not (data / "train.tsv").is_file():
        w2v2_light("prepare", "synth", str(data), "--utterances", *map(str, args.utterances))

    step(2, "pre-train a model of four layers that share one set of weights, at a random operating point per update")
    pretrained = train(
        "pretraining/light_stochastic_tiny",
        data,
        out / "pretrained",
        [BATCH],
        max_update=args.pretrain_updates,
        report=say,
    )

    step(3, "fine-tune it by CTC, still at random operating points")
    finetuned = train(
        "finetuning/tiny",
        data,
        out / "finetuned",
        [f"model.w2v_path={pretrained.resolve()}", BATCH],
        max_update=args.finetune_updates,
        report=say,
    )

    step(
        4,
        f"transcribe and score the test voices at {len(POINTS)} operating points of the one checkpoint, and time them",
    )
    w2v2_light(
        *("tradeoff", str(data), f"shared, stochastic={finetuned}", "--operating-points", ",".join(POINTS)),
        *("--out", str(out), "--title", TITLE),
    )
    say(f"\nplot: {out / 'tradeoff.png'}, {out / 'tradeoff.html'}; checkpoint: {finetuned}")
    say(f"{time.time() - start:.0f} s in all")


def step(number: int, text: str) -> None:
    say(f"\n[{number}/4] {text}")


def say(text: str) -> None:
    print(text, flush=True)


def w2v2_light(*arguments: str) -> None:
    say("$ " + shlex.join(["w2v2-light", *arguments]))
    subprocess.run([sys.executable, "-m", "fairseq_w2v2_light.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
