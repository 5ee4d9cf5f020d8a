"""Pictures of coloured shapes with questions and one-word answers, drawn by seed: what tiny vision-language models learn and are judged on.

A picture is four cells of 16 × 16 pixels in two rows, each with a shape of some size, place and colour, or empty, on a grey noisy ground.  A
question has five words and its answer one:

    what shape top left ?  → circle        how many red things ?   → two
    what colour top left ? → nothing       any red circle there ?  → no

Pictures of one seed are always the same.  Even seeds are for training and calibration, odd ones for evaluation: the two never share a stream of
random numbers (`TRAIN`, `CALIBRATION`, `EVALUATION`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "white": (1.0, 1.0, 1.0),
    "purple": (0.65, 0.1, 0.8),
}
PLACES = (("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"))
NUMBERS = ("zero", "one", "two", "three", "four")
SPECIAL = ("<pad>", "<image>", "<bos>", "<eos>")
_OTHER = ("look", "what", "shape", "colour", "how", "many", "things", "any", "there", "?", "nothing", "yes", "no", "top", "bottom", "left", "right")
WORDS = (*SPECIAL, *_OTHER, *SHAPES, *COLOURS, *NUMBERS)
ID = {word: i for i, word in enumerate(WORDS)}

TRAIN, CALIBRATION, EVALUATION = 0, 2, 1
CELL = 16
EMPTY = len(SHAPES)
QUESTION = 5


@dataclass(frozen=True)
class Scenes:
    """n pictures.

    pixels: [n, 3, 32, 32] float in 0 … 1
    shapes: [n, 4] index into SHAPES, EMPTY where there is none
    colours: [n, 4] index into COLOURS
    """

    pixels: Tensor
    shapes: Tensor
    colours: Tensor


def draw(n: int, seed: int) -> Scenes:
    """n pictures of a seed."""
    g = torch.Generator().manual_seed(2 * seed)
    shapes = torch.randint(0, len(SHAPES) + 1, (n, 4), generator=g)
    colours = torch.randint(0, len(COLOURS), (n, 4), generator=g)
    radius = 3.5 + 3.0 * torch.rand(n, 4, 1, 1, generator=g)
    centre = 7.5 + (torch.rand(n, 4, 2, 1, 1, generator=g) - 0.5) * 3.0
    axis = torch.arange(CELL, dtype=torch.float32)
    y, x = (axis.view(-1, 1) - centre[:, :, 0]) / radius, (axis.view(1, -1) - centre[:, :, 1]) / radius  # [n, 4, 16, 16]
    inside = torch.stack(
        [
            x * x + y * y <= 1,
            (x.abs() <= 0.85) & (y.abs() <= 0.85),
            (y <= 0.85) & (2 * x.abs() <= y + 1),
            ((x.abs() <= 0.3) | (y.abs() <= 0.3)) & (x.abs() <= 1) & (y.abs() <= 1),
            torch.zeros(n, 4, CELL, CELL, dtype=torch.bool),
        ],
        2,
    )
    mask = inside.gather(2, shapes.view(n, 4, 1, 1, 1).expand(-1, -1, 1, CELL, CELL)).float()  # [n, 4, 1, 16, 16]
    paint = torch.tensor(list(COLOURS.values()))[colours].view(n, 4, 3, 1, 1)
    ground = 0.25 + 0.25 * torch.rand(n, 1, 1, 1, 1, generator=g)
    cells = mask * paint + (1 - mask) * ground
    picture = cells.view(n, 2, 2, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 2 * CELL, 2 * CELL)
    noise = 0.05 * torch.randn(picture.shape, generator=g)
    return Scenes((picture + noise).clamp(0, 1), shapes, colours)


def questions(scenes: Scenes, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` questions about every picture.  → words [n, count, 5] and answers [n, count], as ids"""
    g = torch.Generator().manual_seed(2 * seed + 1)
    n = len(scenes.shapes)
    kind = torch.randint(0, 4, (n, count), generator=g)
    place = torch.randint(0, 4, (n, count), generator=g)
    colour = torch.randint(0, len(COLOURS), (n, count), generator=g)
    shape = torch.randint(0, len(SHAPES), (n, count), generator=g)
    # half of the questions for things name one that is there
    seen = torch.rand(n, count, generator=g) < 0.5
    colour = torch.where(seen, scenes.colours.gather(1, place), colour)
    there = scenes.shapes.gather(1, place)
    shape = torch.where(seen & (there != EMPTY), there, shape)

    colours = torch.tensor([ID[c] for c in COLOURS])
    shapes = torch.tensor([ID[s] for s in (*SHAPES, "nothing")])
    numbers = torch.tensor([ID[w] for w in NUMBERS])
    upper, side = torch.tensor([[ID[a], ID[b]] for a, b in PLACES]).unbind(1)
    own = (scenes.colours.unsqueeze(1) == colour.unsqueeze(2)) & (scenes.shapes.unsqueeze(1) != EMPTY)  # [n, count, 4]
    exists = (own & (scenes.shapes.unsqueeze(1) == shape.unsqueeze(2))).any(2)

    def word(name: str) -> Tensor:
        return torch.full_like(kind, ID[name])

    options: list[tuple[list[str | Tensor], Tensor]] = [
        (["what", "shape", upper[place], side[place], "?"], shapes[there]),
        (["what", "colour", upper[place], side[place], "?"], torch.where(there == EMPTY, word("nothing"), colours[scenes.colours.gather(1, place)])),
        (["how", "many", colours[colour], "things", "?"], numbers[own.sum(2)]),
        (["any", colours[colour], shapes[shape], "there", "?"], torch.where(exists, word("yes"), word("no"))),
    ]
    asked = torch.stack([torch.stack([word(w) if isinstance(w, str) else w for w in words], 2) for words, _ in options])  # [4, n, count, 5]
    answers = torch.stack([a for _, a in options])
    return asked.gather(0, kind.view(1, n, count, 1).expand(-1, -1, -1, QUESTION))[0], answers.gather(0, kind.unsqueeze(0))[0]


@dataclass(frozen=True)
class Dialogue:
    """Pictures with their questions as one sequence each: <bos> look <image> × 16, then question and answer in turn.

    input_ids:    [n, T]
    pixel_values: [n, 3, 32, 32], as the model reads them
    answers:      [n, T] bool: where an answer stands; the position before it predicts it
    """

    input_ids: Tensor
    pixel_values: Tensor
    answers: Tensor


def normalized(pixels: Tensor) -> Tensor:
    """Pixels of 0 … 1 as tiny-llava reads them."""
    return (pixels - 0.4) / 0.25


def dialogues(n: int, seed: int, count: int = 4, patches: int = 16) -> Dialogue:
    """n pictures of a seed, each with `count` questions."""
    scenes = draw(n, seed)
    asked, answers = questions(scenes, count, seed)
    turns = torch.cat([asked, answers.unsqueeze(2)], 2).flatten(1)
    start = torch.tensor([ID["<bos>"], ID["look"], *[ID["<image>"]] * patches]).expand(n, -1)
    ids = torch.cat([start, turns], 1)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, start.shape[1] + QUESTION :: QUESTION + 1] = True
    return Dialogue(ids, normalized(scenes.pixels), where)
