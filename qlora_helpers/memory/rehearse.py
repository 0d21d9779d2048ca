"""Rehearse a training step on tensors without data: its bytes, for any size, on a CPU.

torch's fake tensors have shapes, dtypes and storages, and no memory behind them. Model,
PEFT, TRL's loss and autograd are the real ones, so that what is counted is what they
allocate. Not rehearsed are the trainer, the optimizer, a padding mask, and what happens
inside of a GPU's kernel.
"""

import contextlib
import gc
from unittest import mock

import torch
import transformers.integrations.sdpa_attention as sdpa_attention
import transformers.models.llama.modeling_llama as modeling_llama
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

from qlora_helpers import models
from qlora_helpers.memory import byte_formulas
from qlora_helpers.memory.measuring import Ledger
from qlora_helpers.memory.planned_run import FUSED_LOSS, read
from qlora_helpers.models.load import never_repack

if FUSED_LOSS:
    import trl.kernels.chunked_logprob as head
    from trl.trainer.utils import add_fused_lm_head


def step(model_config, bnb_config=None, lora_config=None, sft_config=None, extras=None):
    """Rehearse one forward and backward pass, and count what memory.predict predicts.

    Takes what memory.predict takes. Returns bytes: {"weights": base model and adapters,
    "kept": what the forward pass leaves for the backward pass, "peak": the most held,
    weights included, "gradients": what is left at the end}. Neither the optimizer nor
    CUDA's workspaces are in it.
    """
    plan = read(model_config, bnb_config, lora_config, sft_config, extras)
    gpu, dtype = plan.extras.device == "cuda", byte_formulas.DTYPES[plan.compute]
    model = _skeleton(plan, bnb_config, lora_config, dtype)
    ledger = Ledger(byte_formulas.rounding(plan.extras.device))
    layers = (model.get_base_model() if lora_config else model).model.layers
    again = -(-len(layers) // plan.every) if plan.every else 0  # in the backward pass
    bar = tqdm(total=len(layers) + again, desc="rehearsal", unit="layer", leave=False)
    for layer in layers:
        layer.register_forward_hook(lambda *_: bar.update() and None)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with bar, fake, ledger, _as_on(gpu, dtype, plan.repeat_kv):
        _fill(model, plan, bnb_config)
        weights = ledger.now
        model.train()
        if plan.every:
            inner = model.get_base_model() if lora_config else model
            more = {"every_n_layers": plan.every} if plan.every > 1 else {}
            enable = getattr(inner, "activation_checkpointing_enable", None)
            enable = enable or inner.gradient_checkpointing_enable  # its older name
            enable({"use_reentrant": False}, **more)
            inner.enable_input_require_grads()
        ids = torch.zeros(plan.rows, plan.length, dtype=torch.long)
        fused = {} if plan.full_logits else {"fused_lm_head": True}
        ledger.peak = ledger.now
        mixed = dtype != torch.float32
        with torch.autocast("cpu", dtype=dtype, enabled=mixed):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **fused).loss
        kept = ledger.now - weights
        loss.backward()
        peak = ledger.peak
        del loss, ids
        gc.collect()
        gradients = ledger.now - weights
    return {"weights": weights, "kept": kept, "peak": peak, "gradients": gradients}


@contextlib.contextmanager
def _as_on(gpu, dtype, repeat_kv):
    """Take a GPU's path where libraries would see that the tensors are a CPU's."""
    with contextlib.ExitStack() as stack:
        # The mask is looked at, and fake tensors have no data: rows are full.
        no_mask = mock.patch.object(
            modeling_llama, "create_causal_mask", lambda *_, **__: None
        )
        stack.enter_context(no_mask)
        shares_kv = mock.patch.object(
            sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: not repeat_kv
        )
        stack.enter_context(shares_kv)
        if gpu:
            # TRL's Triton kernels work in place; their stand-ins for a CPU do not.
            inside = ("_forward_tile", "_backward_tile", "_addmm_fp32")
            for name in inside if FUSED_LOSS else ():
                stack.enter_context(mock.patch.object(head, name, lambda *_, **__: 0))
            # PEFT asks for CUDA's autocast alone, and casts where it is off.
            before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            torch.set_autocast_enabled("cuda", dtype != torch.float32)
            torch.set_autocast_dtype("cuda", dtype)
            stack.callback(torch.set_autocast_dtype, "cuda", before[1])
            stack.callback(torch.set_autocast_enabled, "cuda", before[0])
        yield


def _skeleton(plan, bnb_config, lora_config, dtype):
    """The model with its adapters, on torch's meta device."""
    model, quantizer = models.skeleton(plan.config, bnb_config, dtype)
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    if FUSED_LOSS:
        add_fused_lm_head(model)
    if lora_config is None:
        return model.requires_grad_(True)
    return get_peft_model(model, lora_config, low_cpu_mem_usage=True)


def _fill(model, plan, bnb_config):
    """Put fake tensors where the skeleton has meta ones."""
    made = {}  # tied weights once
    for path, module in model.named_modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if isinstance(old, Params4bit):
                shape = (module.out_features, module.in_features)
                del module._parameters[name]  # a fake tensor is no Params4bit
                weight = _fake_4bit(shape, bnb_config)
                object.__setattr__(module, name, weight)
                module.quant_state = weight.quant_state
                continue
            if id(old) not in made:
                dtype = old.dtype
                if "lora_" in path:
                    dtype = plan.extras.adapter_dtype
                elif plan.extras.kbit_casts:
                    dtype = torch.float32
                made[id(old)] = torch.nn.Parameter(
                    torch.empty(old.shape, dtype=dtype), old.requires_grad
                )
            module._parameters[name] = made[id(old)]
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    never_repack(model)


def _fake_4bit(shape, bnb_config):
    """A packed weight with its scales, as bitsandbytes has them."""

    def empty(count, dtype=torch.float32):
        return torch.empty(count, dtype=dtype)

    size = shape[0] * shape[1]
    blocks = -(-size // byte_formulas.BLOCK)
    known = {
        "shape": torch.Size(shape),
        "code": empty(16),
        "blocksize": byte_formulas.BLOCK,
        "quant_type": bnb_config.bnb_4bit_quant_type,
        "dtype": bnb_config.bnb_4bit_compute_dtype,
    }
    if bnb_config.bnb_4bit_use_double_quant:
        second = QuantState(
            absmax=empty(-(-blocks // byte_formulas.SCALE_BLOCK)),
            code=empty(256),
            blocksize=byte_formulas.SCALE_BLOCK,
            dtype=torch.float32,
        )
        scales = empty(blocks, torch.uint8)
        state = QuantState(scales, offset=empty(()), state2=second, **known)
    else:
        state = QuantState(empty(blocks), **known)
    weight = empty((-(-size // 2), 1), torch.uint8)
    weight.quant_state = state
    return weight
