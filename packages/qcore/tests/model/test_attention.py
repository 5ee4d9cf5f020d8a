"""Attention written out: equal to torch's, and what is tapped stands in it."""

import torch
import torch.nn.functional as F
from qcore.model.attention import attention, attention_sites
from qcore.model.tap import Tap, attach
from qcore.model.topology import Site
from torch import Tensor, nn


class Change(Tap):
    """Remembers what passes, and hands on `change` of it."""

    def __init__(self, change=lambda x: x) -> None:
        super().__init__()
        self.change, self.seen = change, list[Tensor]()

    def forward(self, x, rows=None, weight=None):
        self.seen.append(x)
        return self.change(x)


def operands(t: int = 5, s: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, t, 4, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 3, s, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k, v


def test_it_is_torchs_attention_with_and_without_a_bias():
    q, k, v = operands()
    module = nn.Module()
    bias = torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for own in (None, bias):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=0.3)
        assert torch.allclose(attention(module, q, k, v, scaling=0.3, bias=own), expected, rtol=1e-12, atol=1e-14)


def test_tapped_tensors_lie_by_token():
    q, k, v = operands()
    module, handlers = nn.Module(), {name: Change() for name in "qkvp"}
    for name, handler in handlers.items():
        attach(module, name, handler)
    attention(module, q, k, v, scaling=0.5)
    shapes = {name: tuple(handler.seen[0].shape) for name, handler in handlers.items()}
    assert shapes == {"q": (2, 5, 12), "k": (2, 7, 12), "v": (2, 7, 12), "p": (2, 5, 3, 7)}
    assert torch.allclose(handlers["p"].seen[0].sum(-1), torch.ones(2, 5, 3, dtype=torch.float64))
    assert torch.equal(handlers["q"].seen[0][1, 2, 4:8], q[1, 1, 2])
    assert attention_sites("a.b") == tuple(Site("a.b", name) for name in "qkvp")


def test_what_a_handler_gives_back_stands_in_its_place():
    q, k, v = operands()
    for name, change in (("q", lambda x: 2 * x), ("k", lambda x: x - 1), ("v", lambda x: -x)):
        module = nn.Module()
        attach(module, name, Change(change))
        changed = {"q": q, "k": k, "v": v} | {name: change({"q": q, "k": k, "v": v}[name])}
        expected = attention(nn.Module(), changed["q"], changed["k"], changed["v"], scaling=0.5)
        assert torch.allclose(attention(module, q, k, v, scaling=0.5), expected)
    module = nn.Module()
    attach(module, "p", Change(lambda p: torch.full_like(p, 1 / 7)))
    assert torch.allclose(attention(module, q, k, v, scaling=0.5), v.mean(2, keepdim=True).expand(-1, -1, 5, -1))
