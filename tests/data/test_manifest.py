import pytest

from fairseq_w2v2_light.data.manifest import (
    Entry,
    audio_paths,
    list_splits,
    localise_manifest,
    read_dictionary,
    read_manifest,
    validate_split,
)


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def test_read_manifest_gives_root_and_entries(manifest_folder):
    manifest = read_manifest(manifest_folder / "train.tsv")
    assert manifest.root == str(manifest_folder.parent / "audio")
    assert manifest.entries[:2] == [Entry("0.flac", 16000), Entry("1.flac", 20000)]


def test_a_sound_split_passes(manifest_folder):
    validate_split(str(manifest_folder), "train", "ltr")
    validate_split(str(manifest_folder), "train")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such data folder"):
        validate_split(tmp_path / "nowhere", "train", None)


def test_missing_manifest_is_named(manifest_folder):
    with pytest.raises(FileNotFoundError, match=r"valid\.tsv: no such file"):
        validate_split(manifest_folder, "valid", None)


@pytest.mark.parametrize("line", ["1.flac 20000", "1.flac\tmany", "1.flac", "\t20000", "a\t1\t2", ""])
def test_malformed_line_is_named(manifest_folder, line):
    replace_line(manifest_folder / "train.tsv", 3, line)
    with pytest.raises(ValueError, match=r"train\.tsv:3: found .*expected 'relative path<TAB>number of samples'"):
        validate_split(manifest_folder, "train", "ltr")


