"""Embeddings by a local model, and their cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from qcore.errors import CheckpointError, NotFound
from qplug_subsa import embed as embed_module
from qplug_subsa.embed import LocalModel, Settings, embed_texts, pool


@pytest.fixture
def runs(monkeypatch):
    """The texts that the model really ran on."""
    seen: list[str] = []
    real = LocalModel.embed

    def counted(self, texts, progress=embed_module.quiet):
        seen.extend(texts)
        return real(self, texts, progress)

    monkeypatch.setattr(LocalModel, "embed", counted)
    return seen


def test_padding_and_order_do_not_change_a_vector(encoder, sentences):
    model = LocalModel(encoder, batch=8)
    together = model.embed(sentences)
    assert together.shape == (60, 16) and together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for i in (0, 17, 59):
        assert np.allclose(model.embed([sentences[i]])[0], together[i], atol=1e-5)
    backwards = model.embed(sentences[::-1])
    assert np.allclose(backwards[::-1], together, atol=1e-5)


def test_mean_pooling_leaves_padding_out():
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    assert pool(hidden, mask, Settings()).tolist() == [[1.5, 2.5, 3.5]]
    assert pool(hidden, mask, Settings(pooling="cls")).tolist() == [[0.0, 1.0, 2.0]]
    assert pool(hidden, mask, Settings(normalize=True)).norm().item() == pytest.approx(1)


def test_the_cache_computes_each_text_once(encoder, sentences, tmp_path, runs):
    model = LocalModel(encoder)
    first = embed_texts(model, [*sentences[:20], sentences[0]], tmp_path)
    assert (first.computed, first.kept) == (20, 0) and sorted(runs) == sorted(sentences[:20])
    again = embed_texts(LocalModel(encoder), sentences[:30], tmp_path)
    assert (again.computed, again.kept) == (10, 20) and len(runs) == 30
    assert np.array_equal(again.vectors[:20], first.vectors[:20])
    changed = embed_texts(model, [sentences[0] + " ."], tmp_path)
    assert changed.computed == 1
    assert embed_texts(model, sentences[:5], None).computed == 5


def test_another_model_never_meets_old_vectors(encoder, sentences, tmp_path, runs):
    twin = tmp_path / "twin"
    shutil.copytree(encoder, twin)
    cache = tmp_path / "cache"
    embed_texts(LocalModel(encoder), sentences[:4], cache)
    assert embed_texts(LocalModel(twin), sentences[:4], cache).computed == 0  # the same content under another name
    (twin / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    other = embed_texts(LocalModel(twin), sentences[:4], cache)
    assert other.computed == 4
    assert not np.allclose(other.vectors, embed_texts(LocalModel(encoder), sentences[:4], cache).vectors, atol=1e-3)


def test_what_was_computed_before_an_interruption_stays(encoder, sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "PART", 10)

    def stop(phase, done, total):
        if done > 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_texts(LocalModel(encoder, batch=5), sentences, tmp_path, stop)
    assert embed_texts(LocalModel(encoder), sentences, tmp_path).kept == 20


def test_a_broken_cache_is_named(encoder, sentences, tmp_path):
    model = LocalModel(encoder)
    embed_texts(model, sentences[:3], tmp_path)
    part = next(tmp_path.rglob("part-*.npz"))
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="delete it"):
        embed_texts(model, sentences[:3], tmp_path)


def test_models_that_cannot_be_read_are_named(encoder, tmp_path):
    with pytest.raises(NotFound, match=r"config\.json"):
        LocalModel(tmp_path)
    twin = tmp_path / "twin"
    shutil.copytree(encoder, twin)
    (twin / "modules.json").write_text(json.dumps([{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}]))
    with pytest.raises(CheckpointError, match="Dense"):
        _ = LocalModel(twin).settings
    (twin / "modules.json").unlink()
    assert LocalModel(twin).settings == Settings(length=64)
    (twin / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = LocalModel(twin).settings
