"""What a trainer will really do, checked: libraries change their defaults silently."""

import math
from collections import Counter

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from qlora_helpers import env, models, records
from qlora_helpers.models.load import nested
from qlora_helpers.score.generate import end_tokens
from qlora_helpers.train.recipe import CHECKPOINTING


def check_effective(trainer: SFTTrainer, profile: env.Profile) -> None:
    """Raise RuntimeError naming every setting that is not what the recipe asked for.

    This looks at the model's own layers, the optimizer, the accelerator and the rows
    that TRL made, never at the arguments. Trainer turns on checkpointing only when
    training starts, so that is checked then, before the first step.
    """
    model = trainer.model
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    layers = [m for m in modules.values() if isinstance(m, Linear4bit)]
    tuned = [m for m in modules.values() if isinstance(m, BaseTunerLayer)]
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    fault = ""
    if not trained:
        fault = (
            "nothing can train, because every parameter is frozen: load a saved "
            "adapter with load_adapter(..., trainable=True)"
        )
    if any(0 in getattr(layer, "scaling", {}).values() for layer in tuned):
        fault = "alpha is 0, so the adapters change nothing: give one above 0"
    if any(layer.merged for layer in tuned):
        fault = "the adapters are merged: call model.unmerge_adapter() first"
    fault = nested(model) or fault
    if fault:
        raise RuntimeError(f"not as the recipe asked: {fault}")
    masked = check_rows(trainer)
    plain = [name for name, m in modules.items() if type(m) is torch.nn.Linear]
    # of the output head and of the adapters themselves none is 4-bit
    plain = [name for name in plain if "lora_" not in name and "lm_head" not in name]
    # a mixture of experts stacks its matrices, and bitsandbytes skips such a stack
    plain += [name for name, parameter in parameters.items() if parameter.ndim > 2]
    given, built = trainer.optimizer, trainer.create_optimizer()
    trainer.optimizer = given  # or later changes of the settings would do nothing
    optimizer = optimizer_name(getattr(built, "optimizer", built))  # accelerate's
    wanted = "fp16" if profile.fp16 else "bf16" if profile.bf16 else "no"
    precision = trainer.accelerator.mixed_precision
    attention = model.config._attn_implementation
    repeats = models.repeats_keys_and_values()
    repeated = ", keys and values repeated" if profile.fp16 else ""
    kinds = {layer.weight.quant_type for layer in layers}
    doubled = {layer.weight.quant_state.nested for layer in layers}
    dtype, computing = profile.compute_dtype, {m.compute_dtype for m in layers}
    dtypes = {parameter.dtype for parameter in trained.values()}
    effective = {  # what the recipe asks for: whether it is so
        "the linear layers are NF4": not plain and kinds == {"nf4"},
        "they use double quantization": doubled == {True},
        f"they compute in {dtype}": computing == {dtype},
        "only adapters are trained": all("lora_" in name for name in trained),
        "adapters are fp32": dtypes == {torch.float32},
        f"the optimizer is {profile.optim}": optimizer == profile.optim,
        f"mixed precision is {wanted}": precision == wanted,
        f"attention is sdpa{repeated}": (attention, repeats) == ("sdpa", profile.fp16),
        "the loss mask is as set": masked,
    }
    wrong = [what for what, holds in effective.items() if not holds]
    if wrong:
        raise RuntimeError(
            f"not in effect, though the recipe asked for it: {'; '.join(wrong)} "
            f"(found: {len(layers)} 4-bit and {len(plain)} other linear layers, "
            f"{optimizer}, mixed precision {precision}, attention {attention})"
        )
    trainer.remove_callback(AtStart)
    trainer.add_callback(AtStart(profile.checkpointing))
    print("checked:", "; ".join(effective))
    bare = len(layers) - sum(isinstance(m.get_base_layer(), Linear4bit) for m in tuned)
    if bare:
        print(f"{bare} of {len(layers)} 4-bit layers have no adapter (target_modules)")


def longer(dataset, limit: int | None) -> int:
    """How many rows have more than `limit` tokens: none without a limit."""
    return sum(len(ids) > (limit or math.inf) for ids in dataset["input_ids"])


def check_trained(trainer: SFTTrainer, model) -> None:
    """Raise RuntimeError unless the trainer trained this very model to its end."""
    done, wanted = trainer.state.global_step, trainer.args.max_steps
    if trainer.model is not model:
        raise RuntimeError(
            "the model is not the one that the trainer trained, since a cell that "
            "loads it ran later: build the trainer and train again"
        )
    if done != wanted:
        raise RuntimeError(
            f"{done} of {wanted} steps were trained: train again, to the end"
        )


def optimizer_name(optimizer) -> str:
    """The name that TrainingArguments uses for the optimizer's kind."""
    kind = type(optimizer)
    if kind is torch.optim.AdamW:
        return "adamw_torch_fused" if optimizer.defaults["fused"] else "adamw_torch"
    if kind is bitsandbytes.optim.AdamW:
        paged = "paged_" if optimizer.is_paged else ""
        return f"{paged}adamw_{optimizer.args.optim_bits}bit"
    return kind.__name__


