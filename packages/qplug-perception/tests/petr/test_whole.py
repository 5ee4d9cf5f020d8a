"""Recipes on small models, from source to a loaded checkpoint; transforms by themselves."""

import json

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.model import Invariance, load_source
from qcore.pipeline import quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_transform
from qplug_perception.petr.adapter import PETRAdapter
from qplug_perception.petr.lookup import DULUT, TableLookup
from qplug_perception.petr.qans import QANS, StableSoftmax
from qplug_perception.petr.testing import SMALL, small_batch, small_petr
from torch import nn

REGISTRY = load_registry()


def source(folder, embedding: str):
    (folder / "config.json").write_text(json.dumps({"model_type": "petr", "petr": {**SMALL.to_dict(), "embedding": embedding}}))
    return load_source(f"petr:{folder / 'config.json'}@random", REGISTRY.sources)


@pytest.mark.parametrize("recipe", ["petr-w8a8", "fq-petr-w8a8"])
def test_recipes_go_through_and_come_back(recipe, embedding, tmp_path):
    loaded, adapter, batch = source(tmp_path, embedding), PETRAdapter(), small_batch()
    chosen = load_recipe(recipe, REGISTRY, ())
    make_plan(loaded, chosen, adapter, REGISTRY, has_data=True).require()
    done = quantize_model(loaded, chosen, [small_batch(seed=s) for s in (1, 2)], registry=REGISTRY)
    floats = source(tmp_path, embedding)
    exact = floats.model
    exact.load_state_dict({n: floats.reader[n] for n in floats.reader.names()}, assign=True)
    y, wanted = adapter.outputs(done.model, batch), adapter.outputs(exact, batch)
    apart = (y - wanted).norm() / wanted.norm()
    assert 0 < float(apart) < 0.2  # 8 bits of random weights
    kinds = [type(m) for m in done.model.modules()]
    assert kinds.count(StableSoftmax) == (2 * SMALL.layers if recipe.startswith("fq") else 0)
    assert all(r.error < 0.1 for r in done.sites) and len(done.sites) == len(PETRAdapter().topology(small_petr(embedding=embedding)).sites)
    save(done.model, tmp_path / "out", registry=REGISTRY, source="petr", adapter="petr", companions=loaded.write_companions)
    with torch.no_grad():
        assert torch.equal(adapter.outputs(load(tmp_path / "out", registry=REGISTRY), batch), y)


def test_scales_pass_the_sum_of_features_and_positions():
    """SmoothQuant of FQ-PETR reaches the place that PETR's positions spoil."""
    topology = PETRAdapter().topology(small_petr())
    memory = next(link for link in topology.links_with(Invariance.SCALE) if link.name == "memory")
    assert len(memory.reads) == 2 * SMALL.layers


def test_softmax_is_exchanged_where_scores_are_tapped():
    rewrite = check_transform(QANS(exp="dulut"), PETRAdapter(), small_petr(), [small_batch()], modules=REGISTRY.modules)
    assert sorted(rewrite.inserts) == sorted(f"layers.{i}.{kind}_attn.softmax" for i in range(2) for kind in ("self", "cross"))
    assert all("β = " in note for note in rewrite.notes)


def test_one_candidate_needs_no_data():
    topology = PETRAdapter().topology(small_petr())
    assert QANS(candidates=(20.0,)).wants(topology, {}) == {} and len(QANS().wants(topology, {})) == 4


class Bends(nn.Module):
    """A network with all activation functions that are looked up, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.bends = nn.ModuleList([nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.GELU(approximate="tanh")])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, bend in zip(self.layers, self.bends, strict=True):
            x = bend(layer(x))
        return x


def test_activation_functions_are_looked_up():
    from qcore.model.plain import PlainMLP

    torch.manual_seed(0)
    rewrite = check_transform(DULUT(), PlainMLP(), Bends(), [torch.randn(16, 8)], modules=REGISTRY.modules)
    assert {rewrite.inserts[f"bends.{i}"].module.config["function"] for i in range(4)} == {"silu", "gelu", "sigmoid", "gelu-tanh"}
    assert all(insert.module.type == TableLookup.name for insert in rewrite.inserts.values())


def test_registration_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, qplug_perception, qplug_perception.petr.config; sys.exit('torch' in sys.modules or 'mmdet3d' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
