"""Which part of a vision-language model is what: tower, connector, language model, and the layers inside a transformer block.

Parts are found by what they hold (a tower has a convolution and a list of blocks, a language model an embedding and a list of layers), the layers
of a block by the role that their names play in every family of transformers (`ROLES`).  A block that holds any parameter beside the roles that were
found (layer scales, norms of queries and keys, adapters) says so in `strange`: links that it could break are refused with that reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcore.errors import NotFound
from qcore.model.topology import join
from torch import nn

ROLES: Mapping[str, tuple[str, ...]] = {
    "first_norm": ("input_layernorm", "layer_norm1", "norm1", "ln_1"),
    "second_norm": ("post_attention_layernorm", "layer_norm2", "norm2", "ln_2"),
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp",),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv", "in_proj"),
    "out": ("o_proj", "out_proj", "proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "c_fc"),
    "down": ("down_proj", "fc2", "c_proj"),
}


@dataclass(frozen=True)
class BlockAnatomy:
    """The layers of one transformer block, as paths from the model's root; "" where there is none.

    heads, kv_heads, head_dim: of the attention;  qkv is one layer that writes queries, keys and values behind each other
    strange: what else the block holds, in its own words; empty = nothing
    """

    path: str
    first_norm: str = ""
    second_norm: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    out: str = ""
    gate: str = ""
    up: str = ""
    down: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    strange: str = ""

    @property
    def attends(self) -> tuple[str, ...]:
        """What reads the attention's input."""
        return (self.qkv,) if self.qkv else (self.q, self.k, self.v)

    @property
    def widens(self) -> tuple[str, ...]:
        """What reads the feed-forward's input."""
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return self.attends, (self.out,), self.widens, (self.down,)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks on one residual stream.

    entries: parameters that write the stream before the first block: embeddings, convolution, class token, positions
    passes:  norms that stand in the stream itself, before the first block
    blocks:  those whose output something reads
    unread:  paths of blocks and modules behind the last that is read
    turned:  whether queries and keys are turned by rotary embeddings
    """

    path: str
    entries: tuple[str, ...]
    passes: tuple[str, ...]
    blocks: tuple[BlockAnatomy, ...]
    unread: tuple[str, ...] = ()
    turned: bool = False

    @property
    def strange(self) -> str:
        return next((b.strange for b in self.blocks if b.strange), "")


@dataclass(frozen=True)
class Connector:
    """From the tower's stream to the language model's.

    norm:   path of the norm before the first linear, or ""
    layers: paths of its linears in order
    merge:  how many patches stand behind each other in what the first linear reads
    """

    path: str
    norm: str
    layers: tuple[str, ...]
    merge: int = 1
    strange: str = ""


@dataclass(frozen=True)
class Anatomy:
    """strange: why the tower's stream cannot be followed into the connector; "" where it can"""

    vision: Tower
    connector: Connector
    language: Tower
    final_norm: str
    head: str
    images: tuple[int, ...] = ()
    strange: str = ""
    notes: tuple[str, ...] = field(default=())


