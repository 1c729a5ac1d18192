"""Hashers in folders by the conventions of the Hugging Face hub, fetched from it and pushed to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from robusthash.core.atomic_files import write_aside
from robusthash.core.limited_files import RunError
from robusthash.models.hub_card import HubCard
from robusthash.models.saved_hasher import HUB, load_exported, names_in, save_exported

if TYPE_CHECKING:
    from robusthash.models.hasher import Hasher

README = "README.md"
_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def save_folder(
    folder: Path, hasher: Hasher, facts: Mapping[str, Any], about: HubCard | None, overwrite: bool = False
) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``.

    Args:
        facts: see ``save_exported``.
        about: of the model card. A card that is there already stays, unless ``overwrite``: somebody may have
            written in it.
    """
    about = about or HubCard()
    facts = {"library_name": "robusthash", "finds_copies": about.finds_copies, **facts}
    card = save_exported(folder, hasher, facts, overwrite, HUB)
    readme = folder / README
    if overwrite or not readme.exists():
        with write_aside(readme) as aside:
            aside.write_text(about.text(card), encoding="utf-8")


def facts_of(hasher: Hasher, size: int | None) -> dict[str, Any]:
    """Facts of a hasher that comes without those of its run.

    Args:
        size: pixels a side of the images that it was trained on; by default what is known of it.

    Raises:
        ValueError: it encodes images alone, and their size is not known.
    """
    size = size or hasher.side
    if size is None and hasher.modalities == ("image",):
        raise ValueError(
            "the size of the images of this hasher is not known; name it: save_pretrained(folder, size=...)"
        )
    return {"image_size": [] if size is None else [size, size]}


def fetched(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a saved model: ``source`` itself, or a copy of it from the hub.

    Args:
        source: a folder, or an id of the hub, ``user/name``: that alone opens a connection. What is there
            on the disk is never asked for.
        revision: branch, tag or commit of the hub; a commit is the only one that cannot change.

    Raises:
        RunError: neither; or what the hub refuses.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise RunError(f"{folder} is a file; a saved model is a folder, which save_pretrained wrote")
    if not _ID.fullmatch(str(source)):
        raise RunError(f"{str(source)!r} is neither a folder nor an id of the hub, user/name")
    hub, files = _hub(), [HUB.card, HUB.weights, README]
    try:
        return Path(hub.snapshot_download(str(source), revision=revision, token=token, allow_patterns=files))
    except Exception as error:  # the library has errors of several families
        raise RunError(
            f"there is no folder {source}, and the hub does not give {source}: {_reason(error)}"
        ) from None


def load_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Hasher:
    """The hasher of a folder or of the hub, on the CPU in eval mode; see ``Hasher.from_pretrained``."""
    folder = fetched(source, revision, token)
    if names_in(folder) is None:
        raise RunError(f"{folder} holds no saved model (no {HUB.card})")
    return load_exported(folder)[0]


def check_id(repository: str) -> None:
    """RunError where it is no id of the hub."""
    if not _ID.fullmatch(repository):
        raise RunError(f"an id of the hub is user/name, got {repository!r}")


def push_folder(folder: Path, repository: str, private: bool = True, token: str | None = None) -> str:
    """Upload a folder that ``save_folder`` wrote, and nothing else that lies in it; the address.

    Raises:
        RunError: an id that is none, or what the hub refuses.
    """
    check_id(repository)
    load_exported(folder)  # what is published must load
    hub, files = _hub(), [HUB.card, HUB.weights, README]
    api = hub.HfApi(token=token, library_name="robusthash")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=files, commit_message="Upload hasher"
        )
    except Exception as error:
        raise RunError(f"the hub does not take {repository}: {_reason(error)}") from None
    return str(address)


def push(
    hasher: Hasher,
    repository: str,
    facts: Mapping[str, Any],
    about: HubCard | None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Upload a hasher as ``save_folder`` writes it; the address."""
    with TemporaryDirectory() as folder:
        save_folder(Path(folder), hasher, facts, about)
        return push_folder(Path(folder), repository, private, token)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"the hub needs an extra: pip install 'robusthash[hub]' ({error})") from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}{f': {first[:200]}' if first else ''}"
