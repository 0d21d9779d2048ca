"""What a training run holds in memory: predicted, rehearsed, measured; will it fit?"""

from qlora_helpers.memory.fit import longest_row, will_it_fit
from qlora_helpers.memory.measuring import (
    Ledger,
    hold_to,
    may_take,
    measure,
    peak,
    private_peak,
    state_bytes,
    stored_tensors,
    tensor_bytes,
)
from qlora_helpers.memory.planned_run import FUSED_LOSS, Extras
from qlora_helpers.memory.prediction import Prediction, predict
