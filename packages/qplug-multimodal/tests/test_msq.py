"""Two static scales, one for each modality."""

import copy
import warnings

import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qcore.model.tap import RunContext, running
from qcore.numbers import Int, Offset, PerTensor, QuantSpec, fake_quantize, int_activation, int_weight, scale_parts
from qcore.plugins import load_registry
from qcore.testing.adapters import outputs
from qcore.testing.transforms import fit_transform
from qcore.transforms import apply_rewrite
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.msq import MSQ, ByModality, ModalInput
from qplug_multimodal.testing import llava_batch, tiny_llava
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = dict(load_registry().modules)
SPEC = QuantSpec(format=Int(8), granularity=PerTensor())
SEGMENTS = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]])


def _rows(gap: float = 40.0) -> torch.Tensor:
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)) * 0.25
    return torch.where(SEGMENTS.unsqueeze(-1) == 1, x * gap, x)


def _module(x: torch.Tensor, spec: QuantSpec = SPEC, **options) -> ModalInput:
    observer = ByModality()
    with running(RunContext(segments=SEGMENTS)):
        observer.update(x.flatten(0, 1))
    parts = [scale_parts(*observer.result()[m], spec) for m in (0, 1)]
    return ModalInput(
        spec, torch.stack([p["scale"] for p in parts]), torch.stack([p["offset"] for p in parts]) if "offset" in parts[0] else None, **options
    )


def _sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


@pytest.mark.parametrize("offset", [Offset.NONE, Offset.CODE])
def test_text_gains_twenty_decibels_over_a_shared_scale(offset):
    """A gap of 40×: 20·log10(40) = 32 dB would be ideal."""
    spec = QuantSpec(format=Int(8), granularity=PerTensor(), offset=offset)
    x = _rows()
    with running(RunContext(segments=SEGMENTS)):
        own = _module(x, spec)(x)
    shared = fake_quantize(x.flatten(0, 1), spec).view_as(x)
    text = SEGMENTS == 0
    assert _sqnr(x[text], own[text]) >= _sqnr(x[text], shared[text]) + 20
    assert abs(_sqnr(x[~text], own[~text]) - _sqnr(x[~text], shared[~text])) < 1  # visual tokens keep what they had


def test_one_token_changes_no_other_token_s_codes():
    x = _rows()
    module = _module(x)
    changed = x.clone()
    changed[0, 4] *= 100
    with running(RunContext(segments=SEGMENTS)):
        a, b = module.codes(x).parts["codes"], module.codes(changed).parts["codes"]
    other = torch.arange(8) != 4
    assert torch.equal(a[other], b[other]) and not torch.equal(a[4], b[4])


