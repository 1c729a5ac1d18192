"""Measures as keys: the name of a value, such as ``wMAP@5000/mink/8bit``, taken apart into its fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Role = Literal["", "worst", "targeted", "collateral"]
Storage = Literal["", "8bit", "rounded"]

_PREFIX: dict[Role, str] = {"": "", "worst": "w", "targeted": "t-", "collateral": "collateral "}
_TIES = ("expected", "optimistic", "pessimistic", "legacy")
_NAME = re.compile(
    r"(?P<prefix>w(?=MAP)|t-|collateral )?(?P<base>.+?)(?P<options>(/[^/]+)*)"
    r"(?: under (?P<attack>.+)| eps (?P<eps>[\d.e+-]+))?"
)


@dataclass(frozen=True)
class MeasureKey:
    """One measured value; ``str`` gives the name that ``EvalResult.values`` and ``per_query`` know it by.

    ==================  ====================================================================================
    ``wMAP``            role "worst": the lowest AP of each query
    ``t-MAP``           role "targeted": of the target labels
    ``collateral MAP``  role "collateral": of the original labels under targeted attacks
    ``MAP@5000/mink``   base with options: denominator, ties, gain; ``t-MAP/max``: the best target
    ``wMAP/8bit``       storage: attacked queries as 8-bit images, or ``/rounded`` to whole words
    ``MAP under hag``   the lowest AP over the restarts of one attack of a suite
    ``wMAP eps 0.03``   the worst case within another budget
    ==================  ====================================================================================
    """

    base: str  # "MAP", "MAP@5000", "nDCG@100", "P@r<=2", "ASR", ...
    options: tuple[str, ...] = ()
    role: Role = ""
    storage: Storage = ""
    attack: str = ""
    eps: float | None = None

    @classmethod
    def parse(cls, name: str) -> MeasureKey:
        """The key of a name; a text outside the language above is a base without options."""
        match = _NAME.fullmatch(name)
        if match is None:
            return cls(name)
        options = match["options"].split("/")[1:]
        storage: Any = options.pop() if options and options[-1] in get_args(Storage) else ""
        role = next(role for role, prefix in _PREFIX.items() if prefix == (match["prefix"] or ""))
        eps = None if match["eps"] is None else float(match["eps"])
        return cls(match["base"], tuple(options), role, storage, match["attack"] or "", eps)

    def __str__(self) -> str:
        name = _PREFIX[self.role] + "/".join([self.base, *self.options, *[self.storage] * bool(self.storage)])
        name += f" under {self.attack}" if self.attack else ""
        return name if self.eps is None else f"{name} eps {self.eps:.6g}"

    def name(
        self,
        role: Role = "",
        *,
        storage: Storage = "",
        option: str = "",
        attack: str = "",
        eps: float | None = None,
    ) -> str:
        """The name of the same base and options in another role, storage, ..."""
        options = (*self.options, option) if option else self.options
        return str(replace(self, options=options, role=role, storage=storage, attack=attack, eps=eps))

    @property
    def is_ap(self) -> bool:
        """A mean of average precisions, whatever the cut, denominator and role."""
        return self.base == "MAP" or self.base.startswith("MAP@")

    @property
    def ties(self) -> str:
        """The order within ties that the name asks for; "" leaves it to the protocol."""
        return next((option for option in self.options if option in _TIES), "")

    def plain(self) -> dict[str, Any]:
        """The fields that are not at their default, as JSON takes them."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in ("", (), None)
        }
