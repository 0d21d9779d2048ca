"""Ask and judge a model: accuracy, perplexity, and its distance to another."""

import math
import reprlib
from typing import NamedTuple

import numpy
import pandas
import torch
from tqdm.auto import tqdm

from qlora_helpers import records as task
from qlora_helpers.env import check_whole
from qlora_helpers.score.generate import (
    MAX_NEW_TOKENS,
    answering,
    generate_answers,
)
from qlora_helpers.score.intervals import bootstrap_interval, exact_interval
from qlora_helpers.sql import check_databases, extract_sql, judge, run_sql

ROWS_SHOWN = 10  # of an answer


class Answer(NamedTuple):
    """A model's SQL for one question, and what the database says to it."""

    sql: str
    columns: list
    rows: list
    error: str | None

    def __repr__(self):
        if self.error:
            return f"{self.sql}\nerror: {self.error}"
        if not self.rows:
            return f"{self.sql}\nno rows"
        rows = pandas.DataFrame(self.rows, columns=self.columns, dtype=object)
        rows = rows.where(rows.notna(), "NULL")
        shown = rows[:ROWS_SHOWN].to_string(index=False)
        more = len(rows) - ROWS_SHOWN
        return f"{self.sql}\n{shown}" + (f"\n... {more} more rows" if more > 0 else "")


class Accuracy(NamedTuple):
    """Accuracy of a model: shares between 0 and 1, and one dict for each question."""

    accuracy: float
    low: float
    high: float
    n: int
    stopped: float  # share of answers that ended by themselves
    rows: list

    def __repr__(self):
        return (
            f"{self.accuracy:.1%} right ({self.low:.1%} to {self.high:.1%}), "
            f"n = {self.n}, {self.stopped:.0%} of the answers ended by themselves"
        )


class Perplexity(NamedTuple):
    """Perplexity of a text, its interval, and the mean nats a token of each block."""

    value: float
    low: float
    high: float
    tokens: int
    nll: list

    def __repr__(self):
        return (
            f"perplexity {self.value:.2f} ({self.low:.2f} to {self.high:.2f}), "
            f"{self.tokens} tokens"
        )


class Divergence(NamedTuple):
    """How far a model is from a reference: mean nats a token, and logit error."""

    kl: float  # KL(reference || model)
    error: float  # norm of the difference of the logits, by the reference's norm


def ask(question, model, tokenizer, database, *, system) -> Answer:
    """Put one question in English to the model and run the SQL that it writes.

    `system` is the system message, None for none.
    """
    check_databases([database])
    prompt = task.prompt({"instruction": question, "input": ""}, tokenizer, system)
    [(text, _)] = generate_answers(model, tokenizer, [prompt])
    sql = extract_sql(text)
    return Answer(sql, *run_sql(sql, database))


def checked(records) -> list[dict]:
    """The records as a list, after `records.check_record` of each."""
    records = task.as_list(records)
    for row, record in enumerate(records):
        with task.in_row(row):
            task.check_record(record)
    return records


def exact_match(text: str, record: dict) -> bool:
    """Whether a text is the record's answer, apart from white space around it."""
    return text.strip() == task.answer(record).strip()


def accuracy(
    model, tokenizer, records, judge=exact_match, *, system,
    batch_size=64, max_new_tokens=MAX_NEW_TOKENS,
) -> Accuracy:  # fmt: skip
    """Ask the model for every record's (last) answer, and let a function judge it.

    judge: takes the model's text and the record, and returns True if the text is right.
    system: the system message of records that have none of their own, None for none.
    Returns an Accuracy with its exact interval over the records.

    Raises, before it asks anything, ValueError for a record that cannot be asked, or
    whose own answer the judge does not call right. Raises ValueError with the row where
    the judge raises an error or returns no bool.
    """

    def look(text, record):
        try:
            right = judge(text, record)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the judge raised {said} for {reprlib.repr(text)}: let it return "
                "False for a text that it cannot read"
            ) from error
        if not isinstance(right, bool | numpy.bool_):
            raise ValueError(
                f"the judge returned {reprlib.repr(right)} ({type(right).__name__}) "
                f"for {reprlib.repr(text)}: let it return True or False"
            )
        return {"predicted": text, "right": bool(right), "reason": ""}

    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    return _accuracy(model, tokenizer, records, look, system, how)


