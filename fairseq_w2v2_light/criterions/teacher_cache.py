"""A teacher's outputs, computed once and kept on disk.

A cache is a folder: `cache.json` says whose it is, `HH/HASH.outputs` holds the outputs for one utterance, found by
the hash of its audio. So every split, order, batch, rank and run over the same data finds what another has stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.manifest import list_splits, read_manifest
from ..files import atomic_path, atomic_write_text
from .teacher import Teacher, TeacherOutput

logger = logging.getLogger(__name__)

Arrays = Dict[str, np.ndarray]

DESCRIPTION = "cache.json"
_FORMAT, _VERSION = "w2v2-light teacher cache", 1
_STORAGE = {"float16": torch.float16, "float32": torch.float32}
_SHARD = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"[0-9a-f]{32}\.outputs")
# A process that was killed may have left a half-written description.
_OURS = re.compile(rf"{_SHARD.pattern}|cache\.json|\.cache\..*\.json")
# magic, first half of the teacher's fingerprint, length and crc32 of the JSON that follows
_HEAD = struct.Struct("<8s16sII")
_MAGIC = b"W2V2KEEP"
_WORD = 8
# Enough for the head and JSON of a dozen layers: one read for both.
_FIRST_READ = 2048
# An utterance is one piece of audio in a run and a few in all (fp32, fp16 and bf16 differ). A run's count is an
# estimate, from one of several ranks.
_NEW_PER_UTTERANCE = 1.5
_ENTRIES_PER_UTTERANCE = 3
_MORE_ENTRIES = 100


@dataclass(frozen=True)
class DatasetIdentity:
    """Which data set a cache belongs to.

    path: its folder. content: sha256 over the entries of its training manifest (of all manifests where there is no
    train.tsv), whatever their root. utterances: how many all its splits have.
    """

    path: str
    content: str
    utterances: int

    @classmethod
    def of(cls, data_dir) -> DatasetIdentity:
        """Reads the manifests of a data folder; raises FileNotFoundError and ValueError as `read_manifest` does."""
        splits = list_splits(data_dir)
        digest = hashlib.sha256()
        utterances = 0
        for split in splits:
            entries = read_manifest(Path(data_dir) / f"{split}.tsv").entries
            utterances += len(entries)
            if split == "train" or "train" not in splits:
                digest.update("".join(f"{entry.path}\t{entry.frames}\n" for entry in entries).encode())
        return cls(os.path.realpath(data_dir), digest.hexdigest(), utterances)


class CachedTeacher:
    """A teacher that is asked only for what its cache does not hold; called like a Teacher, with the same result.

    Outputs are stored as `storage`: float16 (an output beyond its range as float32) or float32. What is computed is
    rounded in the same way, so that the first epoch sees what later ones see. Entries that are damaged, lack a layer
    or are of another teacher are made anew. Any number of processes may use the folder at once.

    A folder of the same teacher file with other content, dtype or operating point is rebuilt, with a warning. Raises
    ValueError for a cache of another teacher or data set, and for a folder that is no cache. Nothing is stored any
    more, after a warning, when the audio turns out to be cropped at random, and when the disk is full.

    hits, misses: utterances that were found, and that were computed.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder,
        dataset: DatasetIdentity,
        storage: str = "float16",
        key: str = "criterion.teacher_cache",
    ):
        if storage not in _STORAGE:
            raise ValueError(f"{key}_dtype: found '{storage}', expected one of {', '.join(_STORAGE)}")
        self.teacher = teacher
        self.folder = Path(folder)
        self.dataset = dataset
        self.key = key
        self.hits = self.misses = 0
        self._dtype = _STORAGE[storage]
        self._owner = bytes.fromhex(teacher.fingerprint)[:16]
        self._reported_damage = False
        self._stores = True
        self._new_entries = 0
        self._old_entries: Optional[int] = None
        try:
            _open(self.folder, teacher, dataset, self._owner, key)
        except OSError as error:
            raise ValueError(f"{key}: cannot use '{folder}': {error}; choose a folder that can be written") from error

    depth = property(lambda self: self.teacher.depth, doc="As Teacher.depth.")
    dim = property(lambda self: self.teacher.dim, doc="As Teacher.dim.")
    hop = property(lambda self: self.teacher.hop, doc="As Teacher.hop.")
    squeeze = property(lambda self: self.teacher.squeeze, doc="As Teacher.squeeze.")
    symbols = property(lambda self: self.teacher.symbols, doc="As Teacher.symbols.")

    @property
    def layers(self) -> Tuple[int, ...]:
        """As Teacher.layers."""
        return self.teacher.layers

    @layers.setter
    def layers(self, layers: Sequence[int]) -> None:
        self.teacher.layers = layers

    @torch.no_grad()
    def __call__(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> TeacherOutput:
        """As Teacher: `source` (batch, samples); `padding_mask` (batch, samples) bool, True on padding at the end."""
        counts = [source.size(1)] * len(source)
        if padding_mask is not None:
            counts = (~padding_mask.bool()).sum(-1).tolist()
        audio = source.float().cpu().numpy()
        names = [_audio_hash(row[:count]) for row, count in zip(audio, counts)]
        entries = [self._read(name, self._shapes(count)) for name, count in zip(names, counts)]
        missing = [row for row, entry in enumerate(entries) if entry is None]
        self.hits += len(entries) - len(missing)
        self.misses += len(missing)
        if missing:
            for row, entry in zip(missing, self._compute(source, counts, missing)):
                entries[row] = entry
                self._store(names[row], entry)
        return self._batch(source, counts, entries)

    def _shapes(self, samples: int) -> Dict[str, Tuple[int, int]]:
        """Name -> (frames, channels) of the outputs that an utterance needs."""
        teacher = self.teacher
        frames = teacher.frames(samples)
        shapes = {str(depth): (teacher.hidden_frames(frames), teacher.dim) for depth in teacher.layers}
        if teacher.needs_logits:
            shapes["logits"] = (frames, teacher.labels)
        return shapes

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.outputs"

    def _read(self, name: str, shapes: Dict[str, Tuple[int, int]]) -> Optional[Arrays]:
        """The outputs of an utterance, None unless the cache has all of them as they should be."""
        try:
            arrays = read_entry(self._path(name), self._owner, list(shapes))
        except DamagedEntry as error:
            if not self._reported_damage:
                logger.warning(f"{self.key}: {error}: computing it anew (further damaged files are not reported)")
                self._reported_damage = True
            return None
        for output, shape in shapes.items():
            array = arrays.get(output)
            if array is None or array.shape != shape or (self._dtype == torch.float32 and array.dtype != np.float32):
                return None
        return arrays

    def _compute(self, source: Tensor, counts: List[int], rows: List[int]) -> Iterator[Arrays]:
        """Asks the teacher for some rows of a batch, without the padding that only the others need."""
        lengths = torch.tensor([counts[row] for row in rows], device=source.device)
        source = source[rows, : int(lengths.max())]
        padding_mask = torch.arange(source.size(1), device=source.device) >= lengths.unsqueeze(1)
        output = self.teacher(source, padding_mask)
        tensors = {str(depth): x.cpu() for depth, x in output.hidden.items()}
        if output.logits is not None:
            tensors["logits"] = output.logits.cpu()
        for index, row in enumerate(rows):
            shapes = self._shapes(counts[row])
            yield {name: self._rounded(x[index, : shapes[name][0]]).numpy() for name, x in tensors.items()}

    def _rounded(self, x: Tensor) -> Tensor:
        rounded = x.to(self._dtype)
        return rounded if bool(torch.isfinite(rounded).all()) else x

    def _store(self, name: str, arrays: Arrays) -> None:
        """Writes an entry, with what one that lacked an output had already."""
        if not self._stores:
            return
        path = self._path(name)
        try:
            kept = read_entry(path, self._owner)
        except DamagedEntry:
            kept = {}
        if not kept and self._crops_at_random():
            return
        try:
            write_entry(path, self._owner, {**kept, **arrays})
            self._new_entries += not kept
        except OSError as error:
            self._stores = False
            logger.warning(f"{self.key}: cannot write {path} ({error}): storing no more of the teacher's outputs")

    def _crops_at_random(self) -> bool:
        """Whether there is more audio than the data set has, as when every epoch crops it anew; then stops storing."""
        if self._old_entries is None:
            self._old_entries = sum(1 for _ in _entries(self.folder))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        new = self._new_entries * (torch.distributed.get_world_size() if distributed else 1)
        utterances = self.dataset.utterances
        most_new = _NEW_PER_UTTERANCE * utterances + _MORE_ENTRIES
        most = _ENTRIES_PER_UTTERANCE * utterances + _MORE_ENTRIES
        if new < most_new and self._old_entries + new < most:
            return False
        self._stores = False
        logger.warning(
            f"{self.key}: '{self.folder}' holds {self._old_entries + new} pieces of audio, but the data set has "
            f"{utterances} utterances: they are cropped at random, so that stored outputs are hardly ever used; "
            "storing no more. Raise task.max_sample_size above the longest utterance and set task.enable_padding=true "
            f"(a pre-training task crops every batch to its shortest otherwise), or leave {self.key} empty"
        )
        return True

    def _batch(self, source: Tensor, counts: List[int], entries: List[Arrays]) -> TeacherOutput:
        """Pads the outputs of the utterances as the teacher would have for the entire batch."""
        teacher = self.teacher
        padded = {}
        for name, shape in self._shapes(source.size(1)).items():
            arrays = [entry[name] for entry in entries]
            dtype = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
            batch = np.zeros((len(arrays), *shape), dtype)
            for row, array in zip(batch, arrays):
                row[: len(array)] = array
            padded[name] = torch.from_numpy(batch).to(source.device).float()
        lengths = teacher.frames(torch.tensor(counts, device=source.device))
        return TeacherOutput(
            padded.get("logits"),
            {depth: padded[str(depth)] for depth in teacher.layers},
            lengths,
            teacher.hidden_frames(lengths),
            teacher.hop,
            teacher.squeeze,
            teacher.dim,
        )


def _audio_hash(samples: np.ndarray) -> str:
    # Of the hashes at hand the fastest, on processors with and without instructions for it.
    return hashlib.sha1(np.ascontiguousarray(samples), usedforsecurity=False).hexdigest()[:32]


# entries


class DamagedEntry(Exception):
    """A file of the cache is not as it was written."""


def write_entry(path: Path, owner: bytes, arrays: Arrays) -> None:
    """Writes named arrays (frames, channels) of float16 or float32 in one step; `owner`: 16 bytes, see read_entry.

    The file: head, JSON {"size": bytes after it, "outputs": {name: [dtype, shape, offset, checksum]}}, then the arrays
    in C order. Everything is padded to words of 8 bytes; a checksum is the sum of an array's words modulo 2^64, which
    costs next to nothing. Little-endian.
    """
    outputs, blocks, offset = {}, [], 0
    for name, array in arrays.items():
        words = np.zeros(-(-array.nbytes // _WORD), "<u8")
        words.view(np.uint8)[: array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        outputs[name] = [str(array.dtype), list(array.shape), offset, _checksum(words)]
        blocks.append(words.tobytes())
        offset += words.nbytes
    text = json.dumps({"size": offset, "outputs": outputs}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join([_HEAD.pack(_MAGIC, owner, len(text), zlib.crc32(text)), text, *blocks]))


def read_entry(path: Path, owner: bytes, names: Optional[Sequence[str]] = None) -> Arrays:
    """Those of the named arrays (None: all) that a file holds; none when it is missing or was written by another owner.

    Raises DamagedEntry that names the file and what is wrong with it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _read_arrays(file, path, owner, names)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DamagedEntry(f"{path}: not readable ({error})") from error


def _read_arrays(file, path: Path, owner: bytes, names: Optional[Sequence[str]]) -> Arrays:
    start = file.read(_FIRST_READ)
    if len(start) < _HEAD.size or not start.startswith(_MAGIC):
        raise DamagedEntry(f"{path}: not an entry of a teacher cache, or cut off")
    _, written_by, length, checksum = _HEAD.unpack_from(start)
    if written_by != owner:
        return {}
    first = _HEAD.size + length
    if first > len(start):
        start += file.read(first - len(start))
    text = start[_HEAD.size : first]
    if zlib.crc32(text) != checksum:
        raise DamagedEntry(f"{path}: its description is damaged")
    description = json.loads(text)
    size = os.fstat(file.fileno()).st_size
    if size != first + description["size"]:
        raise DamagedEntry(f"{path}: has {size} bytes, expected {first + description['size']}")
    arrays = {}
    for name, (dtype, shape, offset, checksum) in description["outputs"].items():
        if names is None or name in names:
            count = shape[0] * shape[1]
            words = np.empty(-(-count * np.dtype(dtype).itemsize // _WORD), "<u8")
            file.seek(first + offset)
            if file.readinto(words) != words.nbytes or _checksum(words) != checksum:
                raise DamagedEntry(f"{path}: its output '{name}' is damaged")
            arrays[name] = words.view(dtype)[:count].reshape(shape)
    return arrays


def _checksum(words: np.ndarray) -> int:
    return int(words.sum(dtype=np.uint64))


def _entries(folder: Path) -> Iterator[Path]:
    """The files of all entries; not those that are being written."""
    for shard in os.scandir(folder):
        if _SHARD.fullmatch(shard.name) and shard.is_dir():
            yield from (Path(entry.path) for entry in os.scandir(shard.path) if _ENTRY.fullmatch(entry.name))


# whose a folder is


def _open(folder: Path, teacher: Teacher, dataset: DatasetIdentity, owner: bytes, key: str) -> None:
    """Makes `folder` the cache of this teacher and data set, or raises ValueError; removes what is stale."""
    description = {"format": _FORMAT, "version": _VERSION, "teacher": _teacher(teacher), "data": asdict(dataset)}
    held = _held(folder, key)
    stale = _require_same(held, description, folder, key) if isinstance(held, dict) else held
    if stale:
        logger.warning(f"{key}: the outputs in '{folder}' are stale ({stale}): rebuilding the cache")
        # Before cache.json changes: a crash here leaves a cache that is still stale.
        _remove_others(folder, owner)
    if held != description:
        atomic_write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    logger.info(f"{key}: keeping the teacher's outputs in {folder.resolve()}")


def _teacher(teacher: Teacher) -> Dict[str, str]:
    return {
        "path": os.path.realpath(teacher.path),
        "content": teacher.content,
        "dtype": teacher.dtype,
        "operating_point": str(teacher.point),
    }


def _held(folder: Path, key: str) -> Any:
    """The description in cache.json (dict), or why it is to be written anew (text; empty for a new folder).

    Raises ValueError when the folder holds something else than a cache.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}: '{folder}' is a file; expected a folder")
    names = sorted(os.listdir(folder)) if folder.exists() else []
    reason = f"its {DESCRIPTION} is missing" if names else ""
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if DESCRIPTION in names:
        try:
            held = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        except ValueError:
            reason = f"its {DESCRIPTION} is damaged"
        else:
            if isinstance(held, dict) and held.get("format") == _FORMAT:
                is_known = held.get("version") == _VERSION and _is_complete(held)
                return held if is_known else f"its {DESCRIPTION} is of another version"
            foreign.append(DESCRIPTION)
    if foreign:
        raise ValueError(
            f"{key}: '{folder}' is no teacher cache: found '{foreign[0]}' in it; expected a new or empty folder, or "
            "one that an earlier run made; choose another"
        )
    return reason


def _is_complete(held: Dict[str, Any]) -> bool:
    sections = {"teacher": ("path", "content", "dtype", "operating_point"), "data": ("path", "content", "utterances")}
    return all(
        isinstance(held.get(section), dict) and set(keys) <= set(held[section]) for section, keys in sections.items()
    )


def _require_same(held: Dict[str, Any], description: Dict[str, Any], folder: Path, key: str) -> str:
    """Why the entries are stale, '' when they are not; raises ValueError when the cache is of something else."""
    other = f"choose another folder for {key}, or delete this one"
    was, now = held["teacher"], description["teacher"]
    changes = [
        f"{name}: {was[aspect]}, now {now[aspect]}" if aspect != "content" else name
        for aspect, name in (
            ("content", "the teacher's checkpoint file has changed"),
            ("dtype", "the teacher's dtype"),
            ("operating_point", "the teacher's operating point"),
        )
        if was[aspect] != now[aspect]
    ]
    if changes and was["path"] != now["path"]:
        raise ValueError(
            f"{key}: '{folder}' holds the outputs of another teacher, {_said(was)}; this run's is {_said(now)}; {other}"
        )
    was, now = held["data"], description["data"]
    if was["content"] != now["content"]:
        if was["path"] != now["path"]:
            raise ValueError(
                f"{key}: '{folder}' is for another data set, {was['path']} ({was['utterances']} utterances); this "
                f"run's is {now['path']} ({now['utterances']} utterances); {other}"
            )
        logger.warning(
            f"{key}: the training manifest of {now['path']} has changed since '{folder}' was made; outputs for audio "
            "that is still the same are used"
        )
    return "; ".join(changes)


def _said(teacher: Dict[str, str]) -> str:
    return f"{teacher['path']} ({teacher['content'][:12]}, {teacher['dtype']}, {teacher['operating_point']})"


def _remove_others(folder: Path, owner: bytes) -> None:
    """Deletes entries that another teacher wrote; a process that rebuilds at the same time keeps its new ones."""
    for path in _entries(folder):
        try:
            with path.open("rb") as file:
                start = file.read(_HEAD.size)
        except FileNotFoundError:
            continue
        if start[: len(_MAGIC) + len(owner)] != _MAGIC + owner:
            path.unlink(missing_ok=True)
