"""An order of tokens changes no logit; a mask that does not know of it does."""

import copy

import pytest
import torch
from qcore.errors import SpecError
from qcore.testing.adapters import deviation, outputs, to_double
from qcore.transforms import apply_rewrite
from qplug_multimodal import aifs
from qplug_multimodal.adapter import VisionLanguage
from qplug_multimodal.aifs import AIFS, VisualFirst, policy_of
from qplug_multimodal.anatomy import find_anatomy
from qplug_multimodal.testing import llava_batch, qwen_batch, tiny_llava, tiny_qwen2_vl
from transformers import DynamicCache

MODULES = {VisualFirst.name: VisualFirst}
ADAPTER = VisionLanguage()
# text first, text last, two images, three in turn, an image at the start and at the end, no image at all
PATTERNS = [((3, "i", 4),), (("i", 3),), ((3, "i"),), ((2, "i", 1, "i", 3),), ((1, "i", 1, "i", 2, "i", 1),), ((5,),)]
BATCHES = [((3, "i", 4), (2, "i", 1)), ((6, "i", 1, "i", 2), (4,), (1, "i", 3))]


def _pair(make):
    model = make().double()
    ADAPTER.prepare(model)
    rewrite = AIFS().fit(ADAPTER.topology(model), {}, {}, model, None)  # type: ignore[arg-type]
    ordered = apply_rewrite(model, rewrite, MODULES)
    assert policy_of(ordered.get_submodule(find_anatomy(ordered).language.path)) is not None
    return model, ordered


@pytest.fixture(scope="module", params=["llava", "qwen2-vl"])
def family(request):
    make, batch = {"llava": (tiny_llava, llava_batch), "qwen2-vl": (tiny_qwen2_vl, qwen_batch)}[request.param]
    return *_pair(make), batch


@pytest.mark.parametrize("patterns", PATTERNS + BATCHES, ids=str)
def test_logits_do_not_notice_the_order(family, patterns):
    model, ordered, batch = family
    x = to_double(batch(*patterns))
    valid = x["attention_mask"].bool()
    a, b = outputs(ADAPTER, ordered, x)[valid], outputs(ADAPTER, model, x)[valid]
    assert deviation(a, b) <= 1e-10


def test_the_layers_do_see_another_order(family):
    model, ordered, batch = family
    x = to_double(batch((3, "i", 4)))
    seen = []
    path = f"{find_anatomy(model).language.path}.layers.0"
    for m in (model, ordered):
        hook = m.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        outputs(ADAPTER, m, x)
        hook.remove()
    plain, moved = seen
    order = [3, 4, 5, 6, 0, 1, 2, 7, 8, 9, 10]
    assert torch.equal(moved[0], plain[0, order])


def test_the_naive_causal_mask_fails(family, monkeypatch):
    """Tokens in a new order behind the ordinary lower triangle: the error is as large as the logits."""
    model, ordered, batch = family
    x = to_double(batch((3, "i", 4)))

    def naive(order, valid, past):
        t = order.shape[1]
        return torch.ones(t, t, dtype=torch.bool).tril().expand(len(order), 1, t, t)

    monkeypatch.setattr(aifs.VisualFirst, "mask", staticmethod(naive))
    assert deviation(outputs(ADAPTER, ordered, x), outputs(ADAPTER, model, x)) > 1e-2


def test_positions_that_stay_behind_fail(family, monkeypatch):
    model, ordered, batch = family
    x = to_double(batch((3, "i", 4)))
    right = aifs._ordered

    def left_behind(policy, module, args, kwargs, context):
        order, moved, context = right(policy, module, args, kwargs, context)
        return order, moved | {"position_ids": kwargs["position_ids"]}, context

    monkeypatch.setattr(aifs, "_ordered", left_behind)
    assert deviation(outputs(ADAPTER, ordered, x), outputs(ADAPTER, model, x)) > 1e-3


