"""Retrieval under a token budget, order, and the text of prompts."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import CalibrationError, SpecError
from qplug_subsa.pool import Pool
from qplug_subsa.prompts import Template, build_prompts, label_remarks
from qplug_subsa.retrieve import Limits, knn_accuracy, ordered, retrieve, similarities


def pool(name: str, records: list[dict]) -> Pool:
    return Pool(
        Path(name), records, [r["text"] for r in records], [str(i) for i in range(len(records))], [f"line {i + 1}" for i in range(len(records))]
    )


def count(text: str) -> int:
    return len(text.split())


def test_the_most_similar_examples_come_first_until_one_does_not_fit():
    similar = np.array([0.2, 0.9, 0.5, 0.7, 0.1])
    assert retrieve(similar, [3, 3, 3, 3, 3], 4, Limits(tokens=100)) == [1, 3, 2, 0, 4]
    assert retrieve(similar, [3, 3, 3, 3, 3], 4, Limits(tokens=10)) == [1, 3]
    assert retrieve(similar, [1, 3, 1, 6, 1], 4, Limits(tokens=10)) == [1]  # stops at the first that does not fit, as released
    assert retrieve(similar, [1, 3, 1, 6, 1], 4, Limits(tokens=10, example=5)) == [1, 2, 0, 4]  # an over-long one is passed over
    assert retrieve(similar, [3, 3, 3, 3, 3], 4, Limits(shots=2)) == [1, 3]
    assert retrieve(similar, [3, 3, 3, 3, 3], 4, Limits(tokens=12), separator=1) == [1, 3]


def test_the_item_itself_is_never_shown():
    similar = np.array([1.0, 0.99, 0.3])
    assert retrieve(similar, [1, 1, 1], 1, Limits()) == [1, 2]
    assert retrieve(similar, [1, 1, 1], 1, Limits(), itself=lambda i: i == 1) == [2]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_a_budget_is_never_passed_and_a_larger_one_shows_no_less(seed, tokens):
    rng = np.random.default_rng(seed)
    similar, lengths = rng.uniform(-1, 0.99, 12), rng.integers(1, 12, 12).tolist()
    small, large = (retrieve(similar, lengths, 5, Limits(tokens=t, example=12)) for t in (tokens, tokens + 7))
    assert 5 + sum(lengths[i] for i in small) <= max(tokens, 5)
    assert large[: len(small)] == small
    assert list(similar[small]) == sorted(similar[small], reverse=True)


def test_equal_similarities_keep_the_order_of_the_pool():
    assert retrieve(np.full(4, 0.5), [1] * 4, 1, Limits()) == [0, 1, 2, 3]


def test_order_puts_the_most_similar_last():
    assert ordered([7, 3, 5], "ascending") == [5, 3, 7]
    assert ordered([7, 3, 5], "descending") == [7, 3, 5]
    assert sorted(ordered([7, 3, 5], "random", np.random.default_rng(1))) == [3, 5, 7]


def test_centring_follows_its_name():
    rng = np.random.default_rng(0)
    examples, items = rng.normal(size=(9, 4)) + 3, rng.normal(size=(5, 4)) + 3

    def cosine(a, b):
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T

    assert np.allclose(similarities(examples, items), cosine(items, examples))
    assert np.allclose(similarities(examples, items, "own"), cosine(items - items.mean(0), examples - examples.mean(0)))
    assert np.allclose(similarities(examples, items, "examples"), cosine(items - examples.mean(0), examples - examples.mean(0)))
    assert np.array_equal(similarities(examples, items[:1], "own"), np.zeros((1, 9)))  # one item alone is its own mean
    with pytest.raises(SpecError, match="dimensions"):
        similarities(examples, items[:, :3])


def test_a_prompt_is_examples_and_the_item_up_to_its_label():
    annotated = pool("a.jsonl", [{"text": "cold soup", "label": "bad"}, {"text": "warm bread", "label": "good"}])
    tests = pool("t.jsonl", [{"text": "warm soup"}, {"text": "cold soup"}])
    template = Template("Dish: {text}\nVerdict: {label}")
    built = build_prompts(annotated, tests, np.array([[0.8, 0.9], [1.0, 0.1]]), template, count, Limits())
    assert built[0].text == "Dish: cold soup\nVerdict: bad\n\nDish: warm bread\nVerdict: good\n\nDish: warm soup\nVerdict:"
    assert built[0].examples == (0, 1) and built[0].similarities == (0.8, 0.9) and built[0].tokens == count(built[0].text)
    assert built[1].examples == (1,)  # the same text is not its own example


def test_the_text_of_an_item_is_no_example_however_it_is_spaced():
    annotated = pool("a.jsonl", [{"text": "cold   soup", "label": "bad"}, {"text": "warm bread", "label": "good"}])
    built = build_prompts(annotated, pool("t.jsonl", [{"text": "cold soup"}]), np.array([[0.9, 0.1]]), Template(), count, Limits())
    assert built[0].examples == (1,)


def test_prompts_fit_also_where_tokens_do_not_add_up():
    """A tokenizer that needs one token more wherever two parts meet."""

    def greedy_count(text: str) -> int:
        return len(text.split()) + 3 * text.count("\n\n") if text.strip() else 0

    annotated = pool("a.jsonl", [{"text": f"word {i}", "label": "x"} for i in range(30)])
    built = build_prompts(annotated, pool("t.jsonl", [{"text": "item"}]), np.linspace(0, 0.9, 30)[None], Template(), greedy_count, Limits(tokens=40))
    assert 0 < len(built[0].examples) < 30 and built[0].tokens == greedy_count(built[0].text) <= 40
    assert built[0].examples[-1] == 29  # what had to go is the least similar


def test_what_is_missing_is_named_before_anything_is_built():
    annotated = pool("a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    tests = pool("t.jsonl", [{"text": "short"}, {"text": "much too long " * 20}])
    with pytest.raises(CalibrationError, match="line 2: the template wants 'label', which is empty"):
        build_prompts(annotated, tests, np.zeros((2, 2)), Template(), count, Limits())
    with pytest.raises(CalibrationError, match="line 2: the item alone has 61 tokens, the budget is 50"):
        build_prompts(pool("a.jsonl", annotated.records[:1]), tests, np.zeros((2, 1)), Template(), count, Limits(tokens=50))
    with pytest.raises(SpecError, match=r"has no \{label\}"):
        Template("{text}")
    for wrong in ({"tokens": 0}, {"example": 0}, {"shots": -1}):
        with pytest.raises(SpecError):
            Limits(**wrong)


def test_a_pool_of_one_class_is_remarked_on():
    assert "all 3 annotated examples have the label 'x'" in label_remarks(["x", "x", "x"])[0]
    assert label_remarks(["x", "y"]) == []


def test_knn_votes_with_similarity():
    similar = np.array([[0.9, 0.5, 0.4], [0.1, 0.2, 0.3]])
    assert knn_accuracy(similar, ["a", "b", "b"], ["a", "b"], k=1) == 1.0
    assert knn_accuracy(similar, ["a", "b", "b"], ["a", "b"], k=3) == 0.5
