"""The catalog's facts, and its downloads against a server on this machine."""

import dataclasses
import hashlib
import http.server
import io
import re
import socket
import threading
import zipfile

import pytest
from oracles import refuses

from vaecf import errors
from vaecf.data import catalog, download, readers

RATINGS = "".join(f"{u},{i},4.5,0\n" for u in range(60) for i in range(50))


class Server:
    """Serves `files` with ranges; `behaviour` may cut or refuse them."""

    def __init__(self):
        self.files = {}
        self.etags = {}
        self.cut_after = {}  # bytes sent, per request
        self.fail_with = {}
        self.headers = {}  # other headers; None leaves one out
        self.requests = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                del args

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(
            target=self.http.serve_forever, args=(0.01,), daemon=True
        ).start()

    def answer(self, handler):
        path = handler.path
        wanted = handler.headers.get("Range")
        self.requests.append((path, wanted))
        if path.startswith("/to:"):
            handler.send_response(302)
            handler.send_header("Location", path.removeprefix("/to:"))
            handler.end_headers()
            return
        if path in self.fail_with or path not in self.files:
            handler.send_error(self.fail_with.get(path, 404))
            return
        body, etag = self.files[path], self.etags.get(path)
        start = 0
        fresh = handler.headers.get("If-Range") in (None, etag)
        if wanted and fresh:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(body)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header(
                "Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}"
            )
        else:
            handler.send_response(200)
        headers = {"Content-Length": str(len(body) - start), "ETag": etag}
        for name, value in (headers | self.headers.get(path, {})).items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        cuts = self.cut_after.get(path)
        n = cuts.pop(0) if cuts else len(body)
        handler.wfile.write(body[start : start + n])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.01)
    running = Server()
    monkeypatch.setattr(download, "_SAFE", ("https://", running.url))
    yield running
    running.http.shutdown()
    running.http.server_close()


def zip_bytes(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()


ARCHIVE = zip_bytes({"ml-20m/movies.csv": "x", "ml-20m/ratings.csv": RATINGS})


@pytest.fixture
def pin(monkeypatch):
    """Gives a catalog entry the digest of the bytes that a test serves."""

    def pin(name, body):
        entry = dataclasses.replace(
            catalog.get(name),
            digest=download.Digest("md5", hashlib.md5(body).hexdigest()),
        )
        monkeypatch.setattr(
            catalog, "CATALOG", {**catalog.CATALOG, name: entry}
        )

    return pin


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_entry_is_complete(name):
    entry = catalog.get(name)
    assert entry.name == name and entry.title and entry.licence
    assert entry.held_out_users > 0
    assert entry.protocol in ("paper", "recipe", "vaecf")
    if entry.digest is not None:
        length = {"md5": 32, "sha256": 64}[entry.digest.algorithm]
        assert re.fullmatch(f"[0-9a-f]{{{length}}}", entry.digest.value)
    if entry.generated:
        return
    assert entry.counts["ratings"] > entry.counts["users"]
    assert entry.urls or "ratings=" in entry.manual
    assert all(url.startswith("https://") for url in entry.urls)
    assert entry.ratings_member or entry.files


def test_constants_are_those_of_the_paper():
    # Liang et al. (2018), section 4.1 and the notebook published with it.
    for name, *expected in (
        ("ml-20m", 10_000, 4.0, 5, 0),
        ("netflix", 40_000, 4.0, 5, 0),
        ("msd", 50_000, None, 20, 200),
    ):
        e = catalog.get(name)
        limits = [e.min_items_per_user, e.min_users_per_item]
        assert [e.held_out_users, e.min_rating, *limits] == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ml20m", r"'ml20m'; did you mean ml-20m\?"),
        ("zzz", "known are synthetic, ml-20m-shape,"),
        ("netflix", r"kaggle.*ratings=FOLDER"),
        ("synthetic", "generated, not downloaded"),
    ],
)
def test_what_is_not_downloaded(tmp_path, name, message):
    with refuses(message):
        catalog.fetch(name, tmp_path)


def test_check_counts():
    entry = catalog.get("ml-100k")
    catalog.check_counts(entry, ratings=100_000, users=943, items=1_682)
    catalog.check_counts(entry, users=943)
    catalog.check_counts(catalog.get("ml-32m"), items=1)  # not published
    with refuses("read 99,999 ratings instead of 100,000, 942 users"):
        catalog.check_counts(entry, ratings=99_999, users=942)


@pytest.mark.realdata
@pytest.mark.parametrize(
    "file",
    [
        "ml-100k/u.data", "ml-latest-small/ratings.csv",
        "ml-1m/ratings.csv.gz", "yelp2018/interactions.parquet",
    ],
)  # fmt: skip
def test_published_counts_are_those_of_the_files(realdata_dir, file):
    name = file.split("/")[0]
    counts = readers.read_ratings(realdata_dir / file).counts
    keys = ("rows_read", "users_read", "items_read")
    found = dict(zip(("ratings", "users", "items"), map(counts.get, keys)))
    catalog.check_counts(catalog.get(name), **found)
    assert catalog.get(name).counts == found


