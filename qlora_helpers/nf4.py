"""NF4, FP4 and double quantization by hand, block by block, in readable PyTorch.

Notebooks 01 and 02 write these functions out and explain each line. Tests hold them
equal to bitsandbytes, bit for bit.
"""

import torch

BLOCK = 64  # weights that share a scale (QLoRA, section 3)
SCALE_BLOCK = 256  # scales that share a second scale


def nf4_code(top: float = 0.9677083) -> torch.Tensor:
    """The sixteen levels of NF4: quantiles of a Gaussian, scaled to end at -1 and 1.

    Returns (16,), fp32, ascending: seven negative levels, zero, eight positive ones.
    `top` is the largest probability asked for; bitsandbytes' own is the mean of
    1 - 1/32 and 1 - 1/30, cut to seven digits. Source: QLoRA, section 3 and appendix E.
    """
    above = torch.linspace(top, 0.5, 9)[:-1].double()  # eight, without the median
    below = torch.linspace(top, 0.5, 8)[:-1].double()  # seven; both spaced in fp32
    positive, negative = torch.special.ndtri(above), -torch.special.ndtri(below)
    code = torch.cat([negative, torch.zeros(1), positive.flip(0)]).float()
    return code / code.max()


def fp4_code() -> torch.Tensor:
    """The sixteen values of bitsandbytes' FP4, by their bits: sign, exponent, mantissa.

    Returns (16,), fp32, in the order of the bits, not of the values; scaled to end at
    -1 and 1. Source: bitsandbytes/functional.py, get_4bit_type.
    """
    values = []
    for bits in range(16):
        sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
        size = 2 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        values.append(-size if sign else size)
    return torch.tensor(values) / 12


def int4_code() -> torch.Tensor:
    """Symmetric INT4, the baseline: -7 to 7 in equal steps, scaled; 15 levels, fp32."""
    return torch.arange(-7, 8).float() / 7


def quantize(
    weight: torch.Tensor, code: torch.Tensor, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each weight the nearest level of `code`, in blocks scaled by their absmax.

    `weight` is of any shape, fp32, bf16 or fp16; rows follow one another, so that a
    block may span two. Returns (packed, absmax): two 4-bit indices to a byte, the first
    in its high half, (bytes, 1), uint8; and a scale for each block, (blocks,), fp32.

    Raises ValueError for a code of more than sixteen levels, a block of odd size, and
    for what has no 4-bit form: no weights, NaN or infinity.
    Source: QLoRA, eq. 1 and 2; bitsandbytes/backends/default/ops.py for the rounding.
    """
    if not 1 < len(code) <= 16 or block < 2 or block % 2:
        raise ValueError(f"expected 2 to 16 levels and blocks of an even size, got "
                         f"{len(code)} levels and blocks of {block}")  # fmt: skip
    flat = weight.detach().reshape(-1).float()
    bad = int((~flat.isfinite()).sum())
    if bad or not len(flat):
        raise ValueError(f"expected finite weights, at least one, got {len(flat)} "
                         f"of which {bad} are NaN or infinite")  # fmt: skip
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # rounds as bitsandbytes
    levels, order = code.to(flat.device).sort()
    index = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    index = order[index].reshape(-1)[: len(flat) + len(flat) % 2].to(torch.uint8)
    return (index[::2] << 4 | index[1::2])[:, None], absmax


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: tuple[int, ...],
    block: int = BLOCK,
) -> torch.Tensor:
    """The weights that packed indices and their scales stand for: `shape`, fp32.

    Source: QLoRA eq. 1 and 2, read from right to left.
    """
    index = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).int()
    size = torch.Size(shape).numel()
    values = code.to(packed.device)[index][:size]
    values = torch.nn.functional.pad(values, (0, -size % block)).view(-1, block)
    return (values * absmax[:, None]).reshape(-1)[:size].view(shape)


def dynamic_code() -> torch.Tensor:
    """The 256 levels of the 8-bit dynamic code, for scales: (256,), fp32, ascending.

    Seven decades, each with twice the levels of the one below, and 0 and 1. Source:
    Dettmers 2015, arXiv 1511.04561; bitsandbytes/functional.py, create_dynamic_map.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        levels += (10 ** (decade - 6) * middles).tolist()
        levels += (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(levels))


def quantize_scales(
    absmax: torch.Tensor, block: int = SCALE_BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: the scales themselves, less their mean, in 8 bits.

    `absmax` is (blocks,), fp32. Returns (index, scale, offset): (blocks,), uint8; one
    fp32 scale for `block` of them; and their mean, fp32. Source: QLoRA, section 3.
    """
    offset = absmax.mean()
    rows = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block))
    rows = rows.view(-1, block)
    scale = rows.abs().amax(dim=1)  # one for a block of scales
    scaled = rows * (1 / scale.clamp(min=1e-38))[:, None]  # from -1 to 1
    levels = dynamic_code().to(absmax.device)
    index = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return index.reshape(-1)[: len(absmax)].to(torch.uint8), scale, offset


def dequantize_scales(
    index: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    block: int = SCALE_BLOCK,
) -> torch.Tensor:
    """The scales that 8-bit indices stand for: (blocks,), fp32. Source: QLoRA eq. 6."""
    values = dynamic_code().to(index.device)[index.int()]
    rows = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    return (rows * scale[:, None]).reshape(-1)[: len(index)] + offset
