"""`w2v2-light transcribe` around a recogniser that stands in for the real one."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.cli import main as cli
from fairseq_w2v2_light.cli import transcribe
from fairseq_w2v2_light.runtime.alignment import TimedWord
from fairseq_w2v2_light.runtime.audio import stream_blocks, wav_blocks
from fairseq_w2v2_light.runtime.recognizer import AudioStream, Transcript

ROOT = Path(cli.__file__).parents[2]
RATE = 16000


class Recognizer:
    """Says how many samples it reads."""

    labels, dtype, point = object(), "float32", "s1q1k1"

    def __init__(self):
        self.decoder, self.options = None, None

    def transcribe(self, sources, batch_seconds, on_progress):
        for source in sources:
            name = source.name if isinstance(source, AudioStream) else str(source)
            samples, error = 0, None
            try:
                if isinstance(source, AudioStream):
                    blocks = stream_blocks(source.stream, 1.0, RATE, source.sample_rate)
                else:
                    blocks = wav_blocks(source, 1.0, RATE)
                for block in blocks:
                    samples += len(block)
            except (ValueError, OSError) as failure:
                error = str(failure)
            on_progress(samples / RATE)
            words = (TimedWord("n", 0.0, 0.5, 0.9), TimedWord(str(samples), 0.5, 1.0, 0.9)) if samples else ()
            yield Transcript(" ".join(word.text for word in words), words, samples / RATE, name, error)


@pytest.fixture(autouse=True)
def recognizer(monkeypatch):
    made = Recognizer()

    def load(args, recordings):
        transcribe.recognition_options.check(args)
        made.options = args
        return made

    monkeypatch.setattr(transcribe, "load_recognizer", load)
    return made


@pytest.fixture
def folder(tmp_path):
    """a.wav, b/c.flac, b/d.WAV and files that are no audio."""
    (tmp_path / "in" / "b").mkdir(parents=True)
    for number, name in enumerate(["a.wav", "b/c.flac", "b/d.WAV"], start=1):
        soundfile.write(tmp_path / "in" / name, np.full(number * 100, 0.1), RATE)
    for name in ("b/c.txt", ".hidden.wav", "b/notes"):
        (tmp_path / "in" / name).write_text("no audio")
    return tmp_path / "in"


def run(*arguments):
    return cli.main(["transcribe", "--model", "M", *map(str, arguments)])


def test_one_recording_is_its_text(folder, capsys):
    assert run(folder / "a.wav") == 0
    out, err = capsys.readouterr()
    assert out == "n 100\n"
    assert err.startswith("1 recording, 0.0 s of audio in ") and "(float32, s1q1k1, real-time factor " in err


def test_folders_are_searched_and_lines_have_names(folder, capsys):
    assert run(folder, "--quiet") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{folder}/a.wav\tn 100", f"{folder}/b/c.flac\tn 200", f"{folder}/b/d.WAV\tn 300"]
    assert err == ""


def test_a_recording_named_twice_is_transcribed_once(folder, capsys):
    assert run(folder / "b" / "d.WAV", folder, folder / "a.wav", "--quiet") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["300", "100", "200"]


def test_failures_are_listed_while_the_others_go_on(folder, capsys, tmp_path):
    (folder / "b" / "e.wav").write_text("no audio")
    assert run(tmp_path / "missing.wav", folder, "--format", "json", "--quiet") == 1
    out, err = capsys.readouterr()
    objects = [json.loads(line) for line in out.splitlines()]
    assert [bool(values["error"]) for values in objects] == [True, False, False, False, True]
    assert err.splitlines()[0] == "2 of 5 recordings could not be read:"
    assert err.splitlines()[1] == f"  {tmp_path}/missing.wav: no such audio file" and "e.wav" in err.splitlines()[2]


@pytest.mark.parametrize(
    "form, suffix", [("text", "txt"), ("json", "json"), ("srt", "srt"), ("vtt", "vtt"), ("ctm", "ctm")]
)
def test_a_folder_gets_a_file_for_each_recording(folder, tmp_path, capsys, form, suffix):
    out = tmp_path / "deep" / "out"
    (folder / "bad.wav").write_text("no audio")
    assert run(folder, "--out", out, "--format", form) == 1
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == [f"a.{suffix}", f"b/c.{suffix}", f"b/d.{suffix}"]
    assert "200" in (out / "b" / f"c.{suffix}").read_text(encoding="utf-8")
    assert capsys.readouterr().out == ""


def test_outputs_of_the_same_name_keep_their_suffixes(folder, tmp_path):
    soundfile.write(folder / "a.flac", np.zeros(50), RATE)
    soundfile.write(folder / "talk.v1.wav", np.zeros(60), RATE)
    assert run(folder, "--out", tmp_path / "out", "--quiet") == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["a.flac.txt", "a.wav.txt", "b", "talk.v1.txt"]


def test_recordings_are_told_apart_in_ctm(folder, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    soundfile.write(tmp_path / "other" / "a.wav", np.zeros(50), RATE)
    assert run(folder / "a.wav", tmp_path / "other" / "a.wav", "--format", "ctm", "--quiet") == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {str(folder / "a.wav"), str(tmp_path / "other" / "a.wav")}


def test_names_of_any_kind(folder, tmp_path, capsys):
    for name in ("ä ö.wav", "-dash.wav", "日本.wav"):
        soundfile.write(str(folder / name), np.zeros(50), RATE)
    assert run(folder, "--quiet", "--out", tmp_path / "out") == 0
    assert {"ä ö.txt", "-dash.txt", "日本.txt"} <= set(os.listdir(tmp_path / "out"))


def test_each_recording_is_one_line_whatever_its_name(folder, capsys):
    soundfile.write(str(folder / "nl\nline\ttab.wav"), np.zeros(50), RATE)
    (folder / "x\ny.wav").write_text("no audio")
    assert run(folder, "--quiet") == 1
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[1:3] == [[rf"{folder}/nl\nline\ttab.wav", "n 50"], [rf"{folder}/x\ny.wav", ""]]
    assert len(lines) == 5 and rf"  {folder}/x\ny.wav: not audio" in err.splitlines()[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{in}/a.wav", "--beam", "0"], "--beam: found 0, expected 1 or more"),
        (["{in}/a.wav", "--threads", "-1"], "--threads"),
        (["{in}/a.wav", "--batch-seconds", "nan"], "--batch-seconds"),
        (["{in}/a.wav", "--sample-rate", "8000"], "--sample-rate: for PCM on standard input"),
        (["{in}/a.wav", "--lexicon", "words"], "--lexicon: only for decoding with --lm"),
        (["{in}/a.wav", "--lm-weight", "0"], "--lm-weight: only for decoding with --lm"),
        (["{in}", "--format", "srt"], "--format srt: found 3 recordings"),
        (["{in}/a.wav", "--out", "{in}/b/notes"], "expected a folder"),
        (["{in}/a.wav", "{out}/a.wav", "--out", "{out}/x"], "both would be written to"),
        (["{out}"], "found no audio file there"),
    ],
)
def test_wrong_usage_is_an_error_before_anything_is_done(folder, tmp_path, capsys, recognizer, arguments, message):
    (tmp_path / "out").mkdir()
    arguments = [text.replace("{in}", str(folder)).replace("{out}", str(tmp_path / "out")) for text in arguments]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and recognizer.options is None


# --- in a process of its own

PROGRAM = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "cli")!r}]
from test_transcribe import Recognizer
from fairseq_w2v2_light.cli import transcribe
from fairseq_w2v2_light.cli.main import main

class Slow(Recognizer):
    def transcribe(self, *arguments):
        for transcript in super().transcribe(*arguments):
            yield transcript
            time.sleep(SLEEP)

transcribe.load_recognizer = lambda args, recordings: Slow()
sys.exit(main(["transcribe", "--model", "M", *sys.argv[1:]]))
"""


