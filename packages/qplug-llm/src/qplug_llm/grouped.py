"""All experts of a mixture in one launch: the experts function "qcore-grouped", for those who ask for it.

The function "qcore" (experts.py) gathers the rows of one expert after the other and calls that expert's kernel: two launches for each expert that was
chosen, and the host waits for the device to learn how many rows each has.  This one sorts the rows by expert and launches qkernels' `grouped_linear`
once for each of the two matrices; the device counts, the host waits for nothing.

It sets nothing by itself.  `use_grouped(model)` binds the leaves of every stack that can be grouped to kernels that share their words
(qcore/ops/grouped_linear.py), and says of every other why not.  What it leaves out: activations that are quantized, stacks whose experts differ
(their formats, float ones among them), rotations before an expert.  Where somebody looks at the inputs of single experts (a handler at a tap, a hook
on a leaf), or a gradient is wanted, it runs `experts_forward`.

It has never run on a GPU, and nothing is known of its speed.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from qcore.errors import NotFound, SpecError
from qcore.modules.linear import QuantizedLinear
from qcore.ops.grouped_linear import GROUPED_KERNELS, GroupedParts, TritonGroupedLinear
from qcore.ops.kernel import Job
from torch import Tensor, nn

from qplug_llm.experts import DOWN, ExpertStack, can_be_set, experts_forward, stacks, up_name

NAME = "qcore-grouped"
log = logging.getLogger("qplug_llm.grouped")


@dataclass(frozen=True)
class Grouping:
    """What became of one mixture.

    path:    of the experts module
    refused: why its experts run one after the other; None = one launch for all
    bytes:   of words, scales and shifts, which the launch reads beside what the checkpoint keeps.  On a GPU the kernels of single experts
             (`triton-weight-linear`) hold as many without it, and read these then
    """

    path: str
    refused: str | None = None
    bytes: int = 0


def use_grouped(model: nn.Module, kernel: str = TritonGroupedLinear.name) -> tuple[Grouping, ...]:
    """Run the experts of `model` in one launch for all, in place, wherever that computes the same; says of every mixture whether it does or why not.

    To be called when the model is where it will run, in its dtype.  Nothing that a checkpoint keeps changes.  The way back is
    `model.set_experts_implementation("qcore")`.

    kernel: "triton-grouped-linear", on a GPU; "reference-grouped-linear" is what it means, in torch, for tests without one

    SpecError where the model has no experts behind transformers' ExpertsInterface; NotFound for another kernel.
    """
    kinds = {k.name: k for k in GROUPED_KERNELS}
    if kernel not in kinds:
        raise NotFound(f"no kernel {kernel!r} runs the experts of a mixture at once; have: {', '.join(kinds)}")
    if not can_be_set(model):
        raise SpecError(f"{type(model).__name__} has no experts behind transformers' ExpertsInterface; there is nothing to group")
    found = [_group(path, module, kinds[kernel]) for path, module in stacks(model).items()]
    if any(g.refused is None for g in found):
        register()
        model.set_experts_implementation(NAME)  # type: ignore[operator]
    return tuple(found)


def register() -> None:
    """Make "qcore-grouped" a name that `set_experts_implementation` knows; safe to call again."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, grouped_forward)


def _matrices(module: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, getattr(module, name)) for name in (up_name(module), DOWN))


def _leaves(stack: ExpertStack) -> Iterator[Any]:
    return (stack.leaf(expert) for expert in range(len(stack)))


def _group(path: str, module: Any, kernel: type[TritonGroupedLinear]) -> Grouping:
    if (reason := refusal(module, kernel)) is not None:
        return Grouping(path, reason)
    size = 0
    for _, stack in _matrices(module):
        parts = GroupedParts(len(stack))
        for expert, leaf in enumerate(_leaves(stack)):
            others = (k for k in leaf._kernels if not isinstance(k, TritonGroupedLinear))
            leaf.bind((kernel(parts, expert), *others), wish=kernel.name)
        size += parts.nbytes
    return Grouping(path, None, size)


# what is refused ----------------------------------------------------------------------------------------------------------------------------------


def refusal(module: Any, kernel: type[TritonGroupedLinear] = TritonGroupedLinear) -> str | None:
    """Why the experts of `module` cannot run in one launch, or None when they can; changes nothing."""
    if (watched := _watched(module)) is not None:
        return watched
    for name, stack in _matrices(module):
        if not isinstance(stack, ExpertStack):
            return f"{name} is float; quantize it first"
        if (reason := _refuses_stack(stack, kernel)) is not None:
            return f"{name}: {reason}"
    return None


