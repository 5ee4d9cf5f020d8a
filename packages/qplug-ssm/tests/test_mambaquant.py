"""MambaQuant's transforms keep the function, do what they are for, and their wrong variants fail."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from qcore.calibration.runner import BlockFeed, BlockRunner
from qcore.errors import SpecError
from qcore.model.reader import DictReader
from qcore.modules.hadamard import OnlineHadamard
from qcore.numbers import int_weight
from qcore.numbers.hadamard import hadamard, random_signs
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_module, check_observer
from qcore.testing.models import randomize
from qcore.transforms import FoldNorm, HadamardRotate
from qcore.transforms.apply import apply_rewrite
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Rewrite, RewrittenReader, Scale, rewritten_topology
from qplug_ssm.centre import CentreDelta, SubtractMean
from qplug_ssm.covariance import Covariance
from qplug_ssm.gain import GainSmooth, equalizing_scales
from qplug_ssm.klt import KLTRotate, equalizing_rotation, levelling
from qplug_ssm.mamba_adapter import MambaAdapter
from qplug_ssm.mambaquant import MambaSmooth, StateRotate, smoothing, to_smoothed
from qplug_ssm.mixer import SelectiveMixer
from qplug_ssm.readout import Readout, RotatedReadout, SmoothSiLU, hadamard_inverse, scan
from qplug_ssm.testing import TinyMamba, VimMixer
from torch import Tensor, nn

ADAPTER = MambaAdapter()
TOKENS = torch.randint(0, 32, (3, 41), generator=torch.Generator().manual_seed(0))
SMOOTH = MambaSmooth()
KLT = (KLTRotate(links="residual"), KLTRotate(links="*.delta"))
ONLINE = HadamardRotate(residual=False, inner=False, online=("*.out_proj:weight",))
EVERYTHING = (FoldNorm(), SMOOTH, *KLT, StateRotate(), CentreDelta(), ONLINE, GainSmooth())


def tiny(directions: str = "forward", rank: int = 6) -> nn.Module:
    if directions == "both":
        make = partial(VimMixer, 24, 32, rank=rank, states=8)
    elif directions == "mirror":
        make = partial(SelectiveMixer.fresh, 24, 32, rank=rank, states=8, directions="mirror", bias=True, x_bias=True, same=True, delta_floor=1e-4)
    else:
        make = partial(SelectiveMixer.fresh, 24, 32, rank=rank, states=8, bias=True)
    model = randomize(TinyMamba(make)).double().eval().requires_grad_(False)
    ADAPTER.prepare(model)
    return model


def fitted(model: nn.Module, *transforms: Transform) -> tuple[Rewrite, nn.Module]:
    """The transforms one after the other, each on what the one before leaves; and the rewritten model."""
    modules = load_registry().modules
    topology, rewrite = ADAPTER.topology(model), Rewrite()
    specs = {site: int_weight(8) for site in topology.sites}
    reader = DictReader({n: p.detach() for n, p in model.state_dict().items()})
    for transform in transforms:
        now, places = apply_rewrite(model, rewrite, modules), rewritten_topology(topology, rewrite)
        wants, seen = transform.wants(places, specs), {}
        if wants:
            feed = BlockFeed(now, ADAPTER, places.blocks, [TOKENS])
            feed.start()
            for index, block in enumerate(places.blocks):
                runner = BlockRunner(feed, index, now.get_submodule(block.module))
                seen |= runner.observe({s: o for s, o in wants.items() if s.module.startswith(f"{block.module}.")})
                feed.advance(runner.outputs())
        own_reader = RewrittenReader(reader, rewrite, model)
        rewrite = rewrite.then(transform.fit(places, specs, seen, now, own_reader))
    return rewrite, apply_rewrite(model, rewrite, modules)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def same(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> bool:
    a, b = logits(model), logits(other)
    return float((a - b).abs().max() / a.abs().max()) <= tolerance


# every transform keeps the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["forward", "both", "mirror"])
@pytest.mark.parametrize(
    "transforms",
    [
        (MambaSmooth(states=False, delta=False, conv=False),),
        (MambaSmooth(gate=False, delta=False, conv=False),),
        (MambaSmooth(gate=False, states=False, conv=False),),
        (MambaSmooth(gate=False, states=False, delta=False),),
        (FoldNorm(), KLT[0]),
        (KLT[1],),
        (StateRotate(states=False),),
        (StateRotate(channels=False),),
        (ONLINE,),
        (GainSmooth(),),
        (CentreDelta(),),
        EVERYTHING,
    ],
    ids=["S2", "S4", "S5", "S7", "R1", "R5", "S3+R3", "R4", "R2", "S1", "means", "everything"],
)
def test_the_function_stays(transforms, directions):
    model = tiny(directions)
    rewrite, other = fitted(model, *transforms)
    assert rewrite.edits or rewrite.inserts
    assert same(model, other)
    # and something did change: every claim is about other numbers
    changed = [
        n for n, p in other.named_parameters() if n in dict(model.named_parameters()) and not torch.equal(p, dict(model.named_parameters())[n])
    ]
    assert changed or rewrite.inserts


def test_transformers_mamba_is_rewritten_with_its_tied_head_and_decodes_as_before():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=24, num_hidden_layers=2, state_size=8, time_step_rank=6, tie_word_embeddings=True)
    )
    model = randomize(model).double().eval().requires_grad_(False)
    ADAPTER.prepare(model)
    _, other = fitted(model, *EVERYTHING)
    with torch.no_grad():
        expected, got = model(TOKENS, use_cache=False).logits, other(TOKENS, use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # transformers' norms compute in float32
        past, pieces = None, []
        for a, b in ((0, 9), (9, 10), (10, 11), (11, 41)):
            out = other(TOKENS[:, a:b], use_cache=True, cache_params=past)
            past = out.cache_params
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), got, rtol=1e-4, atol=1e-4)


def test_rewrites_survive_being_stored():
    model = tiny()
    rewrite, _ = fitted(model, *EVERYTHING)
    again = Rewrite.from_state(*rewrite.state())
    assert same(model, apply_rewrite(model, again, load_registry().modules))


# S2: S-SiLU ------------------------------------------------------------------------------------------------------------------------------


def test_s_silu_times_s_is_silu_of_the_unscaled():
    silu = SmoothSiLU(16).double()
    silu.s.uniform_(0.1, 10, generator=torch.Generator().manual_seed(0))
    z = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    torch.testing.assert_close(silu.s * silu(z / silu.s), F.silu(z), rtol=1e-14, atol=1e-15)
    check_module(silu.float(), torch.randn(3, 16))


def test_smoothing_z_without_s_silu_is_wrong():
    model = tiny()
    rewrite, _ = fitted(model, MambaSmooth(states=False, delta=False, conv=False))
    assert not same(model, apply_rewrite(model, replace(rewrite, inserts={})), 1e-3)


def test_scales_are_bounded_and_channels_that_never_fire_keep_theirs():
    x, w = torch.tensor([0.0, 1.0, 1e9, 1e-9, 4.0]), torch.tensor([1.0, 0.0, 1e-9, 1e9, 1.0])
    assert smoothing(x, w, 0.5).tolist() == [1.0, 1.0, 100.0, pytest.approx(0.01), 2.0]


# S4: the state ---------------------------------------------------------------------------------------------------------------------------


def recurrence(h: Tensor | None, s: Tensor | None = None, every_step: bool = False) -> Tensor:
    """y of a random recurrence with a state of its own, smoothed by s."""
    g = torch.Generator().manual_seed(3)
    u, delta = torch.randn(1, 20, 4, generator=g).double(), torch.rand(1, 20, 4, generator=g).double()
    B, C = torch.randn(1, 20, 1, 6, generator=g).double(), torch.randn(1, 20, 1, 6, generator=g).double()
    A = -torch.rand(4, 6, generator=g).double()
    if s is not None:
        B, C = B / s, C * s
    if every_step:
        # the other MulAdd of the released code: ln(1/s) in the exponent of every step
        assert s is not None and h is not None
        ys = []
        for t in range(20):
            h = torch.exp(delta[:, t, :, None] * A + torch.log(1 / s)) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t]
            ys.append((h * C[:, t]).sum(-1))
        return torch.stack(ys, 1)
    return scan(u, delta, A, B, C, Readout(), h)[0]


S = torch.tensor([0.05, 0.5, 1.0, 3.0, 10.0, 60.0]).double()


def test_a_smoothed_state_follows_the_same_recurrence_and_another_start_is_divided_once():
    torch.testing.assert_close(recurrence(None, S), recurrence(None), rtol=1e-12, atol=1e-12)
    h = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(recurrence(to_smoothed(h, S), S), recurrence(h), rtol=1e-12, atol=1e-12)
    assert float((recurrence(h, S) - recurrence(h)).abs().max()) > 1e-2  # the start was forgotten


def test_adding_ln_1_over_s_at_every_step_is_wrong():
    h = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(4)).double()
    assert float((recurrence(h, S, every_step=True) - recurrence(h)).abs().max()) > 1.0


class Cache:
    """What transformers' cache does, for one layer."""

    def __init__(self, conv=None, state=None):
        self.conv, self.state = conv, state

    def get_conv_state(self, *_, **__):
        return self.conv

    def get_recurrent_state(self, *_, **__):
        return self.state

    def update_conv_state(self, x, *_, conv_kernel_size, **__):
        whole = x if self.conv is None else torch.cat([self.conv, x], -1)
        self.conv = F.pad(whole, (max(0, conv_kernel_size - whole.shape[-1]), 0))[..., -conv_kernel_size:]
        return whole

    def update_recurrent_state(self, state, *_):
        self.state = state


