"""The eight things that the central types must be able to say, each as small as it can be.

If one of these needs a special case somewhere, the types are wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from qcore.calibration import Gram
from qcore.checkpoint import load, save
from qcore.checkpoint.journal import Journal
from qcore.errors import CalibrationError, CheckpointError
from qcore.model import Block, Invariance, Link, ModelAdapter, Port, RunContext, Site, Tap, Topology, tap
from qcore.modules.leaves import leaf_config
from qcore.modules.replace import register_stack
from qcore.numbers import Codebook, Int, PerChannel, PerGroup, QuantSpec, fake_quantize, int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.transforms.apply import apply_rewrite
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Insert, ModuleConfig, Put, Rewrite, Shift, rotate_link, scale_link
from qcore.transforms.rotate import HadamardRotate
from qcore.transforms.split import Part, split_leaf
from torch import Tensor, nn


@pytest.fixture
def registry() -> Registry:
    return Registry("")


class RMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rope(x: Tensor) -> Tensor:
    """Llama's rotary embedding: channel i turns with channel i + half.  [B, H, T, D]"""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * torch.pow(10.0, -torch.arange(half) / half)[None, :]
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """4 query heads on 2 key heads of 8, with norms on q and k, and taps on q, k and v."""

    heads, kv, dim = 4, 2, 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.dim), RMSNorm(self.dim)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.dim)).transpose(1, 2)

        q, k, v = rope(self.q_norm(split(self.q_proj(x)))), rope(self.k_norm(split(self.k_proj(x)))), split(self.v_proj(x))
        q, k, v = tap(self, "q", q), tap(self, "k", k), tap(self, "v", v)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class DecoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(width), Attention(width), RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(blocks))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DecoderAdapter(ModelAdapter):
    name = "test-decoder"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Decoder)

    def topology(self, model: nn.Module) -> Topology:
        n = len(model.blocks)
        b = [f"blocks.{i}" for i in range(n)]
        width = model.embed.weight.shape[1]
        residual = Link(
            "residual",
            width,
            writes=(
                Port("embed.weight", "out"),
                *(Port(f"{p}.attn.o_proj.weight", "out") for p in b),
                *(Port(f"{p}.down.{x}", "out") for p in b for x in ("weight", "bias")),
            ),
            reads=(
                *(Port(f"{p}.attn.{x}_proj.weight", "in") for p in b for x in "qkv"),
                *(Port(f"{p}.up.weight", "in") for p in b),
                Port("head.weight", "in"),
            ),
            invariance=Invariance.ROTATE | Invariance.PERMUTE,
            through=(*(f"{p}.{x}" for p in b for x in ("norm1", "norm2")), "norm"),
        )
        s_qk = tuple(
            Link(f"{p}.k→q", 8, (Port(f"{p}.attn.k_norm.weight", "out"),), (Port(f"{p}.attn.q_norm.weight", "out"),), Invariance.SCALE, share="half")
            for p in b
        )
        stages = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.o_proj",), ("up",), ("down",))
        blocks = tuple(Block(p, tuple(tuple(Site(f"{p}.{m}") for m in stage) for stage in stages)) for p in b)
        return Topology(blocks, (residual, *s_qk), activations=tuple(Site(f"{p}.attn", t) for p in b for t in "qkv"))


def ids(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 50, (2, 12), generator=generator) for _ in range(count)]


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder().eval()


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"rules": (Rule("*:weight", int_weight(4, 16)),), "solver": GPTQ(), **changes})


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


# 1 -----------------------------------------------------------------------------------------------------------------------------------------


def test_a_rotation_with_many_writers_keeps_the_function():
    model = decoder().double()
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.weight.shape[0] == 32:
            module.weight.data.fill_(1.0)  # as folded
    link = DecoderAdapter().topology(model).links[0]
    assert len(link.writes) == 1 + 2 * 3 and len(link.reads) == 2 * 4 + 1
    r = torch.linalg.qr(torch.randn(1, 32, 32, dtype=torch.float64)).Q
    x = ids(1)[0]
    with torch.no_grad():
        assert relative(apply_rewrite(model, rotate_link(link, r))(x), model(x)) < 1e-12
        lone = Rewrite({link.writes[0].param: rotate_link(link, r).edits[link.writes[0].param]})
        assert relative(apply_rewrite(model, lone)(x), model(x)) > 1e-2


# 2 -----------------------------------------------------------------------------------------------------------------------------------------


