"""RefCOCO's files, written by the tests: polygons, run lengths, splits, and the pickle that is refused."""

import json
import pickle

import numpy as np
import pytest
from qcore.errors import CalibrationError, NotFound
from qplug_segmentation.refer import decoded_counts, mask_of, nearest, open_folder, polygon_mask, run_length_mask

REFS = [
    {"ref_id": 1, "ann_id": 10, "image_id": 5, "split": "train", "sentences": [{"sent": "the left box"}, {"raw": "Box on the left"}]},
    {"ref_id": 2, "ann_id": 11, "image_id": 5, "split": "train", "sentences": [{"sent": "the right box"}]},
    {"ref_id": 3, "ann_id": 12, "image_id": 6, "split": "testA", "sentences": [{"sent": "the stripe"}]},
]


def encoded_counts(counts: list[int]) -> str:
    """COCO's compression, written from its description: the inverse of `decoded_counts`."""
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        while True:
            c, x = x & 0x1F, x >> 5
            more = not ((x == 0 and not c & 0x10) or (x == -1 and c & 0x10))
            text += chr((c | 0x20 if more else c) + 48)
            if not more:
                break
    return text


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (40, 20)), ("b.png", (20, 20))):
        image.fromarray(np.full((size[1], size[0], 3), 77, np.uint8)).save(tmp_path / "images" / name)
    stripe = np.zeros((20, 20), bool)
    stripe[:, 4:6] = True
    runs = [80, 40, 280]
    instances = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "b.png"}],
        "annotations": [
            {"id": 10, "image_id": 5, "segmentation": [[0, 0, 10, 0, 10, 20, 0, 20]]},
            {"id": 11, "image_id": 5, "segmentation": [[30, 0, 40, 0, 40, 20, 30, 20], [20, 0, 22, 0, 22, 20, 20, 20]]},
            {"id": 12, "image_id": 6, "segmentation": {"size": [20, 20], "counts": encoded_counts(runs)}},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "refs.json").write_text(json.dumps(REFS))
    return tmp_path


def test_triples_of_a_split_keep_sentence_picture_and_mask_together(folder):
    triples = open_folder(folder, "train", 20).read()
    assert triples.sentences == ("the left box", "Box on the left", "the right box")
    assert triples.image_of.tolist() == [0, 0, 0] and triples.images.shape == (1, 3, 20, 20)
    left, same, right = triples.masks
    assert bool(left[:, :5].all()) and not bool(left[:, 5:].any()) and bool((left == same).all())
    assert bool(right[:, 15:].all()) and bool(right[:, 10].all()) and not bool(right[:, :10].any())


def test_a_path_may_end_in_the_name_of_a_split(folder):
    refer = open_folder(folder / "testA", "val", 10)
    assert (refer.split, refer.path, len(refer)) == ("testA", folder, 1)
    mask = refer.read().masks[0]
    assert bool(mask[:, 2].all()) and int(mask.sum()) == 10
    with pytest.raises(CalibrationError, match="no sentence of split 'val'; it has splits testA, train"):
        len(open_folder(folder, "val", 10))
    with pytest.raises(NotFound, match="does not exist"):
        open_folder(folder / "nothing", "val", 10)


def test_some_sentences_alone_read_their_own_pictures(folder):
    some = open_folder(folder, "train", 20).read([2])
    assert some.sentences == ("the right box",) and bool((some.masks[0] == open_folder(folder, "train", 20).read().masks[2]).all())


def test_a_pickle_is_refused_with_the_way_to_convert_it(folder):
    (folder / "refs.json").unlink()
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS))
    with pytest.raises(CalibrationError, match=r"refs\(unc\).p is a pickle.*convert it once") as e:
        len(open_folder(folder, "train", 20))
    # the command that is told does it
    code = str(e.value).partition('-c "')[2].partition('" ')[0]
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code, folder / "refs(unc).p", folder / "refs.json"], check=True)
    assert len(open_folder(folder, "train", 20)) == 3


def test_files_that_are_missing_or_another_thing_are_named(folder):
    (folder / "images" / "b.png").unlink()
    with pytest.raises(NotFound, match=r"b\.png does not exist"):
        open_folder(folder, "testA", 20).read()
    (folder / "instances.json").write_text('{"images": []}')
    with pytest.raises(CalibrationError, match="lacks annotations"):
        open_folder(folder, "train", 20).read()
    (folder / "refs.json").write_text('[{"split": "train"}]')
    with pytest.raises(CalibrationError, match="object 0: KeyError"):
        len(open_folder(folder, "train", 20))


# masks -----------------------------------------------------------------------------------------------------------------------------------


def test_polygon_of_a_rectangle_covers_its_pixels_and_a_triangle_half():
    assert int(polygon_mask([2, 1, 7, 1, 7, 4, 2, 4], 6, 10).sum()) == 15
    big = polygon_mask([0, 0, 200, 0, 0, 200], 200, 200)
    assert abs(int(big.sum()) - 20000) <= 200
    # direction and first corner do not matter
    assert np.array_equal(polygon_mask([2, 4, 7, 4, 7, 1, 2, 1], 6, 10), polygon_mask([7, 1, 7, 4, 2, 4, 2, 1], 6, 10))


def test_a_shape_that_is_concave_by_the_even_odd_rule():
    u = polygon_mask([0, 0, 2, 0, 2, 4, 4, 4, 4, 0, 6, 0, 6, 6, 0, 6], 6, 6)
    assert u[0].tolist() == [True, True, False, False, True, True] and bool(u[5].all())


@pytest.mark.parametrize("counts", [[0, 5, 3, 2], [7, 1, 40, 33, 900, 2, 17], [100], [3, 2000, 1, 1, 2000]])
def test_compressed_run_lengths_come_back(counts):
    assert decoded_counts(encoded_counts(counts)) == counts


def test_run_lengths_go_down_the_columns():
    mask = run_length_mask([3, 2, 1], 2, 3)
    assert mask.tolist() == [[False, False, True], [False, True, False]]
    assert mask_of({"size": [2, 3], "counts": [3, 2, 1]}, 2, 3).tolist() == mask.tolist()
    with pytest.raises(CalibrationError, match="add up to 6 pixels"):
        run_length_mask([3, 2, 1], 3, 3)
    with pytest.raises(CalibrationError, match="mask of 2×3"):
        mask_of({"size": [2, 3], "counts": [3, 2, 1]}, 3, 2)
    with pytest.raises(CalibrationError, match="end inside a number"):
        decoded_counts("o")


def test_nearest_keeps_a_mask_of_its_own_size():
    mask = np.random.default_rng(0).random((7, 7)) > 0.5
    assert np.array_equal(nearest(mask, 7), mask)
    assert nearest(np.eye(2, dtype=bool), 4).tolist() == np.kron(np.eye(2), np.ones((2, 2))).astype(bool).tolist()
