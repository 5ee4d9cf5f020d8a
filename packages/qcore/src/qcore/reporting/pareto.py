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
    picture = Picture(760, 440, "KL divergence against size", _in_words(points, reference))
    sizes = [p[1] for p in points] or [1.0]
    kls = [p[2] for p in points if p[2] > 0] or [1.0]
    x = Axis(min(sizes) * 0.9, max(sizes) * 1.06, 88, 730)
    low, high = min(kls), max(kls)
    y = log_axis(low / 1.6, high * 1.6, 378, 44)
    picture.grid(x, y, x_format=megabytes, y_format=number, x_label="size of weights", y_label=f"KL divergence from {reference}, nats (log scale)")

    def place(point: Point) -> tuple[float, float]:
        return x(point[1]), y(point[2]) if point[2] > 0 else y.start

    front = sorted((p for p in points if p[3]), key=lambda p: (p[1], -p[2]))
    if len(front) > 1:
        picture.line([place(p) for p in front], "front")
    # names lie on no dot and on no other name
    taken = [(px - 9, px + 9, py + 4) for px, py in map(place, points)]
    for point in sorted(points, key=lambda p: (p[1], p[2])):
        px, py = place(point)
        words = f"{point[0]}: {megabytes(point[1])}, KL {number(point[2])}" + (", no other is both smaller and closer" if point[3] else "")
        picture.dot(px, py, "best" if point[3] else "other", words)
        start, ty = _free(px, py + 4, text_width(point[0]), picture.width, taken)
        taken.append((start, start + text_width(point[0]), ty))
        left = start < px  # anchored at the dot: how wide a text is drawn is a guess
        picture.text(px - 10 if left else start, ty, point[0], "end" if left else "start", "name")
    picture.dot(86, 20, "best", "no other model is both smaller and closer")
    picture.text(98, 24, "no other is both smaller and closer", kind="label")
    picture.dot(326, 20, "other", "another model is smaller, closer, or both")
    picture.text(338, 24, "beaten by another", kind="label")
    return picture.file()


def _free(x: float, y: float, width: float, room: float, taken: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Where a name of this width may begin: right or left of its dot at x, else as near above or below as nothing is in the way."""
    for line in (0, -14, 14, -28, 28, -42, 42):
        for start in (x + 10, x - 10 - width):
            clear = all(abs(y + line - other) >= 13 or start >= stop or start + width <= begin for begin, stop, other in taken)
            if clear and start >= 4 and start + width <= room - 4:
                return start, y + line
    return min(x + 10, room - width - 4), y


def _in_words(points: Sequence[Point], reference: str) -> str:
    said = [f"{name}: {megabytes(size)}, KL {number(kl)}{', on the front' if best else ''}" for name, size, kl, best in points]
    return f"Each point is a model: size of its weights, and KL divergence from {reference}. " + "; ".join(said)