def _refuses_stack(stack: ExpertStack, kernel: type[TritonGroupedLinear]) -> str | None:
    first: Job | None = None
    for expert, leaf in enumerate(_leaves(stack)):
        if type(leaf) is not QuantizedLinear:
            what = "float" if type(leaf) is nn.Linear else f"a {type(leaf).__name__}"
            return f"expert {expert} is {what}; one launch takes quantized matrices alone"
        if leaf.online is not None:
            return f"a {type(leaf.online).__name__} stands before expert {expert}; the launch reads the inputs as they come"
        if leaf.bias is not None:
            return f"expert {expert} has a bias of its own, which the launch does not add"
        job = leaf._job
        first = job if first is None else first
        if (job.weight, job.shape, job.activation) != (first.weight, first.shape, first.activation):
            return f"expert {expert} is {_said(job)}, expert 0 is {_said(first)}; one launch takes one of them"
        if job.device != first.device or job.dtype != first.dtype:
            return f"expert {expert} runs in {job.dtype} on {job.device}, expert 0 in {first.dtype} on {first.device}"
    assert first is not None
    # its parts are asked for nothing: a refusal is about the job alone
    return kernel(GroupedParts(len(stack)), 0).refuses(first)


def _said(job: Job) -> str:
    return f"{job.weight} {list(job.shape)}" + ("" if job.activation is None else f" with inputs {job.activation}")


def _watched(module: Any) -> str | None:
    """Who has to see the inputs of single experts: a handler at a tap (an observer, a quantizer), a hook on a leaf."""
    taps = module._modules.get("taps")
    if taps:
        return f"handlers are attached at its taps ({next(iter(taps)).replace('/', '.')} …), which see the rows of one expert"
    for name, stack in _matrices(module):
        if isinstance(stack, ExpertStack):
            for expert, leaf in stack._modules.items():
                if leaf is not None and (leaf._forward_hooks or leaf._forward_pre_hooks):
                    return f"{name}: a hook is registered on expert {expert}, which sees the rows of one expert"
    return None


# running them -------------------------------------------------------------------------------------------------------------------------------------


def grouped_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `experts_forward`, with one launch for each of the two matrices; that itself where `use_grouped` refused the stack or somebody looks inside.

    Sums over the experts of a token are in the dtype of the products and are rounded to the input's once.
    """
    up, down = (_bound(stack) for _, stack in _matrices(module))
    if up is None or down is None or _by_expert(module, hidden_states):
        return experts_forward(module, hidden_states, top_k_index, top_k_weights)
    experts, (tokens, k) = module.num_experts, top_k_index.shape
    # where the rows of an expert end is found on the device: bincount would wait for it
    chosen, order = top_k_index.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(experts, dtype=chosen.dtype, device=chosen.device), right=True, out_int32=True)
    expert = chosen.clamp(max=experts - 1)
    h = _project(module, up_name(module), up, hidden_states[order // k], ends, expert)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = _project(module, DOWN, down, h, ends, expert)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order].unsqueeze(1)
    # what a bias and a weight made of the rows of no expert
    y = y.masked_fill((chosen >= experts).unsqueeze(1), 0)
    # back to the order of the tokens, and a sum of a fixed order: adding by index has none on a GPU
    y = torch.empty_like(y).index_copy_(0, order, y)
    return y.view(tokens, k, y.shape[1]).sum(1).to(hidden_states.dtype)


def _bound(stack: Any) -> QuantizedLinear | None:
    """The first leaf of a stack whose leaves all run from the same grouped parts; None where one does not."""
    if not isinstance(stack, ExpertStack):
        return None
    parts = _parts(stack.leaf(0))
    if not isinstance(parts, GroupedParts) or not parts.complete:
        return None
    # by identity: this is looked at in every call, and a model may have 256 experts a layer
    return stack.leaf(0) if all(_parts(leaf) is parts for leaf in stack._modules.values()) else None  # type: ignore[return-value]


def _parts(leaf: Any) -> GroupedParts | None:
    return getattr(leaf.explain().kernel, "parts", None) if type(leaf) is QuantizedLinear else None


def _by_expert(module: Any, x: Tensor) -> bool:
    """Whether this call has to go expert by expert, though the stacks are grouped."""
    if x.device.type == "meta" or (x.requires_grad and torch.is_grad_enabled()) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    reason = _watched(module)
    if reason is not None:
        _say_once(reason)
    return reason is not None


@cache
def _say_once(reason: str) -> None:
    log.warning("experts run one after the other, not in one launch: %s", reason)


def _project(module: Any, name: str, leaf: QuantizedLinear, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """expert: [T] of each row, for its bias"""
    kernel = leaf.explain().kernel
    assert isinstance(kernel, TritonGroupedLinear)
    y = kernel.of_all(x, ends, leaf._job)
    return y + getattr(module, f"{name}_bias")[expert].to(y.dtype) if module.has_bias else y
