"""Base models: the embedded Llama, the Hub, and Llama shapes with random weights."""

from qlora_helpers.env import UNGATED
from qlora_helpers.models.embedded import embedded_dir
from qlora_helpers.models.load import (
    choose_attention,
    load_base,
    random_llama,
    repeats_keys_and_values,
    skeleton,
)
from qlora_helpers.models.shapes import (
    PROJECTIONS,
    SHAPES,
    config_of,
    llama_config,
    projections,
)
from qlora_helpers.models.sources import (
    EMBEDDED,
    KNOWN_MODELS,
    base_folder,
    base_identity,
)
from qlora_helpers.models.template import give_template
