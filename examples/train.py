"""Fine-tune a Llama with QLoRA on your own records: the training of notebook 06.

    python examples/train.py --data my_chats.jsonl --system "Be brief." --steps 200
    python examples/train.py --model meta-llama/Llama-3.1-8B --data tatsu-lab/alpaca

The records have Alpaca's columns, or chats in `messages`. Those that cannot be trained
on are left out and counted. Some are held back for the validation loss. The last lines
show one answer of the reloaded adapter; 06 measures how many are right. An interrupt
saves nothing.
"""

import argparse
import gc
import pathlib
import re
import sys
import tempfile

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qlora_helpers import adapters, env, models, records, score, train

NIGHT_TRAINS = "night_trains"
HELD_BACK = 64  # records for the validation loss, or a tenth of all if that is fewer
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
# not looked up on the Hub
FILES = (".jsonl", ".csv", ".json", ".tsv", ".txt", ".parquet", ".xlsx")
ANSWER = 128  # tokens of the answer that is shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a folder or Hub id; by default what fits this machine")
    add("--data", default=NIGHT_TRAINS, help="a .jsonl or .csv file, or a Hub data set")
    add("--system", help="the system message of records that have none of their own")
    add("--steps", type=int, default=100, help="optimizer steps (default 100)")
    add("--batch", type=int, default=8, help="records a step (default 8)")
    add("--learning-rate", type=float, help="default 2e-3 if embedded, else 2e-4")
    add("--rank", type=int, default=16, help="of the adapters (default 16)")
    add("--max-length", type=int, default=records.MAX_LENGTH, help="tokens of a record")
    add("--output", default="my_adapter", help="folder of the adapter (my_adapter)")
    return parser.parse_args()


def read(data: str):
    """The records of the night trains, of a file, or of a data set of the Hub."""
    if data == NIGHT_TRAINS:
        return records.load("train")
    file = pathlib.Path(data).expanduser()
    is_file = file.exists() or file.suffix.lower() in FILES
    if is_file or not ON_THE_HUB.fullmatch(data):
        return records.read(data)  # or refused there, with a reason
    try:
        return load_dataset(data, split="train")
    except (OSError, ValueError) as error:  # unknown, private, or no connection
        raise FileNotFoundError(
            f"{data!r} is no file here, and the Hub gave no data set of this name "
            f"({str(error).strip().splitlines()[0]}): give the path of a .jsonl or "
            ".csv file, or OWNER/NAME"
        ) from None


def main() -> None:
    args, machine = arguments(), env.profile()
    env.quiet()
    name = args.model or machine.base
    rate, system = args.learning_rate, args.system
    if rate is None:
        rate = 2e-3 if name == models.EMBEDDED else 2e-4
    if system is None and args.data == NIGHT_TRAINS:
        system = records.SYSTEM
    env.check_whole("rank", args.rank)
    env.check_whole("max_length", args.max_length)
    adapters.check_place(args.output)  # before minutes of training
    if (pathlib.Path(args.output).expanduser() / adapters.CONFIG).exists():
        print(f"the adapter in {args.output} will be replaced")
    folder = str(env.cache_dir() / "example_run")
    settings = train.sft_config(
        machine, folder, args.steps, args.batch, rate, args.max_length
    )
    given = read(args.data)

    model, tokenizer = models.load_base(name, train.nf4_config(machine))
    torch.manual_seed(0)
    model = get_peft_model(model, train.lora_config(args.rank, 2 * args.rank))
    dataset = records.to_prompt_completion(
        given, tokenizer,
        system=system, max_length=args.max_length, skip_bad=True,
    )  # fmt: skip
    if len(dataset) < 2:
        raise ValueError(f"{args.data} has one record to train on: give two or more")
    if args.data == NIGHT_TRAINS:  # which has records with new wordings for this
        validation = records.to_prompt_completion(
            records.load("validation"), tokenizer,
            system=system, max_length=args.max_length,
        )  # fmt: skip
    else:
        held = max(1, min(HELD_BACK, len(dataset) // 10))
        parts = dataset.train_test_split(test_size=held, seed=0)
        dataset, validation = parts["train"], parts["test"]
        known = {tuple(ids) for ids in dataset["input_ids"]}
        if double := sum(tuple(ids) in known for ids in validation["input_ids"]):
            print(
                f"{double} of the {held} records held back occur in training too, so "
                "the validation loss is too low: remove the duplicates"
            )

    settings.eval_on_start = True
    trainer = train.build_trainer(model, tokenizer, dataset, settings, validation)
    train.check_effective(trainer, machine)
    trainer.train()
    losses = [row for row in trainer.state.log_history if "eval_loss" in row]
    for row in (losses[0], losses[-1]):
        print(f"validation loss after {row['step']} steps: {row['eval_loss']:.3f}")

    identity = models.base_identity(name)
    try:
        saved = adapters.save_adapter(model, tokenizer, args.output, identity)
    except OSError as error:  # such as a full disk, or a file that came in meanwhile
        print(f"{error}; so the adapter is saved in the cache instead")
        place = tempfile.mkdtemp(prefix="adapter_", dir=env.cache_dir())
        saved = adapters.save_adapter(model, tokenizer, place, identity)
    del model, trainer
    gc.collect()
    torch.cuda.empty_cache()
    fresh, _ = models.load_base(name, train.nf4_config(machine))
    fresh = adapters.load_adapter(fresh, saved, identity)
    tokenizer = AutoTokenizer.from_pretrained(saved)  # it brings its chat template
    asked = validation[0]
    [(text, _)] = score.generate_answers(
        fresh, tokenizer, [asked["prompt"]], max_new_tokens=ANSWER
    )
    print(f"question: {asked['prompt'][-1]['content']}\nanswer: {text}")
    print(f"expected: {asked['completion'][0]['content']}\nthe adapter is in {saved}")


if __name__ == "__main__":
    main()
