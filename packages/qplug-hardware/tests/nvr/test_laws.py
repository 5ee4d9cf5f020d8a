"""What holds for every trace, machine and prefetcher."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qplug_hardware.nvr.config import CacheShape, Indirect, Machine, Runahead, Settings
from qplug_hardware.nvr.models import MODELS, compare, simulate
from qplug_hardware.nvr.patterns import Affine
from qplug_hardware.nvr.simulate import Program
from qplug_hardware.nvr.synth import SYNTHETIC, uniform
from qplug_hardware.nvr.trace import Trace


@st.composite
def traces(draw):
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    n, rows = draw(st.integers(1, 80)), draw(st.integers(1, 60))
    tables = [rng.integers(rows, size=rows) for _ in range(draw(st.integers(0, 2)))]
    bounds = None
    if draw(st.booleans()):
        ends = np.sort(rng.integers(0, n + 1, size=(draw(st.integers(1, 8)), 2)), axis=1)
        bounds = np.concatenate([ends, [[0, min(n, 3)]]])
    sizes = {"index_bytes": draw(st.sampled_from([1, 4, 8])), "value_bytes": draw(st.sampled_from([0, 2]))}
    return Trace("drawn", rng.integers(rows, size=n), rows, draw(st.sampled_from([16, 64, 96, 200])), tuple(tables), bounds, **sizes)


@st.composite
def machines(draw):
    l2 = CacheShape(size=64 * 4 * draw(st.sampled_from([1, 4, 64])), ways=4, latency=draw(st.integers(1, 30)))
    machine = Machine(
        l2=l2,
        dram_latency=draw(st.integers(1, 300)),
        bus_cycles=draw(st.integers(1, 20)),
        vector=draw(st.sampled_from([1, 4, 16])),
        compute=draw(st.integers(0, 50)),
        mshrs=draw(st.integers(1, 40)),
    )
    switches = {name: draw(st.booleans()) for name in ("sd", "scd", "lbd", "vmig")}
    runahead = Runahead(depth=draw(st.sampled_from([0, 1, 7, 16, 100])), chains=draw(st.integers(1, 8)), lead=draw(st.integers(0, 4)), **switches)
    nsb = CacheShape(size=64 * 4 * draw(st.sampled_from([1, 4])), ways=4, latency=draw(st.integers(1, 5)))
    return Settings(machine=machine, runahead=runahead, nsb=nsb)


quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(traces(), machines(), st.sampled_from(MODELS))
def test_every_run_keeps_the_laws(trace, config, model):
    base, done = simulate(trace, "none", config), simulate(trace, model, config)
    bound = simulate(trace, "oracle", config)
    # the result is the program's, whatever is prefetched
    assert np.array_equal(done.gathered, trace.targets)
    # every load of every step is counted once, and as many as without prefetching
    assert [x.total for x in done.ledgers] == [x.total for x in base.ledgers]
    # a line comes because of a miss or of a prefetch
    misses = sum(x.misses for x in done.ledgers)
    if model != "oracle":
        assert done.fetches == done.prefetches + misses
    # every prefetch ends as one of four things
    used = sum(x.timely + x.late for x in done.ledgers)
    assert done.prefetches == used + done.evicted_unused + done.left_unused
    # nothing beats the bus, or the bound
    assert done.fetches >= bound.fetches and done.cycles >= bound.cycles
    assert done.cycles >= bound.fetches * config.machine.bus_cycles
    # a line is cold once at most
    assert sum(x.cold for x in done.ledgers) <= len({n for s in range(Program(trace, config.machine).stages) for n in _lines(trace, config, s)})


def _lines(trace, config, stage):
    program = Program(trace, config.machine)
    return [n for a, b in program.vectors for n in program.step_lines(stage, a, b)]


@quick
@given(traces(), machines())
def test_the_baseline_is_the_sum_of_its_steps(trace, config):
    """Without prefetching nothing overlaps: a step of m misses that has the bus and MSHRs to itself takes one latency and m transfers."""
    machine = replace(config.machine, mshrs=200)
    cycles, age, held, sets = 0, 0, {}, machine.l2.sets(machine.line)
    program = Program(trace, machine)
    for first, end in program.vectors:
        for stage in range(program.stages):
            lines = program.step_lines(stage, first, end)
            missing = []
            for line in lines:
                age += 1
                if line in held:
                    held[line] = age
                else:
                    missing.append(line)
            # missing lines arrive, and are inserted, after the step's hits
            for line in missing:
                age += 1
                held[line] = age
                same = sorted((a, n) for n, a in held.items() if n % sets == line % sets)
                if len(same) > machine.l2.ways:
                    del held[same[0][1]]
            cycles += machine.l2.latency + (machine.dram_latency + len(missing) * machine.bus_cycles if missing else 0)
        cycles += machine.compute
    done = simulate(trace, "none", replace(config, machine=machine))
    assert done.cycles == cycles


@quick
@given(traces(), machines(), st.sampled_from(["imp", "dvr", "nvr", "nvr-nsb"]))
def test_depth_0_is_the_baseline(trace, config, model):
    config = replace(config, runahead=replace(config.runahead, depth=0))
    base, done = simulate(trace, "none", config), simulate(trace, model, config)
    assert (done.cycles, done.ledgers, done.fetches, done.prefetches) == (base.cycles, base.ledgers, base.fetches, 0)


@quick
@given(traces(), machines(), st.sampled_from(MODELS))
def test_an_endless_cache_leaves_only_cold_misses(trace, config, model):
    machine = replace(config.machine, l2=CacheShape(size=64 << 20, ways=8, latency=20))
    done = simulate(trace, model, replace(config, machine=machine))
    assert sum(x.again for x in done.ledgers) == 0 and done.evicted_unused == 0
    distinct = {n for s in range(Program(trace, machine).stages) for n in _lines(trace, replace(config, machine=machine), s)}
    assert done.fetches >= len(distinct)
    if model == "none":
        assert done.fetches == len(distinct) == sum(x.cold for x in done.ledgers)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_seed_gives_the_same_trace_and_the_same_run(name):
    first, second, other = (SYNTHETIC[name](300, 400, 128, seed) for seed in (1, 1, 2))
    assert first.gathers == 400
    assert np.array_equal(first.targets, second.targets) and np.array_equal(first.loops, second.loops)
    assert name == "streaming" or not np.array_equal(first.targets, other.targets)
    results = [compare(t, MODELS) for t in (first, second)]
    assert {m: asdict(r) for m, r in results[0].items()} == {m: asdict(r) for m, r in results[1].items()}


def test_models_do_not_disturb_one_another():
    trace = uniform(300, 400)
    together = compare(trace, MODELS)
    assert all(compare(trace, [m])[m] == together[m] for m in MODELS)


@quick
@given(st.integers(0, 10**6), st.integers(-300, 300), st.lists(st.integers(0, 10**5), min_size=8, max_size=30, unique=True))
def test_a_pattern_is_learned_from_its_loads_and_is_right(base, stride, indices):
    pattern = Affine(1)
    pattern.observe(indices, [base + stride * i for i in indices])
    assert pattern.known and all(pattern.address(i) == base + stride * i for i in range(50))


@quick
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10**6)), max_size=30), st.integers(1, 3))
def test_a_pattern_that_is_known_explains_what_it_was_learned_from(pairs, confirmations):
    pattern = Affine(confirmations)
    for i, (index, address) in enumerate(pairs):
        pattern.observe([index], [address])
        if pattern.known:
            recent = [p for p in pairs[: i + 1] if p[1] == pattern.address(p[0])]
            assert len(set(recent)) >= 2
            break


def test_imp_has_a_shifter_and_no_multiplier():
    trace = uniform(300, 800, row_bytes=96)
    done = compare(trace, ["imp", "nvr"])
    assert done["imp"].by_stage["rows"]["timely"] == done["imp"].by_stage["rows"]["late"] == 0
    assert done["nvr"].by_stage["rows"]["timely"] > 0
    assert compare(uniform(300, 800), ["imp"], Settings(imp=Indirect(confirmations=3)))["imp"].by_stage["rows"]["timely"] > 0
