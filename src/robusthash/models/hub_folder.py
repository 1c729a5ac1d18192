"""Hashers and their cards in folders by the conventions of the Hugging Face hub, fetched and pushed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from robusthash.core.atomic_files import write_aside
from robusthash.core.limited_files import RunError
from robusthash.models.saved_hasher import HUB, load_exported, names_in, save_exported

if TYPE_CHECKING:
    from robusthash.models.hasher import Hasher

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class HubScore:
    """A measured value of a model, with the bounds of its interval.

    Args:
        result: name of the result: ``clean``, ``worst``, ``I2T img-linf-8 standard``.
        measure: ``MAP``, ``wMAP``, ...
        threat: what the attacker may do, such as ``img-linf-8``; empty where nobody attacked.
        chance: the value of a random order, where known.
    """

    result: str
    measure: str
    value: float
    low: float
    high: float
    threat: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class HubCard:
    """The facts of a model card that the weights do not hold.

    Args:
        name: of the model.
        licence: identifier of the hub, such as ``apache-2.0``; weights carry the terms of their data, so
            nothing is assumed.
        data: name of the data that it was trained and measured on.
        method: objective and defense, in words.
        scores: measured values; none where nothing was measured.
        finds_copies: whether its codes were made to find copies; None where nobody says.

    Raises:
        ValueError: a licence that is no identifier.
    """

    name: str = "hasher"
    licence: str = "unknown"
    data: str = ""
    method: str = ""
    scores: tuple[HubScore, ...] = ()
    finds_copies: bool | None = None

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.licence):
            raise ValueError(
                f"the licence is an identifier of the hub, such as apache-2.0, other or unknown, "
                f"got {self.licence!r}"
            )

    def text(self, card: Mapping[str, Any]) -> str:
        """README.md of a folder whose ``config.json`` is ``card``."""
        front = yaml.safe_dump(self._front(card), sort_keys=False, allow_unicode=True)
        lines = [*self._facts(card), "", *self._measured(), "", *_use(card)]
        return f"---\n{front}---\n\n" + "\n".join(lines)

    def _front(self, card: Mapping[str, Any]) -> dict[str, Any]:
        front: dict[str, Any] = {"library_name": "robusthash", "license": self.licence}
        if "image" in card["modalities"]:
            front["pipeline_tag"] = "image-feature-extraction"
        front["tags"] = ["robusthash", "hashing", "image-retrieval", "adversarial-robustness"]
        if self.scores:
            front["model-index"] = [{"name": self.name, "results": [self._entry(s) for s in self.scores]}]
        return front

    def _entry(self, score: HubScore) -> dict[str, Any]:
        """A measured value as the hub lists it."""
        data = self.data or "unknown"
        title = f"{score.measure} ({score.result})"
        metric = {"type": "mean_average_precision", "name": title, "value": round(score.value, 6)}
        slug = re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")
        return {
            "task": {"type": "image-feature-extraction", "name": "search by binary codes"},
            "dataset": {"type": slug or "unknown", "name": data},
            "metrics": [metric],
        }

    def _facts(self, card: Mapping[str, Any]) -> list[str]:
        size = f" of {card['image_size'][0]} px" if len(card["image_size"]) == 2 else ""
        declared = card["hasher"].get("declared", "plain")
        kinds = {"image": f"images{size}", "text": "texts"}
        encoded = " and ".join(kinds[each] for each in card["modalities"])
        forms = {"image": "pixels in [0, 1]", "text": "texts"}
        inputs = " and ".join(forms[each] for each in card["modalities"])
        square = [f"| images | central square, by Pillow BICUBIC to {size[4:]} |"] if size else []
        lines = [
            f"# {self.name}",
            "",
            f"{card['bits']}-bit codes of {encoded}, compared by Hamming distance. Made by robusthash.",
            "",
            "| | |",
            "| --- | --- |",
            f"| data | {_cell(self.data) or 'not said'} |",
            f"| method | {_cell(self.method) or 'not said'} |",
            f"| defense | {_cell(declared)} |",
            f"| input | {inputs}; normalisation{' and purifier' * ('purifiers' in card['hasher'])} inside |",
            *square,
            f"| digest | {card['digest']} |",
            f"| licence | {self.licence} |",
        ]
        return lines

    def _measured(self) -> list[str]:
        if not self.scores:
            return ["## Measured", "", "Nothing was measured of these weights; assume no robustness."]
        rows = [
            f"| {_cell(s.result)} | {_cell(s.threat) or 'none'} | {s.measure} | {s.value:.4f} "
            f"({s.low:.4f} to {s.high:.4f}) | {'' if s.chance is None else f'{s.chance:.4f}'} |"
            for s in self.scores
        ]
        return [
            "## Measured",
            "",
            "With 95 % intervals. A worst case is that of the attacks that were run: a bound from above on "
            "the robustness, and no promise against others.",
            "",
            "| result | threat | measure | value | chance |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]


def _cell(text: Any) -> str:
    """A text as a cell of a table of Markdown, without markup of its own."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(text).split()))


def _use(card: Mapping[str, Any]) -> list[str]:
    images = ['codes = model.encode(["a.jpg", "b.jpg"])'] if "image" in card["modalities"] else []
    texts = ['codes = model.encode(["some words"], modality="text")'] if card["texts"] else []
    return [
        "## Use",
        "",
        "```python",
        "import robusthash as rh",
        "",
        'model = rh.SearchModel.from_pretrained("USER/NAME")  # or a folder',
        *images,
        *texts,
        "```",
        "",
        "`config.json` and `model.safetensors` hold no code; robusthash checks both when it reads them.",
        "",
    ]


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
        raise RunError(f"no folder {source}, and the hub does not give it: {_reason(error)}") from None


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
