"""`w2v2-light stream` around a recogniser that stands in for the real one."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.cli import main as cli
from fairseq_w2v2_light.cli import stream
from fairseq_w2v2_light.runtime.audio import Pace
from fairseq_w2v2_light.runtime.timings import Timings, percentile

ROOT = Path(cli.__file__).parents[2]
RATE = 16000
CHUNK = 1600


class Recognizer:
    """Hears a word in each chunk of 0.1 s, named by its first sample; a chunk of zeros closes the segment."""

    sample_rate, chunk_samples, latency_ms = RATE, CHUNK, 100.0

    def __init__(self):
        self.rest, self.chunks = np.zeros(0, np.float32), 0
        self.words, self.segments, self.heard = [], [], 0

    def accept(self, samples):
        assert samples.dtype == np.float32 and samples.ndim == 1
        self.heard += len(samples)
        self.rest = np.concatenate([self.rest, samples])
        before, chunks = len(self.segments), len(self.rest) // CHUNK
        for _ in range(chunks):
            self.hear(self.rest[:CHUNK])
            self.rest = self.rest[CHUNK:]
        closed = tuple(self.segments[before:])
        return SimpleNamespace(**self.unfinished(), segments=closed, seconds=self.heard / RATE, chunks=chunks)

    def finish(self):
        if len(self.rest):
            self.hear(self.rest)
        self.close()
        words = tuple(word for segment in self.segments for word in segment.words)
        text = " ".join(word.text for word in words)
        return SimpleNamespace(text=text, words=words, segments=tuple(self.segments), seconds=self.heard / RATE)

    def hear(self, samples):
        start = self.chunks * CHUNK / RATE
        self.chunks += 1
        if np.any(samples):
            text = f"w{round(float(samples[0]) * 32768)}"
            self.words.append(SimpleNamespace(text=text, start=start, end=start + len(samples) / RATE))
        else:
            self.close()

    def close(self):
        if self.words:
            start, end = self.words[0].start, self.words[-1].end
            self.segments.append(SimpleNamespace(**self.unfinished(), start=start, end=end))
        self.words = []

    def unfinished(self):
        return {"text": " ".join(word.text for word in self.words), "words": tuple(self.words)}


# chunks that start with 1, 2, 3, silence, 5, and half a chunk
PCM = np.repeat(np.int16([1, 2, 3, 0, 5, 6]), CHUNK)[: 5 * CHUNK + CHUNK // 2]
LINES = "w1 w2 w3\nw5 w6\n"


@pytest.fixture
def recognizer(monkeypatch):
    made = Recognizer()
    monkeypatch.setattr(stream, "load_recognizer", lambda args: made)
    return made


@pytest.fixture
def wav(tmp_path):
    soundfile.write(tmp_path / "speech.wav", PCM, RATE)
    return str(tmp_path / "speech.wav")


@pytest.fixture
def standard_input(monkeypatch):
    """Makes these bytes the standard input."""

    def feed(data, isatty=False):
        source = io.BytesIO(data)
        source.isatty = lambda: isatty
        monkeypatch.setattr(stream, "_open_standard_input", lambda: source)

    return feed


def call(*arguments):
    return cli.main(["stream", *map(str, arguments), "--model", "checkpoint.pt"])


def test_a_file_prints_a_line_for_each_segment(recognizer, wav, capsys):
    assert call(wav) == 0
    assert capsys.readouterr().out == LINES


@pytest.mark.parametrize("block", [0.1, 33, 100000])
@pytest.mark.parametrize("odd", [b"", b"\x01"])
def test_pcm_gives_the_files_text_at_any_block_size(recognizer, standard_input, capsys, block, odd):
    standard_input(PCM.astype("<i2").tobytes() + odd)
    assert call("-", "--block", block) == 0
    captured = capsys.readouterr()
    assert captured.out == LINES
    assert ("dropped the last byte" in captured.err) == bool(odd)


def test_segments_come_out_as_they_close(recognizer, capsys):
    transcript = stream.Transcript(sys.stdout, stream.Screen(sys.stderr))
    transcript.update(recognizer.accept((PCM[: 4 * CHUNK] / 32768).astype(np.float32)))
    assert capsys.readouterr().out == "w1 w2 w3\n"


@pytest.mark.parametrize("data", [b"", b"\x01", bytes(2), bytes(4 * CHUNK)])
def test_nothing_heard_prints_nothing(recognizer, standard_input, capsys, data):
    standard_input(data)
    assert call("-") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and f"audio {len(data) // 2 / RATE:.2f} s" in captured.err


def test_an_empty_file_prints_nothing(recognizer, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    assert call(tmp_path / "a.wav") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("audio 0.00 s, compute 0.00 s, algorithmic latency 100 ms\n")


def test_words_have_their_times(recognizer, wav, capsys):
    assert call(wav, "--words") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["0.20\t0.30\tw3", "0.40\t0.50\tw5"] and len(lines) == 5


def test_json_is_an_object_a_line(recognizer, wav, capsys):
    assert call(wav, "--format", "json") == 0
    first, second, final = map(json.loads, capsys.readouterr().out.splitlines())
    assert second == {
        "type": "segment",
        "text": "w5 w6",
        "start": 0.4,
        "end": 0.55,
        "words": [{"word": "w5", "start": 0.4, "end": 0.5}, {"word": "w6", "start": 0.5, "end": 0.55}],
    }
    assert [first["type"], first["text"]] == ["segment", "w1 w2 w3"]
    assert (final["type"], final["text"], final["start"], final["end"]) == ("final", "w1 w2 w3 w5 w6", 0.0, 0.55)
    assert final["words"] == first["words"] + second["words"]


def test_json_partials_show_each_change_once(recognizer, wav, capsys):
    assert call(wav, "--format", "json", "--partials") == 0
    objects = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(value["type"], value["text"]) for value in objects] == [
        ("partial", "w1"),
        ("partial", "w1 w2"),
        ("partial", "w1 w2 w3"),
        ("segment", "w1 w2 w3"),
        ("partial", "w5"),
        ("segment", "w5 w6"),
        ("final", "w1 w2 w3 w5 w6"),
    ]
    assert (objects[4]["start"], objects[4]["end"]) == (0.4, 0.5)


def test_json_says_so_when_nothing_was_heard(recognizer, standard_input, capsys):
    standard_input(b"")
    assert call("-", "--format", "json") == 0
    final = {"type": "final", "text": "", "start": 0.0, "end": 0.0, "words": []}
    assert json.loads(capsys.readouterr().out) == final


def test_partials_are_lines_on_standard_error(recognizer, wav, capsys):
    assert call(wav, "--partials", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == LINES
    assert captured.err == "w1\nw1 w2\nw1 w2 w3\nw5\n"


def test_without_a_terminal_there_are_no_partials(recognizer, wav, capsys):
    assert call(wav, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_the_report_counts_audio_compute_and_chunks(recognizer, wav, capsys):
    assert call(wav) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("audio 0.55 s, compute 0.0") and "(real-time factor 0.0" in first
    assert first.endswith("algorithmic latency 100 ms")
    assert second.startswith("compute per chunk: median ") and second.endswith(" ms (5 chunks)")


def test_simulated_real_time_takes_as_long_as_the_audio_and_measures_delays(recognizer, wav, capsys):
    began = time.monotonic()
    assert call(wav, "--simulate-realtime") == 0
    assert time.monotonic() - began >= 0.55
    captured = capsys.readouterr()
    assert captured.out == LINES
    assert "delay from a chunk's last sample to its text: median " in captured.err
    assert "delay from the last sample to the final text: " in captured.err


def test_delays_count_from_each_chunks_last_sample():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    class Slow(Recognizer):
        def accept(self, samples):
            partial = super().accept(samples)
            now[0] += 0.03 * partial.chunks
            return partial

    blocks = np.split((PCM[: 5 * CHUNK] / 32768).astype(np.float32), [800, 2000, 5200])  # 0.05, 0.125 and 0.325 s
    timings = Timings()
    transcript = stream.Transcript(io.StringIO(), stream.Screen(io.StringIO()))
    pace = Pace(RATE, lambda: now[0], sleep)
    assert stream.transcribe(Slow(), blocks, transcript, timings, stream.StopSignals(), pace) == 0.5
    # the blocks that complete chunks come at 0.125 (1 chunk), 0.325 (2 chunks) and 0.5 s (2 chunks)
    assert timings.delays == pytest.approx([0.055, 0.185, 0.085, 0.16, 0.06])
    assert timings.final_delay == pytest.approx(0.06) and len(timings.chunks) == 5


def test_chunks_of_one_call_share_its_time():
    timings = Timings()
    timings.accepted(0.5, 0)
    timings.accepted(0.6, 3)
    assert timings.chunks == pytest.approx([0.2] * 3) and timings.compute == pytest.approx(1.1)


@pytest.mark.parametrize(
    "values, percent, expected", [([3, 1, 2], 50, 2), ([1, 2], 50, 1), (range(200), 99, 197), ([5], 99, 5), ([5], 0, 5)]
)
def test_percentiles_are_nearest_ranks(values, percent, expected):
    assert percentile(list(values), percent) == expected


def test_no_values_have_no_percentile():
    assert np.isnan(percentile([], 50))


def test_bad_audio_prints_what_was_heard_before_the_error(recognizer, tmp_path, capsys):
    samples = PCM / np.float32(32768)
    samples[-100] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert call(tmp_path / "a.wav") == 2
    captured = capsys.readouterr()
    assert captured.out == LINES
    assert captured.err.startswith("w2v2-light stream: error: ")
    assert "NaN, infinite or huge sample at 0.544 s" in captured.err


def test_an_error_of_the_recogniser_is_not_taken_for_one_of_the_audio(recognizer, wav, capsys):
    def accept(samples):
        recognizer.finish = None
        raise ValueError("finished already")

    recognizer.accept = accept
    assert call(wav) == 2
    assert capsys.readouterr().err == "w2v2-light stream: error: finished already\n"


@pytest.mark.parametrize(
    "name, message",
    [("absent.wav", "absent.wav: no such audio file"), (".", "found a folder"), ("a.txt", "not audio that libsndfile")],
)
def test_bad_files_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setattr(stream, "load_recognizer", None)
    (tmp_path / "a.txt").write_text("no audio\n")
    assert call(tmp_path / name) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("--block", "0"), "--block: found 0 ms"),
        (("--block", "nan"), "--block: found nan ms"),
        (("--beam", "0"), "--beam: found 0, expected 1 or more"),
        (("--threads", "-1"), "--threads: found -1"),
        (("--endpoint-silence", "-1"), "--endpoint-silence: found -1 seconds"),
        (("--endpoint-silence", "inf"), "--endpoint-silence: found inf seconds"),
        (("--sample-rate", "8000"), "speech.wav says its own"),
    ],
)
def test_bad_options_are_named(recognizer, wav, capsys, options, message):
    assert call(wav, *options) == 2
    assert message in capsys.readouterr().err


def test_closed_standard_input_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert call("-") == 2
    assert "standard input is closed; expected raw 16-bit PCM" in capsys.readouterr().err


def test_closed_standard_output_is_named(recognizer, wav, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert call(wav) == 2
    assert "standard output is closed; expected a file, pipe or terminal" in capsys.readouterr().err


def test_closed_standard_error_is_no_loss(recognizer, wav, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert call(wav) == 0
    assert capsys.readouterr().out == LINES


def test_a_terminal_as_input_gets_a_hint(recognizer, standard_input, capsys):
    standard_input(b"", isatty=True)
    assert call("-") == 0
    assert "arecord -f S16_LE -r 16000 -t raw | w2v2-light stream -" in capsys.readouterr().err


@pytest.mark.parametrize("silence, expected", [("0.5", (0.5, 5.0)), ("7", (7.0, 7.0)), ("0", None), (None, (1.0, 5.0))])
def test_options_reach_the_recogniser(wav, monkeypatch, capsys, silence, expected):
    seen, threads = {}, []

    def from_checkpoint(path, **options):
        seen.update(options, path=path)
        return Recognizer()

    module = SimpleNamespace(StreamingRecognizer=SimpleNamespace(from_checkpoint=from_checkpoint))
    monkeypatch.setitem(sys.modules, "fairseq_w2v2_light.runtime.streaming", module)
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    options = ["--operating-point", "s1q1k1c24", "--beam", "4", "--dictionary", "dict.ltr.txt", "--threads", "3"]
    assert call(wav, *options, *(["--endpoint-silence", silence] if silence else [])) == 0
    endpointing = seen.pop("endpointing")
    assert (endpointing and (endpointing.silence, endpointing.before_speech)) == expected
    assert seen == {
        "path": "checkpoint.pt",
        "operating_point": "s1q1k1c24",
        "beam": 4,
        "dictionary": "dict.ltr.txt",
        "dtype": "auto",
    }
    assert threads == [3]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_reading_and_prints_what_was_heard(recognizer, monkeypatch, capsys, number, code):
    def blocks(*args, **options):
        yield (PCM[: 2 * CHUNK + 100] / 32768).astype(np.float32)
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        time.sleep(30)

    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # even where the suite runs with it ignored
    monkeypatch.setattr(stream, "_open_standard_input", io.BytesIO)
    monkeypatch.setattr(stream, "pcm_blocks", blocks)
    before = [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert call("-") == code
        assert [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_DFL] * 2
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    captured = capsys.readouterr()
    assert captured.out == "w1 w2 w3\n" and "audio 0.21 s" in captured.err


def test_a_signal_during_a_chunk_waits_for_its_end():
    with stream.StopSignals() as stop:
        stop._handle(signal.SIGTERM, None)
        assert stop.received == signal.SIGTERM and stop.next(iter([1])) is None


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stream.StopSignals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_streams_work_outside_the_main_thread(recognizer, wav, capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(call(wav)))
    thread.start()
    thread.join(60)
    assert codes == [0] and capsys.readouterr().out == LINES


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def line(self):
        """What a terminal shows of it, one line."""
        line, column = [], 0
        for character in self.getvalue().split("\n")[-1]:
            if character == "\r":
                column = 0
            else:
                line[column : column + 1] = character
                column += 1
        return "".join(line).rstrip()


def test_the_line_on_a_terminal_is_rewritten():
    terminal = Terminal()
    screen = stream.Screen(terminal)
    for text in ("a longer text", "short", "a longer one again"):
        screen.show(text)
        assert terminal.line() == text
    screen.line("note")
    assert terminal.getvalue().endswith("\rnote\n")


def test_the_line_fits_the_terminal(monkeypatch):
    monkeypatch.setattr(stream, "_columns", lambda stream: 11)
    terminal = Terminal()
    stream.Screen(terminal).show("the end is what matters")
    assert terminal.line() == "at matters"


@pytest.mark.parametrize(
    "text, columns, expected",
    [
        ("abc", 5, "abc"),
        ("abcdef", 3, "def"),
        ("日本語", 4, "本語"),
        ("日本語", 5, "本語"),
        ("cafe\u0301", 4, "cafe\u0301"),
    ],
)
def test_columns_of_wide_characters_and_accents(text, columns, expected):
    assert stream.last_columns(text, columns) == expected


def test_a_finished_segment_replaces_the_line_in_place(recognizer):
    terminal = Terminal()  # both streams
    transcript = stream.Transcript(terminal, stream.Screen(terminal))
    for chunk in range(4):
        transcript.update(recognizer.accept(PCM[chunk * CHUNK : (chunk + 1) * CHUNK].astype(np.float32) / 32768))
    assert "w1 w2\r     \rw1 w2 w3\r        \rw1 w2 w3\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


PROGRAM = """
import signal, sys
sys.path.insert(0, {folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from test_stream_program import Recognizer, cli, stream
stream.load_recognizer = lambda args: Recognizer()
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Starts the command, with the recogniser of this file, as a process of its own."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "test_stream_program.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    processes = []

    def start(*arguments, **streams):
        command = [sys.executable, "-c", PROGRAM.format(folder=str(folder)), "stream", *arguments, "--model", "x"]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        processes.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **streams))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_interrupting_a_microphone_prints_what_was_heard(program):
    process = program("-", "--partials")
    process.stdin.write(PCM[: 2 * CHUNK + 100].astype("<i2").tobytes() + b"\x01")
    process.stdin.flush()
    assert process.stderr.readline() == b"w1\n"
    assert process.stderr.readline() == b"w1 w2\n"
    time.sleep(0.2)  # it waits for the next sample then
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130 and output == b"w1 w2 w3\n"
    assert b"Traceback" not in error and b"audio 0.21 s" in error


