"""Is the fused network the same function, and which branch made its weights hard to quantize?

For every block: how far the fused convolution's output is from that of its branches, on the inputs that the network itself gives it, in float64; how
large the largest weight of each branch is once its batch norm is folded in; and the *blow-up*, the largest fused weight over the largest fused
weight outside the middle tap of the same output channel (its median over channels).  A scale that must hold the middle leaves the ring 127 / blow-up
steps of an 8-bit grid.  The *culprit* is the branch that adds most to the largest fused weight.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import log10
from typing import Any

import torch
from qcore.model.reader import DictReader, TensorReader
from torch import Tensor, nn

from qplug_reparam.branches import Branches
from qplug_reparam.fuse import fold, fuse

# of the largest output: float64 sums in another order, over at most some ten thousand products
EXACT = 1e-10
_COLOURS = ("#3b6fb6", "#d0642b", "#3f8f4f", "#8a5ab0", "#9c7a2a", "#c14a78")


@dataclass(frozen=True)
class BlockReport:
    """One block of branches.

    module:     its path
    largest:    branch → the largest magnitude of its weights, batch norm folded in
    fused:      the largest magnitude of the fused weights;  ring: the median over channels of that outside the middle tap (of all, for one tap)
    blow_up:    the median over channels of the largest fused weight over the largest in the ring; 1 for kernels of one tap
    culprit:    the branch that adds most to the largest fused weight
    difference: of the outputs, relative to the largest one, in float64; None where no images were run
    silent:     batch norm → channels whose running variance is zero
    """

    module: str
    largest: dict[str, float]
    fused: float
    ring: float
    blow_up: float
    culprit: str
    difference: float | None
    silent: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report_blocks(blocks: Sequence[Branches], reader: TensorReader, differences: dict[str, float] | None = None) -> list[BlockReport]:
    """One report for each block of branches, in the order in which they were found.

    reader:      the weights with branches
    differences: as `block_differences` measures them
    """
    return [_report(b, reader, (differences or {}).get(b.module)) for b in blocks if b.branched]


def _report(block: Branches, reader: TensorReader, difference: float | None) -> BlockReport:
    folded = fold(block, reader)
    kernel = folded.kernel
    at = kernel.abs().flatten().argmax()
    culprit = max(folded.kernels, key=lambda name: float(folded.kernels[name].flatten()[at] * kernel.flatten()[at].sign()))
    rows = kernel.abs().flatten(1)
    height, width = kernel.shape[2:]
    if height * width > 1:
        ring = kernel.abs().clone()
        ring[:, :, height // 2, width // 2] = 0
        around = ring.flatten(1).amax(1)
    else:
        around = rows.amax(1)
    alive = around > 0
    blow_up = float((rows.amax(1)[alive] / around[alive]).median()) if bool(alive.any()) else float("inf")
    return BlockReport(
        module=block.module,
        largest={name: float(k.abs().max()) for name, k in folded.kernels.items()},
        fused=float(rows.max()),
        ring=float(around.median()),
        blow_up=blow_up,
        culprit=culprit,
        difference=difference,
        silent=dict(folded.silent),
    )


@torch.no_grad()
def block_differences(model: nn.Module, images: Tensor, blocks: Sequence[Branches]) -> dict[str, float]:
    """Block → largest difference of its output with and without branches, over its largest output; in float64, on what the network feeds it.

    model:  with branches, in eval mode; it is changed to float64 in place
    images: [B, C, H, W]
    """
    model.double()
    fused = fuse(model)
    inside = {b.module for b in blocks if b.branched}
    found: dict[str, float] = {}

    def compare(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # an activation in place would change what the other reads
            other = fused.get_submodule(path)(*(a.clone() for a in args))
            scale = max(float(output.abs().max()), 1e-300)
            found[path] = float((other - output).abs().max()) / scale

        return hook

    handles = [model.get_submodule(path).register_forward_hook(compare(path)) for path in inside]
    try:
        model(images.double())
    finally:
        for handle in handles:
            handle.remove()
    return found


def report_model(model: nn.Module, images: Tensor | None = None) -> list[BlockReport]:
    """`report_blocks` for a model in memory, in eval mode, with its branches.  images: None = no outputs are compared"""
    from qplug_reparam.branches import find_branches

    blocks = find_branches(model)
    differences = None if images is None else block_differences(model, images, blocks)
    return report_blocks(blocks, DictReader({name: t.detach() for name, t in model.state_dict().items()}), differences)


def lines(reports: Sequence[BlockReport]) -> list[str]:
    """A table in Markdown, and what to look at first."""
    out = [
        "| block | largest weight of each branch | fused | ring | blow-up | by | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        branches = ", ".join(f"{name} {value:.3g}" for name, value in r.largest.items())
        difference = "–" if r.difference is None else f"{r.difference:.0e}"
        out.append(f"| {r.module} | {branches} | {r.fused:.3g} | {r.ring:.3g} | {r.blow_up:.1f} | {r.culprit} | {difference} |")
    if not reports:
        return ["no block of branches was found"]
    worst = max(reports, key=lambda r: r.blow_up)
    out.append("")
    out.append(
        f"largest blow-up: {worst.module}, {worst.blow_up:.1f} times its ring, by {worst.culprit}: one 8-bit scale for the channel leaves the ring "
        f"{127 / worst.blow_up:.0f} steps on each side of zero"
    )
    for r in reports:
        for norm, channels in r.silent.items():
            out.append(f"{norm}: {len(channels)} channels have a running variance of 0 (channel {channels[0]} first): their gain is γ / √ε")
    apart = [r for r in reports if r.difference is not None and r.difference > EXACT]
    out += [f"{r.module}: outputs differ by {r.difference:.1e} of the largest, more than rounding in float64; this is a defect" for r in apart]
    return out


def picture(reports: Sequence[BlockReport], title: str) -> str:
    """An SVG: for each block the largest weight of every branch, of the fused kernel, and of its ring, on a logarithmic scale."""
    left, width, row, top = 190, 620, 24, 56
    values = [v for r in reports for v in (*r.largest.values(), r.fused, r.ring) if v > 0] or [1.0]
    low, high = log10(min(values)) - 0.1, log10(max(values)) + 0.1
    names = list(dict.fromkeys(name for r in reports for name in r.largest))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}

    def x(value: float) -> float:
        return left + width * (log10(max(value, 10**low)) - low) / (high - low)

    height = top + row * len(reports) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {height}" font-family="sans-serif" font-size="11" role="img">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="13">{escape(title)}</text>',
    ]
    legend = [(name, colour[name], "circle") for name in names] + [("fused", "#111111", "bar"), ("fused, without the middle", "#999999", "bar")]
    at = 8.0
    for name, own, kind in legend:
        parts.append(_mark(at + 4, 32, own, kind) + f'<text x="{at + 12:.0f}" y="36">{escape(name)}</text>')
        at += 26 + 6.2 * len(name)
    for i, r in enumerate(reports):
        y = top + row * i + row / 2
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(r.module or "the model")}</text>')
        parts.append(f'<line x1="{x(r.ring):.1f}" x2="{x(r.fused):.1f}" y1="{y}" y2="{y}" stroke="#dddddd" stroke-width="6"/>')
        parts += [_mark(x(r.ring), y, "#999999", "bar"), _mark(x(r.fused), y, "#111111", "bar")]
        parts += [_mark(x(value), y, colour[name], "circle") for name, value in r.largest.items() if value > 0]
        parts.append(f'<text x="{left + width + 8}" y="{y + 4}">× {r.blow_up:.1f}</text>')
    for tick in range(int(low) - 1, int(high) + 2):
        if low <= tick <= high:
            parts.append(f'<text x="{x(10.0**tick):.1f}" y="{height - 22}" text-anchor="middle" fill="#555555">{10.0**tick:g}</text>')
    parts.append(
        f'<text x="{left}" y="{height - 6}" fill="#555555">largest magnitude of weights; × blow-up over the ring, median of channels</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _mark(x: float, y: float, colour: str, kind: str) -> str:
    if kind == "bar":
        return f'<rect x="{x - 1.5:.1f}" y="{y - 8:.1f}" width="3" height="16" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" fill-opacity="0.85"/>'
