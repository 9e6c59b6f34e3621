"""References and hypotheses in the forms that people have, and which belongs to which."""

import json

import pytest

from fairseq_w2v2_light.data.references import pair, read_hypotheses, read_references


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    """A manifest folder whose root is relative, with letters only, and sentencepieces of another split."""
    folder = tmp_path / "data"
    write(folder / "test.tsv", ".", "a/one.flac\t16000", "b/two.flac\t16000", "b/three.flac\t9000")
    write(folder / "test.ltr", "S O | I |", "I T ' S |", "|")
    write(folder / "dict.ltr.txt", "| 4")
    write(folder / "valid.tsv", "/elsewhere", "x.wav\t400")
    write(folder / "valid.spm", "▁SO ▁I T")
    write(folder / "dev.tsv", "/elsewhere", "x.wav\t400")
    (folder / "a").mkdir()
    (folder / "a" / "one.flac").write_bytes(b"")
    return folder


def texts(references):
    return [reference.text for reference in references]


def test_a_manifest_folder(data):
    references = read_references(data)
    assert texts(references) == ["SO I", "IT'S", ""]
    assert [reference.name for reference in references] == ["a/one.flac", "b/two.flac", "b/three.flac"]
    assert references[0].path == data / "a/one.flac" and references[1].where == f"{data / 'test.tsv'}:3"
    assert texts(read_references(data, "valid")) == ["SO IT"]
    assert read_references(data / "test.tsv") == references
    assert read_references(data / "valid.tsv")[0].path.as_posix() == "/elsewhere/x.wav"


def test_transcripts_come_before_labels(data):
    write(data / "test.wrd", "so i", "it's", "oh")
    assert texts(read_references(data)) == ["so i", "it's", "oh"]


def test_labels_of_any_name_are_found_by_their_dictionary(data):
    write(data / "dict.phn.txt", "ah 1")
    write(data / "dev.phn", "hh ah")
    assert texts(read_references(data, "dev")) == ["hh ah"]


@pytest.mark.parametrize(
    "name, lines, split, message",
    [
        ("test.ltr", ["A |"], "", "test.tsv: lists 3 utterances, but its transcripts have 1 lines"),
        ("test.tsv", ["."], "", "test.tsv: split 'test' is empty"),
        ("test.tsv", [".", "x.wav"], "", "test.tsv:2: found 'x.wav'"),
        ("test.tsv", [".", "a\t1", "b\t1", "x.zip:7:9\t400"], "", "test.tsv:4: x.zip:7:9 is a part of a zip file"),
        ("other.tsv", ["."], "train", "no such split; .* has: dev, other, test, valid; name one with --split"),
        ("other.tsv", ["."], "dev", "split 'dev' has no transcripts; expected dev.wrd or dev.ltr"),
    ],
)
def test_broken_manifests_are_named(data, name, lines, split, message):
    write(data / name, *lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_references(data, split)


def test_tables(tmp_path):
    table = write(tmp_path / "t.csv", "file,said,split", "x/a.wav,Yes,dev", 'y/b.wav,"no, thanks",test')
    references = read_references(table, columns={"path": "file", "text": "said"})
    assert texts(references) == ["Yes", "no, thanks"]
    assert (references[1].name, references[1].path, references[1].where) == (
        "y/b.wav",
        tmp_path / "y/b.wav",
        f"{table}:3",
    )
    assert texts(read_references(table, "valid", {"path": "file", "text": "said"})) == ["Yes"]
    with pytest.raises(ValueError, match="--split train: .* has: test, valid"):
        read_references(table, "train", {"path": "file", "text": "said"})
    assert texts(read_references(write(tmp_path / "t.tsv", "path\ttext", "a.wav\tyes"))) == ["yes"]
    line = json.dumps({"path": "/a.wav", "text": "yes"})
    assert read_references(write(tmp_path / "t.jsonl", line))[0].path.as_posix() == "/a.wav"


def test_other_references_are_named(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="absent: no such references; expected a manifest folder, a table"):
        read_references(tmp_path / "absent")
    with pytest.raises(ValueError, match="--split test: .* is a file of text, which has no splits"):
        read_references(write(tmp_path / "r.txt", "yes"), "test")
    with pytest.raises(ValueError, match="--split valid: .* is the manifest of split 'test'"):
        read_references(data / "test.tsv", "valid")


@pytest.mark.parametrize(
    "lines, ids, expected",
    [
        (["yes", "", " no  way "], "auto", [("", "yes"), ("", ""), ("", " no  way ")]),
        (
            ["1089-1-0 yes", "1089-1-1", "", "u2\tno way"],
            "auto",
            [("1089-1-0", "yes"), ("1089-1-1", ""), ("u2", "no way")],
        ),
        (["yes (None-12)", "(None-3)"], "auto", [("None-12", "yes"), ("None-3", "")]),
        (["ONE TWO", "ONE", "2 3"], "auto", [("", "ONE TWO"), ("", "ONE"), ("", "2 3")]),
        (["u1 yes", "u1 no"], "auto", [("", "u1 yes"), ("", "u1 no")]),  # no two utterances have one id
        (["one yes", "two no"], "first", [("one", "yes"), ("two", "no")]),
        (["u1 yes", "u2 no"], "none", [("", "u1 yes"), ("", "u2 no")]),
        (["u1 yes (sir)", "u2 (a b)"], "auto", [("u1", "yes (sir)"), ("u2", "(a b)")]),
    ],
)
def test_lines_and_their_ids(tmp_path, lines, ids, expected):
    found = read_hypotheses(write(tmp_path / "h.txt", *lines), ids=ids)
    assert [(line.name, line.text) for line in found] == expected


@pytest.mark.parametrize(
    "lines, ids, message",
    [
        (["yes (u1)", "no"], "last", "h.txt:2: found 'no', expected `TEXT .ID.`"),
        (["u1 yes", "u1 no"], "first", "h.txt:2: id 'u1' is that of .*h.txt:1, too"),
        ([], "auto", "h.txt: the file is empty"),
        (["", " "], "first", "h.txt: holds no utterance"),
        (["a"], "middle", "--ids middle: expected one of auto"),
    ],
)
def test_broken_lines_are_named(tmp_path, lines, ids, message):
    with pytest.raises(ValueError, match=message):
        read_hypotheses(write(tmp_path / "h.txt", *lines), ids=ids)


def test_text_files_of_other_kinds(tmp_path):
    (tmp_path / "latin").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin: not a UTF-8 text file"):
        read_hypotheses(tmp_path / "latin")
    (tmp_path / "bom").write_bytes("\ufeffschön\r\n".encode())
    assert read_hypotheses(tmp_path / "bom")[0].text.split() == ["schön"]
    with pytest.raises(FileNotFoundError, match="absent: no such file of hypotheses"):
        read_hypotheses(tmp_path / "absent")


def test_json_lines(tmp_path):
    rows = [{"id": "a", "text": "yes", "words": []}, {"id": 2, "text": ""}]
    path = write(tmp_path / "h.jsonl", *map(json.dumps, rows), "")
    assert [line[:2] for line in read_hypotheses(path)] == [("a", "yes"), ("2", "")]
    assert [line.name for line in read_hypotheses(path, ids="none")] == ["", ""]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "h.jsonl:1: not a JSON object"),
        ("[1]", "found list"),
        ('{"id": "a"}', "h.jsonl:1: has no text"),
        ("", "holds no"),
    ],
)
def test_broken_json_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_hypotheses(write(tmp_path / "h.jsonl", line))


