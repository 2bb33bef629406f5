"""Atomic writes of files and folders, and locks of folders.

The temporary files of a killed run are removed by the next run that writes to the same path: their
names hold the host and the process that made them.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator

# Error numbers of a full file system, and their texts in the errors of libraries.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = tuple(os.strerror(number) for number in FULL)
_LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder, which replaces `path` after the block.

    If the block fails, or the disk is full, `path` is unchanged and the temporary file is removed;
    an OSError names `path`.
    """
    _remove_leftovers(path)
    temporary = _temporary(path, "tmp")
    try:
        with _naming(path, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Like `replacing`, for a folder: all of its files appear together or not at all.

    A folder that a killed run had renamed, and not yet replaced, is restored first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if path.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            os.replace(leftover, path)
    _remove_leftovers(path)
    temporary, old = _temporary(path, "tmp"), _temporary(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _naming(path, temporary):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def allocate(path: pathlib.Path, size: int) -> None:
    """Makes a file of zeros, to be mapped into memory, with all of its space allocated.

    A sparse file would allocate space when it is written through the map, where a full disk ends
    the process (SIGBUS).
    """
    with open(path, "wb") as file:
        if not size:
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            # Some systems and file systems cannot.
            unable = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
            if isinstance(error, OSError) and error.errno not in unable:
                raise OSError(error.errno, error.strerror, str(path)) from error
            zeros = bytes(2**20)
            for start in range(0, size, len(zeros)):
                file.write(zeros[: size - start])


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder against other runs while the block runs; creates it if it is missing.

    The lock ends with the process, even one that is killed. A folder that was created here and is
    empty at the end is removed. An OSError means that another process has claimed it, or that it
    cannot be written to.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    except BlockingIOError as error:
        raise OSError(
            f"{folder}: another run is at work here ({_holder(folder)}); wait for it, or give "
            "another folder"
        ) from error
    except OSError as error:
        if is_full(error):
            raise
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # one that is not empty
            for parent in created:
                parent.rmdir()


def check_writable(folder: pathlib.Path) -> None:
    """Checks that files can be written to a folder, or that it could be created."""
    parents = (folder, *folder.absolute().parents)
    nearest = next(parent for parent in parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"0")
    except OSError as error:
        raise _unwritable(folder, error) from error


def is_full(error: BaseException) -> bool:
    """Whether an error means that a disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(text in str(error) for text in FULL_TEXTS)


def slug(text: str) -> str:
    """A text for a file's name: all characters but letters and digits become dashes."""
    return "".join(c if c.isalnum() else "-" for c in text)


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text in UTF-8, whatever the locale, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _temporary(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{suffix}")


def _host() -> str:
    return slug(socket.gethostname())


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes temporary files of `path` whose process, on this host, has ended.

    Processes of other hosts may still run.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_host())}\.(\d+)\.tmp")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        match = pattern.fullmatch(leftover.name)
        if match is None or _runs(int(match[1])):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _naming(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[None]:
    """Turns errors about a temporary file, or about no named file, into errors about `path`."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else os.fsdecode(error.filename)
        if error.errno is not None and (not where or where.startswith(str(temporary))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        # NumPy's message on a full disk, which has no number: "9000 requested and 2484 written".
        if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    except Exception as error:
        if is_full(error):  # safetensors'
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _lock(folder: pathlib.Path) -> int:
    path = folder / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            # A file system without locks keeps no process out.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(descriptor)
                raise
        # The former holder may have removed the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return descriptor


def _holder(folder: pathlib.Path) -> str:
    try:
        return (folder / _LOCK).read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "unknown"


def _unwritable(folder: pathlib.Path, error: OSError) -> OSError:
    if is_full(error):
        return OSError(error.errno, error.strerror, str(folder))
    return OSError(f"{folder}: nothing can be written here ({error.strerror}); give another folder")
