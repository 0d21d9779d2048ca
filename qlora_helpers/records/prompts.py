"""Records to prompts, completions and tokens, by the tokenizer's chat template."""

import reprlib

from datasets import Dataset
from jinja2 import Template, TemplateError
from tqdm.auto import tqdm

from qlora_helpers import env
from qlora_helpers.models.template import INSTRUCTION, leading_ids
from qlora_helpers.records import checks
from qlora_helpers.records.checks import as_list, check_record, in_row, turns

MAX_LENGTH = 512  # tokens of a record; records and trainer need the same number
NO_SYSTEM = "pass system=None, drop the column system, and put its text in instruction"
SHOWN = 5  # row numbers of each reason


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


def messages(record: dict, system: str | None) -> list[dict]:
    """The chat that asks for a record's (last) answer; system: its message, or None.

    A record's own system message goes before `system`. Without any, SmolLM2's template
    adds one of its own.
    """
    chat = turns(record)
    if chat:
        own = chat.pop(0)["content"] if chat[0]["role"] == "system" else None
        asked = chat[:-1]
    else:
        own, extra = None, (record.get("input") or "").strip()
        question = record["instruction"]
        question += f"\n\n### Input:\n{extra}" if extra else ""
        asked = [{"role": "user", "content": question}]
    for text in (own, record.get("system"), system):
        if not isinstance(text, str | None):
            raise ValueError(
                f"system is {reprlib.repr(text)} ({type(text).__name__}): give the "
                "system message as text, or None"
            )
        if text and text.strip():  # white space counts as none
            return [{"role": "system", "content": text}, *asked]
    return asked


def answer(record: dict) -> str:
    """What a record wants to be answered: its output, or its chat's last turn."""
    chat = turns(record)
    return chat[-1]["content"] if chat else record["output"]


def alpaca_layout(record: dict, system: str | None = None) -> str:
    """The `### Instruction:` prompt, as a base without a template of its own gets it.

    The system message, if there is one, comes before it. Source: Stanford Alpaca's
    prompt without its preamble.
    """
    return Template(INSTRUCTION).render(messages=messages(record, system))


