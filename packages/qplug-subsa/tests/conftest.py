import numpy as np
import pytest


def make_clustered(n: int, d: int = 16, clusters: int = 6, seed: int = 0, spread: float = 0.6, weights: object = None) -> np.ndarray:
    """[n, d] float32 points around random centres, off the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d))
    owner = rng.choice(clusters, n, p=weights)
    return (centres[owner] + spread * rng.normal(size=(n, d)) + 0.5).astype(np.float32)


@pytest.fixture(scope="session")
def points() -> np.ndarray:
    return make_clustered(240)


@pytest.fixture(scope="session")
def clustered():
    return make_clustered
