import json

import pytest
import torch
from qcore.errors import NotFound, SpecError
from qcore.model.reader import DictReader
from qcore.model.topology import Invariance, Link, Port, Site
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms.apply import apply_rewrite, rewritten_tensors
from qcore.transforms.rewrite import (
    Hadamard,
    Permute,
    Put,
    Rewrite,
    RewrittenReader,
    Rotate,
    Scale,
    Shift,
    cut_ties,
    hadamard_link,
    permute_link,
    rewritten_topology,
    rotate_link,
    scale_classes,
    scale_link,
)
from qcore.transforms.split import split_columns
from torch import nn

W = Port("a.weight", "in")
OUT = Port("a.weight", "out")


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def orthogonal(heads, size):
    return torch.linalg.qr(rand(heads, size, size)).Q


def every_edit(port, size):
    return [
        Scale(port, rand(size).abs() + 0.5),
        Rotate(port, orthogonal(1, size)),
        Rotate(port, orthogonal(2, size // 2)),
        Hadamard(port, rand(size).sign(), size // 2),
        Permute(port, torch.randperm(size, generator=torch.Generator().manual_seed(1))),
    ]


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("module", [nn.Linear(8, 16), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3, groups=2), nn.Embedding(16, 8)], ids=str)
def test_undo_is_the_inverse_of_every_edit(module, axis):
    port = Port("weight", axis)
    w = rand(*module.weight.shape)
    size = 8 if (axis == "in") != isinstance(module, nn.Embedding) else 16
    for edit in every_edit(port, size):
        rewrite = Rewrite(edits={"weight": (edit,)})
        changed = rewrite.tensor("weight", w, module)
        assert not torch.allclose(changed, w)
        torch.testing.assert_close(rewrite.undo("weight", changed, module), w, rtol=1e-12, atol=1e-12)


def test_a_hadamard_edit_is_the_rotation_by_its_matrix():
    module = nn.Linear(24, 5)
    signs = rand(24).sign()
    from qcore.numbers.hadamard import hadamard

    dense = torch.diag(signs[:12]) @ hadamard(12).T, torch.diag(signs[12:]) @ hadamard(12).T
    w = rand(5, 24)
    fast = Rewrite(edits={"weight": (Hadamard(Port("weight", "in"), signs, 12),)}).tensor("weight", w, module)
    slow = Rewrite(edits={"weight": (Rotate(Port("weight", "in"), torch.stack(dense)),)}).tensor("weight", w, module)
    torch.testing.assert_close(fast, slow)


def test_a_padded_hadamard_edit_grows_the_axis_and_keeps_products():
    module = nn.Linear(92, 5)  # 92 has no matrix here, 96 = 12·8 has
    edit = Hadamard(Port("weight", "in"), rand(96).sign(), 96)
    w, x = rand(5, 92), rand(7, 92)
    grown = Rewrite(edits={"weight": (edit,)}).tensor("weight", w, module)
    assert grown.shape == (5, 96)
    torch.testing.assert_close(edit.apply(x) @ grown.T, x @ w.T)
    undone = edit.undo(grown)
    torch.testing.assert_close(undone[:, :92], w)
    assert undone[:, 92:].abs().max() < 1e-12


def test_edits_of_one_part_leave_the_others_alone():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 4, 6))

    w = rand(3, 4, 6)
    t = rand(6).abs()
    changed = Rewrite(edits={"up": (Scale(Port("up", "in", part=1), t),)}).tensor("up", w, Experts())
    torch.testing.assert_close(changed[1], w[1] * t)
    assert torch.equal(changed[0], w[0]) and torch.equal(changed[2], w[2])


def test_edits_of_a_slice_leave_the_rest_alone():
    port = Port("weight", "out", channels=(range(2, 4), range(6, 8)))
    w = rand(8, 3)
    changed = Rewrite(edits={"weight": (Scale(port, torch.tensor([2.0, 3.0, 4.0, 5.0])),)}).tensor("weight", w, nn.Linear(3, 8))
    torch.testing.assert_close(changed[[2, 3, 6, 7]], w[[2, 3, 6, 7]] * torch.tensor([[2.0], [3.0], [4.0], [5.0]]))
    assert torch.equal(changed[[0, 1, 4, 5]], w[[0, 1, 4, 5]])


