"""Buckets on this machine: a server of Cloud Storage's JSON API, and a file system for fsspec.

The server speaks to the real client (gcsfs, through STORAGE_EMULATOR_HOST) as far as this package
uses it: buckets, listings in pages, multipart and resumable uploads, downloads, deletions. The file
system is the same store without client and network, for tests of what is done in which order.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

PAGE = 7
"""Objects per page of a listing: fewer than a run has, so that pages are followed."""


class Store:
    """Buckets in memory, and every request that changed or read them.

    Args:
        buckets: their names; there are no others.
        fault: is called with each request, such as ("PUT", "runs/one/a.json"), before it is
            answered, and raises or kills; an int that it returns is the answer's status.
    """

    def __init__(
        self, *buckets: str, fault: Callable[[str, str], int | None] | None = None
    ) -> None:
        self.objects: dict[str, dict[str, bytes]] = {bucket: {} for bucket in buckets}
        self.requests: list[tuple[str, str]] = []
        self.fault = fault
        self.lock = threading.RLock()

    def asked(self, kind: str, path: str) -> int | None:
        """Notes a request; the status that a fault wants."""
        self.requests.append((kind, path))
        return None if self.fault is None else self.fault(kind, path)

    def names(self) -> list[str]:
        """All objects, as bucket/name."""
        return sorted(f"{b}/{name}" for b, found in self.objects.items() for name in found)


def entry(bucket: str, name: str, data: bytes) -> dict[str, Any]:
    """What a listing says of an object."""
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(data)),
        "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
        "generation": "1",
    }


class BucketFileSystem(AbstractFileSystem):
    """What ``fsspec.filesystem("gs")`` gives in tests that need no client."""

    cachable = False
    store = Store()

    def _at(self, path: str) -> tuple[dict[str, bytes], str]:
        bucket, _, name = path.removeprefix("gs://").partition("/")
        if bucket not in self.store.objects:
            raise FileNotFoundError(f"The specified bucket does not exist: {bucket}")
        return self.store.objects[bucket], name

    def _ask(self, kind: str, path: str) -> None:
        status = self.store.asked(kind, path.removeprefix("gs://"))
        if status == 403:
            raise OSError(f"Forbidden: {path}\nno permission")
        if status is not None:
            raise RuntimeError(f"status {status}")

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        """All objects below a path."""
        self._ask("LIST", path)
        found, prefix = self._at(path)
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        bucket = path.removeprefix("gs://").partition("/")[0]
        listed = {
            f"{bucket}/{name}": entry(bucket, name, data) | {"size": len(data)}
            for name, data in found.items()
            if name.startswith(prefix)
        }
        return listed if detail else sorted(listed)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        """Writes an object."""
        self._ask("PUT", path)
        found, name = self._at(path)
        found[name] = bytes(value)

    def cat_file(self, path: str, **_: Any) -> bytes:
        """Reads an object."""
        self._ask("GET", path)
        found, name = self._at(path)
        if name not in found:
            raise FileNotFoundError(path)
        return found[name]

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Reads an object into a file."""
        Path(lpath).write_bytes(self.cat_file(rpath))

    def rm_file(self, path: str) -> None:
        """Removes an object."""
        self._ask("DELETE", path)
        found, name = self._at(path)
        if found.pop(name, None) is None:
            raise FileNotFoundError(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        """There is none."""


@contextmanager
def serving(store: Store) -> Iterator[str]:
    """Serves the store over HTTP on loopback; yields the value of STORAGE_EMULATOR_HOST."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        sessions: dict[str, tuple[str, str, bytearray]] = {}  # noqa: RUF012

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, value: Any = None, **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # The other side was killed.
                    self.wfile.write(data)

        def refuse(self, status: int, text: str) -> None:
            self.answer(status, {"error": {"code": status, "message": text}})

        def handle_request(self) -> None:
            parsed = urllib.parse.urlsplit(self.path)
            query = {
                name: values[0] for name, values in urllib.parse.parse_qs(parsed.query).items()
            }
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if parsed.path.startswith("/session/"):
                return self.chunk(parsed.path, body)
            found = re.fullmatch(
                r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", parsed.path
            )
            if found is None:
                return self.refuse(404, f"no such place {parsed.path}")
            kind, bucket = found[1] or "", found[2]
            name = urllib.parse.unquote(found[3]) if found[3] else None
            with store.lock:
                if kind == "/upload":
                    return self.upload(bucket, query, body)
                verb = {"DELETE": "DELETE"}.get(self.command, "GET" if name else "LIST")
                status = store.asked(verb, f"{bucket}/{name or query.get('prefix', '')}")
                if status is not None:
                    return self.refuse(status, "fault on purpose")
                objects = store.objects.get(bucket)
                if objects is None:
                    return self.refuse(404, "The specified bucket does not exist.")
                if name is None and not parsed.path.endswith("/o"):
                    return self.answer(200, {"kind": "storage#bucket", "name": bucket})
                if name is None:
                    return self.list(bucket, objects, query)
                if name not in objects:
                    return self.refuse(404, f"No such object: {bucket}/{name}")
                if self.command == "DELETE":
                    del objects[name]
                    return self.answer(204, b"")
                if kind == "/download" or query.get("alt") == "media":
                    return self.answer(200, objects[name])
                return self.answer(200, entry(bucket, name, objects[name]))

        def list(self, bucket: str, objects: dict[str, bytes], query: dict[str, str]) -> None:
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
            items, folders = [], set()
            for name in sorted(objects):
                if not name.startswith(prefix):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    items.append(entry(bucket, name, objects[name]))
            start = int(query.get("pageToken", 0))
            page: dict[str, Any] = {"kind": "storage#objects"}
            page |= {"items": items[start : start + PAGE], "prefixes": sorted(folders)}
            if start + PAGE < len(items):
                page["nextPageToken"] = str(start + PAGE)
            self.answer(200, page)

        def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
            if bucket not in store.objects:
                return self.refuse(404, "The specified bucket does not exist.")
            if query["uploadType"] == "resumable":
                name = query.get("name") or json.loads(body)["name"]
                place = f"/session/{len(self.sessions)}"
                self.sessions[place] = (bucket, name, bytearray())
                host = f"http://{self.headers['Host']}"
                return self.answer(200, {}, Location=f"{host}{place}?upload_id=long-enough-for-it")
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, content, *_ = body.split(b"--" + mark)
            name = json.loads(about.strip().split(b"\n\n", 1)[1])["name"]
            data = content.lstrip(b"\n").split(b"\n\n", 1)[1].removesuffix(b"\n")
            return self.keep(bucket, name, data)

        def chunk(self, place: str, body: bytes) -> None:
            if self.command == "DELETE":
                return self.answer(499, {})
            bucket, name, data = self.sessions[place]
            data += body
            total = self.headers["Content-Range"].rpartition("/")[2]
            if total == "*" or len(data) < int(total):
                return self.answer(308, b"", Range=f"bytes=0-{len(data) - 1}")
            with store.lock:
                return self.keep(bucket, name, bytes(data))

        def keep(self, bucket: str, name: str, data: bytes) -> None:
            status = store.asked("PUT", f"{bucket}/{name}")
            if status is not None:
                return self.refuse(status, "fault on purpose")
            store.objects[bucket][name] = data
            return self.answer(200, entry(bucket, name, data))

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
