"""Files: written whole or not at all. Every file that this project leaves behind is written here."""

import errno
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open: no lock is needed there
    fcntl = None

_LONGEST = 200  # bytes of a name to which more is added; file systems allow 255


@contextmanager
def replacing(path: str | Path) -> Generator[BinaryIO, None, None]:
    """A file to write, which takes the place of `path` when the context ends without an error.

    It is written beside `path` under a name of its own, flushed to the disk and renamed. So a reader sees the
    old content or the new one, whoever else writes, and also if a process is killed or the disk is full. An
    error leaves the old file and nothing else. What a killed writer left is removed by the next one that
    writes to the same path. Where `path` is a symbolic link, the file that it points to is replaced. A file
    that is there keeps its permissions (and, where that is allowed, its owner); a new one gets those that the
    umask leaves.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "answer")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"42")
    >>> path.read_bytes(), [its.name for its in path.parent.iterdir()]
    (b'42', ['answer'])

    Args:
        path: the file to write, in a folder that exists.

    Raises:
        OSError: when `path` cannot be written: its folder is missing, say, or it is a folder or a device.
    """
    target = os.path.realpath(path)
    there = _there(target)
    _clean(target)
    file, beside = _open(target, 0o666 if there is None else there.st_mode & 0o777)
    try:
        with file:
            if there is not None:
                _dress(beside, there)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(beside, target)  # while it is locked, so that nobody takes it for litter
        if fcntl is None:
            os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    _sync_folder(target)


def write(path: str | Path, content: str | bytes) -> None:
    """Replace a file by this content, whole or not at all; text as UTF-8, line ends as they are.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _there(target: str) -> os.stat_result | None:
    """What is at the target already: a regular file that may be written, or nothing."""
    try:
        there = os.stat(target)
    except FileNotFoundError:
        return None
    code = 0
    if stat.S_ISDIR(there.st_mode):
        code = errno.EISDIR
    elif not stat.S_ISREG(there.st_mode):
        code = errno.EINVAL  # a device or a pipe: a rename would remove it
    elif not os.access(target, os.W_OK):
        code = errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), target)
    return there


def _beginning(target: str) -> str:
    """What the names of all unfinished files of a target begin with."""
    name = os.path.basename(target)
    encoded = os.fsencode(name)
    return f".{name if len(encoded) <= _LONGEST else sha256(encoded).hexdigest()}."


def _open(target: str, mode: int) -> tuple[BinaryIO, str]:
    """A new file beside the target, which nobody else has, locked as long as it is open."""
    while True:
        name = f"{_beginning(target)}{secrets.token_hex(8)}.tmp"
        beside = os.path.join(os.path.dirname(target), name)
        try:
            number = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), mode)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), target) from error
        file = os.fdopen(number, "wb")
        if _lock(number) and os.path.exists(beside):
            return file, beside
        file.close()  # somebody who cleans up was faster than the lock
        with suppress(OSError):
            os.unlink(beside)


def _lock(number: int) -> bool:
    """Lock an open file, unless its writer holds it; where nothing can be locked, nobody cleans up."""
    if fcntl is not None:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _clean(target: str) -> None:
    """Remove what writers of this target left when they were killed: what nobody holds the lock of."""
    folder, beginning = os.path.dirname(target), _beginning(target)
    with suppress(OSError):
        for name in os.listdir(folder):
            unique = name.removeprefix(beginning).removesuffix(".tmp")
            if len(unique) != 16 or name != f"{beginning}{unique}.tmp":
                continue
            with suppress(OSError), open(os.path.join(folder, name), "r+b") as file:
                if fcntl is None:
                    file.close()
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, name))


def _dress(beside: str, there: os.stat_result) -> None:
    """Give a new file the owner, where that is allowed, and the permissions of the one it replaces."""
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(beside, there.st_uid, there.st_gid)
    os.chmod(beside, stat.S_IMODE(there.st_mode))


def _sync_folder(target: str) -> None:
    """Make the new name last through a loss of power, where folders can be flushed."""
    with suppress(OSError):
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


_MAGIC, _DIRECTORY = b"PK", 0x10  # how a zip archive begins, and an attribute of what is in it


def is_archive(path: Path) -> bool:
    """Whether a file begins as `torch.save` begins one; old versions of torch wrote others."""
    with path.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def check_archive(path: Path) -> None:
    """Make sure that all in a file of `torch.save` is as it was written; torch itself compares no checksums.

    Raises:
        zipfile.BadZipFile: when it is not.
    """
    with path.open("rb") as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                _check_contents(archive)
        except (OSError, zlib.error) as error:  # of places and lengths that the file does not have
            raise zipfile.BadZipFile(str(error)) from error


def _check_contents(archive: zipfile.ZipFile) -> None:
    if torch.serialization.get_crc32_options() and (broken := archive.testzip()):
        raise zipfile.BadZipFile(f"the checksum of {broken} is another")
    # Of what is marked as a directory torch reads nothing, and gives whatever the memory holds.
    if marked := [entry.filename for entry in archive.infolist() if entry.external_attr & _DIRECTORY]:
        raise zipfile.BadZipFile(f"{marked[0]} is marked as a directory")
