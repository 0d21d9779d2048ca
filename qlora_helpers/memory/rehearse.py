"""Rehearse a training step on tensors without data: its bytes, for any size, on a CPU.

torch's fake tensors have shapes, dtypes and storages, and no memory behind them. Model,
PEFT, TRL's loss and autograd are the real ones. The trainer, the optimizer, a padding
mask and what happens inside of a GPU's kernel are not rehearsed.
"""

import contextlib
import gc
from unittest import mock

import torch
import transformers.integrations.sdpa_attention as sdpa_attention
import transformers.models.llama.modeling_llama as modeling_llama
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

from qlora_helpers import models
from qlora_helpers.memory.measuring import Ledger
from qlora_helpers.memory.planned_run import FUSED_LOSS, read
from qlora_helpers.models.load import never_repack
from qlora_helpers.nf4 import BLOCK, SCALE_BLOCK

if FUSED_LOSS:
    import trl.kernels.chunked_logprob as head
    from trl.trainer.utils import add_fused_lm_head


def step(model_config, bnb_config=None, lora_config=None, sft_config=None, extras=None):
    """Rehearse one forward and backward pass; takes what memory.predict takes.

    Returns bytes: {"weights": base model and adapters, "kept": what the forward pass
    leaves for the backward pass, "peak": the most held, weights included, "gradients":
    what is left at the end}. Neither the optimizer nor CUDA's workspaces are in it.
    """
    plan = read(model_config, bnb_config, lora_config, sft_config, extras)
    dtype = torch.float32 if plan.compute == 4 else torch.bfloat16  # fp16 takes as much
    model = _skeleton(plan, bnb_config, lora_config, dtype)
    inner = model.get_base_model() if lora_config else model
    layers = inner.model.layers
    again = -(-len(layers) // plan.every) if plan.every else 0  # in the backward pass
    bar = tqdm(total=len(layers) + again, desc="rehearsal", unit="layer", leave=False)
    for layer in layers:
        layer.register_forward_hook(lambda *_: bar.update() and None)
    ledger, fake = Ledger(plan.round_up), FakeTensorMode(allow_non_fake_inputs=True)
    with bar, fake, ledger, _as_planned(plan):
        _fill(model, inner, bnb_config)
        weights = ledger.now
        model.train()
        if plan.every:
            more = {"every_n_layers": plan.every} if plan.every > 1 else {}
            enable = getattr(inner, "activation_checkpointing_enable", None)
            enable = enable or inner.gradient_checkpointing_enable  # its older name
            enable({"use_reentrant": False}, **more)
            inner.enable_input_require_grads()
        ids = torch.zeros(plan.rows, plan.length, dtype=torch.long)
        fused = {} if plan.full_logits else {"fused_lm_head": True}
        ledger.peak = ledger.now
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **fused).loss
        kept = ledger.now - weights
        loss.backward()
        peak = ledger.peak
        del loss, ids
        gc.collect()
        gradients = ledger.now - weights
    return {"weights": weights, "kept": kept, "peak": peak, "gradients": gradients}


@contextlib.contextmanager
def _as_planned(plan):
    """Let the libraries do what they would do on the planned device.

    Fake CUDA tensors cannot be used, because Triton and autograd then ask for a driver.
    """
    stand_ins = [
        # The model reads the mask, and fake tensors have no data: rows are full.
        (modeling_llama, "create_causal_mask", lambda *_, **__: None),
        (sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: not plan.repeat_kv),
    ]
    if plan.on_gpu and FUSED_LOSS:
        # TRL's Triton kernels work in place; what it has for a CPU does not.
        in_place = ("_forward_tile", "_backward_tile", "_addmm_fp32")
        stand_ins += [(head, name, lambda *_, **__: None) for name in in_place]
    before = torch.is_autocast_enabled("cuda")
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        if plan.on_gpu:  # PEFT asks for CUDA's autocast, and casts where it is off
            torch.set_autocast_enabled("cuda", plan.compute < 4)
            stack.callback(torch.set_autocast_enabled, "cuda", before)
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
    model = get_peft_model(model, lora_config, low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name or plan.kbit_casts:
            parameter.data = parameter.data.float()
    return model


def _fill(model, inner, bnb_config):
    """Put fake tensors where the skeleton has meta ones."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight = _fake_4bit(module.weight.shape, bnb_config)
            del module.weight  # a fake tensor is no Params4bit
            vars(module)["weight"] = weight
    model.to_empty(device="cpu")
    inner.tie_weights()
    never_repack(model)


def _fake_4bit(shape, bnb_config):
    """A packed weight with its scales, as bitsandbytes has them."""
    blocks = -(-shape.numel() // BLOCK)
    state = QuantState(
        torch.empty(blocks),
        shape=shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=bnb_config.bnb_4bit_quant_type,
        dtype=bnb_config.bnb_4bit_compute_dtype,
    )
    if bnb_config.bnb_4bit_use_double_quant:
        state.nested, state.offset = True, torch.empty(())
        state.absmax = torch.empty(blocks, dtype=torch.uint8)
        scales, code = torch.empty(-(-blocks // SCALE_BLOCK)), torch.empty(256)
        state.state2 = QuantState(
            scales, code=code, blocksize=SCALE_BLOCK, dtype=torch.float32
        )
    weight = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)
    weight.quant_state = state
    return weight
