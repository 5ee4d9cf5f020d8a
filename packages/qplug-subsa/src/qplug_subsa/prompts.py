"""Prompts of annotated examples and one test item."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from qcore.errors import CalibrationError, SpecError

from qplug_subsa.pool import Pool
from qplug_subsa.retrieve import Limits, Order, ordered, retrieve
from qplug_subsa.rows import Array

_FIELD = re.compile(r"\{(\w+)\}")

Count = Callable[[str], int]


@dataclass(frozen=True)
class Template:
    """How an example is written, and how a test item.

    text:      with fields of the record in braces; "\\n" in it is a line end.  The test item is written up to the label, without spaces at the end
    label:     the field that the test item lacks
    separator: between examples
    """

    text: str = "{text}\nlabel: {label}"
    label: str = "label"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if f"{{{self.label}}}" not in self.text:
            raise SpecError(f"the template {self.text!r} has no {{{self.label}}}; it says where the label stands")

    def example(self, record: Mapping[str, Any], where: str) -> str:
        return self._filled(self.text, record, where)

    def query(self, record: Mapping[str, Any], where: str) -> str:
        return self._filled(self.text.partition(f"{{{self.label}}}")[0], record, where).rstrip(" ")

    def _filled(self, text: str, record: Mapping[str, Any], where: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if record.get(name) in (None, ""):
                has = ", ".join(map(repr, record)) or "none"
                what = "is empty" if name in record else f"is not among its fields ({has})"
                raise CalibrationError(f"{where}: the template wants {name!r}, which {what}; annotate it, or change --template or --label-field")
            return str(record[name])

        return _FIELD.sub(value, text)


@dataclass(frozen=True)
class Prompt:
    """examples: indices into the annotated pool, in the order of the prompt;  tokens: of the whole"""

    text: str
    examples: tuple[int, ...]
    similarities: tuple[float, ...]
    tokens: int


def build_prompts(
    annotated: Pool,
    tests: Pool,
    similar: Array,
    template: Template,
    count: Count,
    limits: Limits,
    order: Order = "ascending",
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> list[Prompt]:
    """One prompt for each test item.

    similar: [tests, annotated] cosines;  count: tokens of a text.  CalibrationError for a test item that does not fit by itself, before any is built
    """
    blocks = [template.example(r, f"{annotated.path}, {p}") for r, p in zip(annotated.records, annotated.places, strict=True)]
    queries = [template.query(r, f"{tests.path}, {p}") for r, p in zip(tests.records, tests.places, strict=True)]
    own = [count(q) for q in queries]
    long = [i for i, n in enumerate(own) if n > limits.tokens]
    if long:
        first = long[0]
        raise CalibrationError(
            f"{tests.path}, {tests.places[first]}: the item alone has {own[first]} tokens, the budget is {limits.tokens}"
            f"{f' (and {len(long) - 1} more)' if len(long) > 1 else ''}; pass a larger --tokens, or shorten it"
        )
    lengths = [count(b) for b in blocks]
    separator = count(template.separator)
    texts = [" ".join(t.split()) for t in annotated.texts]
    rng = np.random.default_rng(seed)
    prompts = []
    for i, query in enumerate(queries):
        mine = " ".join(tests.texts[i].split()) if tests.texts else None
        chosen = retrieve(similar[i], lengths, own[i], limits, lambda j, mine=mine: bool(texts) and texts[j] == mine, separator)  # type: ignore[misc]
        # where parts meet a tokenizer may need a token more than their sum
        while True:
            shown = ordered(chosen, order, rng)
            text = template.separator.join([*(blocks[j] for j in shown), query])
            tokens = count(text)
            if tokens <= limits.tokens or not chosen:
                break
            chosen = chosen[:-1]
        prompts.append(Prompt(text, tuple(shown), tuple(float(similar[i][j]) for j in shown), tokens))
        progress("prompts", i + 1, len(queries))
    return prompts


def label_remarks(labels: Sequence[Any]) -> list[str]:
    """What is odd about the labels of annotated examples."""
    different = {str(label) for label in labels}
    if len(different) == 1:
        return [f"all {len(labels)} annotated examples have the label {next(iter(different))!r}; prompts show a model no other answer"]
    return []
