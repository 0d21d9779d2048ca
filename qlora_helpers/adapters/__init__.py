"""Adapters on disk: how one is saved and loaded, and why one is refused."""

from qlora_helpers.adapters.checks import (
    CONFIG,
    PICKLES,
    WEIGHTS,
    base_of,
    check_adapter,
    check_whole,
    tensor_names,
    token_rows,
)
from qlora_helpers.adapters.save_load import (
    check_place,
    load_adapter,
    save_adapter,
)
