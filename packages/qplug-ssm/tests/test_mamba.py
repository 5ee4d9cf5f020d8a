"""Our mixers equal the families' own, topologies are true, and the decode with a cache equals the pass over a whole sequence."""

from functools import cache

import pytest
import torch
import transformers
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.calibration.runner import BlockFeed, BlockRunner
from qcore.errors import CalibrationError, SpecError
from qcore.model.topology import Invariance, Site
from qcore.testing import check_adapter
from qcore.testing.models import randomize
from qplug_ssm.mamba_adapter import MambaAdapter
from qplug_ssm.mixer import SelectiveMixer
from qplug_ssm.readout import Readout, scan
from qplug_ssm.testing import TinyMamba, VimMixer
from torch import Tensor, nn

COMMON = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Mamba": COMMON | {"state_size": 8, "time_step_rank": 5, "use_bias": True},
    "FalconMamba": COMMON | {"state_size": 8, "time_step_rank": 5},
    "Mamba2": COMMON | {"state_size": 8, "num_heads": 6, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8, "tie_word_embeddings": True},
    "Jamba": COMMON
    | {"num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    | {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2},
}
IDS = torch.randint(3, 40, (2, 13), generator=torch.Generator().manual_seed(0))


@cache
def family(name: str) -> nn.Module:
    cls = getattr(transformers, f"{name}ForCausalLM")
    config = cls.config_class(**FAMILIES[name])
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return randomize(cls(config)).double().eval().requires_grad_(False)


def vim(divide: bool = False, seed: int = 0) -> nn.Module:
    return randomize(TinyMamba(lambda: VimMixer(24, 32, rank=5, states=8, if_divide_out=divide)), seed).double().eval()


def mirrored() -> nn.Module:
    make = lambda: SelectiveMixer.fresh(24, 32, rank=5, states=8, directions="mirror", bias=True, x_bias=True, same=True, delta_floor=1e-4)
    return randomize(TinyMamba(make)).double().eval()


def prepared(model: nn.Module) -> nn.Module:
    import copy

    model = copy.deepcopy(model)
    MambaAdapter().prepare(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_topology_of_transformers_families_is_true(name):
    # transformers' norms, decays and scans pass through float32; a wrong link is off by 1e-2 and more
    check_adapter(MambaAdapter(), family(name), IDS, rtol=3e-5)


@pytest.mark.parametrize("divide", [False, True])
def test_topology_of_vims_blocks_is_true_and_both_directions_are_kept(divide):
    check_adapter(MambaAdapter(), vim(divide), IDS % 32, rtol=1e-9)


def test_topology_of_mirrored_blocks_is_true():
    check_adapter(MambaAdapter(), mirrored(), IDS % 32, rtol=1e-9)


def test_residual_streams_of_rms_norms_may_be_rotated_and_those_of_hybrids_are_left_alone():
    for name in ("Mamba", "FalconMamba", "Mamba2"):
        links = {link.name: link for link in MambaAdapter().topology(prepared(family(name))).links}
        assert Invariance.ROTATE in links["residual"].invariance, name
    assert "residual" not in {link.name for link in MambaAdapter().topology(prepared(family("Jamba"))).links}


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba2", "Jamba"])
def test_streaming_equals_parallel(name):
    model = prepared(family(name))
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        past, pieces = None, []
        for a, b in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 13)):
            out = model(IDS[:, a:b], use_cache=True, **{CACHE[name]: past})
            past = out[CACHE[name]]
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)  # norms in float32


CACHE = {"Mamba": "cache_params", "FalconMamba": "cache_params", "Mamba2": "cache_params", "Jamba": "past_key_values"}


def test_generation_is_that_of_transformers():
    model = family("Mamba")
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(prepared(model).generate(IDS, max_new_tokens=6, do_sample=False), expected)


def test_padding_on_the_left_does_not_matter():
    model = prepared(family("FalconMamba"))  # in_proj has no bias: transformers masks its input, not its output
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, attention_mask=mask, use_cache=False).logits[:, 4:], model(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )


