"""The quantized cache behind transformers' interface: the same logits however a text is run, packed memory, policies in checkpoints."""

import copy

import pytest
import torch
import transformers
from qcore.calibration import MSE
from qcore.checkpoint import load, save
from qcore.errors import SpecError
from qcore.model.tap import Tap, attach
from qcore.modules.kv_cache import KVCache
from qcore.numbers import Int, Offset, PerGroup, PerHead, PerTensor, QuantSpec, Tile, int_weight
from qcore.ops.kv_attention import TritonKVAttention, refuses_codes
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qkernels.kv_attention.reference import kv_attention
from qplug_llm.cache import QuantizedLayer, QuantizedSlidingLayer, cache_bytes
from qplug_llm.decoder import DecoderLM
from qplug_llm.testing import model_of
from transformers.cache_utils import DynamicCache

SMALL = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 76,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = 15


def per_head(bits):
    return QuantSpec(format=Int(bits), granularity=PerHead(), offset=Offset.CODE, scale="float16", when="dynamic")


def kivi(bits, window):
    keys = QuantSpec(format=Int(bits), granularity=Tile(4, 1), offset=Offset.VALUE, when="dynamic")
    values = QuantSpec(format=Int(bits), granularity=PerGroup(8), offset=Offset.VALUE, when="dynamic")
    return (keys, window), (values, window)


POLICIES = {
    "kv2": ((per_head(2), 0), (per_head(2), 0)),
    "kivi, window": kivi(2, 4),
    "kivi": kivi(2, 0),
    "keys alone": ((per_head(3), 3), None),
    "values alone": (None, (per_head(2), 5)),
}


def llama(cls="Llama", dtype=torch.float64, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}Config")(**SMALL | more)
    model = getattr(transformers, f"{cls}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.2)
    return model


def with_policy(policy, model=None):
    model = copy.deepcopy(model or llama())
    DecoderLM().prepare(model)
    for layer in model.model.layers:
        for place, own in zip("kv", policy, strict=True):
            if own is not None:
                attach(layer.self_attn, place, KVCache(*own))
    return model


def ids(batch=2, tokens=TOKENS):
    return torch.randint(4, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def in_calls(model, x, cuts, cache=None):
    """Logits of a text that is run in several calls, and the cache."""
    logits = []
    for piece in x.split(cuts, 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def kl(reference, logits):
    p, q = (t[:, :-1].double().log_softmax(-1) for t in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "name"),
    [("Llama", name) for name in POLICIES]
    + [("Qwen3", "kivi, window"), ("Mistral", "kivi, window"), ("Mistral", "kv2"), ("Mistral", "keys alone"), ("Gemma2", "kivi, window")],
)
def test_teacher_forced_logits_equal_those_of_decoding(name, family):
    """Mistral's window of attention is outgrown; Qwen3 has norms on queries and keys; Gemma 2 has both kinds of layers, and soft caps."""
    more = {"Mistral": {"sliding_window": 7}, "Qwen3": {"head_dim": 16}, "Gemma2": {"head_dim": 16, "sliding_window": 6}}.get(family, {})
    model = with_policy(POLICIES[name], llama(family, **more))
    whole = model(ids(), use_cache=False).logits
    for cuts in ([TOKENS], [1] * TOKENS, [8, 1, 4, 2]):
        logits, cache = in_calls(model, ids(), cuts)
        # float64 sums in another order; norms and rotary embeddings pass through float32, the same in each
        torch.testing.assert_close(logits, whole, rtol=1e-6, atol=1e-9)
        assert {type(layer) for layer in cache.layers} == {
            "Mistral": {QuantizedSlidingLayer},
            "Gemma2": {QuantizedSlidingLayer, QuantizedLayer},
        }.get(family, {QuantizedLayer})


def test_two_bits_change_what_is_measured_and_eight_hardly_do():
    x, plain = ids(), llama()(ids(), use_cache=False).logits
    found = {bits: kl(plain, with_policy(((per_head(bits), 0),) * 2)(x, use_cache=False).logits) for bits in (2, 3, 4, 8)}
    assert found[2] > found[3] > found[4] > found[8] > 0
    assert found[2] > 1e-3 and found[8] < 1e-3 * found[2]


@pytest.mark.parametrize("cuts", [[TOKENS], [1] * TOKENS], ids=["prompt", "steps"])
def test_a_cache_does_not_stay_float(cuts):
    model = with_policy(POLICIES["kv2"], llama(dtype=torch.float32))
    plain, cache = in_calls(llama(dtype=torch.float32), ids(), cuts)
    logits, packed = in_calls(model, ids(), cuts)
    assert kl(plain, logits) > 1e-3
    # of 16 channels: 64 bytes of floats; 4 of codes, 2 of a scale, 1 of a zero point
    assert cache_bytes(cache) == 2 * 2 * 2 * 2 * TOKENS * 64
    assert cache_bytes(packed) == 2 * 2 * 2 * 2 * TOKENS * 7


def test_without_a_policy_nothing_changes():
    model = llama()
    DecoderLM().prepare(model)
    _, cache = in_calls(model, ids(), [9, 6])
    assert not any(isinstance(layer, QuantizedLayer) for layer in cache.layers)


def test_generate_is_greedy_decoding_over_the_quantized_cache():
    model, x = with_policy(POLICIES["kivi, window"]), ids()
    expected = x
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None), expected)
    out = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert all(isinstance(layer, QuantizedLayer) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("name", ["kv2", "kivi, window"])
def test_beams_take_their_caches_along(name):
    """As without any cache, where every beam is run again from its text."""
    model, x = with_policy(POLICIES[name]), ids()
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(x, **search), model.generate(x, use_cache=False, **search))


