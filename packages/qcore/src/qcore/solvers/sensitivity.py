"""How much a model suffers when one weight is stored with fewer bits: scores that are added up over weights.

| metric | score of a weight under a candidate | looks at |
|---|---|---|
| mse | ‖ΔW‖² | weights |
| output | tr(ΔW G ΔWᵀ) / tr(W G Wᵀ): the share of the layer's output that is lost | inputs |
| spikes | ρ, the largest token's magnitude over the median token's, at the weight's input; × ε | inputs |
| cca | 1 - mean canonical correlation of the block's input and output; × ε | model |
| pruning | KL after the smallest half of the weight is set to zero; × ε | model |
| kl | KL of the model's outputs with this weight alone rounded, in nats a row | model |
| taylor | mean of |g · ΔW| over batches, g the gradient of the loss | gradients |
| fisher | ½ ΔWᵀ F ΔW: the second-order term of the KL, F from gradients | gradients |
| hessian-trace | tr(H) / n · ‖ΔW‖², Hutchinson's estimate | gradients |
| hessian-eigenvalue | (|mean λ| + std λ over batches) · ‖ΔW‖², power iteration | gradients |

ε is ‖ΔW‖² of the candidate over that of the cheapest one, so that the score of the cheapest is the metric itself.  The loss is the negative
log-likelihood of labels that are drawn from the model's own softmax: its Hessian is that of the KL, and no labels are needed.

Sources: spikes https://arxiv.org/abs/2405.14428; cca, pruning and taylor CPTQuant; hessian-trace HAWQ-V2 https://arxiv.org/abs/1911.03852;
hessian-eigenvalue Q-BERT https://arxiv.org/abs/1909.05840; fisher BRECQ https://arxiv.org/abs/2102.05426, equation 10, without the diagonal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError
from qcore.model.topology import Site
from qcore.numbers import QuantSpec
from qcore.solvers.allocate import Look, Needs, WholeModel
from qcore.solvers.base import WeightSolver
from qcore.solvers.hessian import eigenvalues, sampled_loss, traces

Metric = Literal["mse", "output", "spikes", "cca", "pruning", "kl", "taylor", "fisher", "hessian-trace", "hessian-eigenvalue"]
METRICS: tuple[str, ...] = get_args(Metric)
NEEDS: Mapping[str, Needs] = {
    "mse": "weights", "output": "inputs", "spikes": "inputs", "cca": "model", "pruning": "model", "kl": "model",
    "taylor": "gradients", "fisher": "gradients", "hessian-trace": "gradients", "hessian-eigenvalue": "gradients",
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What is tried: the specs, as the run would store them, and who rounds.

    batches: calibration batches that the whole model is run on;  pruned: share of a weight that "pruning" sets to zero
    """

    specs: tuple[QuantSpec, ...]
    probe: WeightSolver
    batches: int = 2
    seed: int = 0
    pruned: float = 0.5


@dataclass(frozen=True)
class Tried:
    """One weight, rounded to every candidate that it can be stored as.  values: [N, K] by the candidate's index"""

    site: Site
    weight: Tensor
    seen: Seen
    values: Mapping[int, Tensor]

    def errors(self) -> dict[int, float]:
        """‖ΔW‖² by candidate."""
        return {i: float((self.weight - v).double().square().sum()) for i, v in self.values.items()}

    def relative(self) -> dict[int, float]:
        """‖ΔW‖² by candidate, that of the worst being 1."""
        own = self.errors()
        worst = max(own.values())
        return {i: e / worst if worst else 0.0 for i, e in own.items()}


Scores = dict[Site, dict[int, float]]


