import pytest
import torch
from qkernels.int_pack import pack, packed_words, sign_extend, unpack


def bit_stream(codes: list[int], bits: int) -> int:
    """The row as one big integer: an independent way to say what the layout is."""
    return sum((c % (1 << bits)) << (i * bits) for i, c in enumerate(codes))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("word", [torch.uint8, torch.int32], ids=["uint8", "int32"])
@pytest.mark.parametrize("k", [1, 7, 8, 31, 33, 64])
def test_packed_row_is_the_bit_stream_and_unpacks(bits, word, k):
    codes = torch.randint(0, 1 << bits, (3, k), generator=torch.Generator().manual_seed(bits * k))
    packed = pack(codes, bits, word)
    assert packed.shape == (3, packed_words(k, bits, word)) and packed.dtype == word
    for row, own in zip(codes.tolist(), packed.view(torch.uint8).tolist(), strict=True):
        assert int.from_bytes(bytes(own), "little") == bit_stream(row, bits)
    assert torch.equal(unpack(packed, bits, k).long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_negative_codes_come_back_by_sign_extension(bits):
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8).reshape(1, -1)
    assert torch.equal(sign_extend(unpack(pack(codes, bits), bits, codes.shape[-1]), bits), codes)


def test_golden_words_of_compressed_tensors():
    # made with compressed-tensors 0.20: pack_to_int32 of -8 … 7 (4 bits) and of -4 … 3, -4 … -1 (3 bits), which adds 2^(b-1) first
    four = pack(torch.arange(16).unsqueeze(0), 4, torch.int32)
    assert [w & 0xFFFFFFFF for w in four.flatten().tolist()] == [0x76543210, 0xFEDCBA98]
    three = pack(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]), 3, torch.int32)
    assert [w & 0xFFFFFFFF for w in three.flatten().tolist()] == [0x88FAC688, 0x00000006]


def test_many_rows_are_packed_in_chunks_alike(monkeypatch):
    codes = torch.randint(0, 8, (50, 24), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, 3)
    monkeypatch.setattr("qkernels.int_pack.reference.CHUNK", 100)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 24).long(), codes)


def test_shapes_on_meta_and_empty():
    assert pack(torch.empty(2, 3, 10, dtype=torch.int8, device="meta"), 3).shape == (2, 3, 4)
    assert unpack(torch.empty(5, 2, dtype=torch.int32, device="meta"), 4, 12).shape == (5, 12)
    assert unpack(pack(torch.zeros(0, 12, dtype=torch.uint8), 4), 4, 12).shape == (0, 12)


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="take 2 words"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 4, 16)
