"""RefCOCO, RefCOCO+ and G-Ref as REFER publishes them: sentences about COCO's objects, read without pickles.

A folder holds

| file | what |
|---|---|
| `refs.json` (or `refs(unc).json` …) | a list of objects: "ref_id", "ann_id", "image_id", "split", "sentences": [{"sent" or "raw"}] |
| `instances.json` | COCO: "images" (id, file_name), "annotations" (id, image_id, segmentation: polygons or run lengths) |
| `images/` | the pictures |

REFER ships refs as a pickle, `refs(unc).p`.  A pickle may run any code when it is read, so it is refused here, with the way to convert it once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qcore.errors import CalibrationError, NotFound

from qplug_segmentation.triples import Triples

SPLITS = ("train", "val", "test", "testA", "testB")


def open_folder(path: Path, split: str, side: int) -> "Refer":
    """The split of a folder; `refcoco/testA`, where that is no folder, is the split testA of `refcoco`.

    NotFound where there is none.  side: of the square that pictures and masks are resized to, as in the release
    """
    if not path.exists() and path.name in SPLITS and path.parent.is_dir():
        path, split = path.parent, path.name
    if not path.is_dir():
        raise NotFound(f"referring data {path} does not exist; pass a folder with refs.json, instances.json and images/, or folder/testA for a split")
    return Refer(path, split, side)


@dataclass(frozen=True)
class Refer:
    """One split of a folder; sentences in the order of the file, all of an object after each other."""

    path: Path
    split: str
    side: int = 480

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return len(self.sentences)

    @cached_property
    def sentences(self) -> list[tuple[str, int]]:
        """(sentence, number of its annotation)."""
        file, refs = _refs(self.path)
        found = []
        for i, ref in enumerate(refs):
            try:
                if ref["split"] == self.split:
                    found += [(str(s.get("sent") or s["raw"]), int(ref["ann_id"])) for s in ref["sentences"]]
            except (KeyError, TypeError, AttributeError) as e:
                raise CalibrationError(f"{file}, object {i}: {type(e).__name__} {e}; wants split, ann_id and sentences with 'sent' or 'raw'") from e
        if not found:
            have = ", ".join(sorted({str(ref["split"]) for ref in refs})) or "none"
            raise CalibrationError(f"{file} has no sentence of split {self.split!r}; it has splits {have}")
        return found

    @cached_property
    def annotations(self) -> dict[int, Mapping[str, Any]]:
        return {int(a["id"]): a for a in self._instances["annotations"]}

    @cached_property
    def files(self) -> dict[int, str]:
        return {int(image["id"]): str(image["file_name"]) for image in self._instances["images"]}

    @cached_property
    def _instances(self) -> Mapping[str, Any]:
        return _json(self.path / "instances.json", {"images", "annotations"})

    def read(self, chosen: Sequence[int] | None = None) -> Triples:
        """The triples of these sentences (None = of all); only their pictures are read."""
        try:
            from PIL import Image
        except ModuleNotFoundError as e:
            raise NotFound("pictures are read by Pillow, which is not installed: pip install 'qplug-segmentation[pictures]'") from e
        picked = [self.sentences[i] for i in (range(len(self)) if chosen is None else chosen)]
        numbers: dict[int, int] = {}
        pixels, of, masks = list[np.ndarray](), list[int](), list[np.ndarray]()
        sizes: dict[int, tuple[int, int]] = {}  # of the pictures, as they are on disk: (width, height)
        covers: dict[int, np.ndarray] = {}
        for _, annotation in picked:
            if annotation not in self.annotations:
                raise CalibrationError(f"{self.path / 'instances.json'} has no annotation {annotation}, which a sentence is about")
            own = self.annotations[annotation]
            image = int(own["image_id"])
            if image not in numbers:
                if image not in self.files:
                    raise CalibrationError(f"{self.path / 'instances.json'} has no image {image}, on which annotation {annotation} lies")
                file = self.path / "images" / self.files[image]
                if not file.is_file():
                    raise NotFound(f"picture {file} does not exist; put COCO's train2014 pictures there")
                with Image.open(file) as picture:
                    sizes[image] = picture.size
                    resized = picture.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
                numbers[image] = len(pixels)
                pixels.append(np.asarray(resized).transpose(2, 0, 1))
            if annotation not in covers:
                width, height = sizes[image]
                covers[annotation] = nearest(mask_of(own["segmentation"], height, width), self.side)
            of.append(numbers[image])
            masks.append(covers[annotation])
        return Triples(
            torch.from_numpy(np.stack(pixels)),
            torch.tensor(of, dtype=torch.long),
            tuple(sentence for sentence, _ in picked),
            torch.from_numpy(np.stack(masks)),
        )


def _refs(folder: Path) -> tuple[Path, list[Any]]:
    files = [folder / "refs.json", *sorted(folder.glob("refs(*).json"))]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        pickled = next(iter(sorted(folder.glob("refs*.p"))), None)
        if pickled is not None:
            raise CalibrationError(
                f"{pickled} is a pickle, which may run any code when it is read, and is not read here; where you trust it, convert it once:\n"
                f"  python -c \"import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))\" "
                f"'{pickled}' '{folder / 'refs.json'}'"
            )
        raise NotFound(f"{folder} has no refs.json; it is REFER's refs(unc).p (or google, umd) as JSON")
    refs = _json(file, None)
    if not isinstance(refs, list):
        raise CalibrationError(f"{file} holds a {type(refs).__name__}; wants a list of objects")
    return file, refs


def _json(file: Path, keys: set[str] | None) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise NotFound(f"{file} does not exist; it is COCO's instances.json as REFER ships it") from e
    except (OSError, ValueError) as e:
        raise CalibrationError(f"{file} cannot be read as JSON ({e})") from e
    if keys is not None and (not isinstance(data, dict) or not keys <= set(data)):
        raise CalibrationError(
            f"{file} lacks {sorted(keys - set(data))[0] if isinstance(data, dict) else 'its table'}; it is no COCO file of instances"
        )
    return data


# masks -----------------------------------------------------------------------------------------------------------------------------------


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as [height, width] bool: a list of polygons (their union), or run lengths, plain or compressed.

    Run lengths are unpacked here: COCO's own code does not check them, and writes past its memory where they are wrong.
    """
    if isinstance(segmentation, list):
        return polygons_mask(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= set(segmentation):
        raise CalibrationError(f"a segmentation is a list of polygons or run lengths with 'counts' and 'size', got {type(segmentation).__name__}")
    size = tuple(int(v) for v in segmentation["size"])
    if size != (height, width):
        raise CalibrationError(f"run lengths are of a mask of {size[0]}×{size[1]}, and the picture has {height}×{width} (height × width)")
    counts = segmentation["counts"]
    return run_length_mask(counts if isinstance(counts, list) else decoded_counts(str(counts)), height, width)


def polygons_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """The union of polygons x0, y0, x1, y1 …, drawn by COCO's own code, so that every pixel of an outline falls as in published figures.

    CalibrationError for polygons of less than three corners, and for corners that lie further outside than the picture is wide or high
    """
    try:
        from pycocotools import mask
    except ModuleNotFoundError as e:
        raise NotFound("polygons are drawn by pycocotools, which is not installed: pip install 'qplug-segmentation[pictures]'") from e
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise CalibrationError(f"a polygon has three corners or more, x and y of each, got {len(polygon)} numbers")
        for axis, (values, side) in zip("xy", ((polygon[0::2], width), (polygon[1::2], height)), strict=True):
            out = next((v for v in values if not -side <= v <= 2 * side), None)
            if out is not None:
                raise CalibrationError(f"a polygon has a corner at {axis} = {out}, and the picture ends at {side}; is it another picture's?")
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    drawn = mask.frPyObjects([[float(v) for v in polygon] for polygon in polygons], height, width)
    return mask.decode(mask.merge(drawn)).astype(bool)


def run_length_mask(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Runs of background and object in turn, column by column."""
    runs = np.asarray(counts, dtype=np.int64)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise CalibrationError(f"run lengths add up to {int(runs.sum())} pixels, and the mask has {height}×{width} = {height * width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def decoded_counts(text: str) -> list[int]:
    """COCO's compressed run lengths: groups of five bits, the sixth says that more follow; from the third on, differences to the run before last."""
    counts, at = list[int](), 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            if at >= len(text):
                raise CalibrationError("compressed run lengths end inside a number")
            c = ord(text[at]) - 48
            if not 0 <= c < 64:
                raise CalibrationError(f"compressed run lengths hold {text[at]!r}, which is none of their 64 characters")
            value |= (c & 0x1F) << shift
            more = bool(c & 0x20)
            at, shift = at + 1, shift + 5
            if not more and c & 0x10:
                value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def nearest(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask resized to [side, side] by the nearest pixel."""
    height, width = mask.shape
    rows = ((np.arange(side) + 0.5) * height / side).astype(int).clip(0, height - 1)
    columns = ((np.arange(side) + 0.5) * width / side).astype(int).clip(0, width - 1)
    return mask[np.ix_(rows, columns)]
