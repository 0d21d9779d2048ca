"""Records to prompt and completion, by a chat template or without one."""

import reprlib
import warnings

from datasets import Dataset
from jinja2 import TemplateError

from qlora_helpers import env
from qlora_helpers.records.checks import KNOWN, as_list, check_record

MAX_LENGTH = 512  # tokens of a record; records and trainer need the same number


def adds_special_tokens(tokenizer) -> bool:
    """True if the tokenizer must write a prompt's special tokens (BOS) itself.

    It must if it has no chat template, because a template writes its own.
    """
    return not tokenizer.chat_template


def leading_ids(tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text: usually BOS or nothing."""
    [first, *_] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[: ids.index(first)]


def context_ids(prompt: str | list[dict], tokenizer) -> list[int]:
    """The token ids that a model gets before its answer, in training and afterwards.

    prompt: a text from `prompt`, or the messages from which a chat template makes it.
    """
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
    # Some tokenizers put an end token behind a text, which would end the answer.
    start = leading_ids(tokenizer) if adds_special_tokens(tokenizer) else []
    return start + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def question(record: dict) -> str:
    """What the user says: the instruction, and below it the input, if there is one."""
    extra = (record.get("input") or "").strip()
    return record["instruction"] + (f"\n\n{extra}" if extra else "")


def system_of(record: dict, system: str | None) -> str | None:
    """The system message of a record: its own if it has one, else `system`.

    A message of white space counts as none. Raises ValueError for what is no text.
    """
    for text in (record.get("system"), system):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"system is {reprlib.repr(text)} ({type(text).__name__}): give the "
                "system message as text, or None"
            )
        if text and text.strip():
            return text
    return None


def alpaca_layout(record: dict, system: str | None = None) -> str:
    """The `### Instruction:` prompt, for base models that have no chat template.

    The system message, if there is one, comes before it.
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

    Without one, SmolLM2's template adds a system message of its own.
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
    advice = "pass system=None, drop the column system, and put its text in instruction"
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
    if question(record).strip() not in text:
        raise ValueError(
            "the chat template leaves out or changes the question: use one that writes "
            "the text of each message as it is"
        )
    return text


def whole_ids(record: dict, tokenizer, system: str | None) -> list[int]:
    """The token ids of a record's prompt and output together, as TRL trains on them."""
    output = record["output"]
    if adds_special_tokens(tokenizer):
        end = "" if output.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(prompt(record, tokenizer, system) + output + end)["input_ids"]
    answered = [{"role": "assistant", "content": output}]
    whole = tokenizer.apply_chat_template(
        messages(record, system) + answered, tokenize=False
    )
    if output.strip() not in whole:
        raise ValueError(
            "the chat template leaves out or changes the output: use one that writes "
            "the text of each message as it is"
        )
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def to_prompt_completion(
    records, tokenizer, *, system: str | None, max_length: int | None = MAX_LENGTH
) -> Dataset:
    """A Dataset with the columns `prompt` and `completion`, as TRL takes them.

    `records` is a list of dicts or a Dataset with Alpaca's columns. `system` is the
    system message of every record that has none in a column `system`; None means no
    message. With a chat template both columns hold messages, and TRL renders them; else
    they hold text, and TRL adds the end token. Records over `max_length` tokens are
    left out, because rows that are cut teach the model to stop early. One warning
    counts and names these rows; another names the columns that are not used.

    Raises ValueError, naming the row, for a record that cannot be trained on or whose
    prompt's tokens in training differ from those when it is asked. Raises ValueError
    if no record is left.
    """
    bare = adds_special_tokens(tokenizer)
    if bare and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end token: set "
            "tokenizer.eos_token to the token at which answers end"
        )
    if max_length is not None:
        env.check_whole("max_length", max_length)
    rows, too_long, unused = [], [], set()
    for number, record in enumerate(as_list(records)):
        check_record(record, number)
        unused |= {str(name) for name in set(record) - KNOWN}
        text, output = prompt(record, tokenizer, system), record["output"]
        end = tokenizer.eos_token
        if end and end in (output.removesuffix(end) if bare else output):
            raise ValueError(
                f"row {number}: output holds the end token {end!r}, so the model would "
                "learn to stop there: remove it; it is added at the end by itself"
            )
        asked, answered = text, output
        if not bare:
            asked = messages(record, system)
            answered = [{"role": "assistant", "content": output}]
        ids = whole_ids(record, tokenizer, system)
        context = context_ids(text, tokenizer)
        if ids[: len(context)] != context:
            raise ValueError(
                f"row {number}: the prompt's tokens change when the output follows, so "
                "the model would be trained and asked with different ones: "
                + (
                    "remove the white space at the output's start"
                    if bare or output[0].isspace()
                    else "use a chat template that keeps prompt and output apart"
                )
            )
        if max_length is not None and len(ids) > max_length:
            too_long.append(number)
        else:
            rows.append({"prompt": asked, "completion": answered})
    if unused:
        warnings.warn(
            f"these columns are not used: {', '.join(sorted(unused))} (only "
            "instruction, input, output and system are)",
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
        )
    return Dataset.from_list(rows)
