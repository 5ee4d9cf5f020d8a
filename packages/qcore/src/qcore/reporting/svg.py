"""Charts as SVG text: shapes with classes, colours in one style sheet that knows light and dark.  No library, no script, no font of its own.

Every picture has a title and a description for those who do not see it, and every mark a tooltip with its figures.  Coordinates are rounded to a
tenth of a pixel, so the same data gives the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

# blue and orange are told apart by all common kinds of colour blindness; heat maps differ in strength alone
STYLE = files("qcore.reporting").joinpath("charts.css").read_text(encoding="utf-8")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """Values low … high → pixels start … stop.  log: by their logarithm"""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = min(max(value, self.low), self.high)
        at = (math.log(value) if self.log else value) - low
        return self.start + (self.stop - self.start) * (at / (high - low) if high > low else 0.5)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside; of a logarithmic axis powers of ten, with 2 and 5 between where there are few."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, math.ceil((last - first) / most))
            tens = [10.0**e for e in range(first, last + 1, every) if self.low <= 10.0**e <= self.high]
            if len(tens) > 2:
                return tens
            finer = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if self.low <= m * 10.0**e <= self.high]
            return finer or [self.low, self.high]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        step = 10 ** math.floor(math.log10(span / most))
        step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
        first = math.ceil(self.low / step)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step) + 1)]


def log_axis(low: float, high: float, start: float, stop: float) -> Axis:
    return Axis(low, high, start, stop, log=True)


def number(value: float | None) -> str:
    """Three digits, without a needless exponent."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def power(base: int, exponent: int) -> str:
    """As a figure on an axis."""
    return f"{base}{str(exponent).translate(_RAISED)}"


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text is drawn; fonts differ."""
    return len(text) * size * 0.56


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Picture:
    """One SVG.  title and words: what it shows, for those who do not see it"""

    width: float
    height: float
    title: str
    words: str
    _marks: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, words: str = "", opacity: float | None = None) -> None:
        seen = "" if opacity is None else f' fill-opacity="{opacity:.2f}"'
        shape = f'<rect class="{kind}" x="{_px(x)}" y="{_px(y)}" width="{_px(max(width, 0))}" height="{_px(max(height, 0))}"{seen}'
        self._marks.append(f"{shape}><title>{escape(words)}</title></rect>" if words else f"{shape}/>")

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "tick", turned: bool = False) -> None:
        turn = f' transform="rotate(-90 {_px(x)} {_px(y)})"' if turned else ""
        self._marks.append(f'<text class="{kind}" x="{_px(x)}" y="{_px(y)}" text-anchor="{anchor}"{turn}>{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        self._marks.append(f'<polyline class="{kind}" points="{" ".join(f"{_px(x)},{_px(y)}" for x, y in points)}"/>')

    def area(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        self._marks.append(f'<polygon class="{kind}" points="{" ".join(f"{_px(x)},{_px(y)}" for x, y in points)}"/>')

    def dot(self, x: float, y: float, kind: str, words: str) -> None:
        self._marks.append(f'<circle class="dot-{kind}" cx="{_px(x)}" cy="{_px(y)}" r="5"><title>{escape(words)}</title></circle>')

    def grid(
        self,
        x: Axis,
        y: Axis,
        *,
        x_format: Callable[[float], str] = number,
        y_format: Callable[[float], str] = number,
        x_label: str = "",
        y_label: str = "",
        most: int = 6,
    ) -> None:
        """Lines and figures at round values of both axes."""
        for value in y.ticks(most):
            self.line([(x.start, y(value)), (x.stop, y(value))], "gridline")
            self.text(x.start - 6, y(value) + 4, y_format(value), "end")
        for value in x.ticks(most):
            self.line([(x(value), y.start), (x(value), y.stop)], "gridline")
            self.text(x(value), y.start + 16, x_format(value), "middle")
        if x_label:
            self.text((x.start + x.stop) / 2, y.start + 36, x_label, "middle", "label")
        if y_label:
            self.text(14, (y.start + y.stop) / 2, y_label, "middle", "label", turned=True)

    def element(self) -> str:
        """To be set into a page, whose style sheet holds `STYLE`."""
        return self._svg("", "")

    def file(self) -> str:
        """A picture that stands alone."""
        paper = f'<rect class="paper" width="{_px(self.width)}" height="{_px(self.height)}"/>'
        return self._svg(' xmlns="http://www.w3.org/2000/svg"', f"<style>{STYLE}</style>{paper}") + "\n"

    def _svg(self, namespace: str, before: str) -> str:
        size = f'viewBox="0 0 {_px(self.width)} {_px(self.height)}" width="{_px(self.width)}" height="{_px(self.height)}"'
        head = f"<title>{escape(self.title)}</title><desc>{escape(self.words)}</desc>"
        return f'<svg{namespace} role="img" {size}>{head}{before}{"".join(self._marks)}</svg>'
