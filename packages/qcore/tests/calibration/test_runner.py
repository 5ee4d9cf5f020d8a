"""What a block runner shows its observers is what a plain forward pass of the model would show."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from qcore.calibration import Gram
from qcore.calibration.runner import BlockRunner
from qcore.model import Site
from qcore.numbers import int_weight, quantize
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from torch import Tensor, nn


@dataclass(frozen=True)
class Noting:
    """Rounds by a scale that the Gram matrix decides, so that a wrong Gram gives wrong codes later on; notes every Gram."""

    name: ClassVar[str] = "noting"
    grams: dict[int, Tensor]

    @property
    def observes(self) -> tuple[Gram]:
        return (Gram(dtype="float64"),)

    def solve(self, weight: Tensor, spec: Any, seen: Any, frozen: Tensor | None = None) -> Any:
        self.grams[len(self.grams)] = seen["gram"]
        size = seen["gram"].diagonal().float().sqrt()
        return quantize(weight * (0.5 + size / size.max()), spec)


def plain(model: nn.Module, adapter: Any, batches: list[Any], solver: Noting, spec: Any) -> None:
    """The same, by running the whole float model for every stage."""
    for block in adapter.topology(model).blocks:
        for stage in block.stages:
            grams = {}
            handles = []
            for site in stage:
                grams[site] = Gram(dtype="float64")
                hook = lambda m, args, gram=grams[site]: gram.update(args[0].reshape(-1, args[0].shape[-1]))
                handles.append(model.get_submodule(site.module).register_forward_pre_hook(hook))
            with torch.no_grad():
                for batch in batches:
                    adapter.outputs(model, batch)
            for handle in handles:
                handle.remove()
            first: dict[Any, list[Site]] = {}
            for site in stage:
                first.setdefault(tuple(grams[site].result().flatten().tolist()), []).append(site)
            for sites in first.values():
                weights = [model.get_submodule(s.module).weight for s in sites]
                q = solver.solve(torch.cat([w.data for w in weights]), spec, {"gram": grams[sites[0]].result()}).dequantize()
                for w, values in zip(weights, q.split([w.shape[0] for w in weights]), strict=True):
                    w.data = values.to(w.dtype)


@pytest.mark.parametrize("keep", [0, 2 << 30], ids=["nothing kept", "all kept"])
def test_every_gram_is_that_of_a_plain_forward_pass(keep, monkeypatch):
    monkeypatch.setattr(BlockRunner.__init__, "__defaults__", (None, keep))
    model, twin, adapter = tiny_decoder(), tiny_decoder(), TinyDecoderAdapter()
    batches = [tokens(seed=seed) for seed in range(3)]
    spec = int_weight(4, 8)
    ours, theirs = Noting({}), Noting({})
    quantize_model(load_in_memory(model), Recipe(rules=(Rule("*:weight", spec),), solver=ours), batches, registry=Registry(""), adapter=adapter)
    plain(twin, adapter, batches, theirs, spec)
    assert len(ours.grams) == len(theirs.grams) > 4
    for i in ours.grams:
        torch.testing.assert_close(ours.grams[i], theirs.grams[i], rtol=1e-5, atol=1e-6)  # float32 sums in another order
