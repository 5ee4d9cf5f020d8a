"""Fused stacks of experts: one parameter, many matrices, each with rows and channels of its own."""

import pytest
import torch
from qcore.model.adapter import ModelAdapter
from qcore.model.tap import tap
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology
from qcore.testing import check_adapter, check_transform
from qcore.testing.models import RMSNorm, randomize
from qcore.transforms import AWQScale, CrossLayerEqualize, FoldNorm, HadamardRotate, IfBeneficial, Reorder, SmoothQuant
from torch import Tensor, nn

E, WIDTH, HIDDEN = 3, 16, 24


class Experts(nn.Module):
    """Every expert sees every row, weighed by a router: up [E, N, K], down [E, N, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(E, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.zeros(E, WIDTH, HIDDEN))

    def forward(self, x: Tensor, affinity: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(E):
            weight = affinity[..., e]
            h = tap(self, "up.input", x, weight=weight, part=e) @ self.up[e].T
            h = tap(self, "down.input", h.relu(), weight=weight, part=e)
            y = y + weight.unsqueeze(-1) * (h @ self.down[e].T)
        return y


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, WIDTH), RMSNorm(WIDTH)
        self.router, self.experts = nn.Linear(WIDTH, E, bias=False), Experts()
        self.last, self.head = RMSNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        return self.head(self.last(x + self.experts(h, self.router(h).softmax(-1))))


class MoEAdapter(ModelAdapter):
    name = "moe"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, MoE)

    def topology(self, model: nn.Module) -> Topology:
        up, router = Port("experts.up", "in"), Port("router.weight", "in")
        head = Port("head.weight", "in")
        links = [
            Link("norm→router,up", WIDTH, (Port("norm.weight", "out"),), (router, up), Invariance.SCALE),
            Link("last→head", WIDTH, (Port("last.weight", "out"),), (head,), Invariance.SCALE),
            Link(
                "residual",
                WIDTH,
                (Port("embed.weight", "out"), Port("embed.bias", "out"), Port("experts.down", "out")),
                (router, up, head),
                Invariance.PERMUTE | Invariance.ROTATE,
                through=("norm", "last"),
            ),
        ]
        links += [
            Link(
                f"up→down[{e}]",
                HIDDEN,
                (Port("experts.up", "out", part=e),),
                (Port("experts.down", "in", part=e),),
                Invariance.SCALE | Invariance.PERMUTE,
            )
            for e in range(E)
        ]
        sites = (tuple(Site("experts", "up", e) for e in range(E)), tuple(Site("experts", "down", e) for e in range(E)))
        blocked = {Port("embed.weight", "in"): "input", Port("router.weight", "out"): "logits of the router", Port("head.weight", "out"): "output"}
        return Topology((Block("", sites),), tuple(links), blocked)


def model() -> MoE:
    return randomize(MoE()).eval()


def batch() -> Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def test_links_of_single_experts_are_true():
    check_adapter(MoEAdapter(), model(), batch())


def test_an_expert_linked_to_another_is_caught():
    class Crossed(MoEAdapter):
        def topology(self, model):
            topology = super().topology(model)
            crossed = Link("crossed", HIDDEN, (Port("experts.up", "out", part=0),), (Port("experts.down", "in", part=1),), Invariance.SCALE)
            return Topology(topology.blocks, (*topology.links, crossed), topology.blocked)

    with pytest.raises(AssertionError, match="'crossed' claims SCALE"):
        check_adapter(Crossed(), model(), batch())


@pytest.mark.parametrize(
    "transform",
    [FoldNorm(), SmoothQuant(), AWQScale(grid=4), IfBeneficial(AWQScale(grid=4)), Reorder(), CrossLayerEqualize()],
    ids=lambda t: t.name,
)
def test_transforms_keep_experts(transform):
    rewrite = check_transform(transform, MoEAdapter(), model(), [batch()])
    assert rewrite.edits


def test_rotating_experts():
    net = model().double()
    fold = check_transform(FoldNorm(), MoEAdapter(), net, [batch()])
    assert "experts.down" in check_transform(HadamardRotate(), MoEAdapter(), net, [batch()], after=fold).edits


def test_each_expert_has_its_own_scale():
    rewrite = check_transform(SmoothQuant(links="up→down*"), MoEAdapter(), model(), [batch()])
    scales = [edit.by for edit in rewrite.edits["experts.down"]]
    assert len(scales) == E and not torch.allclose(scales[0], scales[1])