def test_a_gain_of_one_plus_weight_is_scaled_as_a_gain():
    port = Port("weight", "out", gain=1.0)
    w, t = rand(4), torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    changed = Rewrite(edits={"weight": (Scale(port, t),)}).tensor("weight", w, nn.LayerNorm(4))
    torch.testing.assert_close(1 + changed, (1 + w) * t)


def test_state_keeps_every_kind_of_edit():
    module = nn.Linear(8, 16)
    port = Port("weight", "in")
    edits = (*every_edit(port, 8), Shift(port, rand(16, 8)), Put(port, rand(16, 4)))
    rewrite = split_columns("x", nn.Linear(8, 4), torch.tensor([1, 5])).then(
        Rewrite(edits={"weight": edits}, unties=frozenset({"a"}), exact=0.5, notes=("why",))
    )
    tensors, data = rewrite.state()
    back = Rewrite.from_state(tensors, json.loads(json.dumps(data)))
    assert (back.derived, back.dropped, back.unties, back.exact, back.notes) == (
        rewrite.derived,
        rewrite.dropped,
        rewrite.unties,
        rewrite.exact,
        rewrite.notes,
    )
    w = rand(16, 8)
    assert torch.equal(back.tensor("weight", w, module), rewrite.tensor("weight", w, module))
    assert torch.equal(back.inserts["x"].module.tensors["fine_channels"], torch.tensor([1, 5]))


def test_a_shared_rotation_is_stored_once():
    link = Link("l", 8, (Port("a.weight", "out"), Port("b.weight", "out")), (Port("c.weight", "in"), Port("d.weight", "in")), Invariance.ROTATE)
    tensors, _ = rotate_link(link, orthogonal(1, 8)).state()
    assert len(tensors) == 1
    tensors, _ = hadamard_link(link, rand(8).sign(), 8).state()
    assert [t.shape for t in tensors.values()] == [(8,)]


def test_then_applies_the_first_rewrite_first():
    module, w = nn.Linear(4, 4), rand(4, 4)
    first, second = (
        Rewrite(edits={"weight": (Scale(Port("weight", "in"), rand(4)),)}),
        Rewrite(edits={"weight": (Permute(Port("weight", "in"), torch.tensor([3, 0, 2, 1])),)}),
    )
    one_by_one = second.tensor("weight", first.tensor("weight", w, module), module)
    assert torch.equal(first.then(second).tensor("weight", w, module), one_by_one)
    assert not torch.equal(second.then(first).tensor("weight", w, module), one_by_one)


def test_then_is_associative():
    module, w = nn.Linear(8, 8), rand(8, 8)
    a, b, c = (Rewrite(edits={"weight": (edit,)}) for edit in every_edit(Port("weight", "in"), 8)[:3])
    assert torch.equal(a.then(b).then(c).tensor("weight", w, module), a.then(b.then(c)).tensor("weight", w, module))


def test_what_was_split_cannot_be_edited_later():
    split = split_columns("a", nn.Linear(4, 4), torch.tensor([0]))
    with pytest.raises(SpecError, match=r"edits 'a\.weight'.*last"):
        split.then(Rewrite(edits={"a.weight": (Scale(W, torch.ones(4)),)}))


def test_a_split_after_a_scale_starts_from_the_scaled_weight():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, t = rand(5, 4), rand(4).abs() + 0.5
    scaled = Rewrite(edits={"0.weight": (Scale(Port("0.weight", "in"), t),)})
    both = scaled.then(split_columns("0", model[0], torch.tensor([2])))
    torch.testing.assert_close(apply_rewrite(model, both)(x), apply_rewrite(model, scaled)(x))


def test_a_link_refuses_what_it_does_not_allow():
    link = Link("up→down", 4, (OUT,), (Port("b.weight", "in"),), Invariance.SCALE)
    with pytest.raises(SpecError, match=r"up→down.*does not allow PERMUTE"):
        permute_link(link, torch.arange(4))


