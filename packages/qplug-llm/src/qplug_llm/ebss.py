"""Expert-balanced self-sampling: the model writes its own calibration text, and writes it so that all of its experts are used.

Source: MoEQuant, https://arxiv.org/abs/2505.03804, section 3.1.  Of a set of texts the paper wants PPL·exp(σ/τ) small; so a beam search over tokens,
whose branch S with log-probability R and length n costs -R/n + σ(S)/τ.  σ is the imbalance: for each layer the standard deviation (with E - 1) of the
shares of tokens that its experts got, then the mean over layers.  A token's experts are known only after it was fed, so a candidate S·v is charged
with the σ of S (the paper's deferred update): a constant within a branch, so that only each branch's most likely tokens can survive.

Where the paper contradicts itself: costs are minimized (its algorithm 1 and equation 14 say top-k of a cost), σ is that of equation 4 (the algorithm
has E / (E - 1)), and it is deferred (the algorithm scores the new candidate).  Released code (EBSS_gen.py) lacks the balance term altogether.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from qcore.calibration.source import Progress
from qcore.calibration.text import Amount, data_hash
from qcore.errors import CalibrationError, NotFound, SpecError
from torch import Tensor, nn

from qplug_llm.experts import stacks


class Stepper(Protocol):
    """A language model with experts, one token at a time for many rows.

    experts: of each layer, [L]
    """

    experts: Tensor

    def step(self, tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append one token to each row.

        tokens:  [B];  parents: [B] which row of the step before each row goes on from, None = they begin
        return:  log-probabilities of the next token [B, V], and how often each expert was chosen for this one [B, L, E]
        """


class Found(NamedTuple):
    """The cheapest branch of every search.

    tokens: [S, length];  logprob: [S], of all tokens but the first;  imbalance: [S], σ;  counts: [S, L, E]
    """

    tokens: Tensor
    logprob: Tensor
    imbalance: Tensor
    counts: Tensor

    def costs(self, tau: float) -> Tensor:
        """-R/n + σ/τ.  [S]"""
        return -self.logprob / self.tokens.shape[1] + self.imbalance / tau


def imbalance(counts: Tensor, tokens: int, experts: Tensor) -> Tensor:
    """σ: mean over layers of the standard deviation (with E - 1) of the share of tokens that each expert got.

    counts: [..., L, E], zero beyond a layer's experts;  experts: [L]
    return: [...] float64;  0 when every expert got as many
    """
    share = counts.double() / tokens
    size = experts.double()
    there = torch.arange(counts.shape[-1]) < experts.unsqueeze(1)
    mean = share.sum(-1) / size
    square = ((share - mean.unsqueeze(-1)).square() * there).sum(-1)
    return (square / (size - 1).clamp(min=1)).sqrt().mean(-1)


