"""Weights from a web address, kept in a cache; the digits in a file's name are checked."""

import hashlib
import http.client
import ipaddress
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from flaxtransfer.lock import hold
from flaxtransfer.weights.containers import SUFFIXES, has_weights_name

__all__ = ["cache_folder", "fetch"]

TIMEOUT = 30.0
"""Seconds without a byte."""
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.(?:[^.]+|pth\.tar)$")
_PIECE = 1 << 20


def cache_folder() -> Path:
    """Where files are kept: FLAXTRANSFER_CACHE, or `flaxtransfer` in the user's cache folder."""
    if chosen := os.environ.get("FLAXTRANSFER_CACHE"):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flaxtransfer"


def fetch(url: str) -> tuple[str, Path, list[str]]:
    """The address, the file in the cache, and notes.

    A file that is there is not asked for again. One that was interrupted goes on where it stopped,
    if the server says that it is still the same. A terminal shows how far it is.

    Args:
        url: `https://`; `http://` on this machine, or where the name carries digits of the
            sha256, as in `resnet50-0676ba61.pth`.

    Raises:
        OSError: no answer, an answer that says no, or one that breaks off.
        ValueError: an address of another kind, or a file whose sha256 is not that of its name.
    """
    parts = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(parts.path).rsplit("/", 1)[-1]
    # A name without any suffix says nothing; one with another suffix says that it is no weights.
    likely = has_weights_name(name) or "." not in name
    if not re.fullmatch(r"[\w.+-]+", name) or not likely:
        raise ValueError(
            f"{url}: the address has to end in the name of a file that can be read, with "
            f"{', '.join(SUFFIXES)} or with no suffix"
        )
    digits = found[1] if (found := _HASHED.search(name)) else ""
    if parts.scheme == "http" and not digits and not _is_local(parts.hostname or ""):
        raise ValueError(
            f"{url}: anybody on the way can change what comes over http; use https, or a name with "
            "the first 8 digits of the sha256"
        )
    # Two servers may have a file of one name, and the name has to stay: it says what it is.
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    notes = []
    if path.is_file():
        notes.append(f"taken from the cache ({folder})")
    else:
        if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("FLAXTRANSFER_OFFLINE"):
            raise FileNotFoundError(
                f"{url} is not in the cache ({cache_folder()}), and an environment variable "
                "(FLAXTRANSFER_OFFLINE or HF_HUB_OFFLINE) says to ask nobody"
            )
        with hold(folder):
            _download(url, path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(digits):
        path.unlink()
        raise ValueError(
            f"{url} is damaged or is another file: its name says that its sha256 starts with "
            f"{digits}, and it starts with {sha256[: len(digits)]}; it was removed"
        )
    notes.append(
        f"sha256 {digits} as in the file's name"
        if digits
        else f"nothing says what the file should be; its sha256 is {sha256}"
    )
    return url, path, notes


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https, and never from there to http."""

    max_redirections = 5

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Called for each answer that points elsewhere."""
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"it leads from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: Path) -> None:
    part, mark = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.etag")
    there = part.stat().st_size if part.is_file() and mark.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "flaxtransfer"})
    if there:
        request.add_header("Range", f"bytes={there}-")
        request.add_header("If-Range", mark.read_text())
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:
                there = 0
                part.unlink(missing_ok=True)
            length = answer.headers.get("Content-Length")
            expected = there + int(length) if length and length.isdigit() else None
            _check_room(expected, there, path)
            mark.unlink(missing_ok=True)
            if etag := answer.headers.get("ETag", ""):
                mark.write_text(etag)
            with part.open("ab") as file, _progress() as bar:
                task = bar.add_task(path.name, total=expected, completed=there)
                while piece := answer.read(_PIECE):
                    file.write(piece)
                    there += len(piece)
                    bar.update(task, completed=there)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and there:
            # All of it was there already, or more than there is now.
            part.unlink()
            return _download(url, path)
        kind = FileNotFoundError if error.code in (404, 410) else OSError
        raise kind(f"{url}: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{url} could not be fetched: {reason}; call again to go on") from error
    if expected is not None and there != expected:
        raise OSError(f"{url} broke off after {there:,} of {expected:,} bytes; call again to go on")
    part.replace(path)
    mark.unlink(missing_ok=True)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _check_room(expected: int | None, there: int, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if expected is not None and expected - there > free:
        raise OSError(f"it has {expected:,} bytes, and {path.parent} room for {free:,}")
