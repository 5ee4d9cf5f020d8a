import pytest


@pytest.fixture(params=["petr", "qfpe"])
def embedding(request) -> str:
    """Which position embedding."""
    return request.param
