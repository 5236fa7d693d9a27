"""Downloads that survive a bad line: resumed, mirrored, checked, atomic.

Nothing here knows which datasets exist (`vaecf.data.catalog` does). A file
is either absent or complete: bytes arrive in a ``.part`` file beside the
destination, which is renamed only after its size and digest are right.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import pathlib
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vaecf.data import storage
from vaecf.errors import VaecfError

Progress = Callable[[int, int | None], None]  # (bytes so far, total or None)

_CHUNK_BYTES = 1 << 20
_IDLE_ATTEMPTS = 3  # attempts in a row that bring no byte before we move on
_ATTEMPTS = 100  # attempts at one source, however much they bring
_PAUSE_SECONDS = 0.5  # doubled after each attempt that brought nothing


class Digest(NamedTuple):
    """A checksum as its publisher states it: algorithm name and hex value."""

    algorithm: str
    value: str


class _Failure(Exception):
    """One source did not give the file; the text is the reason."""


def user_cache_dir() -> pathlib.Path:
    """Directory for downloads: ``$VAECF_CACHE``, else the platform's own."""
    given = os.environ.get("VAECF_CACHE")
    if given:
        return pathlib.Path(given).expanduser()
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("vaecf"))


def file_digest(path: pathlib.Path, algorithm: str) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(
    urls: Sequence[str],
    destination: pathlib.Path,
    *,
    digest: Digest | None = None,
    n_bytes: int | None = None,
    progress: Progress | None = None,
    timeout: float = 30.0,
) -> None:
    """Brings one file to `destination`, from the first source that has it.

    A download cut short continues where it stopped, in this call or in a
    later one, as long as the server still offers the same file. A finished
    download with the wrong digest is kept beside the destination under the
    suffix ``.mismatch`` for inspection, and the next source is tried.

    Args:
      urls: the same file's addresses, tried in this order.
      destination: path of the finished file; returned to at once if it
        exists and its digest is right.
      digest: what the publisher says, or None if it says nothing.
      n_bytes: expected size; only checked where there is no digest.
      progress: called with (bytes so far, total bytes or None).
      timeout: seconds of silence after which a connection is given up.

    Raises:
      VaecfError: no source gave the file (each is named with its reason),
        or an existing `destination` has another digest.
    """
    if destination.exists():
        _check_existing(destination, digest)
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in urls:
        part = _part_path(destination, url)
        try:
            _download_one(url, part, digest is not None, progress, timeout)
            _accept(part, destination, digest, n_bytes)
            return
        except _Failure as failure:
            reasons.append(f"{url} ({failure})")
    raise VaecfError(
        f"{destination.name} could not be downloaded from "
        + "; ".join(reasons or ["nowhere: no address is known"])
    )


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Waits until no other process downloads into `directory`.

    Two writers would interleave their bytes in one ``.part`` file. Where the
    platform has no `fcntl` (Windows) nothing is locked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_existing(path: pathlib.Path, digest: Digest | None) -> None:
    if digest is None:
        return
    found = file_digest(path, digest.algorithm)
    if found != digest.value:
        raise VaecfError(
            f"{path}: {digest.algorithm} {found}, but the publisher gives "
            f"{digest.value}; move the file away and run again, or pass "
            "--ratings=FILE"
        )


def _accept(
    part: pathlib.Path,
    destination: pathlib.Path,
    digest: Digest | None,
    n_bytes: int | None,
) -> None:
    """Renames a finished part to its destination, or sets it aside."""
    problem = None
    if digest is not None:
        found = file_digest(part, digest.algorithm)
        if found != digest.value:
            problem = (
                f"{digest.algorithm} {found}, but the publisher gives "
                f"{digest.value}"
            )
    elif n_bytes is not None and part.stat().st_size != n_bytes:
        problem = f"{part.stat().st_size} bytes, expected {n_bytes}"
    _validator_path(part).unlink(missing_ok=True)
    if problem is None:
        os.replace(part, destination)
        return
    kept = destination.with_name(destination.name + ".mismatch")
    os.replace(part, kept)
    raise _Failure(f"{problem}; kept as {kept}")


def _part_path(destination: pathlib.Path, url: str) -> pathlib.Path:
    # One part per address: bytes of two servers are never spliced.
    tag = hashlib.sha256(url.encode()).hexdigest()[:8]
    return destination.with_name(f"{destination.name}.{tag}.part")


def _validator_path(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(part.name + ".validator")


def _download_one(
    url: str,
    part: pathlib.Path,
    checked: bool,
    progress: Progress | None,
    timeout: float,
) -> None:
    """Completes `part`, resuming as often as the line is cut."""
    idle, pause = 0, _PAUSE_SECONDS
    for attempt in range(_ATTEMPTS):
        before = _size(part)
        try:
            _transfer(url, part, checked, progress, timeout)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            if _is_final(error):
                raise _Failure(_reason(error)) from error
            idle = 0 if _size(part) > before else idle + 1
            if idle >= _IDLE_ATTEMPTS or attempt == _ATTEMPTS - 1:
                raise _Failure(_reason(error)) from error
            if idle:
                time.sleep(pause)
                pause *= 2


def _transfer(
    url: str,
    part: pathlib.Path,
    checked: bool,
    progress: Progress | None,
    timeout: float,
) -> None:
    """One request; appends what is missing to `part`."""
    offset, validator = _size(part), _read_validator(part)
    headers = {"User-Agent": "vaecf", "Accept-Encoding": "identity"}
    # Without a validator only a checksum can tell a file that changed
    # between the two halves.
    if offset and (validator or checked):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(
            request, timeout=timeout, context=_tls_context()
        )
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = _range_total(error.headers.get("Content-Range"))
        error.close()
        if total is not None and total == offset:
            return  # the earlier call had every byte
        part.unlink()
        raise OSError("the server's file is shorter than our part") from error
    with response:
        _save(response, part, offset, progress)


def _save(
    response: http.client.HTTPResponse,
    part: pathlib.Path,
    offset: int,
    progress: Progress | None,
) -> None:
    resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if resumed:
        content_range = response.headers.get("Content-Range", "")
        total = _range_total(content_range)
        if not re.match(rf"bytes {offset}-", content_range):
            part.unlink(missing_ok=True)
            raise OSError(f"unasked-for range {content_range!r}")
    else:
        offset = 0
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        part.unlink(missing_ok=True)
        _write_validator(part, response)
    with part.open("ab") as file:
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            offset += len(chunk)
            if progress is not None:
                progress(offset, total)
        storage.sync(file)
    if total is not None and offset != total:
        raise OSError(f"connection cut at {offset} of {total} bytes")


def _is_final(error: Exception) -> bool:
    """Whether asking the same server again would be pointless."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 416, 429)
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, TimeoutError)
    return isinstance(error, ValueError)  # not an address at all


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {error.reason}"
    elif isinstance(error, urllib.error.URLError):
        text = str(error.reason)
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


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


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_validator(part: pathlib.Path) -> str:
    path = _validator_path(part)
    return path.read_text() if path.exists() else ""


def _write_validator(
    part: pathlib.Path, response: http.client.HTTPResponse
) -> None:
    etag = response.headers.get("ETag") or ""
    if etag.startswith("W/"):  # weak ones may not stand in If-Range
        etag = ""
    validator = etag or response.headers.get("Last-Modified") or ""
    _validator_path(part).write_text(validator)
