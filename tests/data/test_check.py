from fairseq_w2v2_light.data.check import check_folder, ctc_frames


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def problems(folder, **options):
    return [problem for report in check_folder(folder, **options) for problem in report.problems]


def test_a_sound_folder_has_no_problem(manifest_folder):
    [report] = check_folder(manifest_folder, deep=True)
    assert (report.problems, report.notes) == ([], [])
    expected = "train: 3 utterances, 0.001 hours, min/median/max 1.00 / 1.25 / 1.50 s, 9 ltr symbols (3 different)"
    assert report.line() == expected


def test_all_problems_are_listed_with_their_places(manifest_folder, tone):
    audio = manifest_folder.parent / "audio"
    tone(audio / "0.flac", rate=8000)
    (audio / "1.flac").unlink()
    replace_line(manifest_folder / "train.tsv", 4, "2.flac\t9")
    replace_line(manifest_folder / "train.ltr", 2, "Q |")
    (manifest_folder / "train.wrd").write_text("AB\n")
    found = problems(manifest_folder)
    expected = [
        "train.tsv:2: ... wrong sample rate: 8000 Hz, expected 16000 Hz",
        "train.tsv:3: ... missing file: no such file",
        "train.tsv:4: ... has 24000 samples, the manifest says 9; prepare the folder again",
        "train.ltr:2: symbol 'Q' is not in",
        "train.wrd: 1 lines, but the manifest lists 3 utterances",
    ]
    assert len(found) == len(expected)
    for problem, text in zip(found, expected):
        assert all(part in problem for part in text.split(" ... "))


def test_nan_samples_are_a_problem(manifest_folder, nan_wave):
    nan_wave(manifest_folder.parent / "audio" / "0.wav")
    replace_line(manifest_folder / "train.tsv", 2, "0.wav\t8000")
    assert any("NaN samples: 1 samples are NaN or infinite" in problem for problem in problems(manifest_folder))


def test_stereo_and_short_audio_are_problems(manifest_folder, tone):
    tone(manifest_folder.parent / "audio" / "0.flac", channels=2, seconds=1)
    tone(manifest_folder.parent / "audio" / "1.flac", seconds=0.01)
    found = problems(manifest_folder)
    assert "not mono: 2 channels, expected 1" in found[0]
    assert "too short: 160 samples, expected at least 400" in found[1]


def test_truncated_audio_is_found_by_a_deep_check(manifest_folder):
    audio = manifest_folder.parent / "audio" / "0.flac"
    audio.write_bytes(audio.read_bytes()[: audio.stat().st_size // 2])
    assert not problems(manifest_folder)
    assert "not audio" in problems(manifest_folder, deep=True)[0]


def test_an_empty_split_and_missing_labels_are_problems(manifest_folder):
    (manifest_folder / "test.tsv").write_text("/\n")
    (manifest_folder / "train.ltr").unlink()
    found = problems(manifest_folder)
    assert "split 'test' is empty" in found[0]
    assert "train.ltr: no such file, though there is dict.ltr.txt" in found[1]


def test_a_relative_root_is_a_problem(manifest_folder, monkeypatch):
    replace_line(manifest_folder / "train.tsv", 1, ".")
    monkeypatch.chdir(manifest_folder.parent / "audio")
    [problem] = problems(manifest_folder)
    assert "train.tsv:1: the root directory '.' is relative" in problem and "prepare manifest" in problem


def test_repeated_files_and_too_many_labels_are_noted(manifest_folder):
    replace_line(manifest_folder / "train.tsv", 3, "0.flac\t16000")
    replace_line(manifest_folder / "train.ltr", 1, " ".join("A" * 30 + "|"))
    [report] = check_folder(manifest_folder)
    assert report.problems == []
    assert "train.ltr:1: the line has more labels than frames of 20 ms" in report.notes[0]
    assert "lists 0.flac more than once" in report.notes[1]


def test_ctc_needs_a_blank_between_equal_labels():
    assert ctc_frames("A B B B C".split()) == 7
