"""The integer program as a whole: no float, no influence of neighbours, of padding or of the way to a token; and near to the model it stands for."""

import copy

import pytest
import torch
from qcore.errors import SpecError
from qcore.testing.integers import FloatFound, check_integer_module, only_integers
from qplug_llm.illm import PAPER, IntegerCache, Widths, lower
from qplug_llm.illm.decoder import IntegerBlock
from qplug_llm.illm.dyadic import Wide
from torch import Tensor, nn


def same(a: Wide, b: Wide, rows: object = slice(None), others: object = slice(None)) -> bool:
    return torch.equal(a.x[rows], b.x[others]) and torch.equal(a.k[rows], b.k[others])


def test_no_float_between_ids_and_logits(program, ids):
    operations = check_integer_module(program, lambda: program(ids))
    assert operations > 1000
    assert check_integer_module(program, lambda: program.generate(ids[:, :4], 3)) > 1000


@pytest.mark.parametrize("where", ["embedding", "block", "scalar"])
def test_the_audit_finds_a_planted_float(program, ids, where, monkeypatch):
    planted = copy.deepcopy(program)
    if where == "embedding":
        planted.embedding.codes = planted.embedding.codes.float()
        with pytest.raises(FloatFound, match=r"embedding\.codes is kept as torch\.float32"):
            check_integer_module(planted, lambda: planted(ids))
    elif where == "scalar":
        with pytest.raises(FloatFound, match=r"aten\.mul\.Tensor makes a tensor of torch\.float32"), only_integers():
            ids * 0.5
    else:
        own = IntegerBlock.forward

        def forward(self, x, *args):
            # a float that is rounded away at once: nothing of it is left in what comes out
            return own(self, Wide((x.x.double() + 0.0).long(), x.m, x.k), *args)

        monkeypatch.setattr(IntegerBlock, "forward", forward)
        with pytest.raises(FloatFound, match=r"makes a tensor of torch.float64 and shape \(3, 12, 48\)"):
            check_integer_module(planted, lambda: planted(ids))


def test_an_audit_of_nothing_fails(program):
    with pytest.raises(AssertionError, match="nothing was run"):
        check_integer_module(program, lambda: None)


def test_a_sequence_does_not_depend_on_its_batch(program, ids):
    together = program(ids)
    for i in range(3):
        assert same(together, program(ids[i : i + 1]), slice(i, i + 1))
    assert same(together, program(ids.flip(0)), slice(None), [2, 1, 0])


@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 7), (4, 1, 1, 6)])
def test_prefill_is_decode_bit_for_bit(program, ids, cuts):
    whole, cache, at = program(ids), IntegerCache(), 0
    for cut in cuts:
        piece = program(ids[:, at : at + cut], None, cache)
        assert torch.equal(piece.x, whole.x[:, at : at + cut]) and torch.equal(piece.k, whole.k[:, at : at + cut])
        at += cut
    assert cache.length == 12


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_what_is_in_it_have_no_influence(program, ids, side):
    pad, place = ids.new_full((3, 4), 7), slice(4, None) if side == "left" else slice(None, 12)
    parts = (pad, ids) if side == "left" else (ids, pad)
    valid = torch.cat([torch.full_like(p, p is ids, dtype=torch.bool) for p in parts], 1)
    padded = torch.cat(parts, 1)
    first, bare = program(padded, valid), program(ids)
    assert torch.equal(first.x[:, place], bare.x) and torch.equal(first.k[:, place], bare.k)
    other = program(torch.where(valid, padded, 55), valid)
    assert torch.equal(first.x[:, place], other.x[:, place])


def test_a_later_token_has_no_influence_on_an_earlier_one(program, ids):
    changed = ids.clone()
    changed[:, 8:] = 5
    assert torch.equal(program(ids).x[:, :8], program(changed).x[:, :8])


def test_two_runs_give_the_same_bits_and_logits_fit_int32(program, ids):
    one, two = program(ids), program(ids)
    assert same(one, two) and int(one.x.abs().max()) < 2**31


def test_generation_by_integers_is_the_argmax_of_every_prefix(program, ids):
    found = program.generate(ids, 3)
    text = ids
    for i in range(3):
        logits = program(text).x[:, -1]
        assert torch.equal(found[:, i], logits.argmax(-1))
        text = torch.cat([text, found[:, i : i + 1]], 1)
    valid = torch.cat([torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 12, dtype=torch.bool)], 1)
    padded = torch.cat([ids.new_full((3, 2), 9), ids], 1)
    assert torch.equal(program.generate(padded, 3, valid), found)


def test_a_text_beyond_the_rotary_tables_is_refused(run, ids):
    with pytest.raises(SpecError, match="12 tokens, but there are rotary tables for 8 positions"):
        lower(run, positions=8)(ids)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


def test_the_program_is_near_to_the_float_model_and_five_bits_between_operators_are_too_few(model, run, program, ids):
    with torch.no_grad():
        exact, fake = model(input_ids=ids).logits, run.model(input_ids=ids).logits
    # the quantized model keeps queries, keys, values and what lies between products in floats: .031 here, the program .044, PAPER .059
    assert distance(program(ids).dequantize(), exact) < 1.7 * distance(fake, exact)
    assert distance(lower(run, PAPER)(ids).dequantize(), exact) < 2 * distance(fake, exact)
    assert distance(lower(run, Widths(between=5))(ids).dequantize(), exact) > 3 * distance(fake, exact)


@pytest.mark.parametrize(
    ("field", "value"), [("between", 17), ("cache", 9), ("probabilities", 1), ("clip", 0), ("exp", "taylor"), ("rounding", "stochastic")]
)
def test_widths_out_of_range_are_refused(field, value):
    with pytest.raises(SpecError):
        Widths(**{field: value})


def test_narrow_caches_cost_more(run, model, ids):
    with torch.no_grad():
        exact = model(input_ids=ids).logits
    errors = [distance(lower(run, Widths(cache=bits))(ids).dequantize(), exact) for bits in (8, 4, 2)]
    assert errors == sorted(errors)


def test_the_cache_holds_codes_of_a_byte(program, ids):
    cache = IntegerCache()
    program(ids, None, cache)
    keys, values = cache.layers[1]
    assert keys.codes.dtype is values.codes.dtype is torch.uint8 and keys.codes.shape == (3, 2, 12, 8)
    assert isinstance(program, nn.Module) and not list(program.parameters())
