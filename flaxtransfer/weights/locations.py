"""Locations of weights: built-in files, web addresses, buckets and the Hugging Face hub.

Files from the web are stored in a cache, and the digits of the sha256 in a file's name are checked.
Files from the hub go into its own cache, whose folder, token, endpoint and offline mode are set as
for every program that uses it (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import hashlib
import http.client
import ipaddress
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from flaxtransfer.files import folder_lock, read_json
from flaxtransfer.paths import suggest
from flaxtransfer.weights.readers.detect import SUFFIXES, has_weights_name
from flaxtransfer.weights.readers.folders import IN_A_FOLDER, INDEX, originals, weight_map

__all__ = [
    "BUILTIN_DEFAULT",
    "BUILTIN_PREFIX",
    "HUB_PREFIX",
    "Address",
    "builtin_names",
    "cache_folder",
    "card",
    "fetch_from_bucket",
    "fetch_from_hub",
    "fetch_from_web",
    "locate_builtin",
]


BUILTIN_PREFIX = "builtin"
BUILTIN_DEFAULT = "resnet18w32_drawn"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
CARD_FIELDS = ("data", "command", "accuracy", "seed", "sha256")


def builtin_names() -> list[str]:
    """The names of the built-in checkpoints, sorted."""
    return sorted(path.stem for path in BUILTIN_FOLDER.glob("*.safetensors"))


def card(name: str = BUILTIN_DEFAULT) -> dict[str, Any]:
    """The model card of a built-in checkpoint: its data, training command and accuracy.

    Returns:
        A dictionary with at least data, command, accuracy, seed and sha256.

    Raises:
        ValueError: an unknown name, or a card with a missing field.
    """
    path = BUILTIN_FOLDER / f"{name}.json"
    if name not in builtin_names() or not path.is_file():
        raise ValueError(
            f"unknown built-in checkpoint {name!r}{suggest(name, builtin_names())}; known: "
            f"{', '.join(builtin_names()) or 'none'}"
        )
    content = read_json(path)
    missing = [field for field in CARD_FIELDS if field not in content]
    if missing:
        raise ValueError(f"the card of the built-in checkpoint {name!r} lacks {missing}: {path}")
    result: dict[str, Any] = content
    return result


def locate_builtin(source: str) -> tuple[str, Path]:
    """The full name and the file of "builtin" or "builtin:<name>", verified by its card.

    Raises:
        ValueError: an unknown name, or a file whose checksum differs from the card's.
    """
    name = source.removeprefix(BUILTIN_PREFIX).removeprefix(":") or BUILTIN_DEFAULT
    expected = card(name)["sha256"]
    path = BUILTIN_FOLDER / f"{name}.safetensors"
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f"the sha256 of the built-in checkpoint {name!r} must be {expected}, as its card "
            f"states, "
            f"got {actual}; install the package again ({path})"
        )
    return f"{BUILTIN_PREFIX}:{name}", path


TIMEOUT = 30.0
"""Seconds without data after which a download fails."""
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.(?:[^.]+|pth\.tar)$")
_PIECE = 1 << 20


def cache_folder() -> Path:
    """The cache folder: FLAXTRANSFER_CACHE, or ``flaxtransfer`` in the user's cache folder."""
    if chosen := os.environ.get("FLAXTRANSFER_CACHE"):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flaxtransfer"


