"""What was said and what was recognised: references and hypotheses, in the forms that people have. Without fairseq.

References: a manifest folder (a split of it, or its .tsv file), a table with columns path and text, or lines of text.
Hypotheses: lines of text, a table, or JSON lines. Lines are texts alone, in the order of the references, or have ids:
`ID TEXT` (Kaldi, LibriSpeech) or `TEXT (ID)` (sclite's trn, fairseq's infer).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..files import read_utf8
from ..runtime.text import Labels
from . import manifest
from .sources import read_table

IDS = ("auto", "none", "first", "last")
DEFAULT_SPLIT = "test"
_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson")
_JSON = (".jsonl", ".json", ".ndjson")
# by preference: transcripts as they stand, then labels that spell them
_LABELS = ("wrd", "ltr", "spm")
_LAST = re.compile(r"(.*?)\s*\(([^()\s]+)\)\s*")
# what a JSON line may call the id of its utterance, and its text
_ID_KEYS = ("id", "utterance_id", "path", "audio_filepath", "audio", "file", "source", "name")
_TEXT_KEYS = ("text", "hypothesis", "pred_text")


class Reference(NamedTuple):
    """One utterance and what is said in it.

    name: as its source has it: a path, an id, or the number of the line. path: of the audio, None of a text. where:
    what named it (file:line). named: whether `name` is of the utterance itself.
    """

    name: str
    text: str
    path: Optional[Path]
    where: str
    named: bool = True


class Hypothesis(NamedTuple):
    """One recognised text; `name` is "" where only its place says whose it is."""

    name: str
    text: str
    where: str


def read_references(
    source: Path, split: str = "", columns: Optional[Dict[str, str]] = None, ids: str = "auto"
) -> List[Reference]:
    """References of a manifest folder, a manifest, a table or a file of text, by what `source` is.

    split: of a folder (default: test), or of a table with such a column (default: all). columns: names of a table's.
    ids: of lines of text, see `read_lines`. Raises FileNotFoundError when a file is missing; ValueError that names
    file and line when one is malformed, and where there is no utterance.
    """
    source = Path(source)
    if source.is_dir():
        return _manifest_references(source, split or DEFAULT_SPLIT)
    if not source.is_file():
        raise FileNotFoundError(
            f"{source}: no such references; expected a manifest folder, a table (.csv, .tsv, .jsonl) or a text file"
        )
    if _is_manifest(source):
        if split and split != source.stem:
            raise ValueError(
                f"--split {split}: {source} is the manifest of split {source.stem!r}; leave one of them out"
            )
        return _manifest_references(source.parent, source.stem)
    if source.suffix.lower() in _TABLES:
        return _table_references(source, split, columns)
    if split:
        raise ValueError(f"--split {split}: {source} is a file of text, which has no splits; leave --split out")
    lines = read_lines(source, ids)
    return [
        Reference(line.name or str(number), line.text, None, line.where, bool(line.name))
        for number, line in enumerate(lines, start=1)
    ]


def read_hypotheses(path: Path, columns: Optional[Dict[str, str]] = None, ids: str = "auto") -> List[Hypothesis]:
    """Hypotheses of a file of text, JSON lines or a table; raises as `read_references` does.

    ids: of lines, see `read_lines`; "none" also leaves out those of JSON lines and tables.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of hypotheses; expected lines of text, JSON lines or a table")
    if path.suffix.lower() in _JSON:
        found = _json_hypotheses(path)
    elif path.suffix.lower() in _TABLES:
        found = [Hypothesis(row.name, row.text, row.where) for row in _table_references(path, "", columns)]
    else:
        return read_lines(path, ids)
    return [hypothesis._replace(name="") for hypothesis in found] if ids == "none" else found


