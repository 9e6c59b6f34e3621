"""fairseq's manifest folder: `{split}.tsv`, `{split}.{labels}`, `dict.{labels}.txt`; reading and verifying it.

A manifest's first line is the root directory, every other line `relative path<TAB>frames`. Labels are one line per
utterance, symbols separated by blanks. A dictionary is `symbol count`, one a line, most frequent first.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Container, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import soundfile

from fairseq_w2v2_light.files import atomic_path, atomic_write_text, read_utf8
from fairseq_w2v2_light.runtime.audio import UNREADABLE

SAMPLE_RATE = 16000
# Samples that stock wav2vec 2.0's frontend needs for one frame.
RECEPTIVE_FIELD = 400
# Symbols that fairseq adds itself: a dictionary file that repeats one cannot be loaded.
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
_WITHOUT_IT = "take its line out of the manifest (and that of the labels), or prepare the folder again"

PathLike = Union[str, Path]


class Entry(NamedTuple):
    """One utterance: its path relative to the manifest's root, and its length in samples."""

    path: str
    frames: int


@dataclass(frozen=True)
class Manifest:
    """A manifest as written: `root` is the first line, unresolved; line of entry i is i + 2."""

    root: str
    entries: List[Entry]


def _read_lines(path: Path, purpose: str) -> List[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {purpose}")
    text = read_utf8(path, "utf-8")
    if text.startswith("\ufeff"):
        raise ValueError(
            f"{path}:1: begins with a byte order mark, which fairseq takes for text; save the file as UTF-8 without it"
        )
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _parse_manifest(path: Path) -> Tuple[str, List[Entry], List[str]]:
    lines = _read_lines(path, "expected a manifest; make it with `w2v2-light prepare`")
    if not lines or not lines[0].strip():
        return "", [], [f"{path}:1: found no root directory; the first line of a manifest names it"]
    root = lines[0].strip()
    if "\t" in root:
        problem = f"{path}:1: found {lines[0]!r}; the first line must be the root directory alone"
        return root, [], [problem]
    entries, problems = [], []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.strip().split("\t")
        if len(fields) != 2 or not fields[0] or not fields[1].isdigit():
            problems.append(f"{path}:{number}: found {line!r}; expected 'relative path<TAB>number of samples'")
            continue
        entries.append(Entry(fields[0], int(fields[1])))
    return root, entries, problems


def read_manifest(tsv: PathLike) -> Manifest:
    """Reads a manifest.

    Raises FileNotFoundError when it is missing and ValueError, naming file and line, when a line is malformed.
    """
    root, entries, problems = _parse_manifest(Path(tsv))
    if problems:
        raise ValueError(problems[0])
    return Manifest(root, entries)


def read_labels(path: PathLike) -> List[str]:
    """Reads one label line per utterance; raises FileNotFoundError when the file is missing."""
    return _read_lines(Path(path), "expected one line of labels per line of the manifest")


def read_dictionary(path: PathLike) -> Dict[str, int]:
    """Reads `symbol count` lines into symbol -> count, in file order.

    Raises FileNotFoundError when it is missing and ValueError, naming file and line, for a malformed line, a symbol
    listed twice and a symbol that fairseq adds itself.
    """
    path = Path(path)
    symbols: Dict[str, int] = {}
    for number, line in enumerate(_read_lines(path, "expected a dictionary of `symbol count` lines"), start=1):
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdigit():
            raise ValueError(f"{path}:{number}: found {line!r}; expected 'symbol count'")
        if symbol in symbols:
            raise ValueError(f"{path}:{number}: symbol {symbol!r} is listed twice; keep one of the lines")
        if symbol in SPECIAL_SYMBOLS:
            raise ValueError(f"{path}:{number}: fairseq adds {symbol!r} itself; remove this line")
        symbols[symbol] = int(count)
    if not symbols:
        raise ValueError(f"{path}: the dictionary holds no symbol")
    return symbols


def audio_header_problem(path: Path, frames: Optional[int] = None) -> Optional[str]:
    """What is wrong with an audio file by its header (None: nothing): kind, rate, channels and, if given, `frames`."""
    if not path.is_file():
        return f"no such audio file: {path}; {_WITHOUT_IT}"
    if not os.access(path, os.R_OK):
        return f"no permission to read the audio file: {path}"
    try:
        header = soundfile.info(str(path))
    except UNREADABLE as error:
        return f"not an audio file that libsndfile can read: {path} ({error}); {_WITHOUT_IT}"
    if header.samplerate != SAMPLE_RATE:
        return (
            f"{path} has {header.samplerate} Hz, expected {SAMPLE_RATE} Hz; make it with `w2v2-light prepare --convert`"
        )
    if header.channels != 1:
        return f"{path} has {header.channels} channels, expected 1; make it with `w2v2-light prepare --convert`"
    if frames is not None and header.frames != frames:
        return f"{path} has {header.frames} samples, the manifest says {frames}; prepare the folder again"
    return None


def _root_problems(tsv: Path, root: str, entries: List[Entry]) -> List[str]:
    remedy = "repair it with `w2v2-light prepare manifest DATA OUT`"
    if not os.path.isdir(root):
        return [f"{tsv}:1: no such root directory: {root}; {remedy}"]
    # Training changes its working directory, so that a relative root usually points elsewhere.
    if not os.path.isabs(root) and not os.path.exists(os.path.join(root, entries[0].path)):
        return [
            f"{tsv}:1: the relative root directory {root!r} does not lead to the audio from {os.getcwd()}; {remedy}"
        ]
    return []


def is_zip_slice(path: str) -> bool:
    """Whether a manifest path is fairseq's `file.zip:offset:length` (a stored member of a zip file)."""
    return ".zip:" in path


def manifest_problems(data_dir: PathLike, split: str) -> List[str]:
    """What `{split}.tsv` has wrong, without opening audio: 'file:line: what was found; what to do'.

    Raises FileNotFoundError when the folder or the file is missing.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such data folder; make one with `w2v2-light prepare`")
    tsv = data_dir / f"{split}.tsv"
    root, entries, problems = _parse_manifest(tsv)
    if problems:
        return problems
    if not entries:
        return [f"{tsv}: split {split!r} is empty: it lists no utterance after the root line"]
    return _root_problems(tsv, root, entries)


def label_problems(
    data_dir: PathLike, split: str, utterances: int, label_suffix: str, dictionary: Dict[str, int]
) -> List[str]:
    """What `{split}.{label_suffix}` has wrong: its line count, empty lines, symbols that are not in the dictionary.

    Raises FileNotFoundError when it is missing.
    """
    data_dir = Path(data_dir)
    path = data_dir / f"{split}.{label_suffix}"
    lines = read_labels(path)
    if len(lines) != utterances:
        return [
            f"{path}: {len(lines)} lines of labels, but {data_dir / f'{split}.tsv'} lists {utterances} utterances; "
            "line n of the labels belongs to line n + 1 of the manifest; prepare the folder again"
        ]
    problems = []
    for number, line in enumerate(lines, start=1):
        unknown = unknown_label_problem(path, number, line, dictionary, data_dir / f"dict.{label_suffix}.txt")
        if not line.split():
            problems.append(f"{path}:{number}: found no label; expected at least one symbol")
        elif unknown:
            problems.append(unknown)
    return problems


def unknown_label_problem(path: Path, number: int, line: str, dictionary: Container[str], dictionary_path: Path) -> str:
    """What a line of labels has wrong when it has a symbol that is not in the dictionary; empty when it has none."""
    unknown = [symbol for symbol in line.split() if symbol not in dictionary]
    if not unknown:
        return ""
    return (
        f"{path}:{number}: symbol {unknown[0]!r} is not in {dictionary_path}; add it there or prepare the folder again"
    )


def first_difference(one: Sequence[str], other: Sequence[str]) -> Tuple[int, Optional[str], Optional[str]]:
    """Where two unequal lists of symbols differ first: the index, and the symbol of each there (None: it has ended)."""
    index = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return (index, *(symbols[index] if index < len(symbols) else None for symbols in (one, other)))


def _sampled_header_problems(tsv: Path) -> List[str]:
    """Problems of the first, the middle and the last audio file: enough to notice a moved or unconverted corpus."""
    manifest = read_manifest(tsv)
    problems = []
    for index in sorted({0, len(manifest.entries) // 2, len(manifest.entries) - 1}):
        path, frames = manifest.entries[index]
        problem = None if is_zip_slice(path) else audio_header_problem(Path(manifest.root) / path, frames)
        if problem:
            problems.append(f"{tsv}:{index + 2}: {problem}")
    return problems


def _length_problems(tsv: Path, min_sample_size: Optional[int]) -> List[str]:
    """Utterances too short for one frame, other than those that task.min_sample_size leaves out."""
    fewest = min_sample_size or 0
    entries = read_manifest(tsv).entries
    if all(entry.frames < fewest for entry in entries):
        return [
            f"{tsv}: none of the {len(entries)} utterances has the {fewest} samples of task.min_sample_size, the "
            f"longest has {max(entry.frames for entry in entries)}; lower task.min_sample_size"
        ]
    return [
        f"{tsv}:{number}: {entry.path} has {entry.frames} samples, expected at least {RECEPTIVE_FIELD} for one frame; "
        f"leave such audio out with task.min_sample_size={RECEPTIVE_FIELD}, or prepare the folder again"
        for number, entry in enumerate(entries, start=2)
        if fewest <= entry.frames < RECEPTIVE_FIELD
    ]


def validate_split(
    data_dir: PathLike, split: str, label_suffix: Optional[str] = None, min_sample_size: Optional[int] = None
) -> None:
    """Raises when a split cannot be trained on or decoded: ValueError or FileNotFoundError naming file and line.

    Cheap enough to call at every start: reads the text files, and the headers of at most three audio files.
    Utterances of fewer than `min_sample_size` samples will be left out by fairseq.
    """
    data_dir = Path(data_dir)
    tsv = data_dir / f"{split}.tsv"
    problems = manifest_problems(data_dir, split)
    problems = problems or _length_problems(tsv, min_sample_size)
    problems = problems or _sampled_header_problems(tsv)
    if label_suffix and not problems:
        dictionary = read_dictionary(data_dir / f"dict.{label_suffix}.txt")
        problems = label_problems(data_dir, split, len(read_manifest(tsv).entries), label_suffix, dictionary)
    if problems:
        more = f" (and {len(problems) - 1} more; see `w2v2-light prepare check`)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def list_splits(data_dir: PathLike) -> List[str]:
    """Names of the splits of a data folder, sorted; raises FileNotFoundError when there is no folder or no manifest."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such data folder; make one with `w2v2-light prepare`")
    splits = sorted(path.stem for path in data_dir.glob("*.tsv") if path.name != "skipped.tsv")
    if not splits:
        raise FileNotFoundError(f"{data_dir}: holds no manifest (*.tsv); make one with `w2v2-light prepare`")
    return splits


