"""Train and judge the recipe of notebook 06 over seeds, beside other choices.

    python benchmarks/recipe.py [workers] [first]

Writes data/measured/recipe.json. The embedded Llama, on whatever machine this is. The
runs are shared among so many processes (2 by default), and these among all GPUs that
the machine has, so the rows hold accuracies and losses, and no timings. `first` goes on
with that row of the plan, where an earlier call was stopped.

Each trained row reads 800 records (`steps` times `batch`), if its name does not say
otherwise, and has alpha at twice the rank. `base` says how the base's weights are kept,
"nf4" or "bf16". The adapters are in fp32, unless `adapters` says "bf16", TRL's choice
beside a 4-bit base. `verdicts` holds a 1 for each right answer: phrasing, values,
composition, 100 each.
"""

import itertools
import statistics
import sys
import time

import common
from common import BATCH, STEPS
from common import LEARNING_RATE as RATE

from qlora_helpers import env, models, records, score, train
from tools import recorder

SEEDS = (0, 1, 2)
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
RANKS = (4, 16, 64)
EXAMPLES = 6  # solved questions in the prompt of the base model
PROMPTS = {  # of the base model: the system message, and how many solved questions
    "asked as it is": (records.SYSTEM, 0),
    "told the house rules": (records.told(), 0),
    "six examples": (records.SYSTEM, EXAMPLES),
    "rules and six examples": (records.told(), EXAMPLES),
}


def planned() -> list[dict]:
    """The rows to be measured, each without its results."""
    rows = [
        {"run": f"base model, {prompt}", "base": base, "prompt": prompt}
        for base in ("nf4", "bf16")
        for prompt in PROMPTS
    ]
    recipe = {"base": "nf4", "rank": 16, "learning_rate": RATE}
    recipe |= {"steps": STEPS, "batch": BATCH, "sampling": "random"}
    variants = {"recipe": {}}
    for rate in (RATE, 1e-3):
        variants[f"16-bit LoRA, rate {rate:g}"] = {
            "base": "bf16",
            "learning_rate": rate,
        }
    for batch in (4, 16, 32):
        variants[f"batch {batch}"] = {"batch": batch, "steps": STEPS * BATCH // batch}
    for rate in (1e-3, 5e-3):
        half = {"batch": 16, "steps": 50, "learning_rate": rate}
        variants[f"batch 16, rate {rate:g}"] = half
    variants["batch 16, 1,600 records"] = {"batch": 16}
    variants["rows grouped by length"] = {"sampling": "group_by_length"}
    for rank, rate in itertools.product(RANKS, RATES):
        if (rank, rate) != (16, RATE):  # that is the recipe
            other = {"rank": rank, "learning_rate": rate}
            variants[f"rank {rank}, rate {rate:g}"] = other
    for rate in (RATE, 2e-4):
        cast = {"adapters": "bf16", "learning_rate": rate}
        variants[f"adapters in bf16, rate {rate:g}"] = cast
    low = {"learning_rate": 5e-5}
    variants["rank 16, rate 5e-05"] = low
    variants["adapters in bf16, rate 5e-05"] = low | {"adapters": "bf16"}
    for (name, changed), seed in itertools.product(variants.items(), SEEDS):
        rows.append({"run": name, "seed": seed} | recipe | changed)
    return rows


def measured(row: dict) -> dict:
    """The row with its results."""
    start = time.perf_counter()
    quantization = train.nf4_config(env.profile()) if row["base"] == "nf4" else None
    model, tokenizer = models.load_base(models.EMBEDDED, quantization)
    databases = records.open_databases()
    prompt, found = row.get("prompt", "asked as it is"), {}
    if "steps" in row:
        trainer = trainer_of(row, model, tokenizer)
        trainer.train()
        model, log = trainer.model, trainer.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        checks = [entry for entry in log if "eval_loss" in entry]
        found["tokens"] = common.trained_tokens(trainer)
        found["train_loss"] = round(statistics.mean(losses[-10:]), 5)
        found["validation_steps"] = [entry["step"] for entry in checks]
        found["validation_loss"] = [round(entry["eval_loss"], 5) for entry in checks]
    system, count = PROMPTS[prompt]
    questions = common.test_questions()
    asked = [records.few_shot(question, system, count) for question in questions]
    judged = score.execution_accuracy(model, tokenizer, asked, databases, system=None)
    runs = sum("error" not in row["reason"] for row in judged.rows)
    prose = env.path("data/prose.txt").read_text(encoding="utf-8")
    found["prose_perplexity"] = round(
        score.perplexity(model, tokenizer, prose).value, 2
    )
    found["runs_percent"] = round(100 * runs / judged.n, 1)
    found["stopped_percent"] = round(100 * judged.stopped, 1)
    found["verdicts"] = "".join(str(int(row["right"])) for row in judged.rows)
    found["seconds"] = round(time.perf_counter() - start)
    facts = recorder.facts()  # the file's are those of the last call only
    return row | found | {"gpu": facts["gpu"], "date": facts["date"]}


def trainer_of(row: dict, model, tokenizer):
    """The recipe's trainer, with the row's choices and the validation records."""
    settings = common.settings_of(row["steps"], row["batch"], row["learning_rate"])
    settings.seed = row["seed"]
    settings.train_sampling_strategy = row["sampling"]
    settings.eval_steps, settings.eval_on_start = row["steps"] // 5, True
    validation = common.questions("validation", tokenizer)
    trainer = common.recipe_trainer(
        model, tokenizer, settings, row["rank"], validation=validation
    )
    if row.get("adapters") == "bf16":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return trainer


def main(workers: int = 2, first: int = 0) -> None:
    rows = common.shared_out(measured, planned()[first:], workers)
    common.record("recipe", rows, same=("run", "base", "seed"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
