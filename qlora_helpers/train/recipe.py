"""The QLoRA recipe on TRL's SFTTrainer, which notebook 06 explains line by line."""

import copy

from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PrinterCallback
from trl import SFTConfig, SFTTrainer

from qlora_helpers import env, records
from qlora_helpers.memory.planned_run import FULL_OPTIMIZER, check_method
from qlora_helpers.models.shapes import PROJECTIONS
from qlora_helpers.train.live_loss import LiveLoss


def nf4_config(profile: env.Profile) -> BitsAndBytesConfig:
    """NF4 with double quantization. Source: QLoRA (Dettmers et al. 2023), section 3."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # the default is "fp4"
        bnb_4bit_use_double_quant=True,  # the default is False
        bnb_4bit_compute_dtype=profile.compute_dtype,  # the default is float32
    )


def lora_config(r: int = 16, alpha: int = 32) -> LoraConfig:
    """Adapters of rank r on all seven projections, scaled by alpha / r."""
    return LoraConfig(
        r=r, lora_alpha=alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )


# transformers 5.23 renamed this. If both names are set, the new one wins silently.
CHECKPOINTING = "activation_checkpointing"


def sft_config(
    profile: env.Profile,
    output_dir: str,
    steps: int,
    batch: int,
    learning_rate: float,
    max_length: int = records.MAX_LENGTH,
) -> SFTConfig:
    """TRL's settings for `steps` optimizer steps of `batch` records each.

    `max_length`: the most tokens of a record. Raises what `check_numbers` raises.
    """
    check_numbers(steps, batch, learning_rate)
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        warmup_steps=min(5, steps // 2),
        eval_steps=max(1, steps // 4),  # how often the validation loss is computed
        max_length=max_length,  # tokens; TRL would cut off longer rows silently
        completion_only_loss=True,  # the prompt is given, not learned
        optim=profile.optim,
        fp16=profile.fp16,
        bf16=profile.bf16,
        use_cpu=profile.use_cpu,
        dataloader_pin_memory=not profile.use_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss of NaN is logged as 0
        save_strategy="no",  # the adapter is saved once, after the run
        disable_tqdm=True,  # LiveLoss draws the bar
        seed=0,
        **{CHECKPOINTING: profile.checkpointing},
        **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )


def check_numbers(steps, batch, learning_rate) -> None:
    """Raise ValueError for steps or batch below 1, or a rate that is not in (0, 1)."""
    env.check_whole("steps", steps)
    env.check_whole("batch", batch)
    number = isinstance(learning_rate, int | float) and learning_rate is not True
    if not number or not 0 < learning_rate < 1:
        raise ValueError(
            f"learning_rate is {learning_rate!r}: give a number above 0 and below 1, "
            "such as 2e-4"
        )


def build_trainer(
    model, tokenizer, dataset, settings: SFTConfig, validation=None
) -> SFTTrainer:
    """An SFTTrainer whose adapters are fp32. Raises what `check_given` raises.

    With a second dataset, `validation`, the trainer computes the loss on it after every
    `settings.eval_steps` steps.
    """
    check_given(dataset, settings)
    if validation is not None:
        check_given(validation, settings)
        settings.eval_strategy = "steps"
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[LiveLoss()],
    )
    trainer.given, trainer.given_validation = dataset, validation  # for check_effective
    trainer.remove_callback(PrinterCallback)  # LiveLoss shows what it would print
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL made them bf16: a T4's GradScaler dies of it
            parameter.data = parameter.data.float()
    return trainer


def check_given(dataset, settings: SFTConfig) -> None:
    """Raise RuntimeError for several GPUs and ValueError for rows TRL cannot read.

    Older versions of TRL would silently take a batch for each GPU.
    """
    if settings.max_length is not None:
        env.check_whole("max_length", settings.max_length)
    if settings.n_gpu > 1:
        raise RuntimeError(
            f"this process sees {settings.n_gpu} GPUs, but the recipe trains on one: "
            "restart the kernel and run the set-up cell first, or set "
            "CUDA_VISIBLE_DEVICES=0 before Python starts"
        )
    if not isinstance(dataset, Dataset):
        found = f"is {type(dataset).__name__}"
    elif not len(dataset):
        found = "is empty"
    else:
        columns = dataset.column_names
        if "input_ids" in columns or {"prompt", "completion"} <= set(columns):
            return
        found = f"has the columns {columns}"
    raise ValueError(
        f"the dataset {found}: give the prompts and completions that "
        "records.to_prompt_completion returns"
    )


def configs(config, method, batch, length, every=1, machine=None):
    """The recipe's four configs, as memory.predict takes them, for a plan.

    config: a LlamaConfig. method: one of planned_run.METHODS, else ValueError. batch:
    rows; length: their tokens. every: 1 checkpoints each layer, 2 every second one, 0
    none. machine: a Profile; by default that of a bf16 GPU.
    """
    check_method(method)
    machine = machine or env.profile_of("bf16")
    machine = machine._replace(checkpointing=every > 0)
    if method == "full":
        machine = machine._replace(optim=FULL_OPTIMIZER)
    settings = sft_config(machine, "never_written", 1, batch, 2e-4, length)
    if every > 1:  # SFTConfig keeps one dict under the old and the new name
        settings.activation_checkpointing_kwargs["every_n_layers"] = every
    config = copy.deepcopy(config)
    config.dtype = machine.compute_dtype
    # a model that was loaded in 4 bits has its own; the recipe's is used instead
    if isinstance(getattr(config, "quantization_config", None), BitsAndBytesConfig):
        del config.quantization_config
    quantization = nf4_config(machine) if method == "qlora" else None
    adapters = None if method == "full" else lora_config()
    return config, quantization, adapters, settings