def score(metric: str, sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    """The score of every weight under every candidate that it can be stored as."""
    return _HOW[metric](sites, look, trial)


def tried(sites: Sequence[Site], look: Look, trial: Trial, observers: tuple[Observer, ...] = ()) -> Iterator[Tried]:
    """Every weight in turn, rounded to its candidates."""
    wanted = {o.name: o for o in (*observers, *trial.probe.observes)}
    if wanted:
        around: Iterator[tuple[Site, Seen]] = look.observe({site: tuple(wanted.values()) for site in sites})
    else:
        around = ((site, {}) for site in sites)
    for site, seen in around:
        w = look.weight(site).float()
        fits = [i for i, spec in enumerate(trial.specs) if look.nbytes(site, spec) is not None]
        yield Tried(site, w, seen, {i: trial.probe.solve(w, trial.specs[i], seen).dequantize() for i in fits})


# from weights and inputs -----------------------------------------------------------------------------------------------------------------


def _mse(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    return {t.site: t.errors() for t in tried(sites, look, trial)}


def _output(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    from qcore.calibration.observers import Gram

    scores: Scores = {}
    for t in tried(sites, look, trial, (Gram(),)):
        whole = _through(t.weight, t.seen["gram"])
        scores[t.site] = {i: _through(t.weight - v, t.seen["gram"]) / max(whole, 1e-300) for i, v in t.values.items()}
    return scores


def _through(w: Tensor, gram: Tensor) -> float:
    """tr(W G Wᵀ), parts of grouped layers each with their own G."""
    parts = w.double().unflatten(0, (gram.shape[0] if gram.ndim == 3 else 1, -1))
    return float((parts @ gram.double() * parts).sum())


def _spikes(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    from qcore.calibration.observers import Spikes

    return {t.site: {i: t.seen["spikes"] * e for i, e in t.relative().items()} for t in tried(sites, look, trial, (Spikes(),))}


# from the outputs of the whole model -----------------------------------------------------------------------------------------------------


def kl(reference: Tensor, candidate: Tensor) -> float:
    """Mean KL(reference ‖ candidate) over rows of logits, in nats."""
    p, q = (torch.log_softmax(t.double(), -1) for t in (reference, candidate))
    return float(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).mean())


def _substituted(model: WholeModel, trial: Trial, references: Sequence[Tensor], site: Site, value: Tensor) -> float:
    """KL of the model with one weight exchanged, over the batches of the trial."""
    found = [kl(reference, model.outputs(b, {site: value})) for b, reference in enumerate(references)]
    return sum(found) / len(found)


def _references(model: WholeModel, trial: Trial) -> list[Tensor]:
    return [model.outputs(b) for b in range(min(trial.batches, model.batches))]


@torch.no_grad()
def _kl(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    kept = _all(sites, look, trial)
    model = look.model()
    references = _references(model, trial)
    return {t.site: {i: _substituted(model, trial, references, t.site, v) for i, v in t.values.items()} for t in kept}


@torch.no_grad()
def _pruning(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    kept = [(t.site, _pruned(t.weight, trial.pruned), t.relative()) for t in tried(sites, look, trial)]
    model = look.model()
    references = _references(model, trial)
    return {site: _times(_substituted(model, trial, references, site, w), errors) for site, w, errors in kept}


def _pruned(w: Tensor, share: float) -> Tensor:
    """w without its smallest entries."""
    count = int(share * w.numel())
    return w if not count else torch.where(w.abs() > w.abs().flatten().kthvalue(count).values, w, 0.0)


@torch.no_grad()
def _cca(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    errors = {t.site: t.relative() for t in tried(sites, look, trial)}
    model = look.model()
    found: dict[Site, list[float]] = {}
    for b in range(min(trial.batches, model.batches)):
        for own, x, y in model.blocks(b):
            changed = 1 - canonical_correlation(x, y)
            for site in own:
                found.setdefault(site, []).append(changed)
    return {site: _times(sum(found[site]) / len(found[site]), own) for site, own in errors.items()}


def canonical_correlation(x: Tensor, y: Tensor) -> float:
    """The mean canonical correlation of rows [T, C] and [T, D]; CalibrationError where there are too few rows to tell it from 1."""
    if x.shape[0] <= x.shape[1] + y.shape[1]:
        raise CalibrationError(
            f"canonical correlations of {x.shape[1]} and {y.shape[1]} channels need more rows than both together, got {x.shape[0]}; "
            "use larger batches (calibration.batch, calibration.length), or another metric"
        )
    bases = [torch.linalg.qr((t - t.mean(0)).double()).Q for t in (x, y)]
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(0, 1).mean())


def _times(factor: float, errors: Mapping[int, float]) -> dict[int, float]:
    return {i: factor * e for i, e in errors.items()}


def _all(sites: Sequence[Site], look: Look, trial: Trial) -> list[Tried]:
    """All weights under all candidates, in half precision: they are held at once."""
    return [Tried(t.site, t.weight, {}, {i: v.bfloat16() for i, v in t.values.items()}) for t in tried(sites, look, trial)]


# from gradients of the whole model -------------------------------------------------------------------------------------------------------


def _gradients(sites: Sequence[Site], look: Look, trial: Trial) -> tuple[dict[Site, Tensor], WholeModel, list[int]]:
    """The float matrices, the model, and the batches; CalibrationError, before anything long, where outputs have no gradient."""
    model = look.model()
    weights = {site: look.weight(site).float().requires_grad_() for site in sites}
    sampled_loss(model, 0, {sites[0]: weights[sites[0]]}, trial.seed)
    return weights, model, list(range(min(trial.batches, model.batches)))


def _first_order(sites: Sequence[Site], look: Look, trial: Trial, of: Callable[[float, int], float]) -> Scores:
    """The mean over batches of `of`(g · ΔW, rows)."""
    weights, model, batches = _gradients(sites, look, trial)
    kept = {t.site: {i: (t.weight - v).bfloat16() for i, v in t.values.items()} for t in tried(sites, look, trial)}
    scores: Scores = {site: dict.fromkeys(own, 0.0) for site, own in kept.items()}
    for b in batches:
        loss, rows = sampled_loss(model, b, weights, trial.seed)
        for site, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            for i, delta in kept[site].items():
                scores[site][i] += of(float((g * delta).double().sum()), rows) / len(batches)
    return scores


def _taylor(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    return _first_order(sites, look, trial, lambda change, rows: abs(change))


def _fisher(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    # the gradient of a mean over rows of independent labels has the Fisher matrix over their number as its covariance
    return _first_order(sites, look, trial, lambda change, rows: 0.5 * rows * change * change)


def _curved(sites: Sequence[Site], look: Look, trial: Trial, of: Callable[..., dict[Site, float]]) -> Scores:
    weights, model, batches = _gradients(sites, look, trial)
    curvature = of(model, weights, batches, trial.seed)
    return {t.site: _times(curvature[t.site], t.errors()) for t in tried(sites, look, trial)}


def _trace(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    return _curved(sites, look, trial, lambda *a: {site: abs(t) / look.weight(site).numel() for site, t in traces(*a).items()})


def _eigenvalue(sites: Sequence[Site], look: Look, trial: Trial) -> Scores:
    def spread(*a: object) -> dict[Site, float]:
        found = {site: torch.tensor(own, dtype=torch.float64) for site, own in eigenvalues(*a).items()}  # type: ignore[arg-type]
        return {site: float(own.mean().abs() + own.std(correction=0)) for site, own in found.items()}

    return _curved(sites, look, trial, spread)


_HOW: Mapping[str, Callable[[Sequence[Site], Look, Trial], Scores]] = {
    "mse": _mse, "output": _output, "spikes": _spikes, "cca": _cca, "pruning": _pruning, "kl": _kl,
    "taylor": _taylor, "fisher": _fisher, "hessian-trace": _trace, "hessian-eigenvalue": _eigenvalue,
}  # fmt: skip
