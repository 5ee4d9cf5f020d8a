"""Tiny networks of every family shape, in plain torch, for tests: no weights to fetch, no transformers to import."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.tap import tap
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology

ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic of `model`, in place, values that hide nothing: no zero bias, no gain of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            else:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.2)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model


def tiny_mlp(act: type[nn.Module] = nn.ReLU, width: int = 24, seed: int = 0) -> nn.Sequential:
    """16 → width → width → 8, activations between."""
    net = nn.Sequential(nn.Linear(16, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 8))
    return randomize(net, seed).eval()  # type: ignore[return-value]


def tiny_cnn(act: type[nn.Module] = nn.ReLU, *, batch_norm: bool = True, seed: int = 0) -> nn.Sequential:
    """Images [B, 3, 12, 12]: convolution, depthwise, grouped and pointwise convolutions with batch norms, pooling, a linear head."""

    def norm(c: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(c)] if batch_norm else []

    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=not batch_norm), *norm(16), act()),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), *norm(16), act()),
        nn.Sequential(nn.Conv2d(16, 24, 1), *norm(24), act(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(24, 32, 3, groups=4, padding=1), *norm(32), act()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return randomize(net, seed).eval()  # type: ignore[return-value]


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight); offset = 1 is Gemma's way."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


@dataclass(frozen=True)
class TinyConfig:
    """heads, kv_heads: of attention; `norm_offset`: 1 for gains (1 + w); `rotary`: share of each head that RoPE turns"""

    vocabulary: int = 64
    hidden: int = 32
    intermediate: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    bias: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    rotary: float = 1.0
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["gated", "gelu"] = "gated"


class Attention(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.c, self.size = c, c.hidden // c.heads
        self.q_proj = nn.Linear(c.hidden, c.heads * self.size, bias=c.bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * self.size, bias=c.bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * self.size, bias=c.bias)
        self.o_proj = nn.Linear(c.heads * self.size, c.hidden, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.c.rotary:
            q, k = _rope(q, int(self.size * self.c.rotary)), _rope(k, int(self.size * self.c.rotary))
        q, k, v = (tap(self, name, x.transpose(1, 2).flatten(2)).unflatten(2, x.shape[1::2]).transpose(1, 2) for name, x in zip("qkv", (q, k, v)))
        groups = self.c.heads // self.c.kv_heads
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rope(x: Tensor, dims: int) -> Tensor:
    """Turn channels i and i + dims/2 of each head by an angle that grows with the position.  [B, H, T, d]"""
    turned, rest = x[..., :dims], x[..., dims:]
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) / 100 ** (torch.arange(dims // 2) / (dims // 2))
    cos, sin = (torch.cat([f, f], -1).to(x) for f in (angle.cos(), angle.sin()))
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class GatedMLP(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=c.bias)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=c.bias)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=c.bias)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, c: TinyConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = _norm(c)
        self.mlp = GatedMLP(c) if c.mlp == "gated" else GeluMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def _norm(c: TinyConfig) -> nn.Module:
    return RMSNorm(c.hidden, c.norm_offset) if c.norm == "rms" else nn.LayerNorm(c.hidden)


class TinyDecoder(nn.Module):
    """A decoder with the module names of Llama: tokens [B, T] → logits [B, T, V]."""

    def __init__(self, config: TinyConfig = TinyConfig()) -> None:
        super().__init__()
        c = self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocabulary, c.hidden)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.model.norm = _norm(c)
        self.lm_head = nn.Linear(c.hidden, c.vocabulary, bias=False)
        if c.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)  # type: ignore[operator]
        for layer in self.model.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.lm_head(self.model.norm(x))  # type: ignore[operator]


def tiny_decoder(seed: int = 0, **options: Any) -> TinyDecoder:
    """A Llama-like decoder with random weights; options are `TinyConfig`'s."""
    return randomize(TinyDecoder(TinyConfig(**options)), seed).eval()  # type: ignore[return-value]


def tiny_gpt(seed: int = 0, **options: Any) -> TinyDecoder:
    """A GPT-like decoder: LayerNorm with biases, GELU, no RoPE."""
    defaults = {"norm": "layer", "mlp": "gelu", "rotary": 0.0, "bias": True, "kv_heads": 4}
    return tiny_decoder(seed, **(defaults | options))


def tokens(batch: int = 2, length: int = 12, vocabulary: int = 64, seed: int = 0) -> Tensor:
    """Random token ids.  [B, T]"""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