def scales_of_b(rewrite: Rewrite) -> Tensor:
    """What S4 multiplies the rows of B by, 1/s, in the first layer of `tiny()`: rank 6, 8 states."""
    return next(e.by for e in rewrite.edits["layers.0.mixer.x_proj.weight"] if isinstance(e, Scale) and e.port.channels == (range(6, 14),))


def test_streaming_equals_parallel_in_the_smoothed_basis():
    """float64, token by token; with everything in place the cache keeps h/s of the float model's h: no step divides it again."""
    model = tiny()
    x = torch.randn(2, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    rewrite, other = fitted(model, SMOOTH, KLT[1], StateRotate(), CentreDelta(), ONLINE)
    mixer, rewritten = model.layers[0].mixer, other.layers[0].mixer
    float_cache, cache = Cache(), Cache()
    with torch.no_grad():
        whole = rewritten(x)
        pieces = [rewritten(x[:, t : t + 1], cache) for t in range(12)]
        for t in range(12):
            mixer(x[:, t : t + 1], float_cache)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole, mixer(x), rtol=1e-9, atol=1e-10)
    # R3 and R4 act on what is read of the state, not on the state
    torch.testing.assert_close(cache.state, to_smoothed(float_cache.state, 1 / scales_of_b(rewrite)), rtol=1e-9, atol=1e-12)
    assert float((cache.state - float_cache.state).abs().max()) > 1e-2


