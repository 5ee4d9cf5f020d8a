"""A decoder whose linear layers are frozen and adapted, and how its numbers are read off a recipe.

A recipe of `qcore tune` is an ordinary one with three patterns of sites: "*:weight", what is stored; "*:input", the numbers of inputs, inner
activations and weights where they are multiplied; "*:grad", those of gradients.  What no rule names is float.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from qcore.errors import QcoreError, SpecError
from qcore.model.topology import Site, Topology
from qcore.recipe import Recipe
from qcore.training import group_of
from torch import Tensor, nn

from qplug_llm.gsq.layer import GSQLinear, shape_of
from qplug_llm.gsq.step import FLOAT, Dither, Numbers, SharedInputs, Tally

GRADIENT = "grad"


@dataclass
class TunedModel:
    """A model in which adapted layers stand.

    layers: by path
    left:   paths that were to have an adapter and cannot → why
    """

    model: nn.Module
    layers: dict[str, GSQLinear]
    left: dict[str, str]
    tally: Tally
    dither: Dither

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {f"{path}.{n}": getattr(layer, n) for path, layer in self.layers.items() for n in ("lora_A", "lora_B")}

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """Inside, products are of floats: what a program sees that adds the adapters to the stored weights."""
        kept = {path: layer.numbers for path, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.numbers = FLOAT
            yield
        finally:
            for path, numbers in kept.items():
                self.layers[path].numbers = numbers


def linear_sites(topology: Topology) -> tuple[dict[str, Site], dict[str, str]]:
    """(path → site of the layers that can be adapted, path → why of the others), in order of execution."""
    found: dict[str, Site] = {}
    left: dict[str, str] = {}
    for site in topology.sites:
        if site.part is not None:
            left[site.module] = "experts are frozen"
        elif site.role:
            left[site.module] = f"a {site.role} is frozen"
        elif site.tensor != "weight":
            left[site.module] = f"{site.tensor} is no weight of a layer of its own"
        else:
            found.setdefault(site.module, Site(site.module))
    return found, left


def adapt(
    model: nn.Module,
    paths: Iterable[str],
    recipe: Recipe,
    *,
    rank: int,
    alpha: float,
    seed: int = 0,
    rounding: Literal["spec", "stochastic"] = "spec",
    hold: bool = False,
) -> TunedModel:
    """Put a GSQLinear in the place of linear layers, in place; nothing but adapters asks for gradients afterwards.

    model: in memory, its weights quantized as far as they will be
    paths: of the layers, as `linear_sites` gives them for the float model's topology (a quantized layer is no site any more)
    seed:  of the adapters, and of stochastic rounding
    """
    model.requires_grad_(False)
    tally, dither = Tally(), Dither(seed)
    shared = SharedInputs(tally)
    layers: dict[str, GSQLinear] = {}
    left: dict[str, str] = {}
    for i, path in enumerate(paths):
        leaf = model.get_submodule(path)
        try:
            shape_of(leaf)
        except SpecError as e:
            left[path] = str(e)
            continue
        numbers = replace(numbers_for(recipe, Site(path)), rounding=rounding)
        layers[path] = GSQLinear(leaf, rank, alpha, numbers, seed=(seed, i), shared=shared, dither=dither, hold=hold)
    if not layers:
        raise SpecError(f"{type(model).__name__} has no linear layer that can be adapted: {'; '.join(left.values()) or 'none was named'}")
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return TunedModel(model, layers, left, tally, dither)


def numbers_for(recipe: Recipe, site: Site) -> Numbers:
    """The numbers of a layer's products, by the rules for its input and its gradient."""
    inputs, gradient = recipe.rule_for(site.input), recipe.rule_for(Site(site.module, GRADIENT))
    return Numbers(activation=None if inputs is None else inputs.spec, gradient=None if gradient is None else gradient.spec)


def weights_alone(recipe: Recipe, topology: Topology) -> Recipe | None:
    """The part of a recipe that says how weights are stored; None where it leaves them float."""
    names = [name for site in topology.sites for name in site.names]
    own = tuple(r for r in recipe.rules if any(fnmatchcase(name, r.sites) for name in names))
    return replace(recipe, rules=own) if any(r.spec is not None for r in own) else None


def recipe_problems(recipe: Recipe, topology: Topology, model: nn.Module) -> list[str]:
    """All that stands against tuning by a recipe, on meta tensors; [] where nothing does."""
    problems = []
    for what in ("transforms", "block_solver", "allocator"):
        if getattr(recipe, what):
            problems.append(f"recipe {recipe.name!r} has {what}, which `qcore tune` does not run; quantize with it first, or take a recipe without")
    sites, _ = linear_sites(topology)
    known = [*topology.sites, *(s.input for s in topology.sites), *(Site(path, GRADIENT) for path in sites)]
    for rule in recipe.unmatched(known):
        problems.append(f"the pattern {rule.sites!r} of recipe {recipe.name!r} matches nothing; have *:weight, *:input and *:{GRADIENT}")
    said: set[str] = set()
    for path, site in sites.items():
        numbers = numbers_for(recipe, site)
        for what, spec in (("input", numbers.activation), (GRADIENT, numbers.gradient)):
            try:
                if spec is not None:
                    group_of(spec, 32)
                    if spec.when != "dynamic":
                        raise SpecError('scales are computed in every pass; write when = "dynamic"')
            except QcoreError as e:
                if str(e) not in said:
                    problems.append(f"{path}:{what}: {e}")
                said.add(str(e))
        weight = recipe.rule_for(site)
        if weight is not None and weight.spec is not None:
            try:
                weight.spec.check(_shape(model, path))
            except QcoreError as e:
                problems.append(f"{path}:weight: {e}")
    return problems


def _shape(model: nn.Module, path: str) -> tuple[int, ...]:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean -log p of each token after the first of its window.  [B, T, V], [B, T] → scalar"""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
