"""What int8 and bfloat16 save: bytes, and time against stock fairseq in fp32.

    python benchmarks/quantized.py [--threads 2] [--seconds 10] [--repeats 9]

wav2vec 2.0 LARGE (24 layers of 1024 channels, 317 M parameters with the heads of pre-training) with a CTC head of 32
labels and random weights hears one utterance at a time: fairseq's own Wav2Vec2Model in fp32, and the same weights as
model folders in float32, int8 and bfloat16, each prepared for this machine. They take turns; the table has medians and
the fastest runs. Exits with 1 when a limit is missed: int8 in 340 MiB, int8 and bfloat16 1.8 x faster than fairseq
(bfloat16 only where the CPU multiplies it).
"""

import argparse
import functools
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from limits import verdict

from fairseq_w2v2_light.nn.config import encoder_config_from
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import WEIGHTS, read_folder, write_folder
from fairseq_w2v2_light.runtime.half import multiplies_bfloat16
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.runtime.quantized import quantize_
from fairseq_w2v2_light.study.bench import SYMBOLS, format_machine, machine, timer
from fairseq_w2v2_light.study.cost import load_subject
from fairseq_w2v2_light.study.peers import stock_fairseq
from fairseq_w2v2_light.study.speed import in_turns

SPEEDUP, LARGEST_MIB = 1.8, 340
SMOKE = dict(recipe="pretraining/w2v2_light_tiny", seconds=1.0, repeats=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="pretraining/w2v2_light_large", help="run without any sharing")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the recipe has, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a tiny network, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keys = recipe_keys(args.recipe, args.layers)
    model = CtcModel(encoder_config_from(keys), SYMBOLS).eval().requires_grad_(False)
    parameters = sum(value.numel() for value in model.state_dict().values())
    print(f"{format_machine(machine())}; {args.threads} threads; {args.recipe} without sharing:")
    print(f"{parameters:,} parameters; {args.seconds:g} s of audio, {args.repeats} runs each in turn\n")

    runs = {"fairseq float32": stock_fairseq(model)}
    sizes = {"fairseq float32": 4 * parameters / 2**20}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16", "int8"):
            if dtype == "int8":
                quantize_(model)
            write_folder(model, Path(folder) / dtype, dtype=dtype)
            sizes[dtype] = (Path(folder) / dtype / WEIGHTS).stat().st_size / 2**20
            if dtype != "bfloat16" or multiplies_bfloat16():
                runs[dtype] = ours(Path(folder) / dtype, round(50 * args.seconds))
    del model
    wave = torch.randn(1, round(args.seconds * 16000))
    with torch.inference_mode():
        logits = {name: run(wave) for name, run in runs.items()}
        seconds = in_turns({name: timer(functools.partial(run, wave)) for name, run in runs.items()}, args.repeats)
    return show(seconds, sizes, logits, limits=not args.smoke)


def recipe_keys(recipe: str, layers: int) -> dict:
    """The recipe's model, every layer with weights and an attention map of its own."""
    keys = load_subject(recipe, ["model.attention_map_every=1"]).model
    count = layers or keys.encoder_layers
    changes = ["attention_map_every=1", f"encoder_layers={count}", f"unique_layers={count}", "layer_map="]
    changes += ["squeeze_factors=[1]", "query_pools=[1]", "kv_pools=[1]", "unsqueeze_factor=1", "operating_point="]
    return load_subject(recipe, [f"model.{change}" for change in changes]).model


def ours(folder: Path, rows: int):
    """The model in a folder, as a function from waveform to logits."""
    model = read_folder(folder)
    prepare_(model, rows=rows)
    return lambda wave: model(wave)[0]


def show(seconds, sizes, logits, limits: bool) -> int:
    """Prints the table; returns 1 when `limits` and one of them is missed."""
    first = next(iter(seconds))
    median, least = ({name: pick(times) for name, times in seconds.items()} for pick in (statistics.median, min))
    print("| model | weights | of fairseq's | median | times faster | fastest | times faster | error of the logits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in seconds:
        error = (logits[name] - logits[first]).std() / logits[first].std()
        print(
            f"| {name} | {sizes[name]:.1f} MiB | 1/{sizes[first] / sizes[name]:.2f} | {median[name]:.3f} s "
            f"| {median[first] / median[name]:.2f} | {least[name]:.3f} s | {least[first] / least[name]:.2f} "
            f"| {error:.1e} |"
        )
    if not limits:
        return 0
    missed = [
        f"{name} speed" for name in ("int8", "bfloat16") if name in median and median[first] < SPEEDUP * median[name]
    ]
    missed += [] if sizes["int8"] <= LARGEST_MIB else ["int8 size"]
    return verdict(missed)


if __name__ == "__main__":
    sys.exit(main())
