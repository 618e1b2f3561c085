"""Weights from afar: a server on this machine that speaks the hub's protocol and plain HTTP.

The client is the real `huggingface_hub`; the server answered what that asks for.
"""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest

from flaxtransfer.cli import run
from flaxtransfer.paths import flatten
from flaxtransfer.weights import load, locations
from flaxtransfer.weights.readers.array_files import read_safetensors, write_safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "timm/tiny.in1k"


class Server(http.server.ThreadingHTTPServer):
    """Files of one repository, and of the folder /files."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.asked = []
        self.break_after = None
        self.lie = ""
        self.gated = False
        self.refuse = None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers of the hub, of its storage, and of a plain server."""

    def log_message(self, *arguments):
        del arguments

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((self.command, path, self.headers.get("Range")))
        if server.refuse:
            return self.fail(server.refuse)
        if path.startswith("/api/models/"):
            return self.describe(path.removeprefix("/api/models/"))
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            revision, name = path.removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)
            return self.resolve(revision, name, body)
        if path == "/loop.pth":
            return self.redirect("/loop.pth")
        if path.startswith("/moved/"):
            return self.redirect(path.replace("/moved/", "/files/"))
        if path.startswith(("/files/", "/storage/")):
            return self.send(server.files.get(path.split("/", 2)[2]), body)
        return self.fail(404)

    def describe(self, path):
        server = self.server
        if server.gated:
            return self.fail(403, "GatedRepo")
        if not path.startswith(REPOSITORY):
            return self.fail(404, "RepoNotFound")
        rest = path.removeprefix(REPOSITORY)
        if rest == "/refs":
            refs = [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}]
            return self.json({"branches": refs, "tags": [], "converts": []})
        if rest not in ("", "/revision/main", f"/revision/{COMMIT}"):
            return self.fail(404, "RevisionNotFound")
        siblings = []
        for name, data in server.files.items():
            digest = hashlib.sha256(data).hexdigest() if not server.lie else server.lie
            lfs = {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 1}}
            siblings.append(
                {
                    "rfilename": name,
                    "size": len(data),
                    **(lfs if name.endswith(".safetensors") else {}),
                }
            )
        return self.json(
            {
                "id": REPOSITORY,
                "modelId": REPOSITORY,
                "sha": COMMIT,
                "tags": [],
                "private": False,
                "downloads": 0,
                "siblings": siblings,
            }
        )

    def resolve(self, revision, name, body):
        del revision
        data = self.server.files.get(name)
        if data is None:
            return self.fail(404, "EntryNotFound")
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(data).hexdigest()
            headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self.redirect(f"/storage/{name}", headers)
        return self.send(data, body)

    def redirect(self, where, headers=()):
        self.send_response(302)
        for key, value in {
            **dict(headers),
            "X-Repo-Commit": COMMIT,
            "Location": where,
            "Content-Length": "0",
        }.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, data, body):
        if data is None:
            return self.fail(404)
        etag, start = f'"{hashlib.sha256(data).hexdigest()}"', 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        if start >= len(data):
            return self.fail(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            end = self.server.break_after
            self.wfile.write(data[start : len(data) if end is None else start + end])
            self.close_connection = True

    def json(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status, kind=""):
        self.send_response(status)
        self.send_header("X-Error-Code", kind)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server(golden, tmp_path, monkeypatch):
    folder = golden / "timm"
    found = Server({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    threading.Thread(
        target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FLAXTRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield found
    found.shutdown()
    found.server_close()


def weights_of(server):
    return server.files["model.safetensors"]


def below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- the hub -----------------------------------------------------------------------------------


def test_a_repository_with_what_lies_beside_the_weights(server, golden):
    checkpoint, expected = load(f"hf://{REPOSITORY}"), load(golden / "timm")
    assert checkpoint.source == f"hf://{REPOSITORY}@{COMMIT[:12]}:model.safetensors"
    assert (checkpoint.preprocessing, checkpoint.class_names) == (
        expected.preprocessing,
        expected.class_names,
    )
    own, theirs = flatten(checkpoint.variables), flatten(expected.variables)
    assert all(np.array_equal(own[path], theirs[path]) for path in theirs)
    assert any(
        note.startswith("sha256") and "verified by the hub" in note for note in checkpoint.notes
    )
    # Everything at the commit that was resolved once, whatever moves in between.
    resolved = [path for _, path, _ in server.asked if "/resolve/" in path]
    assert resolved
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


def test_a_repository_with_parts(server, monkeypatch):
    arrays = read_safetensors(server.files.pop("model.safetensors"))[0]
    keys = list(arrays)
    halves = {"a-1-of-2.safetensors": keys[::2], "a-2-of-2.safetensors": keys[1::2]}
    for name, held in halves.items():
        server.files[name] = write_safetensors({key: arrays[key] for key in held}, {})
    places = {key: name for name, held in halves.items() for key in held}
    index = json.dumps({"weight_map": places}).encode()
    server.files["model.safetensors.index.json"] = index
    found = load(f"hf://{REPOSITORY}")
    assert "read from 2 files" in found.notes
    assert found.source.endswith(":model.safetensors.index.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load(f"hf://{REPOSITORY}@{COMMIT}").sha256 == found.sha256


def test_offline_the_cache_serves(server, monkeypatch):
    first = load(f"hf://{REPOSITORY}@main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.asked.clear()
    again = load(f"hf://{REPOSITORY}@{COMMIT}")
    assert again.sha256 == first.sha256
    assert "HF_HUB_OFFLINE is set: taken from the cache" in again.notes
    assert server.asked == []


def test_offline_an_empty_cache_says_how_to_fill_it(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=rf"does not hold {REPOSITORY}.*hf download"):
        load(f"hf://{REPOSITORY}")


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"127.0.0.1:9 cannot be reached .* does not hold"):
        load(f"hf://{REPOSITORY}")


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("hf://nobody/nothing", "no model nobody/nothing at .*, or it is private"),
        (f"hf://{REPOSITORY}@mian", "no revision 'mian'; did you mean 'main'"),
        (f"hf://{REPOSITORY}:modle.safetensors", "no file 'modle.safetensors'; did you mean"),
        ("hf://resnet50", "must have the form hf://organization/name"),
        ("hf://a/b@", "address on the hub must have the form"),
        ("hf://a/b c", "address on the hub must have the form"),
        ("hf://a/b:../../etc/passwd.pth", "address on the hub must have the form"),
    ],
)
def test_addresses_that_lead_nowhere(server, address, text):
    with pytest.raises((FileNotFoundError, ValueError), match=text):
        load(address)


def test_a_gated_repository(server):
    server.gated = True
    with pytest.raises(FileNotFoundError, match="requires a login and accepted terms"):
        load(f"hf://{REPOSITORY}")


def test_bytes_that_are_not_the_hubs_are_removed(server, tmp_path):
    server.lie = "f" * 64
    with pytest.raises(ValueError, match=r"is damaged.*removed from the cache"):
        load(f"hf://{REPOSITORY}")
    assert not [name for name in below(tmp_path) if "safetensors" in name]
    digest = hashlib.sha256(weights_of(server)).hexdigest()
    assert not [n for n in below(tmp_path) if digest in n and not n.endswith(".lock")]


def test_a_download_that_breaks_off_is_no_file(server, tmp_path):
    server.break_after = 1000
    with pytest.raises(OSError, match=r"could not be downloaded|ended after"):
        load(f"hf://{REPOSITORY}")
    assert not [name for name in below(tmp_path) if name.endswith(".safetensors")]
    server.break_after = None
    assert load(f"hf://{REPOSITORY}").config.width == 4


# --- the web -----------------------------------------------------------------------------------


def hashed(server):
    """The weights under a name like torchvision's."""
    data = weights_of(server)
    name = f"tiny-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    server.files[name] = data
    return f"{server.address}/files/{name}"


def test_a_name_with_digits_is_checked_and_kept(server):
    url = hashed(server)
    first = load(url)
    assert first.source == url
    assert any(note.endswith("verified by the file's name") for note in first.notes)
    server.asked.clear()
    assert load(url).sha256 == first.sha256
    assert server.asked == []


def test_a_name_without_digits_says_that_nothing_was_checked(server):
    url = f"{server.address}/files/model.safetensors"
    assert any(note.startswith("the file cannot be verified") for note in load(url).notes)


@pytest.mark.parametrize("name", ["tiny.pth.tar", "0a1b2c", "tiny.bin"])
def test_names_that_say_another_container_or_none(server, name):
    server.files[name] = weights_of(server)
    notes = load(f"{server.address}/files/{name}").notes
    assert any(note.startswith("a safetensors file by its content") for note in notes)


def test_another_content_than_the_name_says(server, tmp_path):
    server.files["tiny-00000000.safetensors"] = weights_of(server)
    url = f"{server.address}/files/tiny-00000000.safetensors"
    with pytest.raises(
        ValueError, match="sha256 must start with 00000000, as its name states, got"
    ):
        load(url)
    assert [name for name in below(tmp_path) if "tiny" in name] == []


def test_what_broke_off_goes_on(server, tmp_path):
    url = hashed(server)
    server.break_after = 5000
    with pytest.raises(OSError, match=r"ended after 5,000 of [\d,]+ bytes|could not be downloaded"):
        load(url)
    assert [name for name in below(tmp_path) if name.endswith(".safetensors")] == []
    server.break_after, server.asked = None, []
    load(url)
    assert [wanted for _, _, wanted in server.asked] == ["bytes=5000-"]


def test_what_was_whole_but_had_no_name_yet(server, tmp_path):
    # Killed between the last byte and the name: the server has nothing more to send.
    url = hashed(server)
    server.break_after = 5000
    with pytest.raises(OSError, match=r"ended after|could not be downloaded"):
        load(url)
    (part,) = (tmp_path / "cache").rglob("*.part")
    part.write_bytes(weights_of(server))
    server.break_after = None
    assert load(url).config.width == 4


@pytest.mark.parametrize("status", [403, 500])
def test_an_answer_that_is_not_about_the_file(server, status):
    server.refuse = status
    with pytest.raises(OSError, match=f"the server answered {status}") as caught:
        load(hashed(server))
    assert not isinstance(caught.value, FileNotFoundError)


def test_what_has_changed_since_starts_anew(server):
    url = hashed(server)
    name = url.rsplit("/", 1)[1]
    server.break_after, server.files[name] = 5000, b"x" * 20000
    with pytest.raises(OSError, match=r"downloaded|ended after"):
        load(url)
    server.break_after, server.files[name] = None, weights_of(server)
    assert load(url).config.width == 4


def test_redirects_are_followed_but_not_for_ever(server):
    url = hashed(server).replace("/files/", "/moved/")
    assert load(url).config.width == 4
    with pytest.raises((OSError, FileNotFoundError), match=r"loop\.pth"):
        load(f"{server.address}/loop.pth")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://example.org/model.safetensors", "http is not secure"),
        ("https://example.org/model.zip", "must end in a file name"),
        ("https://example.org/", "must end in a file name"),
    ],
)
def test_addresses_that_are_refused_without_asking(url, text):
    with pytest.raises(ValueError, match=text):
        load(url)


def test_no_answer_and_no_file(server, monkeypatch):
    with pytest.raises(FileNotFoundError, match="the server answered 404"):
        load(f"{server.address}/files/none.pth")
    with pytest.raises(OSError, match=r"could not be downloaded.*refused"):
        load("http://127.0.0.1:9/none.pth")
    monkeypatch.setenv("FLAXTRANSFER_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        load(f"{server.address}/files/model.safetensors")


def test_from_https_nothing_leads_to_http():
    import urllib.error
    import urllib.request

    request = urllib.request.Request("https://example.org/a.pth")
    with pytest.raises(urllib.error.URLError, match="redirect from https to http:"):
        locations._Redirects().redirect_request(
            request, None, 302, "", {}, "http://example.org/a.pth"
        )


def test_more_than_the_disk_has(server, monkeypatch):
    monkeypatch.setattr(
        locations.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})
    )
    with pytest.raises(OSError, match=r"has [\d,]+ bytes, but .* room for 10"):
        load(hashed(server))


def test_in_the_terminal(server, tmp_path, capsys):
    target = str(tmp_path / "net.safetensors")
    assert run(["convert", f"hf://{REPOSITORY}", target]) == 0
    assert run(["convert", "hf://nobody/nothing", target]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_of_two_at_once_one_downloads_and_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "cache_folder", lambda: tmp_path)
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def download(url, path):
        calls.append(url)
        begun.set()
        go_on.wait()
        path.write_bytes(b"weights")

    monkeypatch.setattr(locations, "_download_from_web", download)
    found = []

    def fetch():
        found.append(locations.fetch_from_web("https://there/net.safetensors")[1].read_bytes())

    pair = [threading.Thread(target=fetch) for _ in range(2)]
    pair[0].start()
    begun.wait()
    pair[1].start()
    go_on.set()
    for thread in pair:
        thread.join()
    assert found == [b"weights"] * 2
    assert len(calls) == 1
