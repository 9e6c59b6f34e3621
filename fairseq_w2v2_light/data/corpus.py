"""Utterances to a manifest folder: skip what training cannot use, say why, and write all or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional

from fairseq_w2v2_light.data.audio import Inspection, convert_audio, inspect_audio
from fairseq_w2v2_light.data.manifest import (
    RECEPTIVE_FIELD,
    SAMPLE_RATE,
    Entry,
    manifest_text,
    refuse_overwriting,
)
from fairseq_w2v2_light.data.progress import progress
from fairseq_w2v2_light.data.sources import Utterance, divide
from fairseq_w2v2_light.data.synth import SynthOptions, synthesise
from fairseq_w2v2_light.data.text import (
    NORMALISATIONS,
    SentencePieces,
    dictionary_text,
    letters,
    normalise_text,
    reserved_symbol,
    train_sentencepiece,
)

LABEL_SUFFIXES = {"letter": "ltr", "sentencepiece": "spm"}
# What a finished folder says about itself; its presence marks a folder as made here, and lists its files.
RECORD = "prepared.json"
UNDIVIDED = ""
HEADER_THREADS = 4
COLON_SUFFIXES = (".wav", ".flac", ".ogg", ".npy")


def absolute(path: Path) -> Path:
    """Absolute and without '..'; symbolic links stay, for they may be how the user addresses the audio."""
    return Path(os.path.abspath(path))


@dataclass(frozen=True)
class Options:
    """How to prepare a folder. `convert` resamples and mixes down instead of skipping; `deep` decodes every file."""

    labels: str = "letter"
    vocab_size: int = 1000
    sentencepiece_type: str = "unigram"
    normalise: str = "upper"
    min_frames: int = RECEPTIVE_FIELD
    convert: bool = False
    deep: bool = False
    force: bool = False

    def __post_init__(self):
        if self.labels not in LABEL_SUFFIXES:
            raise ValueError(f"--labels {self.labels}: expected one of {', '.join(LABEL_SUFFIXES)}")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"--normalise {self.normalise}: expected one of {', '.join(NORMALISATIONS)}")


class Skipped(NamedTuple):
    """One utterance left out."""

    split: str
    reason: str
    path: str
    detail: str


class Kept(NamedTuple):
    """One utterance to be written: `text` is normalised, None without labels; `frames` are 16 kHz samples."""

    utterance: Utterance
    path: Path
    frames: int
    text: Optional[str]


@dataclass(frozen=True)
class Summary:
    """What `prepare` wrote: utterances and hours per split, skipped utterances, the folder."""

    out: Path
    utterances: Dict[str, int]
    hours: Dict[str, float]
    skipped: List[Skipped] = field(default_factory=list)

    def lines(self) -> List[str]:
        """The summary for people."""
        written = [f"{s}: {n} utterances, {self.hours[s]:.3f} hours" for s, n in self.utterances.items()]
        reasons = Counter(item.reason for item in self.skipped).most_common()
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
            written.append(f"skipped {len(self.skipped)}: {counts}; list: {self.out / 'skipped.tsv'}")
        return written + [f"wrote {self.out}"]


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`; moves its content into `out` when the block succeeds.

    An `out` that does not exist appears in one step. Otherwise files are replaced one by one: the old manifests go
    first and the new ones come last, so that no manifest ever lists audio of another run. When the block raises,
    nothing of it remains.
    """
    out = absolute(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:  # names the temporary folder, or one above
        raise type(error)(error.errno, f"cannot make this folder: {error.strerror}", str(out)) from error
    try:
        yield stage
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o777 & ~mask)
        if not out.exists():
            os.replace(stage, out)
            return
        for path in stage.glob("*.tsv"):
            (out / path.name).unlink(missing_ok=True)
        for path in sorted(stage.rglob("*"), key=lambda path: (path.suffix == ".tsv", str(path))):
            if path.is_file():
                destination = out / path.relative_to(stage)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, destination)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _text_problem(utterance: Utterance, text: str) -> Optional[str]:
    if not (utterance.text or "").strip():
        return "empty text"
    if not text:
        return "nothing left of the text"
    return "reserved symbol in the text" if reserved_symbol(text) else None


def _path_problem(path: Path) -> str:
    """Why fairseq could not read this path from a manifest; '' if it can."""
    name = str(path)
    if any(char in name for char in "\t\n\r"):
        return "holds a tab or a line break"
    # Behind any other suffix fairseq reads ':' as the slice of a zip file.
    if ":" in name and path.suffix not in COLON_SUFFIXES:
        return f"holds ':', which fairseq allows before {', '.join(COLON_SUFFIXES)} only"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


