"""Records to prompt and completion, by a chat template or without one."""

import reprlib
import warnings

from datasets import Dataset
from jinja2 import TemplateError

from qlora_helpers import env
from qlora_helpers.records.checks import KNOWN, as_list, check_record

MAX_LENGTH = 512  # tokens of a record; records and trainer need the same number
NO_SYSTEM = "pass system=None, drop the column system, and put its text in instruction"


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
    # A template writes BOS itself. An end token behind the text, as some tokenizers
    # put it, would end the answer.
    start = [] if tokenizer.chat_template else leading_ids(tokenizer)
    return start + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def alpaca_layout(record: dict, system: str | None = None) -> str:
    """The `### Instruction:` prompt, for base models that have no chat template.

    The system message, if there is one, comes before it.
    Source: Stanford Alpaca's prompt without its preamble.
    """
    system = _system_of(record, system)
    extra = (record.get("input") or "").strip()
    text = f"{system}\n\n" if system else ""
    text += f"### Instruction:\n{record['instruction']}\n\n"
    text += f"### Input:\n{extra}\n\n" if extra else ""
    return f"{text}### Response:\n"


def messages(record: dict, system: str | None) -> list[dict]:
    """The chat that asks a record's question; system: its system message, or None.

    Without one, SmolLM2's template adds a system message of its own.
    """
    system = _system_of(record, system)
    extra = (record.get("input") or "").strip()
    start = [{"role": "system", "content": system}] if system else []
    question = record["instruction"] + (f"\n\n{extra}" if extra else "")
    return [*start, {"role": "user", "content": question}]


def _system_of(record: dict, system: str | None) -> str | None:
    """A record's own system message, else `system`; white space counts as none."""
    for text in (record.get("system"), system):
        if not isinstance(text, str | None):
            raise ValueError(
                f"system is {reprlib.repr(text)} ({type(text).__name__}): give the "
                "system message as text, or None"
            )
        if text and text.strip():
            return text
    return None


def _render(chat: list[dict], tokenizer, ask: bool) -> str:
    """The chat as the template writes it; ValueError if it leaves out a message."""
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        if chat[0]["role"] != "system":
            raise
        raise ValueError(
            f"the chat template refuses the system message ({error}): {NO_SYSTEM}"
        ) from None
    another = "use a template that writes each text as it is"
    repairs = {
        "system": f"system message: {NO_SYSTEM}",
        "user": f"question: {another}",
        "assistant": f"output: {another}",
    }
    for message in chat:
        if message["content"].strip() not in text:
            lost = repairs[message["role"]]
            raise ValueError(f"the chat template leaves out or changes the {lost}")
    return text


def prompt(record: dict, tokenizer, system: str | None) -> str:
    """The text that the model is given, up to where its answer begins.

    system: the system message, or None. Raises ValueError for a chat template that
    refuses it, or leaves out it or the question.
    """
    if not tokenizer.chat_template:
        return alpaca_layout(record, system)
    return _render(messages(record, system), tokenizer, ask=True)


def whole_ids(record: dict, tokenizer, system: str | None) -> list[int]:
    """The token ids of a record's prompt and output together, as TRL trains on them."""
    output, end = record["output"], tokenizer.eos_token
    if not tokenizer.chat_template:
        output = output.removesuffix(end) + end
        return tokenizer(prompt(record, tokenizer, system) + output)["input_ids"]
    answered = {"role": "assistant", "content": output}
    whole = _render([*messages(record, system), answered], tokenizer, ask=False)
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def to_prompt_completion(
    records, tokenizer, *, system: str | None, max_length: int | None = MAX_LENGTH
) -> Dataset:
    """A Dataset with the columns `prompt` and `completion`, as TRL takes them.

    records: a list of dicts or a Dataset with Alpaca's columns. system: the system
    message of every record that has none in a column `system`, or None. With a chat
    template both columns hold messages; else they hold text, and TRL adds the end
    token. Records over `max_length` tokens are left out with a warning, because a row
    that is cut teaches the model to stop early. Another warning names unused columns.

    Raises ValueError, naming the row, for a record that cannot be trained on or whose
    prompt has other tokens in training than when it is asked, and if no record is left.
    """
    templated, end = bool(tokenizer.chat_template), tokenizer.eos_token
    if not templated and not end:
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
        output = record["output"]
        # Without a template, one end token at the end does not count: TRL wants one.
        inner = output if templated else output.removesuffix(end)
        if end and end in inner:
            raise ValueError(
                f"row {number}: output holds the end token {end!r}, so the model would "
                "learn to stop there: remove it; it is added at the end by itself"
            )
        asked = prompt(record, tokenizer, system)
        ids = whole_ids(record, tokenizer, system)
        context = context_ids(asked, tokenizer)
        if ids[: len(context)] != context:
            raise ValueError(
                f"row {number}: the prompt's tokens change when the output follows: "
                "remove white space at the output's start, or use a chat template that "
                "keeps prompt and output apart"
            )
        if max_length is not None and len(ids) > max_length:
            too_long.append(number)
        elif templated:
            answer = [{"role": "assistant", "content": output}]
            rows.append({"prompt": messages(record, system), "completion": answer})
        else:
            rows.append({"prompt": asked, "completion": output})
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
            f"no record is left: all {len(too_long)} are over max_length={max_length}"
        )
    return Dataset.from_list(rows)
