"""The Mamba of the package typeseg."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from qcore.errors import CheckpointError
from qcore.model.reader import materialize
from qcore.testing import check_adapter
from qcore.testing.models import randomize
from qplug_ssm.mamba_adapter import MambaAdapter
from qplug_ssm.typeseg import TypeSeg, TypeSegFile, to_bytes

TEXT = 'def f(x):\n    return {"a": x}\n<b>héllo</b> SELECT * FROM t;'
PACKAGE = find_spec("typeseg")


def test_topology_is_true_and_layer_norms_allow_no_rotation():
    model = randomize(TypeSeg(width=16, layers=2, rank=4, states=8, classes=5)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.conv1d.weight.mul_(2)
    check_adapter(MambaAdapter(), model, torch.tensor([to_bytes(TEXT), to_bytes(TEXT[::-1])]))
    residual = next(link for link in MambaAdapter().topology(model).links if link.name == "residual")
    assert "ROTATE" not in str(residual.invariance)


def test_bytes_that_the_model_does_not_know_become_one():
    assert to_bytes("a\x00é") == [97, 0xA4, 0xA4, 0xA4]


@pytest.mark.skipif(PACKAGE is None, reason="the package typeseg, which brings the weights, is not installed")
def test_logits_are_those_of_the_package():
    folder = Path(PACKAGE.submodule_search_locations[0])
    loaded = TypeSegFile().load(str(folder / "data" / "mamba_al.npz"))
    materialize(loaded.model, "", loaded.reader)
    assert 1_300_000 < sum(p.numel() for p in loaded.model.parameters()) < 1_400_000
    from typeseg._mamba_kernel import mamba_forward
    from typeseg._tokenize import text_to_bytes

    with np.load(folder / "data" / "mamba_al.npz") as arrays:
        weights = {name.replace("__", "/"): arrays[name] for name in arrays.files}
    expected = mamba_forward(np, weights, text_to_bytes(TEXT))
    with torch.no_grad():
        got = loaded.model(torch.tensor([to_bytes(TEXT)]))[0]
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(expected, dtype=np.float32)), rtol=1e-4, atol=1e-3)  # float32, logits of tens


def test_a_file_of_another_layout_is_refused(tmp_path):
    np.savez(tmp_path / "mamba_al.npz", a=np.zeros(3))
    with pytest.raises(CheckpointError, match="lacks"):
        TypeSegFile().load(str(tmp_path / "mamba_al.npz"))
    (tmp_path / "mamba_al.npz").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="plain arrays"):
        TypeSegFile().load(str(tmp_path / "mamba_al.npz"))
