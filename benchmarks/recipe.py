"""Train and judge the recipe of notebook 06 over seeds, beside other choices.

    python benchmarks/recipe.py [workers]

Writes data/measured/recipe.json. The embedded Llama, on whatever machine this is; with
several workers, one GPU serves several runs at once (accuracies, no timings).
"""

import concurrent.futures
import multiprocessing
import sys

import common
from adapter import TESTS
from common import BATCH, STEPS

from qlora_helpers import env, models, records, score, sql, train

EXAMPLES = 6  # solved questions in the prompt of the base model

RUNS = {  # name: (kind, seed, steps, batch, sampling)
    "base model, asked as it is": ("base", 0, 0, 0, ""),
    "base model, six examples in prompt": ("examples", 0, 0, 0, ""),
    "recipe, seed 0": ("train", 0, STEPS, BATCH, "random"),
    "recipe, seed 1": ("train", 1, STEPS, BATCH, "random"),
    "recipe, seed 2": ("train", 2, STEPS, BATCH, "random"),
    "batch 16, half the steps": ("train", 0, STEPS // 2, 2 * BATCH, "random"),
    "rows grouped by length": ("train", 0, STEPS, BATCH, "group_by_length"),
}


def with_examples(record: dict, tokenizer) -> str:
    """A prompt that first solves six training questions of different families."""
    chosen, seen = [], set()
    for example in records.load("train"):
        if example["family"] not in seen and len(chosen) < EXAMPLES:
            seen.add(example["family"])
            chosen.append(example)
    chat = records.messages(record, records.SYSTEM)[:1]
    for example in chosen:
        chat += records.messages(example, None)
        chat.append({"role": "assistant", "content": example["output"]})
    chat += records.messages(record, None)
    return tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def run(name: str) -> dict:
    """One row: the run's name, its accuracy on each test set, its tokens."""
    kind, seed, steps, batch, sampling = RUNS[name]
    env.quiet()
    quantization = train.nf4_config(env.profile())
    model, tokenizer = models.load_base(models.EMBEDDED, quantization)
    databases = records.open_databases()
    row = {"run": name, "seed": seed, "steps": steps, "batch": batch, "tokens": 0}
    if kind == "train":
        settings = common.settings_of(steps, batch)
        settings.seed = seed
        settings.train_sampling_strategy = sampling
        trainer = common.recipe_trainer(model, tokenizer, settings)
        trainer.train()
        model = trainer.model
        row["tokens"] = common.trained_tokens(trainer)
    for test in TESTS:
        questions = records.load(test)
        if kind == "examples":
            prompts = [with_examples(question, tokenizer) for question in questions]
            answers = score.generate_answers(model, tokenizer, prompts)
            right = [
                sql.judge(sql.extract_sql(text), question, databases).right
                for (text, _), question in zip(answers, questions, strict=True)
            ]
            found = score.bootstrap_interval(right)
        else:
            judged = score.execution_accuracy(
                model, tokenizer, questions, databases, system=records.SYSTEM
            )
            found = judged[:3]
        for field, value in zip(("", "low_", "high_"), found, strict=True):
            row[f"{test}_{field}percent"] = round(100 * value, 1)
    return row


def main(workers: int = 1) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        common.record("recipe", pool.map(run, RUNS), same=("run",))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
