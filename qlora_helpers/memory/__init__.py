"""What a training run holds in memory: predicted, rehearsed, measured; will it fit?"""

from qlora_helpers.memory.fit import longest_row, will_it_fit
from qlora_helpers.memory.planned_run import FUSED_LOSS, Extras
from qlora_helpers.memory.prediction import Prediction, predict

__all__ = [
    "FUSED_LOSS",
    "Extras",
    "Prediction",
    "longest_row",
    "predict",
    "will_it_fit",
]
