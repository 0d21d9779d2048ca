"""Load a base model and its tokenizer, or make a Llama with random weights."""

import copy

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.integrations import sdpa_attention
from transformers.quantizers import AutoHfQuantizer

from qlora_helpers import env
from qlora_helpers.model_files import has_tokenizer, weight_files
from qlora_helpers.models.shapes import llama_config
from qlora_helpers.models.sources import EMBEDDED, base_folder
from qlora_helpers.models.template import give_template


def load_base(name=EMBEDDED, quantization=None, dtype=None, revision=None):
    """A base model, in eval mode on the profile's device, and its tokenizer.

    name, revision: as in base_folder. quantization: a BitsAndBytesConfig or None.
    dtype: of what is not quantized; by default the compute dtype of the 4-bit config,
    else the profile's. The tokenizer has a pad token, and a chat template: that of
    `give_template` where the base brings none.

    Raises what base_folder does, and FileNotFoundError or ValueError for a base that is
    damaged or not complete.
    """
    machine = env.profile()
    if dtype is None:
        dtype = _dtype(quantization, machine)
    folder = base_folder(name, revision)
    weight_files(folder)  # raises, with the name, if a file is damaged or missing
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer: save it there too")
    # passed on as None it would hide that a checkpoint is quantized already
    given = {} if quantization is None else {"quantization_config": quantization}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=dtype,
        device_map={"": str(machine.device)},  # else bitsandbytes prefers a GPU
        attn_implementation="sdpa",
        use_safetensors=True,  # never a pickle
        trust_remote_code=False,
        **given,
    )
    if missing := sorted(loading["missing_keys"]):  # transformers made them up
        raise ValueError(f"{name} lacks {missing[0]}, which it needs: copy it again")
    if tokenizer.pad_token is None:
        # Llama 3.x keeps a token for this. Elsewhere the end token does, because the
        # attention mask hides it where it pads.
        kept = "<|finetune_right_pad_id|>"
        has_one = kept in tokenizer.get_vocab()
        tokenizer.pad_token = kept if has_one else tokenizer.eos_token
    if tokenizer.eos_token and give_template(tokenizer):
        print(f"{name} has no chat template: it gets the layout ### Instruction:")
    for config in (model.config, model.generation_config):
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    _finish(model, machine)
    return model, tokenizer


def _dtype(quantization, machine) -> torch.dtype:
    if quantization is not None and quantization.load_in_4bit:
        return quantization.bnb_4bit_compute_dtype
    return machine.compute_dtype


def never_repack(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval-mode forward.

    CPUs with AVX512-BF16 do so in place, and after that gradients, merges, saving and
    dequantize() misread the weights. Source: bitsandbytes, Linear4bit.forward.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


SHARED_KEYS = sdpa_attention.use_gqa_in_sdpa  # transformers' own choice


def choose_attention(machine) -> None:
    """Let a GPU without flash attention (the fp16 profile) repeat keys and values.

    Where heads share them, such a GPU otherwise uses torch's math kernel, which keeps
    every score: an 8B with one row of 4,096 tokens takes 14.9 GiB instead of 7.6
    (data/measured/attention.json). The choice holds for the whole process. Source:
    transformers/integrations/sdpa_attention.py.
    """
    if machine.fp16:
        sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False
    else:
        sdpa_attention.use_gqa_in_sdpa = SHARED_KEYS


def repeats_keys_and_values() -> bool:
    """True if attention repeats keys and values that heads share, mask or not."""
    key = torch.empty(1, 1, 1, 64)
    return not sdpa_attention.use_gqa_in_sdpa(None, key, key)


def _finish(model, machine) -> None:
    """Keep a model away from what the libraries do badly."""
    never_repack(model)
    choose_attention(machine)

    def contiguous(head, inputs):
        return (inputs[0].contiguous(), *inputs[1:])

    # generate() asks only for the last token's logits. From such a slice torch's matmul
    # makes a batched product, for which oneDNN copies the frozen head once a row: 2.6
    # GiB and seconds for 50 questions in bf16. Seen with torch 2.11 on a Xeon.
    model.get_output_embeddings().register_forward_pre_hook(contiguous)


def skeleton(config, quantization, dtype):
    """A model on torch's meta device, with shapes and dtypes only, and its quantizer.

    With `quantization` its linear layers are bitsandbytes'; when they have weights,
    call the quantizer's `postprocess_model`. Without it the quantizer is None.
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
    """A Llama with random weights, in eval mode on the profile's device.

    shape: a name of SHAPES or a LlamaConfig. quantization: a 4-bit BitsAndBytesConfig
    or None. The whole unquantized model is never held. Raises ValueError for another
    quantization or name.
    """
    if quantization is not None and not quantization.load_in_4bit:
        raise ValueError("random_llama builds 4-bit or unquantized: got another config")
    machine = env.profile()
    config = shape if isinstance(shape, LlamaConfig) else llama_config(shape)
    dtype = _dtype(quantization, machine)
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
    _finish(model, machine)
    return model.eval()


def nested(model) -> str:
    """Why a model that got adapters twice is refused; "" for any other model."""
    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        return (
            "the model is a PeftModel within a PeftModel: load the base again, and "
            "call get_peft_model once"
        )
    return ""
