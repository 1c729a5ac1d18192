"""Folders of attacked blocks: what is done is read again, so that a stopped run goes on and shards meet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from robusthash.apps.experiment.run_files import reading
from robusthash.core.atomic_files import write_arrays
from robusthash.core.identity import identity
from robusthash.core.limited_files import read_npz
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.attack_spec import AttackSpec


@dataclass(frozen=True)
class FolderStore:
    """Attacked blocks of a suite as files, ``ROOT/SPEC-IDENTITY/RESTART/BLOCK.npz``, complete or not there.

    The identity is that of the spec's settings.
    """

    root: Path

    def within(self, name: str) -> FolderStore:
        """A store of its own inside this one."""
        return type(self)(self.root / name)

    def folder(self, spec: AttackSpec) -> Path:
        """The folder of a spec's blocks."""
        name = re.sub(r"[^\w.-]+", "_", spec.name)
        return self.root / f"{name}-{identity(spec.settings(), 8)}"

    def path(self, spec: AttackSpec, restart: int, block: int) -> Path:
        """The file of a block."""
        return self.folder(spec) / str(restart) / f"{block}.npz"

    def name(self, spec: AttackSpec, restart: int, block: int) -> str:
        """The file of a block, for messages."""
        return str(self.path(spec, restart, block))

    def load(self, spec: AttackSpec, restart: int, block: int) -> AttackedBlock | None:
        """The stored block, or None.

        Raises:
            RunError: a file that cannot be read; it is named.
        """
        path = self.path(spec, restart, block)
        return read_block(path) if path.is_file() else None

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: AttackedBlock) -> None:
        """Store a block."""
        path = self.path(spec, restart, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, **attacked.arrays())


class AttackFolder(FolderStore):
    """Attacked blocks of one attack of an evaluation, ``ROOT/BLOCK.npz``; the caller's root identifies it."""

    def path(self, spec: AttackSpec, restart: int, block: int) -> Path:
        return self.root / f"{block}.npz"


def read_block(path: Path) -> AttackedBlock:
    """A stored block of attacked queries.

    Raises:
        RunError: a file that cannot be read; it is named.
    """
    with reading(path, "delete the file to attack them again", "the file of attacked queries"):
        block = AttackedBlock.from_arrays(read_npz(path))
        if counts := {len(part) for part in vars(block).values() if torch.is_tensor(part)} - {
            len(block.signs)
        }:
            raise ValueError(f"arrays of {len(block.signs)} and {min(counts)} queries")
    return block
