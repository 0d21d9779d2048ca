"""The hand-written QLoRA layer is bitsandbytes' Linear4bit with PEFT's adapter."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from qlora_helpers import layer as by_hand
from qlora_helpers.models.embedded import embedded_dir


def pair(weight, r=4, alpha=8, dtype=torch.float32):
    """Our layer and the libraries', with the same bytes and the same A and B."""
    out, width = weight.shape
    base = Linear4bit(width, out, bias=False, quant_type="nf4", compute_dtype=dtype)
    base.support_avx512bf16_for_cpu = False  # else it repacks its weights when it can
    base.load_state_dict({"weight": weight})
    base = base.to("cpu")  # this quantizes
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(base), lora)
    theirs = model.base_model.model[0]
    ours = by_hand.QLoRALinear(weight, r, alpha, dtype)
    torch.nn.init.normal_(ours.B, std=0.1)  # zeros would hide A's gradient
    theirs.lora_A["default"].weight.data.copy_(ours.A)
    theirs.lora_B["default"].weight.data.copy_(ours.B)
    # a few 8-bit codes differ by one on a CPU: see test_nf4.py
    ours.index.copy_(theirs.base_layer.weight.quant_state.absmax)
    return ours, theirs


def apart(weight, dtype=torch.float32, rows=5):
    """The largest relative differences of output and of three gradients."""
    ours, theirs = pair(weight, dtype=dtype)
    x = torch.randn(2, rows, weight.shape[1], requires_grad=True)
    target = torch.randn(2, rows, weight.shape[0])
    found = []
    adapters = ([ours.A, ours.B], [p for p in theirs.parameters() if p.requires_grad])
    for layer, (a, b) in zip((ours, theirs), adapters, strict=True):
        y = layer(x)
        found.append([y, *torch.autograd.grad((y * target).sum(), [x, a, b])])
    return [
        ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6)).item()
        for a, b in zip(*found, strict=True)
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1.0, 1e-3, 0.0]))
def test_forward_and_backward_are_the_libraries(out, sixteens, size):
    weight = torch.randn(out, 16 * sixteens) * size
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        weight = torch.randn(out, 64 * sixteens) * size  # see test_nf4.py
    assert max(apart(weight)) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2),
                                              (torch.float16, 4e-3)])  # fmt: skip
def test_in_16_bit_they_differ_by_rounding_alone(dtype, tolerance):
    assert max(apart(torch.randn(96, 128), dtype)) < tolerance


@pytest.mark.parametrize("kind", ["self_attn.k_proj", "mlp.down_proj"])
def test_on_a_llamas_weights(kind):
    [file] = embedded_dir().glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        weight = tensors.get_tensor(f"model.layers.15.{kind}.weight").float()
    assert max(apart(weight)) < 1e-5


def test_finite_differences_find_the_same_gradients():
    layer = by_hand.QLoRALinear(torch.randn(24, 32), 4, 8, torch.float64).double()
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_the_frozen_weight_gets_no_gradient_and_is_in_no_optimizer():
    layer = by_hand.QLoRALinear(torch.randn(24, 32), 4, 8, torch.float32)
    stored = [buffer.clone() for buffer in layer.buffers()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(3, 32)).square().sum().backward()
    optimizer.step()
    assert {name for name, _ in layer.named_parameters()} == {"A", "B"}
    for before, after in zip(stored, layer.buffers(), strict=True):
        assert torch.equal(before, after)


def test_a_new_layer_adds_nothing():
    layer = by_hand.QLoRALinear(torch.randn(24, 32), 4, 8, torch.float32)
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), x @ layer.weight(x.dtype).T)


def test_it_holds_no_weight_between_its_passes():
    layer = by_hand.QLoRALinear(torch.randn(256, 256), 4, 8, torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.shape) or t, lambda t: t
    ):
        layer(torch.randn(2, 256, requires_grad=True))
    assert held and torch.Size([256, 256]) not in held


def test_weights_that_are_nan_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        by_hand.QLoRALinear(torch.full((4, 4), float("nan")), 2, 4, torch.float32)