def audio_paths(data_dir: PathLike, split: str) -> List[Path]:
    """The audio file of each utterance of a split: see `listed_audio`."""
    return [path for _, path in listed_audio(data_dir, split)]


def listed_audio(data_dir: PathLike, split: str) -> List[Tuple[Entry, Path]]:
    """Each utterance of a split with its audio file; a relative root is taken from the folder, or from where we are.

    Raises FileNotFoundError when there is no such split; ValueError for one that is malformed or empty, and for parts
    of a zip file.
    """
    data_dir = Path(data_dir)
    tsv = data_dir / f"{split}.tsv"
    if not tsv.is_file():
        raise FileNotFoundError(
            f"{tsv}: no such split; {data_dir} has: {', '.join(list_splits(data_dir))}; name one with --split"
        )
    listed = read_manifest(tsv)
    if not listed.entries:
        raise ValueError(f"{tsv}: split {split!r} is empty: it lists no utterance after the root line")
    for number, entry in enumerate(listed.entries, start=2):
        if is_zip_slice(entry.path):
            raise ValueError(f"{tsv}:{number}: {entry.path} is a part of a zip file; unpack it and prepare it again")
    # data sets that are passed around have relative roots, which fairseq takes from where it runs
    roots = [data_dir / listed.root, Path(listed.root)]
    root = next((root for root in roots if (root / listed.entries[0].path).exists()), roots[0])
    return [(entry, root / entry.path) for entry in listed.entries]


