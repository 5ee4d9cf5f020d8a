"""Scores on masks made by hand; generated pictures, whose sentences mean one thing each; triples that stay together."""

import math
from types import SimpleNamespace

import pytest
import torch
from qcore.errors import CalibrationError, QcoreError
from qplug_segmentation.metrics import Masks, overlaps
from qplug_segmentation.shapes import COLOURS, EXTREMES, RELATIONS, SHAPES, WORDS, Shapes, Thing, make, sentences_of
from qplug_segmentation.triples import ReferringData, SentenceEncoder, Triples, model_batch


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in row] for row in rows]).unsqueeze(0)


def test_scores_of_hand_made_masks():
    masks = Masks()
    masks.add(mask("##..", "##.."), mask("##..", "##.."))  # IoU 1
    masks.add(mask("##..", "...."), mask(".##.", "...."))  # 1 of 3
    masks.add(mask("#...", "#..."), mask("#...", "...."))  # 1 of 2
    s = masks.scores()
    assert s["miou"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert s["oiou"] == pytest.approx((4 + 1 + 1) / (4 + 3 + 2))
    assert (s["p50"], s["p60"], s["p90"]) == pytest.approx((2 / 3, 1 / 3, 1 / 3))


def test_an_empty_union_is_no_hit_and_adds_nothing_to_the_whole():
    masks = Masks()
    masks.add(mask("....", "...."), mask("....", "...."))
    assert masks.scores()["miou"] == 0 and masks.scores()["oiou"] == 0
    masks.add(mask("##..", "...."), mask("##..", "...."))
    assert masks.scores()["miou"] == 0.5 and masks.scores()["oiou"] == 1.0


def test_an_empty_truth_counts_what_was_marked():
    masks = Masks()
    masks.add(mask("#...", "...."), mask("....", "...."))
    masks.add(mask("##..", "...."), mask("###.", "...."))
    assert masks.ious.tolist() == pytest.approx([0, 2 / 3])
    assert masks.scores()["oiou"] == pytest.approx(2 / 4)


def test_masks_of_another_size_and_no_masks_are_errors():
    with pytest.raises(QcoreError, match="masks of one size"):
        overlaps(mask("##"), mask("##", "##"))
    with pytest.raises(QcoreError, match="no mask was compared"):
        Masks().scores()


# generated pictures ----------------------------------------------------------------------------------------------------------------------


def test_pictures_follow_from_seed_split_and_number_and_the_splits_share_none():
    a, b, other = make("train", range(20)), make("train", range(10, 20)), make("val", range(20))
    assert torch.equal(a.images[10:], b.images) and a.sentences[20:] == b.sentences
    seen = {bytes(image.numpy().tobytes()) for image in a.images}
    assert not any(bytes(image.numpy().tobytes()) in seen for image in other.images)
    assert not torch.equal(make("train", range(3), seed=1).images, a.images[:3])


def test_every_sentence_is_true_of_one_thing_alone():
    """Read each sentence by a parser of its own, on scenes that are drawn at random."""
    import numpy as np

    def true(sentence: str, t: Thing, things: list[Thing]) -> bool:
        words = sentence.removeprefix("the ").split()
        for relation, holds in RELATIONS.items():
            if f" {relation} " in sentence:
                colour, shape = words[:2]
                other = next(o for o in things if f"the {o.colour} {o.shape}" == sentence.rpartition(f" {relation} ")[2])
                return (t.colour, t.shape) == (colour, shape) and holds(t.centre, other.centre)
        if words[0] in EXTREMES:
            key = EXTREMES[words[0]]
            return t.shape == words[1] and key(t.centre) == min(key(o.centre) for o in things if o.shape == words[1])
        return all(w in (t.colour, t.shape, "thing") for w in words)

    rng, count = np.random.default_rng(5), 0
    for _ in range(60):
        things = [
            Thing(str(rng.choice(list(COLOURS)[:3])), str(rng.choice(SHAPES)), (float(rng.uniform(8, 56)), float(rng.uniform(8, 56))), 6.0)
            for _ in range(4)
        ]
        for sentence, which in sentences_of(things):
            assert [i for i, t in enumerate(things) if true(sentence, t, things)] == [which], (sentence, things)
            count += 1
    assert count > 300


def test_masks_lie_where_their_colour_is():
    triples = make("train", range(30))
    for sentence, image, own in zip(triples.sentences, triples.image_of, triples.masks, strict=True):
        colour = sentence.split()[1]
        if colour not in COLOURS:
            continue
        painted = triples.images[image][:, own].float().mean(1)
        assert (painted - torch.tensor(COLOURS[colour])).abs().max() < 45, sentence


# triples ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encode(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return SentenceEncoder(tmp_path / "vocab.txt", 12)


def test_sentences_become_ids_between_cls_and_sep_padded_and_cut(encode):
    ids, words = encode(["the red circle left of the blue square", "the thing", "unheard of"])
    assert ids.shape == words.shape == (3, 12)
    assert [WORDS[i] for i in ids[1]][:5] == ["[CLS]", "the", "thing", "[SEP]", "[PAD]"]
    assert words.sum(1).tolist() == [10, 4, 4] and WORDS[ids[2, 1]] == "[UNK]"
    ids, words = encode(["the " * 30])
    assert words.sum() == 12


def test_a_batch_keeps_each_sentence_with_its_picture(encode):
    """The release cuts a list of images (one an object) and one of sentences to one length: they part at the first object with two."""
    triples = make("train", range(4), sentences=3)
    batch = model_batch(triples.take([4, 0, 11]), encode)
    again = model_batch(make("train", [1, 0, 3], sentences=3).take([1, 3, 8]), encode)
    assert torch.equal(batch["image"], again["image"]) and torch.equal(batch["target"], again["target"]) and torch.equal(batch["ids"], again["ids"])
    assert Shapes("train", 4, sentences=3).read([4, 0, 11]).digest() != triples.digest()
    assert torch.equal(Shapes("train", 4, sentences=3).read([4, 0, 11]).masks, triples.take([4, 0, 11]).masks)


def test_calibration_is_of_the_training_split_and_not_what_is_evaluated(encode):
    with pytest.raises(CalibrationError, match="of the split 'val'"):
        ReferringData(encode, None, calibration=Shapes("val", 4))
    with pytest.raises(CalibrationError, match="are the same"):
        ReferringData(encode, None, calibration=Shapes("train", 4), evaluation=Shapes("train", 4))


def test_batches_have_one_shape_and_follow_from_the_seed(encode):
    data = ReferringData(encode, None, Shapes("train", 8), Shapes("val", 2))
    settings = SimpleNamespace(samples=8, batch=4, seed=0)
    one, two = data.batches(settings), data.batches(settings)
    assert [tuple(b["image"].shape) for b in one] == [(4, 3, 64, 64)] * 2
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in a)
    assert not torch.equal(one[0]["ids"], data.batches(SimpleNamespace(samples=8, batch=4, seed=1))[0]["ids"])
    with pytest.raises(CalibrationError, match="16 sentences"):
        data.batches(SimpleNamespace(samples=17, batch=1, seed=0))
    with pytest.raises(CalibrationError, match="do not fill batches of 3"):
        data.batches(SimpleNamespace(samples=8, batch=3, seed=0))
    record = data.record(one, data.task())
    assert record["calibration"]["split"] == "train" and record["evaluation"]["sentences"] == 4
    assert math.isclose(float(one[0]["target"].float().mean()), 0.04, abs_tol=0.04)


def test_triples_of_other_shapes_are_refused():
    t = make("train", range(2))
    with pytest.raises(CalibrationError, match="bool masks"):
        Triples(t.images, t.image_of, t.sentences, t.masks[:1])
    with pytest.raises(CalibrationError, match="about image 7"):
        Triples(t.images, t.image_of * 0 + 7, t.sentences, t.masks)
