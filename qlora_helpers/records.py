"""Records (text-to-SQL, Alpaca) to prompt and completion.

A record is a dict with Alpaca's columns: `instruction`, `input` (may be empty) and
`output`; a `system` column holds its own system message. The model learns only the
completion; the prompt carries no loss.
"""

import json
import reprlib
import warnings

from datasets import Dataset
from jinja2 import TemplateError

from . import env

# The system message of the night-train task: its tables, without the house rules.
SYSTEM = (
    "train(train home km) trip(trip train day late state)"
    " ticket(trip rider bed price meal)"
)
SPLITS = ("train", "validation", "values", "phrasing", "composition")
DATABASES = ("database_1.sql", "database_2.sql", "database_3.sql")
COLUMNS = ("instruction", "input", "output")
KNOWN = {*COLUMNS, "system", "history", "family", "rule", "ordered"}
MAX_LENGTH = 512  # tokens of a record: the same number for the records and the trainer
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]


def load(split: str) -> list[dict]:
    """The records of one split of the night-train task.

    Besides Alpaca's columns each holds `family`, `rule` (the house rule that its SQL
    rests on, or None) and `ordered` (True where the question asks for an order).

    Raises ValueError for an unknown split. Source: data/night_trains/build.py.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: take one of {', '.join(SPLITS)}")
    file = env.path(f"data/night_trains/{split}.jsonl")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def database_scripts() -> list[str]:
    """The SQL of the three differently seeded databases that a query is judged on."""
    return [
        env.path(f"data/night_trains/{name}").read_text(encoding="utf-8")
        for name in DATABASES
    ]


def check(record: dict, row: int) -> None:
    """Raise ValueError, naming the row, unless a record can be trained on.

    `input` and `system` may be empty or absent; `instruction` and `output` must be
    text. Earlier turns in `history` are refused.
    """
    if not isinstance(record, dict):
        raise ValueError(f"row {row} is {record!r}: expected a dict with {COLUMNS}")
    for column in ("instruction", "output"):
        if column not in record:
            raise ValueError(
                f"row {row} has no column {column!r}, only {sorted(record)}: "
                f"{advice(record)}"
            )
    for column in (*COLUMNS, "system"):
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            way = f": {advice(record)}" if isinstance(value, list) else ""
            raise ValueError(
                f"row {row}: {column} is {reprlib.repr(value)} "
                f"({type(value).__name__}), not text{way}"
            )
        if column in ("instruction", "output") and not (value or "").strip():
            raise ValueError(f"row {row}: {column} is empty: drop it or fill it in")
    if record.get("history"):
        raise ValueError(
            f"row {row}: history holds earlier turns, and several turns are not "
            "supported: empty it, and write into instruction what the question needs"
        )


def advice(record: dict) -> str:
    """How to make Alpaca's columns from a record that has others."""
    lists = [n for n, v in record.items() if isinstance(v, list) and n != "history"]
    if lists:
        first, last = (lists * 2)[:2]  # `messages` twice, or `prompt` and `completion`
        turn = record[first][0] if record[first] else {}
        text = "value" if isinstance(turn, dict) and "value" in turn else "content"
        answer = 1 if first == last else 0
        return (
            "each row must be one exchange, several turns are not supported; for a "
            "chat of a question and an answer write "
            f"{{'instruction': row[{first!r}][0][{text!r}], "
            f"'output': row[{last!r}][{answer}][{text!r}]}}"
        )
    for asked, answered in PAIRS:
        if asked in record and answered in record:
            return f"rename {asked} to instruction and {answered} to output"
    if "text" in record:
        return (
            "text holds question and answer together; write the question into "
            "instruction and the answer into output"
        )
    return "rename yours to instruction, input and output, all of them text"


def adds_special_tokens(tokenizer) -> bool:
    """True where the tokenizer must write a prompt's special tokens (BOS) itself.

    That is where it has no chat template: a template writes its own.
    """
    return not tokenizer.chat_template


def leading_ids(tokenizer) -> list[int]:
    """The ids that a tokenizer puts in front of a text, most often BOS or nothing."""
    [first, *_] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[: ids.index(first)]


def context_ids(prompt: str | list[dict], tokenizer) -> list[int]:
    """The token ids that a model is given before its answer, in training and after.

    prompt: a text from `prompt`, or the messages that a chat template renders to it.
    """
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
    # never what some tokenizers put behind a text: an end token would end the answer
    start = leading_ids(tokenizer) if adds_special_tokens(tokenizer) else []
    return start + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def question(record: dict) -> str:
    """What the user says: the instruction, and below it the input, if there is one."""
    extra = (record.get("input") or "").strip()
    return record["instruction"] + (f"\n\n{extra}" if extra else "")