class TinyDecoderAdapter(ModelAdapter):
    """The topology of `TinyDecoder` in all its variants: an example of every kind of link that a decoder has."""

    name: ClassVar[str] = "tiny-decoder"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, TinyDecoder)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, TinyDecoder)
        c = model.config
        blocks, links = [], []
        writes, reads, norms = [Port("model.embed_tokens.weight", "out")], [], []
        for i in range(c.layers):
            p = f"model.layers.{i}"
            qkv = [f"{p}.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj")]
            up = [f"{p}.mlp.{n}" for n in (("gate_proj", "up_proj") if c.mlp == "gated" else ("up_proj",))]
            o, down = f"{p}.self_attn.o_proj", f"{p}.mlp.down_proj"
            blocks.append(Block(p, stages=tuple(tuple(Site(m) for m in stage) for stage in (qkv, [o], up, [down]))))
            links += [
                self._norm_link(f"{p}.input_layernorm", qkv, c),
                self._norm_link(f"{p}.post_attention_layernorm", up, c),
                *self._attention_links(p, c),
                *self._mlp_links(p, c),
            ]
            writes += [port for m in (o, down) for port in _out(m, c.bias)]
            reads += [Port(f"{m}.weight", "in") for m in (*qkv, *up)]
            norms += [f"{p}.input_layernorm", f"{p}.post_attention_layernorm"]
        links.append(self._norm_link("model.norm", ["lm_head"], c))
        reads.append(Port("lm_head.weight", "in"))
        # a LayerNorm takes the mean over channels away, which no rotation leaves alone
        invariance = Invariance.PERMUTE | Invariance.ROTATE if c.norm == "rms" else Invariance.PERMUTE
        links.append(Link("residual", c.hidden, tuple(writes), tuple(reads), invariance, through=(*norms, "model.norm")))
        blocked = {
            Port("model.embed_tokens.weight", "in"): "token ids choose its rows",
            Port("lm_head.weight", "out"): "the logits are the model's output",
        }
        heads = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        taps = tuple(Site(f"{b.module}.self_attn", t, heads=n, head_dim=c.hidden // c.heads) for b in blocks for t, n in heads.items())
        return Topology(tuple(blocks), tuple(links), blocked, taps, tied_names(model))

    def _norm_link(self, norm: str, readers: list[str], c: TinyConfig) -> Link:
        writes = (Port(f"{norm}.weight", "out", gain=c.norm_offset), *([Port(f"{norm}.bias", "out")] if c.norm == "layer" else []))
        return Link(f"{norm}→{','.join(r.rpartition('.')[2] for r in readers)}", c.hidden, writes, _in(readers), Invariance.SCALE)

    def _attention_links(self, p: str, c: TinyConfig) -> list[Link]:
        q, k, v, o = (f"{p}.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
        size, groups = c.hidden // c.heads, c.heads // c.kv_heads
        values = Link(f"{p}.v→o", c.kv_heads * size, _out(v, c.bias), (Port(f"{o}.weight", "in", repeat=groups),), ALL, heads=c.kv_heads)
        keys = Link(
            f"{p}.q↔k",
            c.kv_heads * size,
            _out(k, c.bias),
            tuple(Port(port.param, "out", repeat=groups) for port in _out(q, c.bias)),
            Invariance.SCALE if c.rotary else ALL,
            heads=c.kv_heads,
            share="half" if c.rotary else "none",
            rotary_dims=int(size * c.rotary),
        )
        return [values, keys]

    def _mlp_links(self, p: str, c: TinyConfig) -> list[Link]:
        gate, up, down = (f"{p}.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj"))
        if c.mlp == "gelu":
            return [Link(f"{p}.up→down", c.intermediate, _out(up, c.bias), _in([down]), Invariance.PERMUTE)]
        return [
            Link(f"{p}.up→down", c.intermediate, _out(up, c.bias), _in([down]), Invariance.SCALE),
            Link(f"{p}.gate,up→down", c.intermediate, (*_out(gate, c.bias), *_out(up, c.bias)), _in([down]), Invariance.PERMUTE),
        ]


def _out(module: str, bias: bool) -> tuple[Port, ...]:
    return (Port(f"{module}.weight", "out"), *([Port(f"{module}.bias", "out")] if bias else []))


def _in(modules: list[str]) -> tuple[Port, ...]:
    return tuple(Port(f"{m}.weight", "in") for m in modules)
