"""The pictures of a report, each from its part of `report.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcore.evaluation.kinds import split_site
from qcore.evaluation.report import megabytes
from qcore.reporting.svg import Axis, Picture, log_axis, number, power, text_width

_WIDTH = 1000.0


def costs(modules: Sequence[Mapping[str, Any]], whole: float) -> str:
    """Bars of what the costliest modules save when they are float."""
    left = 16 + max(text_width(m["module"]) for m in modules)
    saved = [m["saved"] for m in modules]
    words = "; ".join(f"{m['module']}: {number(m['saved'])}" for m in modules)
    picture = Picture(
        max(_WIDTH, left + 400), 26 * len(modules) + 12, f"The {len(modules)} modules that cost most", f"KL divergence saved if float: {words}"
    )
    x = Axis(min(0.0, *saved), max(0.0, *saved) or 1.0, left, picture.width - 130)
    for i, module in enumerate(modules):
        y, own = 6 + 26 * i, module["saved"]
        start, stop = sorted((x(0), x(own)))
        share = f" ({own / whole:+.1%})" if whole else ""
        picture.text(left - 8, y + 15, module["module"], "end", "name")
        picture.rect(
            start,
            y,
            stop - start,
            20,
            "bar" if own >= 0 else "bar-bad",
            f"{module['module']} saves {number(own)}{share}; {number(module['kl'])} is left",
        )
        picture.text(stop + 6, y + 15, number(own) + share)
    return picture.element()


def _layers(sites: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], list[Mapping[str, Any]]]]:
    """(layers, kinds, rows by layer and kind), in the order of the model."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sites:
        layer, _, kind = split_site(row["site"])
        cells.setdefault((layer, kind), []).append(row)
    return list(dict.fromkeys(k[0] for k in cells)), list(dict.fromkeys(k[1] for k in cells)), cells


def _name(layer: str) -> str:
    return layer.rpartition(".")[2] or "–"


def error_map(sites: Sequence[Mapping[str, Any]]) -> str:
    """One row for each kind, one column for each layer: the mean error of what lies there, stronger where it is larger."""
    layers, kinds, cells = _layers(sites)
    errors = {key: sum(r["error"] or 0.0 for r in rows) / len(rows) for key, rows in cells.items()}
    known = [e for e in errors.values() if e > 0]
    left = 16 + max(text_width(k) for k in kinds)
    size = min(40.0, max(9.0, (_WIDTH - left - 90) / len(layers)))
    high = 26.0 if size >= 20 else 22.0
    width, bottom = left + size * len(layers) + 90, 26 + high * len(kinds)
    worst = max(errors, key=lambda key: errors[key])
    words = "; ".join(f"{kind}: {number(_mean(errors[key] for key in errors if key[1] == kind))} on average" for kind in kinds)
    picture = Picture(max(width, 420), bottom + 44, "Error by layer and kind", f"Largest {number(errors[worst])} at {worst[0]} {worst[1]}. {words}")
    depth = log_axis(min(known), max(known), 0.08, 1.0) if known else None
    every = max(1, math.ceil(24 / size))
    for j, layer in enumerate(layers):
        if j % every == 0:
            picture.text(left + size * (j + 0.5), 16, _name(layer), "middle")
    picture.text(left + size * len(layers) + 82, 16, "mean", "end")
    for i, kind in enumerate(kinds):
        y = 24 + high * i
        picture.text(left - 8, y + high / 2 + 4, kind, "end", "name")
        for j, layer in enumerate(layers):
            error = errors.get((layer, kind))
            if error is None:
                picture.rect(left + size * j + 0.5, y + 0.5, size - 2, high - 3, "none")
                continue
            said = f"{layer or 'outside of layers'} {kind}: {number(error)}"
            picture.rect(left + size * j, y, size - 1, high - 2, "heat", said, depth(error) if depth and error > 0 else 0.04)
        picture.text(left + size * len(layers) + 82, y + high / 2 + 4, number(_mean(e for (_, k), e in errors.items() if k == kind)), "end")
    if depth:
        _legend(picture, left, bottom + 16, number(depth.low), number(depth.high))
    return picture.element()


