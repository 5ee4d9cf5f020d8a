"""What the float model does on calibration data, with gradients: inputs and outputs of layers, operands of products, and the loss's slope in them.

The loss is one whose gradient is not zero.  The release takes the divergence of the quantized model from the float one; while its layers are
collected one by one none of them is quantized yet (`sequential=False`, the default), so both are the same model, the divergence is zero, and so is
its gradient but for rounding: a Hessian of noise (PTQ4ViT's issue 23).  Its softmax is over the last axis of [B, 2, H, W], the picture's width.
Here the loss is the cross-entropy of the float model's own masks (or of labels drawn from it, the empirical Fisher), over the classes, and its
gradient is compared with that noise before anything is searched.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from qcore.errors import CalibrationError
from qcore.model.attention import TAPS
from qcore.model.tap import Tap, attach, detach
from qcore.pipeline.look import FloatModel
from torch import Tensor, nn

Loss = Literal["argmax", "sampled"]
ABOVE_NOISE = 100.0  # by which the mean squared gradient must exceed that of a divergence from itself


@dataclass
class LayerRows:
    """Rows of a linear layer, T of all that went through it.

    x:    [T, K] inputs
    grad: [T, N] of the loss, in the outputs; None where gradients are not wanted
    """

    x: Tensor
    grad: Tensor | None


@dataclass
class ProductRows:
    """Operands of an attention's two products in some windows, and the slope of the loss in what comes out of each.

    q, k, v: [M, H, T, D];  p: [M, H, T, T] probabilities;  scores, outputs: gradients in q·kᵀ [M, H, T, T] and in p·v [M, H, T, D]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    scores: Tensor | None
    outputs: Tensor | None


@dataclass
class Captured:
    layers: dict[str, LayerRows] = field(default_factory=dict)
    products: dict[str, ProductRows] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    slope: float = 0.0  # mean squared gradient in the logits
    noise: float = 0.0  # that of the model's divergence from itself


def loss_of(rows: Tensor, kind: Loss, seed: int = 0) -> Tensor:
    """Σ over pixels of -log p(label), labels the float model's own.  rows: [n, classes]"""
    logs = torch.log_softmax(rows, -1)
    if kind == "argmax":
        labels = rows.detach().argmax(-1, keepdim=True)
    else:
        labels = torch.multinomial(logs.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    return -logs.gather(-1, labels).sum()


def self_divergence(rows: Tensor) -> Tensor:
    """Σ KL(p ‖ p): zero, and its gradient is rounding alone; the released loss where no layer is quantized yet."""
    logs = torch.log_softmax(rows, -1)
    target = torch.softmax(rows.detach(), -1)
    return torch.nn.functional.kl_div(logs, target, reduction="sum")


def slopes(rows: Tensor, kind: Loss, seed: int = 0) -> tuple[float, float]:
    """(mean squared gradient of the loss in these logits, that of `self_divergence`: at least that of probabilities off by one rounding)."""
    found = []
    for loss in (partial(loss_of, kind=kind, seed=seed), self_divergence):
        with torch.enable_grad():
            own = rows.detach().float().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(own), own)
        found.append(float(gradient.double().square().mean()))
    return found[0], max(found[1], torch.finfo(torch.float32).eps ** 2)


def require_slope(slope: float, noise: float, where: str = "the logits") -> None:
    """CalibrationError where a gradient is no larger than rounding makes it."""
    if not slope > ABOVE_NOISE * noise or not slope > 0:
        raise CalibrationError(
            f"the gradient in {where} is {slope:.3g} (mean square), and rounding alone makes {noise:.3g}: there is nothing to weigh errors with. "
            "Is every pixel certain to the last digit? take --set allocator.loss=sampled, or --set allocator.metric=mse"
        )


