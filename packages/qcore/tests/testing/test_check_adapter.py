"""The contract test finds the mistakes that adapters are written with."""

from dataclasses import replace

import pytest
import torch
from qcore.model.adapter import ModelAdapter
from qcore.model.plain import PlainMLP
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology
from qcore.testing import check_adapter
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_gpt, tiny_mlp, tokens
from torch import nn

VARIANTS = [{}, {"bias": True}, {"tied": True}, {"norm_offset": 1.0, "tied": True, "bias": True}, {"rotary": 0.5}, {"kv_heads": 1}, {"kv_heads": 4}]


def changed(adapter, change):
    """`adapter`, but for what `change` does to its topology."""

    class Changed(type(adapter)):
        def topology(self, model):
            return change(super().topology(model))

    return Changed()


def with_link(name, **fields):
    def change(topology):
        hits = [link for link in topology.links if link.name.endswith(name)]
        assert hits, name
        return replace(topology, links=tuple(replace(link, **fields) if link in hits else link for link in topology.links))

    return change


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_links_of_the_tiny_decoder_are_true(options):
    check_adapter(TinyDecoderAdapter(), tiny_decoder(**options), tokens())


def test_links_of_the_tiny_gpt_are_true():
    check_adapter(TinyDecoderAdapter(), tiny_gpt(), tokens())


def test_gelu_that_claims_scale_is_caught():
    adapter = changed(PlainMLP(), with_link("0→2", invariance=Invariance.SCALE | Invariance.PERMUTE))
    with pytest.raises(AssertionError, match=r"'0→2' claims SCALE.*GELU"):
        check_adapter(adapter, tiny_mlp(nn.GELU), torch.randn(4, 16))


def test_relu_that_claims_rotate_is_caught():
    adapter = changed(PlainMLP(), with_link("0→2", invariance=Invariance.ROTATE | Invariance.PERMUTE))
    with pytest.raises(AssertionError, match="'0→2' claims ROTATE"):
        check_adapter(adapter, tiny_mlp(nn.ReLU), torch.randn(4, 16))


def test_a_wrong_repeat_is_caught():
    def repeat_all_heads(topology):
        """Heads tiled (0 1 0 1) instead of repeated (0 0 1 1): one head of 16 channels, twice."""
        links = [replace(link, heads=1) if link.name.endswith("v→o") else link for link in topology.links]
        return replace(topology, links=tuple(links))

    with pytest.raises(AssertionError, match=r"v→o' claims (PERMUTE|SCALE)"):
        check_adapter(changed(TinyDecoderAdapter(), repeat_all_heads), tiny_decoder(), tokens())


def test_a_missing_repeat_is_caught_by_its_size():
    def forget(topology):
        links = [replace(link, reads=(replace(link.reads[0], repeat=1),)) if link.name.endswith("v→o") else link for link in topology.links]
        return replace(topology, links=tuple(links))

    with pytest.raises(AssertionError, match=r"o_proj\.weight\.in has 32 channels, the link 16"):
        check_adapter(changed(TinyDecoderAdapter(), forget), tiny_decoder(), tokens())


def test_scales_that_rope_does_not_share_are_caught():
    with pytest.raises(AssertionError, match=r"q↔k' claims SCALE.*share="):
        check_adapter(changed(TinyDecoderAdapter(), with_link("q↔k", share="none")), tiny_decoder(), tokens())
    with pytest.raises(AssertionError, match="q↔k' claims SCALE"):
        check_adapter(changed(TinyDecoderAdapter(), with_link("q↔k", share="interleaved")), tiny_decoder(), tokens())


def test_partial_rope_must_be_told():
    with pytest.raises(AssertionError, match="q↔k' claims SCALE"):
        check_adapter(changed(TinyDecoderAdapter(), with_link("q↔k", rotary_dims=8)), tiny_decoder(rotary=0.5), tokens())


