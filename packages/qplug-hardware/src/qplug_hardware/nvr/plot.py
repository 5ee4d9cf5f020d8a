"""Speedup against depth, as an SVG picture that needs nothing else."""

from collections.abc import Mapping, Sequence

from qcore.reporting.svg import Axis, Picture, log_axis, number, text_width

_DOTS = {"nvr": "best", "nvr-nsb": "after", "imp": "other", "dvr": "before"}


def depth_plot(depths: Sequence[int], curves: Mapping[str, Sequence[float]], flat: Mapping[str, float], what: str) -> str:
    """A standalone SVG file.

    curves: speedup of each model at each depth (depths above 0, rising);  flat: of models that have no depth, drawn as dashed lines
    """
    said = "; ".join(f"{m}: " + ", ".join(f"{number(v)} at {d}" for d, v in zip(depths, c, strict=True)) for m, c in curves.items())
    said += "".join(f"; {m}: {number(v)}" for m, v in flat.items())
    names = [*curves, *flat]
    right = 40 + max(text_width(n) for n in names)
    picture = Picture(760, 440, f"Speedup against depth of the runahead, {what}", said)
    x = log_axis(depths[0], depths[-1], 70, 760 - right) if len(depths) > 1 else Axis(depths[0] - 1, depths[0] + 1, 70, 760 - right)
    top = max([*(v for c in curves.values() for v in c), *flat.values(), 1.0])
    y = Axis(0, 1.08 * top, 385, 30)
    for value in y.ticks():
        picture.line([(x.start, y(value)), (x.stop, y(value))], "gridline")
        picture.text(x.start - 6, y(value) + 4, number(value), "end")
    for depth in depths:
        picture.line([(x(depth), y.start), (x(depth), y.stop)], "gridline")
        picture.text(x(depth), y.start + 16, str(depth), "middle")
    picture.text((x.start + x.stop) / 2, y.start + 38, "depth, elements (logarithmic)", "middle", "label")
    picture.text(16, (y.start + y.stop) / 2, f"speedup over no prefetching, {what}", "middle", "label", turned=True)
    ends: list[tuple[float, str]] = []
    for name, value in flat.items():
        picture.line([(x.start, y(value)), (x.stop, y(value))], "front")
        ends.append((y(value), name))
    for name, values in curves.items():
        picture.line([(x(d), y(v)) for d, v in zip(depths, values, strict=True)], "trace")
        for d, v in zip(depths, values, strict=True):
            picture.dot(x(d), y(v), _DOTS.get(name, "other"), f"{name}, depth {d}: {number(v)}")
        ends.append((y(values[-1]), name))
    at = y.start + 8
    for height, name in sorted(ends, reverse=True):
        at = min(height + 4, at - 14)  # names stand above one another where lines end close together
        picture.text(x.stop + 12, at, name, kind="name")
    return picture.file()
