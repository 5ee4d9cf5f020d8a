"""What a decoder is made of, read from one forward pass of a small twin.

Nothing here knows the name of a family or of a projection.  Which linears share an input, which writes the values, which one is added to the residual
stream, what a norm feeds: each is a fact about numbers (equal tensors, or a tensor that is a sum of others), and holds by path inside a block, so
that it carries over to the real model.  Facts lead to candidates for links; proof.py decides which of them are true.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qplug_llm import attention, twin
from qplug_llm.experts import DOWN, is_router, is_stack, up_name

Layout = Literal["whole", "joined", "grouped"]
_LAYOUTS: tuple[Layout, ...] = ("whole", "joined", "grouped")


@dataclass(frozen=True)
class Slot:
    """Where q, k or v stands in the output of a linear.

    layout: "whole": all of it; "joined": [q | k | v]; "grouped": for each key head [its queries | k | v]
    index:  0, 1, 2 for q, k, v
    """

    linear: str
    layout: Layout = "whole"
    index: int = 0

    def channels(self, heads: int, kv: int, dim: int) -> tuple[range, ...]:
        """The slice of the output, in the order of heads; () for all of it."""
        if self.layout == "whole":
            return ()
        if self.layout == "joined":
            ends = [0, heads * dim, (heads + kv) * dim, (heads + 2 * kv) * dim]
            return (range(ends[self.index], ends[self.index + 1]),)
        group = heads // kv
        starts = [0, group * dim, (group + 1) * dim]
        size = (group if self.index == 0 else 1) * dim
        return tuple(range(at := g * (group + 2) * dim + starts[self.index], at + size) for g in range(kv))


@dataclass(frozen=True)
class Feed:
    """A norm and the matrices that read what it gives."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Inner:
    """A linear that reads what others of the same block made: down, after gate and up.

    writers: the linears before it; halves: one linear whose two halves are the two writers
    norm:    a norm right before the reader, "" = none
    """

    reader: str
    writers: tuple[str, ...]
    halves: bool = False
    norm: str = ""


@dataclass(frozen=True)
class BlockFacts:
    """One kind of block; all paths are relative to it.  A path names a linear or a router, or a fused parameter: "mlp.experts.down_proj".

    stages:   matrices that share an input, in the order of execution; a router stands alone, right before what it routes to
    stacks:   modules of fused experts
    q, k, v:  where they are written; a norm's path in `q_norm`, `k_norm` where one comes between
    out:      the linear that reads the attention's output
    cached:   keys and values reach the attention just as a cache keeps them; not so where latents are cached (DeepSeek)
    heads, kv, dim: of the twin, to know which attribute of the real module says them
    adders:   matrices whose output is added to the residual stream
    readers:  matrices that read the stream, directly or through a norm
    norms:    norms on the stream, before readers or after adders
    unexplained: why the stream could not be followed, "" = it could
    """

    stages: tuple[tuple[str, ...], ...]
    feeds: tuple[Feed, ...] = ()
    attention: str = ""
    q: Slot | None = None
    k: Slot | None = None
    v: Slot | None = None
    q_norm: str = ""
    k_norm: str = ""
    out: str = ""
    cached: bool = False
    inner: tuple[Inner, ...] = ()
    stacks: tuple[str, ...] = ()
    adders: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    unexplained: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(path for stage in self.stages for path in stage)


@dataclass(frozen=True)
class Facts:
    """A whole model: one entry of `blocks` for each layer of the twin; other paths are full.

    entry:  embeddings and linears that begin the stream; norms between in `norms`
    chains: (writer, reader) pairs outside the blocks: an embedding and the linear that projects it
    feeds:  the last norm and the head
    exits:  linears after the blocks that read the stream
    """

    blocks: tuple[BlockFacts, ...]
    entry: tuple[str, ...] = ()
    chains: tuple[tuple[str, str], ...] = ()
    feeds: tuple[Feed, ...] = ()
    exits: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    gains: dict[str, float] = field(default_factory=dict)
    unexplained: str = ""


# the parts of a real model that need no weights ------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' transposed Conv1D; no router, which has a forward of its own."""
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) and not is_router(module)) or (hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2)


