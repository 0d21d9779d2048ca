"""What the benchmarks share: processes of their own, recorded rows, training runs.

Importing this module lets a benchmark find `qlora_helpers` and `tools`, so that
`python benchmarks/sizes.py` needs no PYTHONPATH.
"""

import concurrent.futures
import contextlib
import gc
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, TrainerCallback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qlora_helpers import env, records, train
from qlora_helpers.lesson import recordings
from qlora_helpers.models import embedded
from tools import recorder

STEPS, BATCH, LEARNING_RATE = 100, 8, 2e-3  # notebook 06's
TESTS = ("phrasing", "values", "composition")  # the order of all `verdicts`
FOLDER = recordings.FOLDER  # where the recordings lie


def in_child(measure, *arguments, **variables):
    """Run `measure(*arguments)` in a process of its own; yield each row as it arrives.

    `measure` is a function at a module's top level that yields or returns rows.
    `variables` are environment variables of the process, such as QLORA_PROFILE.

    Raises RuntimeError after the last row, if the process fails or is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, arguments))
    before = dict(os.environ)
    os.environ.update(variables)  # the process inherits them
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()  # the process has its own; once that closes, no row can come
    try:
        while (row := _received(receiver)) is not None:
            yield row
        process.join()
    finally:
        process.kill()  # no effect on a process that has ended
    if process.exitcode:
        raise RuntimeError(
            f"{measure.__name__}{arguments} ended early, with exit code "
            f"{process.exitcode}: read the error above, and run it again"
        )


def _send(sender, measure, arguments) -> None:
    env.quiet()
    for row in measure(*arguments):
        sender.send(row)


def _received(receiver) -> dict | None:
    """Return the next row, or None when the process has ended."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def shared_out(measure, items, workers: int):
    """Yield `measure(item)` for each item, in order, from so many processes.

    Each process sees one GPU of the machine, if there is any, and they take turns.
    `measure` is a function at a module's top level.
    """
    context, variable = multiprocessing.get_context("spawn"), "CUDA_VISIBLE_DEVICES"
    count = max(1, torch.cuda.device_count())
    share = math.ceil(workers / count)
    found, was = {}, os.environ.get(variable)
    with contextlib.ExitStack() as stack:
        for gpu in range(count):
            pool = concurrent.futures.ProcessPoolExecutor(share, mp_context=context)
            stack.enter_context(pool)
            os.environ[variable] = str(gpu)  # its processes start as work is submitted
            for place in range(gpu, len(items), count):
                found[place] = pool.submit(_quietly, measure, items[place])
        os.environ.pop(variable)
        os.environ.update({} if was is None else {variable: was})
        for place in range(len(items)):
            yield found[place].result()


def _quietly(measure, item):
    env.quiet()
    return measure(item)


def record(name: str, rows, same: tuple) -> None:
    """Write each row to the recording `name` as soon as it arrives.

    Rows that agree in the fields `same` belong to one measurement. Its first new row
    replaces all its rows of earlier calls, in their place. Rows of other measurements
    stay, so what an interrupted benchmark has found so far is kept.
    """

    def measurement(row):
        return tuple(row.get(field) for field in same)

    groups, measured = {}, set()  # groups: the rows of each measurement, in file order
    if (pathlib.Path(FOLDER) / f"{name}.json").exists():
        for row in recordings.read(name, FOLDER)["rows"]:
            groups.setdefault(measurement(row), []).append(row)
    for row in rows:
        key = measurement(row)
        if key not in measured:
            groups[key] = []
            measured.add(key)
        groups[key].append(row)
        print(row, flush=True)
        written = [row for group in groups.values() for row in group]
        recorder.write(name, recorder.facts(), written, FOLDER)


def settings_of(steps=STEPS, batch=BATCH, rate=LEARNING_RATE):
    """Return the recipe's SFTConfig for this machine."""
    return train.sft_config(env.profile(), scratch(), steps, batch, rate)


def scratch() -> str:
    """Return a trainer's output folder. The recipe saves nothing, so it stays empty."""
    return str(env.cache_dir() / "benchmarks")


def recipe_trainer(base, tokenizer, settings, rank=16, dataset=None, validation=None):
    """Return a trainer of notebook 06's recipe, with new adapters on `base`.

    Alpha is twice the rank. `dataset` and `validation` hold prompts and completions;
    without `dataset`, the trainer gets the training questions of the course. Where the
    base is in 4 bits, `check_effective` has checked the trainer.
    """
    torch.manual_seed(settings.seed)  # the adapters start from random numbers
    model = get_peft_model(base, train.lora_config(rank, 2 * rank))
    if dataset is None:
        dataset = questions("train", tokenizer)
    trainer = train.build_trainer(model, tokenizer, dataset, settings, validation)
    if hasattr(base.config, "quantization_config"):
        train.check_effective(trainer, env.profile())
    return trainer


def questions(split: str, tokenizer) -> Dataset:
    """Return the prompts and completions of one split of the night-train task."""
    return records.to_prompt_completion(
        records.load(split), tokenizer, system=records.SYSTEM
    )


def test_questions(each: int | None = None) -> list[dict]:
    """Return all questions of the three test sets, or the first `each` of each set."""
    return [record for test in TESTS for record in records.load(test)[:each]]


def random_trainer(model, settings, lengths: list[int]):
    """Return a trainer over rows of random tokens, one row for each of `lengths`."""
    settings.output_dir = scratch()
    rows = [torch.randint(0, 1000, (length,)).tolist() for length in lengths]
    dataset = Dataset.from_dict({"input_ids": rows})
    return train.build_trainer(model, embedded_tokenizer(), dataset, settings)


def embedded_tokenizer():
    """Return the embedded Llama's tokenizer, which models of random weights use."""
    return AutoTokenizer.from_pretrained(embedded.embedded_dir())


def trained_tokens(trainer) -> int:
    """Return how many tokens a finished training run has read."""
    log = trainer.state.log_history
    return int([entry["num_tokens"] for entry in log if "loss" in entry][-1])


class StepTimes(TrainerCallback):
    """The seconds of each training step, in `seconds`."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def median(self, skip: int) -> float:
        """Return the median without the first `skip` steps, which find kernels."""
        return statistics.median(self.seconds[skip:] or self.seconds)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clean(model=None) -> None:
    """Give back what a run left, so that the next one starts as the first did."""
    for parameter in model.parameters() if model else ():
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gib(size: float, digits: int = 4) -> float:
    """Return bytes in GiB, rounded as a recording holds them."""
    return round(size / env.GIB, digits)


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """Return the first line of torch's message, for a row."""
    return str(error).splitlines()[0][:200]


def names_or_all(names: list[str], known) -> list[str]:
    """Return the names given on the command line, or all known ones if there are none.

    Exits with a message if a name is unknown.
    """
    if unknown := set(names) - set(known):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return names or list(known)
