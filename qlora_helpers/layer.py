"""The QLoRA layer: a frozen 4-bit weight, forward and backward, and an adapter on it.

Notebook 03 writes it out and explains each line. Tests hold it equal to bitsandbytes'
Linear4bit with PEFT's adapter.
"""

import torch

from qlora_helpers import nf4


class FrozenProduct(torch.autograd.Function):
    """x @ W.T for a W that is dequantized anew for each of the two passes.

    Between them no weight of 16 or 32 bits is held. Source: QLoRA eq. 5;
    bitsandbytes/autograd/_functions.py, MatMul4Bit.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer  # 4 bits a weight
        return x @ layer.weight(x.dtype).T  # (..., in) @ (in, out)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.weight(grad.dtype), None  # (..., out) @ (out, in)


class QLoRALinear(torch.nn.Module):
    """A linear layer without bias: NF4 with double quantization, and a LoRA adapter.

    `weight` is (out, in); `dtype` is the compute dtype of the frozen product. Maps
    (..., in) to (..., out) in the dtype of its input. A, (r, in), and B, (out, r), are
    fp32 parameters; all else are buffers, which no optimizer sees.

    Raises ValueError for weights that are NaN or infinite. Source: QLoRA eq. 5 and 6.
    """

    def __init__(self, weight, r, alpha, dtype):
        super().__init__()
        packed, absmax = nf4.quantize(weight, nf4.nf4_code())
        index, scale, offset = nf4.quantize_scales(absmax)
        stored = {"packed": packed, "index": index, "scale": scale, "offset": offset}
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.shape, self.dtype, self.scaling = weight.shape, dtype, alpha / r
        out, width = weight.shape
        self.A = torch.nn.Parameter(torch.empty(r, width, device=weight.device))
        self.B = torch.nn.Parameter(torch.zeros(out, r, device=weight.device))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5)  # as PEFT does

    def weight(self, dtype):
        """W as it is stored: (out, in), in `dtype`."""
        scales = nf4.dequantize_scales(self.index, self.scale, self.offset)
        weight = nf4.dequantize(self.packed, scales, nf4.nf4_code(), self.shape)
        return weight.to(dtype)

    def forward(self, x):
        frozen = FrozenProduct.apply(x.to(self.dtype), self).to(x.dtype)
        adapter = x.to(self.A.dtype) @ self.A.T @ self.B.T * self.scaling
        return frozen + adapter.to(x.dtype)