def search(
    model: Stepper,
    first: Tensor,
    *,
    length: int,
    width: int,
    tau: float,
    warmup: int = 0,
    banned: Sequence[int] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Found:
    """One beam search for each first token, all at once.

    first:  [S];  width: branches of each search
    tau:    what one unit of imbalance costs is 1/tau; infinite = a beam search by mean log-probability alone
    warmup: tokens after the first that are chosen without the imbalance, so that a phrase gets under way
    banned: tokens that are never chosen, such as the one that ends a text: sequences have exactly `length` tokens

    Branches of one search never become equal: they start from one, and two candidates differ in their parent or in their token.
    """
    S = len(first)
    tokens = first.view(S, 1, 1)
    logprob = torch.zeros(S, 1, dtype=torch.float64)
    likely, chosen = model.step(first, None)
    counts = chosen.view(S, 1, *chosen.shape[1:])
    for n in range(1, length):
        progress(n)
        w = logprob.shape[1]
        next_ = likely.double().view(S, w, -1).clone()
        next_[..., list(banned)] = -torch.inf
        best, token = next_.topk(min(width, next_.shape[-1]), dim=-1)  # [S, w, k]
        cost = -(logprob.unsqueeze(-1) + best) / (n + 1)
        if n > warmup:
            cost = cost + imbalance(counts, n, model.experts).unsqueeze(-1) / tau
        kept = cost.flatten(1).topk(min(width, cost[0].numel()), largest=False).indices  # [S, w']
        parent = kept // best.shape[-1]
        logprob = (logprob.unsqueeze(-1) + best).flatten(1).gather(1, kept)
        word = token.flatten(1).gather(1, kept)
        tokens = torch.cat([_of(tokens, parent), word.unsqueeze(-1)], -1)
        likely, chosen = model.step(word.flatten(), (parent + torch.arange(S).unsqueeze(1) * w).flatten())
        counts = _of(counts, parent) + chosen.view(S, -1, *chosen.shape[1:])
    off = imbalance(counts, length, model.experts)
    winner = (-logprob / length + off / tau).argmin(1, keepdim=True)
    return Found(*(_of(t, winner).squeeze(1) for t in (tokens, logprob, off, counts)))


def _of(x: Tensor, index: Tensor) -> Tensor:
    """Branches `index` [S, w'] of x [S, w, ...]."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:]))


class CachedModel:
    """A causal language model of transformers as a `Stepper`: keys and values are kept, and follow their branches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stacks = list(stacks(model).values())
        if not self.stacks:
            raise NotFound(f"{type(model).__name__} has no fused experts to balance; calibrate it on text")
        self.experts = torch.tensor([int(m.num_experts) for m in self.stacks])  # type: ignore[arg-type]
        self._cache: Any = None
        self._chosen: list[Tensor] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the routers' choices are seen."""
        handles = [m.register_forward_pre_hook(self._note, with_kwargs=True) for m in self.stacks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._cache = None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._chosen.append(args[1] if len(args) > 1 else kwargs["top_k_index"])

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        if parents is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
        elif not torch.equal(parents, torch.arange(len(parents))):
            self._cache.reorder_cache(parents)
        self._chosen = []
        out = self.model(input_ids=tokens.unsqueeze(1), past_key_values=self._cache, use_cache=True)
        return out.logits[:, -1].float().log_softmax(-1), self._counts(self._chosen, len(tokens))

    @torch.no_grad()
    def counts(self, windows: Tensor, batch: int = 8) -> Tensor:
        """How often each expert was chosen in each window.  [n, length] → [n, L, E]"""
        found = []
        for part in windows.split(batch):
            self._chosen = []
            self.model(input_ids=part, use_cache=False)
            found.append(self._counts(self._chosen, len(part)))
        return torch.cat(found)

    def _counts(self, chosen: Sequence[Tensor], rows: int) -> Tensor:
        if len(chosen) != len(self.stacks):
            raise CalibrationError(
                f"{len(chosen)} of {len(self.stacks)} stacks of experts ran in a forward pass; layers that take turns cannot be balanced"
            )
        counts = torch.zeros(rows, len(chosen), int(self.experts.max()) + 1, dtype=torch.int64)
        for layer, index in enumerate(chosen):
            own = index.reshape(rows, -1).clamp(max=int(self.experts[layer]))  # a sentinel lands behind the last expert
            counts[:, layer].scatter_add_(1, own, torch.ones_like(own))
        for layer, size in enumerate(self.experts.tolist()):
            counts[:, layer, size:] = 0
        return counts[..., :-1]


@dataclass(frozen=True, kw_only=True)
class EBSS:
    """Calibration text that the model samples from itself, likely and spread evenly over its experts.

    tau:      1/tau is the price of imbalance, in nats for each token
    width:    branches of each beam search
    warmup:   tokens after the first (which is drawn at random) that are chosen by likelihood alone
    together: searches that run at once
    minimum:  0: all windows are sampled.  Else the calibration text is used, and topped up with sampled windows until every expert has this many
              tokens, or as many windows were added as the text has
    path:     a file that keeps the windows (safetensors); they are sampled where it is not there yet, and reused where it is

    Source: https://arxiv.org/abs/2505.03804, algorithm 1; the paper samples 128 sequences of 512 tokens.
    """

    name: ClassVar[str] = "ebss"
    tau: float = 1.2
    width: int = 4
    warmup: int = 3
    together: int = 16
    minimum: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise SpecError(f"ebss: tau is positive, got {self.tau}; a large one prices imbalance low")
        for name in ("width", "together"):
            if getattr(self, name) < 1:
                raise SpecError(f"ebss: {name} is at least 1, got {getattr(self, name)}")
        if self.warmup < 0 or self.minimum < 0:
            raise SpecError(f"ebss: warmup and minimum are 0 or more, got {self.warmup} and {self.minimum}")

    def needs_text(self) -> bool:
        return self.minimum > 0

    # the sampled set ----------------------------------------------------------------------------------------------------------------------------

    def windows(self, model: nn.Module, settings: Amount, text: Tensor | None, progress: Progress) -> Tensor:
        """See `CalibrationSource.windows`.  Written to `path`, where there is one."""
        stepper = CachedModel(model)
        with stepper.watched():
            made = (
                self._sampled(stepper, settings, progress) if text is None or not self.minimum else self._topped_up(stepper, settings, text, progress)
            )
        if self.path:
            self._keep(made, model, settings)
        return made

    def _sampled(self, stepper: CachedModel, settings: Amount, progress: Progress) -> Tensor:
        return torch.cat([found.tokens for found in self._searches(stepper, settings, settings.samples, progress)])

    def _topped_up(self, stepper: CachedModel, settings: Amount, text: Tensor, progress: Progress) -> Tensor:
        there = torch.arange(int(stepper.experts.max())) < stepper.experts.unsqueeze(1)
        counts, windows = stepper.counts(text).sum(0), [text]
        searches = self._searches(stepper, settings, len(text), progress)
        while bool((counts[there] < self.minimum).any()):
            found = next(searches, None)
            if found is None:
                break  # the recipe's policy says what happens to experts that are still short
            windows.append(found.tokens)
            counts = counts + found.counts.sum(0)
        whole = torch.cat(windows)
        return whole[: len(whole) // settings.batch * settings.batch] if len(whole) > settings.batch else whole

    def _searches(self, stepper: CachedModel, settings: Amount, samples: int, progress: Progress) -> Iterator[Found]:
        """Batches of `together` searches, from different first tokens as long as there are any."""
        config: Any = stepper.model.config
        special = _special(config)
        ordinary = torch.tensor([t for t in range(config.vocab_size) if t not in special])
        order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(settings.seed))
        first = ordinary[order.repeat(-(-samples // len(order)))[:samples]]
        for start in range(0, samples, self.together):
            part = first[start : start + self.together]

            def report(n: int, start: int = start, part: Tensor = part) -> None:
                progress("sample", start * settings.length + n * len(part), samples * settings.length)

            yield search(
                stepper, part, length=settings.length, width=self.width, tau=self.tau, warmup=self.warmup, banned=sorted(special), progress=report
            )
        progress("sample", samples * settings.length, samples * settings.length)

    # the file ---------------------------------------------------------------------------------------------------------------------------------

    def kept(self, model: nn.Module, settings: Amount) -> Tensor | None:
        """The windows in `path`; CalibrationError where they were made with other options, or by another model."""
        if not self.path or not Path(self.path).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as f:
                made = json.loads((f.metadata() or {}).get("ebss", "null"))
                windows = f.get_tensor("windows").long()
        except (SafetensorError, OSError, ValueError) as e:
            raise CalibrationError(f"{self.path} cannot be read as sampled windows ({e}); delete it, and they are sampled anew") from e
        wanted = self._label(model, settings)
        other = sorted(k for k in wanted if not isinstance(made, dict) or made.get(k) != wanted[k])
        if other:
            was = {k: made.get(k) if isinstance(made, dict) else None for k in other}
            raise CalibrationError(
                f"{self.path} holds windows that were sampled otherwise: {', '.join(f'{k} was {was[k]!r} and is {wanted[k]!r}' for k in other)}; "
                "name another file, or delete this one"
            )
        return windows

    def _keep(self, windows: Tensor, model: nn.Module, settings: Amount) -> None:
        from safetensors.torch import save_file

        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({"windows": windows.int()}, part, metadata={"ebss": json.dumps(self._label(model, settings) | {"sha256": data_hash(windows)})})
        part.replace(path)

    def _label(self, model: nn.Module, settings: Amount) -> dict[str, Any]:
        """What decides the windows, apart from the weights' values."""
        options = {k: v for k, v in asdict(self).items() if k != "path"}
        return options | {"samples": settings.samples, "length": settings.length, "seed": settings.seed, "model": _fingerprint(model)}


def _special(config: Any) -> set[int]:
    """Ids of tokens that are no text: those that begin, end or fill up one."""
    found: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        found |= {value} if isinstance(value, int) else set(value or ())
    return {t for t in found if 0 <= t < config.vocab_size}


def _fingerprint(model: nn.Module) -> str:
    """Tells one architecture from another; weights may be on meta, so they are left out."""
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config", "use_cache")
    text = json.dumps({k: v for k, v in config.items() if k not in volatile}, sort_keys=True, default=str)
    return f"{type(model).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
