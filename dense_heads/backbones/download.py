"""Files from the web, kept in torch.hub's checkpoint folder: resumable, atomic, checked."""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dense_heads.errors import UserError

ATTEMPTS = 5  # a cut connection goes on where it stopped this often before we give up
TIMEOUT_S = 30
PAUSE_S = 1.0  # before the second attempt; longer before each later one
CHUNK = 1 << 20


def fetch(url: str, filename: str) -> Path:
    """The file at `url`, from torch.hub's checkpoint folder where it is there already, else downloaded into it.

    Size and SHA-256 are recorded beside it (`<filename>.json`) on first use and checked on each later one. A download
    that stopped goes on from its `.part` file; two processes that want the same file download it once.

    Raises:
        UserError: no network, a server's refusal, a full disk, or a file that is not the one recorded.
    """
    assert Path(filename).name == filename, filename
    target = Path(torch.hub.get_dir()) / "checkpoints" / filename
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{filename}.lock")):
                if not target.is_file():  # another process may have fetched it while we waited
                    _download(url, target)
                    return target
        except OSError as error:
            raise UserError(f"Cannot write {target}: {error}. {_by_hand(url, target)}") from error
    _check(target, target, url)
    return target


def _by_hand(url: str, target: Path) -> str:
    return f"By hand: fetch {url} on any machine and put it at {target}, then run again."


def _download(url: str, target: Path) -> None:
    """Fills `<target>.part`, over several connections if need be, and makes it `target` when it is whole."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"Got the address {url!r}; expected one that starts with https:// or http://.")
    part = target.with_name(target.name + ".part")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(target.name, total=None)
        for attempt in range(1, ATTEMPTS + 1):
            time.sleep(PAUSE_S * (attempt - 1))
            try:
                if _receive(url, part, lambda done, total: progress.update(task, completed=done, total=total)):
                    break
                reason = "the connection closed before the end"
            except urllib.error.HTTPError as error:
                reason = f"the server answered {error.code} {error.reason}"
                if error.code < 500:
                    raise UserError(f"Cannot download {url}: {reason}. {_by_hand(url, target)}") from error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(getattr(error, "reason", None) or error)
                # Nothing at all was received, ever: no network, rather than a bad one. More attempts would not help.
                if attempt == 1 and isinstance(error, urllib.error.URLError):
                    raise UserError(f"Cannot download {url}: {reason}. {_by_hand(url, target)}") from error
        else:
            raise UserError(
                f"Cannot download {url}: {reason}, {ATTEMPTS} times. What arrived is kept in {part}; run again to go "
                f"on from there. {_by_hand(url, target)}"
            )
    _check(part, target, url)
    with part.open("rb") as file:
        os.fsync(file.fileno())  # the name must not reach the disk before the bytes
    os.replace(part, target)
    part.with_name(part.name + ".json").unlink(missing_ok=True)


def _receive(url: str, part: Path, report: Callable[[int, int | None], None]) -> bool:
    """One connection: appends to `part` what the server sends. True if the file is whole afterwards."""
    origin_file = part.with_name(part.name + ".json")
    origin = _read_json(origin_file)
    done = part.stat().st_size if part.is_file() and origin.get("url") == url else 0
    headers = {"User-Agent": "dense_heads", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if origin.get("validator"):  # a file that has changed since is sent from its beginning
            headers["If-Range"] = origin["validator"]
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not done:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":
            return True  # a run was killed between the last byte and the renaming
        part.unlink()  # longer than the server's file: begin again
        return False
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{url} answered with a web page, not a file: a login page of the network, or a proxy?")
        start, total = _span(response, done)
        if start != done or (start and total != origin.get("total")):
            start = 0
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:  # not the bytes that were asked for
                part.unlink()
                return False
        if start == 0:
            etag = response.headers.get("ETag")
            strong = etag if etag and not etag.startswith("W/") else None  # weak ones are not allowed in If-Range
            _write_json(
                origin_file,
                {"url": url, "total": total, "validator": strong or response.headers.get("Last-Modified")},
            )
        received = start
        with part.open("ab" if start else "wb") as file:
            report(received, total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                report(received, total)
        return total is None or received == total


def _span(response: Any, done: int) -> tuple[int, int | None]:
    """(first byte, length of the whole file) of an answer; a server without Range starts at 0."""
    length = response.headers.get("Content-Length")
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, int(length) if length and length.isdigit() else None
    # Content-Range: bytes 100-199/200
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return int(first) if first.isdigit() else -1, int(total) if total.isdigit() else None


def _check(file: Path, target: Path, url: str) -> None:
    """Compares `file` with what was recorded for `target`; records it where nothing was.

    Raises:
        UserError: size or SHA-256 differ.
    """
    sidecar = target.with_name(target.name + ".json")
    with file.open("rb") as stream:
        size, sha256 = file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    recorded = _read_json(sidecar)
    if not recorded:
        try:
            _write_json(sidecar, {"url": url, "size": size, "sha256": sha256})
        except OSError:
            pass  # a shared folder that we may only read
        return
    if (recorded.get("size"), recorded.get("sha256")) != (size, sha256):
        raise UserError(
            f"{file} is not the file that was recorded in {sidecar}: {size} bytes, SHA-256 "
            f"{sha256[:12]}..., expected {recorded.get('size')} bytes, {str(recorded.get('sha256'))[:12]}... "
            f"It was cut short or changed. Delete {file} to download it again; delete {sidecar.name} too if you know "
            f"why it changed."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
