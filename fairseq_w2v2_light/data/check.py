"""`prepare check`: everything that a manifest folder can have wrong, and a summary of what it holds."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from fairseq_w2v2_light.data.audio import inspect_audio
from fairseq_w2v2_light.data.manifest import (
    RECEPTIVE_FIELD,
    SAMPLE_RATE,
    Entry,
    PathLike,
    is_zip_slice,
    label_problems,
    list_label_suffixes,
    list_splits,
    manifest_problems,
    read_dictionary,
    read_labels,
    read_manifest,
)
from fairseq_w2v2_light.data.progress import progress

# Stock wav2vec 2.0 makes one frame of 20 ms.
FRAME_STRIDE = 320
READER_THREADS = 4


@dataclass(frozen=True)
class SplitReport:
    """One split: utterances, their lengths in samples, kinds of labels with symbol counts, what is wrong or notable."""

    split: str
    frames: List[int]
    symbols: Dict[str, Counter]
    problems: List[str]
    notes: List[str]

    def line(self) -> str:
        """The summary of the split for people."""
        if not self.frames:
            return f"{self.split}: no utterance"
        ordered = sorted(frames / SAMPLE_RATE for frames in self.frames)
        lengths = f"{ordered[0]:.2f} / {ordered[len(ordered) // 2]:.2f} / {ordered[-1]:.2f}"
        text = f"{self.split}: {len(ordered)} utterances, {sum(ordered) / 3600:.3f} hours, min/median/max {lengths} s"
        for suffix, counts in self.symbols.items():
            text += f", {sum(counts.values())} {suffix} symbols ({len(counts)} different)"
        return text


def _audio_problem(root: Path, entry: Entry, where: str, min_frames: int, deep: bool) -> Optional[str]:
    if is_zip_slice(entry.path):
        return None
    path = root / entry.path
    finding = inspect_audio(path, min_frames, deep)
    if finding.reason:
        return f"{where}: {path}: {finding.reason}: {finding.detail}"
    if finding.frames != entry.frames:
        return (
            f"{where}: {path}: has {finding.frames} samples, the manifest says {entry.frames}; prepare the folder again"
        )
    return None


def ctc_frames(symbols: Sequence[str]) -> int:
    """The fewest frames on which CTC can write `symbols`: one each, and a blank between equal neighbours."""
    return len(symbols) + sum(first == second for first, second in zip(symbols, symbols[1:]))


def _audio_problems(data_dir: Path, split: str, min_frames: int, deep: bool) -> List[str]:
    tsv = data_dir / f"{split}.tsv"
    manifest = read_manifest(tsv)
    root = Path(manifest.root)
    problems = []
    if not root.is_absolute():
        problems.append(
            f"{tsv}:1: the root directory {manifest.root!r} is relative, and training may change its working "
            "directory; repair it with `w2v2-light prepare manifest DATA OUT`"
        )

    def inspect(item: Tuple[int, Entry]) -> Optional[str]:
        return _audio_problem(root, item[1], f"{tsv}:{item[0]}", min_frames, deep)

    with ThreadPoolExecutor(READER_THREADS) as pool:
        found = pool.map(inspect, enumerate(manifest.entries, start=2))
        problems += [problem for problem in progress(found, f"checking {split}", len(manifest.entries)) if problem]
    return problems


def _density_note(path: Path, lines: List[List[str]], entries: List[Entry]) -> List[str]:
    pairs = enumerate(zip(lines, entries), start=1)
    dense = [number for number, (line, entry) in pairs if ctc_frames(line) > entry.frames // FRAME_STRIDE]
    if not dense:
        return []
    count = f"{len(dense)} lines (this is the first) have" if len(dense) > 1 else "the line has"
    return [f"{path}:{dense[0]}: {count} more labels than frames of 20 ms; CTC cannot learn them"]


def check_split(
    data_dir: PathLike,
    split: str,
    dictionaries: Dict[str, Dict[str, int]],
    min_frames: int = RECEPTIVE_FIELD,
    deep: bool = False,
) -> SplitReport:
    """Verifies one split: manifest, labels of each kind in `dictionaries`, every audio file by its header.

    `deep` decodes the audio too: NaN, infinite and missing samples.
    """
    data_dir = Path(data_dir)
    problems = manifest_problems(data_dir, split)
    if problems:
        return SplitReport(split, [], {}, problems, [])
    problems = _audio_problems(data_dir, split, min_frames, deep)
    entries = read_manifest(data_dir / f"{split}.tsv").entries
    notes, symbols = [], {}
    for suffix, dictionary in dictionaries.items():
        path = data_dir / f"{split}.{suffix}"
        if not path.is_file():
            problems.append(f"{path}: no such file, though there is dict.{suffix}.txt")
            continue
        problems += label_problems(data_dir, split, len(entries), suffix, dictionary)
        lines = [line.split() for line in read_labels(path)]
        symbols[suffix] = Counter(symbol for line in lines for symbol in line)
        notes += _density_note(path, lines, entries)
    words = data_dir / f"{split}.wrd"
    if words.is_file() and len(read_labels(words)) != len(entries):
        problems.append(f"{words}: {len(read_labels(words))} lines, but the manifest lists {len(entries)} utterances")
    repeated = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if repeated:
        notes.append(f"{data_dir / f'{split}.tsv'}: lists {repeated[0]} more than once ({len(repeated)} such files)")
    return SplitReport(split, [entry.frames for entry in entries], symbols, problems, notes)


def check_folder(data_dir: PathLike, min_frames: int = RECEPTIVE_FIELD, deep: bool = False) -> List[SplitReport]:
    """Verifies every split of a manifest folder; see `check_split`. Malformed dictionaries raise ValueError."""
    data_dir = Path(data_dir)
    splits = list_splits(data_dir)
    dictionaries = {
        suffix: read_dictionary(data_dir / f"dict.{suffix}.txt") for suffix in list_label_suffixes(data_dir)
    }
    return [check_split(data_dir, split, dictionaries, min_frames, deep) for split in splits]
