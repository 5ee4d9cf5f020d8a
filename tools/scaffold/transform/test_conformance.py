import torch
from qcore.model.plain import PlainMLP
from qcore.testing import check_transform
from qcore.testing.models import tiny_mlp
from qplug_scaffold.scaffold import Scaffold


def test_scaffold_keeps_the_function():
    check_transform(Scaffold(), PlainMLP(), tiny_mlp(), [torch.randn(4, 16)])
