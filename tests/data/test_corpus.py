import json
import os

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.data.corpus import UNDIVIDED, Division, Options, new_corpus, prepare, staged
from fairseq_w2v2_light.data.manifest import read_dictionary, read_labels, read_manifest, validate_split
from fairseq_w2v2_light.data.sources import Utterance


@pytest.fixture
def spoken(tmp_path, tone):
    """Utterances of one text each: spoken("SO I", "AND")."""

    def make(*texts, folder="audio"):
        paths = [tone(tmp_path / folder / f"{index}.wav", seconds=0.5) for index in range(len(texts))]
        return [
            Utterance(path, text, where=f"t.csv:{index + 2}") for index, (path, text) in enumerate(zip(paths, texts))
        ]

    return make


def test_folder_holds_manifest_labels_and_dictionary(tmp_path, spoken):
    splits = {"train": spoken("So, I.", "and I"), "valid": spoken("Oz", folder="more")}
    summary = prepare(splits, tmp_path / "out", Options(), tmp_path)
    out = tmp_path / "out"
    assert (out / "train.tsv").read_text() == f"{tmp_path}\naudio/0.wav\t8000\naudio/1.wav\t8000\n"
    assert read_labels(out / "train.ltr") == ["S O | I |", "A N D | I |"]
    assert read_labels(out / "train.wrd") == ["SO I", "AND I"]
    # Letters of valid alone are in the dictionary too.
    assert read_dictionary(out / "dict.ltr.txt") == {"|": 4, "I": 2, "A": 1, "D": 1, "N": 1, "O": 1, "S": 1, "Z": 0}
    assert summary.utterances == {"train": 2, "valid": 1}
    for split in splits:
        validate_split(out, split, "ltr")


def test_fairseq_reads_the_dictionary(tmp_path, spoken):
    dictionary = pytest.importorskip("fairseq.data.dictionary").Dictionary
    prepare({"train": spoken("SO I", "AND I")}, tmp_path / "out", Options(), tmp_path)
    loaded = dictionary.load(str(tmp_path / "out" / "dict.ltr.txt"))
    line = loaded.encode_line("S O | I |", append_eos=False, add_if_not_exist=False)
    assert len(loaded) == 4 + 7 and loaded.unk() not in line.tolist()


def test_sentencepiece_labels(tmp_path, spoken):
    options = Options(labels="sentencepiece", vocab_size=16)
    texts = ["the cat sat", "the dog sat", "a cat ran", "the dog ran"]
    splits = {"train": spoken(*texts), "valid": spoken("Ü cat", folder="more")}
    prepare(splits, tmp_path / "out", options, tmp_path)
    out = tmp_path / "out"
    assert len(read_dictionary(out / "dict.spm.txt")) == 16 - 3 + 1
    for split in splits:
        validate_split(out, split, "spm")
        spelled = [line.replace(" ", "").replace("\u2581", " ").strip() for line in read_labels(out / f"{split}.spm")]
        assert spelled == read_labels(out / f"{split}.wrd")
    assert (out / "spm.model").stat().st_size > 0 and not (out / "train.ltr").exists()


def test_unlabelled_audio_gives_manifests_only(tmp_path, spoken):
    utterances = [item._replace(text=None) for item in spoken("", "", "", "")]
    prepare({UNDIVIDED: utterances}, tmp_path / "out", Options(), tmp_path, Division({"valid": 0.25}))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["prepared.json", "skipped.tsv", "train.tsv", "valid.tsv"]
    assert len(read_manifest(tmp_path / "out" / "train.tsv").entries) == 3


