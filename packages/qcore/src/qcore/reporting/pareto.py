"""KL divergence against size, as an SVG picture that needs nothing else."""

from collections.abc import Sequence

from qcore.evaluation.report import megabytes
from qcore.reporting.svg import Axis, Picture, log_axis, number, text_width

Point = tuple[str, float, float, bool]


def pareto_plot(points: Sequence[Point], reference: str) -> str:
    """A standalone SVG file.

    points: (name, bytes, KL divergence, whether no other one is both smaller and closer); those of the front are joined by a line
    reference: what the divergence is measured from
    """
    picture = Picture(760, 420, "KL divergence against size", _in_words(points, reference))
    sizes = [p[1] for p in points] or [1.0]
    kls = [p[2] for p in points if p[2] > 0] or [1.0]
    x = Axis(min(sizes) * 0.9, max(sizes) * 1.06, 76, 730)
    low, high = min(kls), max(kls)
    y = log_axis(low / 1.6, high * 1.6, 358, 24)
    picture.grid(x, y, x_format=megabytes, y_format=number, x_label="size of weights", y_label=f"KL divergence from {reference}, nats (log scale)")

    def place(point: Point) -> tuple[float, float]:
        return x(point[1]), y(point[2]) if point[2] > 0 else y.start

    front = sorted((p for p in points if p[3]), key=lambda p: (p[1], -p[2]))
    if len(front) > 1:
        picture.line([place(p) for p in front], "front")
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], p[2])):
        px, py = place(point)
        words = f"{point[0]}: {megabytes(point[1])}, KL {number(point[2])}" + (", no other is both smaller and closer" if point[3] else "")
        picture.dot(px, py, "best" if point[3] else "other", words)
        width = text_width(point[0])
        left = px + 10 + width > 736
        ty = py + 4
        while any(abs(ty - oy) < 13 and start < px + 10 + width and px - width - 10 < stop for start, stop, oy in taken):
            ty += 13
        start = px - 10 - width if left else px + 10
        taken.append((start, start + width, ty))
        picture.text(px - 10 if left else px + 10, ty, point[0], "end" if left else "start", "name")
    return picture.file()


def _in_words(points: Sequence[Point], reference: str) -> str:
    said = [f"{name}: {megabytes(size)}, KL {number(kl)}{', on the front' if best else ''}" for name, size, kl, best in points]
    return f"Each point is a model: size of its weights, and KL divergence from {reference}. " + "; ".join(said)
