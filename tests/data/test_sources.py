import pytest

from fairseq_w2v2_light.data.sources import Utterance, divide, read_audio_folder, read_librispeech, read_table


def chapter(tree, subset, speaker="19", chapter_id="198", texts=("SO I", "AND")):
    folder = tree / subset / speaker / chapter_id
    folder.mkdir(parents=True)
    stem = f"{speaker}-{chapter_id}"
    lines = [f"{stem}-{number:04d} {text}\n" for number, text in enumerate(texts)]
    (folder / f"{stem}.trans.txt").write_text("".join(lines))
    for number in range(len(texts)):
        (folder / f"{stem}-{number:04d}.flac").touch()
    return folder


def table(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_librispeech_takes_what_exists(tmp_path):
    for subset in ("train-clean-100", "train-other-500", "dev-clean", "dev-other", "test-other"):
        chapter(tmp_path, subset)
    splits = read_librispeech(tmp_path)
    assert {split: len(members) for split, members in splits.items()} == {"train": 4, "valid": 2, "test": 2}
    assert splits["valid"][0].path == tmp_path / "dev-clean/19/198/19-198-0000.flac"
    assert splits["valid"][0][1:4] == ("SO I", "19", "valid")


def test_librispeech_subsets_can_be_chosen(tmp_path):
    for subset in ("a", "b", "dev-clean"):
        chapter(tmp_path, subset)
    splits = read_librispeech(tmp_path, {"train": ["a", "b"], "valid": [], "other": ["dev-clean"]})
    assert {split: len(members) for split, members in splits.items()} == {"train": 4, "other": 2}


def test_librispeech_audio_may_be_wav_and_may_lack_a_transcript(tmp_path):
    folder = chapter(tmp_path, "train-a")
    (folder / "19-198-0000.flac").rename(folder / "19-198-0000.wav")
    (folder / "19-198-0007.flac").touch()
    paths = {u.path.name: u.text for u in read_librispeech(tmp_path)["train"]}
    assert paths == {"19-198-0000.wav": "SO I", "19-198-0001.flac": "AND", "19-198-0007.flac": ""}


def test_librispeech_missing_subset_names_what_there_is(tmp_path):
    chapter(tmp_path, "train-clean-5")
    with pytest.raises(FileNotFoundError, match=r"train-clean-100: no such subset .* holds train-clean-5"):
        read_librispeech(tmp_path, {"train": ["train-clean-100"]})


def test_librispeech_without_training_folder_is_refused(tmp_path):
    chapter(tmp_path, "speech")
    with pytest.raises(ValueError, match="no folder train-.*--train"):
        read_librispeech(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such LibriSpeech tree"):
        read_librispeech(tmp_path / "nowhere")


def test_transcripts_that_are_not_utf8_are_named(tmp_path):
    transcripts = chapter(tmp_path, "train-a") / "19-198.trans.txt"
    transcripts.write_bytes("19-198-0000 CAF\xc9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{transcripts}: not a UTF-8 text file .*at byte 15"):
        read_librispeech(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    transcripts = chapter(tmp_path, "train-a", texts=["SO I"]) / "19-198.trans.txt"
    transcripts.write_text(transcripts.read_text(), encoding="utf-8-sig")
    assert [(u.path.name, u.text) for u in read_librispeech(tmp_path)["train"]] == [("19-198-0000.flac", "SO I")]


def test_librispeech_subset_without_transcripts_is_refused(tmp_path):
    (tmp_path / "train-x").mkdir()
    with pytest.raises(ValueError, match=r"train-x: holds no \*\.trans\.txt"):
        read_librispeech(tmp_path)


def test_librispeech_subset_serves_one_split(tmp_path):
    chapter(tmp_path, "train-x")
    with pytest.raises(ValueError, match="'train-x' is asked for twice: for split 'train' and for 'test'"):
        read_librispeech(tmp_path, {"test": ["train-x"]})


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", 'path,text,speaker,split\nx/1.wav,"hi, there",anna,dev\n'),
        ("a.csv", '\ufeffpath,text,speaker,split\r\nx/1.wav,"hi, there",anna,dev\r\n\r\n'),
        ("a.tsv", "split\tspeaker\ttext\tpath\nvalidation\tanna\thi, there\tx/1.wav\n"),
        ("a.jsonl", '{"path": "x/1.wav", "text": "hi, there", "speaker": "anna", "split": "valid", "times": [3]}\n\n'),
    ],
)
def test_tables_of_every_kind(tmp_path, name, text):
    [utterance] = read_table(table(tmp_path, name, text))
    assert utterance[:4] == (tmp_path / "x/1.wav", "hi, there", "anna", "valid")
    assert utterance.where == f"{tmp_path / name}:{1 if name == 'a.jsonl' else 2}"


def test_absolute_paths_stay(tmp_path):
    [utterance] = read_table(table(tmp_path, "a.csv", "path,text\n/somewhere/1.wav,hi\n"))
    assert str(utterance.path) == "/somewhere/1.wav"


def test_a_lone_quote_in_tsv_swallows_nothing(tmp_path):
    rows = read_table(table(tmp_path, "a.tsv", 'path\ttext\n1.wav\t"hi\n2.wav\tho\n'))
    assert [row.text for row in rows] == ['"hi', "ho"]


def test_columns_can_be_named(tmp_path):
    path = table(tmp_path, "a.csv", "file,sentence\n1.wav,hi\n")
    assert read_table(path, {"path": "file", "text": "sentence"})[0].text == "hi"
    with pytest.raises(ValueError, match="--columns words=.*expected one of path, text, speaker, split"):
        read_table(path, {"words": "sentence"})


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "path\n1.wav\n", r"a\.csv:2: no column 'text', found path; .*--columns text=NAME.*prepare audio"),
        ("a.csv", "file,text\n1.wav,hi\n", r"a\.csv:2: no column 'path', found file, text"),
        ("a.csv", "path,text\n1.wav,hi, there\n", r"a\.csv:2: 3 values for 2 columns \(path, text\).*quoted"),
        ("a.csv", "path,text\n1.wav\n", r"a\.csv:2: 1 values for 2 columns"),
        ("a.csv", "", r"a\.csv:1: found no header"),
        ("a.csv", "path,text\n", "holds no utterance"),
        ("a.jsonl", '{"path": "1.wav", "text": "a"}\n{"path": \n', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", "[" * 100000 + "\n", r"a\.jsonl:1: not a JSON object"),
        (
            "a.jsonl",
            '{"path": "1.wav", "text": ["hi", "there"]}\n',
            r"a\.jsonl:1: 'text' holds a list, \['hi', 'there'\]; expected a text",
        ),
        ("a.jsonl", '{"path": {"a": 1}, "text": "hi"}\n', r"a\.jsonl:1: 'path' holds a dict, \{'a': 1\}"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: found list; expected one JSON object per line"),
        (
            "a.csv",
            "path,text,split\n1.wav,a,train\n2.wav,b,\n",
            r"a\.csv:3: column 'split' is filled in some rows only",
        ),
        ("a.csv", "path,text,split\n1.wav,a,my split\n", r"a\.csv:2: split 'my split': expected letters"),
        ("a.txt", "path,text\n", r"a\.txt: a table is \.csv, \.tsv or \.jsonl"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(table(tmp_path, name, text))


def test_a_binary_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"path,text\n\xff\xfe,\x80\n")
    with pytest.raises(ValueError, match="not a UTF-8 text table"):
        read_table(tmp_path / "a.csv")


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.csv: no such table"):
        read_table(tmp_path / "a.csv")


def test_audio_folder_is_searched_recursively_and_in_order(tmp_path, tone):
    for name in ("b/2.wav", "a.flac", "b/1.WAV"):
        tone(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no audio")
    assert [str(u.path.relative_to(tmp_path)) for u in read_audio_folder(tmp_path)] == ["a.flac", "b/1.WAV", "b/2.wav"]
    assert [u.path.name for u in read_audio_folder(tmp_path, ["flac"])] == ["a.flac"]


def test_audio_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no audio file; looked for .*\.flac.*\.wav"):
        read_audio_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder of audio"):
        read_audio_folder(tmp_path / "nowhere")


def utterances(count, speakers=4):
    return [Utterance(f"{i}.wav", "a", f"speaker{i % speakers}", where=f"t:{i}") for i in range(count)]


def test_division_has_the_asked_sizes_and_is_seeded():
    first = divide(utterances(100), {"valid": 0.1, "test": 0.2}, seed=1)
    assert {split: len(members) for split, members in first.items()} == {"train": 70, "valid": 10, "test": 20}
    assert len({u.path for members in first.values() for u in members}) == 100
    assert first == divide(utterances(100), {"valid": 0.1, "test": 0.2}, seed=1)
    assert first != divide(utterances(100), {"valid": 0.1, "test": 0.2}, seed=2)


def test_a_small_fraction_gives_one_utterance_and_zero_gives_no_split():
    parts = divide(utterances(5), {"valid": 0.01, "test": 0.0}, seed=1)
    assert {split: len(members) for split, members in parts.items()} == {"train": 4, "valid": 1}


def test_division_by_speaker_shares_no_speaker():
    parts = divide(utterances(60, speakers=6), {"valid": 0.2, "test": 0.1}, seed=3, by_speaker=True)
    heard = [{u.speaker for u in members} for members in parts.values()]
    assert not heard[0] & heard[1] and not heard[0] & heard[2] and not heard[1] & heard[2]
    assert {split: len(members) for split, members in parts.items()} == {"train": 30, "valid": 20, "test": 10}


def test_large_fractions_leave_a_speaker_for_every_split():
    parts = divide(utterances(9, speakers=3), {"valid": 0.45, "test": 0.45}, seed=0, by_speaker=True)
    assert all(len({u.speaker for u in members}) == 1 for members in parts.values())


@pytest.mark.parametrize(
    "count, fractions, message",
    [
        (10, {"valid": 5}, r"--valid-percent 5: a fraction as in fairseq, expected 0 <= F < 1"),
        (10, {"valid": 0.6, "test": 0.5}, "leave nothing to train on"),
        (2, {"valid": 0.1, "test": 0.1}, r"2 usable utterances cannot be divided into train, valid, test"),
    ],
)
def test_impossible_divisions_are_explained(count, fractions, message):
    with pytest.raises(ValueError, match=message):
        divide(utterances(count), fractions, seed=0)


def test_division_by_speaker_needs_speakers():
    with pytest.raises(ValueError, match="2 usable speakers cannot be divided into train, valid, test"):
        divide(utterances(9, speakers=2), {"valid": 0.1, "test": 0.1}, seed=0, by_speaker=True)
    with pytest.raises(ValueError, match="t:0: no speaker; --speaker-disjoint needs one"):
        divide([u._replace(speaker="") for u in utterances(9)], {"valid": 0.1}, seed=0, by_speaker=True)
