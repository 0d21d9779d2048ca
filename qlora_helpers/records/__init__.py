"""Records (text-to-SQL, Alpaca, chats) to prompt, completion and their tokens.

A record is a dict with Alpaca's columns: `instruction`, `input` (may be empty) and
`output`; or with a chat of one or several turns in `messages`. A column `system` can
hold the record's own system message. The model learns only what the assistant says.
"""

from qlora_helpers.models.template import leading_ids
from qlora_helpers.records.checks import COLUMNS, as_list, check_record, in_row
from qlora_helpers.records.files import read
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
    answer,
    context_ids,
    hold_back,
    messages,
    prompt,
    to_prompt_completion,
    whole_ids,
)
