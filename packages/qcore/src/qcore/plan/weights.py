"""One weight of a plan: what is stored, by which packing, run by which kernel."""

from functools import partial
from math import prod
from typing import Any

from torch import nn

from qcore.errors import NotFound, QcoreError
from qcore.model.topology import Site
from qcore.modules.conv import QuantizedConv
from qcore.numbers import QuantSpec
from qcore.numbers.granularity import Shape
from qcore.ops.conv import ConvJob
from qcore.ops.kernel import Choice, Job, choose
from qcore.packing import first_that_accepts
from qcore.plan.case import Case
from qcore.plan.plan import Decision
from qcore.plan.sizes import matrix_shape


def decide(case: Case, site: Site) -> Decision | None:
    spec, activation = case.specs[site], case.specs.get(site.input)
    try:
        module = case.model.get_submodule(site.module)
        shape = matrix_shape(module, site)
    except (AttributeError, QcoreError) as e:
        case.problems.append(f"{site}: {e}")
        return None
    try:
        spec.check(shape)
    except QcoreError as e:
        case.refuse(site, str(e))
        return None
    if activation is not None and (isinstance(module, nn.Linear) or site.part is not None):
        try:
            activation.check((1, shape[1]))
        except QcoreError as e:
            case.refuse(site.input, str(e))
            return None
    if case.recipe.block_solver is not None and (why := case.recipe.block_solver.refuses(spec)):
        case.refuse(site, f"{why}; leave out `block_solver`, or store integers")
    packing = _packing(case, site, spec, shape, activation)
    if packing is None:
        return None
    choice = _kernel(case, module, site, packing, spec, shape, activation)
    return Decision(
        site=str(site),
        shape=shape,
        spec=str(spec),
        solver=case.solver(site).name,
        packing=packing.name,
        kernel=choice.kernel.name if choice else "–",
        refused=choice.refused if choice else (),
        activation=None if activation is None else str(activation),
        bytes_before=prod(shape) * case.itemsize,
        bytes_after=case.packed_bytes(packing, spec, shape),
    )


def _packing(case: Case, site: Site, spec: QuantSpec, shape: Shape, activation: QuantSpec | None) -> Any:
    rule = case.recipe.rule_for(site)
    name = rule.packing if rule else None
    try:
        if name is not None and (why := case.packings[name].refuses(spec, shape)):
            case.refuse(site, f"packing {name!r} refuses {spec}: {why}; leave `packing` out, and one that accepts is chosen")
            return None
        return case.packings[name] if name is not None else first_that_accepts(case.packings.values(), spec, shape, activation)
    except KeyError:
        case.refuse(site, f"there is no packing {name!r}; have: {', '.join(case.packings)}")
    except QcoreError as e:
        case.refuse(site, str(e))
    return None


def _kernel(case: Case, module: nn.Module, site: Site, packing: Any, spec: QuantSpec, shape: Shape, activation: QuantSpec | None) -> Choice | None:
    """The kernel expected to run it; None where it is neither a linear layer nor a convolution: its op is known when it is replaced."""
    conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not isinstance(module, nn.Linear) and site.part is None and not conv:
        return None
    try:
        about = (packing.name, spec, shape, activation, case.device, case.loaded.dtype, partial(packing.unpack, spec=spec, shape=shape))
        return choose(case.kernels, ConvJob("conv", *about, QuantizedConv.geometry_of(module)) if conv else Job("linear", *about))
    except NotFound as e:
        case.refuse(site, str(e))
        return None