def find_anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`; NotFound names the first that is missing."""
    language = next((p for p, m in model.named_modules() if _is_language(m)), None)
    if language is None:
        raise NotFound(f"{type(model).__name__} has no language model: no module with an embedding `embed_tokens` and a list `layers`")
    base = model.get_submodule(language.rpartition(".")[0])
    parent = language.rpartition(".")[0]
    vision = next((join(parent, n) for n, m in base.named_children() if join(parent, n) != language and _is_tower(m)), None)
    if vision is None:
        raise NotFound(f"{type(model).__name__} has no vision tower beside {language}: no module with a convolution and a list of blocks")
    tower_blocks = _blocks_of(model, vision)
    connector = _connector(model, parent, language, vision, tower_blocks)
    used, why = _used(model, len(model.get_submodule(tower_blocks)), connector.path.startswith(vision + "."))  # type: ignore[arg-type]
    own = _tower(model, vision, tower_blocks, used, connector.path)
    layers = _tower(model, language, f"{language}.layers", None, "")
    entries = (f"{language}.embed_tokens.weight",)
    head = next((p for p, m in model.named_modules() if m is model.get_output_embeddings()), "")  # type: ignore[operator]
    config: Any = model.config
    images = tuple(t for key in ("image_token_id", "image_token_index", "video_token_id") if isinstance(t := getattr(config, key, None), int))
    if type(model.get_submodule(f"{language}.embed_tokens")) is not nn.Embedding:
        why_text = f"{language}.embed_tokens is a {type(model.get_submodule(f'{language}.embed_tokens')).__name__}, not a plain embedding"
        layers = Tower(layers.path, entries, (), tuple(_with(b, why_text) for b in layers.blocks), turned=layers.turned)
    else:
        layers = Tower(layers.path, entries, (), layers.blocks, turned=layers.turned)
    return Anatomy(own, connector, layers, f"{language}.norm", head, tuple(dict.fromkeys(images)), why)


def _with(block: BlockAnatomy, why: str) -> BlockAnatomy:
    return BlockAnatomy(**{**block.__dict__, "strange": block.strange or why})


def _is_language(m: nn.Module) -> bool:
    return isinstance(getattr(m, "embed_tokens", None), nn.Embedding) and isinstance(getattr(m, "layers", None), nn.ModuleList)


def _is_tower(m: nn.Module) -> bool:
    kinds = [type(s) for s in m.modules()]
    return any(issubclass(k, nn.Conv2d | nn.Conv3d) for k in kinds) and nn.ModuleList in kinds


def _blocks_of(model: nn.Module, tower: str) -> str:
    """The longest list of modules below the tower."""
    lists = [(p, m) for p, m in model.get_submodule(tower).named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    path, _ = max(lists, key=lambda item: sum(1 for _ in item[1].modules()))
    return join(tower, path)


def _used(model: nn.Module, count: int, inside: bool) -> tuple[int | None, str]:
    """(how many blocks are read, why it cannot be said).  inside: the connector is part of the tower and reads the last block"""
    config: Any = model.config
    layer = getattr(config, "vision_feature_layer", None)
    if inside or layer is None:
        return (None, "") if inside else (None, "the configuration does not say which layer of the tower the connector reads")
    if not isinstance(layer, int):
        return None, f"the connector reads several layers of the tower ({layer})"
    return (layer if layer >= 0 else count + 1 + layer), ""


def _tower(model: nn.Module, path: str, blocks: str, used: int | None, connector: str) -> Tower:
    every = list(model.get_submodule(blocks))  # type: ignore[call-overload]
    count = len(every) if used is None else used
    own = tuple(block_anatomy(model, f"{blocks}.{i}") for i in range(count))
    entries, passes, unread, behind = [], [], [f"{blocks}.{i}" for i in range(count, len(every))], False
    for name, module in model.get_submodule(path).named_modules():
        full = join(path, name)
        if full == blocks:
            behind = True
        if full.startswith(blocks + ".") or (connector and (full == connector or full.startswith(connector + "."))):
            continue
        for own_name, p in module.named_parameters(recurse=False):
            param = f"{full}.{own_name}"
            if behind:
                unread.append(full)
            elif is_norm(module):
                passes.append(full)
            elif p.ndim == 1 or isinstance(module, nn.Conv2d | nn.Conv3d | nn.Embedding):
                entries.append(param)
    turned = any("inv_freq" in n for n, _ in model.get_submodule(path).named_buffers())
    return Tower(path, tuple(entries), tuple(dict.fromkeys(passes)), own, tuple(dict.fromkeys(unread)), turned)


def _connector(model: nn.Module, parent: str, language: str, vision: str, blocks: str) -> Connector:
    beside = [
        join(parent, n)
        for n, m in model.get_submodule(parent).named_children()
        if join(parent, n) not in (language, vision) and any(isinstance(s, nn.Linear) for s in m.modules())
    ]
    inside = [
        join(vision, n)
        for n, m in model.get_submodule(vision).named_children()
        if join(vision, n) != blocks and not blocks.startswith(join(vision, n) + ".") and sum(isinstance(s, nn.Linear) for s in m.modules()) > 1
    ]
    named = beside or [p for p in inside if p.rpartition(".")[2] == "merger"]
    if len(named) != 1:
        raise NotFound(
            f"{type(model).__name__}: {len(named)} modules may be the connector between {vision} and {language} ({', '.join(named) or 'none'})"
        )
    path = named[0]
    module = model.get_submodule(path)
    layers = [join(path, n) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    norms = [join(path, n) for n, m in module.named_modules() if is_norm(m)]
    known = sum(p.numel() for path_ in (*layers, *norms) for p in model.get_submodule(path_).parameters())
    strange = (
        "" if known == sum(p.numel() for p in module.parameters()) and len(layers) == 2 and len(norms) < 2 else f"{path} is no chain of two linears"
    )
    norm = norms[0] if norms else ""
    merge = 1
    if norm and not strange:
        size, reads = model.get_parameter(f"{norm}.weight").shape[0], model.get_submodule(layers[0]).in_features
        merge, rest = divmod(int(reads), size)  # type: ignore[arg-type]
        strange = f"{norm} has {size} channels and {layers[0]} reads {reads}" if rest else ""
    return Connector(path, norm, tuple(layers), merge, strange)


def is_norm(module: nn.Module) -> bool:
    """A module with a gain vector, perhaps a bias, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    return (
        next(module.children(), None) is None
        and "weight" in own
        and set(own) <= {"weight", "bias"}
        and all(p.ndim == 1 for p in own.values())
        and not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    )


def block_anatomy(model: nn.Module, path: str) -> BlockAnatomy:
    """The layers of the block at `path`."""
    block = model.get_submodule(path)
    found: dict[str, str] = {}
    for role in ("first_norm", "second_norm", "attention", "mlp"):
        found[role] = _child(block, path, role)
    attention, mlp = found.pop("attention"), found.pop("mlp")
    for role in ("q", "k", "v", "qkv", "out"):
        found[role] = _child(model.get_submodule(attention), attention, role) if attention else ""
    for role in ("gate", "up", "down"):
        found[role] = _child(model.get_submodule(mlp), mlp, role) if mlp else ""
    missing = [r for r in ("first_norm", "second_norm", "out", "up", "down") if not found[r]]
    if not found["qkv"] and not (found["q"] and found["k"] and found["v"]):
        missing.append("q, k and v")
    if missing:
        return BlockAnatomy(path, strange=f"{path} has no {', '.join(missing)} that is called as in the families known here", **found)  # type: ignore[arg-type]
    strange = _strange(model, path, found)
    module: Any = model.get_submodule(attention)
    dim = getattr(module, "head_dim", None)
    heads = kv = 0
    out = model.get_submodule(found["out"])
    if not isinstance(dim, int):
        strange = strange or f"{attention} does not say its head_dim"
        dim = 0
    else:
        heads = int(out.in_features) // dim  # type: ignore[arg-type]
        kv = heads if found["qkv"] else int(model.get_submodule(found["v"]).out_features) // dim  # type: ignore[arg-type]
        if found["qkv"] and int(model.get_submodule(found["qkv"]).out_features) != 3 * heads * dim:  # type: ignore[arg-type]
            strange = strange or f"{found['qkv']} is no stack of queries, keys and values of equal size"
    return BlockAnatomy(path, heads=heads, kv_heads=kv, head_dim=dim, strange=strange, **found)


def _strange(model: nn.Module, path: str, found: Mapping[str, str]) -> str:
    known = {p for p in found.values() if p}
    for name, module in model.get_submodule(path).named_modules():
        full = join(path, name)
        if any(True for _ in module.parameters(recurse=False)) and full not in known:
            own = next(n for n, _ in module.named_parameters(recurse=False))
            return f"{full}.{own} is a parameter of the block that this adapter does not know"
    for role, full in found.items():
        module = model.get_submodule(full) if full else None
        if module is None:
            continue
        if role.endswith("norm") and not is_norm(module):
            return f"{full} ({type(module).__name__}) is no norm with a gain"
        if not role.endswith("norm") and not isinstance(module, nn.Linear):
            return f"{full} ({type(module).__name__}) is no linear layer"
    return ""


def _child(module: nn.Module, path: str, role: str) -> str:
    names = dict(module.named_children())
    return next((join(path, n) for n in ROLES[role] if n in names), "")
