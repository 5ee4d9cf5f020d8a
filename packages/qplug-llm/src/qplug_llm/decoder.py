"""One adapter for decoder language models of transformers, by structure.

Structure is read from a small random twin of the model's own class (twin.py, structure.py), becomes candidates for links (links.py), and every
candidate is tried on the twin before it is believed (proof.py).  So a family that is named nowhere works, or is refused link by link with the reason;
what the trials cost, about a second, is paid once for each configuration.

Experts are sites one by one, also where their matrices are fused (experts.py); a router has a role of its own, so that "*:weight" does not mean it.

Left out: encoder-decoders and models with images are not matched.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from qcore.errors import NotFound
from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.tap import RunContext
from qcore.model.topology import Axis, Block, Invariance, Link, Port, Site, Topology
from qcore.transforms.rewrite import Rewrite, scale_link
from torch import Tensor, nn

from qplug_llm import attention, experts, linears, twin  # noqa: F401 - linears: teaches a leaf
from qplug_llm.experts import DOWN, is_router, is_stack, up_name
from qplug_llm.links import Candidate, block_candidates, model_candidates, resolve, unexplained
from qplug_llm.proof import Bench, Verdict
from qplug_llm.structure import Facts, features, find_blocks, is_linear, kinds, observe, routes

_MOST_LAYERS = 8
_AXES: tuple[Axis, ...] = ("out", "in")


@dataclass(frozen=True)
class Knowledge:
    """What the twin taught: facts, verdicts by candidate, and which kind of block each of its layers is."""

    facts: Facts | None
    verdicts: Mapping[tuple[int | None, str], Verdict]
    kinds: tuple[Any, ...] = ()
    failure: str = ""


class DecoderLM(ModelAdapter):
    """Decoder language models of transformers: what shares channels is found on a small twin, and proven there."""

    name: ClassVar[str] = "decoder-lm"

    def matches(self, model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_output_embeddings") or getattr(config, "is_encoder_decoder", False):
            return False
        if getattr(config, "vision_config", None) is not None or getattr(config, "num_attention_heads", None) is None:
            return False
        blocks = find_blocks(model)
        if blocks is None or model.get_output_embeddings() is None:  # type: ignore[operator]
            return False
        return any(
            hasattr(m, a) for m in model.get_submodule(blocks).modules() for a in ("num_key_value_groups", "num_heads", "head_dim", "is_causal")
        )

    def prepare(self, model: nn.Module) -> None:
        """Set the attention function and the experts function "qcore" in place, where they can be set; caches follow the policies at the taps."""
        if attention.can_be_set(model):
            from qplug_llm.cache import watch_caches

            attention.register()
            watch_caches(model)
            model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
        if experts.can_be_set(model):
            experts.register()
            model.set_experts_implementation(experts.NAME)  # type: ignore[operator]

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits [B, T, V]."""
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        for key in ("labels", "row_weight"):
            inputs.pop(key, None)
        return model(**inputs, use_cache=False).logits

    def context(self, batch: Any) -> RunContext:
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        weight = 1.0 if isinstance(batch, Tensor) else float(batch.get("row_weight", 1.0))
        return RunContext(valid=None if mask is None else mask.bool(), weight=weight)

    def topology(self, model: nn.Module) -> Topology:
        blocks = find_blocks(model)
        if blocks is None:
            raise NotFound(f"{type(model).__name__} has no list of {model.config.num_hidden_layers} blocks")  # type: ignore[union-attr]
        return _Assembly(model, blocks, learn(model, blocks)).topology()


def learn(model: nn.Module, blocks: str) -> Knowledge:
    """What a twin of `model` teaches; remembered for each class, configuration and build of the blocks."""
    own = kinds(model, blocks)
    first = {kind: i for i, kind in reversed(list(enumerate(own)))}
    chosen = sorted(first.values())[:_MOST_LAYERS]
    if len(chosen) == 1 and len(own) > 1:
        chosen.append(next(i for i in range(len(own)) if i not in chosen))  # two layers: a block must also stand what a block before it makes
    chosen.sort()
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)  # type: ignore[union-attr,operator]
    return _learn(_Frozen(model), type(model), config, blocks, tuple(chosen), tuple(own[i] for i in chosen))  # type: ignore[arg-type]