def test_a_gain_of_one_plus_weight_must_be_told():
    def forget(topology):
        links = [replace(link, writes=tuple(replace(p, gain=0.0) for p in link.writes)) for link in topology.links]
        return replace(topology, links=tuple(links))

    with pytest.raises(AssertionError, match=r"layernorm.*claims SCALE.*gain="):
        check_adapter(changed(TinyDecoderAdapter(), forget), tiny_decoder(norm_offset=1.0), tokens())


def test_a_rotation_through_a_norm_that_is_not_named_is_caught():
    with pytest.raises(AssertionError, match=r"'residual' claims (PERMUTE|ROTATE)"):
        check_adapter(changed(TinyDecoderAdapter(), with_link("residual", through=())), tiny_decoder(), tokens())


def test_a_layer_norm_that_claims_rotate_is_caught():
    adapter = changed(TinyDecoderAdapter(), with_link("residual", invariance=Invariance.ROTATE))
    with pytest.raises(AssertionError, match="'residual' claims ROTATE"):
        check_adapter(adapter, tiny_gpt(), tokens())


def test_a_forgotten_reader_is_caught():
    def forget(topology):
        links = [replace(link, reads=link.reads[:-1]) if link.name == "residual" else link for link in topology.links]
        return replace(topology, links=tuple(links), blocked={**topology.blocked, Port("lm_head.weight", "in"): "forgotten"})

    with pytest.raises(AssertionError, match="'residual' claims PERMUTE"):
        check_adapter(changed(TinyDecoderAdapter(), forget), tiny_decoder(), tokens())


def test_an_axis_without_link_or_reason_is_caught():
    def forget(topology):
        return replace(topology, blocked={})

    with pytest.raises(AssertionError, match=r"2 axes.*lm_head\.weight\.out"):
        check_adapter(changed(TinyDecoderAdapter(), forget), tiny_decoder(), tokens())


def test_a_tie_that_is_not_told_is_caught():
    with pytest.raises(AssertionError, match="tied_names"):
        check_adapter(changed(TinyDecoderAdapter(), lambda t: replace(t, ties={})), tiny_decoder(tied=True), tokens())


class Dead(nn.Module):
    """Two layers that nothing calls, beside two that work."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.unused, self.reader = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class DeadAdapter(ModelAdapter):
    name = "dead"

    def __init__(self, sites=("a", "b"), link=("unused", "reader")):
        self.sites, self.link = sites, link

    def matches(self, model):
        return isinstance(model, Dead)

    def topology(self, model):
        one, other = self.link
        write, read = Port(f"{one}.weight", "out"), Port(f"{other}.weight", "in")
        link = Link("dead", 6, (write, Port(f"{one}.bias", "out")), (read,), Invariance.SCALE)
        axes = [Port(n, axis) for n, p in model.named_parameters() if p.ndim > 1 for axis in ("in", "out")]
        return Topology((Block("", (tuple(Site(s) for s in self.sites),)),), (link,), dict.fromkeys(axes, "not told"))


def test_a_link_on_dead_parameters_is_caught():
    with pytest.raises(AssertionError, match=r"'dead'.*do nothing"):
        check_adapter(DeadAdapter(), Dead(), torch.randn(3, 4))
    check_adapter(DeadAdapter(link=("a", "b")), Dead(), torch.randn(3, 4))


def test_a_site_that_no_forward_reaches_is_caught():
    with pytest.raises(AssertionError, match=r"not reached.*unused:input"):
        check_adapter(DeadAdapter(sites=("a", "b", "unused"), link=("a", "b")), Dead(), torch.randn(3, 4))


def test_prepare_must_keep_names_and_outputs():
    class Renames(DeadAdapter):
        def prepare(self, model):
            model.extra = nn.Linear(2, 2)

    with pytest.raises(AssertionError, match="renamed, lost or added"):
        check_adapter(Renames(link=("a", "b")), Dead(), torch.randn(3, 4))

    class Changes(DeadAdapter):
        def prepare(self, model):
            model.b.bias.data += 1

    with pytest.raises(AssertionError, match=r"prepare\(\) changed the outputs"):
        check_adapter(Changes(link=("a", "b")), Dead(), torch.randn(3, 4))
