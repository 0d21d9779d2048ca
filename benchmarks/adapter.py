"""Train the adapter that notebook 07 starts from: data/adapter, stored in fp16.

python benchmarks/adapter.py
"""

import json

import torch
from peft import get_peft_model
from recipe import BATCH, LEARNING_RATE, STEPS, TESTS

from qlora_helpers import env, evaluate, models, recorded, records, sql, train


def main() -> None:
    env.quiet()
    machine = env.profile()
    model, tokenizer = models.load_base(models.EMBEDDED, train.nf4_config(machine))
    model = get_peft_model(model, train.lora_config())
    dataset = records.to_prompt_completion(records.load("train"), tokenizer)
    folder = str(env.cache_dir() / "benchmark_adapter")
    settings = train.sft_config(machine, folder, STEPS, BATCH, LEARNING_RATE)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    train.check_effective(trainer, machine)
    trainer.train()
    databases = [sql.open_database(text) for text in records.database_scripts()]
    accuracy = {}
    for test in TESTS:
        judged = evaluate.execution_accuracy(
            model, tokenizer, records.load(test), databases
        )
        accuracy[f"{test}_percent"] = [round(100 * value, 1) for value in judged[:3]]
    saved = train.save_adapter(
        model,
        None,  # the base's tokenizer, unchanged
        env.ROOT / "data" / "adapter",
        models.base_identity(models.EMBEDDED),
        dtype=torch.float16,  # half the bytes; more digits than bf16 has
    )
    facts = recorded.facts() | {
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "compute_dtype": str(machine.compute_dtype),
        "accuracy": accuracy,
    }
    text = json.dumps(facts, indent=1) + "\n"
    (saved / "training.json").write_text(text, encoding="utf-8")
    print(accuracy)


if __name__ == "__main__":
    main()