def test_what_is_skipped_is_listed_with_reasons(tmp_path, spoken, tone, nan_wave):
    audio = tmp_path / "audio"
    good = spoken("SO")
    (audio / "text.wav").write_text("no audio")
    (audio / "empty.wav").touch()
    soundfile.write(str(audio / "one.wav"), np.zeros(1, np.int16), 16000)
    bad = {
        "missing file": audio / "missing.wav",
        "not audio": audio / "text.wav",
        "zero length": audio / "empty.wav",
        "too short": audio / "one.wav",
        "wrong sample rate": tone(audio / "8k.wav", rate=8000),
        "not mono": tone(audio / "stereo.wav", channels=2),
        "NaN samples": nan_wave(audio / "nan.wav"),
        "unusable path": tone(audio / "a\tb.wav"),
        "listed twice": good[0].path,
    }
    utterances = good + [Utterance(path, "A", where=f"t.csv:{n}") for n, path in enumerate(bad.values(), 10)]
    empty = tone(audio / "silent.wav"), tone(audio / "dots.wav")
    utterances += [Utterance(empty[0], " "), Utterance(empty[1], "...")]
    summary = prepare({"train": utterances}, tmp_path / "out", Options(), audio)
    reasons = [item.reason for item in summary.skipped]
    assert reasons == [*bad, "empty text", "nothing left of the text"]
    rows = [line.split("\t") for line in (tmp_path / "out" / "skipped.tsv").read_text().splitlines()]
    assert rows[0] == ["split", "reason", "path", "detail"]
    assert rows[5][:3] == ["train", "wrong sample rate", str(audio / "8k.wav")]
    assert rows[5][3] == "8000 Hz, expected 16000 Hz (t.csv:14)"
    assert "skipped 11: 1 missing file, 1 not audio" in "\n".join(summary.lines())
    assert read_manifest(tmp_path / "out" / "train.tsv").entries == [("0.wav", 8000)]


def test_paths_that_a_manifest_cannot_hold_are_skipped(tmp_path, spoken, tone):
    paths = [tone(tmp_path / "in" / name) for name in ("a:b.wav", "a:b.aiff")]
    paths.append(tone(tmp_path / "in" / "c.wav").rename(tmp_path / "in" / os.fsdecode(b"\xff.wav")))
    utterances = [Utterance(path, "A") for path in paths]
    summary = prepare({"train": utterances}, tmp_path / "out", Options(), tmp_path)
    assert [item.reason for item in summary.skipped] == ["unusable path"] * 2
    assert "holds ':'" in summary.skipped[0].detail and "is not UTF-8" in summary.skipped[1].detail
    assert [entry.path for entry in read_manifest(tmp_path / "out" / "train.tsv").entries] == ["in/a:b.wav"]


def test_a_word_boundary_in_the_text_is_reserved(tmp_path, spoken):
    summary = prepare({"train": spoken("a|b", "ab")}, tmp_path / "out", Options(normalise="none"), tmp_path)
    assert [item.reason for item in summary.skipped] == ["reserved symbol in the text"]


def test_conversion_replaces_skipping(tmp_path, spoken, tone):
    tone(tmp_path / "audio" / "a" / "8k.wav", rate=8000)
    tone(tmp_path / "audio" / "stereo.wav", rate=44100, channels=2)
    utterances = spoken("SO") + [
        Utterance(tmp_path / "audio" / "a" / "8k.wav", "I"),
        Utterance(tmp_path / "audio" / "stereo.wav", "AM"),
    ]
    out = tmp_path / "out"
    summary = prepare({"train": utterances}, out, Options(convert=True), tmp_path / "audio")
    assert not summary.skipped
    manifest = read_manifest(out / "train.tsv")
    assert manifest.root == str(tmp_path)
    assert manifest.entries == [
        ("audio/0.wav", 8000),
        ("out/audio/a/8k.flac", 8000),
        ("out/audio/stereo.flac", 8000),
    ]
    validate_split(out, "train", "ltr")


def test_converted_copies_of_files_that_differ_in_suffix_differ(tmp_path, tone):
    sources = [tone(tmp_path / "in" / f"a.{suffix}", rate=8000) for suffix in ("flac", "wav")]
    out = tmp_path / "out"
    prepare({"train": [Utterance(path, "A") for path in sources]}, out, Options(convert=True), tmp_path)
    assert [entry.path for entry in read_manifest(out / "train.tsv").entries] == [
        "out/audio/a.flac",
        "out/audio/a.wav.flac",
    ]


def test_conversion_never_overwrites_a_source(tmp_path, tone):
    source = tone(tmp_path / "out" / "audio" / "a.flac", rate=8000)
    before = source.read_bytes()
    with pytest.raises(ValueError, match=r"a\.flac: its converted copy would overwrite .*; choose another folder"):
        prepare({"train": [Utterance(source, "A")]}, tmp_path / "out", Options(convert=True), tmp_path)
    assert source.read_bytes() == before


