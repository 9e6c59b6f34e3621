"""Where utterances come from: a LibriSpeech tree, a table, a folder. Nothing here opens an audio file."""

import csv
import json
import random
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import soundfile

from fairseq_w2v2_light.files import read_utf8

SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
# What data sets call their splits, and what fairseq's recipes call them.
SPLIT_ALIASES = {"dev": "valid", "val": "valid", "validation": "valid", "eval": "test"}
VALID_SUBSETS = ("dev-clean", "dev-clean-2", "dev-other")
TEST_SUBSETS = ("test-clean", "test-other")
DEFAULT_COLUMNS = {name: name for name in ("path", "text", "speaker", "split")}


class Utterance(NamedTuple):
    """One utterance to be prepared. `text` is None for unlabelled audio; `where` says what named it (file:line)."""

    path: Path
    text: Optional[str] = None
    speaker: str = ""
    split: str = ""
    where: str = ""


def _audio_suffixes() -> Tuple[str, ...]:
    formats = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"}
    return tuple(sorted(formats | {".opus", ".oga", ".aif"}))


def read_audio_folder(folder: Path, suffixes: Sequence[str] = ()) -> List[Utterance]:
    """Every audio file under `folder`, sorted; `suffixes` (".wav", ...) restricts them, default: what libsndfile reads.

    Raises FileNotFoundError when there is no such folder and ValueError when it holds no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of audio")
    suffixes = tuple(f".{suffix.lstrip('.').lower()}" for suffix in suffixes) or _audio_suffixes()
    # A link that leads nowhere is kept, to be reported as a missing file.
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.is_dir())
    if not paths:
        raise ValueError(f"{folder}: holds no audio file; looked for {', '.join(suffixes)} in it and below")
    return [Utterance(path, where=str(path)) for path in paths]


def _librispeech_defaults(tree: Path) -> Dict[str, List[str]]:
    present = {path.name for path in tree.iterdir() if path.is_dir()}
    found = {
        "train": sorted(name for name in present if name.startswith("train-")),
        "valid": [name for name in VALID_SUBSETS if name in present][:1],
        "test": [name for name in TEST_SUBSETS if name in present][:1],
    }
    return {split: subsets for split, subsets in found.items() if subsets}


def _read_transcripts(path: Path) -> Iterator[Tuple[int, str, str]]:
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        name, _, text = line.strip().partition(" ")
        if name:
            yield number, name, text


def read_librispeech(tree: Path, subsets: Optional[Dict[str, List[str]]] = None) -> Dict[str, List[Utterance]]:
    """Utterances of a LibriSpeech tree (`SUBSET/SPEAKER/CHAPTER/*.trans.txt` beside `.flac` or `.wav`), by split.

    `subsets` maps a split to folders of `tree`. A split left out takes what exists: train: every train-*; valid: the
    first of dev-clean, dev-clean-2, dev-other; test: the first of test-clean, test-other; a split given as [] is not
    made. Audio without a transcript is returned with the text "". Raises FileNotFoundError for a missing tree or
    subset and ValueError for a subset without transcripts or one that is asked for twice.
    """
    if not tree.is_dir():
        raise FileNotFoundError(f"{tree}: no such LibriSpeech tree")
    chosen = {**_librispeech_defaults(tree), **(subsets or {})}
    chosen = {split: names for split, names in chosen.items() if names}
    if not chosen.get("train"):
        raise ValueError(f"{tree}: holds no folder train-*; name the training subsets with --train")
    used: Dict[str, str] = {}
    for split, names in chosen.items():
        for name in names:
            if name in used:
                raise ValueError(f"subset {name!r} is asked for twice: for split {used[name]!r} and for {split!r}")
            used[name] = split
    return {split: [u for name in names for u in _read_subset(tree, name, split)] for split, names in chosen.items()}


def _read_subset(tree: Path, name: str, split: str) -> List[Utterance]:
    folder = tree / name
    if not folder.is_dir():
        present = ", ".join(sorted(path.name for path in tree.iterdir() if path.is_dir())) or "no folder"
        raise FileNotFoundError(f"{folder}: no such subset (for split {split!r}); {tree} holds {present}")
    utterances, spoken = [], set()
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        for number, stem, text in _read_transcripts(transcripts):
            path = transcripts.parent / f"{stem}.flac"
            if not path.exists() and path.with_suffix(".wav").exists():
                path = path.with_suffix(".wav")
            spoken.add(path)
            utterances.append(Utterance(path, text, stem.split("-")[0], split, f"{transcripts}:{number}"))
    if not utterances:
        raise ValueError(f"{folder}: holds no *.trans.txt; is it a LibriSpeech subset?")
    silent = sorted(path for suffix in ("flac", "wav") for path in folder.rglob(f"*.{suffix}") if path not in spoken)
    return utterances + [Utterance(path, "", path.stem.split("-")[0], split, str(path)) for path in silent]


def _csv_rows(path: Path, delimiter: str) -> Iterator[Tuple[int, Dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        # Tab-separated files are written without quoting by most tools; a lone quote must not swallow lines.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise ValueError(f"{path}:1: found no header; expected column names such as path{delimiter}text")
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(values)} values for {len(header)} columns ({', '.join(header)}); "
                    "a text that holds the delimiter must be quoted (CSV only)"
                )
            yield reader.line_num, dict(zip(header, values))


def _jsonl_rows(path: Path) -> Iterator[Tuple[int, Dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: found {type(row).__name__}; expected one JSON object per line")
        yield number, {key: _as_text(value) for key, value in row.items()}


def _as_text(value: Any) -> Any:
    """A JSON value as a cell of a table: a text, but for lists and objects, which are none."""
    if isinstance(value, (list, dict)):
        return value
    return "" if value is None else str(value)


def _cell(row: Dict[str, Any], column: str, where: str) -> str:
    """The text in a column of a row; raises ValueError for a list or an object, whose brackets would become labels."""
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds a {type(value).__name__}, {value!r:.60}; expected a text")
    return value


def _table_rows(path: Path) -> Iterator[Tuple[int, Dict[str, Any]]]:
    kind = path.suffix.lower()
    if kind == ".csv":
        return _csv_rows(path, ",")
    if kind == ".tsv":
        return _csv_rows(path, "\t")
    if kind in (".jsonl", ".json", ".ndjson"):
        return _jsonl_rows(path)
    raise ValueError(f"{path}: a table is .csv, .tsv or .jsonl, found {path.suffix or 'no suffix'!r}")


def read_table(path: Path, columns: Optional[Dict[str, str]] = None) -> List[Utterance]:
    """Utterances of a CSV, TSV (unquoted) or JSON-lines table with columns path, text and, if wanted, speaker, split.

    `columns` maps these names to the table's own. Relative paths start from the table's folder. Split names are those
    of the table, with dev, val and validation read as valid and eval as test; a table without that column gives "".
    Raises FileNotFoundError when it is missing and ValueError, naming file and line, for a malformed table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    unknown = sorted(set(columns or {}) - set(DEFAULT_COLUMNS))
    if unknown:
        raise ValueError(f"--columns {unknown[0]}=...: expected one of {', '.join(DEFAULT_COLUMNS)}")
    names = {**DEFAULT_COLUMNS, **(columns or {})}
    utterances: List[Utterance] = []
    try:
        for number, row in _table_rows(path):
            where = f"{path}:{number}"
            for key in ["path", "text", *(columns or {})]:
                if names[key] not in row:
                    raise ValueError(
                        f"{where}: no column {names[key]!r}, found {', '.join(row)}; name it with --columns {key}=NAME"
                        + (", and for audio without text use `prepare audio`" if key == "text" else "")
                    )
            split = _split_name(str(row.get(names["split"], "")).strip(), where)
            if utterances and bool(split) != bool(utterances[0].split):
                raise ValueError(f"{where}: column {names['split']!r} is filled in some rows only; fill all or none")
            speaker = str(row.get(names["speaker"], "")).strip()
            audio, text = (_cell(row, names[key], where) for key in ("path", "text"))
            utterances.append(Utterance(path.parent / audio.strip(), text, speaker, split, where))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a UTF-8 text table: {error}") from None
    if not utterances:
        raise ValueError(f"{path}: the table holds no utterance")
    return utterances


