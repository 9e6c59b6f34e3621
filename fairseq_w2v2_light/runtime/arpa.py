"""Checks n-gram files before KenLM opens them: ARPA text line by line, of binary files what can be checked."""

from __future__ import annotations

import gzip
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, List, Optional, Sequence, Tuple, Union

MAX_ORDER = 6
_GZIP = b"\x1f\x8b"
_BINARY = b"mmap lm http://kheafield.com/code format version"
_BINARY_VERSION = b" 5\n\0"
# what stands at the start of a binary file after its name: numbers that show how the machine which wrote it lays out
# memory (KenLM compares them itself), then order, probing multiplier, kind, whether it has words, version, counts
_SANITY_BYTES = 88
_PARAMETERS = struct.Struct("<B3xfI?3xI")
_KINDS = 6
_LONGEST_LINE = 1 << 20

PathLike = Union[str, Path]


@dataclass(frozen=True)
class NgramFile:
    """What an n-gram file says of itself.

    order: of the n-gram. binary: whether it is KenLM's memory image. words: its vocabulary without <s>, </s> and <unk>,
    in the file's order; None where the file does not tell (a binary file may have been built without the words).
    """

    order: int
    binary: bool
    words: Optional[Tuple[str, ...]]


def check_ngram_file(path: PathLike) -> NgramFile:
    """Reads an ARPA file (also gzipped), or the header of a KenLM binary file, and makes sure that KenLM can load it.

    Raises FileNotFoundError when the file is missing, and ValueError that names the file, the line and what was
    expected there. A binary file is an image of memory: its header is checked, its inside cannot be.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: found a folder, expected an n-gram file: ARPA text or KenLM's binary format")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such language model; expected an ARPA file or a KenLM binary file")
    with open(path, "rb") as file:
        start = file.read(len(_BINARY))
        file.seek(0)
        if start == _BINARY:
            return _check_binary(file, path)
        if not start.startswith(_GZIP):
            return _ArpaReader(file, path).read()
    try:
        with gzip.open(path) as unpacked:
            return _ArpaReader(unpacked, path).read()
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); pack or copy it again") from None


class _ArpaReader:
    """Reads an ARPA file once, front to back.

    Form: `\\data\\`, a line `ngram N=COUNT` an order, then for each order `\\N-grams:` and as many lines of
    `log10 probability, N words, back-off weight` (none in the highest order), then `\\end\\`.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.number = file, path, 0

    def read(self) -> NgramFile:
        counts = self._counts()
        words: List[str] = []
        for order, count in enumerate(counts, start=1):
            self._section(order, count, last=order == len(counts), words=words)
        line = self._next_line("\\end\\")
        if line != b"\\end\\":
            raise self._error(line, "\\end\\")
        known = set(words)
        if len(known) != len(words):
            raise ValueError(f"{self.path}: a word stands twice among its 1-grams")
        for symbol in ("<s>", "</s>"):
            if symbol not in known:
                raise ValueError(
                    f"{self.path}: its 1-grams lack {symbol}; expected an n-gram of sentences with <s> and </s>"
                )
        return NgramFile(len(counts), False, _vocabulary(words))

    def _counts(self) -> List[int]:
        line = self._next_line("\\data\\")
        if line != b"\\data\\":
            raise ValueError(
                f"{self.path}:{self.number}: not an n-gram file: found {_shown(line)}, expected ARPA text that begins "
                "with \\data\\, or KenLM's binary format"
            )
        counts: List[int] = []
        while True:
            line = self._line()
            if line is None or not line.strip():
                break
            order = len(counts) + 1
            found = re.fullmatch(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,15})", line.strip())
            if found is None or int(found.group(1)) != order:
                raise self._error(line, f"ngram {order}=COUNT")
            counts.append(int(found.group(2)))
        if not counts or counts[0] < 1:
            raise ValueError(f"{self.path}:{self.number}: found no 1-grams, expected a line `ngram 1=COUNT`")
        if not 2 <= len(counts) <= MAX_ORDER:
            raise ValueError(
                f"{self.path}: an n-gram of order {len(counts)}; KenLM, as it is packaged, takes 2 to {MAX_ORDER}"
            )
        return counts

    def _section(self, order: int, count: int, last: bool, words: List[str]) -> None:
        title = f"\\{order}-grams:"
        line = self._next_line(title)
        if line != title.encode():
            raise self._error(line, title)
        # a count that lies would have KenLM reserve memory for it
        for seen in range(count + 1):
            line = self._line()
            if line is None or not line.strip() or line.startswith(b"\\"):
                if seen == count and line is not None and not line.strip():
                    return
                where = "the end of the file" if line is None else "the end of the section"
                raise ValueError(
                    f"{self.path}:{self.number}: found {where} after {seen} {order}-grams, expected "
                    f"{'an empty line' if seen == count else count}; the file is cut off, or its header is wrong"
                )
            if seen == count:
                raise ValueError(
                    f"{self.path}:{self.number}: found more than the {count} {order}-grams that the header counts"
                )
            fields = line.split()
            if len(fields) != order + 1 and (last or len(fields) != order + 2):
                expected = "" if last else "[, back-off weight]"
                raise self._error(line, f"log10 probability, {order} word{'s' * (order > 1)}{expected}")
            self._check_number(fields[0], line, at_most=0.0)
            if len(fields) == order + 2:
                self._check_number(fields[-1], line, at_most=math.inf)
            if order == 1:
                try:
                    words.append(fields[1].decode("utf-8"))
                except UnicodeDecodeError:
                    raise self._error(fields[1], "a word in UTF-8") from None

    def _check_number(self, field: bytes, line: bytes, at_most: float) -> None:
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        # float() reads `1_0`, `nan` and `infinity`, KenLM does not; -inf is no number to go on adding with
        if not math.isfinite(value) or value > at_most or b"_" in field:
            what = "a log10 probability of 0 or less" if at_most == 0 else "a finite back-off weight"
            raise self._error(field, f"{what} in {_shown(line)}")

    def _next_line(self, expected: str) -> bytes:
        """The next line that is not empty, without white space around it."""
        while True:
            line = self._line()
            if line is None:
                raise ValueError(f"{self.path}:{self.number}: the file ends here, expected {expected}; it is cut off")
            if line.strip():
                return line.strip()

    def _line(self) -> Optional[bytes]:
        line = self.file.readline(_LONGEST_LINE)
        if not line:
            return None
        self.number += 1
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"{self.path}:{self.number}: not an n-gram file: a line is longer than {_LONGEST_LINE}")
        if b"\0" in line:
            raise ValueError(f"{self.path}:{self.number}: not an n-gram file: found a zero byte in a line of text")
        return line

    def _error(self, found: bytes, expected: str) -> ValueError:
        return ValueError(f"{self.path}:{self.number}: found {_shown(found)}, expected {expected}")


