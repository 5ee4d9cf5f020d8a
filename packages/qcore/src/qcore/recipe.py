"""`Recipe`: how the stored numbers of a model are found.  Nothing at run time needs it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from qcore.calibration.coverage import BELOW, Below
from qcore.calibration.observer import Observer
from qcore.calibration.selectors import Selector
from qcore.calibration.source import CalibrationSource
from qcore.errors import SpecError
from qcore.model.topology import Site, Topology
from qcore.numbers import PerHead, QuantSpec
from qcore.solvers.allocate import Allocator
from qcore.solvers.base import BlockSolver, WeightSolver
from qcore.transforms.base import Transform

AUTO_SCALE = "auto"


@dataclass(frozen=True)
class Rule:
    """What to store for the sites that match; the last rule that matches a site wins.

    sites:   a shell pattern over the names of a site (`Site.names`): "*:weight", "*.down_proj:weight", "*:input", "*.experts.*:weight", "*:router"
    spec:    what to store; None leaves the site float
    solver:  another solver for these sites; None = the recipe's
    packing: a packing by name; None = the first that accepts the spec
    scale:   "auto" = the scale dtype that the model's own dtype holds exactly (see `resolve_scale`); only for specs with a float scale
    observer: what finds the range of activations with static scales; None = the extremes
    window:   of keys and values in a cache: so many tokens at its end stay float.  A number, 0 too, says that the rule is about a cache, and a plan
              for a model without one refuses it; None = a cached tensor has no window
    """

    sites: str
    spec: QuantSpec | None
    solver: WeightSolver | None = None
    packing: str | None = None
    scale: Literal["auto", "spec"] = "auto"
    observer: Observer | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 0 or self.spec is None):
            raise SpecError(f"rule {self.sites!r}: window is a number of cached tokens that stay float, 0 or more, got {self.window} for {self.spec}")
        if self.observer is not None and (self.spec is None or self.spec.when != "static"):
            raise SpecError(f"rule {self.sites!r}: an observer finds static scales of activations, but this rule stores {self.spec or 'floats'}")


@dataclass(frozen=True)
class CalibrationSettings:
    """How much calibration data is used, and which.

    samples: sequences (or images);  length: tokens of each, for text;  batch: sequences of one forward pass (a fixed shape, so that bits repeat)
    seed:    chooses the samples
    starts:  for language models, this many sequences of one token each are added, drawn from the samples' own tokens.  Every later token attends to
             the first one of its sequence (the attention sink), so an error there is an error everywhere; but only one row in `length` is one
    starts_weight: what all starts together weigh, against all other rows together
    precision: of the matrix products of the model while it is calibrated (statistics are always float32): "float32", "bfloat16", or "auto" =
             bfloat16 where the processor multiplies it natively, which takes half the time
    select:  chooses the samples by what they are about (`qcore.calibration.selectors`), in place of the seed
    candidates: how many windows it chooses from, at most; where the text has more, the seed draws them
    affinity: exponent of a row's weight, where a tap gives one: what a router multiplies an expert's output with.  1: MoEQuant's affinity-guided
             error (https://arxiv.org/abs/2505.03804);  2: the squared error of what is added to the stream;  0: every row alike
    source:  makes the calibration data with the float model, such as text that it samples from itself; None = windows of the calibration text
    minimum, below: rows that each part of a fused stack (an expert) must see, and what is done about parts that see fewer: see `Ledger`
    """

    samples: int = 64
    length: int = 512
    batch: int = 8
    seed: int = 0
    starts: int = 0
    starts_weight: float = 1.0
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    select: Selector | None = None
    candidates: int = 2048
    affinity: float = 1.0
    minimum: int = 1
    below: Below = "fail"
    source: CalibrationSource | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch", "candidates", "minimum"):
            if getattr(self, name) < 1:
                raise SpecError(f"calibration.{name} is at least 1, got {getattr(self, name)}")
        if self.starts < 0 or self.starts_weight <= 0:
            raise SpecError(f"calibration.starts is 0 or more and starts_weight positive, got {self.starts} and {self.starts_weight}")
        if self.precision not in ("float32", "bfloat16", "auto"):
            raise SpecError(f"calibration.precision is float32, bfloat16 or auto, got {self.precision!r}")
        if not self.affinity >= 0:
            raise SpecError(f"calibration.affinity is an exponent, 0 or more, got {self.affinity}")
        if self.below not in BELOW:
            raise SpecError(f"calibration.below is one of {', '.join(BELOW)}, got {self.below!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules say what is stored; transforms, solver and calibration say how it is found.

    block_solver: improves the codes of each block's weights together, once each was solved on its own; None = nobody
    allocator: chooses spec and solver for the weights that the rules quantize, once all are known; None = what the rules say
    propagate: what a block is calibrated on. "weights": the outputs of the quantized blocks before it, activations float;
               "all": also with quantized activations; "float": the float model's own
    correct_bias: take from each layer's bias what the codes of its weight add to its mean output, b' = b - (Ŵ - W)·E[x]: Nagel et al. 2019,
               https://arxiv.org/abs/1906.04721, section 4.2, equation 17.  E[x] is measured on calibration data, behind layers that are
               corrected already (the paper's appendix D), not taken from batch norms.  Layers without a bias are left as they are
    """

    name: str = "recipe"
    description: str = ""
    rules: tuple[Rule, ...]
    solver: WeightSolver
    block_solver: BlockSolver | None = None
    transforms: tuple[Transform, ...] = ()
    allocator: Allocator | None = None
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    propagate: Literal["float", "weights", "all"] = "weights"
    correct_bias: bool = False

    def rule_for(self, site: Site) -> Rule | None:
        """The last rule whose pattern matches."""
        names = site.names
        return next((r for r in reversed(self.rules) if any(fnmatchcase(name, r.sites) for name in names)), None)

    def specs_for(self, sites: Iterable[Site], dtype_name: str | None = "float32") -> dict[Site, QuantSpec]:
        """What to store for each site that is to be quantized.

        dtype_name: of the model, for automatic scale dtypes; None for activations, whose scales stay float32
        """
        specs = {}
        for site in sites:
            rule = self.rule_for(site)
            if rule is not None and rule.spec is not None:
                auto = rule.scale == "auto" and dtype_name is not None
                spec = resolve_scale(rule.spec, dtype_name) if auto else rule.spec  # type: ignore[arg-type]
                if spec.granularity == PerHead() and site.heads:
                    spec = replace(spec, granularity=PerHead(site.heads))
                specs[site] = spec
        return specs

    def wishes(self, topology: Topology, dtype_name: str) -> dict[Site, QuantSpec]:
        """What to store for every site of a model: weights, what they read, and tensors inside modules."""
        inputs = [site.input for site in topology.sites]
        return self.specs_for(topology.sites, dtype_name) | self.specs_for([*inputs, *topology.activations], None)

    def unmatched(self, sites: Iterable[Site]) -> list[Rule]:
        """Rules that match none of `sites`: a typing error, most likely."""
        names = [name for site in sites for name in site.names]
        return [rule for rule in self.rules if not any(fnmatchcase(name, rule.sites) for name in names)]


def resolve_scale(spec: QuantSpec, dtype_name: str) -> QuantSpec:
    """The 16-bit scale dtype that survives a cast to the model's: bfloat16 for bfloat16 models, else float16.

    Loaders cast scales to the model's dtype; a scale that this cast moves would put weights off the grid on which they were solved.
    """
    if isinstance(spec.scale, QuantSpec) or spec.when == "dynamic":
        return spec
    return replace(spec, scale="bfloat16" if dtype_name == "bfloat16" else "float16")


def describe(recipe: Recipe) -> Mapping[str, Any]:
    """The record of a recipe: its name and the `repr` of every part."""
    return {
        "name": recipe.name,
        "description": recipe.description,
        "rules": [
            {"sites": r.sites, "spec": None if r.spec is None else str(r.spec), "solver": None if r.solver is None else repr(r.solver)}
            | ({} if r.window is None else {"window": r.window})
            for r in recipe.rules
        ],
        "solver": repr(recipe.solver),
        "block_solver": None if recipe.block_solver is None else repr(recipe.block_solver),
        "transforms": [repr(t) for t in recipe.transforms],
        "allocator": None if recipe.allocator is None else repr(recipe.allocator),
        "calibration": repr(recipe.calibration),
        "propagate": recipe.propagate,
        "correct_bias": recipe.correct_bias,
    }
