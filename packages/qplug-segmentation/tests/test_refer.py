"""RefCOCO's files, written by the tests: polygons, run lengths, splits, and the pickle that is refused."""

import json
import pickle

import numpy as np
import pytest
from qcore.errors import CalibrationError, NotFound
from qplug_segmentation.refer import decoded_counts, mask_of, nearest, open_folder, polygons_mask, run_length_mask

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


def inside(corners: list[float], height: int, width: int) -> np.ndarray:
    """The pixels whose centre lies inside, by the even-odd rule."""
    ys, xs = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    found = np.zeros((height, width), bool)
    points = list(zip(corners[0::2], corners[1::2], strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if y0 != y1:
            found ^= ((ys >= min(y0, y1)) & (ys < max(y0, y1))) & (xs > x0 + (ys - y0) * (x1 - x0) / (y1 - y0))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_polygons_cover_the_pixels_inside_but_for_their_outline(seed):
    rng = np.random.default_rng(seed)
    turns = np.sort(rng.uniform(0, 2 * np.pi, 7))
    radius = rng.uniform(8, 24, 7)
    corners = np.stack([30 + radius * np.cos(turns), 25 + radius * np.sin(turns)], 1).flatten().tolist()
    own, other = polygons_mask([corners], 50, 60), inside(corners, 50, 60)
    around = sum(np.hypot(*p) for p in np.diff(np.array([*corners, *corners[:2]]).reshape(-1, 2), axis=0))
    assert own.shape == (50, 60) and own.sum() > 100
    assert (own ^ other).sum() <= around / 2


def test_polygons_are_joined_and_a_hole_between_two_stays():
    assert int(polygons_mask([[2, 1, 7, 1, 7, 4, 2, 4]], 6, 10).sum()) == 15
    two = polygons_mask([[0, 0, 2, 0, 2, 4, 0, 4], [1, 0, 3, 0, 3, 4, 1, 4], [6, 0, 7, 0, 7, 4, 6, 4]], 4, 8)
    assert two.tolist() == [[True] * 3 + [False] * 3 + [True, False]] * 4
    assert not polygons_mask([], 4, 8).any()


@pytest.mark.parametrize(
    ("polygon", "words"),
    [
        ([0, 0, 4, 4], "three corners or more, x and y of each, got 4 numbers"),
        ([0, 0, 4, 4, 1, 2, 3], "got 7 numbers"),
        ([0, 0, 900, 0, 5, 5], "x = 900, and the picture ends at 8"),
        ([0, 0, 4, float("nan"), 5, 5], "y = nan, and the picture ends at 4"),
    ],
)
def test_polygons_of_another_picture_are_refused(polygon, words):
    with pytest.raises(CalibrationError, match=words):
        polygons_mask([polygon], 4, 8)


def test_run_lengths_are_those_that_coco_writes():
    mask = pytest.importorskip("pycocotools.mask", reason="the code that defines the format")
    drawn = np.random.default_rng(0).random((37, 53)) > 0.6
    packed = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    segmentation = {"size": list(packed["size"]), "counts": packed["counts"].decode()}
    assert np.array_equal(mask_of(segmentation, 37, 53), drawn)


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