def _check_binary(file: BinaryIO, path: Path) -> NgramFile:
    remedy = "build it again from the ARPA file with KenLM's build_binary"
    header = file.read(_SANITY_BYTES + _PARAMETERS.size)
    version = header[len(_BINARY) :]
    if not version.startswith(_BINARY_VERSION):
        found = version.split(b"\n")[0].decode("ascii", "replace").strip()
        raise ValueError(f"{path}: KenLM's binary format of version {found[:8]!r}, expected 5; {remedy}")
    if len(header) < _SANITY_BYTES + _PARAMETERS.size:
        raise ValueError(f"{path}: a KenLM binary file that is cut off in its header; {remedy}")
    order, multiplier, kind, has_vocabulary, _ = _PARAMETERS.unpack(header[_SANITY_BYTES:])
    counts_bytes = file.read(8 * order)
    if not 2 <= order <= MAX_ORDER or len(counts_bytes) < 8 * order:
        raise ValueError(f"{path}: a KenLM binary file of order {order}, expected 2 to {MAX_ORDER}; {remedy}")
    counts = struct.unpack(f"<{order}Q", counts_bytes)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # every n-gram takes more than a bit in any of the formats
        if kind >= _KINDS or not 1.0 < multiplier < 1000.0 or sum(counts) > 8 * len(content) or counts[0] < 1:
            raise ValueError(f"{path}: a KenLM binary file with a damaged header; {remedy}")
        return NgramFile(order, True, _stored_words(content, counts[0]) if has_vocabulary else None)


def _stored_words(content: mmap.mmap, count: int) -> Optional[Tuple[str, ...]]:
    """The words at the end of a binary file, in the order of their indices; that of <unk> is 0."""
    start = content.rfind(b"<unk>\0")
    words = content[start:].split(b"\0") if start >= 0 else []
    # a model whose ARPA file had no <unk> got it as one more word
    if len(words) - 1 not in (count, count + 1) or words[-1]:
        return None
    try:
        return _vocabulary([word.decode("utf-8") for word in words[:-1]])
    except UnicodeDecodeError:
        return None


def _vocabulary(words: Sequence[str]) -> Tuple[str, ...]:
    return tuple(word for word in words if word not in ("<s>", "</s>", "<unk>", "<UNK>"))


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    return repr(text if len(text) <= 60 else text[:57] + "...")