class _Look(Tap):
    """Hands what passes a tap to `see`, and passes it on."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self._see(x)
        return x


@dataclass(frozen=True)
class Sampling:
    """rows, windows: how many of each are kept of a site, over all batches; seed: which."""

    rows: int
    windows: int
    seed: int = 0

    def numbers(self, count: int, batch: int, batches: int, of: Literal["rows", "windows"]) -> Tensor:
        """Which of `count` are kept of a batch, ascending."""
        quota = -(-(self.rows if of == "rows" else self.windows) // batches)
        generator = torch.Generator().manual_seed(self.seed * 10007 + batch)
        return torch.randperm(count, generator=generator)[:quota].sort().values


def capture(
    whole: FloatModel,
    *,
    layers: Sequence[str],
    products: Mapping[str, str],
    texts: Sequence[str],
    sampling: Sampling,
    loss: Loss | None,
) -> Captured:
    """Run the float model on all calibration batches.

    layers:   paths of linear layers
    products: path of an attention → path of the layer that reads what it puts out
    texts:    paths of linear layers of the sentence encoder: their inputs, without padding
    loss:     None = no gradients
    """
    model, found = whole.skeleton.model, Captured()
    parts: dict[tuple[str, str], list[Tensor]] = {}

    def keep(path: str, name: str, value: Tensor) -> None:
        parts.setdefault((path, name), []).append(value.detach().float().clone())

    for batch in range(whole.batches):
        with ExitStack() as stack, torch.set_grad_enabled(loss is not None):
            numbers = partial(sampling.numbers, batch=batch, batches=whole.batches)
            for path in layers:
                stack.callback(model.get_submodule(path).register_forward_hook(partial(_layer, path, keep, numbers)).remove)
            for path, reader in products.items():
                _watch_products(model, path, reader, keep, numbers, stack)
            _watch_texts(model, texts, keep, numbers, stack)
            rows = whole.outputs(batch)
            if loss is not None:
                slope, noise = slopes(rows, loss, sampling.seed + batch)
                found.slope, found.noise = found.slope + slope / whole.batches, found.noise + noise / whole.batches
                loss_of(rows, loss, sampling.seed + batch).backward()
    if loss is not None:
        require_slope(found.slope, found.noise)
    joined = {key: torch.cat(values) for key, values in parts.items()}
    for path in layers:
        grad = joined.get((path, "grad"))
        _require(path, "x", joined)
        if grad is not None:
            require_slope(float(grad.double().square().mean()), 0.0, path)
        found.layers[path] = LayerRows(joined[path, "x"], grad)
    for path in products:
        _require(path, "q", joined)
        found.products[path] = _products(path, joined, model.get_submodule(path))
    for path in texts:
        _require(path, "text", joined)
        found.texts[path] = joined[path, "text"]
    return found


def _require(path: str, name: str, joined: Mapping[tuple[str, str], Tensor]) -> None:
    if (path, name) not in joined:
        raise CalibrationError(f"{path} was not reached by a forward pass of the calibration data; nothing can be searched for it")


def _layer(path: str, keep: Any, numbers: Any, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    x = args[0].reshape(-1, args[0].shape[-1])
    chosen = numbers(x.shape[0], of="rows")
    keep(path, "x", x[chosen])
    if torch.is_grad_enabled():
        if not out.requires_grad:
            out.requires_grad_(True)
        out.register_hook(lambda g: keep(path, "grad", g.reshape(-1, g.shape[-1])[chosen]))


def _watch_products(model: nn.Module, path: str, reader: str, keep: Any, numbers: Any, stack: ExitStack) -> None:
    module = model.get_submodule(path)
    chosen: list[Tensor] = []

    def see(name: str, x: Tensor) -> None:
        if name == "q":
            chosen[:] = [numbers(x.shape[0], of="windows")]
        keep(path, name, x[chosen[0]])
        if name == "p" and x.requires_grad:
            own = chosen[0]
            x.register_hook(lambda g: keep(path, "dp", g[own]))

    for name in TAPS:
        handler = _Look(partial(see, name))
        attach(module, name, handler)
        stack.callback(detach, module, name, handler)

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            own = chosen[0]
            args[0].register_hook(lambda g: keep(path, "do", g.reshape(-1, *args[0].shape[-2:])[own]))

    stack.callback(model.get_submodule(reader).register_forward_pre_hook(before).remove)


def _watch_texts(model: Any, texts: Sequence[str], keep: Any, numbers: Any, stack: ExitStack) -> None:
    if not texts:
        return
    words: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        words[:] = [kwargs["attention_mask"].reshape(-1).bool()]

    def see(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        x = x[words[0]]
        keep(path, "text", x[numbers(x.shape[0], of="rows")])

    stack.callback(model.text_encoder.register_forward_pre_hook(note, with_kwargs=True).remove)
    for path in texts:
        stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(see, path)).remove)


def _products(path: str, joined: Mapping[tuple[str, str], Tensor], module: Any) -> ProductRows:
    heads = joined[path, "p"].shape[2]
    q, k, v = (joined[path, n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("q", "k", "v"))
    p = joined[path, "p"].transpose(1, 2)
    scores = outputs = None
    if (path, "dp") in joined:
        dp = joined[path, "dp"].transpose(1, 2)
        # back through the softmax, and to the product before it is scaled
        scores = p * (dp - (dp * p).sum(-1, keepdim=True)) * (q.shape[-1] ** -0.5)
        outputs = joined[path, "do"].unflatten(-1, (heads, -1)).transpose(1, 2)
        require_slope(float(scores.double().square().mean()), 0.0, f"{path}, q·k")
        require_slope(float(outputs.double().square().mean()), 0.0, f"{path}, p·v")
    return ProductRows(q, k, v, p, scores, outputs)
