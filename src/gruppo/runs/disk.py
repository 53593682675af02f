"""Files appear whole or not at all: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gruppo.types import GruppoError


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """An operating system's refusal as a sentence: full, read-only, not allowed, a file in the way."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GruppoError(f"the disk is full: {path} could not be written; free some space and resume the run") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GruppoError(
                f"{where} cannot be written ({os.strerror(error.errno)}); choose a folder of yours with --folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise GruppoError(f"{where} is a file, so no folder can be made there; choose another with --folder") from error
        raise


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed onto it when the block succeeds and removed when it does not."""
    temporary = target.parent / f".{target.name}.partial"
    with disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary) if temporary.is_dir() else (temporary,):
                _flush(file)
            if target.is_dir():  # a folder cannot be renamed onto another one
                _remove(old := target.parent / f".{target.name}.old.partial")
                target.rename(old)
                temporary.rename(target)
                _remove(old)
            else:
                temporary.replace(target)
            _flush(target.parent)
        except BaseException:
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
