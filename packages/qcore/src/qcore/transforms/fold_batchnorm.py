"""Fold batch norms into the convolution or linear layer before them: in eval mode both are one affine map of each output channel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.plain import trace
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology, join
from qcore.modules.leaves import leaf_config
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Insert, ModuleConfig, Put, Rewrite, Scale, Shift

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class FoldBatchNorm(Transform):
    """W' = t·W and b' = t·(b - mean) + β with t = γ / √(var + eps), for each output channel; the batch norm is taken away.

    Convolutions of one to three axes, grouped, depthwise and transposed ones, and linear layers (with a batch norm over [B, C]).  A layer without
    a bias gets one.  Exact in float64.  What is not folded is named in the rewrite's notes: a batch norm without a layer of its own right before it
    (pre-activation networks), subclasses that do more than normalize.

    A model that torch.fx cannot trace is searched for neighbours inside each nn.Sequential alone.

    zero_variance: what becomes of a channel that never varied while the statistics were taken.  t is then γ / √eps, 30 or 300 times γ: "error"
                   where its weights would become the largest of the layer; "fold" keeps the function all the same

    SpecError for a batch norm in training mode, or one without running statistics: it normalizes by the batch, which no weight can hold.

    Source: https://arxiv.org/abs/1712.05877 (Jacob et al. 2018), section 3.2, equation 14.
    """

    name: ClassVar[str] = "fold-batchnorm"
    scope: ClassVar[Literal["block", "model"]] = "model"
    zero_variance: Literal["error", "fold"] = "error"

    def __post_init__(self) -> None:
        if self.zero_variance not in ("error", "fold"):
            raise SpecError(f"fold-batchnorm: zero_variance is error or fold, got {self.zero_variance!r}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        pairs, notes = batchnorm_pairs(model)
        rewrite = fold_pairs(model, reader, pairs, self.zero_variance)
        rewrite.notes = (*notes, *rewrite.notes)
        return rewrite


def fold_pairs(
    model: nn.Module, reader: TensorReader, pairs: Iterable[tuple[str, str]], zero_variance: Literal["error", "fold"] = "error"
) -> Rewrite:
    """The rewrite that folds each (path of a layer, path of the batch norm that alone reads it).  The caller answers for the pairs."""
    rewrite = Rewrite()
    for layer, norm in pairs:
        rewrite = rewrite.then(_fold(model, reader, layer, norm, zero_variance))
    return rewrite


def channel_map(norm: Any, path: str, reader: TensorReader) -> tuple[Tensor, Tensor]:
    """(t, s) of y = t·x + s, what a batch norm in eval mode does to each channel.  [C], [C] float64

    SpecError where it has no such map: in training mode, without running statistics, or with a variance that is negative, not finite, or zero
    beside an eps of zero.
    """
    if norm.training:
        raise SpecError(f"{path} is in training mode, where it normalizes by the batch; call model.eval() before it is folded")
    if norm.running_var is None:
        raise SpecError(f"{path} has no running statistics (track_running_stats=False): it normalizes by the batch, and cannot be folded")
    var, mean = reader[f"{path}.running_var"].double(), reader[f"{path}.running_mean"].double()
    spread = var + norm.eps
    if bad := (~torch.isfinite(spread) | ~torch.isfinite(mean) | (var < 0) | (spread <= 0)).nonzero().flatten().tolist():
        raise SpecError(
            f"{path}: channel {bad[0]} has mean {float(mean[bad[0]]):.6g}, variance {float(var[bad[0]]):.6g} and eps {norm.eps:g}, by which nothing "
            "can be divided; take the statistics anew on training data"
        )
    gain = reader[f"{path}.weight"].double() if norm.affine else torch.ones_like(var)
    bias = reader[f"{path}.bias"].double() if norm.affine else torch.zeros_like(var)
    t = gain / spread.sqrt()
    return t, bias - t * mean


def _fold(model: nn.Module, reader: TensorReader, layer: str, norm: str, zero_variance: str) -> Rewrite:
    leaf, bn = model.get_submodule(layer), model.get_submodule(norm)
    t, shift = channel_map(bn, norm, reader)
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if zero_variance == "error":
        _refuse_dead_channels(leaf, weight, t, norm, reader)
    edits: dict[str, Any] = {weight: (Scale(Port(weight, "out"), t),)}
    inserts = {norm: Insert(ModuleConfig("nothing"), "instead")}
    derived: dict[str, str] = {}
    if leaf.bias is not None:
        edits[bias] = (Scale(Port(bias, "out"), t), Shift(Port(bias, "out"), shift))
    else:
        config = {**leaf_config(leaf), "bias": True}
        inserts[layer] = Insert(ModuleConfig(f"float-{config['type']}", config), "instead")
        derived[bias] = f"{norm}.running_mean"
        edits[bias] = (Put(Port(bias, "out"), shift),)
    dropped = frozenset(f"{norm}.{own}" for own in _STATISTICS if f"{norm}.{own}" in reader)
    heirs = {f"{norm}.weight": weight, f"{norm}.bias": bias}
    return Rewrite(edits=edits, derived=derived, inserts=inserts, dropped=dropped, heirs={old: new for old, new in heirs.items() if old in dropped})


def _refuse_dead_channels(leaf: nn.Module, weight: str, t: Tensor, norm: str, reader: TensorReader) -> None:
    """SpecError where a channel without variance would come out with the largest weights of its layer.

    Pruned and decayed channels have none either, and weights near 1e-7 (four of EfficientNet-Lite0's stem): folded, they stay far below the others.
    """
    still = reader[f"{norm}.running_var"] == 0
    if not bool(still.any()):
        return
    folded = layout(leaf).channels(reader[weight].double(), "out")[0].flatten(0, -2).abs().amax(0) * t.abs()
    rest = folded[~still].max() if bool((~still).any()) else torch.zeros(())
    if loud := (still & (folded > rest)).nonzero().flatten().tolist():
        raise SpecError(
            f"{norm}: the variance of channel {loud[0]} is 0, but its weights in {weight} are not; folded, they would be multiplied by γ/√eps and "
            f"reach {float(folded[loud[0]]):.3g}, those of all other channels {float(rest):.3g}.  Take the statistics anew on data that reaches the "
            'channel, or fold it all the same with zero_variance = "fold"'
        )


# which layer a batch norm belongs to -------------------------------------------------------------------------------------------------------


def batchnorm_pairs(model: nn.Module) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """((layer, batch norm) by path, in order; a sentence for each batch norm that has none).

    A pair is a layer whose output goes into the batch norm and nowhere else, both used once.
    """
    norms = {path: m for path, m in model.named_modules() if isinstance(m, NORMS)}
    if not norms:
        return [], ()
    notes = []
    for path, norm in norms.items():
        if type(norm) not in NORMS:
            notes.append(f"{path}: a {type(norm).__name__} may do more than normalize; not folded")
    try:
        found = _traced_pairs(model, trace(model))
    except Exception as e:  # whatever the model's forward does with a traced tensor
        found = _neighbours(model)
        notes.append(f"torch.fx cannot trace {type(model).__name__} ({type(e).__name__}): batch norms were looked for inside nn.Sequential alone")
    pairs = [(layer, norm) for layer, norm in found if norm in norms and type(norms[norm]) in NORMS]
    folded = {norm for _, norm in pairs}
    notes += [
        f"{path}: no layer of its own stands right before it; not folded" for path, m in norms.items() if type(m) in NORMS and path not in folded
    ]
    return pairs, tuple(notes)


def _traced_pairs(model: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[int, int] = {}
    calls = [n for n in graph.nodes if n.op == "call_module"]
    for node in calls:
        uses[id(modules[str(node.target)])] = uses.get(id(modules[str(node.target)]), 0) + 1
    pairs = []
    for node in calls:
        norm = modules[str(node.target)]
        if not isinstance(norm, NORMS) or uses[id(norm)] != 1:
            continue
        before = node.args[0] if node.args else None
        while (
            isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1 and isinstance(modules[str(before.target)], _PASSED)
        ):
            before = before.args[0] if before.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        leaf = modules[str(before.target)]
        if _foldable(leaf, norm) and uses[id(leaf)] == 1:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _before(node: fx.Node) -> fx.Node | None:
    """The module call whose output goes into this node and nowhere else."""
    before = node.args[0] if node.args else None
    return before if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1 else None


def _foldable(leaf: nn.Module, norm: nn.Module) -> bool:
    kind = next((k for k in LAYERS if isinstance(leaf, k)), None)
    outputs = leaf.out_features if isinstance(leaf, nn.Linear) else getattr(leaf, "out_channels", None)
    return kind is not None and type(leaf).forward is kind.forward and outputs == getattr(norm, "num_features", None)


def _neighbours(model: nn.Module) -> list[tuple[str, str]]:
    """Layer and batch norm next to each other in an nn.Sequential, each of which stands at one path alone."""
    paths: dict[int, int] = {}
    for _, m in model.named_modules(remove_duplicate=False):
        paths[id(m)] = paths.get(id(m), 0) + 1
    pairs = []
    for path, m in model.named_modules():
        if type(m) is not nn.Sequential:
            continue
        children = list(m.named_children())
        for (one, leaf), (other, norm) in pairwise(children):
            if isinstance(norm, NORMS) and _foldable(leaf, norm) and paths[id(leaf)] == paths[id(norm)] == 1:
                pairs.append((join(path, one), join(path, other)))
    return pairs
