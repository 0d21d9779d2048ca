"""Our 4-bit quantization is bitsandbytes', bit for bit."""

import pytest
import torch
from bitsandbytes import functional as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers import nf4

CODES = {"nf4": nf4.nf4_code(), "fp4": nf4.fp4_code()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
shapes = st.one_of(
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([(576, 576), (192, 576), (3, 64), (2, 4096)]),
)
kinds = st.sampled_from(["gaussian", "heavy", "zeros", "a zero block", "tiny", "grid"])


seeds = st.integers(0, 2**32 - 1)


def weights(kind, shape, dtype, seed):
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    if kind == "heavy":
        weight = weight / torch.rand(shape).clamp(min=1e-2)
    if kind == "zeros":
        weight = weight * 0
    if kind == "a zero block":
        weight.view(-1)[:4096] = 0
    if kind == "tiny":
        weight = weight * 1e-6
    if kind == "grid":  # exactly on the levels and on the midpoints between them
        levels = nf4.nf4_code()
        points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
        weight = points[torch.randint(len(points), shape)]
    return weight.to(dtype)


def indices(packed):
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten().tolist()


def wrong_scales_there(shape, block):
    """Where bitsandbytes' AVX-512 kernel gives rows a neighbour's scales."""
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and shape[-1] % 16 == 0 and shape[-1] % block != 0


@settings(deadline=None, max_examples=200)
@given(shapes, kinds, st.sampled_from(DTYPES), st.sampled_from(BLOCKS),
       st.sampled_from(list(CODES)), seeds)  # fmt: skip
def test_bytes_scales_and_values_are_bitsandbytes(
    shape, kind, dtype, block, name, seed
):
    weight, code = weights(kind, shape, dtype, seed), CODES[name]
    expected, state = theirs.quantize_4bit(weight, quant_type=name, blocksize=block)
    packed, absmax = nf4.quantize(weight, code, block)
    differ = [i for i, (a, b) in enumerate(zip(indices(packed), indices(expected),
                                               strict=True)) if a != b]  # fmt: skip
    # A last block that is not full is divided by its absmax on a CPU; all others (and
    # on CUDA this one too) are multiplied by the reciprocal: it differs at a midpoint.
    assert all(i >= weight.numel() // block * block for i in differ)
    levels = code.sort().values
    scaled = weight.flatten()[differ].float() / absmax[-1]
    from_middle = scaled[:, None] - (levels[1:] + levels[:-1]) / 2
    assert (from_middle.abs().amin(dim=1) < 1e-6).all()
    # of a block that is all zeros and not full, bitsandbytes stores 1e-38
    assert torch.equal(absmax, torch.where(state.absmax <= 1e-38, 0, state.absmax))
    values = nf4.dequantize(expected, absmax, code, shape, block).to(dtype)
    assert values.shape == torch.Size(shape)
    if not wrong_scales_there(shape, block):
        back = theirs.dequantize_4bit(expected, state)
        assert torch.equal(values.flatten(), back.flatten())


@settings(deadline=None, max_examples=50)
@given(shapes, kinds.filter(lambda kind: kind != "tiny"), st.sampled_from(DTYPES),
       seeds)  # fmt: skip
def test_double_quantization_is_bitsandbytes(shape, kind, dtype, seed):
    weight = weights(kind, shape, dtype, seed)
    nested = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1]
    _, absmax = nf4.quantize(weight, nf4.nf4_code())
    index, scale, offset = nf4.quantize_scales(absmax)
    assert torch.allclose(offset, nested.offset, rtol=1e-6, atol=1e-38)
    assert torch.allclose(scale, nested.state2.absmax, rtol=1e-5, atol=1e-12)
    # On a CPU the encoder goes through a grid of 65,536 points: some codes are the next
    # one. Decoding has no such freedom.
    apart = (index.int() - nested.absmax.int()).abs()
    apart[scale.repeat_interleave(nf4.SCALE_BLOCK)[: len(apart)] == 0] = 0  # any code
    # Near zero several codes lie within one step of the grid.
    code = nf4.dynamic_code()
    near = (code[index.long()] - code[nested.absmax.long()]).abs() < 2 / 65535
    assert ((apart <= 1) | near).all()
    assert (apart > 0).sum() <= 2 + 0.01 * len(apart)
    back = nf4.dequantize_scales(nested.absmax, nested.state2.absmax, nested.offset)
    assert torch.equal(
        back, theirs.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    )


def test_the_tables_are_bitsandbytes_to_the_last_bit():
    for name, code in CODES.items():
        assert torch.equal(code, theirs.get_4bit_type(name, device="cpu"))
    assert torch.equal(nf4.dynamic_code(), theirs.create_dynamic_map())


def test_a_single_weight_is_kept():
    packed, absmax = nf4.quantize(torch.tensor([-3.5]), nf4.nf4_code())
    back = nf4.dequantize(packed, absmax, nf4.nf4_code(), (1,))
    assert packed.nbytes == 1 and back.tolist() == [-3.5]


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w[:, ::2], lambda w: w[1:]])
def test_what_is_not_contiguous_is_read_in_its_own_order(view):
    weight = torch.randn(48, 66)
    packed, absmax = nf4.quantize(view(weight), nf4.nf4_code())
    again, scales = nf4.quantize(view(weight).contiguous(), nf4.nf4_code())
    assert torch.equal(packed, again) and torch.equal(absmax, scales)


def test_a_weight_that_trains_is_left_as_it_was():
    weight = torch.nn.Parameter(torch.randn(64, 64))
    before = weight.detach().clone()
    packed, absmax = nf4.quantize(weight, nf4.nf4_code())
    assert torch.equal(weight, before) and not absmax.requires_grad


@pytest.mark.parametrize(
    "weight, code, block, said",
    [
        (torch.tensor([1.0, float("nan")]), nf4.nf4_code(), 64, "got 2 of which 1 "),
        (torch.tensor([1.0, -float("inf")]), nf4.nf4_code(), 64, "NaN or infinite"),
        (torch.tensor([]), nf4.nf4_code(), 64, "at least one, got 0"),
        (torch.ones(4), torch.arange(17.0), 64, "got 17 levels"),
        (torch.ones(4), nf4.nf4_code(), 0, "blocks of 0"),
        (
            torch.ones(7),
            nf4.nf4_code(),
            7,
            "even size, got 16 levels and blocks of 7",
        ),
    ],
)
def test_what_has_no_four_bit_form_is_refused(weight, code, block, said):
    with pytest.raises(ValueError, match=said):
        nf4.quantize(weight, code, block)


@settings(deadline=None, max_examples=50)
@given(shapes, st.sampled_from([*CODES, "int4"]), st.sampled_from(BLOCKS), seeds)
def test_each_weight_gets_the_nearest_level(shape, name, block, seed):
    code = CODES.get(name, nf4.int4_code())
    weight = weights("gaussian", shape, torch.float32, seed)
    packed, absmax = nf4.quantize(weight, code, block)
    stored = nf4.dequantize(packed, absmax, code, shape, block)
    scales = absmax.repeat_interleave(block)[: weight.numel()].view(shape)
    nearest = (weight[..., None] - code * scales[..., None]).abs().amin(dim=-1)
    assert torch.allclose((weight - stored).abs(), nearest, atol=1e-6)


def test_quantizing_twice_changes_nothing():
    weight = torch.randn(100, 64)
    code = nf4.nf4_code()
    once = nf4.dequantize(*nf4.quantize(weight, code), code, weight.shape)
    assert torch.equal(
        nf4.dequantize(*nf4.quantize(once, code), code, weight.shape), once
    )
