"""The QLoRA recipe on TRL's SFTTrainer, right on CPU, on a T4 and on a bf16 GPU.

Notebook 06 writes the recipe out and explains each line.
"""

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
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


# transformers 5.17 renamed it; where both names are set, the new one wins in silence.
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

    `max_length` is that of `records.to_prompt_completion`: the most tokens of a record.
    """
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch,
        warmup_steps=5,
        max_length=max_length,  # tokens; longer rows would be cut off in silence
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


def build_trainer(model, tokenizer, dataset, settings: SFTConfig) -> SFTTrainer:
    """An SFTTrainer whose adapters are fp32 on every kind of machine.

    Raises what `one_gpu` raises.
    """
    one_gpu(settings)
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[LiveLoss()],
    )
    trainer.given = dataset  # TRL leaves rows out: check_effective compares
    trainer.remove_callback(PrinterCallback)  # LiveLoss shows what it would print
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL made them bf16: a T4's GradScaler dies of it
            parameter.data = parameter.data.float()
    return trainer


def one_gpu(settings: SFTConfig) -> None:
    """Raise RuntimeError where this process sees several GPUs: TRL trains on one.

    Older TRLs would wrap the model, and take a batch for each GPU, without a word.
    """
    if settings.n_gpu > 1:
        raise RuntimeError(
            f"this process sees {settings.n_gpu} GPUs and the recipe trains on one: "
            "restart the kernel and run the set-up cell first, or set "
            "CUDA_VISIBLE_DEVICES=0 before Python starts"
        )


def check_effective(trainer: SFTTrainer, profile: env.Profile) -> None:
    """Check what the trainer will really do: libraries change defaults in silence.

    It looks at the model's own layers, at the optimizer that is built, at the
    accelerator and at the rows that TRL made, never at the arguments. Checkpointing is
    switched on only when training begins: it is checked then, before the first step.

    Raises RuntimeError naming every setting that is not what the recipe asked for.
    """
    model = trainer.model
    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        raise RuntimeError(
            "not as the recipe asked: the model is a PeftModel within a PeftModel, as "
            "after get_peft_model was called twice: load the base again, then call it "
            "once"
        )
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise RuntimeError(
            "not as the recipe asked: nothing trains, every parameter is frozen: load "
            "a saved adapter with load_adapter(..., trainable=True)"
        )
    check_rows(trainer)
    precision = "fp16" if profile.fp16 else "bf16" if profile.bf16 else "no"
    attention = "sdpa, keys and values repeated" if profile.fp16 else "sdpa"
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
    found = {
        "the linear layers are NF4": bool(layers)
        and all(layer.weight.quant_type == "nf4" for layer in layers),
        "with double quantization": all(
            layer.weight.quant_state.nested for layer in layers
        ),
        f"computing in {profile.compute_dtype}": all(
            layer.compute_dtype == profile.compute_dtype for layer in layers
        ),
        "only adapters train": all("lora_" in n for n, _ in trained),
        "adapters are fp32": all(p.dtype == torch.float32 for _, p in trained),
        f"the optimizer is {profile.optim}": optimizer_name(trainer.create_optimizer())
        == profile.optim,
        f"mixed precision is {precision}": trainer.accelerator.mixed_precision
        == precision,
        f"attention is {attention}": model.config._attn_implementation == "sdpa"
        and models.repeats_keys_and_values() == profile.fp16,
        "the prompt carries no loss": bool(
            (labels == -100).any() & (labels >= 0).any()
        ),
    }
    if wrong := [what for what, holds in found.items() if not holds]:
        raise RuntimeError("not as the recipe asked: " + "; ".join(wrong))
    trainer.remove_callback(AtStart)
    trainer.add_callback(AtStart(profile.checkpointing))
    print("in effect:", "; ".join(found))


def optimizer_name(optimizer) -> str:
    """The name by which TrainingArguments knows an optimizer that was built."""
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

    Raises RuntimeError where rows are cut or left out, where one does not teach the
    end token, or where a model is asked with other tokens than it was trained with.
    """
    given, rows = trainer.given, trainer.train_dataset
    limit, tokenizer = trainer.args.max_length, trainer.processing_class
    if "prompt" not in given.column_names:
        return  # tokens already: nothing to compare with
    if not len(rows):
        raise RuntimeError(
            f"no row is left to train on: all {len(given)} prompts are longer than "
            f"max_length={limit} tokens: raise max_length"
        )
    ends = trainer.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    teach = cut = 0
    for start in range(0, len(rows), 256):
        some = [rows[i] for i in range(start, min(start + 256, len(rows)))]
        labels = trainer.data_collator([dict(row) for row in some])["labels"]
        for row, given_loss in zip(some, labels, strict=True):
            last = given_loss[given_loss != -100][
                -3:
            ]  # a line break can follow the end
            ended = not ends.isdisjoint(last.tolist())
            teach += ended
            cut += not ended and len(row["input_ids"]) == limit
    left_out = len(given) - len(rows)
    print(
        f"rows: {len(rows):,} of {len(given):,} kept, {cut:,} cut at {limit} tokens, "
        f"{left_out:,} left out; {teach:,} teach the end token"
    )
    if cut or left_out:
        raise RuntimeError(
            f"{cut + left_out:,} of {len(given):,} rows are longer than "
            f"max_length={limit}, and what is cut off teaches to stop early: give "
            "to_prompt_completion and sft_config the same max_length"
        )
    if teach < len(rows):
        raise RuntimeError(
            f"{len(rows) - teach:,} of {len(rows):,} rows do not teach an end token "
            f"({sorted(ends - {None})}): set tokenizer.eos_token to the token at which "
            "an answer ends"
        )
    for i in range(min(8, len(rows))):
        labels = trainer.data_collator([dict(rows[i])])["labels"][0].tolist()
        answer = next(n for n, label in enumerate(labels) if label != -100)
        judged = records.context_ids(given[i]["prompt"], tokenizer)
        if rows[i]["input_ids"][:answer] != judged:
            raise RuntimeError(
                f"row {i} is trained after {answer} tokens of context and would be "
                f"asked after {len(judged)} others: its chat template writes another "
                "prompt for training than for an answer"
            )


class AtStart(TrainerCallback):
    """Checks, as training begins, what Trainer sets only then.

    A class, since TrainerCallback is one.
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
                f"checkpointed, and the recipe asked for {self.checkpointing}; give "
                f"{CHECKPOINTING} to SFTConfig, and do not set it later"
            )


class LiveLoss(TrainerCallback):
    """A progress bar, and in a notebook the loss curve, drawn as it grows.

    A class, since TrainerCallback is one and the bar must outlive a call.
    """

    def __init__(self, every: int = 10):
        self.every = every  # losses between two drawings
        self.bar = self.picture = None
        self.losses = []  # (step, loss), as they were logged

    def on_train_begin(self, args, state, control, **kwargs):
        if self.bar is not None:  # of a run that was interrupted
            self.bar.close()
        logged = [entry for entry in state.log_history if "loss" in entry]
        self.losses = [(entry["step"], entry["loss"]) for entry in logged]
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,  # above 0 where a run is resumed
            desc="training",
            unit="step",
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        if loss != loss:
            raise FloatingPointError(
                f"the loss is NaN at step {state.global_step}: halve learning_rate; "
                "on a T4 also look for fp16 overflow in the data's longest rows"
            )
        self.losses.append((state.global_step, loss))
        self.bar.set_postfix(loss=f"{loss:.2f}")
        if len(self.losses) % self.every == 0:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        if self.losses:  # none, where logging is off or rarer than the run is long
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
