"""The detector: shapes, masks, its attention against torch's, boxes, losses, scores."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qcore.model import parameters_on_meta
from qplug_perception.petr.attention import Attention
from qplug_perception.petr.boxes import Detections, decode, detections, encode
from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.detection import average_precision, mean_average_precision
from qplug_perception.petr.loss import focal, loss, matching
from qplug_perception.petr.model import PETR
from qplug_perception.petr.testing import SMALL, small_batch, small_petr


def test_outputs_are_logits_and_centres_inside_the_range(embedding):
    logits, codes = small_petr(embedding=embedding)(**small_batch())
    assert logits.shape == (2, 6, 3) and codes.shape == (2, 6, 10)
    low, high = torch.tensor(SMALL.pc_range[:3]), torch.tensor(SMALL.pc_range[3:])
    centre = codes[..., (0, 1, 4)]
    assert (centre >= low).all() and (centre <= high).all()


def test_samples_do_not_see_each_other(embedding):
    model, batch = small_petr(embedding=embedding).double(), small_batch(3)
    batch = {k: t.double() for k, t in batch.items()}
    whole = model(**batch)[1]
    alone = torch.cat([model(**{k: t[i : i + 1] for k, t in batch.items()})[1] for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-9)


def test_padding_is_not_attended_to():
    model, batch = small_petr().double(), {k: t.double() for k, t in small_batch().items()}
    padding = torch.zeros(2, 2, 32, 48, dtype=torch.bool)
    padding[:, 1] = True
    features, place, mask = model.memory(**batch, padding=padding)
    layer, query = model.layers[0].cross_attn, torch.randn(2, 4, 16, dtype=torch.float64)
    out = layer(query, features + place, features, mask)
    other = torch.where(mask[..., None], 1e3, features)
    torch.testing.assert_close(layer(query, other + place, other, mask), out)
    with pytest.raises(SpecError, match="nothing is left"):
        model(**batch, padding=torch.ones(2, 2, 32, 48, dtype=torch.bool))


def test_attention_is_torchs():
    torch.manual_seed(0)
    theirs, own = torch.nn.MultiheadAttention(16, 4, batch_first=True).double().eval(), Attention(16, 4, 0.0).double().eval()
    torch.nn.init.normal_(theirs.in_proj_bias)
    for i, proj in enumerate((own.q_proj, own.k_proj, own.v_proj)):
        proj.weight.data, proj.bias.data = theirs.in_proj_weight.data.chunk(3)[i], theirs.in_proj_bias.data.chunk(3)[i]
    own.out_proj.load_state_dict(theirs.out_proj.state_dict())
    q, k, v = (torch.randn(2, n, 16, dtype=torch.float64) for n in (3, 7, 7))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    torch.testing.assert_close(own(q, k, v, padding), theirs(q, k, v, key_padding_mask=padding, need_weights=False)[0])


def test_the_defaults_are_the_release():
    with parameters_on_meta():
        model = PETR(PETRConfig())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["position.mlp.0.weight"] == (1024, 192, 1, 1) and shapes["position.mlp.2.weight"] == (256, 1024, 1, 1)
    assert shapes["views.0.weight"] == (1024, 384, 1, 1) and shapes["query.0.weight"] == (256, 384)
    assert shapes["reference.weight"] == (900, 3) and shapes["classify.6.weight"] == (10, 256) and shapes["regress.4.weight"] == (10, 256)
    assert shapes["layers.5.up.weight"] == (2048, 256) and "layers.6.up.weight" not in shapes
    with parameters_on_meta():
        assert PETR(PETRConfig(embedding="qfpe")).position.anchors.vectors.shape == (3, 3, 128)


@pytest.mark.parametrize(
    "wrong", [{"width": 30}, {"heads": 3}, {"anchors": 1}, {"embedding": "sine"}, {"backbone": "vovnet"}, {"pc_range": (0.0,) * 6}, {"keep": 0}]
)
def test_a_config_that_cannot_be_is_refused(wrong):
    with pytest.raises(SpecError):
        PETRConfig(**wrong)


def test_configs_are_data():
    assert PETRConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(SpecError, match="no entry 'depth'"):
        PETRConfig.from_dict({"depth": 3})


@pytest.mark.slow
def test_deformable_convolutions_are_torchvisions():
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    from qplug_perception.petr.backbone import DeformableConv

    for stride, size in ((1, (5, 7)), (2, (6, 9)), (2, (1, 1))):
        own, x = DeformableConv(4, 6, stride).double(), torch.randn(2, 4, *size, dtype=torch.float64)
        for p in own.parameters():
            torch.nn.init.normal_(p, std=0.5)
        moved = own.offset(x)
        wanted = ops.deform_conv2d(x, moved[:, :18], own.weight, stride=stride, padding=1, mask=moved[:, 18:].sigmoid())
        torch.testing.assert_close(own(x), wanted)


# boxes -----------------------------------------------------------------------------------------------------------------------------------

_sizes = st.floats(0.1, 20)
_box = st.tuples(*[st.floats(-50, 50)] * 3, _sizes, _sizes, _sizes, st.floats(-3.14, 3.14), *[st.floats(-9, 9)] * 2)


@settings(deadline=None, max_examples=50)
@given(box=_box)
def test_codes_are_boxes(box):
    own = torch.tensor([box], dtype=torch.float64)
    torch.testing.assert_close(decode(encode(own)), own, rtol=1e-9, atol=1e-9)
    doubled = encode(own)
    doubled[:, 6:8] *= 3  # the length of (sin, cos) does not matter
    torch.testing.assert_close(decode(doubled), own, rtol=1e-9, atol=1e-9)


def test_the_likeliest_pairs_are_kept_in_order_and_far_ones_dropped():
    logits = torch.tensor([[[3.0, -9.0], [1.0, 2.0], [-1.0, -2.0]]])
    codes = torch.zeros(1, 3, 10)
    codes[0, :, 0] = torch.tensor([1.0, 2.0, 99.0])
    (found,) = detections(logits, codes, 4, (-10.0, -10.0, -10.0, 10.0, 10.0, 10.0))
    assert found.labels.tolist() == [0, 1, 0] and found.boxes[:, 0].tolist() == [1.0, 2.0, 2.0]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(detections(logits, codes, 300, (-100.0,) * 3 + (100.0,) * 3)[0].scores) == 6  # fewer pairs than are asked for


# losses ----------------------------------------------------------------------------------------------------------------------------------


def test_focal_loss_is_its_formula():
    logit = torch.tensor([0.7, -1.2], dtype=torch.float64)
    p = logit.sigmoid().tolist()
    assert focal(logit, torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist() == pytest.approx(
        [-0.25 * (1 - p[0]) ** 2 * math.log(p[0]), -0.75 * p[1] ** 2 * math.log(1 - p[1])]
    )


def test_queries_are_matched_at_the_least_total_cost():
    pytest.importorskip("scipy", reason="scipy is not installed")
    torch.manual_seed(0)
    logits, codes = torch.randn(5, 3), torch.randn(5, 10) * 3
    boxes, labels = decode(torch.randn(3, 10)), torch.tensor([0, 2, 1])
    queries, own = matching(logits, codes, boxes, labels)
    p = logits.double().sigmoid()
    kinds = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    apart = (codes[:, None, :8].double() - encode(boxes)[None, :, :8].double()).abs().sum(-1)
    cost = 2 * kinds[:, labels] + 0.25 * apart
    best = min(itertools.permutations(range(5), 3), key=lambda q: sum(float(cost[i, j]) for j, i in enumerate(q)))
    assert dict(zip(own.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_a_sample_without_boxes_costs_only_what_is_claimed():
    pytest.importorskip("scipy", reason="scipy is not installed")
    logits, codes = torch.full((1, 4, 3), -20.0), torch.zeros(1, 4, 10)
    nothing = loss(logits, codes, [torch.zeros(0, 9)], [torch.zeros(0, dtype=torch.long)])
    assert 0 <= float(nothing) < 1e-6
    assert float(loss(-logits, codes, [torch.zeros(0, 9)], [torch.zeros(0, dtype=torch.long)])) > 1


# scores ----------------------------------------------------------------------------------------------------------------------------------


def boxes_at(*places: float) -> torch.Tensor:
    out = torch.ones(len(places), 9)
    out[:, 0] = torch.tensor(places)
    return out


def test_precision_of_perfect_and_of_absent_detections():
    truth, labels = [boxes_at(0, 5), boxes_at(9)], [torch.tensor([0, 1]), torch.tensor([0])]
    perfect = [Detections(b, torch.linspace(0.9, 0.5, len(b)), k) for b, k in zip(truth, labels, strict=True)]
    none = [Detections(b[:0], torch.zeros(0), k[:0]) for b, k in zip(truth, labels, strict=True)]
    assert mean_average_precision(perfect, truth, labels, 3) == pytest.approx(1.0)
    assert mean_average_precision(none, truth, labels, 3) == 0
    assert math.isnan(average_precision(perfect, truth, labels, 2, 1.0))


def test_precision_counts_distance_doubles_and_recall():
    truth, labels = [boxes_at(0, 10)], [torch.tensor([0, 0])]
    one = [Detections(boxes_at(0.9), torch.tensor([0.9]), torch.tensor([0]))]
    assert average_precision(one, truth, labels, 0, 0.5) == 0
    # one of two boxes, right at once: precision 1 up to recall one half
    assert average_precision(one, truth, labels, 0, 1.0) == pytest.approx(40 / 90)
    twice = [Detections(boxes_at(0.1, 0.2), torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))]
    assert average_precision(twice, truth, labels, 0, 1.0) < average_precision(one, truth, labels, 0, 1.0)
