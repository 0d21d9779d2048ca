"""Ask a model: its answers, their speed, and its logits at given answers."""

import contextlib
import time
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from qlora_helpers import records as task
from qlora_helpers.env import check_whole
from qlora_helpers.sql import check_databases, extract_sql, run_sql

MAX_NEW_TOKENS = 64  # the longest gold answer has 37, and its end token


class Answer(NamedTuple):
    """A model's SQL for one question, and what the database says to it."""

    sql: str
    columns: list
    rows: list
    error: str | None

    def __repr__(self):
        if self.error:
            return f"{self.sql}\nerror: {self.error}"
        shown = [["NULL" if v is None else str(v) for v in r] for r in self.rows[:10]]
        widths = [max(map(len, c)) for c in zip(self.columns, *shown, strict=True)]
        lines = [
            " | ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
            for row in [self.columns, ["-" * w for w in widths], *shown]
        ]
        more = len(self.rows) - len(shown)
        return "\n".join([self.sql, *lines] + [f"... {more} more rows"] * (more > 0))


def _as_trained(model):
    """Autocast a bf16 model on a CPU, as the Trainer does; elsewhere change nothing.

    Its adapters are fp32: left alone, every layer casts its input up and down again.
    """
    on_cpu = model.device.type == "cpu"
    enabled = on_cpu and model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def _only_as_asked(model):
    """Hide the model's own generation_config, with which generate() fills gaps.

    It is emptied in place, because a PEFT model and its base share the object.
    """
    config = vars(model.generation_config)
    own = dict(config)
    try:
        config.clear()
        config.update(vars(GenerationConfig()))
        yield
    finally:
        config.clear()
        config.update(own)


def generate_answers(
    model, tokenizer, prompts, batch_size=64, max_new_tokens=MAX_NEW_TOKENS
):
    """Let the model answer each prompt greedily; prompts are texts of `records.prompt`.

    Returns [(text, stopped)] in the prompts' order; `stopped` says that the answer
    ended by itself and was not cut at `max_new_tokens`. Only the end tokens are taken
    from the model's generation_config.

    Raises ValueError for one text instead of a list, for an empty prompt, for a size
    below 1 and for a tokenizer without an end token.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list of texts")
    check_whole("batch_size", batch_size)
    check_whole("max_new_tokens", max_new_tokens)
    config_eos = model.generation_config.eos_token_id
    ends = set(config_eos) if isinstance(config_eos, list) else {config_eos}
    ends = sorted((ends | {tokenizer.eos_token_id}) - {None})
    if not ends:
        raise ValueError("no end token: set tokenizer.eos_token to where answers end")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad,
        do_sample=False, num_beams=1, repetition_penalty=1.0, use_cache=True,
    )  # fmt: skip
    ids = [task.context_ids(prompt, tokenizer) for prompt in prompts]
    if [] in ids:
        raise ValueError(
            f"prompt {ids.index([])} is empty, and the tokenizer puts no token before "
            "it: give a prompt with text"
        )
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # little padding
    answers, was_training = [None] * len(ids), model.training
    model.eval()
    try:
        with tqdm(total=len(ids), desc="answers", disable=not ids) as bar:
            for start in range(0, len(ids), batch_size):
                batch = order[start : start + batch_size]
                # On the left: an answer must follow its prompt's last token.
                inputs = torch.full((len(batch), len(ids[batch[0]])), pad)
                mask = torch.zeros_like(inputs)
                for row, i in enumerate(batch):
                    inputs[row, -len(ids[i]) :] = torch.tensor(ids[i])
                    mask[row, -len(ids[i]) :] = 1
                with _as_trained(model), _only_as_asked(model):
                    output = model.generate(
                        input_ids=inputs.to(model.device),
                        attention_mask=mask.to(model.device),
                        generation_config=greedy,
                    )
                for i, row in zip(batch, output.tolist(), strict=True):
                    new = row[inputs.shape[1] :]
                    end = next((n for n, t in enumerate(new) if t in ends), None)
                    text = tokenizer.decode(new[:end], skip_special_tokens=True)
                    answers[i] = (text, end is not None)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return answers


def _checked(records) -> list[dict]:
    """The records as a list, after `records.check` of each."""
    records = task.as_list(records)
    for row, record in enumerate(records):
        task.check_record(record, row)
    return records


def answer_logits(model, tokenizer, records, *, system):
    """The logits with which a model meets each token of the gold answers.

    `system` is the system message of every prompt; None means no message. Returns
    (tokens, vocabulary), fp32, on the CPU: the rows of one record after another, each
    ending with the end token's row. Raises ValueError for a bad record, or for none.
    """
    records = _checked(records)
    was_training, kept = model.training, []
    model.eval()
    try:
        with torch.no_grad(), _as_trained(model):
            for record in records:
                asked = task.prompt(record, tokenizer, system)
                before = len(task.context_ids(asked, tokenizer))
                whole = task.whole_ids(record, tokenizer, system)
                if tokenizer.eos_token_id in whole[before:]:  # what follows is unscored
                    whole = whole[: whole.index(tokenizer.eos_token_id, before)]
                ids = torch.tensor([whole]).to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0]
                kept.append(logits[before - 1 :].float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(kept)


def generation_speed(model, batch: int, prompt: int = 64, tokens: int = 16) -> float:
    """Tokens a second that a model generates, all rows together, after a warm-up.

    batch: rows. prompt: tokens of each, arbitrary ones. tokens: new ones a row; the
    time for reading the prompt is in it.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("tokens", tokens)):
        check_whole(name, value)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    inputs = torch.randint(10, vocabulary, (batch, prompt), generator=generator)
    inputs = inputs.to(model.device)
    exact = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip

    def run():
        with _as_trained(model), _only_as_asked(model):
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=exact,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    run()
    start = time.perf_counter()
    run()
    return batch * tokens / (time.perf_counter() - start)


def ask(question, model, tokenizer, database, *, system):
    """Put one question in English to the model and run the SQL that it writes.

    `system` is the system message, None for none. Returns an Answer: SQL and rows.
    """
    check_databases([database])
    prompt = task.prompt({"instruction": question, "input": ""}, tokenizer, system)
    [(text, _)] = generate_answers(model, tokenizer, [prompt])
    sql = extract_sql(text)
    return Answer(sql, *run_sql(sql, database))