def _render(chat: list[dict], tokenizer, ask: bool) -> str:
    """The chat as the template writes it; ValueError if it leaves out a message."""
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        system = chat[0]["role"] == "system"
        raise ValueError(
            f"the chat template refuses the {'system message' if system else 'chat'} "
            f"({error}): {NO_SYSTEM if system else 'use another template'}"
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
    """The text that the model is given, up to where its (last) answer begins.

    system: the system message, or None. Raises ValueError for a tokenizer without a
    chat template, or one that refuses the system message, or leaves out a message.
    """
    check_template(tokenizer)
    return _render(messages(record, system), tokenizer, ask=True)


def check_template(tokenizer) -> None:
    """Raise ValueError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: load it by models.load_base, which "
            "gives it one, or call models.give_template(tokenizer)"
        )


def whole_ids(record: dict, tokenizer, system: str | None) -> list[int]:
    """The token ids of a record's prompt and answer together, as they are trained."""
    return tokens(record, tokenizer, system)["input_ids"]


def tokens(record: dict, tokenizer, system: str | None) -> dict:
    """A record's `input_ids`, and `completion_mask`: 1 where a token carries loss.

    Every answer of the assistant carries loss, with the end token behind it, and
    nothing else does. Raises ValueError if an answer's context has other tokens in the
    whole chat than when it is asked.
    """
    check_template(tokenizer)
    chat = messages(record, system)
    chat.append({"role": "assistant", "content": answer(record)})
    ids = _ids(chat, tokenizer)
    mask = [0] * len(ids)
    for place in (n for n, turn in enumerate(chat) if turn["role"] == "assistant"):
        context = context_ids(chat[:place], tokenizer)
        if ids[: len(context)] != context:
            raise ValueError(
                "the prompt's tokens change when the output follows: remove white "
                "space at the output's start, or use a chat template that keeps prompt "
                "and output apart"
            )
        answered = _ids(chat[: place + 1], tokenizer) if chat[place + 1 :] else ids
        if ids[: len(answered)] != answered:
            raise ValueError(
                f"an answer's tokens change when more turns follow: turn {place}; use "
                "a chat template that writes each turn as if it were the last"
            )
        mask[len(context) : len(answered)] = [1] * (len(answered) - len(context))
    return {"input_ids": ids, "completion_mask": mask}


def _ids(chat: list[dict], tokenizer) -> list[int]:
    text = _render(chat, tokenizer, ask=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def to_prompt_completion(
    records, tokenizer, *, system: str | None, max_length=MAX_LENGTH, skip_bad=False
) -> Dataset:
    """A Dataset of prompts and completions, with their tokens as TRL trains on them.

    records: a list of dicts or a Dataset, with Alpaca's columns or chats in `messages`.
    system: the system message of every record that has none of its own, or None. The
    columns `prompt` and `completion` hold messages (the completion is the last answer);
    `input_ids` and `completion_mask` are those of `tokens`.

    Records over `max_length` tokens (None: no limit) are left out, because a row that
    is cut teaches the model to stop early. skip_bad: leave out records that cannot be
    trained on as well; otherwise the first one raises ValueError with its row. A
    printed line counts what is left out by reason, another one names unused columns.
    """
    check_template(tokenizer)
    if max_length is not None:
        env.check_whole("max_length", max_length)
    messages({"instruction": ""}, system)  # raises for a system that is not text
    rows, left_out, unused, given = [], {}, set(), as_list(records)
    first = None  # the error of the first bad record
    bar = tqdm(given, desc="reading records", unit="row", delay=5)
    for number, record in enumerate(bar):
        try:
            with in_row(number):
                check_record(record)
                row = _row(record, tokenizer, system)
        except ValueError as error:
            if not skip_bad:
                raise
            reason = str(error).split(": ")[1]  # behind the row
            left_out.setdefault(reason, []).append(number)
            first = first or error
            continue
        unused |= checks.unused(record)
        if max_length is not None and len(row["input_ids"]) > max_length:
            reason = f"longer than max_length={max_length} tokens"
            left_out.setdefault(reason, []).append(number)
        else:
            rows.append(row)
    if unused:
        print(
            f"these columns are not used: {', '.join(sorted(unused))} (only "
            "instruction, input, output, system and messages are)"
        )
    if left_out:
        reasons = "; ".join(
            f"{reason}: {len(found)} (row{'s' * (len(found) > 1)} "
            f"{', '.join(map(str, found[:SHOWN]))}"
            f"{' …' if found[SHOWN:] else ''})"
            for reason, found in left_out.items()
        )
        said = f"{len(given) - len(rows)} of {len(given)} records are left out: "
        said += reasons
        if not rows:
            said += f"; the first: {first}" if first else ""
            raise ValueError(f"no record is left: {said}")
        print(said)
    return Dataset.from_list(rows)


def hold_back(dataset: Dataset, most: int = 64) -> tuple[Dataset, Dataset]:
    """Split the rows of `to_prompt_completion` into those to train on and to validate.

    A tenth is held back, from one row to `most`. A printed line counts those that also
    occur in training. Raises ValueError for a single row.
    """
    if len(dataset) < 2:
        raise ValueError("there is one record to train on: give two or more")
    held = max(1, min(most, len(dataset) // 10))
    parts = dataset.train_test_split(test_size=held, seed=0)
    known = {tuple(ids) for ids in parts["train"]["input_ids"]}
    if double := sum(tuple(ids) in known for ids in parts["test"]["input_ids"]):
        said = f"{double} of the {held} records held back occur in training too"
        print(said + ", so the validation loss is too low: remove the duplicates")
    return parts["train"], parts["test"]


def _row(record: dict, tokenizer, system: str | None) -> dict:
    """A record as a row of `to_prompt_completion`; ValueError if it cannot be one."""
    asked, output = messages(record, system), answer(record)
    end = tokenizer.eos_token
    said = [turn["content"] for turn in asked if turn["role"] == "assistant"]
    if end and any(end in text for text in (*said, output)):
        raise ValueError(
            f"output holds the end token {end!r}, so the model would learn to stop "
            "there: remove it; it is added at the end by itself"
        )
    completion = [{"role": "assistant", "content": output}]
    row = {"prompt": asked, "completion": completion}
    return row | tokens(record, tokenizer, system)
