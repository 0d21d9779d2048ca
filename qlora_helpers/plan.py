"""A training run as its configs describe it, read once, contradictions refused."""

import dataclasses
import warnings
from typing import NamedTuple

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from . import env, models
from .env import check_whole

# From 1.15 on TRL's loss never makes all logits at once; the formulas are of this one,
# with transformers 5.17 and PEFT 0.21 beside it.
FUSED_LOSS = env.version_tuple(env.versions(["trl"])["trl"]) >= (1, 15)

# bytes of each of Adam's two states for one number; None: in the tensor's own dtype
OPTIMIZERS = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_bnb_8bit": 1,
    "adamw_8bit": 1,
    "paged_adamw_8bit": 1,
    "paged_adamw_32bit": 4,
}

# Each setting of the four configs is counted by the formulas, or harmless (it changes
# no byte of a training step), or refused unless it has its default. Only names in these
# two tables pass, so a setting that a later library adds is refused too.
COUNTED = {
    LlamaConfig: """
        dtype vocab_size hidden_size intermediate_size num_hidden_layers head_dim
        num_attention_heads num_key_value_heads tie_word_embeddings
    """,
    BitsAndBytesConfig: "bnb_4bit_compute_dtype bnb_4bit_use_double_quant",
    LoraConfig: "r target_modules lora_dropout",
    SFTConfig: """
        per_device_train_batch_size max_length gradient_accumulation_steps optim bf16
        fp16 activation_checkpointing activation_checkpointing_kwargs
        gradient_checkpointing gradient_checkpointing_kwargs
    """,
}
HARMLESS = {
    LlamaConfig: """
        transformers_version architectures return_dict id2label label2id problem_type
        initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id
        pretraining_tp max_position_embeddings rope_parameters
    """,
    BitsAndBytesConfig: "bnb_4bit_quant_type llm_int8_threshold",
    LoraConfig: """
        auto_mapping peft_version base_model_name_or_path revision lora_alpha
        alpha_pattern use_rslora
    """,
    SFTConfig: """
        output_dir do_train num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2
        adam_epsilon max_grad_norm average_tokens_across_devices tf32 use_cpu seed
        data_seed torch_empty_cache_steps
        logging_strategy logging_steps logging_first_step log_on_each_node
        logging_nan_inf_filter include_num_input_tokens_seen log_level logging_dir
        log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id
        save_strategy save_steps save_on_each_node save_total_limit save_only_model
        enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
        hub_strategy hub_always_push hub_revision
        eval_steps eval_delay per_device_eval_batch_size eval_accumulation_steps
        prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_packing
        include_for_metrics batch_eval_metrics metric_for_best_model greater_is_better
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order
        dataloader_multiprocessing_context remove_unused_columns label_names
        train_sampling_strategy length_column_name ignore_data_skip
        restore_callback_states_from_checkpoint
        dataset_text_field dataset_num_proc eos_token pad_token shuffle_dataset
        truncation_mode packing_strategy completion_only_loss assistant_only_loss
    """,  # evaluation and packing are refused, so that their details change nothing
}
# Some settings have harmless values besides the default.
HARMLESS_VALUES = {
    "accelerator_config": (AcceleratorConfig(),),
    "_attn_implementation": ("sdpa",),
    "init_lora_weights": (False, "gaussian", "orthogonal"),
    "pad_to_multiple_of": (None,),  # what SFTConfig makes of "auto"
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}
# Whole numbers of a LlamaConfig that every formula starts from.
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads""".split()
# These settings of a LlamaConfig are not fields of its class.
ATTRIBUTES = {"output_attentions": False, "_attn_implementation": None}


class Extras(NamedTuple):
    """What changes a run's bytes and stands in none of the libraries' configs."""

    device: str = "cuda"  # where it will run, "cuda" or "cpu"
    full_logits: bool = False  # a loss on all logits at once; always so before TRL 1.15
    kbit_casts: bool = False  # prepare_model_for_kbit_training was called
    adapter_dtype: torch.dtype = torch.float32  # TRL left alone takes bf16
    # True: attention repeats keys and values that heads share. None: as the recipe
    # does, which repeats them in fp16, for GPUs without flash attention.
    repeat_kv: bool | None = None


class Plan(NamedTuple):
    """What the byte formulas of memory.py need to know of a run."""

    config: LlamaConfig
    four_bit: bool
    double: bool  # double quantization
    targets: tuple  # names of the projections with an adapter; (): all weights train
    r: int
    dropout: bool
    rows: int
    length: int  # tokens of a row
    every: int  # each how-manieth layer is checkpointed; 0: none
    compute: int  # bytes of a number in the compute dtype
    optim: str
    full_logits: bool
    repeat_kv: bool
    accumulates: bool  # gradients of several batches before a step
    extras: Extras


def read(model_config, bnb_config, lora_config, sft_config, extras) -> Plan:
    """The run that the configs describe.

    Raises TypeError or ValueError, naming the setting, for a setting that the formulas
    do not count.
    """
    extras = Extras() if extras is None else extras
    _check_extras(extras)
    if not FUSED_LOSS:
        warnings.warn(
            "the byte formulas are those of TRL 1.15 and later: this older one keeps "
            "more than they say",
            stacklevel=3,
        )
    config = model_config
    if isinstance(config, str):
        config = models.llama_config(config)
    if not isinstance(config, LlamaConfig):
        raise TypeError(
            f"model_config is {type(config).__name__}, expected a LlamaConfig or one "
            f"of the shapes {list(models.SHAPES)}: other architectures keep other bytes"
        )
    if sft_config is None:
        raise TypeError("sft_config is missing: batch and length come from it")
    _refuse_uncounted("model_config", config, LlamaConfig)
    _refuse_uncounted("bnb_config", bnb_config, BitsAndBytesConfig)
    _refuse_uncounted("lora_config", lora_config, LoraConfig)
    _refuse_uncounted("sft_config", sft_config, SFTConfig)
    loaded = getattr(config, "quantization_config", None)
    if loaded is not None and not _same(loaded, bnb_config):
        raise ValueError(
            "model_config.quantization_config is not the bnb_config: give the one that "
            "the model was loaded with as bnb_config"
        )
    for name in SIZES:
        check_whole(f"model_config.{name}", getattr(config, name))
    rows, length = sft_config.per_device_train_batch_size, sft_config.max_length
    check_whole("per_device_train_batch_size", rows)
    check_whole("max_length", length)
    check_whole("gradient_accumulation_steps", sft_config.gradient_accumulation_steps)
    mixed = torch.float16 if sft_config.fp16 else torch.float32
    mixed = torch.bfloat16 if sft_config.bf16 else mixed
    dtype = config.dtype or mixed
    if bnb_config is not None:
        if lora_config is None:
            raise ValueError(
                "4-bit weights cannot train: give a lora_config, or no bnb_config"
            )
        dtype = bnb_config.bnb_4bit_compute_dtype
        if config.dtype not in (None, dtype):
            raise ValueError(
                f"model_config.dtype is {config.dtype}, in which embedding, head and "
                f"norms would be, and bnb_4bit_compute_dtype is {dtype}: make them the "
                "same"
            )
    if mixed != dtype:
        raise ValueError(
            f"weights compute in {dtype} and sft_config trains in {mixed} "
            f"(bf16={sft_config.bf16}, fp16={sft_config.fp16}): make them the same"
        )
    if mixed == torch.float16 and lora_config is None:
        raise ValueError(
            "full fine-tuning of 16-bit weights does not work in fp16, because torch's "
            "GradScaler takes no fp16 gradients: give a lora_config, or train in bf16"
        )
    if extras.kbit_casts and bnb_config is None:
        raise ValueError("extras.kbit_casts is for 4-bit models: give a bnb_config")
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim {optim!r} is not predicted: {list(OPTIMIZERS)} are")
    every, targets = _checkpoints(sft_config), _targets(lora_config)
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bnb_config is not None and bnb_config.bnb_4bit_use_double_quant,
        targets=targets,
        r=lora_config.r if lora_config else 0,
        dropout=bool(lora_config and lora_config.lora_dropout),
        rows=rows,
        length=length,
        every=every,
        compute=dtype.itemsize,
        optim=optim,
        full_logits=extras.full_logits or not FUSED_LOSS,
        repeat_kv=sft_config.fp16 if extras.repeat_kv is None else extras.repeat_kv,
        accumulates=sft_config.gradient_accumulation_steps > 1,
        extras=extras,
    )


def _check_extras(extras) -> None:
    """Raise TypeError or ValueError, naming the field, unless all fields make sense."""
    if not isinstance(extras, Extras):
        raise TypeError(f"extras is {type(extras).__name__}: give an Extras or None")
    if extras.device not in ("cuda", "cpu"):
        raise ValueError(f"extras.device is {extras.device!r}, expected 'cuda', 'cpu'")
    dtype = extras.adapter_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"extras.adapter_dtype is {dtype!r}: give a floating torch.dtype"
        )
    for name in ("full_logits", "kbit_casts", "repeat_kv"):
        value = getattr(extras, name)
        if not isinstance(value, bool) and (name, value) != ("repeat_kv", None):
            other = ", False or None" if name == "repeat_kv" else " or False"
            raise ValueError(f"extras.{name} is {value!r}: give True{other}")


def _refuse_uncounted(name, config, kind) -> None:
    """Raise if `config` is not a `kind` or has a setting that no formula counts."""
    if config is None:
        return
    if not isinstance(config, kind):
        raise TypeError(
            f"{name} is {type(config).__name__}, expected {kind.__name__} or None"
        )
    known = COUNTED[kind].split() + HARMLESS[kind].split()
    for setting, default in _defaults(config).items():
        value = getattr(config, setting, default)
        unset = value == default or not (value or default)  # None, False, [] and ""
        if unset or setting in known or value in HARMLESS_VALUES.get(setting, ()):
            continue
        raise ValueError(
            f"{name}.{setting.lstrip('_')} is {getattr(value, 'value', value)!r}, and "
            f"its effect cannot be predicted: leave the setting at {default!r}"
        )


def _defaults(config) -> dict:
    """The library's default of each setting of a config."""
    if isinstance(config, BitsAndBytesConfig):  # not a dataclass
        return vars(type(config)(load_in_4bit=True))
    found = dict(ATTRIBUTES) if isinstance(config, LlamaConfig) else {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


def _same(loaded, bnb_config) -> bool:
    """True if a model was quantized with `bnb_config` when it was loaded."""
    both = isinstance(loaded, BitsAndBytesConfig), bnb_config is not None
    return all(both) and vars(loaded) == vars(bnb_config)


def _checkpoints(sft_config) -> int:
    """Each how-manieth layer is checkpointed; 0: none is."""
    found = {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(sft_config, name):  # the first is new in transformers 5.23
            chosen = bool(getattr(sft_config, name))
            details = getattr(sft_config, f"{name}_kwargs") if chosen else None
            found[name] = (chosen, dict(details or {}))
    if len({str(choice) for choice in found.values()}) > 1:
        raise ValueError(
            f"sft_config contradicts itself: {found}; one is an alias of the other, "
            "and only SFTConfig(...) copies it: give it there, do not set it later"
        )
    chosen, details = next(iter(found.values()))
    every = details.pop("every_n_layers", 1)
    check_whole("every_n_layers", every)
    if any(details.values()):
        raise ValueError(
            f"checkpointing with {details} cannot be predicted: give only "
            "use_reentrant=False and every_n_layers"
        )
    return every if chosen else 0


def _targets(lora_config) -> tuple:
    """The projections that get an adapter; its rank and dropout are checked."""
    if lora_config is None:
        return ()
    check_whole("lora_config.r", lora_config.r)
    dropout = lora_config.lora_dropout
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(
            f"lora_config.lora_dropout is {dropout!r}: give a share from 0 to below 1"
        )
    known = [*projections(models.llama_config("tiny"))]
    wanted = lora_config.target_modules
    wanted = known if wanted == "all-linear" else wanted
    if not wanted or isinstance(wanted, str) or set(wanted) - set(known):
        raise ValueError(
            f"target_modules is {wanted!r}, expected 'all-linear' or names of {known}"
        )
    return tuple(name for name in known if name in wanted)


def projections(config) -> dict[str, tuple[int, int]]:
    """The seven matrices of a layer: (outputs, inputs)."""
    h, f = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    return {
        "q_proj": (q, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, q),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }
