"""Quantized activations through `quantize_model`: static and dynamic, what weights read and what lies inside modules; and what blocks propagate."""

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from qcore.calibration import MSE, Gram, MinMax, Moments, Percentile
from qcore.calibration.ranges import range_observer, range_parts
from qcore.checkpoint import load, save
from qcore.errors import QcoreError, SpecError
from qcore.model.topology import Site
from qcore.modules import QuantizedLinear
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import Int, Offset, PerChannel, PerGroup, PerHead, PerTensor, PerToken, QuantSpec, fake_quantize, int_activation, int_weight
from qcore.ops import ReferenceLinear, quantize_input
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import SplitColumns
from qkernels import native
from torch.utils._python_dispatch import TorchDispatchMode

INT8 = QuantSpec(format=Int(8), granularity=PerTensor())
WEIGHTS = Rule("*:weight", int_weight(8))
BATCHES = [tokens(seed=s) for s in range(3)]


def quantized(*rules, model=None, transforms=(), propagate="weights", batches=BATCHES, solver=None):
    recipe = Recipe(rules=rules, solver=solver or RTN(clip="none"), transforms=transforms, propagate=propagate)
    loaded = load_in_memory(copy.deepcopy(model or tiny_decoder()))
    with torch.no_grad():
        return quantize_model(loaded, recipe, batches, registry=Registry(""), adapter=TinyDecoderAdapter())


