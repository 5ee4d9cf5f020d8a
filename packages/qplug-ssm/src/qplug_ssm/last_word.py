"""LAMBADA-style accuracy: is the last word of a passage what the model would have said, and how likely was it?

A passage is a run of words of held-out text that ends with a whole word; the model sees the rest and must give every token of that word the
largest logit.  The words are not chosen to need a long context, as LAMBADA's are: figures compare models on the same passages, and with nothing else.
Source: https://arxiv.org/abs/1606.06031
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from qcore.errors import CalibrationError
from torch import Tensor


@dataclass(frozen=True)
class Passage:
    """tokens: all of it;  answer: how many tokens at the end are the last word's"""

    tokens: tuple[int, ...]
    answer: int


def passages(text: str, tokenizer: Any, *, words: int = 60, shortest: int = 4, limit: int | None = None) -> list[Passage]:
    """Consecutive runs of `words` words, each cut behind its last word of at least `shortest` letters.

    A run whose context does not encode to the beginning of the whole is left out: its answer would not be tokens of its own.
    """
    found: list[Passage] = []
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    for start in range(0, len(spans) - words + 1, words):
        run = spans[start : start + words]
        ends = list(re.finditer(rf" [A-Za-z]{{{shortest},}}\b", text[run[0][0] : run[-1][1]]))
        if not ends:
            continue
        whole = text[run[0][0] : run[0][0] + ends[-1].end()]
        context, tokens = tokenizer.encode(whole[: ends[-1].start()]), tokenizer.encode(whole)
        if tokens[: len(context)] == context and len(tokens) > len(context) > 0:
            found.append(Passage(tuple(tokens), len(tokens) - len(context)))
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise CalibrationError(f"the text of {len(text)} characters holds no passage of {words} words that ends with a word; pass a longer one")
    return found


@dataclass(frozen=True)
class LastWords:
    """right: whether each passage's last word is what the model says;  log_probability: of that word, all its tokens, in nats.  [passages] each

    Where a small model says few words right, the log-probabilities still tell two models apart; compare them passage by passage.
    """

    right: Tensor
    log_probability: Tensor

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


@torch.no_grad()
def last_words(forward: Callable[[dict[str, Tensor]], Tensor], items: Sequence[Passage], batch: int = 16) -> LastWords:
    """What a model makes of the last words.  forward: {"input_ids": [B, T]} → logits [B, T, V], causal

    Passages of one batch are filled up at their end, where a causal model does not look.
    """
    right, log_probability = [], []
    for a in range(0, len(items), batch):
        group = items[a : a + batch]
        ids = torch.zeros(len(group), max(len(p.tokens) for p in group), dtype=torch.long)
        for i, p in enumerate(group):
            ids[i, : len(p.tokens)] = torch.tensor(p.tokens)
        logits = forward({"input_ids": ids})
        for i, p in enumerate(group):
            end = len(p.tokens)
            own, answer = logits[i, end - p.answer - 1 : end - 1], ids[i, end - p.answer : end]
            right.append(torch.equal(own.argmax(-1), answer))
            log_probability.append(own.double().log_softmax(-1).gather(1, answer.unsqueeze(1)).sum())
    return LastWords(torch.tensor(right), torch.stack(log_probability))


def last_word_accuracy(forward: Callable[[dict[str, Tensor]], Tensor], items: Sequence[Passage], batch: int = 16) -> float:
    """The share of passages whose last word is what the model says; see `last_words`."""
    return last_words(forward, items, batch).accuracy
