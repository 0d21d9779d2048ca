"""Ask a model and judge its answers: accuracy, perplexity, and how sure they are."""

from qlora_helpers.score.generate import answering, generate_answers, generation_speed
from qlora_helpers.score.intervals import (
    bootstrap_interval,
    exact_interval,
    paired_interval,
    paired_test,
)
from qlora_helpers.score.judged import (
    Accuracy,
    Answer,
    accuracy,
    answer_logits,
    ask,
    divergence,
    exact_match,
    execution_accuracy,
    perplexity,
)
