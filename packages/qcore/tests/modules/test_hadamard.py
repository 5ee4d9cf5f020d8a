import pytest
import torch
from qcore.errors import SpecError
from qcore.model.topology import Port
from qcore.modules.hadamard import OnlineHadamard
from qcore.numbers.hadamard import random_signs
from qcore.testing import check_module
from qcore.transforms.rewrite import Hadamard

SIZES = [1, 8, 12, 92, 44, 116]  # 92 and 116 are padded


@pytest.mark.parametrize("size", SIZES)
def test_an_online_rotation_keeps_norms_and_products(size):
    module = OnlineHadamard(size)
    module.signs = random_signs(module.padded, 0)
    x = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(5, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = module(x)
    assert y.shape == (3, 4, module.padded) and module.padded >= size
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    rotated = Hadamard(Port("w", "in"), module.signs, module.padded).apply(w)
    torch.testing.assert_close(y @ rotated.T, x @ w.T)


@pytest.mark.parametrize("size", SIZES)
def test_an_online_rotation_is_a_runtime_module(size):
    module = OnlineHadamard(size)
    module.signs = random_signs(module.padded, 3).float()
    check_module(module, torch.randn(2, size, generator=torch.Generator().manual_seed(0)))


def test_sizes_without_a_matrix_are_named_with_the_next_that_has_one():
    with pytest.raises(SpecError, match=r"size 92 .* pad to 96"):
        OnlineHadamard(92, 92)


def test_inputs_of_another_size_are_refused():
    with pytest.raises(SpecError, match="of 8 channels got 9"):
        OnlineHadamard(8)(torch.zeros(2, 9))


def test_it_runs_in_the_inputs_dtype():
    assert OnlineHadamard(8)(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16
