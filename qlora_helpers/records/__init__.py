"""Records (text-to-SQL, Alpaca) to prompt and completion.

A record is a dict with Alpaca's columns: `instruction`, `input` (may be empty) and
`output`. A column `system` can hold the record's own system message. The model learns
only the completion; the prompt carries no loss.
"""

from qlora_helpers.records.checks import COLUMNS, as_list, check_record
from qlora_helpers.records.night_trains import (
    SPLITS,
    SYSTEM,
    database_scripts,
    few_shot,
    load,
    open_databases,
    told,
)
from qlora_helpers.records.prompts import (
    MAX_LENGTH,
    alpaca_layout,
    context_ids,
    leading_ids,
    messages,
    prompt,
    to_prompt_completion,
    whole_ids,
)
