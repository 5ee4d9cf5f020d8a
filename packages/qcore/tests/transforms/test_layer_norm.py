"""A stream behind LayerNorms is centred, normed without a mean and rotated; the function stays."""

from typing import ClassVar

import pytest
import torch
from qcore.errors import SpecError
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import DictReader
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology
from qcore.modules.stream_norm import StreamNorm
from qcore.plugins import load_registry
from qcore.testing import check_adapter, check_transform
from qcore.testing.models import randomize
from qcore.testing.transforms import fit_transform
from qcore.transforms import FoldNorm, Rewrite, apply_rewrite
from qcore.transforms.layer_norm import LayerNormToRMS, centred
from torch import Tensor, nn

D = 24
MODULES = dict(load_registry().modules)


class Stream(nn.Module):
    """An embedding, perhaps a norm in the stream, two feed-forward blocks behind norms, and an exit through a norm, or right from the stream."""

    def __init__(self, inside: bool, direct: bool, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.start = nn.LayerNorm(D, eps=1e-5) if inside else nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=1e-5) for _ in range(3 - direct))
        self.ups = nn.ModuleList(nn.Linear(D, 40, bias=bias) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(40, D, bias=bias) for _ in range(2))
        self.head = nn.Linear(D, 7, bias=bias)
        self.inside, self.direct, self.bias = inside, direct, bias

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(self.embed(ids))
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return self.head(x if self.direct else self.norms[2](x))


class StreamAdapter(ModelAdapter):
    name: ClassVar[str] = "stream"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Stream)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, Stream)
        readers = ["ups.0", "ups.1", "head"]
        links = []
        for i in range(len(model.norms)):
            writes = tuple(Port(f"norms.{i}.{n}", "out") for n in ("weight", "bias"))
            links.append(Link(f"norm {i}", D, writes, (Port(f"{readers[i]}.weight", "in"),), Invariance.SCALE))
        bias = ("weight", "bias") if model.bias else ("weight",)
        writes = (Port("embed.weight", "out"), *(Port(f"downs.{i}.{n}", "out") for i in range(2) for n in bias))
        through = (*(["start"] if model.inside else []), *(f"norms.{i}" for i in range(len(model.norms))))
        reads = tuple(Port(f"{r}.weight", "in") for r in readers)
        links.append(Link("residual", D, writes, reads, Invariance.PERMUTE, through))
        for i in range(2):
            ups = tuple(Port(f"ups.{i}.{n}", "out") for n in bias)
            links.append(Link(f"up {i}", 40, ups, (Port(f"downs.{i}.weight", "in"),), Invariance.PERMUTE))
        blocked = {Port("embed.weight", "in"): "ids", Port("head.weight", "out"): "classes"}
        stages = tuple((Site(p),) for p in ("ups.0", "downs.0", "ups.1", "downs.1", "head"))
        return Topology((Block("", stages, feed="rerun"),), tuple(links), blocked)


KINDS = pytest.mark.parametrize(("inside", "direct"), [(False, False), (True, False), (False, True), (True, True)])


def _model(inside: bool, direct: bool, bias: bool = True) -> Stream:
    return randomize(Stream(inside, direct, bias)).eval()  # type: ignore[return-value]


def _ids() -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


@KINDS
@pytest.mark.parametrize("rotate", [True, False])
def test_a_stream_behind_layer_norms_keeps_its_function(inside, direct, rotate):
    model = _model(inside, direct).double()
    fold = fit_transform(FoldNorm(), StreamAdapter(), model, [])
    rewrite = check_transform(LayerNormToRMS(rotate=rotate), StreamAdapter(), model, [_ids()], after=fold, modules=MODULES, rtol=1e-10)
    norms = [i.module for i in rewrite.inserts.values()]
    assert {n.type for n in norms} == {StreamNorm.name} and len(norms) == 3 - direct + inside
    assert all(n.config["centred"] == (not direct) for n in norms)
    assert sum(n.config["matrix"] for n in norms) == sum(n.config["shift"] for n in norms) == inside