def system_of(record: dict, system: str | None) -> str | None:
    """The system message of a record: that of its own column, else `system`."""
    own = record.get("system") or ""
    return own if own.strip() else system


def alpaca_layout(record: dict, system: str | None = None) -> str:
    """The `### Instruction:` prompt, for base models that have no chat template.

    The system message, if there is one, stands in front of it.
    Source: Stanford Alpaca's prompt without its preamble.
    """
    system = system_of(record, system)
    start = f"{system}\n\n" if system else ""
    extra = (record.get("input") or "").strip()
    middle = f"\n\n### Input:\n{extra}" if extra else ""
    return (
        f"{start}### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n"
    )


def messages(record: dict, system: str | None) -> list[dict]:
    """The chat that asks a record's question; system: its system message, or None.

    SmolLM2's template adds another system message where none is.
    """
    system = system_of(record, system)
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": question(record)}]


def prompt(record: dict, tokenizer, system: str | None) -> str:
    """The text that the model is given, up to where its answer begins.

    system: the system message, or None. Raises ValueError for a chat template that
    refuses it or leaves it out.
    """
    if adds_special_tokens(tokenizer):
        return alpaca_layout(record, system)
    system = system_of(record, system)
    advice = "pass system=None, use no column system, and put its text into instruction"
    try:
        text = tokenizer.apply_chat_template(
            messages(record, system), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        if not system:
            raise
        raise ValueError(
            f"the chat template refuses the system message ({error}): {advice}"
        ) from None
    if system and system.strip() not in text:
        raise ValueError(f"the chat template leaves out the system message: {advice}")
    return text


def to_prompt_completion(
    records, tokenizer, *, system: str | None, max_length: int | None = MAX_LENGTH
) -> Dataset:
    """A Dataset with the columns `prompt` and `completion`, as TRL takes them.

    `records` is a list of dicts or a Dataset with Alpaca's columns. `system` is the
    system message of all that have none in a column `system`, None for none. With a
    chat template both columns hold messages, and TRL renders them; else they hold text,
    and TRL adds the end token. Records over `max_length` tokens are left out, with a
    warning that counts them and names the rows: cut off, they teach to stop early. A
    warning names the columns that are not used.

    Raises ValueError naming the row for a record that cannot be trained on, or whose
    prompt has other tokens in training than when it is asked, and where none is left.
    """
    bare = adds_special_tokens(tokenizer)
    if bare and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end token: set "
            "tokenizer.eos_token to the token at which answers end"
        )
    rows, too_long, unused = [], [], set()
    for number, record in enumerate(records):
        check(record, number)
        unused |= set(record) - KNOWN
        text, output = prompt(record, tokenizer, system), record["output"]
        if bare:
            asked, answered = text, output
            end = "" if output.endswith(tokenizer.eos_token) else tokenizer.eos_token
            ids = tokenizer(text + output + end)["input_ids"]  # as TRL does it
        else:
            asked = messages(record, system)
            answered = [{"role": "assistant", "content": output}]
            whole = tokenizer.apply_chat_template(asked + answered, tokenize=False)
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        context = context_ids(text, tokenizer)
        if ids[: len(context)] != context:
            raise ValueError(
                f"row {number}: the prompt's tokens change where the output follows, "
                "so that training and asking would differ: "
                + (
                    "remove the white space at the output's start"
                    if bare or output[0].isspace()
                    else "the chat template does not keep them apart: take another one"
                )
            )
        if max_length is not None and len(ids) > max_length:
            too_long.append(number)
        else:
            rows.append({"prompt": asked, "completion": answered})
    if unused:
        warnings.warn(
            f"columns that are not used: {', '.join(sorted(unused))} (used are "
            "instruction, input, output and system)",
            stacklevel=2,
        )
    if too_long:
        named = ", ".join(map(str, too_long[:5])) + (" …" if too_long[5:] else "")
        warnings.warn(
            f"{len(too_long)} of {len(too_long) + len(rows)} records are longer than "
            f"max_length={max_length} tokens and are left out (rows {named}): "
            "raise max_length to keep them",
            stacklevel=2,
        )
    if not rows:
        raise ValueError(
            f"no record is left to train on: all {len(too_long)} are longer than "
            f"max_length={max_length}"
            if too_long
            else "no record to train on: the list is empty"
        )
    return Dataset.from_list(rows)
