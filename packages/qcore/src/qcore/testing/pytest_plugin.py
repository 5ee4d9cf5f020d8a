"""Fixtures for the tests of plug-ins.  pytest loads this in every run, so nothing heavy is imported before a fixture is asked for."""

from typing import Any

import pytest


@pytest.fixture
def registry() -> Any:
    """Everything that is installed, by kind and name."""
    from qcore.plugins import load_registry

    return load_registry()


@pytest.fixture
def qcore_seed() -> int:
    """Seeds Python's, numpy's and torch's generators, and is that seed."""
    import random

    import numpy as np
    import torch

    seed = 0
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