def fetch_from_web(url: str) -> tuple[str, Path, list[str]]:
    """Downloads a file from the web to the cache; returns address, path and notes.

    A cached file is not downloaded again. An interrupted download is resumed if the server confirms
    that the file has not changed. A terminal shows the progress.

    Args:
        url: ``https://``; or ``http://`` on this machine, or if the name holds digits of the
            sha256, as in ``resnet50-0676ba61.pth``.

    Raises:
        OSError: no answer, an error status, or an interrupted download.
        ValueError: another kind of address, or a file whose sha256 differs from its name.
    """
    parts = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(parts.path).rsplit("/", 1)[-1]
    # A name without a suffix may be weights; a name with another suffix is not.
    likely = has_weights_name(name) or "." not in name
    if not re.fullmatch(r"[\w.+-]+", name) or not likely:
        raise ValueError(
            f"{url}: the address must end in a file name with the suffix {', '.join(SUFFIXES)}, or "
            "without a suffix"
        )
    digits = found[1] if (found := _HASHED.search(name)) else ""
    if parts.scheme == "http" and not digits and not _is_local(parts.hostname or ""):
        raise ValueError(
            f"{url}: http is not secure; use https, or a file name with the first 8 digits of the "
            "sha256"
        )
    # Two servers may have files with the same name, and the name must stay: it identifies weights.
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    notes = []
    if path.is_file():
        notes.append(f"taken from the cache ({folder})")
    else:
        if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("FLAXTRANSFER_OFFLINE"):
            raise FileNotFoundError(
                f"{url} is not in the cache ({cache_folder()}), and an environment variable "
                "(FLAXTRANSFER_OFFLINE or HF_HUB_OFFLINE) forbids downloads"
            )
        # Of runs that start at once, the first downloads, and the others wait for its file.
        with folder_lock(folder, wait=True):
            if not path.is_file():
                _download_from_web(url, path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(digits):
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{url} is damaged or another file: its sha256 must start with {digits}, as its name "
            f"states, got {sha256[: len(digits)]}; it was removed"
        )
    notes.append(
        f"sha256 {digits} verified by the file's name"
        if digits
        else f"the file cannot be verified; its sha256 is {sha256}"
    )
    return url, path, notes


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    max_redirections = 5

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Called for each redirect."""
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"redirect from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_from_web(url: str, path: Path) -> None:
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
            # The partial file is complete already, or longer than the file is now.
            part.unlink()
            return _download_from_web(url, path)
        kind = FileNotFoundError if error.code in (404, 410) else OSError
        raise kind(f"{url}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"{url} could not be downloaded: {reason}; call again to resume") from error
    if expected is not None and there != expected:
        raise OSError(f"{url} ended after {there:,} of {expected:,} bytes; call again to resume")
    part.replace(path)
    mark.unlink(missing_ok=True)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _check_room(expected: int | None, there: int, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if expected is not None and expected - there > free:
        raise OSError(
            f"the file has {expected:,} bytes, but {path.parent} only has room for {free:,}"
        )


_NOT_WEIGHTS = {"checkpoints", "features"}
"""Folders of a run, whose network lies beside them."""


def fetch_from_bucket(address: str) -> tuple[str, Path, list[str]]:
    """Fetches weights in a bucket to the cache (extra ``gcs``); returns address, path and notes.

    A file comes with the JSON files beside it, which may describe it; a folder, such as that of a
    run, without checkpoints. What is in the cache already is compared and not fetched again.

    Args:
        address: ``gs://bucket/path``, of a file or a folder.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: the storage or the disk failed.
        ValueError: it is no such address, or the extra is not installed.
    """
    from flaxtransfer.checkpoint.mirror import Bucket, fetch_tree  # Far more than a name.

    parent, _, name = address.rpartition("/")
    if not has_weights_name(name):
        parent, name = address, ""

    def wanted(each: str) -> bool:
        if not name or name.endswith(".json"):  # A folder, or the index of several files.
            return _NOT_WEIGHTS.isdisjoint(each.split("/"))
        return each == name or ("/" not in each and each.endswith(".json"))

    # A place of its own, for files of one folder may come at the same time; its name stays.
    folder = cache_folder() / hashlib.sha256(address.encode()).hexdigest()[:16]
    if not name:
        folder /= address.rpartition("/")[2]
    note = ""
    try:
        note = fetch_tree(parent, folder, keep=wanted)
    except FileNotFoundError:
        if not name:
            raise
    if not note or not (folder / name).exists():
        known = Bucket.at(parent).objects()  # Or there is no such bucket.
        raise FileNotFoundError(f"there is no {address}{suggest(name, known)}")
    return address, folder / name, [note]


HUB_PREFIX = "hf://"
BESIDE = ("config.json", "preprocessor_config.json")
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?::(?P<file>[\w./ -]+))?"
)


class Address:
    """A parsed address of the hub: ``hf://organization/name[@revision][:file]``.

    Raises:
        ValueError: the text does not have this form.

    >>> Address("hf://timm/resnet50.a1_in1k@main").repository
    'timm/resnet50.a1_in1k'
    """

    def __init__(self, text: str) -> None:
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text:
            raise ValueError(
                "an address on the hub must have the form hf://organization/name, "
                "hf://organization/name@revision or "
                f"hf://organization/name@revision:folder/file.safetensors, got {text!r}"
            )
        self.text = text
        self.repository: str = found["repository"]
        self.revision: str | None = found["revision"]
        self.file: str | None = found["file"]


def fetch_from_hub(text: str) -> tuple[str, Path, list[str]]:
    """Downloads a file from the hub to its cache; returns address with revision, path and notes.

    Args:
        text: the address.

    Raises:
        FileNotFoundError: an unknown repository, revision or file, with what exists; or nothing in
            the cache while the hub cannot be reached.
        ValueError: another form of address, or a file whose sha256 differs from the hub's.
    """
    from huggingface_hub import errors

    address = Address(text)
    if _offline():
        return _cached(address, "HF_HUB_OFFLINE is set")
    api = _api()
    where = f"{address.repository} at {api.endpoint}"
    try:
        info = api.model_info(address.repository, revision=address.revision, files_metadata=True)
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{where} requires a login and accepted terms: accept them in the browser, then run "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no model {where}, or it is private and no token was given (HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no revision {address.revision!r}{_revisions(api, address)}"
        ) from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        return _cached(address, f"{api.endpoint} cannot be reached ({_brief(error)})")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    name = _chosen(address, siblings)
    notes = []
    try:
        path = Path(_download_from_hub(api, address, name, info.sha))
        for part in sorted(set(weight_map(path).values())) if name.endswith(INDEX) else ():
            whole = str(Path(name).with_name(part))
            held = Path(_download_from_hub(api, address, whole, info.sha))
            if whole in siblings and (digest := getattr(siblings[whole].lfs, "sha256", None)):
                _verify(held, digest, where)
        for beside in BESIDE:
            companion = str(Path(name).with_name(beside))
            if companion in siblings:
                _download_from_hub(api, address, companion, info.sha)
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise OSError(f"{name} of {where} could not be downloaded: {_brief(error)}") from error
    sha256 = getattr(siblings[name].lfs, "sha256", None)
    if sha256:
        _verify(path, sha256, where)
        notes.append(f"sha256 {sha256[:8]} verified by the hub")
    return f"{HUB_PREFIX}{address.repository}@{info.sha[:12]}:{name}", path, notes


def _api() -> Any:
    import huggingface_hub

    # Read at each call: the library itself reads the variable only once, at import.
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _cache() -> str | None:
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download_from_hub(api: Any, address: Address, name: str, revision: str) -> str:
    result: str = api.hf_hub_download(
        address.repository, name, revision=revision, cache_dir=_cache(), etag_timeout=10
    )
    return result


def _cached(address: Address, why: str) -> tuple[str, Path, list[str]]:
    """The file in the cache, when the hub cannot be reached."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            address.repository,
            revision=address.revision,
            cache_dir=_cache(),
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{why}, and the cache ({_cache() or huggingface_hub.constants.HF_HUB_CACHE}) does not "
            f"hold {address.repository}"
            + (f" at {address.revision}" if address.revision else "")
            + f"; download it once with a connection: hf download {address.repository}"
        ) from error
    root = Path(folder)
    files = {str(p.relative_to(root)): None for p in root.rglob("*") if p.is_file()}
    name = _chosen(address, files)
    text = f"{HUB_PREFIX}{address.repository}@{root.name[:12]}:{name}"
    return text, root / name, [f"{why}: taken from the cache"]


def _chosen(address: Address, files: Mapping[str, Any]) -> str:
    """The weight file that the address selects."""
    readable = originals(filter(has_weights_name, files))
    if address.file is not None:
        if address.file in files:
            return address.file
        raise FileNotFoundError(
            f"{address.repository} has no file {address.file!r}{suggest(address.file, files)}; "
            f"weights there: {', '.join(readable) or 'none'}"
        )
    preferred = [name for name in IN_A_FOLDER if name in files] or readable
    if len(preferred) == 1 or set(preferred[:1]) & set(IN_A_FOLDER[:2]):
        return preferred[0]
    raise FileNotFoundError(
        f"{address.repository} has {len(readable)} weight files, name one after a colon: "
        f"{', '.join(readable) or ', '.join(sorted(files)[:10]) or 'it has no files'}"
    )


def _revisions(api: Any, address: Address) -> str:
    try:
        refs = api.list_repo_refs(address.repository)
    except OSError:
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"{suggest(address.revision or '', names)}; known: {', '.join(names)}"


def _verify(path: Path, expected: str, where: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        # The snapshot is a link to the damaged file.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} of {where} is damaged: its sha256 must be {expected[:16]}, got "
            f"{found[:16]}; it was removed from the cache, try again"
        )


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