def execution_accuracy(model, tokenizer, records, databases, *, system, batch_size=64):
    """The `accuracy` of a model's SQL: it is run, and its rows compared with the gold.

    Raises, before it asks anything, ValueError for a record that cannot be asked or
    judged, and TypeError for databases that are not open.
    """
    check_databases(databases)

    def look(text, record):
        sql = extract_sql(text)
        verdict = judge(sql, record | {"output": task.answer(record)}, databases)
        return {"predicted": sql, "right": verdict.right, "reason": verdict.reason}

    how = {"batch_size": batch_size}
    return _accuracy(model, tokenizer, records, look, system, how)


def _accuracy(model, tokenizer, records, look, system, how) -> Accuracy:
    """look: from a text and its record to the keys predicted, right and reason."""
    records, rows = checked(records), []
    for row, record in enumerate(records):
        with task.in_row(row):
            if not look(task.answer(record), record)["right"]:
                raise ValueError(
                    "the judge calls the record's own answer wrong: correct one of them"
                )
    prompts = [task.prompt(record, tokenizer, system) for record in records]
    answers = generate_answers(model, tokenizer, prompts, **how)
    for row, (record, (text, _)) in enumerate(zip(records, answers, strict=True)):
        asked = task.messages(record, system)[-1]["content"]
        with task.in_row(row):
            verdict = look(text, record)
        rows.append({"question": asked, "gold": task.answer(record)} | verdict)
    right = sum(row["right"] for row in rows)
    mean, low, high = exact_interval(right, len(rows))
    stopped = sum(stop for _, stop in answers) / len(answers)
    return Accuracy(mean, low, high, len(rows), stopped, rows)


def answer_logits(model, tokenizer, records, *, system):
    """The logits with which a model meets each token of the gold answers.

    `system` is the system message of every prompt, None for none. Returns (tokens,
    vocabulary), fp32, on the CPU: the rows of one record after another, each ending
    with the end token's row. Raises ValueError for a bad record, or for none.
    """
    records, kept = checked(records), []
    with answering(model):
        for record in records:
            asked = task.prompt(record, tokenizer, system)
            before = len(task.context_ids(asked, tokenizer))
            whole = task.whole_ids(record, tokenizer, system)
            if tokenizer.eos_token_id in whole[before:]:  # what follows is unscored
                whole = whole[: whole.index(tokenizer.eos_token_id, before)]
            ids = torch.tensor([whole]).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            kept.append(logits[before - 1 :].float().cpu())
    return torch.cat(kept)


def divergence(logits, reference) -> Divergence:
    """Compare two results of `answer_logits`; ValueError where their shapes differ."""
    if logits.shape != reference.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, the reference's "
            f"{tuple(reference.shape)}: take both from the same records"
        )
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1),
        reduction="batchmean", log_target=True,
    ).item()  # fmt: skip
    error = ((logits - reference).norm() / reference.norm()).item()
    return Divergence(kl, error)


def perplexity(model, tokenizer, text, block=256):
    """Measure exp(mean nats a token) of a text, block by block of so many tokens.

    The tokens that a tokenizer puts before a text (BOS) precede each block, unscored.
    The interval resamples blocks. Compare two models by `paired_interval` on their
    `nll`, over 4,000 tokens or more: blocks of one text differ more than models do.
    A text shorter than a block is one block; what is left over at the end is unread.
    """
    check_whole("block", block)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    block = min(block, len(ids) - 1)
    if block < 1:
        raise ValueError(f"expected a text of two tokens or more, got {len(ids)}")
    front = task.leading_ids(tokenizer)
    nll = []
    with answering(model):
        for start in tqdm(range(0, len(ids) - block, block), desc="perplexity"):
            # block + 1 tokens: the first is context, all others are scored
            piece = torch.tensor([front + ids[start : start + block + 1]])
            piece = piece.to(model.device)
            logits = model(input_ids=piece[:, :-1], use_cache=False).logits[0]
            logits, scored = logits[-block:].float(), piece[0, -block:]
            nll.append(torch.nn.functional.cross_entropy(logits, scored).item())
    value, low, high = (math.exp(nats) for nats in bootstrap_interval(nll))
    return Perplexity(value, low, high, block * len(nll), nll)
