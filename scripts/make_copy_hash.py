"""The packaged hash for copies, ours: python scripts/make_copy_hash.py --data DATA --out FOLDER

Of the 1,680 training photographs of UC Merced (public domain; DATA holds ``ucmerced.tar`` and
``ucmerced.jsonl``), by ``robusthash.apps.image_hash.copy_weights``. Nothing is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from robusthash.apps.image_hash.copy_weights import IMAGE, made_hasher
from robusthash.models.hub_folder import HubCard

ABOUT = HubCard(
    name="copy-hash",
    licence="apache-2.0",
    data="1,680 photographs of UC Merced (public domain)",
    method="thresholds of windowed principal components of block means; scripts/make_copy_hash.py",
    finds_copies=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="with ucmerced.tar and ucmerced.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made_hasher(given.data).save_pretrained(given.out, size=IMAGE, about=ABOUT, overwrite=True)


if __name__ == "__main__":
    main()