def test_the_adapter_of_these_tests_is_true():
    check_adapter(StreamAdapter(), _model(True, False), _ids())


def test_producers_are_centred_where_nothing_reads_the_mean():
    model = _model(False, False).double()
    link = StreamAdapter().topology(model).links[3]
    assert link.name == "residual"
    moved = apply_rewrite(model, centred(link, model, DictReader(dict(model.state_dict()))))
    for port in link.writes:
        w = moved.get_parameter(port.param)
        mean = w.mean(1 if port.param == "embed.weight" else 0)
        assert mean.abs().max() < 1e-15
    assert (moved(_ids()) - model(_ids())).abs().max() < 1e-12  # LayerNorm takes the mean away anyway


def test_a_centred_stream_may_not_be_read_without_a_norm():
    """What goes wrong where the mean is needed: the reason why the stream keeps it there."""
    model = _model(False, True).double()
    link = StreamAdapter().topology(model).links[2]
    moved = apply_rewrite(model, centred(link, model, DictReader(dict(model.state_dict()))))
    assert (moved(_ids()) - model(_ids())).abs().max() > 1e-2


def test_after_the_rotation_channels_are_mixed():
    model = _model(False, False).double()
    fold = fit_transform(FoldNorm(), StreamAdapter(), model, [])
    rewrite = check_transform(LayerNormToRMS(), StreamAdapter(), model, [_ids()], after=fold, modules=MODULES)
    before, after = model.embed.weight, apply_rewrite(model, rewrite, MODULES).get_parameter("embed.weight")
    assert (after - before).abs().max() > 0.1


def test_norms_that_are_not_folded_are_refused():
    model = _model(False, False)
    with pytest.raises(SpecError, match="put FoldNorm"):
        fit_transform(LayerNormToRMS(), StreamAdapter(), model, [])


@KINDS
def test_a_bias_that_no_layer_takes_over_stays_with_the_norm(inside, direct):
    model = _model(inside, direct, bias=False).double()
    fold = fit_transform(FoldNorm(), StreamAdapter(), model, [])
    rewrite = check_transform(LayerNormToRMS(), StreamAdapter(), model, [_ids()], after=fold, modules=MODULES, rtol=1e-10)
    assert all(i.module.config["shift"] for i in rewrite.inserts.values())


def test_a_norm_in_the_stream_can_be_refused():
    model = _model(True, False)
    fold = fit_transform(FoldNorm(), StreamAdapter(), model, [])
    found = fit_transform(LayerNormToRMS(refuse_matrices=True), StreamAdapter(), apply_rewrite(model, fold), [])
    assert found.empty and "stands in the stream" in found.notes[0]


def test_a_stream_of_rms_norms_is_left_to_the_rotation():
    assert isinstance(LayerNormToRMS().fit(Topology(()), {}, {}, nn.Identity(), DictReader({})), Rewrite)
    assert LayerNormToRMS().fit(Topology(()), {}, {}, nn.Identity(), DictReader({})).empty


def test_stream_norm_is_layer_norm_in_other_channels():
    x = torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    ones = torch.full((D,), D**-0.5, dtype=torch.float64)
    assert torch.allclose(StreamNorm(D, 1e-5, ones)(x), nn.functional.layer_norm(x, (D,), eps=1e-5), atol=1e-12)
    y = x - x.mean(1, keepdim=True)
    assert torch.allclose(StreamNorm(D, 1e-5)(y), nn.functional.layer_norm(x, (D,), eps=1e-5), atol=1e-12)


def test_stream_norm_is_rebuilt_from_its_config():
    own = StreamNorm(D, 1e-5, torch.randn(D), torch.randn(D, D), torch.randn(D))
    bare = StreamNorm.from_config(StreamNorm(D, 1e-5).config())
    assert bare.direction is bare.matrix is bare.shift is None
    other = StreamNorm.from_config(own.config())
    other.load_state_dict(own.state_dict())
    x = torch.randn(2, D)
    assert torch.allclose(own(x), other(x), atol=1e-6)
