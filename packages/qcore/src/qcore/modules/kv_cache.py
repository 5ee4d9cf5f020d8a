"""Keys and values of a cache, quantized as they enter it and packed while they lie there.

What a query sees depends on positions alone, never on how a sequence was cut into calls: once n tokens are there, the first
`coded = G·⌊max(0, n - window) / G⌋` of them are codes and the rest are floats as they came (G: tokens that share a scale, 1 or the rows of a tile).
The query at position t has n = t + 1.  So one pass over a whole text, a prefill followed by steps, and steps alone give the same logits, and a
perplexity measured without a cache is that of decoding with one.

| granularity | shares a scale | known as |
|---|---|---|
| head | the channels of one head of one token | QuaRot, SpinQuant, OSTQuant |
| group (size) | `size` channels of one token, inside a head or over whole heads | KIVI's values |
| token | all heads of one token | |
| tile (rows, cols = 1) | `rows` tokens of one channel | KIVI's keys, https://arxiv.org/abs/2402.02750 |
| tensor, channel, head, group (static) | everything, or all tokens of these channels; calibrated | KVQuant's keys, without its outliers |

KIVI itself attends with floats while it reads the prompt, and its keys' window runs empty each time that a group is full; here a prompt is read as it
would be decoded, and a window never holds less than it says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.model.tap import Tap
from qcore.modules.runtime import RuntimeModule
from qcore.modules.stored import from_table, resolved, table_of
from qcore.numbers import (
    Float,
    Int,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    QTensor,
    QuantSpec,
    Tile,
    Unscaled,
    quantize,
    spec_from_dict,
    spec_to_dict,
)
from qcore.numbers.granularity import Granularity, Shape
from qcore.ops.kernel import CPU, Choice, Job, Kernel, choose
from qcore.ops.kv_attention import CODES, CODES_AND_WINDOW, ReferenceKVAttention, as_kernel_codes
from qcore.packing import Bits

_PACKING = Bits()


@dataclass(frozen=True)
class _OfHeads(Granularity):
    """Of a cache [B, H, S, D]: one scale for `heads` heads of one token, or, `tokens` = 0, of all tokens.  dims: channels of each; 0 = all"""

    name: ClassVar[str] = "heads"
    heads: int
    dims: int = 0
    tokens: int = 1

    def block(self, shape: Shape) -> Shape:
        b, h, s, d = shape
        return (1 if self.tokens else b, self.heads or h, self.tokens or s, self.dims or d)


def kv_problem(spec: QuantSpec, heads: int = 0, head_dim: int = 0) -> str | None:
    """Why keys or values cannot be kept so; None where they can.  heads, head_dim: 0 = not known"""
    fmt, g = spec.format, spec.granularity
    if isinstance(fmt, Int) and not 2 <= fmt.bits <= 8:
        return f"a cache of keys and values holds integers of 2 to 8 bits, got {fmt.bits}"
    if not isinstance(fmt, Int | Float):
        return f"a cache of keys and values holds integers or minifloats, got {fmt.name!r}, whose fitted numbers would change with every token"
    if spec.when == "static" and spec.scaled:
        if isinstance(g, PerGroup) and head_dim % g.size:
            return f"static groups of {g.size} channels do not divide a head of {head_dim}"
        known = isinstance(g, PerTensor | PerHead | PerGroup) or (isinstance(g, PerChannel) and g.axis in (1, -1))
        return None if known else f'static scales of a cache are per tensor, channel (axis 1), head or group, got {spec}; or when = "dynamic"'
    if not isinstance(g, PerHead | PerToken | PerGroup | Tile):
        return f"dynamic scales here are per head, token, group or tile (tokens of a channel), not {spec}: a scale may not wait for later tokens"
    if isinstance(spec.scale, QuantSpec) and isinstance(spec.scale.granularity, PerTensor):
        return f"{spec} has one scale of all scales, which would wait for later tokens; give the scales one per token"
    if head_dim and isinstance(g, PerGroup) and head_dim % g.size and g.size % head_dim:
        return f"group size {g.size} does not divide a head of {head_dim} channels; use granularity 'head', or a divisor of {head_dim}"
    if head_dim and isinstance(g, PerGroup) and heads * head_dim % g.size:
        return f"group size {g.size} does not divide {heads} heads of {head_dim} channels"
    if head_dim and isinstance(g, Tile) and head_dim % g.cols:
        return f"tiles of {g.cols} channels do not divide a head of {head_dim}; cols = 1 is one scale for each channel"
    return None


def _in_heads(spec: QuantSpec, heads: int, dim: int) -> QuantSpec:
    """What a spec of rows [T, H·D] says of a cache [B, H, S, D]."""
    g: Granularity = spec.granularity
    if spec.when == "static":
        # stored scales are [1, 1, 1, 1], [1, H, 1, D], [1, H, 1, 1] or [1, H, 1, D/G]
        dims = 1 if isinstance(g, PerChannel) else g.size if isinstance(g, PerGroup) else 0
        g = g if isinstance(g, PerTensor) else _OfHeads(1, dims, tokens=0)
    elif isinstance(g, PerHead):
        g = PerToken()
    elif isinstance(g, PerToken):
        g = _OfHeads(heads)
    elif isinstance(g, PerGroup) and g.size > dim:
        g = _OfHeads(g.size // dim)
    return replace(spec, granularity=g, when="static")


@dataclass(frozen=True)
class Recent:
    """What came through a cache beside the values: tokens that are codes by now, but that some queries of this call still see as floats.

    exact:  [B, H, W, D] their floats
    start:  where they lie among the values
    coded:  for each query of the call, how many of the values it sees as codes.  [T]
    store:  where the values are to be had; they were not decoded, since a kernel runs from the codes
    """

    exact: Tensor
    start: int
    coded: Tensor
    store: "KVStore | None" = None

    def still_exact(self) -> Tensor:
        """Which query sees which of these tokens as floats.  [T, W] bool"""
        at = torch.arange(self.start, self.start + self.exact.shape[2], device=self.coded.device)
        return at >= self.coded[:, None]

    def without(self, tokens: int) -> "Recent":
        """The same of values of which the first `tokens` were cut off."""
        return Recent(self.exact[:, :, max(0, tokens - self.start) :], max(0, self.start - tokens), self.coded - tokens)


class KVStore:
    """Keys or values of one layer, [B, H, S, D]: packed codes, then floats.

    policy: None keeps floats alone, for a layer of which only keys or only values are quantized
    """

    def __init__(self, policy: "KVCache | None") -> None:
        self.policy = policy
        self.packed: dict[str, Tensor] = {}
        self.rest: Tensor | None = None  # [B, H, ·, D] the tokens at the end that are floats
        self.coded = 0  # tokens in `packed`
        self.dropped = 0  # tokens that are gone from the front

    @property
    def length(self) -> int:
        """Tokens seen, those that are gone included."""
        return self.dropped + self.coded + (0 if self.rest is None else self.rest.shape[2])

    def append(self, x: Tensor, queries: int | None = None, decode: bool = True) -> tuple[Tensor, Recent]:
        """Add tokens [B, H, T, D]; returns all values that are there, as later queries see them, [B, H, S, D] of x's dtype, and the exceptions.

        queries: how many of them attend now, the last ones; None = all
        decode:  False for who runs a kernel on the codes: what comes back has the shape of the values and is NaN
        """
        rest = x if self.rest is None else torch.cat([self.rest, x], 2)
        begin, after = self.dropped + self.coded, self.length + x.shape[2]
        t = x.shape[2] if queries is None else queries
        now = torch.tensor([self._coded_of(after - t + i + 1) for i in range(t)])
        # floats that a sliding window let go are never coded
        until = max(begin, self._coded_of(after))
        first = max(begin, int(now[0]) if t else begin)
        if until > begin:
            self._keep(rest[:, :, : until - begin])
        self.rest = rest[:, :, until - begin :]
        recent = Recent(rest[:, :, first - begin : until - begin], first - self.dropped, (now - self.dropped).to(x.device))
        if self._sees_codes_at_once:
            # a token is a code in its own query, and no query sees those after it
            recent = Recent(rest[:, :, :0], 0, recent.coded)
        if not decode:
            b, h, _, d = x.shape
            return x.new_full((), torch.nan).expand(b, h, self.coded + self.rest.shape[2], d), replace(recent, store=self)
        return self.values(x.dtype), recent

    @property
    def _sees_codes_at_once(self) -> bool:
        return self.policy is None or (self.policy.window == 0 and self.policy.step == 1)

    def _coded_of(self, n: int) -> int:
        return 0 if self.policy is None else self.policy.coded(n)

    def _keep(self, x: Tensor) -> None:
        assert self.policy is not None
        q = quantize(x, self.policy.spec_of(x), self.policy.parts_of(x))
        new = _PACKING.pack(q)
        if self.policy.spec.when == "static":
            new = {"codes": new["codes"]}  # scales are the policy's own
        self.packed = {name: torch.cat([self.packed[name], part], 2) for name, part in new.items()} if self.packed else new
        self.coded += x.shape[2]

    def values(self, dtype: torch.dtype) -> Tensor:
        """Everything that is there.  [B, H, S, D]"""
        assert self.rest is not None
        if not self.coded:
            return self.rest
        return torch.cat([self.dequantize(self.rest).to(dtype), self.rest], 2)

    def dequantize(self, like: Tensor) -> Tensor:
        """The coded tokens.  [B, H, coded, D] float32.  like: any tensor [B, H, ·, D] of this cache"""
        assert self.policy is not None
        b, h, _, d = like.shape
        spec, shape = self.policy.spec_of(like), (b, h, self.coded, d)
        static = self.policy.parts_of(like)
        if static:
            codes = _PACKING.unpack(self.packed, QuantSpec(format=spec.format, granularity=Unscaled()), shape).codes
            return QTensor(spec, {"codes": codes, **static}, shape).dequantize()
        return _PACKING.unpack(self.packed, spec, shape).dequantize()

    def drop(self, tokens: int) -> None:
        """Let go of the first tokens, in whole groups of those that share scales: what a sliding window does not reach any more."""
        step, tokens = 1 if self.policy is None else self.policy.step, max(0, tokens)
        gone = min(tokens // step * step, self.coded)
        if gone:
            self.packed = {name: part[:, :, gone if name == "codes" else gone // step :] for name, part in self.packed.items()}
            self.coded -= gone
            self.dropped += gone
        if not self.coded and self.rest is not None and (left := min((tokens - gone) // step * step, self.rest.shape[2])):
            self.rest = self.rest[:, :, left:]
            self.dropped += left

    def crop(self, tokens: int) -> None:
        """Take the last tokens back.  SpecError where they were coded together with others, or where floats before them are gone."""
        if self.rest is None or tokens <= 0:
            return
        n = self.length - tokens
        if self._coded_of(n) < self.dropped + self.coded and not self._sees_codes_at_once:
            raise SpecError(
                f"{tokens} tokens cannot be taken back from a cache with window={self.policy.window if self.policy else 0}: tokens before them are "
                'codes already, and would be floats; use a policy without window and one scale per token (granularity = "head")'
            )
        floats = min(tokens, self.rest.shape[2])
        self.rest = self.rest[:, :, : self.rest.shape[2] - floats]
        if left := tokens - floats:
            self.packed = {name: part[:, :, : part.shape[2] - left] for name, part in self.packed.items()}
            self.coded -= left

    def apply(self, fn: Any) -> None:
        """Let `fn` change every tensor: choose or repeat sequences (axis 0), move to a device."""
        self.packed = {name: fn(part) for name, part in self.packed.items()}
        self.rest = None if self.rest is None else fn(self.rest)

    def nbytes(self) -> int:
        """Bytes of everything that is kept between two calls."""
        return sum(t.numel() * t.element_size() for t in (*self.packed.values(), *(() if self.rest is None else (self.rest,))))


class KVCache(Tap, RuntimeModule):
    """A policy for the keys or the values of one attention: what is stored, and how many tokens at the end stay float.

    spec:   of rows [T, H·D], as for any activation
    window: tokens at the end that are floats
    parts:  scale and offset of a static spec, [1, 1], [1, H·D] or one for each head or group
    shape:  (heads, head_dim), for the choice of a kernel; zeros where nobody knew

    It sits at the tap "k" or "v".  Handlers before it change what enters the cache (a rotation after RoPE); the attention function and the cache's
    layers ask it for stores (`qplug_llm.attention`, `qplug_llm.cache`).
    """

    name: ClassVar[str] = "kv-cache"

    def __init__(self, spec: QuantSpec, window: int = 0, parts: Mapping[str, Tensor] | None = None, shape: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        if problem := kv_problem(spec):
            raise SpecError(problem)
        if window < 0:
            raise SpecError(f"a window is a number of tokens, 0 or more, got {window}")
        self.spec, self.window, self.shape = spec, window, shape
        self._names = tuple(parts or ())
        for name, part in (parts or {}).items():
            self.register_buffer(name, part)

        self.bind([ReferenceKVAttention()])

    def bind(self, kernels: Iterable[Kernel], device: torch.device = CPU, dtype: torch.dtype = torch.float32, wish: str | None = None) -> Self:
        """Choose the best of `kernels` for one new token over this cache, in place."""
        own = CODES_AND_WINDOW if self.window else CODES
        self._job = Job("kv-attention", own, self.spec, self.shape, device=device, dtype=dtype)
        self._choice = choose([*kernels, ReferenceKVAttention()], self._job, wish)
        return self

    @property
    def kernel(self) -> Kernel | None:
        """What runs straight from the codes; None = they are decoded first."""
        return None if isinstance(self._choice.kernel, ReferenceKVAttention) else self._choice.kernel

    def explain(self) -> Choice:
        """The kernel that runs, and why each better-ranked one does not."""
        return self._choice

    def run(self, q: Tensor, keys: "KVStore", values: "KVStore") -> Tensor:
        """The chosen kernel, for one new token of each sequence.  q: [B, H, D] → [B, H, D]"""
        parts: dict[str, Tensor] = {}
        for place, store in (("k", keys), ("v", values)):
            codes, scale = store.packed["codes"], store.packed["scale"]
            parts |= {place: as_kernel_codes(codes, self.spec.format.bits), f"{place}_scale": scale.float().flatten(2)}
        lengths = torch.full((q.shape[0],), keys.coded, dtype=torch.int32, device=q.device)
        return self._choice.kernel(q, parts | {"lengths": lengths}, self._job)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._names}

    @property
    def step(self) -> int:
        """Tokens that share a scale."""
        g = self.spec.granularity
        return g.rows if isinstance(g, Tile) and self.spec.when == "dynamic" else 1

    def coded(self, tokens: int) -> int:
        """How many of so many tokens are codes."""
        return max(0, tokens - self.window) // self.step * self.step

    def spec_of(self, x: Tensor) -> QuantSpec:
        """As a spec of [B, H, S, D]."""
        return _in_heads(self.spec, x.shape[1], x.shape[3])

    def parts_of(self, x: Tensor) -> dict[str, Tensor]:
        """Static parts as those of [B, H, S, D]; {} for dynamic ones."""
        one = isinstance(self.spec.granularity, PerTensor)
        return {name: p.reshape((1, 1, 1, 1) if one else (1, x.shape[1], 1, -1)) for name, p in self.parts.items()}

    def store(self) -> KVStore:
        """An empty one."""
        return KVStore(self)

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """SpecError: rows alone do not say which query sees them."""
        raise SpecError("a policy of a cache works inside the attention function of its adapter, which asks it for a store; set that function again")

    def config(self) -> dict[str, Any]:
        return {"spec": spec_to_dict(self.spec), "window": self.window, "shape": list(self.shape), "parts": table_of(self.parts)}

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        window = config["window"]
        if type(window) is not int:
            raise SpecError(f"a window is a number of tokens, got {window!r}")
        shape = config["shape"]
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
            raise SpecError(f"a cache has heads and channels, got {shape!r}")
        return cls(spec_from_dict(config["spec"], resolved(registry).formats), window, from_table(config["parts"]), tuple(shape))

    def extra_repr(self) -> str:
        return f"{self.spec}, window={self.window}"


def bytes_per_token(spec: QuantSpec, heads: int, head_dim: int) -> float:
    """Of the packed part, counted on packed noise; tokens of the window are floats on top."""
    if spec.when == "static":
        return float(heads * -(-head_dim * spec.format.bits // 8))
    policy = KVCache(spec)
    x = torch.randn(1, heads, policy.step, head_dim, generator=torch.Generator().manual_seed(0))
    packed = _PACKING.pack(quantize(x, policy.spec_of(x)))
    return sum(t.numel() * t.element_size() for t in packed.values()) / policy.step


def chain(module: nn.Module, tensor: str) -> tuple[list[Tap], KVCache | None, list[Tap]]:
    """The handlers of a tap: those before the cache's policy, the policy, and those after it; without a policy all are after."""
    taps = module._modules.get("taps")
    if not isinstance(taps, nn.ModuleDict) or tensor not in taps:
        return [], None, []
    handlers = list(taps[tensor].handlers)  # type: ignore[arg-type]
    for i, handler in enumerate(handlers):
        if isinstance(handler, KVCache):
            return handlers[:i], handler, handlers[i + 1 :]
    return [], None, handlers