def test_s_qk_goes_through_the_norms_of_q_and_k_one_scale_for_each_rope_pair():
    model = decoder().double()
    link = DecoderAdapter().topology(model).links[1]
    x = ids(1)[0]
    half = torch.rand(4, dtype=torch.float64) + 0.5
    with torch.no_grad():
        paired = apply_rewrite(model, scale_link(link, torch.cat([half, half])))
        assert relative(paired(x), model(x)) < 1e-12
        unpaired = apply_rewrite(model, scale_link(link, torch.cat([half, half.flip(0) + 0.1])))
        assert relative(unpaired(x), model(x)) > 1e-4


# 3 -----------------------------------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two fused experts; each sees the rows that were routed to it, with the router's affinity."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2, bias=False)
        self.up = nn.Parameter(torch.randn(2, 24, 16) / 4)
        self.down = nn.Parameter(torch.randn(2, 16, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        affinity, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e in range(2):
            rows = (chosen == e).nonzero().squeeze(-1)
            if not len(rows):
                continue
            h = tap(self, "up.input", flat[rows], rows=rows, weight=affinity[rows], part=e)
            h = F.relu(F.linear(h, self.up[e]))
            h = tap(self, "down.input", h, rows=rows, weight=affinity[rows], part=e)
            out[rows] = F.linear(h, self.down[e]) * affinity[rows, None]
        return out.reshape(x.shape)


class QuantizedExperts(Experts):
    """Its run-time form: packed matrices, unpacked when they are used."""

    def __init__(self, router: nn.Module, pieces: Mapping[tuple[str, int | None], Any]) -> None:
        nn.Module.__init__(self)
        self.router, self.pieces = router, pieces

    def dequantized(self, name: str) -> Tensor:
        return torch.stack(
            [s.packing.unpack(s.packing.pack(s.weight), s.weight.spec, s.weight.shape).dequantize() for (n, _), s in self.pieces.items() if n == name]
        )

    def __getattr__(self, name: str) -> Any:
        return self.dequantized(name) if name in ("up", "down") else super().__getattr__(name)


register_stack(lambda m: type(m) is Experts, lambda m, pieces: QuantizedExperts(m.router, pieces))


class ExpertsAdapter(ModelAdapter):
    name = "test-experts"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, nn.Sequential) and isinstance(model[0], Experts)

    def topology(self, model: nn.Module) -> Topology:
        stages = (tuple(Site("0", "up", part=e) for e in range(2)), tuple(Site("0", "down", part=e) for e in range(2)))
        return Topology((Block("0", stages, feed="rerun"),))

    def context(self, batch: Any) -> RunContext:
        valid = torch.ones(batch.shape[:2], dtype=torch.bool)
        valid[:, -1] = False  # the last row of each sequence is padding
        return RunContext(valid=valid)


@dataclass(frozen=True)
class KeepsGram:
    """Rounds to nearest, and notes the Gram matrix that it was given."""

    name: ClassVar[str] = "keeps-gram"
    grams: dict[int, Tensor]

    @property
    def observes(self) -> tuple[Gram]:
        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Mapping[str, Any], frozen: Tensor | None = None) -> Any:
        self.grams[len(self.grams)] = seen["gram"]
        return RTN().solve(weight, spec, {})


def test_each_expert_of_a_fused_stack_is_a_site_weighted_by_its_affinity(registry):
    torch.manual_seed(1)
    model = nn.Sequential(Experts()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 6, 16)
    flat = x.reshape(-1, 16)
    valid = (torch.arange(18) % 6) != 5
    affinity, chosen = model[0].router(flat).softmax(-1).max(-1)
    solver = KeepsGram({})
    q = quantize_model(
        load_in_memory(model),
        Recipe(rules=tuple(Rule(f"*:{name}[[]?[]]", int_weight(4, 8)) for name in ("up", "down")), solver=solver),
        [x],
        registry=registry,
        adapter=ExpertsAdapter(),
    )
    assert [r.site for r in q.sites] == ["0:up[0]", "0:up[1]", "0:down[0]", "0:down[1]"]
    for e in range(2):
        rows = flat[(chosen == e) & valid]
        w = affinity[(chosen == e) & valid]
        wanted = (rows * w[:, None]).T @ rows / w.sum()
        assert relative(solver.grams[e], wanted) < 1e-5
    assert not torch.equal(q.model[0].dequantized("up"), before["0.up"])
    assert relative(q.model[0].dequantized("up"), before["0.up"]) < 0.2


