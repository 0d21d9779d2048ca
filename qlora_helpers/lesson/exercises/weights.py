"""The oracles of 01 to 03, 07 and 08: weights, layers, merging and files."""

import gguf
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from qlora_helpers import memory, nf4
from qlora_helpers.lesson.exercises.oracle import SEED, near, try_out
from qlora_helpers.ship import gguf_file


def check_nf3(nf3_code) -> bool:
    """Exercise 01.1: eight levels from a Gaussian's quantiles, as NF4 has sixteen."""
    cases = []
    for top in (0.9330, 0.95):
        above = torch.special.ndtri(torch.linspace(top, 0.5, 5)[:-1].double())
        below = -torch.special.ndtri(torch.linspace(top, 0.5, 4)[:-1].double())
        code = torch.cat([below, torch.zeros(1), above.flip(0)]).float()
        cases.append(((top,), code / code.max()))
    return try_out("exercise 01.1", nf3_code, cases, near)


def check_gain(gain) -> bool:
    """Exercise 01.2: NF4's gain over INT4, in percent of INT4's error."""
    [weight] = _random(2**16, seed=7)
    cases = []
    for block in (32, 64, 1024):
        errors = []
        for code in (nf4.nf4_code(), nf4.int4_code()):
            packed, absmax = nf4.quantize(weight, code, block)
            stored = nf4.dequantize(packed, absmax, code, weight.shape, block)
            errors.append((stored - weight).pow(2).mean().sqrt())
        cases.append(((weight, block), 100 * (1 - errors[0] / errors[1])))
    return try_out("exercise 01.2", gain, cases, near)


def check_bits_per_weight(bits_per_weight) -> bool:
    """Exercise 02.1: weights, scales and smallest values, shared by a block."""
    cases = [
        ((4, 64, 32, False), 4.5),  # NF4 in bitsandbytes
        ((4, 32, 16, True), 5.0),  # GGUF's Q4_1
        ((4, 32, 16, False), 4.5),  # GGUF's Q4_0
        ((8, 256, 32, False), 8.125),
    ]
    return try_out("exercise 02.1", bits_per_weight, cases)


def check_layer_bytes(layer_bytes) -> bool:
    """Exercise 02.2: every byte of a Linear4bit, as bitsandbytes has it."""
    cases = []
    for rows, columns in ((1536, 576), (64, 64), (33, 70), (3, 1000)):
        layer = Linear4bit(columns, rows, bias=False, quant_type="nf4")
        layer = layer.to("cpu")  # this quantizes
        cases.append(((rows, columns), memory.tensor_bytes(layer.weight)))
    return try_out("exercise 02.2", layer_bytes, cases)


def check_dropout(with_dropout) -> bool:
    """Exercise 03.1: dropout where PEFT has it, with the same random numbers."""
    cases = []
    for p in (0.1, 0.5):
        torch.manual_seed(3)
        base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["0"])
        layer = get_peft_model(base, lora).base_model.model[0].train()
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(16, 24)
        torch.manual_seed(SEED)
        expected = layer(x).detach()
        W, A, B = (weight.detach() for weight in layer.parameters())
        cases.append(((x, W, A, B, 2.0, p), expected))
    return try_out("exercise 03.1", with_dropout, cases, near)


def check_adapter_gradients(adapter_gradients) -> bool:
    """Exercise 03.2: the gradients of A and of B, as autograd finds them."""
    cases = []
    for rows, width, out, r in ((5, 7, 3, 2), (16, 24, 40, 4)):
        shapes = ((rows, width), (r, width), (out, r), (rows, out))
        x, A, B, grad = _random(*shapes, seed=rows)
        A.requires_grad_()
        B.requires_grad_()
        y = 0.5 * (x @ A.T) @ B.T
        expected = torch.autograd.grad(y, (A, B), grad)
        cases.append(((x, A.detach(), B.detach(), 0.5, grad), expected))
    return try_out("exercise 03.2", adapter_gradients, cases, near)


def check_merged(merged) -> bool:
    """Exercise 07.2: a 16-bit weight with an adapter merged, rounded only once."""
    cases = []
    tried = [(32, 16, False), (32, 16, True), (10, 8, True), (8, 16, False)]
    for alpha, r, rslora in tried:
        weight, A, B = _random((48, 64), (r, 64), (48, r))
        weight, B = weight.bfloat16(), 0.05 * B
        scaling = alpha / r**0.5 if rslora else alpha / r
        expected = (weight.float() + scaling * (B @ A)).bfloat16()
        cases.append(((weight, A, B, alpha, r, rslora), expected))
    return try_out("exercise 07.2", merged, cases, _same_bits)


def _same_bits(yours, expected) -> bool:
    """True where two tensors have one dtype, and differ in at most 1 of 100 numbers.

    Some sums lie halfway between two numbers, and another order of the factors then
    rounds the other way.
    """
    if yours.dtype != expected.dtype or yours.shape != expected.shape:
        return False
    return (yours != expected).float().mean().item() <= 0.01


def check_gguf_bytes(gguf_bytes) -> bool:
    """Exercise 08.1: a matrix's bytes in a GGUF file, as the gguf package has them."""
    cases = []
    for rows, width, kind, taken in [
        (576, 576, "Q4_K", "Q5_0"),
        (576, 1536, "Q4_K", "Q4_K"),
        (8, 768, "Q4_K", "Q4_K"),
        (10, 3200, "Q4_K", "Q5_0"),
        (2, 128, "Q4_K", "Q5_0"),
        (3, 64, "Q8_0", "Q8_0"),
        (5, 96, "Q4_0", "Q4_0"),
        (7, 50, "F16", "F16"),
    ]:
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[taken]]
        cases.append(((rows, width, kind), rows * width // weights * size))
    return try_out("exercise 08.1", gguf_bytes, cases)


def check_interleaved(interleaved) -> bool:
    """Exercise 08.2: rows of a query projection in llama.cpp's order."""
    cases = []
    for heads, size in ((1, 8), (3, 8), (2, 12)):  # at 4 both directions are alike
        [weight] = _random((heads * size, 5))
        cases.append(((weight, heads), gguf_file.interleave(weight, heads)))
    return try_out("exercise 08.2", interleaved, cases, near)


def _random(*shapes, seed=0) -> list[torch.Tensor]:
    """Tensors of these shapes, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]