def paired(tmp_path, references, hypotheses, ids="auto"):
    source = references if references.__class__ is not list else write(tmp_path / "r.txt", *references)
    path = write(tmp_path / "h.txt", *hypotheses)
    return pair(read_references(source, ids=ids), read_hypotheses(path, ids=ids))


def test_lines_are_paired_by_place_or_by_id(tmp_path):
    assert paired(tmp_path, ["a", "b b"], ["x", ""]) == ["x", ""]
    assert paired(tmp_path, ["u-1 a", "u-2 b"], ["u-2 y", "u-1 x"]) == ["x", "y"]
    assert paired(tmp_path, ["a (u1)", "b (u2)"], ["u2 y", "u1 x"]) == ["x", "y"]


@pytest.mark.parametrize("names", [["b/two.flac", "a/one.flac"], ["two", "a/one"], ["None-1", "None-0"]])
def test_a_manifest_goes_by_its_paths(tmp_path, data, names):
    write(data / "test.tsv", ".", "a/one.flac\t16000", "b/two.flac\t16000")
    write(data / "test.ltr", "A |", "B |")
    assert paired(tmp_path, data, [f"y ({names[0]})", f"x ({names[1]})"]) == ["x", "y"]
    assert paired(tmp_path, data, ["x", "y"]) == ["x", "y"]


def test_a_name_that_several_files_have_means_none(tmp_path, data):
    write(data / "test.tsv", ".", "a/one.flac\t16000", "b/one.flac\t16000")
    write(data / "test.ltr", "A |", "B |")
    assert paired(tmp_path, data, ["y (b/one)", "x (a/one)"]) == ["x", "y"]
    with pytest.raises(ValueError, match="id 'one' is that of no reference"):
        paired(tmp_path, data, ["y (one)", "x (a/one)"])


@pytest.mark.parametrize(
    "references, hypotheses, message",
    [
        (["a", "b"], ["x"], "1 hypotheses for 2 references: line n of the one belongs"),
        (["a"], ["x", "y"], "2 hypotheses for 1 references"),
        (["u-1 a", "u-2 b"], ["u-1 x"], "1 hypotheses for 2 references: 'u-2' .*r.txt:2. has none"),
        (["u-1 a"], ["u-1 x", "u-2 y"], "h.txt:2: id 'u-2' is that of no reference"),
        (["a", "b"], ["u-1 x", "u-2 y"], "h.txt:1 has an id, 'u-1', but .*r.txt:1 has none; give both ids"),
        (["u-1 a", "u-2 b"], ["x", "y"], "r.txt:1 has an id, 'u-1', but .*h.txt:1 has none"),
    ],
)
def test_as_many_hypotheses_as_references(tmp_path, references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        paired(tmp_path, references, hypotheses)


def test_two_names_of_one_utterance(tmp_path, data):
    with pytest.raises(ValueError, match="h.txt:2: 'one' is the utterance of .*h.txt:1 again"):
        paired(tmp_path, data, ["x (a/one)", "y (one)", "z (two)"])
