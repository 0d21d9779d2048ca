"""What a trainer will really do, checked: libraries change their defaults silently."""

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from qlora_helpers import env, models, records
from qlora_helpers.train.recipe import CHECKPOINTING


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
    masked = check_rows(trainer)
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
        "the prompt carries no loss": masked,
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


def check_rows(trainer: SFTTrainer) -> bool:
    """Print how many rows were kept, cut and left out, and how many teach the end.

    Returns True if the prompt carries no loss in any row. Raises RuntimeError if a row
    is cut, is left out or does not teach the end token, or if the prompt's tokens in
    training differ from those of a later question. Of rows that hold tokens already,
    which have no prompt, only the length and the loss are checked.
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
        return all(_begins_without_loss(labels) for _, labels in labelled_rows(trainer))
    if not len(rows):
        raise RuntimeError(
            f"no row is left to train on, because all {len(given)} prompts are longer "
            f"than max_length={limit} tokens: raise max_length"
        )
    ends = trainer.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    asked = tqdm(given["prompt"], desc="checking prompts", unit="row", delay=5)
    known = {tuple(records.context_ids(prompt, tokenizer)) for prompt in asked}
    teach = cut = longest = largest = 0
    masked, other_prompts = True, []  # the second: (row, tokens of its prompt)
    for i, (row, labels) in enumerate(labelled_rows(trainer)):
        ids = row["input_ids"]
        longest, largest = max(longest, len(ids)), max(largest, *ids)
        last = [label for label in labels if label != -100][-3:]  # then a line break
        ended = not ends.isdisjoint(last)
        teach += ended
        cut += not ended and len(ids) == limit
        masked = masked and _begins_without_loss(labels)
        answer = next((n for n, label in enumerate(labels) if label != -100), 0)
        if answer and tuple(ids[:answer]) not in known:  # 0: it is not masked
            other_prompts.append((i, answer))
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
    _check_sizes(trainer.model, longest, largest)
    if other_prompts:
        i, answer = other_prompts[0]
        raise RuntimeError(
            f"row {i} is trained with {answer} prompt tokens that no prompt has when "
            "it is asked: use a chat template that writes the same prompt with and "
            "without the answer"
        )
    return masked


def _check_sizes(model, longest: int, largest: int) -> None:
    """Raise RuntimeError for a row or a token that the model was not made for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise RuntimeError(
            f"the longest row has {longest:,} tokens, but the model was made for "
            f"{positions:,}: leave such rows out with a smaller max_length"
        )
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise RuntimeError(
            f"a row holds token {largest:,}, but the model has rows for {known:,} "
            "tokens: train without added tokens, or resize the model's embeddings"
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


def _begins_without_loss(labels) -> bool:
    return labels[0] == -100 and max(labels) >= 0


class AtStart(TrainerCallback):
    """Checks at the start of training what Trainer sets only then."""

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