def test_a_cache_with_a_state_but_no_convolution_inputs_is_refused():
    model = prepared(family("Mamba"))
    past = model(IDS[:, :4], use_cache=True).cache_params
    past.layers[0].conv_states[0] = None
    with pytest.raises(SpecError, match="layer 0 holds a state but no convolution inputs"):
        model(IDS[:, 4:5], use_cache=True, cache_params=past)


def test_a_mixer_that_looks_both_ways_refuses_to_decode():
    with pytest.raises(SpecError, match="both directions"):
        prepared(vim()).layers[0].mixer(torch.zeros(1, 1, 24).double(), cache_params=object())


def test_scan_is_its_recurrence_and_goes_on_from_any_state():
    g = torch.Generator().manual_seed(2)
    u, delta = (torch.rand(2, 71, 6, generator=g, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(2, 71, 1, 4, generator=g, dtype=torch.float64) for _ in range(2))
    A, h = -torch.rand(6, 4, generator=g, dtype=torch.float64), torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    y, last = scan(u, delta, A, B, C, Readout(), h)
    rows = []
    for t in range(71):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        rows.append((h * C[:, t]).sum(-1))
    torch.testing.assert_close(y, torch.stack(rows, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)


def observed(model: nn.Module, batch: Tensor, wanted: dict[Site, tuple[Observer, ...]]) -> dict[Site, Seen]:
    """What observers see in the first block."""
    adapter = MambaAdapter()
    feed = BlockFeed(model, adapter, adapter.topology(model).blocks, [batch])
    feed.start()
    return BlockRunner(feed, 0, model.get_submodule(feed.blocks[0].module)).observe(wanted)


def test_a_site_whose_tap_never_fires_is_an_error():
    # a readout has h and c, and no q
    with pytest.raises(CalibrationError, match=r"layers\.0\.mixer\.readout"):
        observed(prepared(vim()), IDS % 32, {Site("layers.0.mixer.readout", "q"): (AbsMax(),)})


def rows_seen(model: nn.Module, batch: Tensor, sites: list[Site]) -> dict[Site, int]:
    class Count(AbsMax):
        name = "count"

        def update(self, rows, weight=None):
            self.rows = getattr(self, "rows", 0) + rows.shape[-2]

        def fresh(self):
            return Count()

        def result(self):
            return self.rows

    seen = observed(model, batch, {s: (Count(),) for s in sites})
    return {s: seen[s]["count"] for s in sites}


def test_calibration_sees_every_row_at_conv_dt_proj_and_h():
    model = prepared(family("Mamba"))
    mixer = "backbone.layers.0.mixer"
    ids = torch.randint(3, 40, (2, 50), generator=torch.Generator().manual_seed(1))  # more than one chunk of the scan
    sites = [Site(f"{mixer}.{n}", t) for n, t in (("conv1d", "input"), ("dt_proj", "input"), ("readout", "h"), ("readout", "c"))]
    seen = rows_seen(model, ids, sites)
    # a causal convolution of 4 gives 3 outputs beyond its input: it is called with padding on both sides
    assert seen == {sites[0]: 2 * 53, sites[1]: 100, sites[2]: 100, sites[3]: 100}


def test_calibration_sees_every_row_of_both_directions():
    ids = torch.randint(3, 32, (2, 50), generator=torch.Generator().manual_seed(1))
    mixer = "layers.0.mixer"
    both = [Site(f"{mixer}.{n}", t) for n, t in (("dt_proj", "input"), ("dt_proj_b", "input"), ("readout", "h"), ("readout_b", "h"))]
    assert rows_seen(prepared(vim()), ids, both) == dict.fromkeys(both, 100)
    # one set of parts reads the sequence both ways: δ is made once, the state twice
    mirror = [Site(f"{mixer}.{n}", t) for n, t in (("dt_proj", "input"), ("readout", "h"), ("readout_mirror", "h"), ("readout_mirror", "c"))]
    assert rows_seen(mirrored(), ids, mirror) == dict.fromkeys(mirror, 100)
