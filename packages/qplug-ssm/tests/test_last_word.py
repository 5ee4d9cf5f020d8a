"""Last-word accuracy."""

import pytest
import torch
from qcore.errors import CalibrationError
from qplug_ssm.last_word import Passage, last_word_accuracy, last_words, passages

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


def test_log_probabilities_are_those_of_all_tokens_of_the_word_and_padding_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    items = [Passage((1, 2, 3), 1), Passage((4, 5, 6, 0, 2), 2)]
    found = last_words(lambda batch: table[batch["input_ids"]], items)
    step = table.log_softmax(-1)
    torch.testing.assert_close(found.log_probability, torch.stack([step[2, 3], step[6, 0] + step[0, 2]]))
    torch.testing.assert_close(last_words(lambda batch: table[batch["input_ids"]], items, batch=1).log_probability, found.log_probability)
    assert found.accuracy == found.right.double().mean()


def test_a_text_without_passages_is_refused():
    with pytest.raises(CalibrationError, match="no passage"):
        passages("a b c", Words(), words=11)
