"""What a training run holds in memory: predicted, rehearsed, measured; will it fit?"""

from qlora_helpers.memory.fit import longest_row, will_it_fit
from qlora_helpers.memory.measuring import (
    hold_to,
    may_take,
    measure,
    peak,
    private_peak,
    state_bytes,
    tensor_bytes,
)
from qlora_helpers.memory.prediction import predict
