"""Whether an hour of audio gives the text of its pieces, in bounded memory, with its words at their places.

    python benchmarks/transcription.py --model MODEL --data FOLDER [--splits valid,test] [--minutes 60] [--gap 0.3]

Utterances of a manifest folder, shuffled, repeated and parted by --gap seconds, make one file. The gaps are zeros or,
with --gap-noise=-60, noise of that many dB of full scale. `w2v2-light transcribe` hears the file, the utterances one by
one, and a single one, each time in a process of its own, whose peak memory and time are told. The words of the file are
aligned with those of the utterances, and both with the references; their times are compared with those of a forced
alignment (the most probable CTC path) of each utterance's reference.

A gap of zeros takes zeros that an utterance itself begins or ends with along, and one with a quarter of a second of
zeros inside is cut there: such utterances may be recognised differently than alone. They are counted apart, or, with
--clean, left out. Exits with 1 when a limit is missed; that words do not differ is one where the gap is of zeros.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import soundfile
import torch
from limits import show

from fairseq_w2v2_light.data.references import read_references
from fairseq_w2v2_light.nn.frontend import receptive_field
from fairseq_w2v2_light.runtime.alignment import forced_tokens
from fairseq_w2v2_light.runtime.audio import wav_blocks
from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.recognizer import Recognizer
from fairseq_w2v2_light.runtime.scoring import HIT, align, count
from fairseq_w2v2_light.runtime.text import Labels

ZEROS_SECONDS = 0.25  # of zeros are not heard in a long recording
LIMITS = {"words": 0, "memory": 1.5e9, "times": 0.08}
SMOKE = dict(minutes=0.6, splits="smoke")
# the verb, and what the process took: bytes at its peak, seconds of the clock and of the CPU
CHILD = """
import json, resource, sys, time
from pathlib import Path
from fairseq_w2v2_light.cli.main import main

began = time.perf_counter()
code = main(["transcribe", *sys.argv[1:]])
seconds = time.perf_counter() - began
status = Path("/proc/self/status")
if status.is_file():  # of this program alone, not of the one that started it
    peak = 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"peak": peak, "seconds": seconds, "cpu": used.ru_utime + used.ru_stime}), file=sys.stderr)
