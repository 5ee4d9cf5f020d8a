"""The embedding model as qcore sees it: the adapter's contract, and a quantized encoder that still embeds."""

import numpy as np
import torch
from qcore.pipeline import quantize_model
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_adapter
from qplug_subsa.adapter import AnyTextEncoder
from qplug_subsa.embed import LocalModel, embed_with
from qplug_subsa.encoder import TextEncoder, batches_of, load_encoder


def test_the_adapter_keeps_its_contract(encoder, sentences):
    source = LocalModel(encoder)
    tokens = source.tokenizer(sentences[:6], padding=True, return_tensors="pt")
    batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    assert not batch["attention_mask"].all()  # there is padding
    check_adapter(TextEncoder(), source.model, batch)
    topology = TextEncoder().topology(source.model)
    assert [[s.module.rpartition("layer.0.")[2] for s in stage] for stage in topology.blocks[0].stages] == [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"],
        ["intermediate.dense"],
        ["output.dense"],
    ]
    assert not TextEncoder().matches(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    source.model.embeddings.word_embeddings, kept = None, source.model.embeddings.word_embeddings
    assert not TextEncoder().matches(source.model)  # a vision transformer has the rest
    source.model.embeddings.word_embeddings = kept


def test_a_quantized_encoder_still_embeds(encoder, sentences):
    source = LocalModel(encoder)
    exact = source.embed(sentences)
    registry = load_registry()
    near = {}
    for name, overrides in (("w8a16-rtn", ["rules.0.granularity.size=16"]), ("w3a16-gptq", ["rules.0.granularity.size=16"])):
        overrides = overrides if "group" in str(load_recipe(name, registry).rules[0].spec) else []
        recipe = load_recipe(name, registry, [*overrides, "calibration.starts=0"])
        batches = batches_of(source.tokenizer, sentences, 12)
        q = quantize_model(load_encoder(encoder), recipe, batches, registry=registry, adapter=TextEncoder())
        assert len(q.sites) == 6
        vectors = embed_with(q.model, source.tokenizer, source.settings, sentences)
        near[name] = float(np.mean((vectors * exact).sum(1)))
    assert 1 - near["w8a16-rtn"] < 1e-3 and near["w3a16-gptq"] < near["w8a16-rtn"]


def test_calibration_batches_have_one_shape(encoder, sentences):
    batches = batches_of(LocalModel(encoder).tokenizer, sentences, 12)
    assert [b["input_ids"].shape for b in batches] == [(16, 12)] * 3
    assert all((b["input_ids"][b["attention_mask"] == 0] == 0).all() for b in batches)


def test_a_batch_without_a_mask_has_no_padding(encoder, sentences):
    source = LocalModel(encoder)
    ids = source.tokenizer(sentences[:1], return_tensors="pt")["input_ids"]
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapter = AnyTextEncoder()
    with torch.no_grad():
        expected = TextEncoder().outputs(source.model, masked)
        assert torch.equal(adapter.outputs(source.model, {"input_ids": ids, "row_weight": torch.tensor(2.0)}), expected)
    context = adapter.context({"input_ids": ids, "row_weight": torch.tensor(2.0)})
    assert context.valid.all() and context.weight == 2
    assert AnyTextEncoder.priority < TextEncoder.priority and AnyTextEncoder.name == TextEncoder.name
