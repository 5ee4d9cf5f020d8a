"""The small trained detectors: they are what their records say, and they see."""

import json

import pytest
import torch
from qcore.model import load_source
from qcore.plugins import load_registry
from qplug_perception.petr.boxes import detections
from qplug_perception.petr.data import Made
from qplug_perception.petr.detection import mean_average_precision
from qplug_perception.petr.model import PETR
from qplug_perception.petr.scenes import EVALUATION
from qplug_perception.petr.source import ZOO, read_config

MODELS = ("tiny-petr", "tiny-qfpe")


def trained(name: str) -> PETR:
    loaded = load_source(f"petr:{name}", load_registry().sources)
    model = PETR(loaded.model.config).eval()
    model.load_state_dict({n: loaded.reader[n] for n in model.state_dict()})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_record(name):
    import hashlib

    record = json.loads((ZOO / name / "record.json").read_text())
    assert hashlib.sha256((ZOO / name / "model.safetensors").read_bytes()).hexdigest() == record["sha256"]
    assert record["training_seeds"][1] <= record["evaluation_seeds"][0] == EVALUATION


def test_they_differ_in_their_position_embedding_alone():
    one, other = (read_config(ZOO / name / "config.json").to_dict() for name in MODELS)
    assert {k for k in one if one[k] != other[k]} == {"embedding"}


@pytest.mark.parametrize("name", MODELS)
def test_they_see_what_they_were_not_trained_on(name):
    scenes, model = Made(EVALUATION, 16).read(), trained(name)
    with torch.no_grad():
        found = [d for b in scenes.batches(model.config, 8) for d in detections(*model(**b), model.config.keep, model.config.post_range)]
        blind = detections(*PETR(model.config).eval()(**next(iter(scenes.batches(model.config, 16)))), 64, model.config.post_range)
    record = json.loads((ZOO / name / "record.json").read_text())
    score = mean_average_precision(found, *scenes.truth(), 3)
    # sixteen scenes of the record's two hundred
    assert score > 0.5 * record["scores"]["map"] > 5 * mean_average_precision(blind, *scenes.truth(), 3)
