"""The QLoRA recipe on TRL's SFTTrainer, right on CPU, on a T4 and on a bf16 GPU.

Notebook 06 writes the recipe out and explains each line.
"""

import math

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer

from . import env, models, plots, records

PROJECTIONS = [  # every linear layer of a Llama block (QLoRA, section 4)
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


def nf4_config(profile: env.Profile) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in the machine's dtype.

    Source: QLoRA (Dettmers et al. 2023), section 3.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # the default is "fp4"
        bnb_4bit_use_double_quant=True,  # the default is False
        bnb_4bit_compute_dtype=profile.compute_dtype,  # the default is float32
    )


def lora_config(r: int = 16, alpha: int = 32) -> LoraConfig:
    """Adapters of rank r on all seven projections, scaled by alpha / r."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )


# transformers 5.23 renamed this. If both names are set, the new one wins silently.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(SFTConfig, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


def sft_config(
    profile: env.Profile,
    output_dir: str,
    steps: int,
    batch: int,
    learning_rate: float,
    max_length: int = records.MAX_LENGTH,
) -> SFTConfig:
    """TRL's settings for `steps` optimizer steps of `batch` records each.

    `max_length`: the most tokens of a record, as in `records.to_prompt_completion`.
    Raises what `check_numbers` raises.
    """
    check_numbers(steps, batch, learning_rate)
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch,
        warmup_steps=min(5, steps // 2),
        max_length=max_length,  # tokens; TRL would cut off longer rows silently
        completion_only_loss=True,  # the prompt is given, not learned
        optim=profile.optim,
        fp16=profile.fp16,
        bf16=profile.bf16,
        use_cpu=profile.use_cpu,
        dataloader_pin_memory=not profile.use_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss of NaN is logged as 0
        save_strategy="no",  # minutes of work: the adapter is saved at the end
        disable_tqdm=True,  # LiveLoss draws the bar
        seed=0,
        **{CHECKPOINTING: profile.checkpointing},
        **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )


def check_numbers(steps, batch, learning_rate) -> None:
    """Raise ValueError for steps or batch below 1, or a rate that is not above 0."""
    for name, value in {"steps": steps, "batch": batch}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} is {value!r}, expected a whole number of at least 1"
            )
    if not isinstance(learning_rate, int | float) or not learning_rate > 0:
        raise ValueError(
            f"learning_rate is {learning_rate!r}, expected a number above 0"
        )


def build_trainer(model, tokenizer, dataset, settings: SFTConfig) -> SFTTrainer:
    """An SFTTrainer whose adapters are fp32 on every kind of machine.

    Raises what `check_given` raises.
    """
    check_given(dataset, settings)
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[LiveLoss()],
    )
    trainer.given = dataset  # check_effective looks for rows that TRL left out
    trainer.remove_callback(PrinterCallback)  # LiveLoss shows what it would print
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL made them bf16: a T4's GradScaler dies of it
            parameter.data = parameter.data.float()
    return trainer


def check_given(dataset, settings: SFTConfig) -> None:
    """Check what a trainer is built from: one GPU, and rows that it can read.

    Raises RuntimeError if this process sees several GPUs (older versions of TRL would
    silently take a batch for each of them), and ValueError for other rows than those of
    `records.to_prompt_completion` or of tokens.
    """
    if settings.max_length is not None:
        env.check_whole("max_length", settings.max_length)
    if settings.n_gpu > 1:
        raise RuntimeError(
            f"this process sees {settings.n_gpu} GPUs, but the recipe trains on one: "
            "restart the kernel and run the set-up cell first, or set "
            "CUDA_VISIBLE_DEVICES=0 before Python starts"
        )
    if not isinstance(dataset, Dataset) or not len(dataset):
        kind = "empty" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(
            f"the dataset is {kind}: expected the rows that "
            "records.to_prompt_completion returns"
        )
    columns = dataset.column_names
    if "input_ids" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"the dataset has the columns {columns}, expected prompt and completion: "
            "call records.to_prompt_completion first"
        )


def check_effective(trainer: SFTTrainer, profile: env.Profile) -> None:
    """Check what the trainer will really do: libraries change defaults silently.

    This looks at the model's own layers, the optimizer, the accelerator and the rows
    that TRL made, never at the arguments. Trainer turns on checkpointing only when
    training starts, so that is checked then, before the first step.

    Raises RuntimeError naming every setting that is not what the recipe asked for.
    """
    model = trainer.model
    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        raise RuntimeError(
            "not as the recipe asked: the model is a PeftModel within a PeftModel, "
            "because get_peft_model was called twice: load the base again, and call "
            "get_peft_model once"
        )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise RuntimeError(
            "not as the recipe asked: the adapters are merged into the weights, so "
            "nothing can train: call model.unmerge_adapter() first"
        )
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    plain = [  # of the output head and of the adapters themselves none is 4-bit
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and "lora_" not in name
        and "lm_head" not in name
    ]
    # a mixture of experts stacks its matrices, and bitsandbytes skips such a stack
    plain += [n for n, p in model.named_parameters() if p.ndim > 2]
    tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(0 in getattr(module, "scaling", {}).values() for module in tuned):
        raise RuntimeError(
            "not as the recipe asked: alpha is 0, so the adapters change nothing: give "
            "lora_config a number above 0"
        )
    bare = len(layers) - sum(isinstance(m.get_base_layer(), Linear4bit) for m in tuned)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise RuntimeError(
            "not as the recipe asked: nothing can train, because every parameter is "
            "frozen; load a saved adapter with load_adapter(..., trainable=True)"
        )
    check_rows(trainer)
    precision = "fp16" if profile.fp16 else "bf16" if profile.bf16 else "no"
    attention = "sdpa, keys and values repeated" if profile.fp16 else "sdpa"
    optimizer = built_optimizer(trainer)
    found = {  # what the recipe asks for: whether it is so
        "the linear layers are NF4": bool(layers)
        and not plain
        and all(layer.weight.quant_type == "nf4" for layer in layers),
        "with double quantization": all(
            layer.weight.quant_state.nested for layer in layers
        ),
        f"computing in {profile.compute_dtype}": all(
            layer.compute_dtype == profile.compute_dtype for layer in layers
        ),
        "only adapters train": all("lora_" in n for n, _ in trained),
        "adapters are fp32": all(p.dtype == torch.float32 for _, p in trained),
        f"the optimizer is {profile.optim}": optimizer == profile.optim,
        f"mixed precision is {precision}": trainer.accelerator.mixed_precision
        == precision,
        f"attention is {attention}": model.config._attn_implementation == "sdpa"
        and models.repeats_keys_and_values() == profile.fp16,
        "the prompt carries no loss": prompts_are_masked(trainer),
    }
    if wrong := [what for what, holds in found.items() if not holds]:
        raise RuntimeError(
            f"not in effect, though the recipe asked for it: {'; '.join(wrong)} "
            f"(there are {len(layers)} 4-bit and {len(plain)} other linear layers, the "
            f"optimizer is {optimizer}, mixed precision is "
            f"{trainer.accelerator.mixed_precision}, attention is "
            f"{model.config._attn_implementation})"
        )
    trainer.remove_callback(AtStart)
    trainer.add_callback(AtStart(profile.checkpointing))
    print("in effect:", "; ".join(found))
    if bare:
        print(f"{bare} of {len(layers)} 4-bit layers have no adapter (target_modules)")


def built_optimizer(trainer: SFTTrainer) -> str:
    """The name of the optimizer that a trainer builds, or has built already."""
    given = trainer.optimizer
    optimizer = trainer.create_optimizer()
    trainer.optimizer = given  # or later changes of the settings would do nothing
    return optimizer_name(getattr(optimizer, "optimizer", optimizer))  # accelerate's


def optimizer_name(optimizer) -> str:
    """The name that TrainingArguments uses for the optimizer's kind."""
    kind = type(optimizer)
    if kind is torch.optim.AdamW:
        fused = optimizer.defaults.get("fused")
        return "adamw_torch_fused" if fused else "adamw_torch"
    if kind is bitsandbytes.optim.AdamW:
        paged = "paged_" if optimizer.is_paged else ""
        return f"{paged}adamw_{optimizer.args.optim_bits}bit"
    return kind.__name__


