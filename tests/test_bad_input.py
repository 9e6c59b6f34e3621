"""Bad audio, labels and paths, met through our two tasks and `prepare`; the other doors have their own files."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from fairseq import tasks
from omegaconf import OmegaConf

import fairseq_w2v2_light  # noqa: F401 - registers the tasks
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.paths import user_dir

TASKS = ("light_pretraining", "audio_ctc")
FRAMES = 9000


def noise(frames=FRAMES, channels=1):
    return np.random.RandomState(0).randn(frames, channels).astype(np.float32) * 0.1


def write_nan(path):
    wave = noise()
    wave[5] = np.nan
    soundfile.write(str(path), wave, 16000, subtype="FLOAT")


def write_truncated(path):
    soundfile.write(str(path), noise(), 16000, format="FLAC")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# kind: how to write it, what the message says
BAD_AUDIO = {
    "missing": (lambda path: None, "missing file: no such file; mend the file, or take its line out"),
    "text": (lambda path: path.write_text("not audio"), "not audio: "),
    "no bytes": (lambda path: path.write_bytes(b""), "zero length: the file has 0 bytes"),
    "no samples": (lambda path: soundfile.write(str(path), noise(0), 16000), "zero length: the file has 0 samples"),
    "8 kHz": (
        lambda path: soundfile.write(str(path), noise(), 8000),
        "wrong sample rate: 8000 Hz, expected 16000 Hz; make a 16 kHz mono copy with `w2v2-light prepare --convert`",
    ),
    "stereo": (
        lambda path: soundfile.write(str(path), noise(channels=2), 16000),
        "not mono: 2 channels, expected 1; make a 16 kHz mono copy with `w2v2-light prepare --convert`",
    ),
    "NaN": (write_nan, "NaN samples: 1 samples are NaN or infinite"),
    "truncated": (write_truncated, "not audio: cannot be decoded"),
    "one sample": (
        lambda path: soundfile.write(str(path), noise(1), 16000),
        "holds 1 samples, the manifest says 9000; prepare the folder again",
    ),
    "longer": (
        lambda path: soundfile.write(str(path), noise(9001), 16000),
        "holds 9001 samples, the manifest says 9000; prepare the folder again",
    ),
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """fairseq-fixed waits before it tries again to read a file."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def data(tmp_path):
    """A labelled manifest folder of five utterances; 1.wav is none of those whose header is read at the start."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(5):
        soundfile.write(str(folder / f"{index}.wav"), noise(), 16000)
    (folder / "train.tsv").write_text(f"{folder}\n" + "".join(f"{i}.wav\t{FRAMES}\n" for i in range(5)))
    (folder / "train.ltr").write_text("A B | A |\n" * 5)
    (folder / "dict.ltr.txt").write_text("| 2\nA 2\nB 1\n")
    return folder


def load(name, data, **keys):
    """The task and its dataset train."""
    cfg = {"_name": name, "data": str(data), "normalize": True, "tpu": False, **keys}
    task = tasks.setup_task(OmegaConf.create(cfg))
    task.load_dataset("train")
    return task, task.dataset("train")


def failure(data, dataset, index):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        dataset[index]
    return str(error.value)


# audio


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_reading_bad_audio_names_file_line_and_remedy(data, name, kind):
    path = data / "1.wav"
    path.unlink()
    write, expected = BAD_AUDIO[kind]
    write(path)
    _, dataset = load(name, data)
    message = failure(data, dataset, 1)
    assert message.startswith(f"{data / 'train.tsv'}:3: {path}: ")
    assert expected in message
    assert f"`w2v2-light prepare check {data} --deep` lists all such files" in message
    assert len(dataset[2]["source"]) == FRAMES


def test_bad_audio_met_in_a_worker_process(data):
    write_nan(data / "1.wav")
    _, dataset = load("audio_ctc", data)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=1, collate_fn=dataset.collater)
    with pytest.raises(ValueError, match=r"train\.tsv:3: .*1\.wav: NaN samples"):
        list(loader)


def test_a_missing_file_is_a_file_not_found(data):
    (data / "1.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tsv:3: .*1\.wav"):
        load("light_pretraining", data)[1][1]


@pytest.mark.parametrize("name", TASKS)
def test_lines_that_are_left_out_are_counted(data, name):
    lines = (data / "train.tsv").read_text().splitlines()
    soundfile.write(str(data / "short.wav"), noise(400), 16000)
    (data / "train.tsv").write_text("\n".join([lines[0], "short.wav\t400", *lines[2:]]) + "\n")
    write_nan(data / "3.wav")
    _, dataset = load(name, data, min_sample_size=1000)
    assert len(dataset) == 4
    assert failure(data, dataset, 2).startswith(f"{data / 'train.tsv'}:5: {data / '3.wav'}: NaN")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("frames", (0, 1, 399))
def test_utterances_without_one_frame_are_refused_or_left_out(data, name, frames):
    lines = (data / "train.tsv").read_text().splitlines()
    soundfile.write(str(data / "1.wav"), noise(frames), 16000)
    (data / "train.tsv").write_text("\n".join([*lines[:2], f"1.wav\t{frames}", *lines[3:]]) + "\n")
    with pytest.raises(ValueError) as error:
        load(name, data)
    expected = f"train.tsv:3: 1.wav has {frames} samples, expected at least 400 for one frame; leave such audio out"
    assert expected in str(error.value) and "task.min_sample_size=400" in str(error.value)
    assert len(load(name, data, min_sample_size=400)[1]) == 4


@pytest.mark.parametrize("name", TASKS)
def test_a_minimum_that_leaves_nothing(data, name):
    expected = "none of the 5 utterances has the 9001 samples of task.min_sample_size, the longest has 9000"
    with pytest.raises(ValueError, match=rf"train\.tsv: {expected}"):
        load(name, data, min_sample_size=9001)


@pytest.mark.parametrize("name", TASKS)
def test_empty_and_missing_splits(data, name):
    (data / "train.tsv").write_text(f"{data}\n")
    with pytest.raises(ValueError, match=r"train\.tsv: split 'train' is empty"):
        load(name, data)
    (data / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: no such file; .*w2v2-light prepare"):
        load(name, data)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", range(1, 10))
def test_every_utterance_of_a_small_set_is_in_a_batch(data, name, count):
    """With fairseq's default multiple of 8, of which fairseq-fixed drops what is left over or stops."""
    (data / "train.tsv").write_text(f"{data}\n" + "".join(f"{i % 5}.wav\t{FRAMES}\n" for i in range(count)))
    (data / "train.ltr").write_text("A B | A |\n" * count)
    task, dataset = load(name, data)
    multiple = 8 if count < 8 else 1
    iterator = task.get_batch_iterator(dataset, max_tokens=20000, required_batch_size_multiple=multiple)
    batches = list(iterator.next_epoch_itr(shuffle=False))
    assert sorted(index for batch in batches for index in batch["id"].tolist()) == list(range(count))


