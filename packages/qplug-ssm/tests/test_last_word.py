"""Last-word accuracy."""

import pytest
import torch
from qcore.errors import CalibrationError
from qplug_ssm.last_word import last_word_accuracy, passages

TEXT = "the cat sat on the mats and then went home again. " * 6


class Words:
    """One token for each word, numbered as they come."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def encode(self, text):
        return [self.ids.setdefault(w, len(self.ids)) for w in text.split()]


def test_passages_end_with_a_whole_word_whose_tokens_are_the_answer():
    words = Words()
    items = passages(TEXT, words, words=11, shortest=4)
    names = {i: w for w, i in words.ids.items()}
    assert len(items) == 6 and all(p.answer == 1 for p in items)
    assert all(names[p.tokens[-1]].strip(".") == "again" for p in items)


def test_a_model_that_knows_the_text_is_always_right_and_one_that_does_not_never():
    words = Words()
    items = passages(TEXT, words, words=11)
    size = len(words.ids)

    def knows(batch):
        following = torch.cat([batch["input_ids"][:, 1:], batch["input_ids"][:, :1]], 1)
        return torch.nn.functional.one_hot(following, size).float()

    assert last_word_accuracy(knows, items, batch=4) == 1.0
    assert last_word_accuracy(lambda batch: -knows(batch), items, batch=4) == 0.0


def test_a_text_without_passages_is_refused():
    with pytest.raises(CalibrationError, match="no passage"):
        passages("a b c", Words(), words=11)