class _Frozen:
    """Carries the model through the cache without being part of its key."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=32)
def _learn(carrier: _Frozen, cls: type, config: str, blocks: str, layers: tuple[int, ...], own: tuple[Any, ...]) -> Knowledge:
    model = carrier.model
    # the cache keeps its first key: let go of the model, which may be large
    carrier.model = nn.Module()
    try:
        small = twin.build(model, layers).model
        facts = observe(small, blocks)
        bench = Bench(small)
    except Exception as e:  # whatever a foreign class raises: its links are refused, its sites remain
        return Knowledge(
            None,
            {},
            failure=f"no small twin of {cls.__name__} could be made and run ({type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''})",
        )
    if not bool(torch.isfinite(bench.base).all()):
        return Knowledge(None, {}, failure=f"the small twin of {cls.__name__} gives numbers that are not finite")
    verdicts: dict[tuple[int | None, str], Verdict] = {}
    proven: list[Link] = []

    def judge(candidate: Candidate, first: Rewrite | None = None) -> None:
        verdict = bench.judge(candidate, first)
        verdicts[candidate.key] = verdict
        if verdict.invariance:
            proven.append(replace(candidate.variants[verdict.variant], invariance=verdict.invariance))

    kind_of = list(range(len(layers)))
    for i in kind_of:
        block = f"{blocks}.{i}"
        for candidate in block_candidates(small, block, i, facts.blocks[i], _inside(facts.gains, block)):
            if candidate.key not in verdicts:  # one expert speaks for all
                judge(candidate)
    outer, residual = model_candidates(small, blocks, facts, kind_of)
    for candidate in outer:
        judge(candidate)
    if residual is not None:
        judge(residual, _folded(bench, proven, residual.variants[0].through))
    # a block of the real model that somebody rebuilt has no likeness in the twin
    alike = tuple(real if twins[0] == real[0] else None for twins, real in zip(kinds(small, blocks), own, strict=True))
    return Knowledge(facts, verdicts, alike)


def _inside(gains: Mapping[str, float], block: str) -> dict[str, float]:
    return {path.removeprefix(block + "."): gain for path, gain in gains.items() if path.startswith(block + ".")}


def _folded(bench: Bench, proven: list[Link], norms: tuple[str, ...]) -> Rewrite:
    """The gains of all norms that can hand theirs to their readers, handed over: what comes before a rotation."""
    rewrite = Rewrite()
    for link in proven:
        port = link.writes[0]
        if port.param.rpartition(".")[0] in norms and Invariance.SCALE in link.invariance and len(link.ports) > 1:
            rewrite = rewrite.then(scale_link(link, 1 / (bench.parameters[port.param] + port.gain)))
    return rewrite


class _Assembly:
    """A topology of the real model, from what its twin taught."""

    def __init__(self, model: nn.Module, blocks: str, known: Knowledge) -> None:
        self.model, self.path, self.known = model, blocks, known
        self.count = len(model.get_submodule(blocks))  # type: ignore[arg-type]
        self.kind_of = [self._kind(key) for key in kinds(model, blocks)]
        self.why: dict[tuple[str, Axis], str] = {}

    def _kind(self, key: Any) -> int | None:
        return self.known.kinds.index(key) if key in self.known.kinds else None

    def topology(self) -> Topology:
        links = self._links()
        blocks = tuple(self._block(i) for i in range(self.count))
        activations: list[Site] = []
        facts = self.known.facts
        if facts is not None:
            for i, kind in enumerate(self.kind_of):
                if kind is not None and facts.blocks[kind].attention:
                    activations += self._inside(f"{self.path}.{i}.{facts.blocks[kind].attention}", facts.blocks[kind].cached)
        return Topology(blocks, tuple(links), self._blocked(links), tuple(activations), tied_names(self.model))

    def _inside(self, path: str, cached: bool) -> list[Site]:
        """What the attention function taps."""
        config: Any = self.model.config
        module = self.model.get_submodule(path)
        heads, kv = config.num_attention_heads, twin.kv_heads(config)
        # latent attention: queries and keys are wider than values
        dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or twin.head_dim(config)
        return [
            Site(path, "q", heads=heads, head_dim=dim),
            Site(path, "k", heads=kv, head_dim=dim, cached=cached),
            Site(path, "v", heads=kv, head_dim=getattr(module, "v_head_dim", None) or dim, cached=cached),
            Site(path, "p"),
        ]

    def _links(self) -> list[Link]:
        facts = self.known.facts
        if facts is None:
            return []
        candidates: list[Candidate] = []
        for i, kind in enumerate(self.kind_of):
            if kind is not None:
                block = f"{self.path}.{i}"
                gains = _inside(facts.gains, f"{self.path}.{kind}")
                candidates += block_candidates(self.model, block, kind, facts.blocks[kind], gains)
        whole = [k for k in self.kind_of if k is not None]
        if len(whole) == self.count:
            outer, residual = model_candidates(self.model, self.path, facts, whole)
            candidates += outer
            if residual is not None:
                candidates.append(residual)
        links = []
        for candidate in candidates:
            verdict = self.known.verdicts[candidate.key]
            link = candidate.variants[verdict.variant]
            if verdict.invariance:
                links.append(replace(link, invariance=verdict.invariance))
            for port in link.ports:
                self.why.setdefault((port.param, port.axis), f"{link.name}: {verdict.reason}" if not verdict.invariance else "")
        return links

    def _block(self, i: int) -> Block:
        path, kind, facts = f"{self.path}.{i}", self.kind_of[i], self.known.facts
        if facts is not None and kind is not None:
            stages = facts.blocks[kind].stages
        else:
            # nobody saw it run: one stage for each matrix, in the order of registration
            stages = tuple((p,) for p in _matrices(self.model.get_submodule(path)))
        return Block(path, tuple(tuple(site for p in stage for site in self._sites(f"{path}.{p}")) for stage in stages))

    def _sites(self, path: str) -> tuple[Site, ...]:
        """Of a linear or a router; of a fused parameter one for each expert."""
        owner, param, _ = resolve(self.model, path)
        module = self.model.get_submodule(owner)
        if param != "weight":
            return tuple(Site(owner, param, part=e) for e in range(getattr(module, param).shape[0]))
        return (Site(owner, role="router" if routes(module) else ""),)

    def _blocked(self, links: list[Link]) -> dict[Port, str]:
        """Every axis of every matrix, as far as no link has it."""
        taken: dict[tuple[str, Axis], list[tuple[range, ...]]] = {}
        for link in links:
            for port in link.ports:
                taken.setdefault((port.param, port.axis), []).append(port.channels)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        blocked = {}
        for path, module in self.model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if p.ndim < 2:
                    continue
                param = f"{path}.{name}" if path else name
                for axis in _AXES:
                    key: tuple[str, Axis] = (param, axis)
                    slices = taken.get(key)
                    if slices is None:
                        blocked[Port(param, axis)] = self._reason(path, module, name, axis, module is head)
                    elif () not in slices and name == "weight" and is_linear(module):
                        rest = _rest(features(module)[1 if axis == "out" else 0], slices)
                        if rest:
                            blocked[Port(param, axis, channels=rest)] = self._reason(path, module, name, axis, module is head)
        return blocked

    def _reason(self, path: str, module: nn.Module, name: str, axis: Axis, head: bool) -> str:
        if isinstance(module, nn.Embedding) and axis == "in":
            return "token ids or positions: their order is the vocabulary's"
        if head and axis == "out":
            return "the vocabulary: logits keep their order and size"
        if self.known.failure:
            return self.known.failure
        if why := self.why.get((f"{path}.{name}", axis)):
            return why
        if not (is_linear(module) or is_router(module) or is_stack(module) or isinstance(module, nn.Embedding)):
            return f"{type(module).__name__}.{name} is no linear layer: this adapter does not follow its channels"
        inside = path.startswith(self.path + ".")
        if inside:
            index, _, rel = path.removeprefix(self.path + ".").partition(".")
            kind, facts = self.kind_of[int(index)], self.known.facts
            if kind is None or facts is None:
                return "the block is built like none of the twin's"
            own = facts.blocks[kind]
            if rel not in own.linears:
                return "it was not reached in the twin's pass"
            if not own.attention and rel not in {p for inner in own.inner for p in (inner.reader, *inner.writers)}:
                return "the attention of this family is not routed through transformers' AttentionInterface, so q, k and v cannot be followed in it"
            if (axis == "out" and any(s is not None and s.linear == rel for s in (own.q, own.k, own.v))) or (own.q_norm and axis == "out"):
                return "attention: what it writes is normed, turned or fused before it is read, and its channels are not shared otherwise"
        facts = self.known.facts
        whole = [k for k in self.kind_of if k is not None]
        if facts is not None and (why := unexplained(facts, whole)):
            return f"the residual stream could not be followed: {why}"
        if len(whole) < self.count:
            return "the residual stream runs through blocks that are built like none of the twin's"
        return "no other parameter was found that shares these channels"


def _matrices(block: nn.Module) -> list[str]:
    """Paths of all that has sites, in the order of registration; stacks of experts last, behind their router."""
    found: list[str] = []
    for path, module in block.named_modules():
        if is_stack(module):
            found += [f"{path}.{up_name(module)}", f"{path}.{DOWN}"]
        elif is_linear(module) or is_router(module):
            found.append(path)
    return sorted(found, key=lambda path: resolve(block, path)[1] != "weight")


def _rest(size: int, slices: list[tuple[range, ...]]) -> tuple[range, ...]:
    """The part of an axis that no slice covers."""
    free = sorted(set(range(size)) - {i for s in slices for r in s for i in r})
    found: list[range] = []
    for i in free:
        if found and found[-1].stop == i:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return tuple(found)
