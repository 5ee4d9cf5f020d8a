"""All experts in one launch: the same outputs as expert by expert, for every family, and a reason wherever it is not taken."""

import copy
import logging
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.errors import NotFound, SpecError
from qcore.model.tap import Tap, attach, detach
from qcore.modules import as_stored
from qcore.modules.linear import QuantizedLinear
from qcore.numbers import FP8_E4M3, Int, Offset, PerGroup, QuantSpec, int_activation, int_weight, nvfp4
from qcore.ops import triton_linear
from qcore.ops.grouped_linear import ReferenceGroupedLinear, TritonGroupedLinear
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qplug_llm import grouped
from qplug_llm.decoder import DecoderLM
from qplug_llm.experts import experts_forward, stacks
from qplug_llm.grouped import grouped_forward, refusal, use_grouped
from qplug_llm.testing import FAMILIES, SMALL, ids, model_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

REFERENCE = ReferenceGroupedLinear.name
SHIFTED = QuantSpec(format=Int(4, signed=False), granularity=PerGroup(16), offset=Offset.CODE)


def quantized(family: str = "Mixtral", weight: QuantSpec | None = None, *rules: Rule) -> nn.Module:
    own = Recipe(rules=(Rule("*:weight", weight or int_weight(4, 16)), *rules), solver=RTN(clip="none"))
    loaded = load_in_memory(copy.deepcopy(model_of(family)))
    return quantize_model(loaded, own, (), registry=load_registry(), adapter=DecoderLM()).model


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return DecoderLM().outputs(model, ids() if x is None else x)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


def a_stack(model: nn.Module) -> nn.Module:
    return next(iter(stacks(model).values()))


def some_rows(t: int = 40, k: int = 2, experts: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a stack: tokens, k different experts for each, multipliers."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(t, experts, generator=g).argsort(1)[:, :k]
    return torch.randn(t, 64, generator=g).to(dtype), chosen, torch.rand(t, k, generator=g)


@contextmanager
def counted(kernel: type[TritonGroupedLinear] = ReferenceGroupedLinear):
    """The rows of each launch for all experts made inside."""
    rows, own = [], kernel._run_all
    kernel._run_all = lambda self, x, *rest: (rows.append(x.shape[0]), own(self, x, *rest))[1]
    try:
        yield rows
    finally:
        kernel._run_all = own


# the law: it computes what expert by expert computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, SHIFTED], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_launch_for_all_computes_what_expert_by_expert_does(family, weight):
    model = quantized(family, weight)
    want = logits(model)
    mixtures = len(stacks(model))
    report = use_grouped(model, REFERENCE)
    assert [(g.path, g.refused) for g in report] == [(path, None) for path in stacks(model)]
    assert model.config._experts_implementation == grouped.NAME
    with counted() as rows:
        got = logits(model)
    # two launches a mixture, each with every token as often as the router chose for it
    assert rows == [ids().numel() * SMALL["num_experts_per_tok"]] * (2 * mixtures)
    assert relative(got, want) < 2e-5  # float32 sums in another order
    model.set_experts_implementation("qcore")
    with counted() as rows:
        assert relative(logits(model), want) < 2e-5 and rows == []


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (1, 2), (40, 3), (5, 6)])
def test_any_number_of_tokens_and_of_experts_a_token(family, t, k):
    model = quantized(family)
    use_grouped(model, REFERENCE)
    inputs = some_rows(t, k)
    with counted() as rows:
        got = grouped_forward(a_stack(model), *inputs)
    assert rows == [t * k, t * k]
    assert relative(got, experts_forward(a_stack(model), *inputs)) < 1e-5


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_no_token_no_expert_and_experts_without_rows(family):
    model = quantized(family)
    use_grouped(model, REFERENCE)
    module = a_stack(model)
    x, _, weights = some_rows(3)
    nowhere = torch.full((3, 2), 6)
    assert torch.equal(grouped_forward(module, x, nowhere, weights), torch.zeros(3, 64))
    assert grouped_forward(module, x[:0], nowhere[:0], weights[:0]).shape == (0, 64)
    for index in ([[0, 6], [1, 9], [6, 2]], [[5, 5], [5, 5], [5, 5]], [[0, 6], [0, 6], [7, 6]]):
        chosen = torch.tensor(index)
        want = experts_forward(module, x, chosen, weights)
        assert relative(grouped_forward(module, x, chosen, weights), want) < 1e-5
        # routers may count in 32 bits; what stands beside no expert counts for nothing
        poisoned = torch.where(chosen >= 6, torch.nan, weights)
        assert relative(grouped_forward(module, x, chosen.int(), poisoned), want) < 1e-5