def routes(module: nn.Module) -> bool:
    """Whether a matrix decides what counts: a router, or the gate of a shared expert, one number for a token."""
    return is_router(module) or (isinstance(module, nn.Linear) and module.out_features == 1)


def features(module: nn.Module) -> tuple[int, int]:
    """(K inputs, N outputs) of a linear, a router or an embedding."""
    a, b = module.weight.shape  # type: ignore[misc]
    if isinstance(module, nn.Embedding) or hasattr(module, "nf"):
        return a, b
    return b, a


def find_blocks(model: nn.Module) -> str | None:
    """Path of the list of blocks: as many children as the config has layers, and the most parameters of all such lists."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not layers:
        return None
    fits = [(sum(p.numel() for p in m.parameters()), path) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return max(fits)[1] if fits else None


def children(model: nn.Module, blocks: str) -> list[nn.Module]:
    """The blocks, in order."""
    return list(model.get_submodule(blocks).children())


def kinds(model: nn.Module, blocks: str) -> list[tuple[Any, ...]]:
    """One key for each block; equal keys = built alike."""
    lists = twin.per_layer(model.config)
    keys = []
    for i, block in enumerate(children(model, blocks)):
        own = {}
        for path, module in block.named_modules():
            names = tuple(sorted((n, p.ndim) for n, p in module.named_parameters(recurse=False)))
            if "taps" not in path.split("."):
                own[path] = (type(module).__name__, names)
        keys.append((tuple(own.items()), tuple((k, str(v[i])) for k, v in sorted(lists.items()))))
    return keys


# one forward pass ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    path: str
    module: nn.Module
    x: Tensor | None  # [rows, C]; None for embeddings
    y: Tensor  # [rows, C]
    raw: Tensor


@dataclass
class _Attention:
    path: str
    q: Tensor  # [B, H, T, D]
    k: Tensor
    v: Tensor
    out: Tensor  # [B·T, H·D]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


@torch.no_grad()
def observe(model: nn.Module, blocks: str) -> Facts:
    """The facts of a twin, from one pass."""
    ids = twin.sample_ids(model)
    path_of = {m: path for path, m in model.named_modules()}
    calls: list[_Call] = []
    borders: dict[int, tuple[Tensor, Tensor]] = {}
    attentions: list[_Attention] = []

    def leaf(module: nn.Module, args: Any, output: Any) -> None:
        x, y = _first(args) if args else None, _first(output)
        if isinstance(y, Tensor) and y.is_floating_point() and y.ndim >= 2:
            floats = isinstance(x, Tensor) and x.is_floating_point()
            # clones: some families add to a result in place
            x = x.flatten(0, -2).clone() if floats and x is not None else None
            calls.append(_Call(path_of[module], module, x, y.flatten(0, -2).clone(), y.clone()))

    def border(i: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = _first(args) if args else kwargs["hidden_states"]
            borders[i] = (x.flatten(0, -2).clone(), _first(output).flatten(0, -2).clone())

        return hook

    def watch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        attentions.append(_Attention(path_of[module], q, k, v, out.flatten(2).flatten(0, 1)))

    with ExitStack() as stack:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None or next(module.children(), None) is None:
                handle = module.register_forward_hook(leaf)
                stack.callback(handle.remove)
        for i, block in enumerate(children(model, blocks)):
            stack.callback(block.register_forward_hook(border(i), with_kwargs=True).remove)
        stack.enter_context(attention.watching(watch))
        model(input_ids=ids, use_cache=False)

    found, cached = [], _cached(model, ids)
    for i in range(len(borders)):
        prefix = f"{blocks}.{i}."
        own = [c for c in calls if c.path.startswith(prefix)]
        facts = _block_facts(prefix, own, borders[i], [a for a in attentions if a.path.startswith(prefix)])
        found.append(replace(facts, cached=prefix + facts.attention in cached))
    outside = [c for c in calls if not c.path.startswith(blocks + ".")]
    return _around(model, tuple(found), outside, borders)


def _cached(model: nn.Module, ids: Tensor) -> set[str]:
    """Paths of the attentions that are given the very tensors that a cache gave back."""
    from transformers.cache_utils import DynamicCache

    path_of = {m: path for path, m in model.named_modules()}
    returned: list[Tensor] = []
    found: set[str] = set()

    class Telling(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            out = super().update(*args, **kwargs)
            returned.extend(out)
            return out

    def watch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if any(k is r for r in returned) and any(v is r for r in returned):
            found.add(path_of[module])

    try:
        with attention.watching(watch):
            model(input_ids=ids, past_key_values=Telling(config=model.config), use_cache=True)  # type: ignore[arg-type]
    except Exception:  # whatever a foreign class makes of a cache: then nobody knows that it keeps these
        return set()
    return found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _explain(target: Tensor, parts: Sequence[Tensor]) -> list[float] | None:
    """Coefficients with Σ c·part = target, or None.  Norms and rotations in float32 leave sums exact to about 1e-12."""
    if not parts:
        return None
    a = torch.stack([p.flatten() for p in parts], 1)
    c = torch.linalg.lstsq(a, target.flatten().unsqueeze(1)).solution
    rest = (a @ c).flatten() - target.flatten()
    return c.flatten().tolist() if rest.norm() <= 1e-6 * target.norm() else None


def _owns_parameters(call: _Call) -> bool:
    return next(call.module.parameters(recurse=False), None) is not None


def _is_norm(call: _Call) -> bool:
    """Same width in and out, no matrix, and not the identity."""
    flat = all(p.ndim == 1 for p in call.module.parameters(recurse=False)) and next(call.module.children(), None) is None
    return flat and call.x is not None and call.x.shape == call.y.shape and not torch.equal(call.x, call.y)


def _source(x: Tensor | None, calls: Iterable[_Call]) -> _Call | None:
    """The call whose output is x."""
    return next((c for c in calls if _same(c.y, x)), None)


def _added(target: Tensor, start: Tensor | None, calls: Sequence[_Call]) -> list[_Call] | None:
    """The calls whose outputs make `target` out of `start`; None when no sum does."""
    same: list[_Call] = []
    for call in calls:
        # a module that owns a vector of its own and returns what its last layer put out is that layer
        if _owns_parameters(call) and call.y.shape == target.shape and not any(_same(c.y, call.y) for c in same):
            same.append(call)
    parts = ([] if start is None else [start]) + [c.y for c in same]
    weights = _explain(target, parts)
    if weights is None:
        return None
    return [c for c, w in zip(same, weights[len(parts) - len(same) :], strict=True) if abs(w) > 1e-4]


def _block_facts(prefix: str, calls: list[_Call], border: tuple[Tensor, Tensor], attentions: list[_Attention]) -> BlockFacts:
    def rel(path: str) -> str:
        return path.removeprefix(prefix)

    linears = [c for c in calls if is_linear(c.module)]
    matrices = [c for c in calls if is_linear(c.module) or is_router(c.module) or is_stack(c.module)]

    def reads(call: _Call) -> str:
        return rel(call.path) + (f".{up_name(call.module)}" if is_stack(call.module) else "")

    stages: list[list[_Call]] = []
    order: list[Any] = []  # stages of linears and of what routes, paths of fused parameters
    for call in matrices:
        if is_stack(call.module):
            order += [(reads(call),), (f"{rel(call.path)}.{DOWN}",)]
            continue
        shared = next((s for s in stages if _same(s[0].x, call.x) and routes(s[0].module) == routes(call.module)), None)
        if shared is None:
            stages.append([call])
            order.append(stages[-1])
        else:
            shared.append(call)

    norms = [c for c in calls if _is_norm(c)]
    feeds = []
    for norm in norms:
        readers = tuple(reads(c) for c in matrices if _same(c.x, norm.y))
        if readers and _owns_parameters(norm):
            feeds.append(Feed(rel(norm.path), readers))

    heads = _attention_facts(rel, calls, linears, attentions[0]) if len(attentions) == 1 else {}
    stream = _stream_facts(rel, reads, calls, matrices, norms, border)
    taken = {slot.linear for slot in (heads.get("q"), heads.get("k"), heads.get("v")) if slot is not None}
    inner = _inner_facts(
        rel, [[c for c in s if is_linear(c.module)] for s in stages], norms, {*taken, heads.get("out", "")}, set(stream.get("readers", ()))
    )
    return BlockFacts(
        stages=tuple(entry if isinstance(entry, tuple) else tuple(rel(c.path) for c in entry) for entry in order),
        feeds=tuple(feeds),
        inner=inner,
        stacks=tuple(rel(c.path) for c in matrices if is_stack(c.module)),
        **heads,
        **stream,
    )


def _attention_facts(rel: Any, calls: list[_Call], linears: list[_Call], seen: _Attention) -> dict[str, Any]:
    b, h, t, d = seen.q.shape
    kv = seen.k.shape[1]
    facts: dict[str, Any] = {"attention": rel(seen.path)}
    v = seen.v.transpose(1, 2).flatten(2).flatten(0, 1)  # [B·T, Hkv·D]
    for call in linears:
        for layout in _LAYOUTS:
            slot = Slot(rel(call.path), layout, 2)
            wide = kv * d if layout == "whole" else (h + 2 * kv) * d
            if call.y.shape == (b * t, wide) and "v" not in facts:
                own = [i for r in slot.channels(h, kv, d) for i in r] or list(range(wide))
                # latent values have heads of another size than queries
                if len(own) == v.shape[1] and torch.allclose(call.y[:, own], v, rtol=1e-6, atol=1e-9):
                    facts["v"] = slot
    before = [c for c in calls if c.path != seen.path and _owns_parameters(c)]
    for name, index, value in (("q", 0, seen.q), ("k", 1, seen.k)):
        # the rotary embedding turns nothing at position 0; a constant factor (OPT's scaling) is allowed
        first = value[:, :, 0].flatten(1)  # [B, heads·D]
        for call in reversed(before):
            if call.raw.numel() != b * t * first.shape[1] or call.raw.shape[:2] != (b, t):
                continue
            if _explain(first, [call.raw[:, 0].flatten(1)]) is None:
                continue
            if is_linear(call.module):
                facts[name] = Slot(rel(call.path))
            else:
                facts[name + "_norm"] = rel(call.path)
            break
        else:
            fused = facts.get("v")
            if fused is not None and fused.layout != "whole":
                facts[name] = Slot(fused.linear, fused.layout, index)
    out = next((c for c in linears if _same(c.x, seen.out)), None)
    if out is not None:
        facts["out"] = rel(out.path)
    return facts


def _stream_facts(
    rel: Any, reads: Any, calls: list[_Call], matrices: list[_Call], norms: list[_Call], border: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    start, end = border
    added = _added(end, start, calls)
    if added is None:
        return {"unexplained": "the block's output is not its input plus outputs of its layers"}
    adders, through = [], []
    for call in added:
        if is_stack(call.module):
            adders.append(f"{rel(call.path)}.{DOWN}")
            continue
        if is_linear(call.module):
            adders.append(rel(call.path))
            continue
        source = _source(call.x, [c for c in matrices if is_linear(c.module)]) if _is_norm(call) else None
        if source is None:
            return {"unexplained": f"{rel(call.path)} ({type(call.module).__name__}) adds to the residual stream"}
        adders.append(rel(source.path))
        through.append(rel(call.path))
    states = [start] + [c.y for c in added]
    readers = []
    for call in matrices:
        if call.x is None or call.x.shape != start.shape:
            continue
        norm = _source(call.x, norms)
        if norm is not None and norm.x is not None and _explain(norm.x, states):
            readers.append(reads(call))
            through.append(rel(norm.path))
        elif _explain(call.x, states):
            readers.append(reads(call))
    return {"adders": tuple(adders), "readers": tuple(readers), "norms": tuple(dict.fromkeys(through))}


def _inner_facts(rel: Any, stages: list[list[_Call]], norms: list[_Call], attention_own: set[str], readers: set[str]) -> tuple[Inner, ...]:
    found = []
    for i, stage in enumerate(stages):
        for call in stage:
            path = rel(call.path)
            if path in readers or path in attention_own or call.x is None:
                continue
            width = call.x.shape[1]
            norm = _source(call.x, norms)
            before = [[c for c in s if rel(c.path) not in attention_own] for s in reversed(stages[:i])]
            whole = next((w for s in before if (w := [c for c in s if c.y.shape[1] == width])), [])
            double = next((w for s in before if (w := [c for c in s if c.y.shape[1] == 2 * width])), [])
            if whole:
                found.append(Inner(path, tuple(rel(c.path) for c in whole), norm=rel(norm.path) if norm else ""))
            elif double:
                found.append(Inner(path, (rel(double[0].path),), halves=True, norm=rel(norm.path) if norm else ""))
    return tuple(found)


def _around(model: nn.Module, blocks: tuple[BlockFacts, ...], calls: list[_Call], borders: dict[int, tuple[Tensor, Tensor]]) -> Facts:
    """What lies before the first block and after the last."""
    start, end = borders[0][0], borders[len(borders) - 1][1]
    norms = [c for c in calls if _is_norm(c)]
    linears = [c for c in calls if is_linear(c.module)]
    feeds = tuple(
        Feed(norm.path, readers) for norm in norms if _owns_parameters(norm) and (readers := tuple(c.path for c in linears if _same(c.x, norm.y)))
    )
    chains = tuple(
        (source.path, c.path)
        for c in linears
        if (source := _source(c.x, [o for o in calls if o is not c and (is_linear(o.module) or isinstance(o.module, nn.Embedding))])) is not None
    )
    gains = _gains(model)
    # tables of positions have no batch axis: spread over it
    spread = [_Call(c.path, c.module, c.x, _over_batch(c.y, start), c.raw) for c in calls]
    added = _added(start, None, spread)
    if added is None:
        return Facts(blocks, chains=chains, feeds=feeds, gains=gains, unexplained="what enters the first block is not a sum of embeddings")
    entry, through = [], []
    for call in added:
        source = call
        if _is_norm(call):
            through.append(call.path)
            writer = _source(call.x, [c for c in calls if isinstance(c.module, nn.Embedding) or is_linear(c.module)])
            if writer is None:
                return Facts(blocks, chains=chains, feeds=feeds, gains=gains, unexplained=f"what enters {call.path} is not one embedding")
            source = writer
        elif not (isinstance(call.module, nn.Embedding) or is_linear(call.module)):
            why = f"{call.path} ({type(call.module).__name__}) begins the residual stream"
            return Facts(blocks, chains=chains, feeds=feeds, gains=gains, unexplained=why)
        entry.append(source.path)
    exits = []
    for call in linears:
        norm = _source(call.x, norms)
        if norm is not None and _same(norm.x, end):
            exits.append(call.path)
            through.append(norm.path)
        elif _same(call.x, end):
            exits.append(call.path)
    return Facts(blocks, tuple(entry), chains, feeds, tuple(exits), tuple(dict.fromkeys(through)), gains)


def _over_batch(y: Tensor, like: Tensor) -> Tensor:
    if y.shape[-1] == like.shape[-1] and y.shape[0] < like.shape[0] and like.shape[0] % y.shape[0] == 0:
        return y.repeat(like.shape[0] // y.shape[0], 1)
    return y


def _gains(model: nn.Module) -> dict[str, float]:
    """For every norm: what is added to its weight to give the factor (1 where it multiplies by 1 + weight), tried numerically."""
    found = {}
    g = torch.Generator().manual_seed(0)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if weight is None or weight.ndim != 1 or next(module.children(), None) is not None:
            continue
        x = torch.randn(3, weight.shape[0], generator=g, dtype=torch.float64)
        values = []
        for w in (0.0, 1.0):
            given = {n: torch.zeros_like(p) for n, p in own.items()} | {"weight": torch.full_like(weight, w)}
            try:
                y = torch.func.functional_call(module, given, (x,))
            except Exception:  # a module of another kind, which takes other arguments
                break
            values.append(_first(y))
        if len(values) == 2 and isinstance(values[0], Tensor):
            one = values[1] - values[0]  # what the weight multiplies
            found[path] = 1.0 if bool(values[0].abs().max() > 0) and torch.allclose(one, values[0], rtol=1e-5, atol=1e-6) else 0.0
    return found