# 4 -----------------------------------------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A state-space mixer that reads its weights directly: no hook ever fires on dt_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj, self.out_proj = nn.Linear(8, 16, bias=False), nn.Linear(2, 16), nn.Linear(16, 8, bias=False)
        self.x_proj = nn.Linear(16, 2 + 4 + 4, bias=False)
        self.A_log = nn.Parameter(torch.rand(16, 4))

    def scan(self, x: Tensor, delta: Tensor, b: Tensor, c: Tensor, see: Any) -> Tensor:
        h = torch.zeros(x.shape[0], 16, 4, dtype=x.dtype)
        out = []
        for t in range(x.shape[1]):
            h = torch.exp(-delta[:, t, :, None] * self.A_log.exp()) * h + delta[:, t, :, None] * b[:, t, None, :] * x[:, t, :, None]
            out.append((see(h) * c[:, t, None, :]).sum(-1))
        return torch.stack(out, 1)

    def forward(self, u: Tensor) -> Tensor:
        x = F.silu(self.in_proj(u))
        delta, b, c = self.x_proj(x).split([2, 4, 4], -1)
        delta = F.softplus(delta @ self.dt_proj.weight.T + self.dt_proj.bias)
        return self.out_proj(self.scan(x, delta, b, c, lambda h: h))


class TappedMixer(Mixer):
    """The same function with the same parameter names: dt_proj is called as a module, and h is tapped."""

    def forward(self, u: Tensor) -> Tensor:
        x = F.silu(self.in_proj(u))
        delta, b, c = self.x_proj(x).split([2, 4, 4], -1)
        delta = F.softplus(self.dt_proj(delta))
        return self.out_proj(self.scan(x, delta, b, c, lambda h: tap(self, "h", h)))


class MixerAdapter(ModelAdapter):
    name = "test-mixer"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, nn.Sequential) and isinstance(model[0], Mixer)

    def prepare(self, model: nn.Module) -> None:
        if not isinstance(model[0], TappedMixer):
            twin = TappedMixer()
            twin._modules, twin._parameters = model[0]._modules, model[0]._parameters
            model[0] = twin

    def topology(self, model: nn.Module) -> Topology:
        stages = tuple((Site(f"0.{n}"),) for n in ("in_proj", "x_proj", "dt_proj", "out_proj"))
        return Topology((Block("0", stages, feed="rerun"),), activations=(Site("0", "h"),))


def test_taps_reach_inside_a_mixer_that_reads_its_weights_directly(registry):
    torch.manual_seed(2)
    model = nn.Sequential(Mixer()).eval().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = model(x)
    names = list(model.state_dict())
    MixerAdapter().prepare(model)
    assert list(model.state_dict()) == names and relative(model(x), plain) < 1e-12
    seen: list[Tensor] = []

    class Note(Tap):
        def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
            seen.append(x)
            return x

    from qcore.model.tap import attach, detach

    note = Note()
    attach(model[0], "h", note)
    model(x)
    detach(model[0], "h", note)
    assert len(seen) == 5 and seen[0].shape == (2, 16, 4) and "taps" not in model[0]._modules
    solver = KeepsGram({})
    quantize_model(
        load_in_memory(model), recipe(solver=solver, rules=(Rule("*:weight", int_weight(8)),)), [x], registry=registry, adapter=MixerAdapter()
    )
    assert [g.shape[0] for g in solver.grams.values()] == [8, 16, 2, 16]


def test_a_site_that_no_batch_reaches_is_an_error_that_names_it(registry):
    class Blind(MixerAdapter):
        def prepare(self, model: nn.Module) -> None:
            pass  # the mixer stays as it is: dt_proj is never called

    with pytest.raises(CalibrationError, match=r"0\.dt_proj:input.*gram"):
        quantize_model(
            load_in_memory(nn.Sequential(Mixer())),
            recipe(rules=(Rule("*:weight", int_weight(8)),)),
            [torch.randn(1, 3, 8)],
            registry=registry,
            adapter=Blind(),
        )


# 5 -----------------------------------------------------------------------------------------------------------------------------------------


class CentreSplit(Transform):
    """conv 3×3 → a 1×1 convolution with the centres, beside the rest: the shape of coarse and fine weight splitting."""

    name = "test-centre-split"

    def fit(self, topology: Topology, specs: Any, seen: Any, model: nn.Module, reader: Any) -> Rewrite:
        rewrite = Rewrite()
        for site in topology.sites:
            conv = model.get_submodule(site.module)
            if not (isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)):
                continue
            w = reader[site.param].double()
            rest = torch.zeros_like(w)
            rest[..., 1:2, 1:2] = -w[..., 1:2, 1:2]
            leaf, port = leaf_config(conv), Port("", "out")
            coarse = Part({**leaf, "kernel_size": [1, 1], "padding": [0, 0], "bias": False}, {"weight": (Put(port, w[..., 1:2, 1:2].clone()),)})
            fine = Part(leaf, {"weight": (Shift(port, rest),)}, bias=True)
            rewrite = rewrite.then(split_leaf(site.module, conv, coarse, fine))
        return rewrite