def check_rows(trainer: SFTTrainer) -> bool:
    """Return whether no row's beginning carries loss; print how many rows TRL kept.

    Raises RuntimeError for rows that are cut, left out, do not fit the model, teach no
    end token, carry loss outside of answers or none on an answer, or whose prompt has
    other tokens than a later question. Rows that were given as tokens only have no
    prompt and no end to check.
    """
    given, rows = getattr(trainer, "given", None), trainer.train_dataset
    model, tokenizer = trainer.model, trainer.processing_class
    if given is None or trainer.args.packing:
        raise RuntimeError(
            "the rows cannot be checked: expected a trainer of build_trainer, and "
            "packing=False"
        )
    asked = [prompt for row in given for prompt in asked_in(row)]
    contexts = {tuple(records.context_ids(prompt, tokenizer)) for prompt in asked}
    ends = end_tokens(model, tokenizer)
    limit, known = trainer.args.max_length, model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    count = Counter()
    for row in tqdm(rows, desc="checking rows", unit="row", delay=5):
        ids = row["input_ids"]
        labels = trainer.data_collator([dict(row)])["labels"][0].tolist()
        answers = spans(labels)
        count["answers"] += len(answers)
        count["with loss on the prompt"] += not answers or not answers[0][0]
        count["too long"] += len(ids) > positions
        count["unknown token"] += max(ids) >= known
        if not asked or not answers or not answers[0][0]:
            continue
        count["other prompt"] += tuple(ids[: answers[0][0]]) not in contexts
        count["stray"] += any(tuple(ids[:n]) not in contexts for n, _ in answers[1:])
        taught = [ends_at(labels[start:stop], ends) for start, stop in answers]
        count["stray"] += None not in taught and max(taught) > AFTER_END
        count["ended"] += None not in taught
        count["endless"] += None in taught
        count["cut"] += None in taught and len(ids) == limit
    kept, left_out = len(rows), len(given) - len(rows)
    if "input_ids" in given.column_names:
        count["cut"] = longer(given, limit) - left_out
    if asked:
        print(
            f"rows: {kept:,} of {len(given):,} kept, {count['cut']:,} cut at {limit} "
            f"tokens, {left_out:,} left out; in {count['ended']:,} of them the end "
            "token counts in the loss"
        )
    count["cut"] += left_out
    held = getattr(trainer, "given_validation", None)  # TRL cuts these silently too
    counted = held is not None and "input_ids" in held.column_names
    if counted and (over := longer(held, limit)):
        raise RuntimeError(
            f"{over:,} of {len(held):,} validation rows are longer than "
            f"max_length={limit} and would be cut: {SAME_LENGTH}"
        )
    faults = {
        "cut": f"are longer than max_length={limit}, and cut rows teach the model to "
        f"stop early: {SAME_LENGTH}",
        "too long": f"are longer than the {positions} tokens that the model was made "
        "for: leave them out with a smaller max_length",
        "unknown token": f"hold a token from {known:,} on, for which the model has no "
        "row: train without added tokens, or resize the model's embeddings",
        "other prompt": "are trained with prompt tokens that no prompt has when it is "
        "asked: use a chat template that writes the same prompt without the answer",
        "stray": "carry loss on text that the assistant does not say: give the rows of "
        "to_prompt_completion as they are",
        "endless": f"do not teach an end token ({ends}): set tokenizer.eos_token to "
        "the token at which an answer ends",
    }
    for name, fault in faults.items():
        if count[name]:
            raise RuntimeError(f"{count[name]:,} of {len(given):,} rows {fault}")
    masked, silent = not count["with loss on the prompt"], len(asked) - count["answers"]
    if masked and silent > 0:
        raise RuntimeError(
            f"{silent:,} of {len(asked):,} answers carry no loss: give the rows of "
            "to_prompt_completion as they are"
        )
    return masked


def asked_in(row: dict) -> list:
    """What a row of a dataset asks before each answer that it learns; [] for tokens."""
    if "prompt" not in row:
        return []
    if "completion_mask" not in row:  # TRL tokenizes it, and masks the whole prompt
        return [row["prompt"]]
    chat = row["prompt"] + row["completion"]
    return [chat[:n] for n, turn in enumerate(chat) if turn["role"] == "assistant"]


def spans(labels: list[int]) -> list[tuple[int, int]]:
    """The stretches (start, stop) of labels that carry loss."""
    edges = [0, *(label != -100 for label in labels), 0]
    steps = [n for n in range(len(edges) - 1) if edges[n] != edges[n + 1]]
    return list(zip(steps[::2], steps[1::2], strict=True))


SAME_LENGTH = "give to_prompt_completion and sft_config the same max_length"
AFTER_END = 2  # tokens that a template may write behind an end token: a line break


def ends_at(learned: list[int], ends: list[int]) -> int | None:
    """How many tokens follow the first end token of an answer; None if there is none"""
    found = [n for n, token in enumerate(learned) if token in ends]
    return len(learned) - 1 - found[0] if found else None


class AtStart(TrainerCallback):
    """Checks at the start of training what Trainer sets only then."""

    def __init__(self, checkpointing: bool):
        self.checkpointing = checkpointing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        on = [
            layer.gradient_checkpointing
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        ]
        if any(one != self.checkpointing for one in on):
            raise RuntimeError(
                f"not as the recipe asked: {sum(on)} of {len(on)} layers are "
                f"checkpointed, expected {'all' if self.checkpointing else 'none'} of "
                f"them; give {CHECKPOINTING} to SFTConfig, and do not set it later"
            )
