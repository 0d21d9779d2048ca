"""The oracles of the exercises: each tries a reader's function, prints a verdict."""

from qlora_helpers.lesson.exercises.runs import (
    check_exact_p,
    check_first_rank,
    check_learning_rate,
    check_long_haul,
    check_lora_parameters,
    check_loss_mask,
    check_managed_bytes,
    check_on_paper,
    check_prompt,
    check_tokens_until,
)
from qlora_helpers.lesson.exercises.weights import (
    check_adapter_gradients,
    check_bits_per_weight,
    check_dropout,
    check_gain,
    check_gguf_bytes,
    check_interleaved,
    check_layer_bytes,
    check_merged,
    check_nf3,
)