def read_lines(path: Path, ids: str = "auto") -> List[Hypothesis]:
    """The lines of a text file, with their ids.

    ids: "none": a line is a text; "first": `ID TEXT`; "last": `TEXT (ID)`; "auto": "last" where all lines have that
    form, "first" where the first word of every line has a digit and a letter or one of `-_./`, and no two lines have
    the same id, else "none". Lines without anything are texts, too, but where lines have ids they are skipped. Raises
    ValueError for an id that is missing or there twice.
    """
    if ids not in IDS:
        raise ValueError(f"--ids {ids}: expected one of {', '.join(IDS)}")
    lines = read_utf8(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; expected a line for each utterance")
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    if ids == "auto":
        given = [line for line in lines if line.strip()]
        ids = next((form for form in ("last", "first") if _have_ids(given, form)), "none")
    if ids == "none":
        return [Hypothesis("", line, where) for where, line in numbered]
    found, seen = [], {}
    for where, line in numbered:
        if not line.strip():
            continue
        name, text = _divide(line, ids)
        if not name:
            raise ValueError(f"{where}: found {line.strip()[:60]!r}, expected `TEXT (ID)`; or give another --ids")
        if name in seen:
            raise ValueError(f"{where}: id {name!r} is that of {seen[name]}, too; or give --ids none")
        seen[name] = where
        found.append(Hypothesis(name, text, where))
    if not found:
        raise ValueError(f"{path}: holds no utterance; expected a line for each")
    return found


def pair(references: Sequence[Reference], hypotheses: Sequence[Hypothesis]) -> List[str]:
    """The hypothesis of each reference: by id where the hypotheses have ids that are known, else by its place.

    A reference in a manifest or a table goes by its path, the path without suffix, and the file's name without suffix
    where no other has it; one in a manifest also by `None-INDEX`, which fairseq's infer writes. Raises ValueError
    unless each reference has exactly one hypothesis.
    """
    by_id = all(hypothesis.name for hypothesis in hypotheses)
    lines = references[0].path is None
    if (by_id and not references[0].named) or (not by_id and lines and references[0].named):
        one, other = (hypotheses[0], references[0]) if by_id else (references[0], hypotheses[0])
        raise ValueError(
            f"{one.where} has an id, {one.name!r}, but {other.where} has none; give both ids, or --ids none to compare "
            "line by line"
        )
    if not by_id:
        if len(references) != len(hypotheses):
            raise ValueError(
                f"{len(hypotheses)} hypotheses for {len(references)} references: line n of the one belongs to "
                "utterance n of the other; write an empty line where nothing was recognised, or give both ids"
            )
        return [hypothesis.text for hypothesis in hypotheses]
    owners = _owners(references)
    texts: Dict[int, Hypothesis] = {}
    for hypothesis in hypotheses:
        owner = owners.get(hypothesis.name)
        if owner is None:
            raise ValueError(
                f"{hypothesis.where}: id {hypothesis.name!r} is that of no reference; remove it, or give --ids none if "
                "it is no id"
            )
        if owner in texts:
            raise ValueError(
                f"{hypothesis.where}: {hypothesis.name!r} is the utterance of {texts[owner].where} again; remove one"
            )
        texts[owner] = hypothesis
    missing = [reference for index, reference in enumerate(references) if index not in texts]
    if missing:
        raise ValueError(
            f"{len(hypotheses)} hypotheses for {len(references)} references: {missing[0].name!r} ({missing[0].where}) "
            "has none; write its id alone where nothing was recognised"
        )
    return [texts[index].text for index in range(len(references))]


def _owners(references: Sequence[Reference]) -> Dict[str, int]:
    """The index of the reference that each name means; names that mean several are left out."""
    forms: List[Callable[[int, Reference], str]] = [
        lambda index, reference: reference.name,
        lambda index, reference: str(reference.path),
        lambda index, reference: os.path.splitext(reference.name)[0],
        lambda index, reference: os.path.splitext(os.path.basename(reference.name))[0],
        lambda index, reference: f"None-{index}",
    ]
    owners: Dict[str, int] = {}
    for form in forms if references[0].path is not None else forms[:1]:
        names: Dict[str, List[int]] = {}
        for index, reference in enumerate(references):
            names.setdefault(form(index, reference), []).append(index)
        for name, indices in names.items():
            if len(indices) == 1:
                owners.setdefault(name, indices[0])
    return owners


def _divide(line: str, form: str) -> Tuple[str, str]:
    """Id and text of a line, whose id is "" where it has none."""
    if form == "last":
        match = _LAST.fullmatch(line)
        return (match.group(2), match.group(1)) if match else ("", line)
    name, _, text = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
    return name, text


def _have_ids(lines: Sequence[str], form: str) -> bool:
    names = [_divide(line, form)[0] for line in lines]
    if form == "first" and not all(map(_looks_like_an_id, names)):
        return False
    return bool(names) and all(names) and len(set(names)) == len(names)


def _looks_like_an_id(name: str) -> bool:
    return any(char.isdigit() for char in name) and any(char.isalpha() or char in "-_./" for char in name)


def _is_manifest(path: Path) -> bool:
    """Whether a .tsv file is fairseq's: its first line is a folder, without a tab."""
    if path.suffix.lower() != ".tsv":
        return False
    with open(path, "rb") as file:
        return b"\t" not in file.readline(1 << 16)


def _manifest_references(folder: Path, split: str) -> List[Reference]:
    tsv = folder / f"{split}.tsv"
    listed = manifest.listed_audio(folder, split)
    texts = _transcripts(folder, split)
    if len(texts) != len(listed):
        raise ValueError(
            f"{tsv}: lists {len(listed)} utterances, but its transcripts have {len(texts)} lines; line n of "
            "these belongs to line n + 1 of the manifest; prepare the folder again"
        )
    return [
        Reference(entry.path, text, path, f"{tsv}:{number}")
        for number, ((entry, path), text) in enumerate(zip(listed, texts), start=2)
    ]


def _transcripts(folder: Path, split: str) -> List[str]:
    suffixes = [*_LABELS, *manifest.list_label_suffixes(folder)]
    suffix = next((suffix for suffix in suffixes if (folder / f"{split}.{suffix}").is_file()), None)
    if suffix is None:
        raise FileNotFoundError(
            f"{folder}: split {split!r} has no transcripts; expected {split}.wrd or {split}.ltr beside {split}.tsv"
        )
    lines = manifest.read_labels(folder / f"{split}.{suffix}")
    if suffix == "wrd":
        return lines
    symbols = ["<s>", *sorted({symbol for line in lines for symbol in line.split()} - {"<s>"})]
    labels, index = Labels(symbols), {symbol: number for number, symbol in enumerate(symbols)}
    return [labels.text(index[symbol] for symbol in line.split()) for line in lines]


def _table_references(path: Path, split: str, columns: Optional[Dict[str, str]]) -> List[Reference]:
    utterances = read_table(path, columns)
    if split:
        present = sorted({utterance.split for utterance in utterances} - {""})
        utterances = [utterance for utterance in utterances if utterance.split == split]
        if not utterances:
            has = f"has: {', '.join(present)}" if present else "has no column of splits"
            raise ValueError(f"--split {split}: {path} {has}; name one of these, or leave --split out")
    return [
        Reference(os.path.relpath(utterance.path, path.parent), utterance.text or "", utterance.path, utterance.where)
        for utterance in utterances
    ]


def _json_hypotheses(path: Path) -> List[Hypothesis]:
    found = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: found {type(row).__name__}; expected one JSON object per line")
        text = next((row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise ValueError(f"{path}:{number}: has no text; expected the key {' or '.join(_TEXT_KEYS)}")
        name = next((str(row[key]) for key in _ID_KEYS if isinstance(row.get(key), (str, int))), "")
        found.append(Hypothesis(name, text, f"{path}:{number}"))
    if not found:
        raise ValueError(f"{path}: holds no utterance; expected a JSON object for each")
    return found
