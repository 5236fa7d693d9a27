"""Atomic writes, and files that know their digests.

A file or directory is written to a temporary neighbour, ``.NAME.tmp-...``,
which takes its place at the end: after a crash there is the old one or the new
one. The next writer removes what killed processes left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vaecf.errors import VaecfError, short

# The name of a temporary neighbour of a file or directory.
_NEIGHBOUR = re.compile(r"\.(.+)\.(?:tmp|old)-[0-9a-f]{16}")
_UNFINISHED_CHECKPOINT = re.compile(r".+\.orbax-checkpoint-tmp.*")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def user_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path that a user gave; '~' is the home directory.

    All other characters, '*', '?' and '[' too, stand for themselves.

    Raises:
      VaecfError: no path, an empty one, or no such home directory.
    """
    is_path = isinstance(path, (str, os.PathLike)) and str(path)
    if not is_path or "\0" in str(path):
        raise VaecfError(
            f"{short(path)} is no path: name a file or a directory"
        )
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise VaecfError(f"{path}: {error}; write the whole path") from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path whose file replaces `path` at the end.

    The temporary file is flushed to the disk before it is renamed, so `path`
    always holds a whole file: the old one until the block succeeds. Parent
    directories are created.

    Raises:
      VaecfError: the file cannot be written.
    """
    target = pathlib.Path(path)
    with _neighbour(target, pathlib.Path.touch) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces a file atomically; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def scratch_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory beside `target`, which is removed at the end.

    Raises:
      VaecfError: the disk or the permissions do not allow it.
    """
    with _neighbour(target, pathlib.Path.mkdir) as scratch:
        yield scratch


@contextlib.contextmanager
def atomic_directory(
    directory: pathlib.Path, *, replace: bool = True
) -> Iterator[pathlib.Path]:
    """Yields a new directory to fill, which replaces `directory` at the end.

    The new files are flushed to the disk first. If the block raises or the
    process is killed, `directory` stays as it is.

    Args:
      replace: False if `directory` must be missing or empty at the end.

    Raises:
      VaecfError: the disk or the permissions do not allow it, or another
        process is writing the directory, or has written it.
    """
    target = pathlib.Path(os.path.realpath(directory))
    with _neighbour(target, pathlib.Path.mkdir, alone=True) as fresh:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        try:
            os.rename(fresh, target)  # also onto an empty directory
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not replace:
                raise VaecfError(
                    f"another process has written {directory} meanwhile: "
                    "choose another directory"
                ) from None
            _exchange(fresh, target)
        _sync(target.parent)


