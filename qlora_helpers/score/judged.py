"""Judge a model: execution accuracy, perplexity, and its distance to another."""

import math
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from qlora_helpers import records as task
from qlora_helpers.env import check_whole
from qlora_helpers.score.answers import _as_trained, _checked, generate_answers
from qlora_helpers.score.intervals import bootstrap_interval
from qlora_helpers.sql import check_databases, extract_sql, judge


class Accuracy(NamedTuple):
    """Execution accuracy of a model: shares between 0 and 1, one dict a question."""

    accuracy: float
    low: float
    high: float
    n: int
    stopped: float  # share of answers that ended by themselves
    rows: list

    def __repr__(self):
        return (
            f"{self.accuracy:.1%} right ({self.low:.1%} to {self.high:.1%}), "
            f"n = {self.n}, {self.stopped:.0%} stopped by themselves"
        )


class Perplexity(NamedTuple):
    """Perplexity of a text, its interval, and the mean nats a token of each block."""

    value: float
    low: float
    high: float
    tokens: int
    nll: list

    def __repr__(self):
        interval = f"({self.low:.2f} to {self.high:.2f})"
        return f"perplexity {self.value:.2f} {interval}, {self.tokens} tokens"


class Divergence(NamedTuple):
    """How far a model is from a reference: mean nats a token, and logit error."""

    kl: float  # KL(reference || model)
    error: float  # norm of the difference of the logits, by the reference's norm


def execution_accuracy(model, tokenizer, records, databases, *, system, batch_size=64):
    """Ask the model every record's question, run its SQL, compare with the gold.

    `system` is the system message of every prompt; None means no message. Returns an
    Accuracy with its bootstrap interval over the questions.

    Raises, before it asks anything, ValueError for a record that cannot be asked or
    judged and TypeError for databases that are not open.
    """
    check_databases(databases)
    records = _checked(records)
    for record in records:
        judge(record["output"], record, databases)  # raises where it cannot judge
    prompts = [task.prompt(record, tokenizer, system) for record in records]
    answers = generate_answers(model, tokenizer, prompts, batch_size)
    rows = []
    for record, (text, _) in zip(records, answers, strict=True):
        sql = extract_sql(text)
        verdict = judge(sql, record, databases)
        rows.append(
            {"question": record["instruction"], "gold": record["output"],
             "predicted": sql, "right": verdict.right, "reason": verdict.reason}
        )  # fmt: skip
    mean, low, high = bootstrap_interval([row["right"] for row in rows])
    stopped = sum(stop for _, stop in answers) / len(answers)
    return Accuracy(mean, low, high, len(rows), stopped, rows)


def divergence(logits, reference) -> Divergence:
    """Compare two results of `answer_logits`, row by row: KL and logit error.

    Raises ValueError where their shapes differ: they are not of the same questions.
    """
    if logits.shape != reference.shape:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, the reference's "
            f"{tuple(reference.shape)}: take both from the same records"
        )
    wanted, given = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
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
    was_training, nll = model.training, []
    model.eval()
    try:
        with torch.no_grad():
            for start in tqdm(range(0, len(ids) - block, block), desc="perplexity"):
                # block + 1 tokens: the first is context, all others are scored
                piece = torch.tensor([front + ids[start : start + block + 1]])
                piece = piece.to(model.device)
                with _as_trained(model):
                    logits = model(input_ids=piece[:, :-1], use_cache=False).logits[0]
                logits, scored = logits[-block:].float(), piece[0, -block:]
                loss = torch.nn.functional.cross_entropy(logits, scored)
                nll.append(loss.item())
    finally:
        model.train(was_training)
    value, low, high = (math.exp(nats) for nats in bootstrap_interval(nll))
    return Perplexity(value, low, high, block * len(nll), nll)
