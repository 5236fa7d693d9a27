"""The needed files out of a zip or tar archive, and nothing else."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pathlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

from vaecf.data import storage
from vaecf.errors import VaecfError

_CHUNK_BYTES = 1 << 20


def extract(
    archive: pathlib.Path, member: str, directory: pathlib.Path
) -> list[pathlib.Path]:
    """Unpacks the needed files of a zip or tar archive, and nothing else.

    Args:
      archive: a ``.zip``, ``.tar`` or compressed tar file.
      member: path inside the archive; its last component may be a glob
        (``combined_data_*.txt``). Where the exact path is missing, files of
        that last component in any folder are taken.
      directory: created with the files in it, all or nothing. Only last
        components of the archive's paths are used as names, so an archive
        cannot write anywhere else.

    Returns:
      Paths of the unpacked files, in order of name.

    Raises:
      VaecfError: not an archive, a damaged one, or without such a member.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent)
    )
    try:
        with _open_archive(archive) as (names, opener):
            for name in _matching(names, member, archive):
                target = scratch / _basename(name)
                with opener(name) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK_BYTES)
                    storage.sync(sink)
        scratch.chmod(0o755)
        os.replace(scratch, directory)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise VaecfError(
            f"{archive}: damaged or not a zip or tar archive ({error}); move "
            "it away and run again, or pass --ratings=FILE"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(directory.iterdir())


def _basename(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _matching(
    names: list[str], member: str, archive: pathlib.Path
) -> list[str]:
    if member in names:
        return [member]
    pattern = _basename(member)
    found = [
        name
        for name in names
        if "\\" not in name and fnmatch.fnmatch(_basename(name), pattern)
    ]
    distinct = {_basename(name) for name in found}
    if not found or len(distinct) < len(found):
        problem = "several files" if found else "no file"
        raise VaecfError(
            f"{archive}: {problem} named {pattern} in the archive; unpack it "
            "yourself and pass --ratings=FILE"
        )
    return found


@contextlib.contextmanager
def _open_archive(
    path: pathlib.Path,
) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """Names of the regular files in an archive, and how to open one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
            yield names, archive.open
        return
    with tarfile.open(path) as tar:
        members = {m.name: m for m in tar.getmembers() if m.isfile()}

        def opener(name: str) -> IO[bytes]:
            file = tar.extractfile(members[name])
            assert file is not None  # regular files only, see above
            return file

        yield list(members), opener
