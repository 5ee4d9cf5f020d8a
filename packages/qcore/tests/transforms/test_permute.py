import pytest
import torch
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.testing import check_transform, fit_transform
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_gpt, tiny_mlp, tokens
from qcore.transforms import Reorder, apply_rewrite
from qcore.transforms.permute import sort_in_heads


@pytest.mark.parametrize("by", ["input", "weight"])
@pytest.mark.parametrize("make", [tiny_decoder, tiny_gpt], ids=lambda f: f.__name__)
def test_reordering_keeps_decoders(make, by):
    assert check_transform(Reorder(by=by), TinyDecoderAdapter(), make(bias=True), [tokens()]).edits


def test_reordering_keeps_a_cnn_and_moves_running_statistics():
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    rewrite = check_transform(Reorder(), PlainCNN(), tiny_cnn(), [x])
    assert "2.1.running_mean" in rewrite.edits and "2.1.running_var" in rewrite.edits


def test_inputs_come_out_sorted():
    net = tiny_mlp()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    twin = apply_rewrite(net, fit_transform(Reorder(), PlainMLP(), net, [x]))
    assert bool((twin[:2](x).amax(0).diff() <= 0).all())


def test_no_channel_leaves_its_head():
    key = torch.tensor([1.0, 5.0, 3.0, 9.0, 2.0, 4.0])
    assert sort_in_heads(key, 2).tolist() == [1, 2, 0, 3, 5, 4]
    assert sort_in_heads(key, 1).tolist() == [3, 1, 5, 2, 4, 0]
