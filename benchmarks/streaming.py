"""How well the streaming runtime keeps up with a microphone: speed, batching, and an hour of audio.

    python benchmarks/streaming.py [--threads 2] [--chunks 500] [--streams 4] [--minutes 60]

The network of --recipe with random weights, and a head set so that text comes at about the rate of speech, hears noise
that comes and goes as speech does, 20 ms at a time, after its left context is full. Prints a table: real-time factor of
one stream and compute per chunk; how much dearer a batch of --streams is than one stream (chunk by chunk, in turns);
with --minutes, resident memory and time per chunk of that much audio through one recogniser. Exits with 1 when a limit
is missed; they are those of the default recipe and four streams, on two cores.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from limits import show

from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer
from fairseq_w2v2_light.runtime.timings import percentile
from fairseq_w2v2_light.study.bench import SYMBOLS, load_model

BLOCK_SECONDS = 0.02
LIMITS = {"real-time factor": 0.10, "99th percentile": 0.1, "batch": 3.0, "memory": 0.05}
SMOKE = dict(recipe="distillation/streaming_tiny", chunks=5, minutes=0.4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="distillation/streaming_480ms")
    parser.add_argument("--operating-point", default="", help="e.g. s1q1k1c24 (default: the recipe's own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=500, help="how many are timed for each row")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=0, help="of audio, for memory and drift (default: 0, skipped)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args.recipe)
    stored = sum(parameter.numel() for parameter in model.parameters())
    recognizer = StreamingRecognizer(model, args.operating_point)
    dtype = recognizer.prepare_()
    chunk_ms = 1000 * recognizer.chunk_samples / recognizer.sample_rate
    print(f"torch {torch.__version__}, {args.threads} threads; {args.recipe} at {recognizer.stream.point}: {stored:,}")
    print(f"parameters, {dtype}; {args.chunks} chunks of {chunk_ms:g} ms\n")

    # first, on a heap that nothing else has stretched
    long = hear_long(recognizer, args.minutes) if args.minutes else []
    factor, seconds = hear_one(recognizer, args.chunks)
    single, batch, ratio = compare_batch(recognizer, args.streams, args.chunks)
    worst = percentile(seconds, 99)
    rows = [
        ("real-time factor, one stream", f"{factor:.3f}", "real-time factor", factor),
        ("compute per chunk, median", f"{statistics.median(seconds) * 1e3:.1f} ms", None, None),
        ("compute per chunk, 99th percentile", f"{worst * 1e3:.1f} ms", "99th percentile", worst),
        (
            f"{args.streams} streams as a batch, of one stream",
            f"{ratio:.2f} ({batch * 1e3:.1f} of {single * 1e3:.1f} ms)",
            "batch",
            ratio,
        ),
        *long,
    ]
    return show(rows, {} if args.smoke else LIMITS)


def build(recipe: str) -> CtcModel:
    """A model of the recipe's shape, with random weights, as `runtime.load` makes one of a checkpoint."""
    model = load_model(recipe)
    set_head(model)
    return model


@torch.no_grad()
def set_head(model: CtcModel) -> None:
    """Makes random weights write 12 letters a second, every sixth of them a space; else a word might never end."""
    logits = model(torch.from_numpy(speech(20, model.sample_rate))[None])[0][0]
    scale = logits.std(0).clamp(min=1e-6)
    model.head.weight /= scale[:, None]
    model.head.bias.copy_((model.head.bias - logits.mean(0)) / scale)
    model.head.bias[[SYMBOLS.index("<pad>"), SYMBOLS.index("</s>")]] = -1e4
    logits = model(torch.from_numpy(speech(20, model.sample_rate))[None])[0][0]
    for symbol, share in ((SYMBOLS.index("|"), 1 / 6), (model.blank, 3 / 4)):
        others = [index for index in range(len(SYMBOLS)) if index not in (symbol, model.blank)]
        shift = (logits[:, others].amax(1) - logits[:, symbol]).quantile(share)
        model.head.bias[symbol] += shift
        logits[:, symbol] += shift