def test_a_convolution_splits_into_a_sum_whose_leaves_are_solved_by_the_same_gptq(registry):
    from qcore.model.plain import PlainCNN

    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    model[2].weight.data[..., 1, 1] += 4 * torch.randn(4, 8)  # an identity branch was fused in: centres far out
    xs = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    twin = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    twin.load_state_dict(model.state_dict())
    y = twin(xs[0])
    rules = (Rule("*:weight", QuantSpec(format=Int(8), granularity=PerChannel(0))),)
    q = quantize_model(load_in_memory(model), recipe(rules=rules, transforms=(CentreSplit(),)), xs, registry=registry, adapter=PlainCNN())
    assert [r.site for r in q.sites] == ["0.coarse:weight", "0.fine:weight", "2.coarse:weight", "2.fine:weight"]
    assert [r.shape for r in q.sites] == [(8, 3), (8, 27), (4, 8), (4, 72)]
    assert relative(q.model(xs[0]), y) < 0.03


# 6 -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Codebook(3), Codebook(4, dim=2)], ids=str)
def test_gptq_solves_a_format_with_fitted_codebooks_and_the_checkpoint_keeps_them(fmt, registry, tmp_path):
    model = decoder()
    rules = (Rule("*:weight", QuantSpec(format=fmt, granularity=PerGroup(16))),)
    q = quantize_model(load_in_memory(model), recipe(rules=rules), ids(), registry=registry, adapter=DecoderAdapter())
    save(q.model, tmp_path / "out", registry=registry, adapter="test-decoder")
    back = load(tmp_path / "out", skeleton=decoder(5), registry=registry, adapter=DecoderAdapter())
    x = ids(1)[0]
    assert torch.equal(back(x), q.model(x))
    assert len(torch.unique(q.model.blocks[0].down.dequantize()[0, :16])) <= 2**fmt.bits * fmt.dim


# 7 -----------------------------------------------------------------------------------------------------------------------------------------


class FakeKV(Tap):
    """A KV policy in its simplest form: what enters the cache is on a 4-bit grid, one scale for each head and token."""

    name: ClassVar[str] = "test-fake-kv"

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return fake_quantize(x, int_activation(self.bits))

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FakeKV":
        return cls(**config)


class KVPolicy(Transform):
    name = "test-kv-policy"
    exact = False

    def fit(self, topology: Topology, specs: Any, seen: Any, model: nn.Module, reader: Any) -> Rewrite:
        return Rewrite(inserts={f"{b.module}.attn": Insert(ModuleConfig("test-fake-kv", {"bits": 2}), "tap:k") for b in topology.blocks}, exact=1.0)


def test_a_kv_policy_is_saved_and_works_in_the_reloaded_model(registry, tmp_path):
    registry.modules.add("test-fake-kv", FakeKV, "a-plug-in")
    x = ids(1)[0]
    plain = quantize_model(load_in_memory(decoder()), recipe(solver=RTN()), registry=registry, adapter=DecoderAdapter()).model
    q = quantize_model(load_in_memory(decoder()), recipe(solver=RTN(), transforms=(KVPolicy(),)), registry=registry, adapter=DecoderAdapter()).model
    assert relative(q(x), plain(x)) > 1e-3
    save(q, tmp_path / "out", registry=registry, adapter="test-decoder")
    back = load(tmp_path / "out", skeleton=decoder(5), registry=registry, adapter=DecoderAdapter())
    assert torch.equal(back(x), q(x))
    with pytest.raises(CheckpointError, match="a-plug-in"):
        load(tmp_path / "out", skeleton=decoder(5), registry=Registry(""), adapter=DecoderAdapter())


# 8 -----------------------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "transforms",
    [(), (KVPolicy(),), (HadamardRotate(residual=False, inner=False, online=("*.down:weight",)),)],
    ids=["plain", "taps", "online rotation"],
)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(registry, tmp_path, transforms):
    registry.modules.add("test-fake-kv", FakeKV, "a-plug-in")

    def run(folder: Path, die_at: int | None = None) -> dict[str, Tensor]:
        def progress(phase: str, done: int, total: int) -> None:
            if phase == "block" and done == die_at:
                raise Killed

        journal = Journal(folder, {"seed": 0})
        loaded, made = load_in_memory(decoder()), recipe(transforms=transforms)
        q = quantize_model(loaded, made, ids(), registry=registry, adapter=DecoderAdapter(), progress=progress, journal=journal)
        outputs.append(q.model(ids(1)[0]))
        return dict(q.model.state_dict())

    outputs: list[Tensor] = []
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=1)
    assert (tmp_path / "killed" / "block-00000.json").exists() and not (tmp_path / "killed" / "block-00001.json").exists()
    resumed = run(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert torch.equal(*outputs)
    with pytest.raises(CheckpointError, match="seed"):
        Journal(tmp_path / "killed", {"seed": 1})
