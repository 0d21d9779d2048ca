"""Llamas without weights, and with random ones."""

import copy

import torch
from bitsandbytes.nn import Params4bit
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.quantizers import AutoHfQuantizer

from qlora_helpers import env
from qlora_helpers.models.load import choose_attention, never_repack, pack_last_token
from qlora_helpers.models.shapes import llama_config


def skeleton(config, quantization, dtype):
    """A model on torch's meta device, shapes and dtypes alone, and its quantizer.

    With `quantization` (or None) its linear layers are bitsandbytes' already; when they
    have their weights, `postprocess_model` of the quantizer is to be called.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    # The quantizer's own hooks, so that PEFT and TRL find what from_pretrained leaves.
    # Source: transformers/modeling_utils.py, from_pretrained.
    quantizer = None
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    return model, quantizer


def random_llama(shape, quantization=None, seed=0):
    """A Llama with random weights, for measuring speed and memory: it says nothing.

    shape: a name of SHAPES or a LlamaConfig. Each 16-bit weight is made and quantized
    before the next one is made, so that the whole 16-bit model is never held. Without
    `quantization` (a 4-bit BitsAndBytesConfig) all weights stay 16-bit (fp32 where the
    CPU's profile says so). Returns the model, in eval mode on the profile's device.
    """
    if quantization is not None and not quantization.load_in_4bit:
        raise ValueError("random_llama builds 4-bit or unquantized: got another config")
    machine = env.profile()
    config = shape if isinstance(shape, LlamaConfig) else llama_config(shape)
    dtype = machine.compute_dtype
    if quantization is not None:
        dtype = quantization.bnb_4bit_compute_dtype
    model, quantizer = skeleton(config, quantization, dtype)
    generator = torch.Generator(machine.device).manual_seed(seed)
    parameters = dict(model.named_parameters())  # a tied weight once
    for name, old in tqdm(parameters.items(), desc="random weights", delay=5):
        weight = torch.empty(old.shape, dtype=dtype, device=machine.device)
        if old.ndim == 2:
            weight.normal_(0, config.initializer_range, generator=generator)
        else:
            weight.fill_(0 if name.endswith("bias") else 1)  # else a norm
        if isinstance(old, Params4bit):  # .to() is what quantizes, on CPU too
            new = Params4bit(weight, requires_grad=False, **old.__dict__)
            new = new.to(machine.device)
        else:
            new = torch.nn.Parameter(weight)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.tie_weights()
    rotary = model.model.rotary_emb  # its fp32 buffers were made on meta
    model.model.rotary_emb = type(rotary)(model.config).to(machine.device)
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    never_repack(model)
    choose_attention(machine)
    pack_last_token(model)
    return model.eval()
