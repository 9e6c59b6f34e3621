import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.data.manifest import read_labels, read_manifest, validate_split


def write_tone(path, seconds=0.5, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    soundfile.write(str(path), wave, rate)


def run(*arguments):
    return main(["prepare", *map(str, arguments)])


def librispeech(tree, *subsets):
    for speaker, subset in enumerate(subsets):
        folder = tree / subset / str(speaker) / "1"
        lines = []
        for number in range(3):
            write_tone(folder / f"{speaker}-1-{number:04d}.flac")
            lines.append(f"{speaker}-1-{number:04d} SO SAID {subset[:2].upper()}\n")
        (folder / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return tree


def table(folder, rows, header="path,text,speaker"):
    for row in rows:
        write_tone(folder / row.split(",")[0])
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "table.csv"


def entries(folder, split):
    return [entry.path for entry in read_manifest(folder / f"{split}.tsv").entries]


def test_librispeech(tmp_path, capsys):
    tree = librispeech(tmp_path / "LibriSpeech", "train-clean-100", "dev-clean", "test-clean", "test-other")
    assert run("librispeech", tree, tmp_path / "out", "--split", "test_other=test-other") == 0
    printed = capsys.readouterr().out
    assert "train: 3 utterances" in printed and f"wrote {tmp_path / 'out'}" in printed
    assert read_manifest(tmp_path / "out" / "test.tsv").root == str(tree)
    assert entries(tmp_path / "out", "test_other")[0] == "test-other/3/1/3-1-0000.flac"
    for split in ("train", "valid", "test", "test_other"):
        validate_split(tmp_path / "out", split, "ltr")
    assert run("check", tmp_path / "out", "--deep") == 0


def test_librispeech_with_chosen_subsets(tmp_path):
    tree = librispeech(tmp_path / "tree", "a", "b", "c")
    assert run("librispeech", tree, tmp_path / "out", "--train", "a", "b", "--valid", "c", "--test") == 0
    assert len(entries(tmp_path / "out", "train")) == 6 and not (tmp_path / "out" / "test.tsv").exists()


def test_librispeech_bad_split_argument(tmp_path, capsys):
    tree = librispeech(tmp_path / "tree", "train-a")
    assert run("librispeech", tree, tmp_path / "out", "--split", "x") == 2
    assert "--split x: expected NAME=SUBSET" in capsys.readouterr().err


def test_table_is_divided(tmp_path):
    path = table(tmp_path, [f"a/{i}.wav,word {'abcdefgh'[i % 8]},s{i % 5}" for i in range(20)])
    assert (
        run("table", path, tmp_path / "out", "--valid-percent", "0.2", "--test-percent", 0.2, "--speaker-disjoint") == 0
    )
    parts = [entries(tmp_path / "out", split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [12, 4, 4]
    speakers = [{int(name.split("/")[1][:-4]) % 5 for name in part} for part in parts]
    assert not speakers[0] & speakers[1] and not speakers[0] & speakers[2] and not speakers[1] & speakers[2]


def test_table_with_splits_and_sentencepieces(tmp_path):
    rows = [f"{i}.wav,the cat sat on mat {'abc'[i % 3]},{'train' if i < 4 else 'dev'}" for i in range(6)]
    path = table(tmp_path, rows, header="path,sentence,split")
    command = ["--columns", "text=sentence", "--labels", "sentencepiece", "--vocab-size", "15", "--normalise", "lower"]
    assert run("table", path, tmp_path / "out", *command) == 0
    assert read_labels(tmp_path / "out" / "valid.wrd")[0] == "the cat sat on mat b"
    validate_split(tmp_path / "out", "valid", "spm")


def test_table_vocabulary_too_large(tmp_path, capsys):
    path = table(tmp_path, [f"{i}.wav,the cat,s" for i in range(6)])
    assert run("table", path, tmp_path / "out", "--labels", "sentencepiece") == 2
    error = capsys.readouterr().err
    assert "--vocab-size 1000: too large for the training text" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_table_speakers_in_two_splits_are_refused(tmp_path, capsys):
    path = table(tmp_path, ["0.wav,a,x,train", "1.wav,b,x,test"], header="path,text,speaker,split")
    assert run("table", path, tmp_path / "out", "--speaker-disjoint") == 2
    assert "table.csv:3: speaker 'x' is in split 'train' and in 'test'" in capsys.readouterr().err


def test_audio_folder(tmp_path, capsys):
    for index in range(10):
        write_tone(tmp_path / "in" / f"{index}.flac")
    write_tone(tmp_path / "in" / "deep" / "8k.wav", rate=8000)
    assert run("audio", tmp_path / "in", tmp_path / "out", "--valid-percent", "0.2") == 0
    assert "skipped 1: 1 wrong sample rate" in capsys.readouterr().out
    assert [len(entries(tmp_path / "out", split)) for split in ("train", "valid")] == [8, 2]


def test_audio_folder_prepared_inside_itself_twice(tmp_path):
    write_tone(tmp_path / "0.flac")
    write_tone(tmp_path / "1.wav", rate=8000)
    for _ in range(2):
        assert run("audio", tmp_path, tmp_path, "--convert", "--force", "--valid-percent", "0") == 0
        assert entries(tmp_path, "train") == ["0.flac", "audio/1.flac"]


def test_synth(tmp_path):
    pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader to run this")
    arguments = ["--utterances", 4, 1, 1, "--train-voices", "en-us", "en-us+m3", "--seed", 5, "--words", 1, 2]
    assert run("synth", tmp_path / "out", *arguments, "--noise", 20, 30) == 0
    assert entries(tmp_path / "out", "train")[0] == "audio/train/en-us/en-us-00000.flac"
    assert run("check", tmp_path / "out", "--deep") == 0


def test_manifest_verb(tmp_path, capsys):
    path = table(tmp_path, ["0.wav,a,x", "1.wav,b,y", "2.wav,b,y"])
    assert run("table", path, tmp_path / "data") == 0
    for name in ("train", "valid", "test"):
        lines = (tmp_path / "data" / f"{name}.tsv").read_text().splitlines()
        (tmp_path / "data" / f"{name}.tsv").write_text("\n".join(["..", *lines[1:]]) + "\n")
    assert run("check", tmp_path / "data") == 2
    assert run("manifest", tmp_path / "data", tmp_path / "local") == 0
    assert f"wrote {tmp_path / 'local'}: test, train, valid" in capsys.readouterr().out
    assert run("check", tmp_path / "local") == 0


def test_check_prints_every_problem_and_exits_2(tmp_path, capsys):
    path = table(tmp_path, ["0.wav,a,x", "1.wav,b,y", "2.wav,b,y"])
    run("table", path, tmp_path / "out")
    for index in range(3):
        (tmp_path / f"{index}.wav").unlink()
    capsys.readouterr()
    assert run("check", tmp_path / "out") == 2
    printed = capsys.readouterr().out
    assert printed.count("problem: ") == 3 and "3 problems" in printed


def test_an_existing_folder_needs_force(tmp_path, capsys):
    path = table(tmp_path, ["0.wav,a,x", "1.wav,b,y", "2.wav,b,y"])
    assert run("table", path, tmp_path / "out") == 0
    assert run("table", path, tmp_path / "out") == 2
    assert "exists already; choose another folder or pass --force" in capsys.readouterr().err
    assert run("table", path, tmp_path / "out", "--force") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["librispeech", "nowhere", "out"], "nowhere: no such LibriSpeech tree"),
        (["table", "nowhere.csv", "out"], "nowhere.csv: no such table"),
        (["audio", "nowhere", "out"], "nowhere: no such folder of audio"),
        (["manifest", "nowhere", "out"], "nowhere: no such data folder"),
        (["check", "nowhere"], "nowhere: no such data folder"),
        (["synth", "out", "--vocabulary", "nowhere.txt"], "nowhere.txt: no such vocabulary file"),
    ],
)
def test_missing_sources_are_named_without_traceback(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
