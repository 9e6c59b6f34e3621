"""Reading text files, and writing files so that a reader never sees a half-written one."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Collection, Iterator, Union


def read_utf8(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file; raises ValueError that names it where it is not UTF-8. A byte order mark is no part of it.

    encoding: "utf-8" keeps the mark, for what does not allow one.
    """
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None


@contextlib.contextmanager
def atomic_path(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` when the block succeeds.

    The temporary name keeps the suffix of `path` (writers that choose a format by suffix work).
    When the block raises, the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write_text(path: Union[str, Path], text: str) -> None:
    """Writes `text` (UTF-8) to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: Union[str, Path], names: Collection[str]) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which becomes `path` when the block succeeds.

    names: the files that the block may write. A folder that is there is replaced if it holds no others; raises
    ValueError, before the block, where it does, or where `path` is a file. When the block raises, the new folder is
    removed and `path` is left as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: a file, expected the name of a folder to write")
    others = sorted({entry.name for entry in path.iterdir()} - set(names)) if path.is_dir() else []
    if others:
        raise ValueError(
            f"{path}: the folder holds '{others[0]}' and would be replaced; expected a new or empty folder, or an "
            "earlier export: give another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        mask = _umask()
        temporary.chmod(0o777 & ~mask)
        yield temporary
        for entry in temporary.iterdir():  # some writers let nobody else read what they wrote
            entry.chmod(0o666 & ~mask)
        if path.is_dir():
            # a folder cannot be renamed onto one with files: the old one steps aside for the moment between
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