def _exchange(fresh: pathlib.Path, target: pathlib.Path) -> None:
    """Exchanges two directories, so that `target` exists at every moment."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux
    paths = _AT_FDCWD, os.fsencode(fresh), _AT_FDCWD, os.fsencode(target)
    if renameat2 and renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return
    # NFS and some other file systems cannot exchange. If the process is killed
    # between the renames, `recover` puts the old directory back.
    old = target.with_name(fresh.name.replace(".tmp-", ".old-"))
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, fresh)


def recover(directory: pathlib.Path) -> None:
    """Puts back a directory that a killed process had moved aside."""
    target = pathlib.Path(os.path.realpath(directory))
    for seconds in (1.0, 0.0):  # a live process needs far less
        old = [path for path in _neighbours(target) if ".old-" in path.name]
        if target.exists() or not old:
            return
        time.sleep(seconds)
    with contextlib.suppress(OSError):
        os.rename(old[0], target)


def remove_leftovers(directory: pathlib.Path, *, below: bool = False) -> None:
    """Removes what killed processes left beside a directory, or `below` it.

    Unfinished checkpoints have no locks: the caller of `below` holds that of
    the workdir.
    """
    target = pathlib.Path(os.path.realpath(directory))
    for path in [*target.rglob("*")] if below else _neighbours(target):
        patterns = _NEIGHBOUR, _UNFINISHED_CHECKPOINT
        if any(pattern.fullmatch(path.name) for pattern in patterns):
            _remove_leftover(path)


@contextlib.contextmanager
def _neighbour(
    target: pathlib.Path,
    make: Callable[[pathlib.Path], None],
    *,
    alone: bool = False,
) -> Iterator[pathlib.Path]:
    """Makes a temporary neighbour of `target`; removes it at the end.

    Those of killed processes are removed, too. A lock tells that this process
    is alive. With `alone`, no other process may have a neighbour.
    """
    mine, locks = target, contextlib.ExitStack()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            mark = secrets.token_hex(8)
            mine = target.with_name(f".{target.name}.tmp-{mark}")
            make(mine)
            with contextlib.suppress(OSError):  # NFS locks no directories
                lock = os.open(mine, os.O_RDONLY)
                locks.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if mine.exists():  # else another process took it for a leftover
                break
        others = [path for path in _neighbours(target) if path != mine]
        removed = [_remove_leftover(path) for path in others]
        if alone and not all(removed):
            raise VaecfError(
                f"another process is writing {target}: wait for that process, "
                "or choose another directory"
            )
        yield mine
    except VaecfError:
        raise
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        raise VaecfError(
            f"cannot write {target}: {reason}; free space or choose another "
            "path"
        ) from error
    finally:
        if mine != target:
            _remove(mine)
        locks.close()


def _neighbours(target: pathlib.Path) -> list[pathlib.Path]:
    with contextlib.suppress(OSError):
        names = os.listdir(target.parent)
        matches = [match for n in names if (match := _NEIGHBOUR.fullmatch(n))]
        same = [match[0] for match in matches if match[1] == target.name]
        return [target.with_name(name) for name in sorted(same)]
    return []


def _remove_leftover(path: pathlib.Path) -> bool:
    """Removes a temporary neighbour unless a live process holds its lock.

    Returns False if a live process does.
    """
    name = _NEIGHBOUR.fullmatch(path.name)
    if ".old-" in path.name and name and not path.with_name(name[1]).exists():
        return True  # `recover` needs it
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return True  # the other process has finished
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks: nobody can know
        pass
    finally:
        os.close(lock)
    return True


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def refusal(error: Exception) -> str | None:
    """Returns why the operating system refused; None for other errors.

    NumPy, polars and tensorstore have their own ways to say it.
    """
    full = r"requested and \d+ written|RESOURCE_EXHAUSTED: Error writing"
    if re.search(full, str(error)):
        return os.strerror(errno.ENOSPC)
    if number := re.search(r"\bOS error (\d+)", str(error), re.IGNORECASE):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return None


def write_json(path: pathlib.Path, value: Any, *, digest: bool = False) -> None:
    """Writes a JSON file atomically; NaN and infinity are refused.

    With `digest`, an object gets the entry ``sha256``, that of the other
    entries, which `read_json` checks and removes.
    """
    if digest:
        value = {**value, "sha256": json_sha256(value)}
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      VaecfError: the file is missing, not JSON, or not as it was written.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        reason = str(error.strerror).lower()  # such as 'no such file or ...'
        raise VaecfError(
            f"{path}: {reason}; is its directory the workdir of a run?"
        ) from None
    except (ValueError, RecursionError) as error:
        raise VaecfError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict) or not value:
        return value
    # Damage can also rename the entry, which is the last one.
    name = "sha256" if "sha256" in value else next(reversed(value))
    rest = {key: x for key, x in value.items() if key != name}
    try:
        is_right = value[name] == json_sha256(rest)
    except RecursionError:
        raise VaecfError(f"{path}: not JSON (nested too deep)") from None
    if is_right == (name == "sha256"):
        return rest if is_right else value  # an earlier version wrote `value`
    raise VaecfError(
        f"{path}: damaged, or changed since it was written; restore the file, "
        f"or remove its entry {name!r} to use it as it is"
    )


def json_sha256(value: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of an object as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    """Makes a file's bytes, or renames within a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