def test_nothing_is_reduced_to_find_a_scale():
    """No minimum and no maximum over values runs at inference."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    module, x = _module(_rows()), _rows()
    with running(RunContext(segments=SEGMENTS)), Record():
        module(x)
    reductions = ("amin", "amax", "aminmax", "::min", "::max", "topk", "sort", "kthvalue")
    assert seen and not [name for name in seen if any(r in name for r in reductions) and "minimum" not in name and "maximum" not in name]


def test_the_codes_are_those_of_an_integer_product_for_each_block_of_rows():
    """y = s_m s_w (q_x q_wᵀ) for the rows of each modality."""
    x, w = _rows(), torch.randint(-7, 8, (5, 64), generator=torch.Generator().manual_seed(2)).double()
    module = _module(x)
    with running(RunContext(segments=SEGMENTS)):
        codes = module.codes(x).parts["codes"].double()
        y = module(x).double() @ (w * 0.01).T
    for modality in (0, 1):
        rows = SEGMENTS[0] == modality
        assert torch.allclose(y[0, rows], module.scale[modality].double() * 0.01 * (codes[rows] @ w.T), rtol=1e-5, atol=1e-6)


def test_generated_tokens_are_text():
    model, adapter = tiny_llava(), VisionLanguage()
    adapter.prepare(model)
    seen = []
    from qcore.model.tap import run_context

    model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: seen.append(run_context().segments))
    model.generate(**llava_batch((2, "i", 1)), max_new_tokens=3, do_sample=False)
    assert seen[0].tolist() == [[0, 0, 1, 1, 1, 1, 0]] and all(s.tolist() == [[0]] for s in seen[1:]) and len(seen) == 3


def test_observers_by_modality_are_merged_and_resumed():
    x = _rows().flatten(0, 1)
    one, two, all_ = ByModality(), ByModality(), ByModality()
    for o, rows, s in ((one, x[:4], SEGMENTS[:, :4]), (two, x[4:], SEGMENTS[:, 4:]), (all_, x, SEGMENTS)):
        with running(RunContext(segments=s)):
            o.update(rows)
    other = ByModality()
    other.merge([one.state(), two.state()])
    again = ByModality()
    again.load(all_.state())
    for found in (other, again):
        assert all(torch.equal(a, b) for m in (0, 1) for a, b in zip(found.result()[m], all_.result()[m], strict=True))


def test_padding_is_no_token_to_the_observer():
    segments = torch.tensor([[0, 1, 1]])
    observer = ByModality()
    with running(RunContext(segments=segments, valid=torch.tensor([[False, True, True]]))):
        observer.update(torch.randn(2, 4))
    assert list(observer.result()) == [1]


def test_rows_of_no_known_modality_are_refused():
    with pytest.raises(CalibrationError, match="nobody said"):
        ByModality().update(torch.randn(2, 4))
    with running(RunContext(segments=SEGMENTS)), pytest.raises(CalibrationError, match="3 rows came"):
        ByModality().update(torch.randn(3, 4))
    with pytest.raises(SpecError, match="nobody said"):
        _module(_rows())(_rows())
    with running(RunContext(segments=SEGMENTS)), pytest.raises(SpecError, match="and \\(1, 3\\) came"):
        _module(_rows())(torch.randn(1, 3, 64))


# in a model ------------------------------------------------------------------------------------------------------------------------------


def _fitted(*batches, **options):
    model, adapter = tiny_llava(), VisionLanguage()
    adapter.prepare(model)
    specs = {site: int_weight(4) for site in adapter.topology(model).sites}
    return model, fit_transform(MSQ(**options), adapter, model, list(batches), specs)


def test_every_layer_of_the_language_model_gets_two_scales():
    batch = llava_batch((3, "i", 4), (2, "i", 1))
    model, rewrite = _fitted(batch)
    assert len(rewrite.inserts) == 14 and all("language_model" in path for path in rewrite.inserts)
    assert not rewrite.notes
    rotated = [path for path, i in rewrite.inserts.items() if i.module.config["padded"]]
    assert rotated == [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2)]
    adapter = VisionLanguage()
    y, reference = outputs(adapter, apply_rewrite(model, rewrite, MODULES), batch), outputs(adapter, model, batch)
    assert 0 < (y - reference).norm() / reference.norm() < 0.05


def test_many_bits_leave_the_function_alone():
    """The rotation inside the module is undone by the weight: what is left is rounding, and it shrinks with the bits."""
    batch, adapter, errors = llava_batch((3, "i", 4)), VisionLanguage(), []
    for bits in (4, 6, 8):
        model, rewrite = _fitted(batch, bits=bits)
        y, reference = outputs(adapter, apply_rewrite(model, rewrite, MODULES), batch), outputs(adapter, model, batch)
        errors.append(float((y - reference).norm() / reference.norm()))
    # two bits more are a quarter of the step
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.05


def test_a_modality_that_calibration_did_not_see_is_told():
    model, rewrite = _fitted(llava_batch((5,)))
    assert len(rewrite.notes) == 2  # one a block
    assert "saw no visual token" in rewrite.notes[0] and "6 more layers" in rewrite.notes[0]
    quantized = apply_rewrite(model, rewrite, MODULES)
    scale = quantized.model.language_model.layers[0].self_attn.q_proj.before.scale
    assert scale[0] == scale[1]
    with pytest.warns(UserWarning, match="saw no visual token"):
        outputs(VisionLanguage(), quantized, llava_batch((3, "i", 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs(VisionLanguage(), quantized, llava_batch((5,)))


def test_inputs_are_not_coded_twice():
    model, adapter = tiny_llava(), VisionLanguage()
    adapter.prepare(model)
    topology = adapter.topology(model)
    specs = {site: int_weight(4) for site in topology.sites} | {site.input: int_activation(8) for site in topology.sites}
    with pytest.raises(SpecError, match="scales by modality as well"):
        MSQ().foresee(topology, specs, model)
    with pytest.raises(SpecError, match="is this a vision-language model"):
        MSQ(sites=("*nothing:weight",)).foresee(topology, specs, model)
    assert "14 layers" in MSQ().foresee(topology, {s: int_weight(4) for s in topology.sites}, model)[0]


def test_the_module_is_rebuilt_from_its_config_and_keeps_its_scales_in_half_precision():
    x = _rows()
    own = _module(x, QuantSpec(format=Int(8), granularity=PerTensor(), offset=Offset.CODE), signs=torch.ones(64), size=64, seen=(True, False))
    other = ModalInput.from_config(copy.deepcopy(own.config()))
    other.load_state_dict(own.state_dict())
    assert other.seen == (True, False)
    with running(RunContext(segments=torch.zeros(1, 8, dtype=torch.long))):
        assert torch.equal(own(x), other(x))
    assert own.bfloat16().scale.dtype == torch.float32
