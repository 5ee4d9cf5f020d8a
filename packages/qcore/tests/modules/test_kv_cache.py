"""Stores of keys and values: what a token becomes depends on its position alone, and nothing but packed codes is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.calibration.ranges import range_parts
from qcore.errors import SpecError
from qcore.modules.kv_cache import KVCache, bytes_per_token, kv_problem
from qcore.numbers import (
    FP8_E4M3,
    Codebook,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    QuantSpec,
    Tile,
    fake_quantize,
    int_weight,
    mx,
    nvfp4,
)
from qcore.plugins.registry import Registry

H, D = 2, 16


def dynamic(fmt, granularity, offset=Offset.NONE, scale="float32"):
    return QuantSpec(format=fmt, granularity=granularity, offset=offset, scale=scale, when="dynamic")


POLICIES = {
    "head 4": (dynamic(Int(4), PerHead(), Offset.CODE, "float16"), 0),
    "head 2, window": (dynamic(Int(2), PerHead(), Offset.VALUE), 5),
    "head 3 symmetric": (dynamic(Int(3), PerHead(H)), 0),
    "token 8": (dynamic(Int(8), PerToken()), 0),
    "group inside a head": (dynamic(Int(4), PerGroup(8), Offset.CODE), 3),
    "group of two heads": (dynamic(Int(4), PerGroup(32)), 0),
    "keys of KIVI": (dynamic(Int(2), Tile(4, 1), Offset.VALUE, "float16"), 4),
    "keys of KIVI without window": (dynamic(Int(3), Tile(4, 1), Offset.CODE), 0),
    "fp8": (dynamic(FP8_E4M3, PerHead()), 0),
    "mxfp4": (QuantSpec(format=mx().format, granularity=PerGroup(16), scale=mx().scale, when="dynamic"), 2),
}


def sequence(tokens=23, batch=2, seed=0):
    x = torch.randn(batch, H, tokens, D, generator=torch.Generator().manual_seed(seed))
    x[:, :, :, 3] *= 8  # a channel that stands out, as keys have
    return x


def appended(policy, x, cuts):
    store = policy.store()
    for piece in x.split(cuts, 2):
        values, _ = store.append(piece)
    return store, values


def as_seen(policy, x, cuts):
    """What every query sees of every token up to its own, put together from values and exceptions.  [T, B, H, S, D]; NaN where it may not look"""
    store, seen, n = policy.store(), [], 0
    for piece in x.split(cuts, 2):
        values, recent = store.append(piece)
        for i in range(piece.shape[2]):
            own = values.clone()
            width = recent.exact.shape[2]
            if width:
                at = slice(recent.start, recent.start + width)
                own[:, :, at] = torch.where(recent.still_exact()[i][:, None], recent.exact, own[:, :, at])
            full = torch.full_like(x, torch.nan)
            full[:, :, : n + i + 1] = own[:, :, : n + i + 1]
            seen.append(full)
        n += piece.shape[2]
    return torch.stack(seen)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cuts", [[1] * 23, [7, 1, 1, 14], [22, 1]], ids=["one by one", "mixed", "a prompt and a step"])
def test_streaming_gives_the_packed_bytes_of_one_shot(name, cuts):
    policy, x = KVCache(*POLICIES[name]), sequence()
    whole, values = appended(policy, x, [23])
    parts, again = appended(policy, x, cuts)
    assert whole.coded == parts.coded == policy.coded(23) > 0
    assert whole.packed.keys() == parts.packed.keys()
    assert all(torch.equal(whole.packed[k], parts.packed[k]) for k in whole.packed)
    assert torch.equal(whole.rest, parts.rest) and torch.equal(values, again)


@pytest.mark.parametrize("name", POLICIES)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=10, deadline=None)
def test_what_a_query_sees_does_not_depend_on_how_the_text_was_cut(name, cuts):
    policy, total = KVCache(*POLICIES[name]), sum(cuts)
    x = sequence(total, batch=1)
    whole, parts = as_seen(policy, x, [total]), as_seen(policy, x, cuts)
    assert torch.equal(whole.isnan(), parts.isnan())
    assert torch.equal(whole.nan_to_num(), parts.nan_to_num())


@pytest.mark.parametrize("name", POLICIES)
def test_a_query_sees_codes_up_to_its_window_and_floats_after(name):
    policy, x = KVCache(*POLICIES[name]), sequence(11, batch=1)
    final = appended(KVCache(policy.spec, 0), sequence(11, batch=1), [11])[1]  # whatever is in full groups is coded
    seen = as_seen(policy, x, [11])
    for t in range(11):
        n = policy.coded(t + 1)
        assert torch.equal(seen[t][:, :, :n], final[:, :, :n])
        assert torch.equal(seen[t][:, :, n : t + 1], x[:, :, n : t + 1])
    assert not torch.equal(final[:, :, :8], x[:, :, :8])


def test_one_scale_for_each_token_and_head_is_that_of_the_rows():
    """The same numbers as the spec gives for rows [T, H·D], which is how any other activation is quantized."""
    x = sequence()
    for granularity in (PerHead(H), PerToken(), PerGroup(8), PerGroup(32)):
        spec = dynamic(Int(4), granularity, Offset.CODE)
        rows = fake_quantize(x.transpose(1, 2).flatten(2), spec)
        assert torch.equal(appended(KVCache(spec), x, [23])[1].transpose(1, 2).flatten(2), rows)


def test_a_channel_that_stands_out_is_why_keys_are_quantized_per_channel():
    x = sequence(32)
    x[:, :, :, 3] += 20  # far from zero in every token: RoPE turns slowly there
    head, tile = (appended(KVCache(dynamic(Int(2), g, Offset.VALUE)), x, [32])[1] for g in (PerHead(), Tile(32, 1)))
    assert float((tile - x).square().mean()) < 0.5 * float((head - x).square().mean())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerHead(H), PerGroup(8)], ids=lambda g: g.name)
@pytest.mark.parametrize("offset", [Offset.NONE, Offset.CODE], ids=lambda o: o.value)
def test_static_scales_belong_to_the_policy_and_are_not_kept_again(granularity, offset):
    x, spec = sequence(), QuantSpec(format=Int(4), granularity=granularity, offset=offset)
    rows = x.transpose(1, 2).flatten(2)
    flat = rows.flatten(0, 1)
    ends = (flat.min(), flat.max()) if isinstance(granularity, PerTensor) else (flat.amin(0), flat.amax(0))
    parts = range_parts(ends, spec)
    store, values = appended(KVCache(spec, 0, parts), x, [9, 14])
    assert set(store.packed) == {"codes"}
    assert torch.equal(values.transpose(1, 2).flatten(2), fake_quantize(flat, spec, parts).reshape(rows.shape))


def test_what_is_kept_is_packed():
    store, _ = appended(KVCache(*POLICIES["head 4"]), sequence(20), [20])
    # of 16 channels of each token and head: 8 bytes of codes, a scale of 2, a zero point in a byte of its own
    assert store.nbytes() == 2 * H * 20 * (D // 2 + 2 + 1)
    assert bytes_per_token(POLICIES["head 4"][0], H, D) == H * 11
    for bits in (2, 3, 4, 8):
        policy = KVCache(dynamic(Int(bits), PerHead(), scale="float16"))
        assert appended(policy, sequence(20), [20])[0].nbytes() == 2 * H * 20 * (D * bits // 8 + 2)


@pytest.mark.parametrize("name", POLICIES)
def test_sequences_of_a_batch_are_chosen_and_repeated(name):
    policy, x = KVCache(*POLICIES[name]), sequence(20, batch=3)
    store, _ = appended(policy, x[:, :, :13], [13])
    store.apply(lambda t: t[torch.tensor([2, 0, 0])])
    values, _ = store.append(x[[2, 0, 0], :, 13:])
    assert torch.equal(values, appended(policy, x[[2, 0, 0]], [20])[1])


@pytest.mark.parametrize("name", ["head 4", "token 8", "fp8"])
def test_tokens_can_be_taken_back_where_each_is_coded_alone(name):
    policy, x = KVCache(*POLICIES[name]), sequence(20)
    store, _ = appended(policy, x, [15, 5])
    store.crop(8)
    assert store.length == 12
    assert torch.equal(store.append(x[:, :, 12:])[0], appended(policy, x, [20])[1])


@pytest.mark.parametrize("name", ["keys of KIVI", "head 2, window"])
def test_tokens_that_were_floats_before_others_came_cannot_be_taken_back(name):
    store, _ = appended(KVCache(*POLICIES[name]), sequence(20), [20])
    with pytest.raises(SpecError, match="cannot be taken back"):
        store.crop(6)


@pytest.mark.parametrize("name", POLICIES)
def test_what_lies_before_a_sliding_window_can_be_let_go(name):
    policy, x = KVCache(*POLICIES[name]), sequence(23)
    store, values = appended(policy, x[:, :, :14], [14])[0], appended(policy, x, [23])[1]
    before = store.nbytes()
    store.drop(7)
    assert store.dropped == 7 // policy.step * policy.step > 0 and store.length == 14 and store.nbytes() < before
    assert torch.equal(store.append(x[:, :, 14:])[0], values[:, :, store.dropped :])


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (dynamic(Int(1), PerHead()), "2 to 8 bits, got 1"),
        (dynamic(Codebook(4), PerHead()), "integers or minifloats"),
        (dynamic(Int(4), PerTensor()), "may not wait for later tokens"),
        (QuantSpec(format=nvfp4().format, granularity=PerGroup(16), scale=nvfp4().scale, when="dynamic"), "wait for later tokens"),
        (int_weight(4), "static scales of a cache are per tensor, channel"),
        (dynamic(Int(4), PerGroup(12)), "does not divide a head of 16"),
        (dynamic(Int(4), PerGroup(48)), "does not divide 2 heads of 16"),
        (dynamic(Int(4), Tile(4, 3)), "do not divide a head of 16"),
    ],
    ids=str,
)
def test_policies_that_cannot_be_kept_say_why(spec, why):
    assert why in str(kv_problem(spec, H, D))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_plain_data(name):
    policy = KVCache(*POLICIES[name])
    again = KVCache.from_config(policy.config(), Registry(""))
    assert (again.spec, again.window, again.config()) == (policy.spec, policy.window, policy.config())
    assert torch.equal(appended(again, sequence(), [23])[1], appended(policy, sequence(), [23])[1])
    with pytest.raises(SpecError, match="number of tokens"):
        KVCache.from_config(policy.config() | {"window": "all"}, Registry(""))