@pytest.mark.parametrize("patterns", [((3, "i", 4),), ((3, "i", 1, "i", 4), (2, "i", 1))], ids=str)
def test_decoding_with_a_cache_does_not_notice_the_order(family, patterns):
    model, ordered, batch = family
    x = to_double(batch(*patterns))
    steps = torch.randint(3, 90, (len(patterns), 3), generator=torch.Generator().manual_seed(4))
    found = []
    with torch.no_grad():
        for m in (model, ordered):
            cache, mask = DynamicCache(config=m.config.text_config), x["attention_mask"]
            own = [m(**x, use_cache=True, past_key_values=cache).logits[:, -1]]
            for i in range(3):
                mask = torch.cat([mask, torch.ones(len(patterns), 1, dtype=torch.long)], 1)
                # Qwen2-VL's forward makes positions of all that the mask covers; `generate` hands it those of the one new token, so do we
                at = torch.full((*([3] if "image_grid_thw" in x else []), len(patterns), 1), x["input_ids"].shape[1] + i)
                step = {"input_ids": steps[:, i : i + 1], "attention_mask": mask, "position_ids": at}
                own.append(m(**step, past_key_values=cache, use_cache=True).logits[:, -1])
            found.append(torch.stack(own))
    assert deviation(found[1], found[0]) <= 1e-10


def test_a_second_turn_with_an_image_goes_behind_the_cache(family):
    """Text is cached, then an image and text come in one piece: they are ordered among themselves, and see all that is cached."""
    model, ordered, batch = family
    if batch is qwen_batch:
        pytest.skip("Qwen2-VL makes M-RoPE positions of images in the first pass alone, not behind a cache")
    first, second = to_double(batch((4,))), to_double(batch((2, "i", 3), seed=5))
    found = []
    with torch.no_grad():
        for m in (model, ordered):
            cache = DynamicCache(config=m.config.text_config)
            m(**first, use_cache=True, past_key_values=cache)
            second["attention_mask"] = torch.ones(1, 4 + second["input_ids"].shape[1], dtype=torch.long)
            found.append(m(**second, use_cache=True, past_key_values=cache).logits)
    assert deviation(found[1], found[0]) <= 1e-10


def test_generation_does_not_notice_the_order(family):
    model, ordered, batch = family
    x = batch((3, "i", 1, "i", 4), (2, "i", 1))
    a, b = (copy.deepcopy(m).float().generate(**x, max_new_tokens=6, do_sample=False) for m in (model, ordered))
    assert torch.equal(a, b)


def test_an_order_keeps_padding_in_its_place():
    segments = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 1, 0]])
    valid = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    assert VisualFirst().order(segments, valid).tolist() == [[0, 2, 3, 1, 4], [1, 3, 0, 2, 4]]


def test_the_mask_of_one_image_is_that_of_the_paper():
    """[text m₁ | image V | text m₂] → [V | m₁ | m₂]: an image's token sees the image before it and all of m₁, m₁ sees itself alone, m₂ all."""
    segments = torch.tensor([[0, 0, 1, 1, 0]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    order = VisualFirst().order(segments, valid)
    mask = VisualFirst.mask(order, valid, torch.ones(1, 0, dtype=torch.bool))[0, 0].long().tolist()
    assert mask == [[1, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_what_cannot_follow_the_order_is_refused():
    model, ordered = _pair(tiny_llava)
    x = to_double(llava_batch((3, "i", 4)))
    with pytest.raises(SpecError, match="attention maps"):
        ordered(**x, output_attentions=True)
    with pytest.raises(SpecError, match="makes its mask itself"):
        ordered(**(x | {"attention_mask": torch.ones(1, 1, 11, 11, dtype=torch.bool)}))
    with pytest.raises(SpecError, match="nobody said"):
        language = ordered.model.language_model
        language(inputs_embeds=torch.randn(1, 4, 48, dtype=torch.float64))
    model.model.language_model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(SpecError, match="causal and nothing else"):
        AIFS().fit(ADAPTER.topology(model), {}, {}, model, None)  # type: ignore[arg-type]


def test_an_error_inside_leaves_no_context_behind(family):
    from qcore.model.tap import run_context

    model, ordered, batch = family
    x = to_double(batch((3, "i", 4)))

    def fail(*_):
        raise ZeroDivisionError

    hook = ordered.get_submodule(f"{find_anatomy(ordered).language.path}.layers.1").register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        outputs(ADAPTER, ordered, x)
    hook.remove()
    assert run_context().segments is None
    assert deviation(outputs(ADAPTER, ordered, x), outputs(ADAPTER, model, x)) <= 1e-10
