"""Ask a model and judge its answers: accuracy, perplexity, and how sure they are."""

from qlora_helpers.score.answers import (
    MAX_NEW_TOKENS,
    Answer,
    answer_logits,
    ask,
    generate_answers,
    generation_speed,
)
from qlora_helpers.score.intervals import Interval, bootstrap_interval, paired_interval
from qlora_helpers.score.judged import (
    Accuracy,
    Divergence,
    Perplexity,
    divergence,
    execution_accuracy,
    perplexity,
)

__all__ = [
    "MAX_NEW_TOKENS",
    "Accuracy",
    "Answer",
    "Divergence",
    "Interval",
    "Perplexity",
    "answer_logits",
    "ask",
    "bootstrap_interval",
    "divergence",
    "execution_accuracy",
    "generate_answers",
    "generation_speed",
    "paired_interval",
    "perplexity",
]