def read_by(model, path, batches=BATCHES):
    """Everything that the module at `path` reads."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(seen)


def test_a_static_scale_covers_exactly_what_was_read():
    model = tiny_decoder()
    x = read_by(model, "model.layers.0.self_attn.q_proj")
    q = quantized(WEIGHTS, Rule("*:input", INT8), model=model).model
    scales = [q.get_submodule(f"model.layers.0.self_attn.{n}_proj").stored()["input.scale"] for n in "qkv"]
    assert all(torch.equal(s, (x.abs().max() / 127).reshape(1, 1)) for s in scales)


def test_static_per_channel_and_with_a_zero_point():
    model = tiny_decoder()
    x = read_by(model, "model.layers.0.mlp.up_proj")
    spec = QuantSpec(format=Int(8), granularity=PerChannel(1), offset=Offset.CODE)
    q = quantized(WEIGHTS, Rule("*.mlp.up_proj:input", spec), model=model, propagate="float").model
    stored = q.get_submodule("model.layers.0.mlp.up_proj").stored()
    wanted = (x.amax(0).clamp(min=0) - x.amin(0).clamp(max=0)) / 255
    assert stored["input.scale"].shape == stored["input.offset"].shape == (1, x.shape[1])
    torch.testing.assert_close(stored["input.scale"][0], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", [PerGroup(8), PerHead(4)], ids=lambda g: g.name)
def test_static_per_group_and_head_cover_their_channels(granularity):
    model = tiny_decoder()
    spec = QuantSpec(format=Int(8), granularity=granularity)
    q = quantized(WEIGHTS, Rule("*.q_proj:input", spec), model=model, propagate="float").model
    found = q.get_submodule("model.layers.0.self_attn.q_proj").stored()["input.scale"]
    x = read_by(model, "model.layers.0.self_attn.q_proj")
    groups = x.unflatten(1, (-1, 8))
    wanted = torch.maximum(groups.amax((0, 2)) / 127, groups.amin((0, 2)) / -128)
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=0)


def test_heads_are_those_of_the_site():
    spec = QuantSpec(format=Int(4), granularity=PerHead(), when="dynamic")
    recipe = Recipe(rules=(Rule("*:q", spec),), solver=RTN())
    assert recipe.specs_for([Site("attn", "q", heads=3)], None)[Site("attn", "q")].granularity == PerHead(3)
    with pytest.raises(SpecError, match="whose heads are known"):
        fake_quantize(torch.ones(2, 6), spec)


def test_the_observer_of_the_rule_finds_the_range():
    model = tiny_decoder()
    x = read_by(model, "model.layers.0.self_attn.q_proj")
    q = quantized(WEIGHTS, Rule("*:input", INT8, observer=Percentile(q=0.9)), model=model).model
    scale = float(q.get_submodule("model.layers.0.self_attn.q_proj").stored()["input.scale"])
    assert scale < 0.9 * float(x.abs().max()) / 127


def test_mse_searches_for_the_rules_own_spec():
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    errors = []
    for searched in (2, 8):
        watch = range_observer(QuantSpec(format=Int(searched), granularity=PerTensor()), MSE()).fresh()
        watch.update(x)
        spec = QuantSpec(format=Int(2), granularity=PerTensor())
        errors.append(float((fake_quantize(x, spec, range_parts(watch.result(), spec)) - x).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_dynamic_inputs_need_no_data():
    q = quantized(WEIGHTS, Rule("*:input", int_activation(8)), batches=())
    assert q.model.get_submodule("model.layers.1.mlp.down_proj").activation == int_activation(8)


@pytest.mark.parametrize("spec", [int_activation(2), QuantSpec(format=Int(2), granularity=PerTensor())], ids=str)
def test_tensors_inside_modules_are_quantized_and_change_the_outputs(spec, tmp_path):
    plain = quantized(WEIGHTS)
    rules = (WEIGHTS, Rule("*.self_attn:k", spec), Rule("*.self_attn:v", spec))
    q = quantized(*rules)
    handlers = {path: m for path, m in q.model.named_modules() if isinstance(m, QuantizedTap)}
    assert sorted(handlers) == [f"model.layers.{i}.self_attn.taps.{t}.handlers.0" for i in (0, 1) for t in "kv"]
    with torch.no_grad():
        out = q.model(BATCHES[0])
        assert float((out - plain.model(BATCHES[0])).abs().max()) > 0.01
        # and a checkpoint keeps them
        save(q.model, tmp_path / "out", adapter="", registry=Registry(""))
        again = load(tmp_path / "out", skeleton=tiny_decoder(seed=1), adapter=TinyDecoderAdapter(), registry=Registry(""))
        assert torch.equal(again(BATCHES[0]), out)


def test_the_static_range_of_a_tap_covers_what_passed_it():
    spec = QuantSpec(format=Int(8), granularity=PerTensor())
    q = quantized(WEIGHTS, Rule("*.self_attn:v", spec)).model
    with torch.no_grad():
        values = q.get_submodule("model.layers.0.self_attn.v_proj")(read_by(q, "model.layers.0.self_attn.v_proj"))
    scale = q.get_submodule("model.layers.0.self_attn.taps.v.handlers.0").parts["scale"]
    torch.testing.assert_close(scale, (values.abs().max() / 127).reshape(1, 1))


def test_the_leaves_of_a_split_read_quantized_inputs_too():
    q = quantized(WEIGHTS, Rule("*.down_proj*:input", INT8), transforms=(SplitColumns(sites=("*.down_proj:weight",), channels=2),)).model
    leaves = [m for path, m in q.named_modules() if ".down_proj." in path and hasattr(m, "activation")]
    assert len(leaves) == 4
    assert all(m.activation == INT8 and "input.scale" in m.stored() for m in leaves)


# the integer path -------------------------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The dtypes of both operands of every matrix product inside."""

    OPS: ClassVar[set[str]] = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_int_mm", "mv", "addmv"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.OPS:
            self.seen.append((name, *(a.dtype for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def int_input(bits, granularity=None, when="dynamic", offset=Offset.NONE):
    return QuantSpec(format=Int(bits), granularity=granularity or PerToken(), offset=offset, when=when)


INTEGER_RUNS = {
    "w8a8": (int_weight(8), int_input(8)),
    "w8a8 with zero points": (int_weight(8), int_input(8, offset=Offset.CODE)),
    "w8a8 static": (int_weight(8), int_input(8, PerTensor(), "static")),
    "w8a8 static with zero points": (int_weight(8), int_input(8, PerTensor(), "static", Offset.CODE)),
    "w4a8 in groups": (int_weight(4, 16), int_input(8)),
    "w4a4 in groups, zero points on both sides": (int_weight(4, 16, asymmetric=True), int_input(4, offset=Offset.CODE)),
}


@pytest.mark.parametrize("name", INTEGER_RUNS)
def test_every_quantized_product_has_int8_operands_and_agrees_with_the_simulation(name):
    weight, inputs = INTEGER_RUNS[name]
    model = quantized(Rule("*:weight", weight), Rule("*:input", inputs)).model
    torch_kernels = [k() for k in Registry("").kernels.values() if k.name.startswith("torch-")]
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer in layers:
        layer.bind(torch_kernels, dtype=torch.float32)
    with torch.no_grad():
        with Products() as products:
            integer = model(BATCHES[0])
        for layer in layers:
            layer.bind([ReferenceLinear()], dtype=torch.float32)
        simulated = model(BATCHES[0])
    whole = [ops for op, *ops in products.seen if op == "_int_mm"]
    groups = layers[0].shape[1] // weight.granularity.size if isinstance(weight.granularity, PerGroup) else 1
    assert len(layers) == 14 and len(whole) >= len(layers) * groups
    assert all(dtypes == [torch.int8, torch.int8] for dtypes in whole)
    # of float products are left those of the attention (fused, so none) and of the head, which is not quantized
    assert sum(op != "_int_mm" for op, *_ in products.seen) == 1
    # the same codes; the reference adds up to 48 decoded float32 products in each of 14 layers.  An input that this moves across the border
    # between two codes would move the output by a step, a hundred times more
    torch.testing.assert_close(integer, simulated, rtol=1e-4, atol=1e-4)


def test_native_kernels_take_int8_inputs_too():
    if native.why_not():
        pytest.skip(native.why_not())
    model = quantized(Rule("*:weight", int_weight(4, 16)), Rule("*:input", int_activation(8))).model
    assert {m.explain().kernel.name for m in model.modules() if isinstance(m, QuantizedLinear)} == {"native-int8-linear"}
    with torch.no_grad(), Products() as products:
        model(BATCHES[0])
    assert len(products.seen) == 1  # the head: the others are no products of torch at all


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "rtn-w4a4kv4", "smoothquant-w8a8"])
def test_recipes_of_activations_plan_and_run(name):
    """On a decoder whose widths they divide."""
    model = tiny_decoder(hidden=64, intermediate=64)
    recipe = load_recipe(name, Registry(""))
    rules = tuple(replace(r, window=None) for r in recipe.rules)  # this model has no cache: its k and v are activations like others
    loaded = load_in_memory(copy.deepcopy(model))
    plan = make_plan(load_in_memory(copy.deepcopy(model)), replace(recipe, rules=rules), TinyDecoderAdapter(), Registry(""))
    assert plan.problems == () and all(d.activation for d in plan.decisions)
    with torch.no_grad():
        q = quantize_model(loaded, replace(recipe, rules=rules), BATCHES, registry=Registry(""), adapter=TinyDecoderAdapter()).model
        difference = (q(BATCHES[0]) - model(BATCHES[0])).norm() / model(BATCHES[0]).norm()
    assert 1e-3 < float(difference) < {"smoothquant-w8a8": 0.1, "fp8": 0.2}.get(name, 0.8)


def test_what_becomes_of_a_token_does_not_depend_on_its_batch():
    """Of every recipe with dynamic activations: else decoding would differ from reading the whole text."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0, 0.1, 2.0, 5.0])[:, None]
    for name in ("fp8", "mxfp4", "nvfp4", "rtn-w4a4kv4", "smoothquant-w8a8"):
        spec = next(r.spec for r in load_recipe(name, Registry("")).rules if r.sites == "*:input")
        assert torch.equal(quantize_input(x, spec, None), torch.cat([quantize_input(row, spec, None) for row in x.split(1)])), name


def test_groups_that_do_not_divide_an_input_are_a_problem_of_the_plan():
    recipe = Recipe(rules=(WEIGHTS, Rule("*:input", QuantSpec(format=Int(8), granularity=PerGroup(24), when="dynamic"))), solver=RTN())
    plan = make_plan(load_in_memory(tiny_decoder()), recipe, TinyDecoderAdapter(), Registry(""))
    assert any("group size 24 does not divide K=32" in p and "q_proj:input" in p for p in plan.problems)


# propagation -----------------------------------------------------------------------------------------------------------------------------


class Looking(RTN):
    """Rounds to one bit, so that errors are large, and keeps the mean squares that it was shown."""

    kept: ClassVar[dict[tuple[int, ...], list[torch.Tensor]]] = {}

    @property
    def observes(self):
        return (Moments(),)

    def solve(self, weight, spec, seen, frozen=None):
        type(self).kept.setdefault(tuple(weight.shape), []).append(seen["moments"].mean_square)
        return super().solve(weight, spec, seen, frozen)


def mean_squares(propagate, *more):
    """Of what the last block's up_proj (and gate_proj) read while it was solved."""
    Looking.kept = {}
    quantized(Rule("*:weight", int_weight(2)), *more, propagate=propagate, solver=Looking(clip="none"))
    return Looking.kept[(48, 32)][-1]


def test_float_propagation_shows_every_site_what_the_float_model_reads():
    x = read_by(tiny_decoder(), "model.layers.1.mlp.up_proj")
    torch.testing.assert_close(mean_squares("float"), x.double().square().mean(0), rtol=1e-5, atol=1e-7)


def test_propagations_differ_from_each_other():
    coarse = Rule("*:input", int_activation(2))
    found = {p: mean_squares(p, coarse) for p in ("float", "weights", "all")}
    for a, b in (("float", "weights"), ("weights", "all"), ("float", "all")):
        assert float((found[a] - found[b]).abs().max() / found[a].abs().max()) > 0.01, (a, b)


def test_propagating_everything_shows_what_the_finished_model_reads():
    """The first stage of the last block reads what the finished first block puts out, quantized inputs included."""
    Looking.kept = {}
    q = quantized(Rule("*:weight", int_weight(4)), Rule("*:input", int_activation(3)), propagate="all", solver=Looking(clip="none")).model
    x = read_by(q, "model.layers.1.self_attn.v_proj")
    torch.testing.assert_close(Looking.kept[(16, 32)][-1], x.double().square().mean(0), rtol=1e-4, atol=1e-6)


# wishes that cannot be had ----------------------------------------------------------------------------------------------------------------


def test_static_scales_per_token_are_a_problem_of_the_plan():
    recipe = Recipe(rules=(WEIGHTS, Rule("*:input", QuantSpec(format=Int(8), granularity=PerToken()))), solver=RTN())
    plan = make_plan(load_in_memory(tiny_decoder()), recipe, TinyDecoderAdapter(), Registry(""))
    assert any("per tensor, per channel (axis 1), group or head" in p for p in plan.problems)


def test_static_scales_need_data():
    recipe = Recipe(rules=(WEIGHTS, Rule("*:input", INT8)), solver=RTN())
    plan = make_plan(load_in_memory(tiny_decoder()), recipe, TinyDecoderAdapter(), Registry(""), has_data=False)
    assert any("calibration data" in p for p in plan.problems)
    with pytest.raises(QcoreError, match="no calibration batches"):
        quantized(WEIGHTS, Rule("*:input", INT8), batches=())


def test_an_observer_belongs_to_static_activations():
    with pytest.raises(SpecError, match="observer"):
        Rule("*:input", int_activation(8), observer=MinMax())


def test_an_observer_without_a_range_is_refused():
    with pytest.raises(SpecError, match="gives no range"):
        quantized(WEIGHTS, Rule("*:input", INT8, observer=Gram()))


def test_recipes_with_observers_are_written_and_read():
    recipe = Recipe(rules=(WEIGHTS, Rule("*:input", INT8, observer=Percentile(q=0.999))), solver=RTN(), name="r")
    again = parse_recipe(dump(recipe), Registry(""), "r")
    assert again == replace(recipe, description="")


def test_activations_keep_float32_scales():
    recipe = Recipe(rules=(Rule("*", INT8, scale="auto"),), solver=RTN())
    wishes = recipe.wishes(TinyDecoderAdapter().topology(tiny_decoder()), "bfloat16")
    assert {spec.scale for site, spec in wishes.items() if site.tensor == "weight"} == {"bfloat16"}
    assert {spec.scale for site, spec in wishes.items() if site.tensor != "weight"} == {"float32"}
