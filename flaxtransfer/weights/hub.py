"""Weights from the Hugging Face hub: one file and what lies beside it, at one revision.

Files go into the hub's own cache, whose folder, token, endpoint and offline mode are set as for
every program that uses it (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxtransfer.paths import suggest
from flaxtransfer.weights.containers import has_weights_name

__all__ = ["PREFIX", "Address", "fetch"]

PREFIX = "hf://"
BESIDE = ("config.json", "preprocessor_config.json")
PREFERRED = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?::(?P<file>[\w./ -]+))?"
)


class Address:
    """What stands in `hf://organisation/name[@revision][:file]`.

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
                "hf://organisation/name, hf://organisation/name@revision or "
                "hf://organisation/name@revision:folder/file.safetensors"
            )
        self.text = text
        self.repository: str = found["repository"]
        self.revision: str | None = found["revision"]
        self.file: str | None = found["file"]


def fetch(text: str) -> tuple[str, Path, list[str]]:
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
        path = Path(_download(api, address, name, info.sha))
        for beside in BESIDE:
            companion = str(Path(name).with_name(beside))
            if companion in siblings:
                _download(api, address, companion, info.sha)
    except (OSError, errors.HTTPError) as error:
        raise OSError(f"{name} of {where} could not be fetched: {_brief(error)}") from error
    wanted = getattr(siblings[name].lfs, "sha256", None)
    if wanted:
        _verify(path, wanted, where)
        notes.append(f"sha256 {wanted[:8]} as the hub has it")
    return f"{PREFIX}{address.repository}@{info.sha[:12]}:{name}", path, notes


def _api() -> Any:
    import huggingface_hub

    # Read when asked for: the library itself looks at the variable once, when it is imported.
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _cache() -> str | None:
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download(api: Any, address: Address, name: str, revision: str) -> str:
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
    text = f"{PREFIX}{address.repository}@{root.name[:12]}:{name}"
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
