"""The small trained world in which attacks are checked."""

from __future__ import annotations

import pytest

from contract.checks import World, make_pair_world, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """A trained victim, one batch of queries and what an attacker knows."""
    return make_world()


@pytest.fixture(scope="session")
def pairs() -> World:
    """The same with images and captions."""
    return make_pair_world()