def test_manifest_without_root_line_is_refused(manifest_folder):
    lines = (manifest_folder / "train.tsv").read_text().splitlines()[1:]
    (manifest_folder / "train.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"train\.tsv:1: .*first line must be the root directory"):
        validate_split(manifest_folder, "train", None)


def test_empty_file_is_refused(manifest_folder):
    (manifest_folder / "train.tsv").write_text("")
    with pytest.raises(ValueError, match=r"train\.tsv:1: found no root directory"):
        validate_split(manifest_folder, "train", None)


def test_binary_file_is_refused(manifest_folder):
    (manifest_folder / "train.tsv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        validate_split(manifest_folder, "train", None)


def test_a_byte_order_mark_is_refused(manifest_folder):
    tsv = manifest_folder / "train.tsv"
    tsv.write_bytes(b"\xef\xbb\xbf" + tsv.read_bytes())
    with pytest.raises(ValueError, match=r"train\.tsv:1: begins with a byte order mark"):
        validate_split(manifest_folder, "train", None)


def test_empty_split_is_refused(manifest_folder):
    (manifest_folder / "train.tsv").write_text("/\n")
    with pytest.raises(ValueError, match="split 'train' is empty"):
        validate_split(manifest_folder, "train", None)


def test_missing_root_is_named(manifest_folder):
    replace_line(manifest_folder / "train.tsv", 1, "/no/such/root")
    with pytest.raises(ValueError, match=r"train\.tsv:1: no such root directory: /no/such/root"):
        validate_split(manifest_folder, "train", None)


def test_relative_root_that_leads_nowhere_is_explained(manifest_folder, tmp_path, monkeypatch):
    replace_line(manifest_folder / "train.tsv", 1, ".")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"relative root directory '\.' .*prepare manifest"):
        validate_split(manifest_folder, "train", None)
    monkeypatch.chdir(tmp_path / "audio")
    validate_split(manifest_folder, "train", None)


def test_line_counts_must_agree(manifest_folder):
    (manifest_folder / "train.ltr").write_text("A |\nB |\n")
    with pytest.raises(ValueError, match=r"train\.ltr: 2 lines of labels, but .*train\.tsv lists 3 utterances"):
        validate_split(manifest_folder, "train", "ltr")


def test_unknown_symbol_is_named(manifest_folder):
    replace_line(manifest_folder / "train.ltr", 2, "B Q |")
    with pytest.raises(ValueError, match=r"train\.ltr:2: symbol 'Q' is not in .*dict\.ltr\.txt"):
        validate_split(manifest_folder, "train", "ltr")


def test_empty_label_is_named(manifest_folder):
    replace_line(manifest_folder / "train.ltr", 3, "")
    with pytest.raises(ValueError, match=r"train\.ltr:3: found no label"):
        validate_split(manifest_folder, "train", "ltr")


def test_missing_labels_and_dictionary_are_named(manifest_folder):
    with pytest.raises(FileNotFoundError, match=r"dict\.spm\.txt: no such file"):
        validate_split(manifest_folder, "train", "spm")
    (manifest_folder / "train.ltr").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.ltr: no such file"):
        validate_split(manifest_folder, "train", "ltr")


@pytest.mark.parametrize(
    "seconds, rate, channels, message",
    [
        (1.25, 8000, 1, "has 8000 Hz, expected 16000 Hz"),
        (1.25, 16000, 2, "has 2 channels, expected 1"),
        (1.0, 16000, 1, "has 16000 samples, the manifest says 20000"),
    ],
)
def test_wrong_audio_is_noticed_by_its_header(manifest_folder, tone, seconds, rate, channels, message):
    tone(manifest_folder.parent / "audio" / "1.flac", seconds=seconds, rate=rate, channels=channels)
    with pytest.raises(ValueError, match=rf"train\.tsv:3: .*1\.flac {message}"):
        validate_split(manifest_folder, "train", None)


def test_missing_and_non_audio_files_are_noticed(manifest_folder):
    audio = manifest_folder.parent / "audio" / "2.flac"
    audio.write_text("this is text")
    with pytest.raises(ValueError, match=r"train\.tsv:4: not an audio file"):
        validate_split(manifest_folder, "train", None)
    audio.unlink()
    with pytest.raises(ValueError, match=r"train\.tsv:4: no such audio file"):
        validate_split(manifest_folder, "train", None)
    audio.with_name("2.raw").write_bytes(bytes(1000))
    manifest = manifest_folder / "train.tsv"
    manifest.write_text(manifest.read_text().replace("2.flac", "2.raw"))
    with pytest.raises(ValueError, match=r"train\.tsv:4: not an audio file"):
        validate_split(manifest_folder, "train", None)


def test_number_of_further_problems_is_told(manifest_folder):
    (manifest_folder / "train.ltr").write_text("X |\nY |\nZ |\n")
    with pytest.raises(ValueError, match=r"'X' .*and 2 more; see `w2v2-light prepare check`"):
        validate_split(manifest_folder, "train", "ltr")


def test_dictionary_is_read_in_order(manifest_folder):
    assert list(read_dictionary(manifest_folder / "dict.ltr.txt").items()) == [("|", 4), ("B", 3), ("A", 2)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("A 1\nB\n", r"dict\.ltr\.txt:2: found 'B'; expected 'symbol count'"),
        ("A 1\nA 2\n", r"dict\.ltr\.txt:2: symbol 'A' is listed twice"),
        ("<s> 1\n", r"dict\.ltr\.txt:1: fairseq adds '<s>' itself"),
        ("", "holds no symbol"),
    ],
)
def test_malformed_dictionary_is_refused(manifest_folder, text, message):
    (manifest_folder / "dict.ltr.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dictionary(manifest_folder / "dict.ltr.txt")


def test_localise_makes_the_root_absolute(manifest_folder, tmp_path):
    audio = manifest_folder.parent / "audio"
    for name in ("train.tsv", "train.ltr", "train.wrd", "dict.ltr.txt"):
        (manifest_folder / name).rename(audio / name)
    replace_line(audio / "train.tsv", 1, ".")
    assert localise_manifest(audio, tmp_path / "out") == ["train"]
    assert read_manifest(tmp_path / "out" / "train.tsv").root == str(audio)
    validate_split(tmp_path / "out", "train", "ltr")
    assert (tmp_path / "out" / "train.wrd").read_text() == (audio / "train.wrd").read_text()


def test_localise_refuses_to_overwrite(manifest_folder, tmp_path):
    localise_manifest(manifest_folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"train\.tsv: exists already; .*--force"):
        localise_manifest(manifest_folder, tmp_path / "out")
    localise_manifest(manifest_folder, tmp_path / "out", force=True)


def test_localise_refuses_its_own_folder(manifest_folder):
    with pytest.raises(ValueError, match="the same folder"):
        localise_manifest(manifest_folder, manifest_folder, force=True)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no manifest"):
        list_splits(tmp_path)


def test_shared_digits_are_localised_and_valid(shared_data, tmp_path):
    splits = localise_manifest(shared_data / "digits", tmp_path / "digits")
    assert splits == ["test", "train", "valid"]
    for split in splits:
        validate_split(tmp_path / "digits", split, "ltr")


@pytest.mark.parametrize("root", ["audio", None])
def test_audio_paths_of_a_split(tmp_path, root):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").write_text("")
    (tmp_path / "test.tsv").write_text(f"{root or tmp_path / 'audio'}\na.wav\t800\nb.wav\t900\n")
    assert audio_paths(tmp_path, "test") == [tmp_path / "audio" / name for name in ("a.wav", "b.wav")]
    with pytest.raises(FileNotFoundError, match="valid.tsv: no such split; .* has: test; name one with --split"):
        audio_paths(tmp_path, "valid")


def test_audio_paths_of_zip_files_are_refused(tmp_path):
    (tmp_path / "test.tsv").write_text("/nowhere\na.zip:10:20\t800\n")
    with pytest.raises(ValueError, match="test.tsv:2: a.zip:10:20 is a part of a zip file"):
        audio_paths(tmp_path, "test")
