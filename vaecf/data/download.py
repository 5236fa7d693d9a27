"""Downloads and unpacks files: resumable, mirrored, checked, atomic.

A file is either absent or complete. Bytes arrive in a ``.part`` file beside
the destination, which is renamed only after its digest is right.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import http.client
import os
import pathlib
import re
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

from vaecf import workdir as workdir_lib
from vaecf.errors import VaecfError

_CHUNK_BYTES = 1 << 20
_IDLE_ATTEMPTS = 3  # consecutive attempts without a byte before giving up
_ATTEMPTS = 100  # attempts at one source, however much they bring
_PAUSE_SECONDS = 0.5  # doubled after each attempt without a byte
_TIMEOUT_SECONDS = 30.0  # of silence, after which a connection is dropped
_SAFE = ("https://",)  # addresses whose bytes need no checksum
_MAX_BYTES = 16 * 2**30  # of a download
# What the files of an archive may take: this, or so many times its own size.
# (Text of ratings shrinks to a third or a tenth.)
_MAX_UNPACKED_BYTES, _MAX_EXPANSION = 2**30, 100


class Digest(NamedTuple):
    """A checksum as its publisher states it: algorithm name and hex value."""

    algorithm: str
    value: str


class _SourceError(Exception):
    """One source did not give the file; the text is the reason."""


def user_cache_dir() -> pathlib.Path:
    """Returns ``$VAECF_CACHE``, or the platform's directory for caches."""
    if given := os.environ.get("VAECF_CACHE"):
        return pathlib.Path(given).expanduser()
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("vaecf"))


def download(
    urls: Sequence[str],
    destination: pathlib.Path,
    *,
    digest: Digest | None = None,
) -> None:
    """Downloads one file from the first of `urls` that has it.

    Does nothing if `destination` exists and its digest is right. An interrupted
    download is resumed, in this call or in a later one, as long as the server
    still offers the same file. A file with the wrong digest is kept under the
    suffix ``.mismatch``, and the next address is tried. Without a digest, only
    https is accepted, and only from servers that tell the file's length.

    Raises:
      VaecfError: no source gave the file (names each with its reason), or an
        existing `destination` has another digest.
    """
    if destination.exists():
        if problem := _wrong_digest(destination, digest):
            raise VaecfError(
                f"{destination}: {problem}; move the file away and run again, "
                "or pass ratings=FILE"
            )
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in urls:
        # One part per address, so that bytes of two servers are never joined.
        tag = hashlib.sha256(url.encode()).hexdigest()[:8]
        part = destination.with_name(f"{destination.name}.{tag}.part")
        try:
            _download_one(url, part, digest is not None)
        except _SourceError as error:
            reasons.append(f"{url} ({error})")
            continue
        _validator_path(part).unlink(missing_ok=True)
        problem = _wrong_digest(part, digest)
        if problem is None:
            os.replace(part, destination)
            return
        kept = destination.with_name(destination.name + ".mismatch")
        os.replace(part, kept)
        reasons.append(f"{url} ({problem}; kept as {kept})")
    raise VaecfError(
        f"{destination.name} could not be downloaded from "
        f"{'; '.join(reasons)}. Get it elsewhere and place it at "
        f"{destination}, or pass ratings=FILE"
    )


def _wrong_digest(path: pathlib.Path, digest: Digest | None) -> str | None:
    if digest is None:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, digest.algorithm).hexdigest()
    if found == digest.value:
        return None
    return f"{digest.algorithm} {found}, but the publisher gives {digest.value}"


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _validator_path(part: pathlib.Path) -> pathlib.Path:
    """Returns the path of the server's ETag or date of the file."""
    return part.with_name(part.name + ".validator")


def _download_one(url: str, part: pathlib.Path, checked: bool) -> None:
    """Completes `part`; resumes as often as the connection is cut."""
    idle, pause = 0, _PAUSE_SECONDS
    for attempt in range(_ATTEMPTS):
        before = _size(part)
        try:
            _request(url, part, checked)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            idle = 0 if _size(part) > before else idle + 1
            last = idle >= _IDLE_ATTEMPTS or attempt == _ATTEMPTS - 1
            if last or _is_final(error):
                raise _SourceError(_reason(error)) from error
            if idle:
                time.sleep(pause)
                pause *= 2