def test_rope_pairs_share_a_scale():
    link = Link("q↔k", 16, (OUT,), (OUT,), Invariance.SCALE, heads=2, share="half", rotary_dims=6)
    assert scale_classes(link).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    link = Link("q↔k", 8, (OUT,), (OUT,), Invariance.SCALE, heads=2, share="interleaved")
    assert scale_classes(link).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_grouped_query_heads_are_repeated_in_a_row():
    link = Link("v→o", 4, (Port("v.weight", "out"),), (Port("o.weight", "in", repeat=2),), Invariance.SCALE, heads=2)
    by = scale_link(link, torch.tensor([1.0, 2.0, 4.0, 8.0])).edits["o.weight"][0].by
    assert (1 / by).tolist() == [1, 2, 1, 2, 4, 8, 4, 8]


# ties ------------------------------------------------------------------------------------------------------------------------------------


def test_a_rotation_keeps_a_tie_that_a_scale_cuts():
    model = tiny_decoder(tied=True)
    topology = TinyDecoderAdapter().topology(model)
    residual = next(link for link in topology.links if link.name == "residual")
    assert not cut_ties(rotate_link(residual, orthogonal(1, 32)), model, topology.ties).unties
    norm = next(link for link in topology.links if link.name.startswith("model.norm"))
    cut = cut_ties(scale_link(norm, torch.full((32,), 2.0)), model, topology.ties)
    assert cut.unties == {"lm_head.weight"} and cut.derived == {"lm_head.weight": "model.embed_tokens.weight"}


def test_an_untied_head_is_made_from_the_embedding_that_alone_is_stored():
    model = tiny_decoder(tied=True)
    topology = TinyDecoderAdapter().topology(model)
    norm = next(link for link in topology.links if link.name.startswith("model.norm"))
    t = rand(32).abs() + 0.5
    cut = cut_ties(scale_link(norm, t), model, topology.ties)
    stored = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}  # as safetensors files have it
    reader = RewrittenReader(DictReader(stored), cut, model)
    assert "lm_head.weight" in reader and "lm_head.weight" in list(reader.names())
    torch.testing.assert_close(reader["lm_head.weight"], model.lm_head.weight.double() / t)
    assert torch.equal(reader["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_ties_that_are_kept_are_one_parameter_after_the_rewrite():
    model = tiny_decoder(tied=True).double()
    topology = TinyDecoderAdapter().topology(model)
    residual = next(link for link in topology.links if link.name == "residual")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    from qcore.transforms.rewrite import through_ports

    twin = apply_rewrite(model, permute_link(residual, order, through_ports(residual, model)))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    torch.testing.assert_close(twin(tokens()), model(tokens()))


# readers and places ----------------------------------------------------------------------------------------------------------------------


def test_the_reader_lists_what_is_there_after_a_split():
    model = nn.Sequential(nn.Linear(4, 3))
    reader = RewrittenReader(DictReader(model.state_dict()), split_columns("0", model[0], torch.tensor([1])), model)
    assert list(reader.names()) == ["0.coarse.weight", "0.coarse.bias", "0.fine.weight"]
    assert "0.weight" not in reader and "0.fine.weight" in reader
    with pytest.raises(NotFound, match="split"):
        reader["0.weight"]


def test_sites_and_links_follow_a_split():
    adapter, model = TinyDecoderAdapter(), tiny_decoder()
    topology = adapter.topology(model)
    path = "model.layers.0.mlp.down_proj"
    after = rewritten_topology(topology, split_columns(path, model.get_submodule(path), torch.tensor([0])))
    assert [str(s) for s in after.blocks[0].stages[-1]] == [f"{path}.coarse:weight", f"{path}.fine:weight"]
    assert not any(p.param.startswith(path) for link in after.links for p in link.ports)
    assert Site(path) not in after.sites and len(after.sites) == len(topology.sites) + 1


def test_the_learners_form_is_differentiable():
    model = tiny_decoder().double()
    link = next(link for link in TinyDecoderAdapter().topology(model).links if link.name.endswith("v→o"))
    t = torch.zeros(link.size, dtype=torch.float64, requires_grad=True)
    tensors = rewritten_tensors(model, scale_link(link, t.exp()))
    out = torch.func.functional_call(model, tensors, (tokens(),))
    torch.testing.assert_close(out, model(tokens()))
    (tensors["model.layers.0.self_attn.v_proj.weight"] ** 2).sum().backward()
    assert t.grad is not None and bool((t.grad > 0).all())