def test_gradients_go_expert_by_expert():
    model = quantized()
    use_grouped(model, REFERENCE)
    x, index, weights = some_rows(7)
    x.requires_grad_()
    with counted() as rows:
        found = [torch.autograd.grad(f(a_stack(model), x, index, weights).square().sum(), x)[0] for f in (grouped_forward, experts_forward)]
        assert rows == [] and torch.equal(*found)
        with torch.no_grad():
            grouped_forward(a_stack(model), x, index, weights)
        assert len(rows) == 2


# the Triton kernel, under the interpreter if need be ---------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch):
    """The rule that a GPU is needed is left out: the interpreter runs on CPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_linear, "_refuses_place", lambda job: None)


HERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("weight", [int_weight(4, 16), int_weight(8), SHIFTED], ids=str)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_triton_kernel_runs_a_mixture(family, weight, dtype, anywhere):
    module = a_stack(quantized(family, weight))
    inputs = [t.to(HERE) for t in some_rows(21, dtype=dtype)]
    inputs[1][3] = 6  # a token that goes nowhere
    # the same stored weights in float32: what all is rounded from
    exact = experts_forward(copy.deepcopy(module).to(HERE), inputs[0].float(), *inputs[1:])
    module = module.to(HERE, dtype)
    assert refusal(module) is None
    by_expert = experts_forward(module, *inputs)
    grouped._group("experts", module, TritonGroupedLinear)
    with counted(TritonGroupedLinear) as rows:
        got = grouped_forward(module, *inputs)
    assert rows == [42, 42] and got.dtype == dtype
    # weight, products' inputs and both outputs are rounded to the dtype: as far from the exact ones as expert by expert is, and a step
    step = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert relative(got.float(), exact) < relative(by_expert.float(), exact) + 4 * step
    assert relative(got.float(), by_expert.float()) < 8 * step
    assert not got[3].any()


def test_the_host_waits_for_nothing(anywhere, monkeypatch):
    """Tensors without values stand in for a device: what a host has to know before it goes on cannot be asked of them."""
    from qkernels.grouped_linear import triton

    module = a_stack(quantized("GptOss")).to(torch.float16)
    grouped._group("experts", module, TritonGroupedLinear)
    launches = []
    monkeypatch.setattr(triton, "launch", lambda *given, **also: launches.append(given))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, index, weights = (fake.from_tensor(t) for t in some_rows(9, dtype=torch.float16))
        y = grouped_forward(module, x, index, weights)
        assert y.shape == (9, 64) and len(launches) == 2
        with pytest.raises(DynamicOutputShapeException, match="bincount"):
            experts_forward(module, x, index, weights)


# what is refused, and what falls back -----------------------------------------------------------------------------------------------------------


def changed(**changes):
    """A stack in which expert 2 of down_proj is not like the others."""

    def make() -> nn.Module:
        module = a_stack(quantized())
        for name, value in changes.items():
            setattr(module.down_proj.leaf(2), name, value)
        return module

    return make


def changed_leaf() -> nn.Module:
    module = a_stack(quantized())
    module.down_proj.add_module("2", nn.Sequential(module.down_proj.leaf(2)))
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: a_stack(model_of("Mixtral")), "gate_up_proj is float; quantize it first"),
        (
            lambda: a_stack(quantized("Mixtral", None, Rule("*.experts.2.down_proj:weight", None))),
            "down_proj: expert 2 is float; one launch takes quantized matrices alone",
        ),
        (lambda: a_stack(quantized("Mixtral", None, Rule("*.experts.1.*:weight", int_weight(8, 16)))), "gate_up_proj: expert 1 is int8 per group 16"),
        (lambda: a_stack(quantized("Mixtral", None, Rule("*:input", int_activation(8)))), "gate_up_proj: needs float inputs, got int8 per token"),
        (lambda: a_stack(quantized("Mixtral", int_weight(4, 8))), "gate_up_proj: needs groups of a multiple of 16 inputs, got 8"),
        (lambda: a_stack(quantized("Mixtral", nvfp4())), "gate_up_proj: needs integers of 2 to 8 bits, got fp4-e2m1"),
        (lambda: a_stack(quantized("Mixtral", QuantSpec(format=FP8_E4M3, granularity=PerGroup(16)))), "needs integers of 2 to 8 bits, got fp8"),
        (changed_leaf, "down_proj: expert 2 is a Sequential; one launch takes quantized matrices alone"),
        (changed(online=nn.Identity()), "down_proj: a Identity stands before expert 2; the launch reads the inputs as they come"),
        (changed(bias=nn.Parameter(torch.zeros(64))), "down_proj: expert 2 has a bias of its own, which the launch does not add"),
    ],
)
def test_every_refusal_has_its_reason(make, reason):
    found = refusal(make(), ReferenceGroupedLinear)
    assert found is not None and reason in found


def test_the_triton_kernel_wants_a_gpu_and_halves(anywhere):
    module = a_stack(quantized())
    assert refusal(module) == "gate_up_proj: needs float16 or bfloat16 inputs, got float32"
    assert refusal(module.half()) is None


def test_without_a_gpu_nothing_is_set():
    model = quantized()
    report = use_grouped(model)
    assert all("runs on a GPU, got cpu" in (g.refused or "") and g.bytes == 0 for g in report) and len(report) == 2
    assert model.config._experts_implementation == "qcore"
    assert not any(isinstance(m.explain().kernel, TritonGroupedLinear) for m in model.modules() if isinstance(m, QuantizedLinear))


def test_who_asks_for_what_is_not_there_is_told():
    with pytest.raises(NotFound, match=r"no kernel 'mine'.*triton-grouped-linear, reference-grouped-linear"):
        use_grouped(quantized(), "mine")
    with pytest.raises(SpecError, match="Linear has no experts behind transformers' ExpertsInterface"):
        use_grouped(nn.Linear(2, 2))


def test_one_mixture_may_be_grouped_and_another_not():
    model = quantized("Mixtral", None, Rule("*.layers.1.*.experts.3.*:weight", int_weight(8, 16)))
    want = logits(model)
    first, second = use_grouped(model, REFERENCE)
    assert first.refused is None and "expert 3 is int8 per group 16" in (second.refused or "")
    with counted() as rows:
        assert relative(logits(model), want) < 2e-5 and len(rows) == 2


class Halve(Tap):
    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return x / 2


def test_handlers_at_taps_are_never_passed_over(caplog):
    model = quantized()
    use_grouped(model, REFERENCE)
    module, inputs = a_stack(model), some_rows()
    plain = grouped_forward(module, *inputs)
    handler = Halve()
    attach(module, "down_proj.input", handler, 4)
    grouped._say_once.cache_clear()
    with counted() as rows, caplog.at_level(logging.WARNING):
        for _ in range(2):
            tapped = grouped_forward(module, *inputs)
    assert rows == [] and torch.equal(tapped, experts_forward(module, *inputs)) and relative(tapped, plain) > 1e-3
    reason = use_grouped(model, REFERENCE)[0].refused
    assert reason == "handlers are attached at its taps (down_proj.input@4 …), which see the rows of one expert"
    assert [r.message for r in caplog.records] == [f"experts run one after the other, not in one launch: {reason}"]
    detach(module, "down_proj.input", handler, 4)
    with counted() as rows:
        assert torch.equal(grouped_forward(module, *inputs), plain) and len(rows) == 2


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_one_expert_are_never_passed_over(hook):
    model = quantized()
    use_grouped(model, REFERENCE)
    module, seen = a_stack(model), []
    handle = getattr(module.gate_up_proj.leaf(3), hook)(lambda m, args, *rest: seen.append(args[0].shape[0]))
    inputs = some_rows()
    grouped_forward(module, *inputs)
    assert seen == [int((inputs[1] == 3).sum())]
    handle.remove()
    with counted() as rows:
        grouped_forward(module, *inputs)
    assert len(rows) == 2 and len(seen) == 1


def test_a_model_that_runs_as_stored_does_so_and_is_grouped_again_afterwards():
    model = quantized()
    use_grouped(model, REFERENCE)
    before = logits(model)
    with counted() as rows:
        with as_stored(model):
            logits(model)
        assert rows == []
        assert torch.equal(logits(model), before) and len(rows) == 4


# what changes the leaves changes the launch --------------------------------------------------------------------------------------------------------


def test_new_parts_are_seen():
    model = quantized()
    use_grouped(model, REFERENCE)
    before = logits(model)
    kept = copy.deepcopy(model.state_dict())
    leaf = a_stack(model).down_proj.leaf(1)
    leaf.weight_scale.mul_(2)
    leaf.parts_changed()
    with counted() as rows:
        changed = logits(model)
        assert len(rows) == 4 and relative(changed, before) > 1e-4
        model.set_experts_implementation("qcore")
        assert relative(logits(model), changed) < 2e-5
        model.set_experts_implementation(grouped.NAME)
        model.load_state_dict(kept)
        assert torch.equal(logits(model), before) and len(rows) == 8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_grouped_and_its_own(copied):
    module, inputs = a_stack(quantized()), some_rows()
    grouped._group("experts", module, ReferenceGroupedLinear)
    want = grouped_forward(module, *inputs)
    own = copied(module)
    with counted() as rows:
        assert torch.equal(grouped_forward(own, *inputs), want) and len(rows) == 2
    leaf = own.down_proj.leaf(1)
    leaf.weight_scale.zero_()
    leaf.parts_changed()
    assert not torch.equal(grouped_forward(own, *inputs), want) and torch.equal(grouped_forward(module, *inputs), want)


def test_a_module_that_moves_takes_its_words_along_and_leaves_none_behind(anywhere):
    module = a_stack(quantized()).half()
    grouped._group("experts", module, TritonGroupedLinear)
    parts = module.down_proj.leaf(0).explain().kernel.parts
    assert parts.complete
    # float32 inputs are refused: every leaf runs another kernel, and nobody holds the words
    module.float()
    assert not parts.complete and parts.tensors() == {} and parts.nbytes == 0
    inputs = some_rows()
    assert torch.equal(grouped_forward(module, *inputs), experts_forward(module, *inputs))
    module.half()
    assert parts.complete
    with counted(TritonGroupedLinear) as rows:
        grouped_forward(module, inputs[0].half(), *inputs[1:])
    assert len(rows) == 2


def test_what_was_grouped_in_inference_mode_may_be_changed_outside():
    model = quantized()
    kept = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        use_grouped(model, REFERENCE)
        before = logits(model)
    model.load_state_dict(kept)
    assert torch.equal(logits(model), before)


# what it costs ------------------------------------------------------------------------------------------------------------------------------------


def held(module: nn.Module) -> int:
    """Bytes that the kernels of the leaves hold beside the stored parts."""
    stored = {t.untyped_storage().data_ptr() for t in module.buffers()}
    leaves = [m for m in module.modules() if isinstance(m, QuantizedLinear)]
    found = {s.data_ptr(): s.nbytes() for m in leaves for s in (t.untyped_storage() for t in (m._prepared or {}).values())}
    return sum(size for where, size in found.items() if where not in stored)


@pytest.mark.parametrize("weight", [int_weight(4, 16), int_weight(3, 16), int_weight(8), SHIFTED], ids=str)
def test_grouping_costs_no_byte_beside_what_the_kernels_of_single_experts_hold(weight, anywhere):
    module = a_stack(quantized("Mixtral", weight)).half()
    registry = load_registry()
    for leaf in module.modules():
        if isinstance(leaf, QuantizedLinear):
            leaf.bind([k() for k in registry.kernels.values()])
            assert leaf.explain().kernel.name == "triton-weight-linear"
    single = held(module)
    report = grouped._group("experts", module, TritonGroupedLinear)
    assert report.bytes == held(module) == single
    values, bits = 6 * (96 * 64 + 64 * 48), 8 if weight.format.bits == 8 else 4
    scales = 6 * (96 + 64) if weight == int_weight(8) else values // 16
    assert report.bytes == values * bits // 8 + scales * (2 + 4 * (weight.offset is not Offset.NONE))


def test_a_checkpoint_is_the_same_file(tmp_path: Path):
    registry = load_registry()
    model = quantized("GptOss")
    save(model, tmp_path / "single", adapter="decoder-lm", registry=registry)
    use_grouped(model, REFERENCE)
    save(model, tmp_path / "grouped", adapter="decoder-lm", registry=registry)
    for file in (tmp_path / "single").iterdir():
        assert file.read_bytes() == (tmp_path / "grouped" / file.name).read_bytes(), file.name
    again = load(tmp_path / "grouped", skeleton=copy.deepcopy(model_of("GptOss")), registry=registry)
    assert again.config._experts_implementation == "qcore"
    use_grouped(again, REFERENCE)
    assert torch.equal(logits(again), logits(model))


def test_asking_twice_changes_nothing():
    model = quantized()
    first = use_grouped(model, REFERENCE)
    before = logits(model)
    assert use_grouped(model, REFERENCE) == first and torch.equal(logits(model), before)
    leaf = a_stack(model).down_proj.leaf(0)
    assert sum(isinstance(k, TritonGroupedLinear) for k in leaf._kernels) == 1