def test_an_empty_split_is_explained_and_nothing_is_written(tmp_path, spoken, tone):
    bad = [Utterance(tone(tmp_path / "b" / f"{rate}.wav", rate=rate), "A") for rate in (8000, 8001)]
    bad.append(Utterance(tmp_path / "b" / "gone.wav", "A"))
    message = (
        r"split 'valid': none of its 3 utterances is usable: 2 wrong sample rate, 1 missing file; "
        r"first: .*8000\.wav: 8000 Hz, expected 16000 Hz.*--convert"
    )
    with pytest.raises(ValueError, match=message):
        prepare({"train": spoken("SO"), "valid": bad}, tmp_path / "out", Options(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "b"]


def test_a_prepared_folder_is_kept_without_force(tmp_path, spoken):
    out = tmp_path / "out"
    prepare({"train": spoken("SO"), "test": spoken("I", folder="more")}, out, Options(), tmp_path)
    with pytest.raises(ValueError, match=r"prepared\.json: exists already; choose another folder or pass --force"):
        prepare({"train": spoken("AND")}, out, Options(), tmp_path)
    assert read_labels(out / "train.wrd") == ["SO"]
    (out / "notes.txt").write_text("mine")
    prepare({"train": spoken("AND")}, out, Options(force=True), tmp_path)
    names = sorted(path.name for path in out.iterdir())
    # The lists of the former run are gone, what others put there is not.
    assert names == sorted(
        ["dict.ltr.txt", "notes.txt", "prepared.json", "skipped.tsv", "train.ltr", "train.tsv", "train.wrd"]
    )
    assert read_labels(out / "train.wrd") == ["AND"]


def test_manifests_of_others_are_kept_without_force(tmp_path, spoken):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.tsv").write_text("mine")
    with pytest.raises(ValueError, match=r"train\.tsv: exists already"):
        prepare({"train": spoken("AND")}, tmp_path / "out", Options(), tmp_path)


def test_the_table_itself_is_never_overwritten(tmp_path, spoken):
    table = tmp_path / "out" / "train.tsv"
    table.parent.mkdir()
    table.write_text("mine")
    with pytest.raises(ValueError, match=r"train\.tsv: would be overwritten by its own result"):
        prepare({"train": spoken("A")}, table.parent, Options(force=True), tmp_path, protected=table)
    assert table.read_text() == "mine"


def test_a_file_as_destination_is_refused(tmp_path, spoken):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out: is not a folder"):
        prepare({"train": spoken("A")}, tmp_path / "out", Options(), tmp_path)


def test_the_record_says_how_the_folder_was_made(tmp_path, spoken):
    prepare({"train": spoken("SO", "")}, tmp_path / "out", Options(), tmp_path, record={"source": "table", "seed": 3})
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (record["source"], record["seed"], record["skipped"]) == ("table", 3, {"empty text": 1})
    assert record["splits"]["train"]["utterances"] == 1


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with staged(tmp_path / "out") as stage:
            (stage / "train.tsv").write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_staged_files_join_a_folder(tmp_path):
    (tmp_path / "out" / "audio").mkdir(parents=True)
    (tmp_path / "out" / "audio" / "old.flac").write_text("old")
    with new_corpus(tmp_path / "out") as stage:
        (stage / "audio").mkdir()
        (stage / "audio" / "new.flac").write_text("new")
    assert sorted(path.name for path in (tmp_path / "out" / "audio").iterdir()) == ["new.flac", "old.flac"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("labels", "phones", "--labels phones: expected one of letter, sentencepiece"),
        ("normalise", "x", "--normalise x"),
    ],
)
def test_unknown_options_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        Options(**{key: value})


def test_real_speech_is_prepared(shared_data, tmp_path):
    audio = sorted((shared_data / "librispeech_sample").rglob("*.flac"))[:4]
    prepare({"train": [Utterance(path, "SO") for path in audio]}, tmp_path / "out", Options(deep=True), shared_data)
    manifest = read_manifest(tmp_path / "out" / "train.tsv")
    assert [entry.frames for entry in manifest.entries] == [soundfile.info(str(path)).frames for path in audio]
    validate_split(tmp_path / "out", "train", "ltr")