def _request(url: str, part: pathlib.Path, checked: bool) -> None:
    """Sends one request and appends the missing bytes to `part`."""
    _require_safe(url, checked)
    offset, validator = _size(part), ""
    if _validator_path(part).exists():
        validator = _validator_path(part).read_text()
    headers = {"User-Agent": "vaecf", "Accept-Encoding": "identity"}
    # Without a validator only a checksum can tell that a file changed between
    # its two halves.
    if offset and (validator or checked):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(
            request, timeout=_TIMEOUT_SECONDS, context=_tls_context()
        )
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = _range_total(error.headers.get("Content-Range"))
        error.close()
        if total == offset:
            return  # an earlier call had every byte
        part.unlink()
        raise OSError("the server's file is shorter than our part") from error
    with response:
        _require_safe(response.url, checked)  # after redirections
        _append(response, part, offset, checked)


def _require_safe(url: str, checked: bool) -> None:
    if not checked and not url.startswith(_SAFE):
        raise ValueError(f"{url.split(':')[0]} without a checksum is not safe")


def _append(
    response: http.client.HTTPResponse,
    part: pathlib.Path,
    offset: int,
    checked: bool,
) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"the server sent the file in encoding {encoding!r}")
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        content_range = response.headers.get("Content-Range", "")
        total = _range_total(content_range)
        if not re.match(rf"bytes {offset}-", content_range):
            part.unlink(missing_ok=True)
            raise OSError(f"unexpected range {content_range!r}")
    else:
        offset = 0
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        part.unlink(missing_ok=True)
        etag = response.headers.get("ETag") or ""
        if etag.startswith("W/"):  # If-Range takes no weak tags
            etag = ""
        _validator_path(part).write_text(
            etag or response.headers.get("Last-Modified") or ""
        )
    if total is None and not checked and not response.chunked:
        raise ValueError(
            "neither its length nor a checksum is known, so that a file that "
            "was cut could not be told from a whole one"
        )
    with part.open("ab") as file:
        while max(offset, total or 0) <= _MAX_BYTES:
            if not (chunk := response.read(_CHUNK_BYTES)):
                break
            file.write(chunk)
            offset += len(chunk)
        else:
            file.truncate(0)
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        file.flush()
        os.fsync(file.fileno())
    if total is not None and offset != total:
        raise OSError(f"connection cut at {offset} of {total} bytes")


def _is_final(error: Exception) -> bool:
    """Returns whether asking the same server again is pointless."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 416, 429)
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, TimeoutError)
    return isinstance(error, ValueError)  # not an address, or refused


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, urllib.error.URLError):
        text = str(error.reason)
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {error.reason}"
    return " ".join(text.split()) or type(error).__name__


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    # Some Pythons ship no root certificates; certifi has them.
    with contextlib.suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _range_total(content_range: str | None) -> int | None:
    found = re.search(r"/(\d+)$", content_range or "")
    return int(found.group(1)) if found else None


# --- Archives ---------------------------------------------------------------


def extract(
    archive: pathlib.Path, member: str, directory: pathlib.Path
) -> list[pathlib.Path]:
    """Unpacks the wanted files of a zip archive, and nothing else.

    Args:
      member: path inside the archive; its last component may be a glob
        (``combined_data_*.txt``). If the exact path is missing, files with
        that last component in any folder are taken.
      directory: new directory for the files, written atomically. Only the last
        components of paths are used, so that no file is written elsewhere.

    Returns:
      Paths of the unpacked files in order of name.

    Raises:
      VaecfError: not an archive, damaged, without such a member, or its files
        are far larger than the archive lets expect.
    """
    try:
        left = _MAX_EXPANSION * archive.stat().st_size
        left = max(left, _MAX_UNPACKED_BYTES)
        with (
            workdir_lib.atomic_directory(directory) as fresh,
            zipfile.ZipFile(archive) as opened,
        ):
            names = [i.filename for i in opened.infolist() if not i.is_dir()]
            for name in _matching(names, member, archive):
                target = fresh / _basename(name)
                with opened.open(name) as source, target.open("wb") as sink:
                    while chunk := source.read(_CHUNK_BYTES):
                        if (left := left - len(chunk)) < 0:
                            raise VaecfError(
                                f"{archive}: {name} unpacks to more than "
                                f"{_MAX_EXPANSION} times the archive's size; "
                                "unpack it yourself and pass ratings=FILE"
                            )
                        sink.write(chunk)
    except VaecfError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many kinds
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise VaecfError(
            f"{archive}: damaged or not a zip archive ({reason}); move it away "
            "and run again, or pass ratings=FILE"
        ) from error
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
    if not found or len({_basename(name) for name in found}) < len(found):
        problem = "several files" if found else "no file"
        raise VaecfError(
            f"{archive}: {problem} named {pattern} in the archive; unpack it "
            "yourself and pass ratings=FILE"
        )
    return found
