import torch
from qcore.model.adapter import tied_names
from qcore.model.source import parameters_on_meta
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology
from qcore.testing.models import TinyConfig, TinyDecoder
from torch import nn


def test_tied_names_finds_one_object_under_two_names():
    assert tied_names(TinyDecoder(TinyConfig(tied=True))) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(TinyDecoder()) == {}


def test_a_skeleton_on_meta_keeps_its_ties():
    with parameters_on_meta():
        model = TinyDecoder(TinyConfig(tied=True))
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_whole_model_block_has_every_link():
    link = Link("a→b", 4, (Port("a.weight", "out"),), (Port("b.weight", "in"),), Invariance.SCALE)
    whole, part = Block("", ((Site("a"), Site("b")),)), Block("a", ((Site("a"),),))
    topology = Topology((whole, part), (link,), {Port("a.weight", "in"): "input"}, (Site("a", "q"),), {"b.weight": "a.weight"})
    assert topology.within(whole).links == (link,) and topology.within(whole).activations == (Site("a", "q"),)
    assert topology.within(part).links == () and topology.within(part).ties == topology.ties


def test_two_parameters_of_equal_values_are_not_tied():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].load_state_dict(net[0].state_dict())
    assert torch.equal(net[0].weight, net[1].weight) and tied_names(net) == {}