def test_a_state_of_the_float_model_goes_on_in_the_smoothed_one():
    model = tiny()
    mixer = model.layers[0].mixer
    rewrite, other = fitted(model, MambaSmooth(gate=False, delta=False, conv=False))
    x = torch.randn(2, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    with torch.no_grad():
        cache = Cache()
        mixer(x[:, :7], cache)
        moved = Cache(cache.conv, to_smoothed(cache.state, 1 / scales_of_b(rewrite)))
        torch.testing.assert_close(other.layers[0].mixer(x[:, 7:], moved), mixer(x[:, 7:], cache), rtol=1e-9, atol=1e-10)


# R1, R5: KLT -----------------------------------------------------------------------------------------------------------------------------


def anisotropic(m: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64)).Q
    return torch.randn(4000, m, generator=g, dtype=torch.float64) @ (torch.logspace(-1, 1, m).double().diag() @ mix) + 3


def spread(x: Tensor) -> float:
    v = x.var(0, correction=0)
    return float(v.max() / v.min())


@pytest.mark.parametrize("m", [16, 12, 48])
def test_after_kh_all_channels_have_one_variance_and_after_h_alone_they_do_not(m):
    x = anisotropic(m)
    covariance = Covariance()
    covariance.update(x)
    R = equalizing_rotation(covariance.result())
    torch.testing.assert_close(R.T @ R, torch.eye(m).double(), rtol=0, atol=1e-12)
    assert spread(x @ R) <= 1 + 1e-5
    assert spread(x @ hadamard(m)) > 1.5
    # the other orientation keeps the function as well, and is what the released code does
    assert spread(x @ R.T) > 1.5


