"""The model card of a hasher: Markdown with YAML front matter, by the conventions of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

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
