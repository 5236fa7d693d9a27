"""Whole-file writes that are seen complete or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile

from vaecf.errors import VaecfError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces `path` by a file holding `data`, creating its parents.

    The bytes go to a temporary sibling that is flushed to the disk and then
    renamed, so that a reader or a crash sees the old file or the new one.

    Raises:
      VaecfError: the file cannot be written.
    """
    target = pathlib.Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{target.name}.", dir=target.parent
        )
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide a report from the user's colleagues.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise VaecfError(
            f"cannot write {target}: {error.strerror}; "
            "free space or choose another path"
        ) from error
    finally:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    # The process's umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