@pytest.mark.parametrize("m", [5, 6, 10])
def test_sizes_without_a_hadamard_matrix_are_levelled_by_plane_rotations(m):
    x = anisotropic(m)
    R = equalizing_rotation(torch.cov(x.T))
    torch.testing.assert_close(R.T @ R, torch.eye(m).double(), rtol=0, atol=1e-12)
    assert spread(x @ R) <= 1 + 1e-5
    assert torch.equal(levelling(torch.ones(4)), torch.eye(4).double())


@pytest.mark.parametrize("covariance", [torch.zeros(12, 12), torch.eye(12), torch.ones(12, 12)], ids=["none", "all alike", "one direction"])
def test_any_basis_will_do_where_variances_are_degenerate(covariance):
    R = equalizing_rotation(covariance.double())
    torch.testing.assert_close(R.T @ R, torch.eye(12).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((R.T @ covariance.double() @ R).diagonal(), covariance.double().trace().expand(12) / 12, rtol=1e-9, atol=1e-12)


def test_a_rank_without_a_hadamard_size_can_be_refused():
    with pytest.raises(SpecError, match="no Hadamard matrix of size 6"):
        fitted(tiny(rank=6), KLTRotate(links="*.delta", odd_sizes="refuse"))


def test_delta_has_one_variance_on_every_channel_in_the_rewritten_model():
    model = tiny(rank=12)
    _, other = fitted(model, KLT[1])
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    for name, m in (("before", model), ("after", other)):
        hook = m.layers[0].mixer.dt_proj.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1)))
        logits(m)
        hook.remove()
    assert spread(seen["before"][0]) > 1.5 and spread(seen["after"][0]) <= 1 + 1e-5


def test_covariance_is_an_observer():
    check_observer(Covariance())


# S3, R3, R4 ------------------------------------------------------------------------------------------------------------------------------


def test_rotated_readout_is_a_run_time_module_and_refuses_sizes_without_a_matrix():
    module = RotatedReadout(12, 8)
    module.scale.uniform_(0.5, 2)
    check_module(module, torch.randn(2, 3, 12, 8), torch.randn(2, 3, 1, 8))
    with pytest.raises(SpecError, match=r"no Hadamard matrix of size 6 .* states"):
        RotatedReadout(12, 6)


@pytest.mark.parametrize("n", [8, 12, 24, 384])
def test_the_way_back_undoes_an_online_rotation(n):
    online = OnlineHadamard(n, n, random_signs(n, 0)).double()
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_inverse(online(x), online.signs), x, rtol=1e-12, atol=1e-12)


def test_state_rotation_spreads_an_outlying_channel_and_says_what_it_leaves_out():
    model = tiny()
    with torch.no_grad():
        model.layers[0].mixer.conv1d.weight[3] *= 50
    peaks = {}
    for name, m in (("before", model), ("after", fitted(model, StateRotate())[1])):
        seen: list[Tensor] = []
        readout = m.layers[0].mixer.readout
        original = readout.multiply
        readout.multiply = lambda h, c, seen=seen, original=original: (seen.append(h), original(h, c))[1]
        logits(m)
        peaks[name] = float(max(h.abs().max() for h in seen) / torch.cat([h.flatten() for h in seen]).square().mean().sqrt())
    assert peaks["after"] < 0.5 * peaks["before"]


# S1 and means ----------------------------------------------------------------------------------------------------------------------------


