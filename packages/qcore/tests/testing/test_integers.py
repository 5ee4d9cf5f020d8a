"""The audit of integer programs finds floats wherever they hide, and nothing where there are none."""

import pytest
import torch
from qcore.testing.integers import FloatFound, check_integer_module, only_integers
from torch import nn


class Doubling(nn.Module):
    """Twice its input; `through` says by what."""

    def __init__(self, through: str = "integers") -> None:
        super().__init__()
        self.through = through
        self.register_buffer("two", torch.tensor(2.0 if through == "buffer" else 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.through == "cast":
            return (x.float() * 2).long()
        if self.through == "division":
            return (x / 1).long() * 2
        if self.through == "complex":
            return (x + 0j).real.long() * 2
        return x * self.two


X = torch.arange(5)


def test_a_program_of_integers_passes_and_its_operators_are_counted():
    assert check_integer_module(Doubling(), lambda: Doubling()(X) + 1) >= 2


@pytest.mark.parametrize("through", ["cast", "division", "complex", "buffer"])
def test_a_float_that_leaves_no_trace_in_the_result_is_found(through):
    module = Doubling(through)
    if through != "buffer":
        assert torch.equal(module(X), 2 * X)
    with pytest.raises(FloatFound):
        check_integer_module(module, lambda: module(X))


def test_a_float_that_comes_in_is_found():
    floats = torch.ones(3)
    with pytest.raises(FloatFound, match=r"takes a tensor of torch\.float32"), only_integers():
        floats.gt(0)


def test_booleans_are_integers_here():
    with only_integers() as audit:
        torch.where(X > 2, X, 0)
    assert audit.operations >= 2


def test_nothing_run_is_nothing_proven():
    with pytest.raises(AssertionError, match="nothing was run"):
        check_integer_module(Doubling(), lambda: None)
