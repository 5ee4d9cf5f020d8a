import torch
from qcore.calibration.observers import Gram
from qcore.model.plain import PlainMLP
from qcore.model.reader import DictReader
from qcore.model.topology import Invariance, Site
from qcore.numbers import fake_quantize, int_weight
from qcore.testing import check_transform, fit_transform
from qcore.testing.conformance import observe
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import AWQScale, FoldNorm, HadamardRotate, IfBeneficial, Rewrite, SmoothQuant, apply_rewrite, benefit, permute_link
from qcore.transforms.benefit import gram_error

ADAPTER = TinyDecoderAdapter()


def grams(adapter, model, sites, batches):
    return observe(adapter, model, {s.input: (Gram(dtype="float64"),) for s in sites}, batches)


def test_the_gram_error_is_the_squared_output_error():
    g = torch.Generator().manual_seed(0)
    d, x = torch.randn(5, 8, generator=g).double(), torch.randn(100, 8, generator=g).double()
    assert abs(gram_error(d, x.T @ x) - float((x @ d.T).pow(2).sum())) < 1e-8
    parts = torch.randn(2, 100, 4, generator=g).double()
    d = torch.randn(6, 4, generator=g).double()
    want = sum(float((parts[p] @ d[3 * p : 3 * p + 3].T).pow(2).sum()) for p in range(2))
    assert abs(gram_error(d, parts.mT @ parts) - want) < 1e-8


def test_the_prediction_is_the_error_of_a_rotated_model():
    """What the inverse of the edits says is what the rotated model's own inputs say."""
    model = tiny_decoder().double()
    fold = fit_transform(FoldNorm(), ADAPTER, model, [])
    base = apply_rewrite(model, fold)
    rewrite = fit_transform(HadamardRotate(), ADAPTER, base, [])
    twin = apply_rewrite(base, rewrite)
    site, spec = Site("model.layers.0.self_attn.q_proj"), int_weight(4, 8)
    reader = DictReader(base.state_dict())
    found = benefit(rewrite, {site: spec}, grams(ADAPTER, base, [site], [tokens()]), base, reader)
    w = twin.get_parameter(site.param).detach()
    gram = grams(ADAPTER, twin, [site], [tokens()])[site.input]["gram"]
    own = gram_error(fake_quantize(w.float(), spec).double() - w, gram)
    assert abs(found.after[site] / own - 1) < 1e-3


def test_permuting_without_groups_changes_nothing():
    net = tiny_mlp()
    topology = PlainMLP().topology(net)
    site, spec = Site("2"), int_weight(4)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    rewrite = permute_link(topology.links_with(Invariance.PERMUTE)[0], order)
    found = benefit(rewrite, {site: spec}, grams(PlainMLP(), net, [site], [x]), net, DictReader(net.state_dict()))
    assert abs(found.reduction) < 1e-6


def test_nothing_touched_is_no_benefit():
    net = tiny_mlp()
    assert benefit(Rewrite(), {Site("2"): int_weight(4)}, {}, net, DictReader(net.state_dict())).reduction == 0


def test_a_transform_that_hurts_the_weights_is_left_out_and_noted():
    model = tiny_decoder()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] *= 100
    # all of the spread goes into the weights: good for activations, bad for 3-bit weights
    rewrite = check_transform(IfBeneficial(SmoothQuant(alpha=1.0)), ADAPTER, model, [tokens()])
    assert not rewrite.edits and all("smoothquant: left out" in note for note in rewrite.notes)
    assert len(rewrite.notes) == 2  # one for each block


def test_a_transform_that_helps_is_kept():
    rewrite = check_transform(IfBeneficial(AWQScale(grid=8)), ADAPTER, tiny_decoder(), [tokens()])
    assert rewrite.edits and not rewrite.notes


def test_the_wrapper_has_the_scope_of_what_it_wraps():
    assert IfBeneficial(HadamardRotate()).scope == "model" and IfBeneficial(AWQScale()).scope == "block"
