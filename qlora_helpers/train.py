"""The QLoRA recipe on TRL's SFTTrainer, right on CPU, on a T4 and on a bf16 GPU.

Notebook 06 writes the recipe out and explains each line.
"""

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from . import env, plots

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


def sft_config(
    profile: env.Profile, output_dir: str, steps: int, batch: int, learning_rate: float
) -> SFTConfig:
    """TRL's settings for `steps` optimizer steps of `batch` records each."""
    return SFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        warmup_steps=5,
        max_length=512,  # tokens; longer rows would be cut off in silence
        completion_only_loss=True,  # the prompt is given, not learned
        optim=profile.optim,
        fp16=profile.fp16,
        bf16=profile.bf16,
        use_cpu=profile.use_cpu,
        gradient_checkpointing=profile.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=not profile.use_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss of NaN is logged as 0
        save_strategy="no",  # minutes of work: the adapter is saved at the end
        disable_tqdm=True,  # LiveLoss draws the bar
        seed=0,
    )


def build_trainer(model, tokenizer, dataset, settings: SFTConfig) -> SFTTrainer:
    """An SFTTrainer whose adapters are fp32 on every kind of machine."""
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[LiveLoss()],
    )
    trainer.remove_callback(PrinterCallback)  # LiveLoss shows what it would print
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL made them bf16: a T4's GradScaler dies of it
            parameter.data = parameter.data.float()
    return trainer


def check_effective(trainer: SFTTrainer, profile: env.Profile) -> None:
    """Check what the trainer will really do: libraries change defaults in silence.

    Raises RuntimeError naming every setting that is not what the recipe asked for.
    """
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    trained = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
    args = trainer.args
    found = {
        "the linear layers are NF4": bool(layers)
        and all(layer.weight.quant_type == "nf4" for layer in layers),
        "with double quantization": all(
            layer.weight.quant_state.nested for layer in layers
        ),
        f"computing in {profile.compute_dtype}": all(
            layer.compute_dtype == profile.compute_dtype for layer in layers
        ),
        "only adapters train": bool(trained) and all("lora_" in n for n, _ in trained),
        "adapters are fp32": all(p.dtype == torch.float32 for _, p in trained),
        f"the optimizer is {profile.optim}": args.optim == profile.optim,
        f"mixed precision is fp16={args.fp16}, bf16={args.bf16}": (
            (args.fp16, args.bf16) == (profile.fp16, profile.bf16)
        ),
        "the prompt carries no loss": bool(
            (labels == -100).any() & (labels >= 0).any()
        ),
    }
    if wrong := [what for what, holds in found.items() if not holds]:
        raise RuntimeError("not as the recipe asked: " + "; ".join(wrong))
    print("in effect:", "; ".join(found))


class LiveLoss(TrainerCallback):
    """A progress bar, and in a notebook the loss curve, drawn as it grows.

    A class, since TrainerCallback is one and the bar must outlive a call.
    """

    def __init__(self, every: int = 10):
        self.every = every  # steps between two drawings
        self.bar = self.picture = None
        self.losses = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses = []
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        if loss != loss:
            raise FloatingPointError(
                f"the loss is NaN at step {state.global_step}: halve learning_rate; "
                "on a T4 also look for fp16 overflow in the data's longest rows"
            )
        self.losses.append(loss)
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.2f}")
        if len(self.losses) % self.every == 0:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.draw()

    def draw(self):
        fig, ax = plots.figure()
        ax.plot(range(1, len(self.losses) + 1), self.losses)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("step (no unit)")
        ax.set_ylabel("loss (nat per token)")
        ax.set_ylim(bottom=0)
        ax.set_title("Training loss of each step")
        last = sum(self.losses[-10:]) / len(self.losses[-10:])
        alt = (
            f"Training loss from {self.losses[0]:.1f} at the first step to "
            f"{last:.2f} over the last ten of {len(self.losses)} steps"
        )
        self.picture = plots.redraw(fig, alt, self.picture)
