"""Where weights come from: built in, a web address, or the Hugging Face hub.

The checkpoints that come with the package, each with a card that says what it is.

Weights from a web address, kept in a cache; the digits in a file's name are checked.

Weights from the Hugging Face hub: one file and what lies beside it, at one revision.

Files go into the hub's own cache, whose folder, token, endpoint and offline mode are set as for
every program that uses it (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import hashlib
import http.client
import ipaddress
import json
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

from flaxtransfer.files import folder_lock
from flaxtransfer.paths import suggest
from flaxtransfer.weights.readers.detect import SUFFIXES, has_weights_name

__all__ = [
    "BUILTIN_DEFAULT",
    "BUILTIN_PREFIX",
    "HUB_PREFIX",
    "Address",
    "builtin_names",
    "cache_folder",
    "card",
    "fetch_from_hub",
    "fetch_from_web",
    "locate_builtin",
]


BUILTIN_PREFIX = "builtin"
BUILTIN_DEFAULT = "resnet18w32_drawn"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
CARD_FIELDS = ("data", "command", "accuracy", "seed", "sha256")


def builtin_names() -> list[str]:
    """The checkpoints there are, sorted."""
    return sorted(path.stem for path in BUILTIN_FOLDER.glob("*.safetensors"))


def card(name: str = BUILTIN_DEFAULT) -> dict[str, Any]:
    """What a checkpoint that comes with the package was made of, how, and how good it is.

    Returns:
        At least data, command, accuracy, seed and sha256.

    Raises:
        ValueError: an unknown name, or a card that lacks a field.
    """
    path = BUILTIN_FOLDER / f"{name}.json"
    if name not in builtin_names() or not path.is_file():
        raise ValueError(
            f"no built-in checkpoint {name!r}; there are: {', '.join(builtin_names()) or 'none'}"
            f"{suggest(name, builtin_names())}"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in CARD_FIELDS if field not in content]
    if missing:
        raise ValueError(f"the card of the built-in checkpoint {name!r} lacks {missing}: {path}")
    return content


def locate_builtin(source: str) -> tuple[str, Path]:
    """The full name and the file of "builtin" or "builtin:<name>", checked against its card.

    Raises:
        ValueError: an unknown name, or a file that is not the one of the card.
    """
    name = source.removeprefix(BUILTIN_PREFIX).removeprefix(":") or BUILTIN_DEFAULT
    expected = card(name)["sha256"]
    path = BUILTIN_FOLDER / f"{name}.safetensors"
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f"the built-in checkpoint {name!r} is not the file of its card: sha256 {actual}, and "
            f"the card says {expected}; install the package again ({path})"
        )
    return f"{BUILTIN_PREFIX}:{name}", path


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


def fetch_from_web(url: str) -> tuple[str, Path, list[str]]:
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
        with folder_lock(folder):
            _download_from_web(url, path)
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
            # All of it was there already, or more than there is now.
            part.unlink()
            return _download_from_web(url, path)
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


HUB_PREFIX = "hf://"
BESIDE = ("config.json", "preprocessor_config.json")
PREFERRED = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?::(?P<file>[\w./ -]+))?"
)


class Address:
    """What stands in `hf://organization/name[@revision][:file]`.

    Raises:
        ValueError: another form.

    >>> Address("hf://timm/resnet50.a1_in1k@main").repository
    'timm/resnet50.a1_in1k'
    """

    def __init__(self, text: str) -> None:
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text:
            raise ValueError(
                f"{text!r} is no address on the hub; these have the form "
                "hf://organization/name, hf://organization/name@revision or "
                "hf://organization/name@revision:folder/file.safetensors"
            )
        self.text = text
        self.repository: str = found["repository"]
        self.revision: str | None = found["revision"]
        self.file: str | None = found["file"]


def fetch_from_hub(text: str) -> tuple[str, Path, list[str]]:
    """The address with its revision, the file in the cache, and notes.

    Args:
        text: the address.

    Raises:
        FileNotFoundError: no such repository, revision or file, with what there is; nothing in the
            cache, where the hub cannot be asked.
        ValueError: another form of address, or a file whose sha256 is not the hub's.
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
            f"{where} asks for a login and for its terms to be accepted: do so in the browser, "
            "then `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no model {where}, or it is private and no token was given (HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no revision {address.revision!r}{_revisions(api, address)}"
        ) from error
    except (OSError, errors.HTTPError) as error:
        return _cached(address, f"{api.endpoint} cannot be asked ({_brief(error)})")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    name = _chosen(address, siblings)
    notes = []
    try:
        path = Path(_download_from_hub(api, address, name, info.sha))
        for beside in BESIDE:
            companion = str(Path(name).with_name(beside))
            if companion in siblings:
                _download_from_hub(api, address, companion, info.sha)
    except (OSError, errors.HTTPError) as error:
        raise OSError(f"{name} of {where} could not be fetched: {_brief(error)}") from error
    wanted = getattr(siblings[name].lfs, "sha256", None)
    if wanted:
        _verify(path, wanted, where)
        notes.append(f"sha256 {wanted[:8]} as the hub has it")
    return f"{HUB_PREFIX}{address.repository}@{info.sha[:12]}:{name}", path, notes


def _api() -> Any:
    import huggingface_hub

    # Read when asked for: the library itself looks at the variable once, when it is imported.
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _cache() -> str | None:
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download_from_hub(api: Any, address: Address, name: str, revision: str) -> str:
    return api.hf_hub_download(
        address.repository, name, revision=revision, cache_dir=_cache(), etag_timeout=10
    )


def _cached(address: Address, why: str) -> tuple[str, Path, list[str]]:
    """What the cache has of it."""
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
            f"{why}, and the cache ({_cache() or huggingface_hub.constants.HF_HUB_CACHE}) has "
            f"nothing of {address.repository}"
            + (f" at {address.revision}" if address.revision else "")
            + f"; fetch it once with a connection: hf download {address.repository}"
        ) from error
    root = Path(folder)
    files = {str(p.relative_to(root)): None for p in root.rglob("*") if p.is_file()}
    name = _chosen(address, files)
    text = f"{HUB_PREFIX}{address.repository}@{root.name[:12]}:{name}"
    return text, root / name, [f"{why}: taken from the cache"]


def _chosen(address: Address, files: Mapping[str, Any]) -> str:
    """The file of weights that is meant."""
    readable = sorted(filter(has_weights_name, files))
    if address.file is not None:
        if address.file in files:
            return address.file
        raise FileNotFoundError(
            f"{address.repository} has no file {address.file!r}{suggest(address.file, files)}; "
            f"weights there: {', '.join(readable) or 'none'}"
        )
    preferred = [name for name in PREFERRED if name in files] or readable
    if len(preferred) == 1 or preferred[:1] == [PREFERRED[0]]:
        return preferred[0]
    raise FileNotFoundError(
        f"{address.repository} has {len(readable)} files of weights, name one behind a colon: "
        f"{', '.join(readable) or ', '.join(sorted(files)[:10]) or 'it has no files'}"
    )


def _revisions(api: Any, address: Address) -> str:
    try:
        refs = api.list_repo_refs(address.repository)
    except OSError:
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"{suggest(address.revision or '', names)}; there are: {', '.join(names)}"


def _verify(path: Path, wanted: str, where: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        # What the snapshot links to is the damaged file.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} of {where} arrived damaged: its sha256 is {found[:16]}, and the hub says "
            f"{wanted[:16]}; it was removed from the cache, try again"
        )


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
