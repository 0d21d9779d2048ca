"""The QLoRA recipe: its configs and trainer, the check of them, and the live loss."""

from qlora_helpers.train.effective import check_effective, check_trained
from qlora_helpers.train.live_loss import LiveLoss
from qlora_helpers.train.recipe import (
    CHECKPOINTING,
    PROJECTIONS,
    build_trainer,
    check_given,
    check_numbers,
    configs,
    lora_config,
    nf4_config,
    sft_config,
)
