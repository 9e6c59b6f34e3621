"""300 broken audio files, and headers that lie: samples or a clear error, in bounded time and memory."""

import json
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from tiny_checkpoints import STREAMING, finetuned

from fairseq_w2v2_light.paths import user_dir

RATE = 16000
MUTATIONS = 300


def sources(folder):
    """A tenth of a second of a noisy tone in every format that this libsndfile writes."""
    rng = np.random.RandomState(6)
    tone = 0.3 * np.sin(np.arange(RATE // 10) / 7) + 0.01 * rng.randn(RATE // 10)
    formats = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3", "aiff": "AIFF", "au": "AU", "w64": "W64"}
    written = []
    for suffix, kind in formats.items():
        if kind in soundfile.available_formats():
            soundfile.write(folder / f"tone.{suffix}", np.stack([tone, tone], axis=1), RATE, format=kind)
            written.append(folder / f"tone.{suffix}")
    soundfile.write(folder / "float.wav", tone, RATE, subtype="FLOAT")
    return [*written, folder / "float.wav"]


def mutate(data, rng):
    """A file with flipped bits or bytes, a piece cut out, doubled or missing at its end, mostly in its header."""
    broken = bytearray(data)
    limit = rng.choice([64, 64, 512, len(broken)])
    kind = rng.randrange(6)
    place = rng.randrange(min(limit, len(broken)))
    if kind == 0:
        for _ in range(rng.choice([1, 4, 40])):
            broken[rng.randrange(min(limit, len(broken)))] = rng.randrange(256)
    elif kind == 1:
        broken[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del broken[rng.randrange(len(broken)) :]
    elif kind == 3:
        broken[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"])
    elif kind == 4:
        del broken[place : place + rng.randrange(1, 100)]
    else:
        broken[place:place] = broken[place : place + rng.randrange(1, 200)]
    return bytes(broken)


def wav(fmt=b"", *, kind=1, channels=1, rate=RATE, width=16, size=None, samples=800, riff=None):
    """A WAV file whose header says what it is told to say."""
    data = b"\x10\x01" * samples
    align = (channels * width // 8) % 65536
    head = fmt or struct.pack("<HHIIHH", kind, channels, rate, rate * align % 2**32, align, width)
    size = len(data) if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


LIES = {
    **{f"data of {size} bytes": wav(size=size) for size in (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)},
    **{f"{rate} Hz": wav(rate=rate) for rate in (0, 1, 7, 999, 2**31 - 1, 2**31, 2**32 - 1)},
    **{f"{channels} channels": wav(channels=channels) for channels in (0, 2, 255, 1024, 65535)},
    **{f"{width} bits": wav(width=width) for width in (0, 1, 7, 255, 65535)},
    **{f"format {kind}": wav(kind=kind) for kind in (0, 3, 6, 7, 17, 49, 85, 65534, 65535)},
    "a RIFF of 4 GiB": wav(riff=2**32 - 1, size=2**32 - 1),
    "no samples": wav(samples=0),
    "one sample": wav(samples=1),
    "no format": wav(fmt=b"\x00"),
    "hours of AU": b".snd" + struct.pack(">IIIII", 24, 2**30, 3, RATE, 1) + b"\x01\x10" * 1600,
    "hours of AIFF": b"FORM"
    + struct.pack(">I", 2**31)
    + b"AIFFCOMM"
    + struct.pack(">IhIh", 18, 1, 2**32 - 1, 16)
    + b"\x40\x0c\xfa\x00\x00\x00\x00\x00\x00\x00SSND"
    + struct.pack(">III", 2**31, 0, 0)
    + b"\x01\x10" * 1600,
    "empty": b"",
    "text": b"not audio at all",
}


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory):
    """The folder of all files, seeded: the same on every run."""
    folder = tmp_path_factory.mktemp("audio")
    (folder / "broken").mkdir()
    whole, rng = sources(folder), random.Random(2026)
    for number in range(MUTATIONS):
        source = whole[number % len(whole)]
        name = f"{number:03}{source.suffix}"
        (folder / "broken" / name).write_bytes(mutate(source.read_bytes(), rng))
    for name, data in LIES.items():
        (folder / "broken" / f"{name}.wav").write_bytes(data)
    return folder / "broken"


# Each program prints its outcomes as it goes: a crash shows on which file it came.
LIMITED = """
import json, resource, sys
from pathlib import Path
import numpy as np
files = sorted(Path(sys.argv[1]).iterdir())

def limit(extra):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)
"""
READ = (
    LIMITED
    + """
from fairseq_w2v2_light.runtime.audio import check_audio, wav_blocks
limit(256 << 20)
for path in files:
    print(path.name, end="\\t", flush=True)
    try:
        check_audio(path)
        count, largest = 0, 0
        for block in wav_blocks(path, 0.5, 16000):
            assert block.dtype == np.float32 and block.ndim == 1 and np.isfinite(block).all()
            count, largest = count + len(block), max(largest, len(block))
        assert largest <= 1_000_000, largest
        print("read", count, flush=True)
    except ValueError as error:
        assert str(path) in str(error), error
        print("refused", flush=True)
"""
)
STREAM = (
    LIMITED
    + """
import contextlib, io
from fairseq_w2v2_light.cli import main, stream
from fairseq_w2v2_light.runtime import streaming
model = streaming.load_ctc(sys.argv[2])
stream.load_recognizer = lambda args: streaming.StreamingRecognizer(model)
limit(512 << 20)
for path in files:
    print(path.name, end="\\t", flush=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["stream", str(path), "--model", sys.argv[2]])
    assert code == 0 or (code == 2 and str(path) in err.getvalue()), (code, err.getvalue())
    print("read" if code == 0 else "refused", len(out.getvalue()), flush=True)
"""
)
TRANSCRIBE = (
    LIMITED
    + """
import contextlib, io
from fairseq_w2v2_light.cli import main
from fairseq_w2v2_light.runtime.recognizer import Recognizer
Recognizer.from_pretrained(sys.argv[2])
# a frame of this model is 20 samples: attention over a batch of seconds is large where torch 2.1 writes it out
limit(3 << 30)
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main.main(["transcribe", sys.argv[1], "--model", sys.argv[2], "--format", "json", "--batch-seconds", "1"])
assert code == 1, (code, err.getvalue())
values = [json.loads(line) for line in out.getvalue().splitlines()]
failed = [line.strip() for line in err.getvalue().splitlines() if line.startswith("  ")]
print("heard", len(values), sep="\t")
print("failed", len([line for line in failed if line.startswith(sys.argv[1])]), sep="\t")
"""
)


def run_alone(program, *arguments, timeout=280):
    """What the program printed for each file; it must neither crash nor hang."""
    environment = {**os.environ, "PYTHONPATH": str(user_dir().parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{result.returncode} {result.stdout[-200:]!r}: {result.stderr[-3000:]}"
    return dict(line.split("\t") for line in result.stdout.splitlines())


def test_broken_files_give_samples_or_an_error(broken_files):
    outcomes = run_alone(READ, broken_files)
    assert len(outcomes) == MUTATIONS + len(LIES)
    kinds = [outcome.split()[0] for outcome in outcomes.values()]
    assert min(kinds.count("read"), kinds.count("refused")) > 40
    # no file holds more than a second; what a header promises does not count
    lengths = {name: int(outcome.split()[1]) for name, outcome in outcomes.items() if outcome.startswith("read")}
    assert max(lengths[f"{name}.wav"] for name in LIES if f"{name}.wav" in lengths) <= 60 * RATE
    assert outcomes["hours of AU.wav"] == outcomes["hours of AIFF.wav"] == "read 1600"
    assert outcomes["0 Hz.wav"] == "refused"


def test_stream_transcribes_or_refuses_broken_files(broken_files, tmp_path):
    checkpoint = finetuned(tmp_path, layout="large", **STREAMING)
    outcomes = run_alone(STREAM, broken_files, checkpoint)
    assert len(outcomes) == MUTATIONS + len(LIES)
    assert json.dumps(sorted(outcomes)) == json.dumps(sorted(path.name for path in broken_files.iterdir()))
    assert {outcome.split()[0] for outcome in outcomes.values()} == {"read", "refused"}


def test_transcribe_goes_on_after_broken_files(broken_files, tmp_path):
    outcomes = run_alone(TRANSCRIBE, broken_files, finetuned(tmp_path, layout="large", **STREAMING))
    total = MUTATIONS + len(LIES)
    assert int(outcomes["heard"]) == total and 40 < int(outcomes["failed"]) < total - 40