def list_label_suffixes(data_dir: PathLike) -> List[str]:
    """Label kinds of a data folder, by its dictionaries `dict.{suffix}.txt`; sorted, empty for unlabelled data."""
    return sorted(path.name[len("dict.") : -len(".txt")] for path in Path(data_dir).glob("dict.*.txt"))


def manifest_text(root: str, entries: List[Entry]) -> str:
    """The text of a manifest file."""
    return "".join([f"{root}\n"] + [f"{entry.path}\t{entry.frames}\n" for entry in entries])


def localise_manifest(data_dir: PathLike, out_dir: PathLike, force: bool = False) -> List[str]:
    """Copies a manifest folder into `out_dir` with absolute roots; returns its splits.

    A relative root (`.` in a data set that is passed around) is taken from `data_dir`. Labels, dictionaries and
    sentencepiece models are copied; audio stays where it is. Raises ValueError when `out_dir` holds manifests and
    `force` is off, when a manifest is malformed or its root does not exist.
    """
    data_dir, out_dir = Path(data_dir), Path(out_dir)
    splits = list_splits(data_dir)
    if out_dir.exists() and out_dir.resolve() == data_dir.resolve():
        raise ValueError(f"{out_dir}: source and destination are the same folder; choose another destination")
    texts = {}
    for split in splits:
        tsv = data_dir / f"{split}.tsv"
        manifest = read_manifest(tsv)
        root = (data_dir / manifest.root).resolve()
        if not root.is_dir():
            raise FileNotFoundError(f"{tsv}:1: no such root directory: {root}")
        texts[f"{split}.tsv"] = manifest_text(str(root), manifest.entries)
    copies = [path for split in splits for path in sorted(data_dir.glob(f"{split}.*")) if path.suffix != ".tsv"]
    copies += sorted(data_dir.glob("dict.*.txt")) + sorted(data_dir.glob("spm.model"))
    if not force:
        refuse_overwriting(out_dir, list(texts) + [path.name for path in copies])
    for source in copies:
        with atomic_path(out_dir / source.name) as temporary:
            shutil.copyfile(source, temporary)
    # Manifests last: a folder with a manifest is complete.
    for name, text in texts.items():
        atomic_write_text(out_dir / name, text)
    return splits


def refuse_overwriting(out_dir: PathLike, names: List[str]) -> None:
    """Raises ValueError when `out_dir` already holds one of the files `names`."""
    present = [name for name in names if (Path(out_dir) / name).exists()]
    if present:
        raise ValueError(f"{Path(out_dir) / present[0]}: exists already; choose another folder or pass --force")
