"""Running a model block by block, and looking at what its sites see.

Two ways to feed a block.  "previous": its first argument is what the block before put out; the other arguments (masks, rotary tables) are recorded
once, by running the model with every block replaced by a relay that only passes its input on.  So the weights of no block but the one at hand are
needed, and a model larger than memory can be calibrated.  "rerun": the model is run from the start and stopped behind the block, or, where
that is proven to be the same, before it, once, and the block is run alone from then on (`entries.py`).

Inside a block, a stage is one pass that stops as soon as its sites have been seen; modules whose weights are already solved are run once and their
outputs kept, so that going stage by stage costs little more than one forward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.coverage import Rows
from qcore.calibration.entries import BlockInput, Entries, StopForward, versions
from qcore.calibration.observer import Observer, Seen
from qcore.errors import CalibrationError, at
from qcore.model.adapter import Batch, ModelAdapter
from qcore.model.layers import layout
from qcore.model.tap import Tap, attach, detach, run_context, running
from qcore.model.topology import Block, Site, within
from qcore.modules.online import Online
from qcore.processes import Alone, Processes

Progress = Callable[[str, int, int], None]


class _Relay(nn.Module):
    """Stands in for a block: records its arguments and passes its first one on, in the form in which the block would."""

    def __init__(self, as_tuple: bool, replacement: Tensor | None = None) -> None:
        super().__init__()
        self.as_tuple, self.replacement = as_tuple, replacement
        self.seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = (args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        out = hidden if self.replacement is None else self.replacement
        return (out,) if self.as_tuple else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # models look at attributes of their blocks (attention_type, layer_type); the block itself answers
            original = self.__dict__.get("original")
            if original is None:
                raise
            return getattr(original, name)


@contextmanager
def _relays(model: nn.Module, blocks: Sequence[Block], as_tuple: bool) -> Iterator[list[_Relay]]:
    originals = [model.get_submodule(b.module) for b in blocks]
    relays = []
    for block, original in zip(blocks, originals, strict=True):
        relay = _Relay(as_tuple)
        relay.__dict__["original"] = original
        relays.append(relay)
        model.set_submodule(block.module, relay)
    try:
        yield relays
    finally:
        for block, original in zip(blocks, originals, strict=True):
            model.set_submodule(block.module, original)


class BlockFeed:
    """The inputs of one block after the other, for all calibration batches.

    model:   everything outside the blocks has its weights; blocks may be on meta
    blocks:  in order of execution, all of one `feed`
    autocast: dtype of matrix products while calibrating, None = as the weights are
    affinity: exponent of the row weights that taps give; 0 = every row alike
    processes: that calibrate together; `batches` are those of this one
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        blocks: Sequence[Block],
        batches: Sequence[Batch],
        autocast: torch.dtype | None = None,
        affinity: float = 1.0,
        processes: Processes | None = None,
    ) -> None:
        if not batches:
            raise CalibrationError("there are no calibration batches; pass --calib with a text file, or a data-free recipe such as w4a16-rtn")
        feeds = {b.feed for b in blocks}
        if len(feeds) > 1:
            raise CalibrationError(f"blocks mix the feeds {', '.join(sorted(feeds))}; an adapter uses one for all")
        self.model, self.adapter, self.blocks, self.batches, self.autocast = model, adapter, tuple(blocks), batches, autocast
        self.affinity, self.processes = affinity, processes or Alone()
        self.rerun = feeds == {"rerun"}
        self._contexts = [adapter.context(b) for b in batches]
        # a model that is one block is run whole in any case
        self.entries = Entries(model, [b.module for b in blocks], self._rerun, len(batches)) if self.rerun and len(blocks) > 1 else None
        self._hidden: Sequence[Tensor] = []
        self._arguments: list[list[BlockInput]] = []  # [block][batch], hidden states left out of all but the first
        self.as_tuple = False  # whether blocks return their hidden states as the first of several
        self.visited_once: set[tuple[Any, ...]] = set()  # kinds of stages in which a whole pass saw every site once
        self.rests: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}  # what such a module returns beside it
        self.tails: dict[tuple[Any, ...], dict[str, str]] = {}  # kind of block → {module: the leaf whose output it returns}

    @torch.no_grad()
    def start(self, run_block: Callable[[Block, BlockInput], Any] | None = None, as_tuple: bool | None = None) -> None:
        """Record what every block is called with.

        run_block: runs one block with its weights on one input; only asked for the first block, to see in what form it returns
        as_tuple:  what that would find out, where it is known
        """
        if self.rerun:
            return
        if as_tuple is not None:
            self.as_tuple, run_block = as_tuple, None
        first, context = self.blocks[:1], self._contexts[0]
        with _relays(self.model, self.blocks, False) as relays:
            with running(context), ExitStack() as stack:
                hook = relays[0].register_forward_hook(_stop)
                stack.callback(hook.remove)
                with suppress(StopForward):
                    self.adapter.outputs(self.model, self.batches[0])
            seen = relays[0].seen
        if seen is None:
            raise CalibrationError(f"block {first[0].module} was not run by a forward pass; the adapter's blocks are not the model's")
        if run_block is not None:
            out = run_block(first[0], BlockInput(*seen, context))
            self.as_tuple = isinstance(out, tuple)
        self._arguments = [[] for _ in self.blocks]
        hidden = []
        with _relays(self.model, self.blocks, self.as_tuple) as relays:
            for batch, context in zip(self.batches, self._contexts, strict=True):
                with running(context), ExitStack() as stack:
                    stack.callback(relays[-1].register_forward_hook(_stop).remove)
                    with suppress(StopForward):
                        self.adapter.outputs(self.model, batch)
                for i, relay in enumerate(relays):
                    if relay.seen is None:
                        raise CalibrationError(
                            f"block {self.blocks[i].module} was not run by a forward pass; the adapter's blocks are not the model's"
                        )
                    recorded = BlockInput(*relay.seen, context)
                    if i == 0:
                        hidden.append(recorded.hidden)
                    self._arguments[i].append(recorded.with_hidden(torch.empty(0)))
                    relay.seen = None
        self._hidden = hidden

    def inputs(self, index: int) -> list[BlockInput]:
        """What block `index` is called with now, one for each batch."""
        return [a.with_hidden(h) for a, h in zip(self._arguments[index], self._hidden, strict=True)]

    def advance(self, hidden: Sequence[Tensor]) -> None:
        """The block at hand put out `hidden`, one tensor a batch; the next one reads it."""
        self._hidden = hidden

    @torch.no_grad()
    def outputs(self, batch: int) -> Tensor:
        """What the model puts out for one batch, when its last block put out what was handed to `advance`."""
        with _relays(self.model, self.blocks, self.as_tuple) as relays, running(self._contexts[batch]):
            relays[-1].replacement = self._hidden[batch]
            return self.adapter.outputs(self.model, self.batches[batch])

    @torch.no_grad()
    def run(self, index: int, batch: int, module: nn.Module) -> Any:
        """Run block `index` on one batch; returns its output, or None where the whole model was rerun."""
        with self.cast():
            call = self._call(index, batch)
            if call is not None:
                return call.call(module)
            with ExitStack() as stack:
                stack.callback(module.register_forward_hook(_stop).remove)
                with suppress(StopForward):
                    self._rerun(batch)
            return None

    def forward(self, index: int, batch: int, module: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """What block `index` puts out for one batch, with gradients where they are enabled.

        hidden: what it reads instead; not where the model is rerun
        """
        seen: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise StopForward

        with self.cast(), ExitStack() as stack:
            call = self._call(index, batch)
            stack.callback(module.register_forward_hook(keep).remove)
            with suppress(StopForward):
                if call is None:
                    self._rerun(batch)
                else:
                    (call if hidden is None else call.with_hidden(hidden)).call(module)
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def _call(self, index: int, batch: int) -> BlockInput | None:
        """What block `index` is called with; None where only a pass of the whole model runs it."""
        if not self.rerun:
            return self._arguments[index][batch].with_hidden(self._hidden[batch])
        return None if self.entries is None else self.entries.of(index, batch)

    def _rerun(self, batch: int) -> None:
        """A pass of the whole model."""
        with running(self._contexts[batch]), self.cast():
            self.adapter.outputs(self.model, self.batches[batch])

    def cast(self) -> torch.autocast:
        """The precision of matrix products while calibrating."""
        return torch.autocast("cpu", dtype=self.autocast) if self.autocast is not None else torch.autocast("cpu", enabled=False)

    def hidden(self) -> Sequence[Tensor]:
        """What the block at hand reads, one tensor a batch; nothing where the model is rerun."""
        return self._hidden

    def rows(self, out: Tensor, batch: int) -> Tensor:
        """The rows of what came out for a batch, without padding.  [rows, C]"""
        rows, valid = _flat(out), self._contexts[batch].valid
        return rows if valid is None or valid.numel() != rows.shape[0] else rows[valid.reshape(-1)]

    @property
    def shares(self) -> list[float]:
        """The weight of each row of a batch."""
        return [c.weight for c in self._contexts]


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise StopForward


class _Watch(Tap):
    """A tap that lets observers see and passes its tensor on."""

    def __init__(self, see: Callable[[Tensor, Tensor | None, Tensor | None], None]) -> None:
        super().__init__()
        self._see = see

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self._see(x, rows, weight)
        return x


class _Replay(nn.Module):
    """Stands in for a module whose weights are final: gives back what it put out before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _Resume(nn.Module):
    """Stands in for a module that returns what its last leaf puts out: runs that leaf alone, on the input that was seen."""

    leaf: nn.Module

    def __init__(self, leaf: nn.Module, x: Tensor, rest: tuple[Any, ...] | None) -> None:
        super().__init__()
        # not a child: it stays where it is.  What was seen lies behind a module that was put before the leaf
        self.__dict__["leaf"] = leaf.leaf if isinstance(leaf, Online) else leaf
        self.x, self.rest = x, rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.leaf(self.x)
        return y if self.rest is None else (y, *self.rest)


class BlockRunner:
    """One block under calibration: passes over all batches, each stopped as early as can be.

    module: the block, with its (rewritten) float weights; leaves that are solved hold the values of their codes
    sites:  of the weights to be solved in it, None = the block's own (a split makes two of one)
    keep:   bytes of outputs that may be kept, so that solved parts need not be run again
    """

    def __init__(self, feed: BlockFeed, index: int, module: nn.Module, sites: Sequence[Site] | None = None, keep: int = 2 << 30) -> None:
        self.feed, self.index, self.module, self.keep = feed, index, module, keep
        self.block = feed.blocks[index]
        self.sites = tuple(self.block.sites if sites is None else sites)
        self._solved: set[Site] = set()
        self._final: list[str] = []  # paths of modules that need not be run again
        self._kept: dict[tuple[str, int], tuple[Any, list[int]]] = {}  # output and the versions of its tensors
        self._kept_bytes = 0
        self._inputs: dict[tuple[str, int], tuple[Tensor, int]] = {}  # what leaves that end a module were seen to read, and its version
        self._kind = (type(module), tuple(s.module.removeprefix(self.block.module) for s in self.sites))
        self._revisits = False  # a site is seen more than once in a pass: passes run to their end
        if feed.entries is not None:
            with feed.cast():
                feed.entries.enter(index)

    # observing -------------------------------------------------------------------------------------------------------------------------

    def observe(self, wanted: Mapping[Site, Sequence[Observer]]) -> dict[Site, Seen]:
        """What fresh copies of the observers saw at each site, over all batches.  CalibrationError for a site that no batch reached."""
        watchers = {site: [o.fresh() for o in observers] for site, observers in wanted.items() if observers}
        if not watchers:
            return {site: {} for site in wanted}
        kind = (type(self.module), tuple((s.module.removeprefix(self.block.module), s.tensor, s.part) for s in watchers))
        self._revisits = kind not in self.feed.visited_once  # nobody knows yet: the first pass runs to its end
        leader = self._pass(watchers, batch=0, leader={site: site for site in watchers}, probe=True)
        if not self._revisits:
            self.feed.visited_once.add(kind)
        for batch in range(1, len(self.feed.batches)):
            self._pass(watchers, batch, leader, probe=False)
        # sites that see the same tensor, in every process, get the same result, the very same object
        leaders, merged = self._merged(watchers, leader)
        results: dict[tuple[Site, ...], Seen] = {}
        for site in watchers:
            if leaders[site] not in results:
                with at(site):
                    results[leaders[site]] = _results(merged(site))
        return {site: results[leaders[site]] if site in watchers else {} for site in wanted}

    def _merged(
        self, watchers: Mapping[Site, Sequence[Observer]], leader: Mapping[Site, Site]
    ) -> tuple[dict[Site, tuple[Site, ...]], Callable[[Site], Sequence[Observer]]]:
        """(who saw for a site, in each process; the observers of a site, which have seen what all processes saw)."""
        processes = self.feed.processes
        if processes.count == 1:
            return {site: (leader[site],) for site in watchers}, lambda site: watchers[leader[site]]
        own = {site: [o.state() for o in watchers[site]] for site in watchers if leader[site] == site}
        brought = processes.share((dict(leader), own))

        def merged(site: Site) -> Sequence[Observer]:
            observers = [o.fresh() for o in watchers[site]]
            for leaders, states in brought:
                for observer, state in zip(observers, states[leaders[site]], strict=True):
                    observer.merge([state])
            return observers

        return {site: tuple(leaders[site] for leaders, _ in brought) for site in watchers}, merged

    def _pass(self, watchers: Mapping[Site, Sequence[Observer]], batch: int, leader: dict[Site, Site], probe: bool) -> dict[Site, Site]:
        """One forward pass of one batch.

        A probe finds sites that see the very same tensor: from then on one of them observes for all.  The first probe of a kind of block runs to the
        end, to see whether a site is visited twice.
        """
        leaders = {site for site in watchers if leader[site] == site}
        waiting = set(leaders)
        first_seen: dict[tuple[Any, ...], Site] = {}
        found = dict(leader)
        visited: set[Site] = set()
        alive: list[Tensor] = []
        revisited: list[Site] = []

        def see(site: Site, x: Tensor, weight: Tensor | None, rows_of: Callable[[Tensor], Tensor], rows: Tensor | None) -> None:
            if probe and site in visited:
                revisited.append(site)
            elif probe:
                key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version, rows_of, repr(watchers[site]))
                found[site] = first_seen.setdefault(key, site)
                alive.append(x)  # else a later tensor of the same shape might lie at the same address
            visited.add(site)
            if found[site] == site:
                _update(watchers[site], x.detach(), rows_of, rows, weight)
            if site.tensor == "input" and rows is None:
                self._note_input(site.module, batch, x)
            waiting.discard(site)
            if not waiting and not self._revisits:
                raise StopForward

        with ExitStack() as stack:
            self._stand_in(batch, stack)
            for site in leaders:
                stack.callback(self._watch(site, see))
            if probe and self._kind not in self.feed.tails and not self.feed.rerun:
                self._find_tails(stack)
            with suppress(StopForward):
                self.feed.run(self.index, batch, self.module)
        if probe:
            self._revisits = bool(revisited)
        return found

    def _watch(self, site: Site, see: Callable[..., None]) -> Callable[[], None]:
        """Hook or tap one site; returns how to take it away."""
        owner = self.feed.model.get_submodule(site.module)
        if isinstance(owner, Online) and site.tensor == "input":
            owner = owner.leaf  # a leaf's input is what it is multiplied with: behind what was put before it
        if site.tensor in ("input", "output"):
            rows_of = layout(owner).rows if site.tensor == "input" and hasattr(owner, "weight") else _flat

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                see(site, args[0] if args else next(iter(kwargs.values())), None, rows_of, None)

            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                see(site, output[0] if isinstance(output, tuple) else output, None, rows_of, None)

            if site.tensor == "input":
                return owner.register_forward_pre_hook(before, with_kwargs=True).remove
            return owner.register_forward_hook(after).remove
        watch = _Watch(lambda x, rows, weight: see(site, x, _to_power(weight, self.feed.affinity), _flat, rows))
        attach(owner, site.tensor, watch, site.part)
        return lambda: detach(owner, site.tensor, watch, site.part)

    def _find_tails(self, stack: ExitStack) -> None:
        """Learn from a pass that runs to its end which modules return just what one of the leaves inside put out."""
        tails = self.feed.tails[self._kind] = {}
        prefix, leaves = self.block.module, {s.module for s in self.sites if s.tensor == "weight" and s.part is None}
        outputs: dict[int, tuple[str, Tensor]] = {}

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
                if path in leaves and isinstance(first, Tensor):
                    outputs[id(first)] = (path, first)
                elif isinstance(first, Tensor) and id(first) in outputs and not any(isinstance(r, Tensor) for r in rest):
                    leaf = outputs[id(first)][0]
                    if path != prefix and within(leaf, path):
                        tails[path.removeprefix(prefix)] = leaf.removeprefix(prefix)
                        self.feed.rests[(self._kind, path.removeprefix(prefix))] = tuple(rest) if isinstance(output, tuple) else None

            return hook

        for path, module in self.module.named_modules(prefix=prefix):
            stack.callback(module.register_forward_hook(note(path)).remove)

    def _note_input(self, path: str, batch: int, x: Tensor) -> None:
        """Keep what a leaf reads if a module ends with it: once the leaf is solved, the module can go on from here."""
        if path.removeprefix(self.block.module) in self.feed.tails.get(self._kind, {}).values():
            size = _nbytes(x)
            if self._kept_bytes + size <= self.keep:
                self._inputs[(path, batch)] = (x, x._version)
                self._kept_bytes += size

    # going on ---------------------------------------------------------------------------------------------------------------------------

    def solved(self, sites: Sequence[Site]) -> None:
        """The weights of these sites are final: the largest modules that hold no open site are run only once from now on."""
        self._solved |= set(sites)
        # a module may have several: a stack of experts is open until its last matrix is solved
        still_open = {s.module for s in self.sites if s not in self._solved}
        done = {s.module for s in self._solved} - still_open
        prefix = self.block.module
        candidates = [
            path
            for path, _ in self.module.named_modules(prefix=prefix)
            if path != prefix and any(within(m, path) for m in done) and not any(within(m, path) or within(path, m) for m in still_open)
        ]
        self._final = [p for p in candidates if not any(p != q and within(p, q) for q in candidates)]
        for key in [key for key in self._kept if key[0] not in self._final]:
            self._kept_bytes -= _nbytes(self._kept.pop(key)[0])

    def _stand_in(self, batch: int, stack: ExitStack) -> None:
        """Replace final modules by their kept outputs for one pass, and keep the outputs of those that have none yet."""
        if self.feed.rerun:
            return
        for path in self._final:
            kept = self._kept.get((path, batch))
            original = self.feed.model.get_submodule(path)
            if kept is not None and kept[1] == versions(kept[0]):
                self.feed.model.set_submodule(path, _Replay(kept[0]))
                stack.callback(self.feed.model.set_submodule, path, original)
            else:
                tail = self.feed.tails.get(self._kind, {}).get(path.removeprefix(self.block.module))
                x, version = self._inputs.pop((f"{self.block.module}{tail}", batch), (None, 0)) if tail is not None else (None, 0)
                if x is not None:
                    self._kept_bytes -= _nbytes(x)
                if x is not None and x._version == version:
                    leaf = self.feed.model.get_submodule(f"{self.block.module}{tail}")
                    resumed = _Resume(leaf, x, self.feed.rests[(self._kind, path.removeprefix(self.block.module))])
                    self.feed.model.set_submodule(path, resumed)
                    stack.callback(self.feed.model.set_submodule, path, original)
                    original = resumed

                def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    size = _nbytes(output)
                    if self._kept_bytes + size <= self.keep:
                        # a model that later writes into this output raises its version, and it is not used again
                        self._kept[(path, batch)] = (output, versions(output))
                        self._kept_bytes += size

                stack.callback(original.register_forward_hook(keep).remove)

    def outputs(self, keep: Callable[[int, Tensor], None] | None = None) -> list[Tensor]:
        """The block's outputs for every batch, with the weights as they are now; [] where the model is rerun anyway.

        keep: is given (batch, output) of each instead, and [] is returned
        """
        if self.feed.rerun:
            return []
        hidden = []
        for batch in range(len(self.feed.batches)):
            with ExitStack() as stack:
                self._stand_in(batch, stack)
                out = self.feed.run(self.index, batch, self.module)
            first = out[0] if isinstance(out, tuple) else out
            if keep is None:
                hidden.append(first)
            else:
                keep(batch, first)
            del out, first
            for key in [k for k in self._kept if k[1] == batch]:
                self._kept_bytes -= _nbytes(self._kept.pop(key)[0])
        return hidden


def _results(observers: Sequence[Observer]) -> Seen:
    """What they saw; where rows are counted and there were none, the count alone: whoever counts decides what that means."""
    counts = [o for o in observers if isinstance(o, Rows)]
    if counts and not counts[0].result().rows:
        return {counts[0].name: counts[0].result()}
    return {o.name: o.result() for o in observers}


def _to_power(weight: Tensor | None, exponent: float) -> Tensor | None:
    if weight is None or exponent == 0:
        return None
    return weight if exponent == 1 else weight.double() ** exponent


def _nbytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, tuple | list):
        return sum(_nbytes(o) for o in output)
    return 0


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _update(observers: Sequence[Observer], x: Tensor, rows_of: Callable[[Tensor], Tensor], rows: Tensor | None, weight: Tensor | None) -> None:
    """Show the valid rows of `x` to the observers.  rows: which token rows `x` holds; None = all of them, in order"""
    matrix = rows_of(x)
    valid = run_context().valid
    if valid is not None and matrix.ndim == 2:
        flat = valid.reshape(-1)
        mask = flat[rows.reshape(-1)] if rows is not None else flat
        if mask.shape[0] == matrix.shape[0] and not bool(mask.all()):
            matrix = matrix[mask]
            weight = None if weight is None else weight.reshape(-1)[mask]
    if matrix.shape[-2] == 0:
        return
    share = run_context().weight
    if share != 1:
        weight = torch.full((matrix.shape[-2],), share, dtype=torch.float64) if weight is None else weight.reshape(-1).double() * share
    for observer in observers:
        observer.update(matrix, None if weight is None else weight.reshape(-1))
