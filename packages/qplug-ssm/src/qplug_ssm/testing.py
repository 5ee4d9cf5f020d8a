"""For tests: random checkpoints in the layout of published RWKV files, and tiny Mambas.

The recurrences here are written out once more, token by token, and share no code with the package.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def _norms(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    names = ["blocks.0.ln0", "ln_out", *(f"blocks.{i}.{n}" for i in range(layers) for n in ("ln1", "ln2", "att.ln_x"))]
    return {f"{n}.{p}": (width,) for n in names for p in ("weight", "bias")}


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=g) + 0.5 if name.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_x.weight", "ln_out.weight"))
        else torch.randn(shape, generator=g) / (shape[-1] ** 0.5 if len(shape) == 2 else 2)
        for name, shape in shapes.items()
    }  # fmt: skip


def rwkv7(layers: int = 3, width: int = 32, head: int = 16, ffn: int = 48, vocab: int = 40, seed: int = 0) -> Tensors:
    shapes = {"emb.weight": (vocab, width), "head.weight": (vocab, width)} | _norms(width, layers)
    for i in range(layers):
        att, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        shapes |= {f"{att}{n}": (1, 1, width) for n in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")}
        for n, rank in (("w", 6), ("a", 5), ("v", 4), ("g", 7)):
            shapes |= {f"{att}{n}1": (width, rank), f"{att}{n}2": (rank, width)}
        shapes[f"{att}r_k"] = (width // head, head)
        shapes |= {f"{att}{n}.weight": (width, width) for n in ("receptance", "key", "value", "output")}
        shapes |= {f"{f}x_k": (1, 1, width), f"{f}key.weight": (ffn, width), f"{f}value.weight": (width, ffn)}
    return _random(shapes, seed)


def rwkv6(layers: int = 3, width: int = 32, head: int = 16, ffn: int = 48, vocab: int = 40, seed: int = 0) -> Tensors:
    shapes = {"emb.weight": (vocab, width), "head.weight": (vocab, width)} | _norms(width, layers)
    for i in range(layers):
        att, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        shapes |= {f"{att}time_maa_{n}": (1, 1, width) for n in "xwkvrg"}
        shapes |= {f"{att}time_maa_w1": (width, 30), f"{att}time_maa_w2": (5, 6, width), f"{att}time_decay": (1, 1, width)}
        shapes |= {f"{att}time_decay_w1": (width, 7), f"{att}time_decay_w2": (7, width), f"{att}time_faaaa": (width // head, head)}
        shapes |= {f"{att}{n}.weight": (width, width) for n in ("receptance", "key", "value", "output", "gate")}
        shapes |= {f"{f}time_maa_k": (1, 1, width), f"{f}time_maa_r": (1, 1, width)}
        shapes |= {f"{f}key.weight": (ffn, width), f"{f}value.weight": (width, ffn), f"{f}receptance.weight": (width, width)}
    return _random(shapes, seed)


def _layer_norm(z: Tensors, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape, z[f"{name}.weight"], z[f"{name}.bias"], 1e-5)


def logits_of(z: Tensors, tokens: list[int], version: int) -> Tensor:
    """[T, V] float64, one token after the other."""
    z = {n: t.double().squeeze() if n.count(".") > 1 and t.ndim == 3 and t.shape[0] == 1 else t.double() for n, t in z.items()}
    layers = 1 + max(int(n.split(".")[1]) for n in z if n.startswith("blocks."))
    H, N = z["blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"].shape
    C = H * N
    last = [[torch.zeros(C).double(), torch.zeros(C).double(), torch.zeros(H, N, N).double()] for _ in range(layers)]
    rows = []
    for token in tokens:
        x = _layer_norm(z, "blocks.0.ln0", z["emb.weight"][token])
        v_first = torch.zeros(C).double()
        for i in range(layers):
            b = f"blocks.{i}"
            p = {n.removeprefix(f"{b}.att."): t for n, t in z.items() if n.startswith(f"{b}.att.")}
            f = {n.removeprefix(f"{b}.ffn."): t for n, t in z.items() if n.startswith(f"{b}.ffn.")}
            xx = _layer_norm(z, f"{b}.ln1", x)
            step = _step7 if version == 7 else _step6
            y, last[i][2], v_first = step(p, xx, last[i][0], last[i][2], v_first, i, H, N)
            last[i][0] = xx
            x = x + y
            xx = _layer_norm(z, f"{b}.ln2", x)
            d = last[i][1] - xx
            if version == 7:
                x = x + f["value.weight"] @ (f["key.weight"] @ (xx + d * f["x_k"])).relu() ** 2
            else:
                r = torch.sigmoid(f["receptance.weight"] @ (xx + d * f["time_maa_r"]))
                x = x + r * (f["value.weight"] @ (f["key.weight"] @ (xx + d * f["time_maa_k"])).relu() ** 2)
            last[i][1] = xx
        rows.append(z["head.weight"] @ _layer_norm(z, "ln_out", x))
    return torch.stack(rows)


def _step7(p: Tensors, x: Tensor, before: Tensor, S: Tensor, v_first: Tensor, layer: int, H: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    d = before - x
    r, k, v = (p[f"{w}.weight"] @ (x + d * p[f"x_{m}"]) for w, m in (("receptance", "r"), ("key", "k"), ("value", "v")))
    w = torch.exp(-torch.exp(torch.tensor(-0.5).double()) * torch.sigmoid(p["w0"] + torch.tanh((x + d * p["x_w"]) @ p["w1"]) @ p["w2"]))
    a = torch.sigmoid(p["a0"] + (x + d * p["x_a"]) @ p["a1"] @ p["a2"])
    g = torch.sigmoid((x + d * p["x_g"]) @ p["g1"]) @ p["g2"]
    if layer == 0:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + (x + d * p["x_v"]) @ p["v1"] @ p["v2"])
    kk = F.normalize((k * p["k_k"]).view(H, N), dim=-1)
    k = k * (1 + (a - 1) * p["k_a"])
    rh, kh, vh, wh, ah = (t.view(H, N) for t in (r, k, v, w, a))
    out = []
    S = S.clone()
    for h in range(H):
        S[h] = S[h] * wh[h] - torch.outer(S[h] @ kk[h], kk[h] * ah[h]) + torch.outer(vh[h], kh[h])
        out.append(S[h] @ rh[h])
    y = F.group_norm(torch.cat(out).unsqueeze(0), H, p["ln_x.weight"], p["ln_x.bias"], 64e-5)[0]
    y = y + ((rh * kh * p["r_k"]).sum(-1, keepdim=True) * vh).flatten()
    return p["output.weight"] @ (y * g), S, v_first


def _step6(p: Tensors, x: Tensor, before: Tensor, S: Tensor, v_first: Tensor, layer: int, H: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    d = before - x
    low = torch.tanh((x + d * p["time_maa_x"]) @ p["time_maa_w1"]).view(5, -1)
    mw, mk, mv, mr, mg = (low[i] @ p["time_maa_w2"][i] for i in range(5))
    r = (p["receptance.weight"] @ (x + d * (p["time_maa_r"] + mr))).view(H, N)
    k = (p["key.weight"] @ (x + d * (p["time_maa_k"] + mk))).view(H, N)
    v = (p["value.weight"] @ (x + d * (p["time_maa_v"] + mv))).view(H, N)
    g = F.silu(p["gate.weight"] @ (x + d * (p["time_maa_g"] + mg)))
    w = torch.exp(-torch.exp(p["time_decay"] + torch.tanh((x + d * (p["time_maa_w"] + mw)) @ p["time_decay_w1"]) @ p["time_decay_w2"])).view(H, N)
    out = []
    S = S.clone()
    for h in range(H):
        kv = torch.outer(k[h], v[h])
        out.append(r[h] @ (p["time_faaaa"][h].unsqueeze(1) * kv + S[h]))
        S[h] = kv + w[h].unsqueeze(1) * S[h]
    y = F.group_norm(torch.cat(out).unsqueeze(0), H, p["ln_x.weight"], p["ln_x.bias"], 64e-5)[0]
    return p["output.weight"] @ (y * g), S, v_first


class VimMixer(nn.Module):
    """Vim's bidirectional mixer (bimamba v2) with the published parameter names, functional as the original, written for clarity."""

    def __init__(self, width: int, inner: int, rank: int, states: int, kernel: int = 4, if_divide_out: bool = False) -> None:
        super().__init__()
        self.if_divide_out = if_divide_out
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        for tail in ("", "_b"):
            self.add_module(f"conv1d{tail}", nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1))
            self.add_module(f"x_proj{tail}", nn.Linear(inner, rank + 2 * states, bias=False))
            self.add_module(f"dt_proj{tail}", nn.Linear(rank, inner))
            self.register_parameter(f"D{tail}", nn.Parameter(torch.ones(inner)))
        self.A_log, self.A_b_log = nn.Parameter(torch.zeros(inner, states)), nn.Parameter(torch.zeros(inner, states))

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, -1)
        y = self._one(x, z, "", self.A_log) + self._one(x.flip(1), z.flip(1), "_b", self.A_b_log).flip(1)
        return self.out_proj(y / 2 if self.if_divide_out else y)

    def _one(self, x: Tensor, z: Tensor, tail: str, a_log: Tensor) -> Tensor:
        conv, x_proj, dt_proj = (getattr(self, f"{n}{tail}") for n in ("conv1d", "x_proj", "dt_proj"))
        u = F.silu(F.conv1d(x.mT, conv.weight, conv.bias, padding=conv.padding[0], groups=conv.groups)[..., : x.shape[1]].mT)
        states = a_log.shape[1]
        delta, B, C = (u @ x_proj.weight.T).split([x_proj.out_features - 2 * states, states, states], -1)
        delta = F.softplus(delta @ dt_proj.weight.T + dt_proj.bias)
        h, rows = torch.zeros(len(x), *a_log.shape).to(x), []
        for t in range(x.shape[1]):
            h = torch.exp(-a_log.exp() * delta[:, t, :, None]) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            rows.append((h * C[:, t, None]).sum(-1) + getattr(self, f"D{tail}") * u[:, t])
        return torch.stack(rows, 1) * F.silu(z)


class RMSNorm(nn.Module):
    """x / rms(x) ∘ weight, in the dtype of x: float64 stays float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class MambaBlock(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(width), mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class TinyMamba(nn.Module):
    """Tokens [B, T] → logits: an embedding, blocks around the mixers that `make` gives, a norm, a head.  All of it follows the dtype."""

    def __init__(self, make: Callable[[], nn.Module], width: int = 24, layers: int = 2, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(MambaBlock(width, make()) for _ in range(layers))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
