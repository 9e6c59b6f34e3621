"""Prune a model of real connected digits, frontend and Transformer together or the Transformer alone, and compare.

    python examples/pruning/run.py FOLDER [--checkpoint CHECKPOINT]

FOLDER is a fairseq manifest folder (`w2v2-light prepare` makes one from your recordings): train, valid and test with
letter labels. Phase 1, fine-tuning, is the plain model of examples/digits, unless --checkpoint gives a fine-tuned one.
Then, for each method and each share of the MACs to remove: phase 2 prunes by gates, `w2v2-light prune` removes what
they closed, phase 3 fine-tunes what is left. Every step prints its command; a run that was stopped goes on where it
was.
"""

import argparse
import json
import shlex
from pathlib import Path

from fairseq_w2v2_light.cli.main import main as w2v2_light
from fairseq_w2v2_light.files import atomic_write_text
from fairseq_w2v2_light.study.cost import cost, load_subject
from fairseq_w2v2_light.study.experiment import decode, localised, train, train_plain
from fairseq_w2v2_light.study.speed import compare_real_time_factors

SPLITS = ("valid", "test")
POINT = "s1q1k1"
TRANSFORMER = ["model.prune_units=[heads,ffn,hidden]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="manifest folder with train, valid, test and letter labels")
    parser.add_argument("--checkpoint", type=Path, help="CTC checkpoint to prune; default: trained first")
    parser.add_argument("--out", type=Path, default=Path("outputs/pruning"), help="where everything goes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--percent", nargs="+", type=int, default=(20, 40, 60), help="of the MACs to remove")
    parser.add_argument("--updates", type=int, nargs=2, default=(900, 600), metavar=("PRUNE", "FINETUNE"))
    parser.add_argument("--first-updates", type=int, nargs=2, default=(400, 3000), help="of phase 1, with pre-training")
    parser.add_argument(
        "--frontend",
        metavar="LAYERS",
        help="conv_feature_layers of phase 1's model (default: the tiny recipe's), e.g. equally wide layers, as "
        "wav2vec 2.0 has them: '[(96, 10, 5)] + [(96, 3, 2)] * 4 + [(96, 2, 2)] * 2'",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    data = localised(args.data, args.out)
    frontend = [f'model.conv_feature_layers="{args.frontend}"'] if args.frontend else []
    start = args.checkpoint or train_plain(data, args.out / "start", args.first_updates, say, frontend)
    start = start.resolve()

    models = {"unpruned": start}
    for percent in args.percent:
        for method in args.methods:
            models[f"{method} {percent} %"] = prune_model(method, percent, start, data, args)
    speeds = compare_real_time_factors(models, data, "test")
    results = {name: measure(name, checkpoint, data, speeds[name], args) for name, checkpoint in models.items()}
    atomic_write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    table = format_results(results)
    atomic_write_text(args.out / "results.md", table + "\n")
    say("\n" + table)


def by_macs(percent: int, start: Path):
    """`mac`: of all MACs."""
    return [f"criterion.target={percent / 100:g}"]


def by_sizes(percent: int, start: Path):
    """`sepsize`: as much of the frontend's parameters as of the Transformer's.

    More than the share of the MACs: parameters go from late frontend layers, which hear few frames. On digits 40 % of
    both had 34 % of the MACs, 60 % had 52 %.
    """
    target = min(percent / 86, 0.95)
    return [f"criterion.target={target:.3f}", f"criterion.cnn_target={target:.3f}"]


def by_transformer_size(percent: int, start: Path):
    """`transformer`: the share of its parameters that has that share of all MACs, if both shrink alike."""
    macs = cost(load_subject(str(start), []))["macs_by_part"]
    share = (macs["attention"] + macs["ffn"]) / sum(macs.values())
    return [f"criterion.target={min(percent / 100 / share, 0.95):.3f}", *TRANSFORMER]


METHODS = {"mac": by_macs, "sepsize": by_sizes, "transformer": by_transformer_size}


def prune_model(method: str, percent: int, start: Path, data: Path, args) -> Path:
    """Phases 2 and 3; returns the pruned and fine-tuned checkpoint."""
    out = args.out / f"{method}_{percent}"
    settings = [
        f"model.w2v_path={start}",
        f"criterion.method={method}",
        *METHODS[method](percent, start),
        f"common.seed={args.seed}",
    ]
    gated = train("pruning/tiny", data, out / "gated", settings, args.updates[0], say)
    pruned = out / "pruned.pt"
    if not pruned.is_file():
        command = ["prune", str(gated), str(pruned), "--report"]
        say("$ " + shlex.join(["w2v2-light", *command]))
        if w2v2_light(command) != 0:
            raise SystemExit(2)
    settings = [f"model.w2v_path={pruned.resolve()}", *LAST_PHASE, f"common.seed={args.seed}"]
    return train("finetuning/tiny", data, out / "finetuned", settings, args.updates[1], say)


# of phase 3; the learning rate is a third of phase 1's, as in the paper
LAST_PHASE = ["optimization.lr=[0.0003]"]


def measure(name: str, checkpoint: Path, data: Path, speed: float, args) -> dict:
    """Decodes a model with fairseq's own infer and counts it."""
    counted = cost(load_subject(str(checkpoint), []))
    row = {"parameters": counted["parameters"], "macs": counted["macs"], "macs_by_part": counted["macs_by_part"]}
    row["frontend"] = [layer[0] for layer in load_subject(str(checkpoint), []).network.conv_layers]
    row["real_time_factor"] = speed
    for split in SPLITS:
        folder = args.out / name.replace(" %", "").replace(" ", "_") / "decoded"
        decoded = decode(checkpoint, data, [POINT], folder, split, report=say)[0]
        row[split] = {key: decoded[key] for key in ("errors", "words", "wer")}
    say(f"  {name}: " + ", ".join(f"{split} WER {row[split]['wer']:.2f} %" for split in SPLITS))
    return row


def format_results(results) -> str:
    """A Markdown table; the first model is the one that was pruned. Speeds are those of 10 s, as the MACs are."""
    before = next(iter(results.values()))
    lines = [
        "| model | MACs removed | of the frontend | its layers keep % | parameters | real-time factor | speed-up | "
        "/ MAC ratio | " + " | ".join(f"{split} WER %" for split in SPLITS) + " |",
        "|---" * (8 + len(SPLITS)) + "|",
    ]
    for name, row in results.items():
        faster, fewer = before["real_time_factor"] / row["real_time_factor"], before["macs"] / row["macs"]
        cells = [
            f"{100 * (1 - 1 / fewer):.1f} %",
            f"{100 * (1 - row['macs_by_part']['frontend'] / before['macs_by_part']['frontend']):.1f} %",
            " ".join(f"{100 * kept / of:.0f}" for kept, of in zip(row["frontend"], before["frontend"])),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['real_time_factor']:.4f}",
            f"{faster:.2f}",
            f"{faster / fewer:.2f}",
            *(f"{row[split]['wer']:.2f}" for split in SPLITS),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
