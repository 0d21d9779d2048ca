"""Train the two adapters that notebook 07 starts from, stored in fp16.

    python benchmarks/adapter.py          data/adapter
    python benchmarks/adapter.py delay    data/adapter_delay

The second is of rank 4, for another company: the same questions, on tables whose
column `late` is called `delay`.
"""

import json
import sys

import common
import torch

from qlora_helpers import adapters, env, models, records, score, sql, train
from tools import recorder

RANK = {"late": 16, "delay": 4}  # by what the column is called
FOLDER = {"late": "adapter", "delay": "adapter_delay"}


def main(column: str = "late") -> None:
    env.quiet()
    machine = env.profile()

    def named(record):
        return record | {"output": record["output"].replace("late", column)}

    system = records.SYSTEM.replace("late", column)
    base, tokenizer = models.load_base(models.EMBEDDED, train.nf4_config(machine))
    training = [named(record) for record in records.load("train")]
    dataset = records.to_prompt_completion(training, tokenizer, system=system)
    trainer = common.recipe_trainer(
        base, tokenizer, common.settings_of(), RANK[column], dataset
    )
    trainer.train()
    scripts = [text.replace("late", column) for text in records.database_scripts()]
    databases = [sql.open_database(text) for text in scripts]
    accuracy = {}
    for test in common.TESTS:
        questions = [named(record) for record in records.load(test)]
        judged = score.execution_accuracy(
            trainer.model, tokenizer, questions, databases, system=system
        )
        accuracy[f"{test}_percent"] = [round(100 * value, 1) for value in judged[:3]]
    place = env.ROOT / "data" / FOLDER[column]
    (place / "training.json").unlink(missing_ok=True)  # written again below
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # half the bytes; more digits than bf16 has
            parameter.data = parameter.data.to(torch.float16)
    saved = adapters.save_adapter(
        trainer.model,
        None,  # the base's tokenizer, unchanged
        place,
        models.base_identity(models.EMBEDDED),
    )
    facts = recorder.facts() | {
        "steps": common.STEPS,
        "batch": common.BATCH,
        "learning_rate": common.LEARNING_RATE,
        "compute_dtype": str(machine.compute_dtype),
        "accuracy": accuracy,
    }
    text = json.dumps(facts, indent=1) + "\n"
    (saved / "training.json").write_text(text, encoding="utf-8")
    print(accuracy)


if __name__ == "__main__":
    main(*sys.argv[1:])