class _Sieve:
    """Decides what to keep, converting where wanted; collects what it skips."""

    def __init__(self, options: Options, labelled: bool, stage: Path, out: Path, sources: List[Path]):
        self.options, self.labelled, self.stage, self.out = options, labelled, stage, out
        self.skipped: List[Skipped] = []
        self._sources = {absolute(path) for path in sources}
        self._seen: Dict[Path, str] = {}
        # Converted copies repeat the layout below this folder.
        self._base = os.path.commonpath(sorted({str(path.parent) for path in self._sources}))

    def inspect(self, utterance: Utterance) -> Inspection:
        """Findings about the audio, which may lie in the staging folder still."""
        path = absolute(utterance.path)
        if _path_problem(path):
            return Inspection(reason="unusable path", detail=f"the path {_path_problem(path)}")
        if self.out in path.parents and (self.stage / path.relative_to(self.out)).is_file():
            path = self.stage / path.relative_to(self.out)
        return inspect_audio(path, self.options.min_frames, self.options.deep)

    def keep(self, utterance: Utterance, finding: Inspection) -> Optional[Kept]:
        """The utterance as it will be written, or None (and why, in `skipped`)."""
        path = absolute(utterance.path)
        text = normalise_text(utterance.text or "", self.options.normalise) if self.labelled else None
        reason, detail = finding.reason, finding.detail
        convert = finding.convertible and self.options.convert
        problem = _text_problem(utterance, text) if text is not None else None
        if path in self._seen:
            reason, detail = "listed twice", f"first at {self._seen[path]}"
        elif problem:
            reason, detail = problem, repr(utterance.text)
        self._seen.setdefault(path, utterance.where)
        if reason and not (convert and finding.reason == reason):
            return self._skip(utterance, reason, detail)
        if not convert:
            return Kept(utterance, path, finding.frames, text)
        relative = Path("audio") / path.relative_to(self._base).with_suffix(".flac")
        if (self.stage / relative).exists():
            # Another format of the same recording, perhaps: a.wav and a.mp3.
            relative = relative.with_name(f"{path.name}.flac")
        if (self.out / relative) in self._sources:
            raise ValueError(f"{path}: its converted copy would overwrite {self.out / relative}; choose another folder")
        try:
            frames = convert_audio(path, self.stage / relative)
        except (RuntimeError, OSError) as error:
            return self._skip(utterance, "not audio", f"cannot be decoded: {error}")
        return Kept(utterance, self.out / relative, frames, text)

    def _skip(self, utterance: Utterance, reason: str, detail: str) -> None:
        where = f" ({utterance.where})" if utterance.where not in ("", str(utterance.path)) else ""
        self.skipped.append(Skipped(utterance.split, reason, str(utterance.path), f"{detail}{where}".strip()))


def _refuse_empty(split: str, skipped: List[Skipped]) -> None:
    reasons = Counter(item.reason for item in skipped).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    name = f"split {split!r}" if split else "the data"
    hint = ""
    if any(reason in ("wrong sample rate", "not mono") for reason, _ in reasons):
        hint = "; --convert makes 16 kHz mono copies"
    first = f"; first: {skipped[0].path}: {skipped[0].detail}" if skipped else ""
    raise ValueError(f"{name}: none of its {len(skipped)} utterances is usable: {counts}{first}{hint}")


def _label_files(splits: Dict[str, List[Kept]], options: Options) -> Dict[str, bytes]:
    texts = {split: [item.text or "" for item in kept] for split, kept in splits.items()}
    training = texts.get("train") or [text for split in texts.values() for text in split]
    suffix = LABEL_SUFFIXES[options.labels]
    files: Dict[str, bytes] = {}
    extra: List[str] = []
    if options.labels == "sentencepiece":
        model = train_sentencepiece(training, options.vocab_size, options.sentencepiece_type)
        files["spm.model"] = model
        pieces = SentencePieces(model)
        encode, extra = pieces.encode, pieces.symbols()
    else:
        encode = letters
    labels = {split: [encode(text) for text in lines] for split, lines in texts.items()}
    for split, lines in texts.items():
        files[f"{split}.wrd"] = "".join(f"{line}\n" for line in lines).encode()
        files[f"{split}.{suffix}"] = "".join(f"{line}\n" for line in labels[split]).encode()
    # Characters of valid and test that training never has are listed with count 0, not read as <unk>.
    extra += [symbol for lines in labels.values() for line in lines for symbol in line.split()]
    trained = labels.get("train") or [line for lines in labels.values() for line in lines]
    files[f"dict.{suffix}.txt"] = dictionary_text(trained, extra).encode()
    return files


def _manifest_files(splits: Dict[str, List[Kept]], preferred_root: Path) -> Dict[str, bytes]:
    """Manifests with one root: `preferred_root` if all audio is below it, else the deepest folder that holds all."""
    root = str(absolute(preferred_root))
    base = os.path.commonpath(sorted({str(item.path.parent) for kept in splits.values() for item in kept}))
    if os.path.commonpath([base, root]) != root:
        root = base
    files = {}
    for split, kept in splits.items():
        entries = [Entry(os.path.relpath(item.path, root), item.frames) for item in kept]
        files[f"{split}.tsv"] = manifest_text(root, entries).encode()
    return files