def check_rows(trainer: SFTTrainer) -> None:
    """Print how many rows were kept, cut and left out, and how many teach the end.

    Raises RuntimeError if a row is cut, is left out or does not teach the end token, or
    if the prompt's tokens in training differ from those of a later question. Rows that
    hold tokens already have no prompt: of them only the length is checked.
    """
    given, rows = getattr(trainer, "given", None), trainer.train_dataset
    limit, tokenizer = trainer.args.max_length, trainer.processing_class
    if given is None or trainer.args.packing:
        raise RuntimeError(
            "the rows cannot be checked: expected a trainer of build_trainer, and "
            "packing=False"
        )
    if "prompt" not in given.column_names:
        long = sum(len(ids) > limit for ids in given["input_ids"]) if limit else 0
        if long:
            raise RuntimeError(_too_long(long, len(given), limit))
        return
    if not len(rows):
        raise RuntimeError(
            f"no row is left to train on, because all {len(given)} prompts are longer "
            f"than max_length={limit} tokens: raise max_length"
        )
    ends = trainer.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    teach = cut = 0
    longest = largest = 0
    for row, labels in labelled_rows(trainer):
        longest = max(longest, len(row["input_ids"]))
        largest = max(largest, *row["input_ids"])
        last = [label for label in labels if label != -100][-3:]  # then a line break
        ended = not ends.isdisjoint(last)
        teach += ended
        cut += not ended and len(row["input_ids"]) == limit
    left_out = len(given) - len(rows)
    print(
        f"rows: {len(rows):,} of {len(given):,} kept, {cut:,} cut at {limit} tokens, "
        f"{left_out:,} left out; {teach:,} teach the end token"
    )
    if cut or left_out:
        raise RuntimeError(_too_long(cut + left_out, len(given), limit))
    if teach < len(rows):
        raise RuntimeError(
            f"{len(rows) - teach:,} of {len(rows):,} rows do not teach an end token "
            f"({sorted(ends - {None})}): set tokenizer.eos_token to the token at which "
            "an answer ends"
        )
    positions = getattr(trainer.model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise RuntimeError(
            f"the longest row has {longest:,} tokens, but the model was made for "
            f"{positions:,}: leave such rows out with a smaller max_length"
        )
    known = trainer.model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise RuntimeError(
            f"a row holds token {largest:,}, but the model has rows for {known:,} "
            "tokens: train without added tokens, or resize the model's embeddings"
        )
    asked = tqdm(given["prompt"], desc="checking prompts", unit="row", delay=5)
    judged = {tuple(records.context_ids(prompt, tokenizer)) for prompt in asked}
    for i, (row, labels) in enumerate(labelled_rows(trainer)):
        answer = next((n for n, label in enumerate(labels) if label != -100), 0)
        # without a prompt in front, prompts_are_masked says what is wrong
        if answer and tuple(row["input_ids"][:answer]) not in judged:
            raise RuntimeError(
                f"row {i} is trained with {answer} prompt tokens that no prompt has "
                "when it is asked: use a chat template that writes the same prompt "
                "with and without the answer"
            )


def _too_long(count: int, of: int, limit: int) -> str:
    return (
        f"{count:,} of {of:,} rows are longer than max_length={limit}, and rows that "
        "are cut teach the model to stop early: give to_prompt_completion and "
        "sft_config the same max_length"
    )


def labelled_rows(trainer: SFTTrainer):
    """Yield each row that TRL made, and the labels that the collator gives it."""
    rows = trainer.train_dataset
    for start in range(0, len(rows), 256):
        some = [rows[i] for i in range(start, min(start + 256, len(rows)))]
        batch = trainer.data_collator([dict(row) for row in some])
        for row, labels in zip(some, batch["labels"].tolist(), strict=True):
            yield row, labels[: len(row["input_ids"])]  # the rest is padding


def prompts_are_masked(trainer: SFTTrainer) -> bool:
    """True if every row begins without loss, and ends with it."""
    labels = (labels for _, labels in labelled_rows(trainer))
    return all(row[0] == -100 and max(row) >= 0 for row in labels)


class AtStart(TrainerCallback):
    """Checks at the start of training what Trainer sets only then.

    This is a class because Trainer takes its callbacks as TrainerCallback objects.
    """

    def __init__(self, checkpointing: bool):
        self.checkpointing = checkpointing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layers = [
            m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        on = sum(layer.gradient_checkpointing for layer in layers)
        if on != self.checkpointing * len(layers):
            raise RuntimeError(
                f"not as the recipe asked: {on} of {len(layers)} layers are "
                f"checkpointed, expected {'all' if self.checkpointing else 'none'} of "
                f"them; give {CHECKPOINTING} to SFTConfig, and do not set it later"
            )


class LiveLoss(TrainerCallback):
    """A progress bar, and in a notebook the loss curve, drawn as it grows.

    A class, since TrainerCallback is one and the bar must outlive a call.
    """

    def __init__(self, every: int = 10):
        self.every = every  # losses between two drawings
        self.bar = self.picture = None
        self.losses = []  # the logged pairs (step, loss)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.bar is not None:  # the bar of an interrupted run
            self.bar.close()
        logged = [entry for entry in state.log_history if "loss" in entry]
        self.losses = [(entry["step"], entry["loss"]) for entry in logged]
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,  # above 0 if a run is resumed
            desc="training",
            unit="step",
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}: halve learning_rate; "
                "on a T4 also look for fp16 overflow in the data's longest rows"
            )
        self.losses.append((state.global_step, loss))
        self.bar.set_postfix(loss=f"{loss:.2f}")
        if len(self.losses) % self.every == 0:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        if not state.global_step:
            raise RuntimeError(
                "training ended without a step: there are fewer rows than one batch, "
                "and dataloader_drop_last leaves that batch out"
            )
        if self.losses:  # empty if logging is off or its interval exceeds the run
            self.draw()

    def draw(self):
        steps, losses = zip(*self.losses, strict=True)
        each = steps == tuple(range(1, steps[-1] + 1))
        fig, ax = plots.figure()
        ax.plot(steps, losses, marker="" if each and losses[1:] else "o")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("step (no unit)")
        ax.set_ylabel("loss (nat per token)")
        ax.set_ylim(bottom=0)
        since = "of each step" if each else "averaged since the point before"
        ax.set_title(f"Training loss {since}")
        last = sum(losses[-10:]) / len(losses[-10:])
        first = "the first step" if steps[0] == 1 else f"step {steps[0]}"
        count = f"{len(losses)} {'steps' if each else 'points'}"
        alt = (
            f"Training loss from {losses[0]:.1f} at {first} to "
            f"{last:.2f} over the last ten of {count}"
        )
        self.picture = plots.redraw(fig, alt, self.picture)