def parse_columns(given: str) -> Dict[str, str]:
    """The `columns` of `read_table` that `path=A,text=B` names; raises ValueError for another form."""
    columns = {}
    for item in filter(None, given.split(",")):
        name, _, column = item.partition("=")
        if not column:
            raise ValueError(f"--columns {item}: expected NAME=COLUMN, for example text=sentence")
        columns[name.strip()] = column.strip()
    return columns


def _split_name(name: str, where: str) -> str:
    if name and not SPLIT_NAME.fullmatch(name):
        raise ValueError(f"{where}: split {name!r}: expected letters, digits, '-' and '_'")
    return SPLIT_ALIASES.get(name.lower(), name)


def _shares(total: int, fractions: Dict[str, float], unit: str) -> Dict[str, int]:
    for split, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(
                f"--{split}-percent {fraction}: a fraction as in fairseq, expected 0 <= F < 1 (0.05 for 5 %)"
            )
    if sum(fractions.values()) >= 1:
        raise ValueError(f"the fractions {fractions} leave nothing to train on; expected a sum below 1")
    shares = {split: max(1, round(total * fraction)) for split, fraction in fractions.items() if fraction > 0}
    if sum(shares.values()) >= total:
        wanted = ", ".join(["train", *shares])
        raise ValueError(
            f"{total} usable {unit} cannot be divided into {wanted}; set --valid-percent or --test-percent to 0"
        )
    return shares


def divide(
    utterances: List[Utterance], fractions: Dict[str, float], seed: int, by_speaker: bool = False
) -> Dict[str, List[Utterance]]:
    """Divides utterances at random (seeded) into train and the splits of `fractions` (split -> fraction in [0, 1)).

    A fraction above 0 gives at least one utterance. `by_speaker` keeps each speaker in one split: speakers are drawn
    until a split has its share of utterances. Order within a split is kept. Raises ValueError when there are too few
    utterances or speakers.
    """
    chance = random.Random(seed)
    if not by_speaker:
        shares = _shares(len(utterances), fractions, "utterances")
        groups = [[index] for index in range(len(utterances))]
    else:
        speakers: Dict[str, List[int]] = {}
        for index, utterance in enumerate(utterances):
            if not utterance.speaker:
                raise ValueError(f"{utterance.where}: no speaker; --speaker-disjoint needs one for every utterance")
            speakers.setdefault(utterance.speaker, []).append(index)
        _shares(len(speakers), fractions, "speakers")
        shares = _shares(len(utterances), fractions, "utterances")
        groups = [speakers[name] for name in sorted(speakers)]
    chance.shuffle(groups)
    members: Dict[str, List[int]] = {"train": []}
    for split, share in shares.items():
        members[split] = []
        # The last groups are spared: later splits, and training, need one each.
        spare = len(shares) + 1 - len([name for name in members if name != "train"])
        while len(members[split]) < share and len(groups) > spare:
            members[split] += groups.pop()
    members["train"] = [index for group in groups for index in group]
    return {split: [utterances[index] for index in sorted(indices)] for split, indices in members.items()}