def _previous_files(out: Path) -> List[str]:
    try:
        names = json.loads((out / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


@dataclass(frozen=True)
class Division:
    """How to divide utterances that belong to no split yet: fraction of each split but train, at random."""

    fractions: Dict[str, float]
    seed: int = 0
    by_speaker: bool = False


def refuse_existing(out: Path, force: bool) -> None:
    """Raises ValueError when `out` is a file, or holds manifests and `force` is off."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is not a folder; choose another one")
    if not force:
        refuse_overwriting(out, [RECORD, "train.tsv", "valid.tsv", "test.tsv"])


@contextlib.contextmanager
def new_corpus(out: Path, force: bool = False, protected: Optional[Path] = None) -> Iterator[Path]:
    """`staged`, for a manifest folder: refuses to overwrite one unless `force`; then removes the old one's lists.

    `protected` is an input file: ValueError rather than replacing it.
    """
    refuse_existing(out, force)
    with staged(out) as stage:
        yield stage
        names = sorted(path.name for path in stage.iterdir() if path.is_file())
        if not force:
            refuse_overwriting(out, names)
        if protected is not None and absolute(protected) in {absolute(out) / name for name in names}:
            raise ValueError(f"{protected}: would be overwritten by its own result; choose another folder than {out}")
        for name in set(_previous_files(out)) - set(names):
            (out / name).unlink(missing_ok=True)


def prepare(
    splits: Dict[str, List[Utterance]],
    out: Path,
    options: Options,
    root: Path,
    division: Optional[Division] = None,
    record: Optional[Dict[str, object]] = None,
    protected: Optional[Path] = None,
) -> Summary:
    """Makes a manifest folder of existing audio; see `write_corpus` and `new_corpus`. All or nothing is written."""
    with new_corpus(out, options.force, protected) as stage:
        return write_corpus(stage, splits, out, options, root, division, record)


def write_corpus(
    stage: Path,
    splits: Dict[str, List[Utterance]],
    out: Path,
    options: Options,
    root: Path,
    division: Optional[Division] = None,
    record: Optional[Dict[str, object]] = None,
) -> Summary:
    """Writes into `stage` what will be `out`: `{split}.tsv`, labels and dictionary if there is text, what was skipped.

    splits: utterances by split, or all under the name "" to be divided by `division` after the unusable ones are gone.
    Audio that is already in `stage` is named by its future path in `out`. root: the manifests' root directory if all
    audio is below it. record: how the folder was made, for prepared.json.

    Raises ValueError when a split ends up empty, and for labels that cannot be made.
    """
    out = absolute(out)
    for split, members in splits.items():
        if not members:
            _refuse_empty(split, [])
    utterances = [utterance._replace(split=split) for split, members in splits.items() for utterance in members]
    labelled = utterances[0].text is not None
    sieve = _Sieve(options, labelled, stage, out, [utterance.path for utterance in utterances])
    kept: Dict[str, List[Kept]] = {split: [] for split in splits}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        findings = zip(utterances, pool.map(sieve.inspect, utterances))
        for utterance, finding in progress(findings, "checking audio", len(utterances)):
            item = sieve.keep(utterance, finding)
            if item is not None:
                kept[utterance.split].append(item)
    for split, members in kept.items():
        if not members:
            _refuse_empty(split, [item for item in sieve.skipped if item.split == split])
    if division is not None:
        kept = _divide_kept(kept[UNDIVIDED], division)
    files = _manifest_files(kept, root)
    if labelled:
        files.update(_label_files(kept, options))
    rows = ["split\treason\tpath\tdetail"] + ["\t".join(_cell(value) for value in item) for item in sieve.skipped]
    files["skipped.tsv"] = ("\n".join(rows) + "\n").encode()
    summary = Summary(
        out,
        {split: len(members) for split, members in kept.items()},
        {split: sum(item.frames for item in members) / SAMPLE_RATE / 3600 for split, members in kept.items()},
        sieve.skipped,
    )
    files[RECORD] = _record_text(summary, options, record or {}, list(files)).encode()
    for name, content in files.items():
        (stage / name).write_bytes(content)
    return summary


def _cell(value: str) -> str:
    printable = value.encode("utf-8", "backslashreplace").decode("utf-8")
    return " ".join(printable.split()) or "-"


def _divide_kept(kept: List[Kept], division: Division) -> Dict[str, List[Kept]]:
    by_utterance = {id(item.utterance): item for item in kept}
    members = divide([item.utterance for item in kept], division.fractions, division.seed, division.by_speaker)
    return {split: [by_utterance[id(utterance)] for utterance in part] for split, part in members.items()}


def _record_text(summary: Summary, options: Options, record: Dict[str, object], names: List[str]) -> str:
    content = {
        "made_by": "w2v2-light prepare",
        **record,
        "options": asdict(options),
        "splits": {
            split: {"utterances": count, "hours": round(summary.hours[split], 4)}
            for split, count in summary.utterances.items()
        },
        "skipped": dict(Counter(item.reason for item in summary.skipped)),
        "files": sorted([*names, RECORD]),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def speak(synth_options: SynthOptions, out: Path, options: Options) -> Summary:
    """Makes a spoken corpus with espeak-ng in `out`: audio under `out/audio`, manifests, labels, dictionary."""
    out = absolute(out)
    with new_corpus(out, options.force) as stage:
        splits = synthesise(synth_options, stage, out)
        record = {"source": "synth", "synth": asdict(synth_options)}
        return write_corpus(stage, splits, out, options, out, record=record)
