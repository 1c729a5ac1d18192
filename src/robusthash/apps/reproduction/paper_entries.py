"""Entries of the papers: one file a paper, one entry a table or figure, with its runs at two scales."""

from __future__ import annotations

import itertools
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from robusthash.apps.experiment.config import Section
from robusthash.apps.experiment.config_values import validated
from robusthash.apps.experiment.stored_analyses import Analysis
from robusthash.core.limited_files import parse_yaml
from robusthash.core.registry import nearest

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")


class RowSpec(Section):
    """A row: a recipe and overrides of it, or the reason why there is none.

    ``view`` says which attacks of a purified model the columns mean: ``oblivious`` or ``identity``.
    """

    recipe: str = ""  # below the folder of recipes, without ending
    set: list[str] = Field(default_factory=list)
    view: Literal["", "oblivious", "identity"] = ""
    missing: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> RowSpec:
        if bool(self.recipe) == bool(self.missing):
            raise ValueError("a row has either a recipe or the reason why it is missing")
        return self


class BlockSpec(Section):
    """Rows on one data set; ``beside`` names the printed values that agree in kind with them."""

    title: str
    beside: str = ""
    set: list[str] = Field(default_factory=list)  # of every row
    rows: dict[str, RowSpec]


class SettingAxis(Section):
    """A setting over whose values every row is run: the axis across of a figure."""

    setting: str
    values: list[str] = Field(min_length=2)

    @field_validator("values", mode="before")
    @classmethod
    def _texts(cls, values: Any) -> Any:
        return [str(value) for value in values] if isinstance(values, list) else values


class ScaleSpec(Section):
    """An entry at one scale.

    ``columns`` are results by their titles, as ``robusthash table`` takes them; by default those of the
    entry. ``minutes`` are those of one seed of all rows on one core, where no stored runs say it; none of
    what is made for a GPU.
    """

    blocks: list[BlockSpec] = Field(min_length=1)
    columns: dict[str, str | None] = Field(default_factory=dict)
    bits: list[int] = Field(default_factory=list)  # by default those of the recipes
    seeds: int = Field(3, ge=1)
    minutes: float | None = Field(None, gt=0)
    over: SettingAxis | None = None
    differs: str = ""  # from the paper

    def expanded(self) -> list[BlockSpec]:
        """Blocks of every code length, their rows at every value of the axis."""
        lengths: list[int | None] = [*self.bits] or [None]
        blocks = []
        for block, bits in itertools.product(self.blocks, lengths):
            longer = [] if bits is None else [f"hasher.bits={bits}"]
            title = block.title if len(lengths) == 1 else f"{block.title}, {bits} bits"
            beside = block.beside if bits in (None, 32) else ""  # what is printed here is of 32 bits
            common = [*block.set, *longer]
            rows = {n: _with(row, common) for n, row in block.rows.items()}
            if self.over is not None:
                rows = {f"{n}, {v}": row for n, r in rows.items() for v, row in self._along(r).items()}
            blocks.append(BlockSpec(title=title, beside=beside, rows=rows))
        return blocks

    def _along(self, row: RowSpec) -> dict[str, RowSpec]:
        assert self.over is not None
        setting, name = self.over.setting, self.over.setting.rpartition(".")[2]
        return {f"{name} {value}": _with(row, [], [f"{setting}={value}"]) for value in self.over.values}


def _with(row: RowSpec, before: list[str], after: list[str] | None = None) -> RowSpec:
    """The row with more overrides before and after its own."""
    return row if row.missing else row.model_copy(update={"set": [*before, *row.set, *(after or [])]})


class PaperEntry(Section):
    """A table or figure of a paper.

    Attributes:
        shows: results of the columns, or what another analysis makes of the runs: the bands that they search
            by, transfer between them, their cost, MAP of their epochs.
        printed: by data set of the paper and row, values in the order of ``columns``, in the paper's unit;
            null where they were not read.
        unit: of the printed values, by default that of the paper.
        left_out: rows and columns of the paper that are not in the entry, and the reason.
        unavailable: the reason why it cannot be run at all.
    """

    id: str
    kind: Literal["table", "figure"] = "table"
    title: str
    shows: Literal["values"] | Analysis = "values"
    columns: dict[str, str | None] = Field(default_factory=dict)
    unit: Literal["percent", "fraction"] | None = None
    printed: dict[str, dict[str, list[float | None]]] = Field(default_factory=dict)
    left_out: str = ""
    unavailable: str = ""
    small: ScaleSpec | None = None
    paper: ScaleSpec | None = None

    @property
    def analysis(self) -> Analysis | None:
        """The analysis that the entry shows; None of one that shows results of attacks."""
        return None if self.shows == "values" else self.shows

    @model_validator(mode="after")
    def _whole(self) -> PaperEntry:
        if bool(self.unavailable) == bool(self.small or self.paper):
            raise ValueError(f"{self.id} has either a scale or the reason why it is unavailable")
        for data, rows in self.printed.items():
            for row, values in rows.items():
                if len(values) != len(self.columns):
                    count = f"{len(values)} for {len(self.columns)} columns"
                    raise ValueError(f"{self.id}: printed values of {data}, {row}: {count}")
        for scale in filter(None, (self.small, self.paper)):
            for block in scale.blocks:
                if block.beside and block.beside not in self.printed:
                    raise ValueError(f"{self.id} prints no values of {block.beside!r}")
        return self

    def at(self, scale: Scale) -> ScaleSpec:
        """The entry at a scale. Raises ValueError with the reason where there is none."""
        spec: ScaleSpec | None = getattr(self, scale)
        if spec is not None:
            return spec
        if self.unavailable:
            raise ValueError(f"{self.id} cannot be run: {self.unavailable}")
        other = next(name for name in SCALES if name != scale)
        raise ValueError(f"{self.id} has no {scale} scale; take --scale {other}")


class Paper(Section):
    """The entries of one paper; ``unit`` is that of its printed values."""

    name: str
    title: str
    venue: str
    unit: Literal["percent", "fraction"]
    entries: list[PaperEntry]

    def entry(self, name: str) -> PaperEntry:
        """The entry of this id. Raises ValueError with all that there are."""
        by_id = {entry.id: entry for entry in self.entries}
        if name not in by_id:
            raise ValueError(f"{self.name} has no entry {name!r}{nearest(name, by_id)}")
        return by_id[name]


@cache
def papers() -> dict[str, Paper]:
    """The papers by name in lower case."""
    folder = files("robusthash.apps.reproduction") / "papers"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            found[name] = read_paper(file.read_text(encoding="utf-8"), file.name)
    return found


def read_paper(text: str, where: str) -> Paper:
    """A paper from the text of its file. Raises ValueError for what it does not say."""
    return validated(Paper, parse_yaml(text, where), where)


def paper(name: str) -> Paper:
    """The paper of this name. Raises ValueError with all that there are."""
    found = papers()
    if name.lower() not in found:
        raise ValueError(f"no paper is called {name!r}{nearest(name.lower(), found)}")
    return found[name.lower()]