def test_padding_on_the_left_changes_nothing_where_tokens_are_coded_alone():
    model, x = with_policy(POLICIES["kv2"]), ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), x], 1)
    mask = (padded != 0).long()
    one = model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 9:]
    other = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 13:]
    assert torch.equal(one, other)


class Turn(Tap):
    """A rotation of each head's channels, after RoPE."""

    def __init__(self, r):
        super().__init__()
        self.r = r

    def forward(self, x, rows=None, weight=None):
        return (x.unflatten(-1, (-1, self.r.shape[0])) @ self.r).flatten(-2)


def test_a_rotation_before_the_policy_is_cached_rotated():
    r = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    model = copy.deepcopy(llama())
    DecoderLM().prepare(model)
    for layer in model.model.layers:
        attach(layer.self_attn, "q", Turn(r))
        attach(layer.self_attn, "k", Turn(r))
    plain = llama()(ids(), use_cache=False).logits
    torch.testing.assert_close(model(ids(), use_cache=False).logits, plain, rtol=1e-6, atol=1e-9)  # q·R·Rᵀ·k = q·k
    for layer in model.model.layers:
        attach(layer.self_attn, "k", KVCache(per_head(3)))
    whole = model(ids(), use_cache=False).logits
    unrotated = with_policy(((per_head(3), 0), None))(ids(), use_cache=False).logits
    assert kl(plain, whole) > 0 and not torch.equal(whole, unrotated)
    torch.testing.assert_close(in_calls(model, ids(), [1] * TOKENS)[0], whole, rtol=1e-6, atol=1e-9)