def speech(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """(samples,) float32: syllables of noise, five a second, with a pause of a second after every three or so."""
    random = np.random.RandomState(seed)
    samples = round(seconds * rate)
    times = np.arange(samples) / rate
    loudness = np.repeat(random.uniform(0.02, 0.3, samples // (rate // 5) + 1), rate // 5)[:samples]
    speaking = (times + random.uniform(4)) % 4 < 3
    wave = random.standard_normal(samples) * loudness * np.abs(np.sin(5 * np.pi * times)) * speaking
    return (wave + 1e-4 * random.standard_normal(samples)).astype(np.float32)


class Microphone:
    """Endless `speech`: a minute of it, over and over, in memory that does not grow."""

    def __init__(self, rate: int, seed: int = 0):
        self._wave = speech(60, rate, seed)
        self._heard = 0

    def read(self, samples: int) -> np.ndarray:
        start = self._heard % len(self._wave)
        self._heard += samples
        return np.take(self._wave, np.arange(start, start + samples), mode="wrap")


def warm_chunks(recognizer: StreamingRecognizer) -> int:
    """Chunks until the left context is full and everything has run in its final shape."""
    return -(-recognizer.stream.config.left_context // recognizer.stream.point.chunk) + 2


def listen(recognizer: StreamingRecognizer, microphone: Microphone, chunks: int):
    """Hears so many chunks of the recogniser's own stream in small blocks.

    Returns seconds of compute of all calls, and of each of those that ran the network.
    """
    block = round(BLOCK_SECONDS * recognizer.sample_rate)
    total, own = 0.0, []
    while len(own) < chunks:
        samples = microphone.read(block)
        start = time.perf_counter()
        ran = recognizer.accept(samples).chunks
        elapsed = time.perf_counter() - start
        total += elapsed
        own += [elapsed / ran] * ran if ran else []
    return total, own


def hear_one(recognizer: StreamingRecognizer, chunks: int):
    """Real-time factor of one stream, and seconds of each chunk."""
    recognizer.finish()
    microphone = Microphone(recognizer.sample_rate)
    listen(recognizer, microphone, warm_chunks(recognizer))
    total, own = listen(recognizer, microphone, chunks)
    return total * recognizer.sample_rate / (len(own) * recognizer.chunk_samples), own


def compare_batch(recognizer: StreamingRecognizer, streams: int, repeats: int):
    """Median seconds of a chunk of one stream and of a batch, and the median of their ratios; they take turns."""
    sizes = (1, streams)
    microphones = [Microphone(recognizer.sample_rate, seed) for seed in range(streams)]
    states = {size: [recognizer.start() for _ in range(size)] for size in sizes}
    seconds = {size: [] for size in sizes}
    chunk, lookahead = recognizer.chunk_samples, recognizer.stream.lookahead_samples
    for repeat in range(warm_chunks(recognizer) + repeats):
        samples = [microphone.read(chunk + (0 if repeat else lookahead)) for microphone in microphones]
        for size in sizes:
            start = time.perf_counter()
            states[size], _ = recognizer.accept_many(states[size], samples[:size])
            seconds[size].append(time.perf_counter() - start)
    one, many = (seconds[size][-repeats:] for size in sizes)
    ratios = [batch / single for single, batch in zip(one, many)]
    return statistics.median(one), statistics.median(many), statistics.median(ratios)


def hear_long(recognizer: StreamingRecognizer, minutes: float):
    """Rows: resident memory after a twelfth of the audio and at its end; time per chunk in its first and last sixth."""
    recognizer.finish()
    microphone = Microphone(recognizer.sample_rate)
    chunks = round(minutes * 60 * recognizer.sample_rate / recognizer.chunk_samples)
    settled, part = max(1, chunks // 12), max(1, chunks // 6)
    _, seconds = listen(recognizer, microphone, settled)
    before = resident_mib()
    seconds += listen(recognizer, microphone, chunks - settled)[1]
    after = resident_mib()
    first, last = statistics.median(seconds[:part]), statistics.median(seconds[-part:])
    final = recognizer.finish()
    heard = f"{final.seconds / 60:.1f} minutes, {len(final.words)} words in {len(final.segments)} segments"
    change = abs(after / before - 1)
    return [
        (f"{heard}: resident memory at the end", f"{after:.1f} MiB", None, None),
        (f"its change since minute {minutes / 12:.1f}", f"{after / before - 1:+.2%}", "memory", change),
        (f"time per chunk, last {minutes / 6:.1f} minutes", f"{last * 1e3:.1f} ms", None, None),
        (f"of that of the first {minutes / 6:.1f} minutes", f"{last / first:.2f}", None, None),
    ]


def resident_mib() -> float:
    """Memory of this process now, or at its peak where the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    sys.exit(main())
