import pytest
import torch
import transformers
from qcore.model.tap import Tap, attach, detach
from qplug_llm.decoder import DecoderLM
from torch import Tensor

LLAMA = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 48, "hidden_size": 60, "intermediate_size": 76,
    "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Recorder(Tap):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self.seen.append(x.detach())
        return x


def llama(implementation: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.2)
    model.set_attn_implementation(implementation)
    return model


def prepared(p_tapped: bool) -> torch.nn.Module:
    model = llama()
    DecoderLM().prepare(model)
    assert model.config._attn_implementation == "qcore"
    if p_tapped:
        for layer in model.model.layers:
            attach(layer.self_attn, "p", Recorder())
    return model


def inputs(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(4, 97, (2, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[0, -4:] = 0
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("p_tapped", [False, True])
def test_equal_to_sdpa_in_float64(padding, p_tapped):
    batch = inputs(padding)
    valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected = llama()(**batch, use_cache=False).logits[valid]
    got = prepared(p_tapped)(**batch, use_cache=False).logits[valid]
    # two orders of the same float64 sums; the model's norms round to float32 in between
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p_tapped", [False, True])
def test_no_token_sees_a_later_one(p_tapped):
    model, batch = prepared(p_tapped), inputs("none")["input_ids"]
    before = model(input_ids=batch, use_cache=False).logits
    batch = batch.clone()
    batch[:, 7:] = (batch[:, 7:] + 1) % 97
    after = model(input_ids=batch, use_cache=False).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("p_tapped", [False, True])
def test_decoding_with_a_cache_equals_one_pass(p_tapped):
    model, ids = prepared(p_tapped), inputs("none")["input_ids"]
    whole = model(input_ids=ids, use_cache=False).logits
    start = model(input_ids=ids[:, :8], use_cache=True)
    step = model(input_ids=ids[:, 8:9], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[:, 0], whole[:, 8], rtol=1e-5, atol=1e-6)


def test_a_sliding_window_is_kept():
    config = transformers.MistralConfig(**LLAMA, sliding_window=3)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).double().eval()
    expected = model(**inputs("none"), use_cache=False).logits
    DecoderLM().prepare(model)
    torch.testing.assert_close(model(**inputs("none"), use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    attach(model.model.layers[0].self_attn, "p", Recorder())
    torch.testing.assert_close(model(**inputs("none"), use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_soft_caps_and_sinks_are_kept(name):
    extra = (
        {"head_dim": 10, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}
        if name == "GptOss"
        else {"head_dim": 10}
    )
    config = getattr(transformers, f"{name}Config")(**LLAMA | extra)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * 0.4)
    model.set_attn_implementation("eager")
    # padding on the right: transformers' own eager attention gives NaN for rows that may attend to nothing, in float64
    expected = model(**inputs("right"), use_cache=False).logits
    DecoderLM().prepare(model)
    got = model(**inputs("right"), use_cache=False).logits
    valid = inputs("right")["attention_mask"].bool()
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_taps_see_rows_by_token_and_can_replace_them():
    model = prepared(False)
    attention = model.model.layers[0].self_attn
    taps = {t: Recorder() for t in ("q", "k", "v", "p")}
    for name, t in taps.items():
        attach(attention, name, t)
    model(**inputs("none"), use_cache=False)
    assert {name: tuple(t.seen[0].shape) for name, t in taps.items()} == {"q": (2, 11, 60), "k": (2, 11, 20), "v": (2, 11, 20), "p": (2, 11, 6, 11)}
    torch.testing.assert_close(taps["p"].seen[0].sum(-1), torch.ones(2, 11, 6, dtype=torch.float64))

    class Zero(Tap):
        def forward(self, x, rows=None, weight=None):
            return torch.zeros_like(x)

    changed = Zero()
    attach(attention, "v", changed)
    o_input = []
    handle = attention.o_proj.register_forward_pre_hook(lambda m, args: o_input.append(args[0]))
    model(**inputs("none"), use_cache=False)
    handle.remove()
    assert not o_input[0].any()
    for name, t in taps.items():
        detach(attention, name, t)
    detach(attention, "v", changed)
    assert "taps" not in attention._modules
    assert torch.equal(model(**inputs("none"), use_cache=False).logits, prepared(False)(**inputs("none"), use_cache=False).logits)


def test_activation_sites_fire():
    model = prepared(False)
    sites = DecoderLM().topology(model).activations
    assert {(s.module, s.tensor) for s in sites} == {(f"model.layers.{i}.self_attn", t) for i in range(2) for t in "qkvp"}