def _mean(values: Any) -> float:
    own = list(values)
    return sum(own) / len(own) if own else 0.0


def _legend(picture: Picture, x: float, y: float, low: str, high: str) -> None:
    steps = 12
    start = x + text_width(low, 11) + 8
    picture.text(x, y + 11, low)
    for i in range(steps):
        picture.rect(start + 12 * i, y, 12, 14, "heat", opacity=0.08 + 0.92 * i / (steps - 1))
    picture.text(start + 12 * steps + 8, y + 11, high)


def bits_by_layer(sites: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each layer: packed bits over values."""
    if not sites:
        return ""
    packed: dict[str, list[int]] = {}
    for row in sites:
        own = packed.setdefault(split_site(row["site"])[0], [0, 0])
        own[0] += 8 * row["bytes"]
        own[1] += row["values"]
    bits = {layer: total / values for layer, (total, values) in packed.items()}
    top = max(bits.values())
    size = min(40.0, max(9.0, (_WIDTH - 80) / len(bits)))
    picture = Picture(
        max(70 + size * len(bits), 320),
        180,
        "Bits by layer",
        f"From {min(bits.values()):.2f} to {top:.2f} effective bits of a weight in {len(bits)} layers",
    )
    y = Axis(0, top * 1.15, 150, 10)
    for value in y.ticks(5):
        picture.line([(44, y(value)), (picture.width - 10, y(value))], "gridline")
        picture.text(38, y(value) + 4, f"{value:g}", "end")
    every = max(1, math.ceil(24 / size))
    for j, (layer, value) in enumerate(bits.items()):
        picture.rect(50 + size * j, y(value), size - 2, 150 - y(value), "bar", f"{layer or 'outside of layers'}: {value:.2f} bits")
        if j % every == 0:
            picture.text(50 + size * (j + 0.5) - 1, 168, _name(layer), "middle")
        if size >= 34:
            picture.text(50 + size * (j + 0.5) - 1, y(value) - 5, f"{value:.2f}", "middle")
    return picture.element()


def histograms(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(picture, caption) for the weights and for the inputs of every kind that was looked at."""
    drawn = []
    for kind, own in data.items():
        for what, called in (("weight", "weights"), ("input", "inputs")):
            before, after = own.get(f"{what}_before"), own.get(f"{what}_after")
            if (before and before["counts"]) or (after and after["counts"]):
                drawn.append((_histogram(f"{called} of {kind}", before, after), f"{called} of {kind}: " + _largest(before, after)))
    return drawn


def _largest(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    parts = []
    for name, own in (("before", before), ("after", after)):
        if own:
            total = own["zeros"] + sum(own["counts"])
            zeros = f", {own['zeros'] / total:.1%} zeros" if total and own["zeros"] / total > 0.0005 else ""
            parts.append(f"{name} at most {number(own['largest'])}{zeros}")
    return "; ".join(parts)


def _histogram(title: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    known = [h for h in (before, after) if h and h["counts"]]
    low = min(_low(h) for h in known)
    high = max(h["start"] + h["step"] * len(h["counts"]) for h in known)
    picture = Picture(460, 190, title, _largest(before, after))
    x = Axis(low, max(high, low + 1), 44, picture.width - 8)
    y = log_axis(1e-6, 1.0, 160, 8)
    for tens in (0, -2, -4, -6):
        picture.line([(44, y(10.0**tens)), (picture.width - 8, y(10.0**tens))], "gridline")
        picture.text(38, y(10.0**tens) + 4, "1" if tens == 0 else power(10, tens), "end")
    every = max(1, math.ceil((high - low) / 8))
    for exponent in range(math.ceil(low / every) * every, math.floor(high) + 1, every):
        picture.text(x(exponent), 178, f"{2.0**exponent:g}" if -3 <= exponent <= 10 else power(2, exponent), "middle")
    for own, kind in ((before, "before"), (after, "after")):
        if not own or not own["counts"]:
            continue
        total = own["zeros"] + sum(own["counts"])
        points = [(x(max(own["start"], low)), y.start)]
        for i, count in enumerate(own["counts"]):
            start = own["start"] + own["step"] * i
            if start + own["step"] <= low:
                continue
            share = count / total
            top = y(share) if share > y.low else y.start
            points += [(x(max(start, low)), top), (x(start + own["step"]), top)]
        points.append((points[-1][0], y.start))
        if kind == "before":
            picture.area(points, "hist-before")
        else:
            picture.line(points, "hist-after")
        if own["largest"]:
            picture.dot(x(math.log2(own["largest"])), y.start, kind, f"largest {kind}: {number(own['largest'])}")
    return picture.element()


def _low(histogram: Mapping[str, Any]) -> float:
    """Where its figure begins: below lies less than a millionth of the values."""
    total, below = histogram["zeros"] + sum(histogram["counts"]), 0
    for i, count in enumerate(histogram["counts"]):
        below += count
        if below > 1e-4 * total:
            return float(histogram["start"] + histogram["step"] * i)
    return float(histogram["start"])


def coverage(ledger: Mapping[str, Any]) -> str:
    """A row for each stack of experts, a column for each expert: how many rows it saw, as a share of what even routing would give."""
    stacks = {module: next(iter(own.values())) for module, own in ledger["stacks"].items()}
    most = max(len(own["rows"]) for own in stacks.values())
    left = 16 + max(text_width(name) for name in stacks)
    size = min(34.0, max(5.0, (_WIDTH - left - 20) / most))
    short = {m: [i for i, n in enumerate(own["rows"]) if n < ledger["minimum"]] for m, own in stacks.items()}
    words = "; ".join(f"{m}: {min(own['rows'])} to {max(own['rows'])} rows, {len(short[m])} too few" for m, own in stacks.items())
    picture = Picture(max(left + size * most + 20, 420), 30 + 24 * len(stacks) + 40, "Rows that each expert saw", words)
    largest = max(max(own["rows"], default=0) for own in stacks.values()) or 1
    every = max(1, math.ceil(24 / size))
    for j in range(0, most, every):
        picture.text(left + size * (j + 0.5), 16, str(j), "middle")
    for i, (module, own) in enumerate(stacks.items()):
        y = 24 + 24 * i
        picture.text(left - 8, y + 15, module, "end", "name")
        for j, n in enumerate(own["rows"]):
            if n < ledger["minimum"]:
                picture.rect(left + size * j, y, size - 1, 20, "bar-bad", f"{module} expert {j}: {n} rows, too few")
            else:
                picture.rect(left + size * j, y, size - 1, 20, "heat", f"{module} expert {j}: {n} rows", 0.08 + 0.92 * n / largest)
    _legend(picture, left, 30 + 24 * len(stacks) + 12, "0", f"{largest} rows")
    return picture.element()


def timeline(memory: Mapping[str, Any]) -> str:
    """Memory over the seconds of the run, above the steps that were going on."""
    points, spans = memory.get("timeline") or [], memory.get("spans") or []
    if len(points) < 2:
        return ""
    last = max(points[-1][0], *(stop for _, _, stop in spans)) if spans else points[-1][0]
    top = max(n for _, n in points)
    said = "; ".join(f"{name} from {number(start)} to {number(stop)} s" for name, start, stop in spans)
    picture = Picture(_WIDTH, 250, "Memory over the run", f"At most {megabytes(top)} after {number(max(points, key=lambda p: p[1])[0])} s. {said}")
    x, y = Axis(0, last, 84, 980), Axis(0, top * 1.1, 186, 12)
    for i, (name, start, stop) in enumerate(spans):
        picture.rect(x(start), 12, x(stop) - x(start), 174, "span" if i % 2 else "span2", f"{name}: {number(stop - start)} s")
    picture.grid(x, y, y_format=megabytes, x_format=lambda v: f"{v:g}", x_label="seconds", most=5)
    line = [(x(t), y(n)) for t, n in points]
    picture.area([(line[0][0], y.start), *line, (line[-1][0], y.start)], "area")
    picture.line(line, "trace")
    free = 0.0
    for name, start, stop in spans:
        width = text_width(name, 11)
        middle = (x(start) + x(stop)) / 2
        if x(stop) - x(start) > width * 0.8 and middle - width / 2 > free:
            picture.text(middle, 242, name, "middle")
            free = middle + width / 2 + 6
    return picture.element()
