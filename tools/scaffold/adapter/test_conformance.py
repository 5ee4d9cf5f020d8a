import torch
from qcore.testing import check_adapter
from qcore.testing.models import tiny_mlp
from qplug_scaffold.scaffold import Scaffold


def test_scaffold_tells_the_truth_about_its_models():
    check_adapter(Scaffold(), tiny_mlp(), torch.randn(4, 16))