# labels


@pytest.mark.parametrize(
    "labels, dictionary, message",
    (
        ("A |\n" * 4, "| 2\nA 2\n", r"train\.ltr: 4 lines of labels, but .*train\.tsv lists 5 utterances"),
        ("A |\n" * 4 + "A C |\n", "| 2\nA 2\n", r"train\.ltr:5: symbol 'C' is not in .*dict\.ltr\.txt; add it there"),
        ("A |\n" * 4 + "\n", "| 2\nA 2\n", r"train\.ltr:5: found no label"),
        ("A |\n" * 5, "| 2\nA\n", r"dict\.ltr\.txt:2: found 'A'; expected 'symbol count'"),
        ("A |\n" * 5, "", r"dict\.ltr\.txt: the dictionary holds no symbol"),
    ),
)
def test_bad_labels_stop_fine_tuning_before_it_starts(data, labels, dictionary, message):
    (data / "train.ltr").write_text(labels)
    (data / "dict.ltr.txt").write_text(dictionary)
    with pytest.raises(ValueError, match=message):
        load("audio_ctc", data)


def change(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("how", ("as it is", "CRLF", "double blanks", "trailing slash", "no last line end"))
def test_harmless_variants_of_the_text_files_read_the_same(data, how):
    tsv, labels, dictionary = (data / name for name in ("train.tsv", "train.ltr", "dict.ltr.txt"))
    if how == "CRLF":
        for path in (tsv, labels, dictionary):
            change(path, b"\n", b"\r\n")
    elif how == "double blanks":
        change(labels, b" ", b"  ")
    elif how == "trailing slash":
        change(tsv, f"{data}\n".encode(), f"{data}/\n".encode())
    elif how == "no last line end":
        for path in (tsv, labels, dictionary):
            path.write_bytes(path.read_bytes()[:-1])
    task, dataset = load("audio_ctc", data)
    assert len(dataset) == 5 and len(dataset[4]["source"]) == FRAMES
    assert task.target_dictionary.string(dataset[4]["label"]) == "A B | A |"


# folders and their names


def test_odd_names_are_prepared_and_read(tmp_path):
    folder = tmp_path / "sp ace,\u00fc=x [1] $HOME"
    names = [
        "a=1,b \u00e9.wav",
        "q'uote.wav",
        'd"quote.wav',
        "{brace}.wav",
        "co:lon.wav",
        "#.wav",
        "-dash.wav",
        "%20.wav",
    ]
    folder.mkdir()
    for name in names:
        soundfile.write(str(folder / name), noise(), 16000)
    out = folder / "da,ta=1"
    assert main(["prepare", "audio", str(folder), str(out), "--valid-percent", "0"]) == 0
    _, dataset = load("light_pretraining", out)
    assert len(dataset) == len(names)
    assert all(len(dataset[index]["source"]) == FRAMES for index in range(len(names)))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_cannot_be_prepared_leaves_a_prepared_folder_as_it_was(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "audio", str(data), str(out), "--valid-percent", "0"]) == 0
    before, neighbours = content(out), sorted(path.name for path in tmp_path.iterdir())
    tables = {
        "path,text\n1.wav,one\n2.wav\n": ":3: 1 values for 2 columns",
        "path,text\ngone.wav,one\n": "none of its 1 utterances is usable: 1 missing file",
    }
    for text, message in tables.items():
        (data / "table.csv").write_text(text)
        assert main(["prepare", "table", str(data / "table.csv"), str(out), "--force"]) == 2
        assert message in capsys.readouterr().err
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == neighbours


def test_a_link_that_leads_nowhere_is_reported(data, tmp_path):
    (data / "dangling.wav").symlink_to(tmp_path / "nothing.wav")
    assert main(["prepare", "audio", str(data), str(tmp_path / "out"), "--valid-percent", "0"]) == 0
    assert f"missing file\t{data / 'dangling.wav'}" in (tmp_path / "out" / "skipped.tsv").read_text()


def test_a_destination_that_cannot_be_made_is_named(data, capsys):
    out = data / "train.tsv" / "out"
    assert main(["prepare", "audio", str(data), str(out)]) == 2
    assert f"{out}: cannot make this folder: " in capsys.readouterr().err


@pytest.mark.parametrize("kill", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
def test_a_killed_prepare_leaves_no_folder(data, tmp_path, kill):
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        # a shell's background jobs, this suite among them, start with it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fairseq_w2v2_light.data import corpus\n"
        "from fairseq_w2v2_light.cli.main import main\n"
        "def die(*args):\n"
        f"    os.kill(os.getpid(), {int(kill)})\n"
        "corpus._manifest_files = die\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = ["prepare", "audio", str(data), str(out), "--valid-percent", "0"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, timeout=120
    )
    assert result.returncode not in (0, 1, 2)
    assert not out.exists()