sys.exit(code)
"""


class Utterance(NamedTuple):
    """A piece of the file. zeros: whether it may be heard differently beside zeros than alone."""

    path: Path
    reference: str
    zeros: bool


class Run(NamedTuple):
    """What one process transcribed, as --format json has it, and what it took: see CHILD."""

    results: List[Dict[str, Any]]
    took: Dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FOLDER|CHECKPOINT")
    parser.add_argument("--data", metavar="FOLDER", help="of manifests")
    parser.add_argument("--splits", default="test", help="some of its splits, with commas between (default: test)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--gap", type=float, default=0.3, help="seconds between utterances; 0: none")
    parser.add_argument("--gap-noise", type=float, metavar="DB", help="noise of so many dB there (default: zeros)")
    parser.add_argument("--clean", action="store_true", help="without utterances that have zeros of their own")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a tiny network and noise, for seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            parser.set_defaults(**SMOKE, **make_smoke(Path(folder)))
            args = parser.parse_args()
        if not (args.model and args.data):
            parser.error("--model and --data are needed")
        return measure(args, Path(folder))


def measure(args, folder: Path) -> int:
    model = load_ctc(args.model)
    utterances = read_utterances(args, model.sample_rate)
    order, starts = write_file(folder / "file.w64", args, utterances, model.sample_rate)
    used = sorted(set(order))
    heard = [transcribe(args, [utterances[index].path for index in some]) for some in (used, used[:1])]
    alone = dict(zip(used, heard[0].results))
    (result,), took = transcribe(args, [folder / "file.w64"])

    zeros = [utterances[index].zeros for index in order]
    print(f"{args.model}, torch {torch.__version__}, {args.threads} thread(s)")
    print(
        f"{result['seconds'] / 60:.1f} minutes: {len(order)} utterances, {len(used)} different ones, of which", end=" "
    )
    noise = "zeros" if args.gap_noise is None else f"noise of {args.gap_noise:g} dB"
    print(
        f"{sum(utterances[index].zeros for index in used)} have zeros of their own; {args.gap:g} s of {noise} between\n"
    )

    words = [(word, place) for place, index in enumerate(order) for word in alone[index]["text"].split()]
    changed = differences(words, result["words"], starts)
    beside = sum(zeros[place] for place in changed)
    certain = args.gap_noise is None and args.gap >= ZEROS_SECONDS
    references = [word for index in order for word in utterances[index].reference.split()]
    rates = [count(references, [word for word, _ in words]).rate, count(references, result["text"].split()).rate]
    audio = result["seconds"] - heard[1].results[0]["seconds"]
    memory = took["peak"] - heard[1].took["peak"]
    rows = [
        ("words of the utterances", f"{len(words)}", None, None),
        ("words that differ", f"{len(changed)} ({len(changed) / max(1, len(words)):.2%})", None, None),
        ("in utterances with zeros of their own", f"{beside}", None, None),
        ("in the others", f"{len(changed) - beside}", "words" if certain else None, len(changed) - beside),
        ("WER of the utterances, of the file", " %, ".join(f"{rate:.2f}" for rate in rates) + " %", None, None),
        ("peak memory above one utterance's", f"{memory / 1e6:.0f} MB", "memory", memory),
        *(
            (name, f"{seconds:.1f} s, real-time factor {seconds / audio:.4f}", None, None)
            for name, seconds in (
                ("time above one utterance's", took["seconds"] - heard[1].took["seconds"]),
                ("CPU time above one utterance's", took["cpu"] - heard[1].took["cpu"]),
            )
        ),
        *word_times(model, utterances, order, starts, result["words"]),
    ]
    return show(rows, {} if args.smoke else LIMITS)


def read_utterances(args, rate: int) -> List[Utterance]:
    """The utterances of the splits, without those that --clean leaves out."""
    found = []
    for split in args.splits.split(","):
        for reference in read_references(Path(args.data), split):
            zeros = has_zeros(read_audio(reference.path, rate), round(ZEROS_SECONDS * rate))
            if not (args.clean and zeros):
                found.append(Utterance(reference.path, reference.text, zeros))
    if not found:
        raise ValueError(f"{args.data}: {args.splits}: no utterance is left; give other splits, or leave --clean out")
    return found


def read_audio(path: Path, rate: int) -> np.ndarray:
    return np.concatenate([*wav_blocks(path, 10.0, rate), np.zeros(0, np.float32)])


def has_zeros(samples: np.ndarray, longest: int) -> bool:
    """Whether audio begins or ends with a zero, or has `longest` in a row."""
    sounding = np.flatnonzero(samples)
    if len(sounding) == 0 or sounding[0] > 0 or sounding[-1] < len(samples) - 1:
        return True
    return bool((np.diff(sounding) > longest).any())


def write_file(path: Path, args, utterances: Sequence[Utterance], rate: int) -> Tuple[List[int], List[float]]:
    """Writes the file: which utterances it has, in order, and the second at which each begins."""
    order, starts, written = [], [], 0
    shuffled = random.Random(args.seed)
    noise = np.random.default_rng(args.seed)
    level = 0.0 if args.gap_noise is None else 10 ** (args.gap_noise / 20)
    places: List[int] = []
    # floats of 64-bit RIFF: each sample as it is, however long the file
    with soundfile.SoundFile(str(path), "w", rate, 1, subtype="FLOAT", format="W64") as file:
        while written < args.minutes * 60 * rate:
            places = places or shuffled.sample(range(len(utterances)), len(utterances))
            order.append(places.pop())
            starts.append(written / rate)
            gap = noise.normal(0, level, round(args.gap * rate)) if level else np.zeros(round(args.gap * rate))
            samples = np.concatenate([read_audio(utterances[order[-1]].path, rate), gap.astype(np.float32)])
            file.write(samples)
            written += len(samples)
    return order, starts


def transcribe(args, paths: Sequence[Path]) -> Run:
    """What `w2v2-light transcribe` makes of files, in a process of its own."""
    options = ["--model", str(args.model), "--threads", str(args.threads), "--format", "json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD, *map(str, paths), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"w2v2-light transcribe failed:\n{result.stderr}")
    results = [json.loads(line) for line in result.stdout.splitlines()]
    return Run(results, json.loads(result.stderr.splitlines()[-1]))


def differences(
    words: Sequence[Tuple[str, int]], heard: Sequence[Dict[str, Any]], starts: Sequence[float]
) -> List[int]:
    """The place, among the utterances, of each word that the file has not, or has besides, or in place of another.

    words: what was heard of the utterances alone, and the place of each.
    """
    places, row, column = [], 0, 0
    for step in align([word for word, _ in words], [word["word"] for word in heard]):
        if step.kind != HIT:
            spoken = None if step.reference is not None else (heard[column]["start"] + heard[column]["end"]) / 2
            places.append(words[row][1] if spoken is None else int(np.searchsorted(starts, spoken, "right")) - 1)
        row += step.reference is not None
        column += step.hypothesis is not None
    return places


def word_times(model, utterances, order, starts, heard):
    """Rows: how far words of the file that are right begin and end from where a forced alignment has them."""
    labels = Labels(model.symbols, model.blank)
    if labels.kind == "sentencepiece":
        return [("word times", "not compared: of letters and words only", None, None)]
    recognizer = Recognizer(model)
    forced: Dict[int, List[Tuple[float, float]]] = {}
    expected = []
    for index, start in zip(order, starts):
        if index not in forced:
            forced[index] = forced_times(recognizer, labels, utterances[index])
        said = utterances[index].reference.split()
        expected += [(word, start + first, start + last) for word, (first, last) in zip(said, forced[index])]
    off, row, column = [], 0, 0
    for step in align([word for word, _, _ in expected], [word["word"] for word in heard]):
        if step.kind == HIT:
            off.append((abs(heard[column]["start"] - expected[row][1]), abs(heard[column]["end"] - expected[row][2])))
        row += step.reference is not None
        column += step.hypothesis is not None
    medians = [statistics.median(values) for values in zip(*off)] or [float("nan")] * 2
    return [
        (f"{side} of {len(off)} words from forced ones, median", f"{1000 * median:.0f} ms", "times", median)
        for side, median in zip(("starts", "ends"), medians)
    ]


def forced_times(recognizer: Recognizer, labels: Labels, utterance: Utterance) -> List[Tuple[float, float]]:
    """When each word of a reference begins and ends by the most probable path; none where it has other labels."""
    config, rate = recognizer.model.config, recognizer.sample_rate
    text = utterance.reference
    spelling = text.split() if labels.kind == "word" else " ".join(text.split()).replace(" ", "|") + "|"
    if not text.split() or not set(spelling) <= set(labels.symbols):
        return []
    indices = [labels.symbols.index(symbol) for symbol in spelling]
    (log_probs,) = recognizer.log_probs([read_audio(utterance.path, rate)])
    tokens = forced_tokens(log_probs, indices, labels.blank)
    field, hop = receptive_field(config.conv_layers)
    first_frame = ((field - hop) / 2 - config.frontend_padding) / rate
    return [
        (
            first_frame + tokens[first].start * recognizer.frame_seconds,
            first_frame + tokens[last].end * recognizer.frame_seconds,
        )
        for _, first, last in labels.spans(indices)
    ]


def make_smoke(folder: Path) -> Dict[str, str]:
    """A model folder with a tiny random network, and a manifest folder of noise, whose references are what it hears."""
    from streaming import build, speech  # beside this file

    torch.manual_seed(0)
    model = build("pretraining/w2v2_light_tiny")
    write_folder(model, folder / "model")
    names = [f"{index}.wav" for index in range(8)]
    for index, name in enumerate(names):
        samples = speech(1.5 + index / 4, seed=index)
        samples[: 100 * (index % 4 == 0)] = 0  # two that begin with zeros
        soundfile.write(str(folder / name), samples, model.sample_rate, subtype="FLOAT")
    texts = [transcript.text for transcript in Recognizer(model).transcribe([folder / name for name in names])]
    lengths = [soundfile.info(str(folder / name)).frames for name in names]
    lines = [str(folder), *(f"{name}\t{length}" for name, length in zip(names, lengths))]
    (folder / "smoke.tsv").write_text("\n".join(lines) + "\n")
    (folder / "smoke.wrd").write_text("\n".join(texts) + "\n")
    return {"model": str(folder / "model"), "data": str(folder)}


if __name__ == "__main__":
    sys.exit(main())