def test_after_s1_every_column_of_in_proj_has_half_the_largest_maximum():
    model = tiny()
    _, other = fitted(model, FoldNorm(), KLT[0], GainSmooth())
    before, after = (m.layers[0].mixer.in_proj.weight.abs().amax(0) for m in (fitted(model, FoldNorm(), KLT[0])[1], other))
    torch.testing.assert_close(after, before.max().expand_as(after) / 2, rtol=1e-9, atol=0)
    # a column without weights stays as it is, and no scale leaves [0.01, 100]
    assert equalizing_scales(torch.tensor([0.0, 1e-9, 1.0, 8.0]).double()).tolist() == [1.0, 100.0, 4.0, 0.5]


def inputs_of_dt_proj(model: nn.Module, tail: str = "") -> Tensor:
    """What the weight of dt_proj is multiplied with in the first layer, [T, rank]."""
    module, seen = getattr(model.layers[0].mixer, f"dt_proj{tail}"), []
    hook = getattr(module, "leaf", module).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(model)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(("directions", "tails"), [("forward", ("",)), ("both", ("", "_b")), ("mirror", ("",))])
def test_delta_loses_its_mean_and_equal_variances_stay(directions, tails):
    model = tiny(directions, rank=12)
    rewrite, other = fitted(model, KLT[1], CentreDelta())
    for tail in tails:
        before, after = (inputs_of_dt_proj(m, tail) for m in (model, other))
        assert float(before.mean(0).abs().max()) > 1e-2 and float(after.mean(0).abs().max()) < 1e-6  # the mean is kept in float32
        assert spread(after) <= 1 + 1e-5
    # where x_proj has a bias, nothing is left to do at run time
    assert {i.module.type for i in rewrite.inserts.values()} == (set() if directions == "mirror" else {"subtract-mean"})
    check_module(SubtractMean(4), torch.randn(3, 4))


def test_a_mean_without_its_share_in_the_bias_of_dt_proj_is_wrong():
    model = tiny()
    rewrite, _ = fitted(model, CentreDelta())
    without = replace(rewrite, edits={n: e for n, e in rewrite.edits.items() if not n.endswith("dt_proj.bias")})
    assert not same(model, apply_rewrite(model, without, load_registry().modules), 1e-4)


# order -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "why"),
    [
        ((FoldNorm(), GainSmooth(), KLT[0]), "whose gains differ"),
        ((StateRotate(), SMOOTH), "states are rotated already"),
        ((ONLINE, SMOOTH), "put a module"),
        ((CentreDelta(), KLT[1]), "no link that may be rotated"),
        ((StateRotate(), StateRotate()), "two transforms insert a module"),
    ],
    ids=["S1 before R1", "S4 after R4", "S2 after R2", "R5 after means", "R3 twice"],
)
def test_an_order_that_would_not_keep_the_function_is_refused(transforms, why):
    with pytest.raises(SpecError, match=why):
        fitted(tiny(), *transforms)


@pytest.mark.parametrize("name", ["mambaquant-w8a8", "mambaquant-w4a8"])
def test_recipes_smooth_first_then_rotate_then_centre(name):
    order = [t.name for t in load_recipe(name, load_registry()).transforms]
    assert order == ["fold-norm", "mamba-smooth", "klt", "state-rotate", "mamba-centre", "hadamard"]


def test_smoothing_that_scales_no_state_may_follow_a_rotation_of_states():
    model = tiny()
    assert same(model, fitted(model, StateRotate(), MambaSmooth(states=False))[1])


def test_what_is_not_there_is_noted():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=32, hidden_size=24, num_hidden_layers=2, state_size=8, num_heads=6, head_dim=8, expand=2, n_groups=1, chunk_size=8
    )
    model = randomize(Mamba2ForCausalLM(config)).double().eval().requires_grad_(False)
    ADAPTER.prepare(model)
    rewrite, other = fitted(copy.deepcopy(model), SMOOTH, CentreDelta(), GainSmooth())
    assert sum("no Mamba-1 mixer" in note for note in rewrite.notes) == 2
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
