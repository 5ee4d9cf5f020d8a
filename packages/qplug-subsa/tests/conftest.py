import re

import numpy as np
import pytest


def make_clustered(n: int, d: int = 16, clusters: int = 6, seed: int = 0, spread: float = 0.6, weights: object = None) -> np.ndarray:
    """[n, d] float32 points around random centres, off the origin."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d))
    owner = rng.choice(clusters, n, p=weights)
    return (centres[owner] + spread * rng.normal(size=(n, d)) + 0.5).astype(np.float32)


@pytest.fixture(scope="session")
def points() -> np.ndarray:
    return make_clustered(240)


@pytest.fixture(scope="session")
def clustered():
    return make_clustered


VOCABULARY = "the a cat dog sat ran film was good bad dull bright bank rate rose fell goal match team won lost on in of and"
WORDS = re.findall(r"\w+", VOCABULARY)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a tiny BERT with random weights, with the files that sentence-transformers writes."""
    import json

    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ":", "label", *(f"##{c}" for c in "abc"), *"0123456789"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
    return folder


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """60 different short texts."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 9))) + f" {i % 10} {i // 10}" for i in range(60)]
    assert len(set(texts)) == 60
    return texts
