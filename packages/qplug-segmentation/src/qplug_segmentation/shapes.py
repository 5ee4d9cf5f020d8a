"""Pictures of coloured shapes with sentences that each mean one of them: referring segmentation without a download.

A picture is made from (seed, split, number) alone, so the two splits never share one, and any number of them can be made.  Sentences name a colour
and a shape, a shape or a colour that is there once, where the shape lies among all ("the leftmost circle"), or beside what it lies: "the red
circle left of the blue square".  Each sentence is checked to be true of exactly one shape in its picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from qplug_segmentation.triples import Triples

Split = Literal["train", "val"]
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS: dict[str, Callable[[tuple[float, float], tuple[float, float]], bool]] = {
    "left of": lambda a, b: a[0] < b[0] - _MARGIN,
    "right of": lambda a, b: a[0] > b[0] + _MARGIN,
    "above": lambda a, b: a[1] < b[1] - _MARGIN,
    "below": lambda a, b: a[1] > b[1] + _MARGIN,
}
EXTREMES: dict[str, Callable[[tuple[float, float]], float]] = {
    "leftmost": lambda c: c[0],
    "rightmost": lambda c: -c[0],
    "topmost": lambda c: c[1],
    "lowest": lambda c: -c[1],
}
_MARGIN = 4.0  # pixels by which centres must differ for a relation to be said
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "thing", "of", "left", "right", "above", "below", *EXTREMES, *COLOURS, *SHAPES)


@dataclass(frozen=True)
class Thing:
    """One shape: its centre (x, y) and radius in pixels."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Shapes:
    """`count` pictures of a split, each with `sentences` sentences.  side: of the square pictures, pixels"""

    split: Split
    count: int
    seed: int = 0
    sentences: int = 2
    side: int = 64

    @property
    def name(self) -> str:
        return f"generated shapes, seed {self.seed}"

    def __len__(self) -> int:
        return self.count * self.sentences

    def read(self, chosen: Sequence[int] | None = None) -> Triples:
        pictures = range(self.count) if chosen is None else sorted({i // self.sentences for i in chosen})
        triples = make(self.split, pictures, seed=self.seed, sentences=self.sentences, side=self.side)
        if chosen is None:
            return triples
        return triples.take([pictures.index(i // self.sentences) * self.sentences + i % self.sentences for i in chosen])


def make(split: Split, numbers: Sequence[int], *, seed: int = 0, sentences: int = 2, side: int = 64) -> Triples:
    """The pictures of these numbers, with `sentences` sentences each (a sentence may come twice where few are true)."""
    images, of, said, masks = [], [], [], []
    for i, number in enumerate(numbers):
        rng = np.random.default_rng([seed, 0 if split == "train" else 1, number])
        things = _things(rng, side)
        while not sentences_of(things):
            things = _things(rng, side)
        pixels, covers = _draw(rng, things, side)
        images.append(pixels)
        for _ in range(sentences):
            sentence, which = _say(rng, things)
            of.append(i)
            said.append(sentence)
            masks.append(covers[which])
    return Triples(torch.from_numpy(np.stack(images)), torch.tensor(of, dtype=torch.long), tuple(said), torch.from_numpy(np.stack(masks)))


def _things(rng: np.random.Generator, side: int) -> list[Thing]:
    """Three to five shapes that do not touch; some share colour and shape, so that only a relation tells them apart."""
    wanted, things = int(rng.integers(3, 6)), list[Thing]()
    for _ in range(200):
        if len(things) == wanted:
            break
        radius = float(rng.uniform(0.09, 0.17)) * side
        x, y = (float(v) for v in rng.uniform(radius + 1, side - radius - 1, 2))
        if any(np.hypot(x - t.centre[0], y - t.centre[1]) < 1.15 * (radius + t.radius) for t in things):
            continue
        if things and rng.random() < 0.35:
            colour, shape = things[0].colour, things[0].shape
        else:
            colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        things.append(Thing(colour, shape, (x, y), radius))
    return things


def _draw(rng: np.random.Generator, things: Sequence[Thing], side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """([3, side, side] uint8, what each thing covers: [side, side] bool)."""
    y, x = np.mgrid[0:side, 0:side] + 0.5
    ground = rng.uniform(60, 120, 3)[:, None, None] + rng.normal(0, 8, (3, side, side))
    covers = []
    for thing in things:
        dx, dy, r = x - thing.centre[0], y - thing.centre[1], thing.radius
        if thing.shape == "circle":
            cover = dx**2 + dy**2 <= r**2
        elif thing.shape == "square":
            cover = np.maximum(abs(dx), abs(dy)) <= 0.85 * r
        else:
            cover = (dy <= 0.8 * r) & (dy >= -r + 2 * abs(dx) * 0.9)
        paint = np.array(COLOURS[thing.colour])[:, None] * rng.uniform(0.85, 1.05) + rng.normal(0, 6, (3, int(cover.sum())))
        ground[:, cover] = paint
        covers.append(cover)
    return ground.clip(0, 255).astype(np.uint8), covers


def meant(sentence_of: Callable[[Thing], bool], things: Sequence[Thing]) -> int | None:
    """The one thing of which it is true; None where there is none, or more than one."""
    found = [i for i, t in enumerate(things) if sentence_of(t)]
    return found[0] if len(found) == 1 else None


def _say(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, int]:
    """A sentence and the thing that it alone is true of."""
    options = sentences_of(things)
    related = [o for o in options if any(r in o[0] for r in RELATIONS)]
    plain = [o for o in options if o not in related]
    pool = related if related and (not plain or rng.random() < 0.4) else plain
    return pool[int(rng.integers(len(pool)))]


def sentences_of(things: Sequence[Thing]) -> list[tuple[str, int]]:
    """Every sentence that is true of exactly one of the things, with the number of that thing."""
    found: dict[str, int] = {}

    def say(sentence: str, true_of: Callable[[Thing], bool]) -> None:
        which = meant(true_of, things)
        if which is not None:
            found[sentence] = which

    for t in things:
        say(f"the {t.colour} {t.shape}", lambda o, t=t: (o.colour, o.shape) == (t.colour, t.shape))  # type: ignore[misc]
        say(f"the {t.shape}", lambda o, t=t: o.shape == t.shape)  # type: ignore[misc]
        say(f"the {t.colour} thing", lambda o, t=t: o.colour == t.colour)  # type: ignore[misc]
        same = [o for o in things if o.shape == t.shape]
        for word, key in EXTREMES.items():
            order = sorted(key(o.centre) for o in same)
            if len(order) > 1 and order[1] - order[0] > _MARGIN:
                say(f"the {word} {t.shape}", lambda o, t=t, key=key, least=order[0]: o.shape == t.shape and key(o.centre) == least)  # type: ignore[misc]
        for other in things:
            unique = sum((o.colour, o.shape) == (other.colour, other.shape) for o in things) == 1
            if other is t or not unique:
                continue
            for words, true in RELATIONS.items():
                say(
                    f"the {t.colour} {t.shape} {words} the {other.colour} {other.shape}",
                    lambda o, t=t, other=other, true=true: (o.colour, o.shape) == (t.colour, t.shape) and true(o.centre, other.centre),  # type: ignore[misc]
                )
    return list(found.items())