def start(*arguments, sleep=0, **options):
    command = [sys.executable, "-c", PROGRAM.replace("SLEEP", str(sleep)), *map(str, arguments)]
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, **{**streams, **options})


def test_standard_input_is_pcm_or_a_file(folder):
    pcm = start("-").communicate(np.zeros(160, np.int16).tobytes())
    assert pcm[0] == b"n 160\n"
    process = start("-", folder / "a.wav", "--format", "json")
    lines = process.communicate((folder / "b" / "c.flac").read_bytes())[0].splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["n 200", "n 100"]
    assert [json.loads(line)["source"] for line in lines] == ["standard input", str(folder / "a.wav")]


def test_ctrl_c_ends_it_and_keeps_what_is_done(folder, tmp_path):
    out = tmp_path / "out"
    process = start(folder, "--out", out, sleep=60, stdin=subprocess.DEVNULL, start_new_session=True)
    while not (out / "a.txt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and b"interrupted" in err and b"Traceback" not in err
    assert sorted(path.name for path in out.iterdir()) == ["a.txt"]


def test_a_reader_that_goes_away_is_no_error_message(folder):
    process = start(folder, sleep=0.3)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait()
    assert process.returncode == 141 and b"Traceback" not in err


def test_a_terminal_sees_the_progress_and_a_file_does_not(folder):
    master, slave = pty.openpty()
    process = start(folder, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while True:
            shown += os.read(master, 1000)
    except OSError:  # the other end is closed
        pass
    out, _ = process.communicate()
    os.close(master)
    assert b"[####" in shown and b"0:00:00 of 0:00:00" in shown and len(out.splitlines()) == 3
    assert b"[" not in start(folder).communicate()[1]


def test_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(transcribe, "duration", lambda path: 100.0)
    terminal = Terminal()
    bar = transcribe._Bar(transcribe.Screen(terminal), ["a", "b"])
    for seconds in (0, 50, 200, 5000):  # a header may promise too little
        bar.show(seconds)
    lines = [line.strip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert lines[1] == "[########......................]  25%  0:00:50 of 0:03:20"
    assert lines[2].startswith("[" + "#" * 30 + "] 100%") and lines[3].startswith("[" + "#" * 30 + "] 100%")
    transcribe._Bar(transcribe.Screen(terminal), ["a", "-"]).show(4000)
    assert terminal.getvalue().endswith("1:06:40 transcribed")