def test_a_reader_that_leaves_ends_it_quietly(program):
    process = program("-")
    process.stdin.write(PCM[: 4 * CHUNK].astype("<i2").tobytes())
    process.stdin.flush()
    assert process.stdout.readline() == b"w1 w2 w3\n"
    process.stdout.close()
    process.stdin.write(PCM.astype("<i2").tobytes())
    process.stdin.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_a_terminal_shows_the_line_as_it_grows(program, wav):
    controller, terminal = pty.openpty()
    process = program(wav, "--simulate-realtime", "--quiet", stderr=terminal)
    output, _ = process.communicate(timeout=60)
    os.close(terminal)
    shown = os.read(controller, 4096).decode()
    os.close(controller)
    assert process.returncode == 0 and output.decode() == LINES
    assert shown == "\r\rw1\r  \rw1 w2\r     \rw1 w2 w3\r        \r\r\rw5\r  \r"


WITHOUT_FAIRSEQ = """
import sys
from fairseq_w2v2_light.cli.main import main
code = main(sys.argv[1:])
assert not {"fairseq", "hydra", "omegaconf"} & set(sys.modules)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny streaming CTC model with random weights: chunks of 320 samples."""
    import torch
    from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, letters, perturb, save_checkpoint, save_ctc

    from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel

    folder = tmp_path_factory.mktemp("streaming")
    torch.manual_seed(0)
    streaming = dict(chunk_frames=[16], left_context_frames=32, lookahead_frames=4)
    config = W2V2LightConfig(**SHAPE, **LAYOUTS["large"], **streaming)
    weights = W2V2LightModel(config).state_dict()
    model = ctc_model(save_checkpoint(folder / "pretrained.pt", container(config, "w2v2_light"), weights))
    perturb(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.w2v_encoder.proj.weight.mul_(5)
        model.w2v_encoder.proj.bias[letters().unk()] = -100
    return save_ctc(folder / "ctc.pt", model, dictionary=letters())


def test_the_real_recogniser_gives_one_text_for_file_pipe_and_any_block(checkpoint, tmp_path, capsys):
    random = np.random.RandomState(0)
    speech = np.repeat(random.rand(10) > 0.4, 400)[:3990] * random.standard_normal(3990) * 3000
    soundfile.write(tmp_path / "speech.wav", speech.astype(np.int16), RATE)
    options = ["--model", checkpoint, "--endpoint-silence", "0.003"]
    command = [sys.executable, "-c", WITHOUT_FAIRSEQ, "stream", "-", *options, "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        data = speech.astype("<i2").tobytes() + b"\x01"
        for start in range(0, len(data), 777):
            process.stdin.write(data[start : start + 777])
            process.stdin.flush()
        piped, error = process.communicate(timeout=60)
    assert process.returncode == 0, error.decode()
    assert b"audio 0.25 s" in error and b"algorithmic latency 25 ms" in error
    assert piped.count(b"\n") > 2 and len(piped) > 30
    for block in (1 / 16, 20, 1000):
        assert cli.main(["stream", str(tmp_path / "speech.wav"), *options, "--block", str(block)]) == 0
        assert capsys.readouterr().out == piped.decode()


def test_the_real_recogniser_ends_cleanly_when_it_hears_nothing(checkpoint, standard_input, capsys):
    for data in (b"", b"\x01", bytes(2)):
        standard_input(data)
        assert cli.main(["stream", "-", "--model", checkpoint]) == 0
        assert "audio 0.00 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message", [("absent.pt", "absent.pt: no such checkpoint file"), ("a.pt", "not a checkpoint file of torch")]
)
def test_a_wrong_checkpoint_is_named(wav, tmp_path, capsys, name, message):
    (tmp_path / "a.pt").write_text("no checkpoint\n")
    assert cli.main(["stream", wav, "--model", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
