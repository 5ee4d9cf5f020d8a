"""Expert-balanced self-sampling: its search against brute force and plain beams, its caches against recomputation, its sets against text."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from qcore.calibration.text import cut, encode, read_text
from qcore.errors import CalibrationError, NotFound, SpecError
from qcore.model.source import load_source
from qcore.pipeline import float_forward
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings
from qplug_llm.decoder import DecoderLM
from qplug_llm.ebss import EBSS, CachedModel, imbalance, search
from qplug_llm.testing import model_of
from torch import Tensor, nn


def silent(phase: str, done: int, total: int) -> None: ...


@dataclass
class Markov:
    """A toy: the next token depends on the last, and so do the two experts of each of two layers."""

    vocabulary: int
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.logits = (2 * torch.randn(self.vocabulary, self.vocabulary, generator=g, dtype=torch.float64)).log_softmax(-1)
        self.experts = torch.tensor([4, 3])
        self.routes = torch.zeros(self.vocabulary, 2, 4, dtype=torch.int64)
        for v in range(self.vocabulary):
            for layer, size in enumerate(self.experts.tolist()):
                self.routes[v, layer, torch.randperm(size, generator=g)[:2]] = 1

    def step(self, tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.logits[tokens], self.routes[tokens]

    def cost(self, tokens: tuple[int, ...], tau: float) -> float:
        """Of one whole sequence, written out."""
        logprob = sum(float(self.logits[a, b]) for a, b in itertools.pairwise(tokens))
        spread = []
        for layer, size in enumerate(self.experts.tolist()):
            share = [sum(int(self.routes[t, layer, e]) for t in tokens) / len(tokens) for e in range(size)]
            mean = sum(share) / size
            spread.append(math.sqrt(sum((u - mean) ** 2 for u in share) / (size - 1)))
        return -logprob / len(tokens) + sum(spread) / len(spread) / tau


@pytest.mark.parametrize("tau", [0.1, 1.2, math.inf])
@pytest.mark.parametrize(("vocabulary", "length"), [(6, 4), (4, 5)])
def test_with_room_for_every_branch_it_finds_what_brute_force_finds(vocabulary, length, tau):
    model = Markov(vocabulary)
    found = search(model, torch.arange(vocabulary), length=length, width=vocabulary**length, tau=tau)
    for first, cost in enumerate(found.costs(tau).tolist()):
        every = {(first, *rest): model.cost((first, *rest), tau) for rest in itertools.product(range(vocabulary), repeat=length - 1)}
        assert cost == pytest.approx(min(every.values()), rel=1e-9)
        assert every[tuple(found.tokens[first].tolist())] == pytest.approx(cost, rel=1e-9)


def beams(model: Markov, first: int, length: int, width: int) -> list[int]:
    """Plain beam search by mean log-probability, written for reading."""
    branches = [([first], 0.0)]
    for _ in range(length - 1):
        every = [([*tokens, v], logprob + float(model.logits[tokens[-1], v])) for tokens, logprob in branches for v in range(model.vocabulary)]
        branches = sorted(every, key=lambda b: -b[1])[:width]
    return branches[0][0]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_without_a_price_on_imbalance_it_is_plain_beam_search(width):
    model = Markov(12, seed=3)
    found = search(model, torch.arange(12), length=10, width=width, tau=math.inf)
    assert found.tokens.tolist() == [beams(model, first, 10, width) for first in range(12)]


def test_a_search_of_many_is_many_searches_of_one():
    model = Markov(9, seed=1)
    together = search(model, torch.arange(9), length=12, width=3, tau=0.5, warmup=2)
    for first in range(9):
        alone = search(model, torch.tensor([first]), length=12, width=3, tau=0.5, warmup=2)
        assert torch.equal(alone.tokens[0], together.tokens[first])


def test_the_lower_its_price_the_more_imbalance_there_is():
    model = Markov(40, seed=2)
    mean = [float(search(model, torch.arange(40), length=40, width=4, tau=tau).imbalance.mean()) for tau in (0.05, 0.3, 1.2, math.inf)]
    assert mean == sorted(mean) and mean[0] < 0.7 * mean[-1]


def test_warm_up_tokens_are_chosen_by_likelihood_alone():
    model = Markov(12, seed=3)
    found = search(model, torch.arange(12), length=4, width=1, tau=1e-6, warmup=3)
    assert found.tokens.tolist() == [beams(model, first, 4, 1) for first in range(12)]


def test_imbalance_is_zero_for_equal_shares_and_ignores_experts_that_are_not_there():
    counts = torch.tensor([[[2, 2, 2, 2], [3, 3, 3, 0]]])
    experts = torch.tensor([4, 3])
    assert float(imbalance(counts, 4, experts)) == 0
    one = torch.tensor([[[4, 0, 0, 0], [4, 0, 0, 0]]])
    # one expert takes all of 4 tokens: σ² = ((1 - 1/E)² + (E - 1)/E²) / (E - 1) = 1/E
    assert float(imbalance(one, 4, experts)) == pytest.approx((0.5 + math.sqrt(1 / 3)) / 2)


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    model = copy.deepcopy(model_of("Mixtral"))
    DecoderLM().prepare(model)
    return model


def test_cached_branches_equal_a_recomputation_of_the_whole(mixtral):
    stepper = CachedModel(mixtral)
    first = torch.tensor([5, 17, 40])
    with stepper.watched():
        found = search(stepper, first, length=14, width=4, tau=0.3, warmup=2)
        again = stepper.counts(found.tokens)
    assert torch.equal(again, found.counts)
    with torch.no_grad():
        logp = mixtral(input_ids=found.tokens, use_cache=False).logits.float().log_softmax(-1)
    whole = logp[:, :-1].gather(2, found.tokens[:, 1:, None]).squeeze(-1).double().sum(1)
    torch.testing.assert_close(found.logprob, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.imbalance, imbalance(again, 14, stepper.experts))


def test_windows_have_their_exact_length_start_differently_and_hold_no_special_token(mixtral):
    settings = CalibrationSettings(samples=6, length=11, batch=2)
    windows = EBSS(together=4).windows(mixtral, settings, None, silent)
    assert windows.shape == (6, 11) and windows.dtype == torch.int64
    assert len(set(windows[:, 0].tolist())) == 6
    assert not torch.isin(windows, torch.tensor([0, 1, 2])).any()
    assert torch.equal(windows, EBSS(together=4).windows(mixtral, settings, None, silent))
    assert not torch.equal(windows, EBSS(together=4).windows(mixtral, replace(settings, seed=1), None, silent))


def test_a_sampled_set_is_kept_and_reused_and_refused_when_it_is_another(mixtral, tmp_path):
    settings = CalibrationSettings(samples=4, length=9, batch=2)
    source = EBSS(path=str(tmp_path / "sets" / "own.safetensors"))
    assert source.kept(mixtral, settings) is None
    made = source.windows(mixtral, settings, None, silent)
    with torch.device("meta"):
        bare = type(mixtral)(mixtral.config)
    assert torch.equal(source.kept(bare, settings), made)  # without any weights
    for other, changed in ((source, replace(settings, seed=3)), (replace(source, tau=0.5), settings)):
        with pytest.raises(CalibrationError, match=r"sampled otherwise: (seed was 0 and is 3|tau was 1.2 and is 0.5)"):
            other.kept(mixtral, changed)
    with pytest.raises(CalibrationError, match="model was 'MixtralForCausalLM"):
        source.kept(model_of("Olmoe"), settings)
    (tmp_path / "sets" / "own.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="cannot be read"):
        source.kept(mixtral, settings)


def test_text_is_topped_up_until_every_expert_has_its_tokens(mixtral):
    settings = CalibrationSettings(samples=4, length=12, batch=2)
    stepper = CachedModel(mixtral)
    text = torch.full((4, 12), 9)  # one token, over and over: two experts of a layer get it all
    with stepper.watched():
        before = stepper.counts(text).sum(0)
        assert int(before.min()) == 0
        windows = EBSS(minimum=3, together=2).windows(mixtral, settings, text, silent)
        after = stepper.counts(windows).sum(0)
    assert torch.equal(windows[:4], text) and 4 < len(windows) <= 8 and len(windows) % 2 == 0
    assert int(after.min()) >= 3 or len(windows) == 8
    enough = EBSS(minimum=1, together=2)
    varied = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    with stepper.watched():
        assert int(stepper.counts(varied).sum(0).min()) >= 1
    assert torch.equal(enough.windows(mixtral, settings, varied, silent), varied)


def test_a_model_without_experts_is_refused():
    import transformers

    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(NotFound, match="no fused experts"):
        EBSS().windows(transformers.LlamaForCausalLM(config), CalibrationSettings(), None, silent)


@pytest.mark.parametrize(("name", "value"), [("tau", 0.0), ("tau", float("nan")), ("width", 0), ("together", 0), ("warmup", -1), ("minimum", -1)])
def test_options_that_mean_nothing_are_refused(name, value):
    with pytest.raises(SpecError, match=rf"ebss: .*{name}|ebss: {name}"):
        EBSS(**{name: value})


def test_on_a_trained_mixture_its_text_is_balanced_better_than_beams_and_better_than_the_corpus():
    loaded = load_source("zoo:tiny-moe", load_registry().sources)
    float_forward(loaded, DecoderLM())
    stepper = CachedModel(loaded.model)
    length, samples = 48, 12
    first = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:samples] + 1
    corpus = cut(encode(loaded.tokenizer, read_text(loaded.calibration)[:40_000], "calib"), length)[:samples]
    with stepper.watched():
        balanced, plain = (search(stepper, first, length=length, width=4, tau=tau, warmup=3, banned=[0]) for tau in (0.3, math.inf))
        text = stepper.counts(corpus)

    def of_sequences(counts: Tensor) -> float:
        return float(imbalance(counts, length, stepper.experts).mean())

    assert of_sequences(balanced.counts) < of_sequences(plain.counts)
    assert of_sequences(balanced.counts) < of_sequences(text)
    # what balance costs in likelihood is paid knowingly: still far from the likelihood of chance, log 1024
    assert float(balanced.logprob.mean()) / length > -0.5 * math.log(1024)