def test_caches_that_would_stay_float_are_refused():
    model = with_policy(POLICIES["kv2"])
    _, filled = in_calls(llama(), ids(), [TOKENS])
    with pytest.raises(SpecError, match="15 tokens as floats"):
        model(ids(), past_key_values=filled, use_cache=True)
    with pytest.raises(SpecError, match="StaticLayer"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")


def test_a_cache_without_a_list_of_layers_yet_and_a_used_one_work_too():
    model = with_policy(POLICIES["kv2"])
    whole = model(ids(), use_cache=False).logits
    cache = DynamicCache()
    assert cache.layers == []
    logits, cache = in_calls(model, ids(), [9, 6], cache)
    torch.testing.assert_close(logits, whole, rtol=1e-6, atol=1e-9)
    cache.reset()
    assert cache_bytes(cache) == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(in_calls(model, ids(), [TOKENS], cache)[0], whole, rtol=1e-6, atol=1e-9)
    cache.crop(-5)
    torch.testing.assert_close(in_calls(model, ids()[:, 10:], [5], cache)[0], whole[:, 10:], rtol=1e-6, atol=1e-9)


# kernels that read the codes ---------------------------------------------------------------------------------------------------------------


class FromCodes(TritonKVAttention):
    """As the Triton kernel, with the arithmetic of its reference, which runs here."""

    name = "test-from-codes"
    calls = 0

    def refuses(self, job):
        return refuses_codes(job)

    def __call__(self, x, parts, job):
        FromCodes.calls += 1
        return kv_attention(x, *(parts[n] for n in ("k", "k_scale", "v", "v_scale", "lengths")), bits=job.weight.format.bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_kernel_that_reads_codes_decodes_the_same_text(bits):
    spec = QuantSpec(format=Int(bits), granularity=PerHead(), scale="float16", when="dynamic")
    plain, fast = (with_policy(((spec, 0),) * 2, llama(dtype=torch.float32)) for _ in range(2))
    for policy in (m for m in fast.modules() if isinstance(m, KVCache)):
        policy.bind([FromCodes()])
    FromCodes.calls = 0
    expected, _ = in_calls(plain, ids(), [9] + [1] * 6)
    logits, _ = in_calls(fast, ids(), [9] + [1] * 6)
    assert FromCodes.calls == 2 * 6
    # float32 sums in another order
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[0, :3] = 0
    step = {"attention_mask": padding, "use_cache": True}
    a, b = (m(ids()[:, -1:], past_key_values=in_calls(m, ids()[:, :-1], [TOKENS - 1])[1], **step).logits for m in (plain, fast))
    assert FromCodes.calls == 2 * 6  # a mask is not the kernel's: codes are decoded
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_policy_says_why_no_kernel_reads_its_codes():
    reasons = {}
    symmetric = QuantSpec(format=Int(4), granularity=PerHead(), when="dynamic")
    for name, policy in {"window": KVCache(symmetric, 8), "zero point": KVCache(per_head(4)), "cpu": KVCache(symmetric)}.items():
        choice = policy.bind([TritonKVAttention()]).explain()
        assert choice.kernel.name == "reference-kv-attention" and policy.kernel is None
        reasons[name] = dict(choice.refused)["triton-kv-attention"]
    assert "window of floats" in reasons["window"] and "symmetric integers" in reasons["zero point"] and "runs on cuda" in reasons["cpu"]


# through recipes and checkpoints ----------------------------------------------------------------------------------------------------------


def quantized(*rules, model=None, batches=()):
    recipe = Recipe(rules=rules, solver=RTN(clip="none"))
    return quantize_model(load_in_memory(model or llama(dtype=torch.float32)), recipe, batches, registry=load_registry(), adapter=DecoderLM()).model


def written(model, folder):
    def companions(path):
        model.config.save_pretrained(path)
        model.generation_config.save_pretrained(path)

    return save(model, folder, source="transformers", adapter="decoder-lm", companions=companions, registry=load_registry())


@pytest.mark.parametrize("consumer", ["qcore", "transformers"])
def test_the_policy_comes_with_the_checkpoint(consumer, tmp_path):
    (keys, window), (values, _) = kivi(2, 4)
    model = quantized(Rule("*:weight", int_weight(8)), Rule("*:k", keys, window=window), Rule("*:v", values, window=window))
    manifest = written(model, tmp_path / "out")
    assert manifest.layout == "qcore"
    if consumer == "qcore":
        again = load(tmp_path / "out")
    else:
        import qcore.hf  # noqa: F401

        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="qcore")
    with torch.no_grad():
        logits, cache = in_calls(again, ids(), [9] + [1] * 6)
        assert all(isinstance(layer, QuantizedLayer) for layer in cache.layers)
        # float32 sums in another order
        torch.testing.assert_close(logits, model(ids(), use_cache=False).logits, rtol=1e-4, atol=1e-4)
        plain = quantized(Rule("*:weight", int_weight(8)))(ids(), use_cache=False).logits
        assert kl(plain, logits) > 1e-4
        new = again.generate(ids(), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(new, model.generate(ids(), max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_static_scales_are_calibrated_and_kept(tmp_path):
    spec = QuantSpec(format=Int(8), granularity=PerTensor())
    model = quantized(Rule("*:weight", int_weight(8)), Rule("*:[kv]", spec), batches=[ids(), ids() + 1])
    written(model, tmp_path / "out")
    again = load(tmp_path / "out")
    policies = [m for m in again.modules() if isinstance(m, KVCache)]
    assert len(policies) == 4 and all(float(p.parts["scale"]) > 0 for p in policies)
    logits, _ = in_calls(again, ids(), [1] * TOKENS)
    torch.testing.assert_close(logits, model(ids(), use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_of_latents_is_none_of_keys_and_values():
    """DeepSeek caches latents, from which keys and values are made anew at every step."""
    model = model_of("DeepseekV2")
    assert not any(s.cached for s in DecoderLM().topology(copy.deepcopy(model)).activations)
    recipe = Recipe(rules=(Rule("*:[kv]", per_head(4), window=0),), solver=RTN())
    plan = make_plan(load_in_memory(copy.deepcopy(model)), recipe, DecoderLM(), load_registry(), has_data=False)
    assert any("caches something else" in p for p in plan.problems)


def test_a_plan_of_static_scales_says_the_cache_once_for_all_layers():
    static = QuantSpec(format=Int(8), granularity=PerTensor(), when="static")
    recipe = Recipe(rules=(Rule("*:[kv]", static, window=0, observer=MSE()),), solver=RTN())
    plan = make_plan(load_in_memory(llama(dtype=torch.float32)), recipe, DecoderLM(), load_registry(), has_data=True)
    assert len(plan.cache["policies"]) == 2, "keys and values"


def test_a_recipe_may_quantize_the_cache_alone():
    loaded = load_in_memory(llama(dtype=torch.float32))
    registry = load_registry()
    recipe = Recipe(rules=(Rule("*:[kv]", per_head(4), window=0),), solver=RTN())
    plan = make_plan(loaded, recipe, DecoderLM(), registry, has_data=False)
    assert plan.problems == ()
    # of 2 heads of 16 channels, keys and values: 64 values of 4 bytes; packed 8 + 2 + 1 bytes a head
    assert plan.cache["bytes_per_token"] == {"before": 2 * 64 * 4, "after": 2 * 2 * 2 * 11}
    assert any("cache" in note and "per token" in note for note in plan.notes)
    assert plan.engines and all(any("run by qcore alone" in why for why in v.reasons) for v in plan.engines)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rule("*:k", QuantSpec(format=Int(1), granularity=PerHead(), when="dynamic"), window=0), "integers of 2 to 8 bits, got 1"),
        (Rule("*:k", QuantSpec(format=Int(4), granularity=PerTensor(), when="dynamic"), window=0), "may not wait for later tokens"),
        (Rule("*:v", QuantSpec(format=Int(4), granularity=PerGroup(12), when="dynamic"), window=0), "does not divide a head of 16"),
        (Rule("*:q", per_head(4), window=0), "is about a cache"),
    ],
    ids=lambda r: r if isinstance(r, str) else "",
)
def test_a_plan_refuses_policies_that_cannot_be_kept(rule, why):
    recipe = Recipe(rules=(Rule("*:weight", int_weight(8)), rule), solver=RTN())
    plan = make_plan(load_in_memory(llama(dtype=torch.float32)), recipe, DecoderLM(), load_registry(), has_data=False)
    assert any(why in p for p in plan.problems), plan.problems
