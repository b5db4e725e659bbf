"""Downloads against a server of our own that resumes, cannot resume, cuts the line, or changes its file."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
import time

import pytest

from dense_heads.backbones import download
from dense_heads.backbones.download import fetch
from dense_heads.errors import UserError

CONTENT = bytes(range(256)) * 4000  # about 1 MB
NAME = "weights.pth"


class Server(http.server.ThreadingHTTPServer):
    """What it does is set by attributes; it remembers the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True  # whether it understands Range
        self.etag = '"one"'
        self.cuts = []  # after how many bytes the next connections are cut
        self.status = 200
        self.type = "application/octet-stream"
        self.delay = 0.0
        self.length = True
        self.requests = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        time.sleep(server.delay)
        if server.status != 200:
            self.send_error(server.status)
            return
        start, total = 0, len(server.content)
        condition = self.headers.get("If-Range")
        partial = bool(wanted) and server.ranges and condition in (None, server.etag)
        if partial:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(total - start))
        self.send_header("Content-Type", server.type)
        self.end_headers()
        body = server.content[start:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    return tmp_path / "hub" / "checkpoints"


def left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_file_is_downloaded_once_recorded_and_checked(server, folder):
    path = fetch(server.url, NAME)
    assert path == folder / NAME and path.read_bytes() == CONTENT
    assert json.loads((folder / f"{NAME}.json").read_text()) == {
        "url": server.url,
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    assert left(folder) == [NAME, f"{NAME}.json"]
    assert fetch(server.url, NAME) == path
    assert server.requests == [None]


def test_an_existing_download_is_used_and_recorded(server, folder):
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"already here")
    assert fetch(server.url, NAME).read_bytes() == b"already here"
    assert server.requests == []
    assert json.loads((folder / f"{NAME}.json").read_text())["size"] == 12


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: b"x" + content[1:]])
def test_a_file_that_changed_since_is_refused(server, folder, change):
    path = fetch(server.url, NAME)
    path.write_bytes(change(CONTENT))
    with pytest.raises(UserError, match="not the file that was recorded"):
        fetch(server.url, NAME)
    path.unlink()  # as the message says
    assert fetch(server.url, NAME).read_bytes() == CONTENT


def test_a_server_that_now_sends_another_file_is_refused(server, folder):
    fetch(server.url, NAME).unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(UserError, match="not the file that was recorded"):
        fetch(server.url, NAME)
    assert not (folder / NAME).exists()
    (folder / f"{NAME}.json").unlink()
    assert fetch(server.url, NAME).read_bytes() == CONTENT[::-1]


def test_a_cut_connection_goes_on_where_it_stopped(server, folder):
    server.cuts = [300_000, 1000]
    assert fetch(server.url, NAME).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=301000-"]


def test_a_later_run_goes_on_where_the_first_gave_up(server, folder, monkeypatch):
    server.cuts = [100_000] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"weights.pth.part.*run again"):
        fetch(server.url, NAME)
    assert not (folder / NAME).exists()
    assert (folder / f"{NAME}.part").stat().st_size == 500_000
    assert fetch(server.url, NAME).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=500000-"
    assert left(folder) == [NAME, f"{NAME}.json"]


def test_a_server_without_range_begins_again(server, folder):
    server.ranges = False
    server.cuts = [300_000]
    assert fetch(server.url, NAME).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("etag", ['"two"', None])
def test_two_versions_of_a_file_are_never_mixed(server, folder, etag):
    # The file changes between the connections; without an ETag its length has to tell.
    server.etag = None if etag is None else '"one"'
    server.cuts = [100_000] * download.ATTEMPTS
    with pytest.raises(UserError):
        fetch(server.url, NAME)
    server.content, server.etag = CONTENT[::-1] + b"more", etag
    assert fetch(server.url, NAME).read_bytes() == server.content


def test_a_part_file_of_unknown_origin_is_not_trusted(server, folder):
    folder.mkdir(parents=True)
    (folder / f"{NAME}.part").write_bytes(b"something else")
    assert fetch(server.url, NAME).read_bytes() == CONTENT


def _part(server, folder, content):
    folder.mkdir(parents=True)
    (folder / f"{NAME}.part").write_bytes(content)
    origin = {"url": server.url, "total": len(CONTENT), "validator": server.etag}
    (folder / f"{NAME}.part.json").write_text(json.dumps(origin))


def test_a_part_file_that_was_whole_is_only_renamed(server, folder):
    _part(server, folder, CONTENT)
    assert fetch(server.url, NAME).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


def test_a_part_file_that_is_too_long_is_dropped(server, folder):
    _part(server, folder, CONTENT + b"tail")
    assert fetch(server.url, NAME).read_bytes() == CONTENT


def test_a_server_that_tells_no_length(server, folder):
    server.length = False
    assert fetch(server.url, NAME).read_bytes() == CONTENT


def test_a_web_page_is_no_file(server, folder):
    server.type = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="web page"):
        fetch(server.url, NAME)
    assert left(folder) == []


def test_a_refusal_says_what_to_fetch_and_where_to_put_it(server, folder):
    server.status = 404
    with pytest.raises(UserError) as error:
        fetch(server.url, NAME)
    for part in ("404", server.url, str(folder / NAME)):
        assert part in str(error.value)
    assert len(server.requests) == 1


def test_a_server_in_trouble_is_asked_again(server, folder):
    server.status = 503
    with pytest.raises(UserError, match="503"):
        fetch(server.url, NAME)
    assert len(server.requests) == download.ATTEMPTS


def test_no_network(server, folder):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError) as error:
        fetch(url, NAME)
    for part in ("fetch " + url, str(folder / NAME)):
        assert part in str(error.value)


def test_addresses_on_this_machine_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="https://"):
        fetch((tmp_path / "file").as_uri(), NAME)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, server):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Cannot write"):
        fetch(server.url, NAME)


def test_two_processes_download_once(server, folder, tmp_path):
    server.delay = 0.5
    code = f"from dense_heads.backbones.download import fetch; print(fetch({server.url!r}, {NAME!r}))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [str(folder / NAME)] * 2
    assert (folder / NAME).read_bytes() == CONTENT
    assert server.requests == [None]
