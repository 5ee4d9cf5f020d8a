"""The adapter tells the truth about both models, and every act of qcore goes through."""

import pytest
import torch
from qcore.model import Invariance
from qcore.testing import check_adapter
from qplug_perception.petr.adapter import PETRAdapter
from qplug_perception.petr.testing import small_batch, small_petr


def test_links_are_true(embedding):
    check_adapter(PETRAdapter(), small_petr(embedding=embedding), small_batch())


@pytest.mark.slow
def test_links_are_true_with_bottlenecks_and_deformable_convolutions():
    model = small_petr(bottleneck=True, caffe=True, deformable=(False, False, True, True))
    check_adapter(PETRAdapter(), model, small_batch())


def test_positions_and_features_are_one_set_of_channels():
    links = {link.name: link for link in PETRAdapter().topology(small_petr()).links}
    written = {port.param for port in links["memory"].writes}
    assert {"image.input_proj.weight", "position.mlp.2.weight", "views.2.weight"} <= written
    assert Invariance.ROTATE in links["memory"].invariance and Invariance.SCALE not in links["decoder"].invariance


def test_each_layer_of_the_image_branch_is_a_site():
    model = small_petr()
    convs = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert {site.module for site in PETRAdapter().topology(model).sites} == convs


@pytest.mark.slow
def test_links_are_true_with_a_backbone_of_timm():
    pytest.importorskip("timm", reason="timm is not installed")
    check_adapter(PETRAdapter(), small_petr(backbone="timm:resnet18"), small_batch(1))
