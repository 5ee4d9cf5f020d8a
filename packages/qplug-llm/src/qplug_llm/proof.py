"""Is a candidate true?  Each one is tried on the twin: rewrite it at random, and compare logits in float64."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from qcore.model.topology import Invariance, Link, Port
from qcore.transforms.rewrite import Rewrite, permute_link, rotate_link, scale_link
from torch import Tensor, nn

from qplug_llm.links import Candidate
from qplug_llm.twin import outputs_of, sample_ids

# transformers' norms and softmaxes pass through float32, which leaves about 1e-6; a wrong link is off by 1e-2 and more
TOLERANCE = 2e-5
VISIBLE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What was proven of one candidate.

    variant:    which of its variants
    invariance: what leaves the outputs unchanged; empty = nothing
    reason:     what failed, for the axes that are then blocked
    """

    variant: int
    invariance: Invariance
    reason: str = ""


class Bench:
    """The twin's parameters and logits, to try rewrites on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.ids = sample_ids(model)
        self.base = self.logits({})

    @torch.no_grad()
    def logits(self, changed: dict[str, Tensor]) -> Tensor:
        """Tied parameters change one by one: the rewrite says which."""
        given = {"input_ids": self.ids, "use_cache": False}
        return outputs_of(torch.func.functional_call(self.model, changed, (), given, tie_weights=False))

    def difference(self, rewrite: Rewrite) -> float:
        """Largest change of the logits, relative to the largest logit."""
        changed = {}
        for name in rewrite.edits:
            owner = self.model.get_submodule(name.rpartition(".")[0])
            changed[name] = rewrite.tensor(name, self.parameters[name], owner)
        return float((self.logits(changed) - self.base).abs().max() / self.base.abs().max())

    def gain_ports(self, paths: Iterable[str]) -> tuple[Port, ...]:
        """The vectors of norms, which a permutation moves too."""
        return tuple(
            Port(f"{path}.{name}", "out")
            for path in paths
            for name, p in self.model.get_submodule(path).named_parameters(recurse=False)
            if p.ndim == 1
        )

    def try_link(self, link: Link, kind: Invariance, first: Rewrite | None = None) -> str:
        """ "" when `kind` leaves the logits unchanged, else what was seen.  first: a rewrite that comes before (folded gains)"""
        both = self._rewrite(link, kind)
        if first is not None:
            both = first.then(both)
        off = self.difference(both)
        if not off <= TOLERANCE:
            return f"a random {_WORD[kind]} changes the logits by {off:.1e}"
        half = self._rewrite(replace(link, reads=()), kind, norms=False)
        if not self.difference(half) > VISIBLE:
            return f"a random {_WORD[kind]} of its writers alone changes nothing, so the trial proves nothing"
        return ""

    def _rewrite(self, link: Link, kind: Invariance, norms: bool = True) -> Rewrite:
        g = torch.Generator().manual_seed(len(link.name))
        if kind is Invariance.SCALE:
            return scale_link(link, random_scales(link, g))
        if kind is Invariance.ROTATE:
            return rotate_link(link, random_rotations(link, g))
        return permute_link(link, random_order(link, g), self.gain_ports(link.through) if norms else ())

    def judge(self, candidate: Candidate, first: Rewrite | None = None) -> Verdict:
        """The first variant for which something is proven, and all that is."""
        reasons = []
        for i, link in enumerate(candidate.variants):
            proven = Invariance(0)
            for kind in Invariance:
                if kind not in link.invariance:
                    continue
                why = self.try_link(link, kind, first if kind is Invariance.ROTATE else None)
                if why:
                    reasons.append(why)
                else:
                    proven |= kind
            # a link whose scales may be free or shared: free ones say more
            if proven:
                return Verdict(i, proven, "; ".join(reasons))
        return Verdict(0, Invariance(0), "failed the numeric proof on a small twin: " + "; ".join(dict.fromkeys(reasons)))


_WORD = {Invariance.SCALE: "scale", Invariance.ROTATE: "rotation", Invariance.PERMUTE: "permutation"}


def random_scales(link: Link, g: torch.Generator) -> Tensor:
    """[C] in [0.5, 2], equal where the link shares scales."""
    t = 2 ** (2 * torch.rand(link.size, generator=g, dtype=torch.float64) - 1)
    if link.share == "none":
        return t
    heads = t.unflatten(0, (link.heads, -1)).clone()
    turned = link.rotary_dims or heads.shape[1]
    if link.share == "half":
        heads[:, turned // 2 : turned] = heads[:, : turned // 2]
    else:
        heads[:, 1:turned:2] = heads[:, 0:turned:2]
    return heads.flatten()


def random_rotations(link: Link, g: torch.Generator) -> Tensor:
    """[heads, C/heads, C/heads] orthogonal, one for each head."""
    n = link.size // link.heads
    return torch.linalg.qr(torch.randn(link.heads, n, n, generator=g, dtype=torch.float64))[0]


def random_order(link: Link, g: torch.Generator) -> Tensor:
    """A permutation inside each head.  [C]"""
    n = link.size // link.heads
    return torch.cat([h * n + torch.randperm(n, generator=g) for h in range(link.heads)])