def test_download_unpacks_only_the_ratings(server, tmp_path, pin, monkeypatch):
    pin("ml-20m", ARCHIVE)
    server.files["/ml-20m.zip"] = ARCHIVE
    monkeypatch.setenv("VAECF_CACHE", str(tmp_path))
    path = catalog.fetch("ml-20m", urls=[server.url + "/ml-20m.zip"])
    assert path.name == "ratings.csv" and path.read_text() == RATINGS
    assert [p.name for p in path.parent.iterdir()] == ["ratings.csv"]
    # The second call asks nobody.
    again = catalog.fetch("ml-20m", tmp_path, [server.url + "/gone.zip"])
    assert again == path and len(server.requests) == 1
    left = {p.name for p in (tmp_path / "ml-20m").iterdir()}
    assert left == {".lock", "ml-20m.zip", "ratings"}


@pytest.mark.parametrize(
    ("etag", "ranges"),
    [('"v1"', [None, "bytes=1000-", "bytes=3000-"]), (None, [None] * 3)],
)
def test_cut_download_is_resumed(server, tmp_path, etag, ranges):
    """Without a validator and a checksum, the download starts again."""
    server.files["/f"] = body = bytes(range(256)) * 40
    server.etags["/f"] = etag
    server.cut_after["/f"] = [1000, 2000]
    download.download([server.url + "/f"], tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == body
    assert [r for _, r in server.requests] == ranges
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("changed", [False, True])
def test_cut_download_is_resumed_by_a_later_call(server, tmp_path, changed):
    """A file that changed meanwhile is not joined with the old half."""
    server.files["/f"] = body = b"old" * 4000
    server.etags["/f"] = '"v1"'
    server.cut_after["/f"] = [1000, 0, 0, 0]
    with refuses(r"cut at 1000 of 12000 bytes"):
        download.download([server.url + "/f"], tmp_path / "f")
    assert not (tmp_path / "f").exists()
    server.cut_after.clear()
    if changed:
        server.files["/f"], server.etags["/f"] = b"new" * 3000, '"v2"'
        body = b"new" * 3000
    download.download([server.url + "/f"], tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == body
    assert server.requests[-1] == ("/f", "bytes=1000-")


def test_a_complete_part_is_taken_as_it_is(server, tmp_path):
    url, target = server.url + "/f", tmp_path / "f"
    server.files["/f"], server.etags["/f"] = b"abc" * 99, '"v1"'
    tag = hashlib.sha256(url.encode()).hexdigest()[:8]
    (tmp_path / f"f.{tag}.part").write_bytes(b"abc" * 99)
    (tmp_path / f"f.{tag}.part.validator").write_text('"v1"')
    download.download([url], target)
    assert target.read_bytes() == b"abc" * 99
    assert server.requests == [("/f", "bytes=297-")]


def test_mirrors_are_tried_in_order(server, tmp_path, pin):
    pin("ml-20m", ARCHIVE)
    server.files["/c.zip"] = ARCHIVE
    server.files["/wrong.zip"] = ARCHIVE[:-1] + b"?"
    server.fail_with["/b.zip"] = 503
    paths = ["/a.zip", "/b.zip", "/wrong.zip", "/c.zip"]
    path = catalog.fetch("ml-20m", tmp_path, [server.url + p for p in paths])
    assert path.read_text() == RATINGS
    asked = [p for p, _ in server.requests]
    # A 404 is final, a 503 is asked three times.
    assert asked == ["/a.zip", *["/b.zip"] * 3, "/wrong.zip", "/c.zip"]


def test_a_wrong_archive_of_the_user_stays(server, tmp_path, pin):
    pin("ml-20m", ARCHIVE)
    mine = tmp_path / "ml-20m/ml-20m.zip"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with refuses("move the file away") as caught:
        catalog.fetch("ml-20m", tmp_path, [server.url + "/ml-20m.zip"])
    assert str(mine) in str(caught.value)
    assert mine.read_bytes() == b"mine" and server.requests == []


def test_all_sources_failing_names_each_with_its_reason(server, tmp_path, pin):
    pin("ml-20m", ARCHIVE)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/ml-20m.zip"
    server.files["/wrong.zip"] = bad = b"not the archive"
    urls = [server.url + "/ml-20m.zip", server.url + "/wrong.zip"]
    with refuses("ratings=FILE") as caught:
        catalog.fetch("ml-20m", tmp_path, [dead, "nonsense", *urls])
    kept = tmp_path / "ml-20m/ml-20m.zip.mismatch"
    for part in (
        f"{dead} ([Errno", "nonsense (", f"{urls[0]} (HTTP 404", str(kept),
        hashlib.md5(bad).hexdigest(), hashlib.md5(ARCHIVE).hexdigest(),
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and kept.read_bytes() == bad
    assert not (tmp_path / "ml-20m/ratings").exists()


def md5(body):
    return download.Digest("md5", hashlib.md5(body).hexdigest())


def test_plain_http_needs_a_checksum(server, tmp_path, monkeypatch):
    """The first address, and that of a redirection."""
    server.files["/f"] = b"abc"
    plain, target = server.url + "/f", tmp_path / "f"
    monkeypatch.setattr(download, "_SAFE", ("https://",))
    with refuses("http without a checksum"):
        download.download([plain], target)
    assert server.requests == []
    # A server that is taken for one of https, but sends us on.
    monkeypatch.setattr(download, "_SAFE", (f"{server.url}/to:",))
    with refuses("http without a checksum"):
        download.download([f"{server.url}/to:{plain}"], target)
    assert list(tmp_path.iterdir()) == []
    download.download([f"{server.url}/to:{plain}"], target, digest=md5(b"abc"))
    assert target.read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Length": None}, "neither its length nor a checksum"),
        ({"Content-Length": "301"}, "cut at 300 of 301 bytes"),
        ({"Content-Encoding": "gzip"}, "encoding 'gzip'"),
        ({"Content-Length": "1001"}, "more than 1,000 bytes"),
        ({"Content-Length": "-5"}, r"-5|cut"),
        ({"Content-Length": "many"}, "many"),
    ],
)
def test_a_body_that_is_not_the_file(
    server, tmp_path, monkeypatch, headers, message
):
    monkeypatch.setattr(download, "_MAX_BYTES", 1000)
    server.files["/f"], server.headers["/f"] = b"abc" * 100, headers
    with refuses(message):
        download.download([server.url + "/f"], tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_an_endless_body(server, tmp_path, monkeypatch):
    """Its length is unknown; nothing of it stays on the disk."""
    monkeypatch.setattr(download, "_MAX_BYTES", 10_000)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 1000)
    server.files["/f"] = body = bytes(20_000)
    server.headers["/f"] = {"Content-Length": None}
    with refuses("more than 10,000 bytes"):
        download.download([server.url + "/f"], tmp_path / "f", digest=md5(body))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


def test_several_files_give_their_folder(server, tmp_path):
    files = {"train.txt": b"0 1 2\n1 0\n", "test.txt": b"0 3\n"}
    server.files |= {f"/g/{name}": body for name, body in files.items()}
    folder = catalog.fetch("gowalla", tmp_path, [server.url + "/g/"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    names = ["combined_data_1.txt", "combined_data_2.txt"]
    server.files["/n.zip"] = zip_bytes(
        {names[0]: "", f"x/{names[1]}": "", "y": ""}
    )
    folder = catalog.fetch("netflix", tmp_path, [server.url + "/n.zip"])
    assert sorted(p.name for p in folder.iterdir()) == names


def test_archive_cannot_write_outside(tmp_path):
    packed = tmp_path / "a.zip"
    packed.write_bytes(
        zip_bytes({"../../ratings.csv": "evil", "/etc/passwd": "evil"})
    )
    (path,) = download.extract(packed, "ratings.csv", tmp_path / "in" / "out")
    assert path == tmp_path / "in/out/ratings.csv"
    assert not (tmp_path / "ratings.csv").exists()


def test_an_archive_that_unpacks_to_far_more(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 100)
    packed = tmp_path / "a.zip"
    for size, bomb in ((10_000, False), (1_000_000, True)):
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("r.csv", "0" * size)
        if not bomb:
            [path] = download.extract(packed, "r.csv", tmp_path / "small")
            assert path.stat().st_size == size
            continue
        with refuses("more than 100 times"):
            download.extract(packed, "r.csv", tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "small"}


def test_flipped_bytes_of_an_archive(tmp_path):
    """Every byte of a small archive: the right file, or one VaecfError."""
    text = "".join(f"{u},{i}\n" for u in range(9) for i in range(9))
    packed, written = tmp_path / "a.zip", 0
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("r.csv", text)
    whole = packed.read_bytes()
    for at in range(len(whole)):
        flipped = whole[at] ^ (1 << at % 8)
        packed.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        try:
            [path] = download.extract(packed, "r.csv", tmp_path / f"{at}")
        except errors.VaecfError:
            continue
        written += 1
        assert path.read_text() == text
    assert 0 < written < len(whole) / 2


AT = ARCHIVE.index(b"59,49,4.5")


@pytest.mark.parametrize(
    "body",
    [b"", b"text", ARCHIVE[:3000], ARCHIVE[:AT] + b"8" + ARCHIVE[AT + 1 :]],
    ids=["empty", "text", "truncated", "wrong-crc"],
)
def test_damaged_archive_leaves_nothing(tmp_path, body):
    packed = tmp_path / "a.zip"
    packed.write_bytes(body)
    with refuses("damaged or not a zip"):
        download.extract(packed, "ml-20m/ratings.csv", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_archive_without_the_member(tmp_path):
    packed = tmp_path / "a.zip"
    packed.write_bytes(zip_bytes({"readme": "", "a/x.csv": "", "b/x.csv": ""}))
    with refuses(r"no file named ratings\.csv"):
        download.extract(packed, "ratings.csv", tmp_path / "out")
    with refuses(r"several files named x\.csv"):
        download.extract(packed, "x.csv", tmp_path / "out")
