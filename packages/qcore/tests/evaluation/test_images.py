"""Images as data: what is read, what is refused, and what a comparison of classifiers says."""

import pytest
import torch
from qcore.calibration.images import ImageFile, Preprocessing
from qcore.errors import CalibrationError, NotFound, QcoreError
from qcore.evaluation import ImageClassification, ImagePair
from qcore.recipe import CalibrationSettings
from safetensors.torch import save_file
from torch import nn

GREY = Preprocessing(size=(1, 6, 6), mean=(0.25,), std=(0.5,), pad=1)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (12, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path, pixels):
    path = tmp_path / "images.safetensors"
    save_file({"images": pixels, "labels": torch.arange(12) % 3}, path)
    return path


def test_padding_is_a_black_pixel_and_not_a_zero_after_normalization(pixels):
    x = GREY(pixels.unsqueeze(1))
    assert x.shape == (12, 1, 6, 6)
    assert torch.equal(x[:, :, 0], torch.full_like(x[:, :, 0], (0 - 0.25) / 0.5))
    torch.testing.assert_close(x[:, 0, 1:5, 1:5], (pixels.float() / 255 - 0.25) / 0.5)


def test_images_of_another_size_are_refused_with_both_sizes(pixels):
    with pytest.raises(CalibrationError, match="1×4×4 and 1 pixels of padding are no input of this model, which reads 1×8×8"):
        Preprocessing(size=(1, 8, 8), mean=(0.0,), std=(1.0,), pad=1)(pixels.unsqueeze(1))


def test_seed_chooses_the_calibration_images(file):
    images = ImageFile(file, GREY)
    one, again, other = (images.batches(CalibrationSettings(samples=8, batch=4, seed=s)) for s in (0, 0, 1))
    assert [b.shape for b in one] == [(4, 1, 6, 6)] * 2
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize(("settings", "says"), [({"samples": 13}, "holds 12 images"), ({"samples": 12, "batch": 5}, "do not fill batches of 5")])
def test_too_few_images_and_uneven_batches_are_refused(file, settings, says):
    with pytest.raises(CalibrationError, match=says):
        ImageFile(file, GREY).batches(CalibrationSettings(**settings))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"pixels": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "no tensor `images`"),
        ({"images": torch.zeros(2, 4, 4)}, "torch.float32"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.long)}, "for 2 images"),
    ],
)
def test_files_that_hold_no_images_are_refused(tmp_path, tensors, says):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CalibrationError, match=says):
        ImageFile(path, GREY).read()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"nothing\.safetensors does not exist"):
        ImageFile(tmp_path / "nothing.safetensors", GREY).read()


def test_a_folder_of_pictures_has_one_class_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 255), ("ant", 0)):
        (tmp_path / name).mkdir()
        image.new("L", (9, 7), value).save(tmp_path / name / "0.png")
    pixels, labels = ImageFile(tmp_path, GREY).read()
    assert pixels.shape == (2, 1, 4, 4)
    assert labels.tolist() == [0, 1]
    assert pixels[0].max() == 0  # "ant" comes first
    assert pixels[1].min() == 255


def test_calibrating_on_the_evaluation_images_is_refused(file):
    pair = ImagePair(None, ImageFile(file, GREY), GREY)
    with pytest.raises(CalibrationError, match="are the same"):
        pair.chosen(file, None)


class _Picks(nn.Module):
    """Says of image i that it is of class answers[i]."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.at = torch.tensor(answers), 0

    def forward(self, x):
        own = self.answers[self.at : self.at + len(x)]
        self.at += len(x)
        return torch.eye(3)[own] * 4


def test_accuracy_is_on_true_labels_and_its_change_is_made_of_lost_and_gained(tmp_path, pixels):
    task = ImageClassification(pixels.unsqueeze(1), GREY, torch.zeros(12, dtype=torch.long), batch=5)
    right = [0] * 8 + [1] * 4
    changed = [1, 1, *[0] * 6, 0, 1, 2, 1]  # loses two, gains one, and errs otherwise once
    reference = task.reference(_Picks(right), tmp_path)
    scores = task.evaluate(_Picks(changed), reference)
    assert scores["accuracy_reference"] == pytest.approx(8 / 12)
    assert scores["accuracy"] == pytest.approx(7 / 12)
    assert (scores["lost"], scores["gained"]) == (pytest.approx(2 / 12), pytest.approx(1 / 12))
    assert scores["top1"] == pytest.approx(8 / 12)
    assert scores["images"] == 12
    # the changes are -1, -1, +1 and nine zeros: their standard deviation over √12
    changes = torch.tensor([-1.0, -1.0, 1.0] + [0.0] * 9)
    assert scores["accuracy_change_standard_error"] == pytest.approx(float(changes.std(correction=0)) / 12**0.5, rel=1e-6)


def test_a_model_against_itself_has_no_distance(tmp_path, pixels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    task = ImageClassification(pixels.unsqueeze(1), GREY, torch.zeros(12, dtype=torch.long))
    scores = task.evaluate(model, task.reference(model, tmp_path))
    assert (scores["kl"], scores["top1"], scores["lost"], scores["accuracy_change_standard_error"]) == (0, 1, 0, 0)


def test_labels_beyond_the_classes_are_refused(tmp_path, pixels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    task = ImageClassification(pixels.unsqueeze(1), GREY, torch.full((12,), 3))
    with pytest.raises(QcoreError, match="a label is 3, but the model has 3 classes"):
        task.evaluate(model, task.reference(model, tmp_path))
