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
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_helpers import adapters, env, models, records, score, train

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("--model", help="a folder or Hub id; by default what fits this machine")
add("--data", help="a .jsonl or .csv file, or a Hub data set; by default 06's records")
add("--system", help="the system message of records that have none of their own")
add("--steps", type=int, default=100, help="optimizer steps (default 100)")
add("--batch", type=int, default=8, help="records a step (default 8)")
add("--learning-rate", type=float, help="default 2e-3 if embedded, else 2e-4")
add("--rank", type=int, default=16, help="of the adapters (default 16)")
add("--max-length", type=int, default=records.MAX_LENGTH, help="tokens of a record")
add("--output", default="my_adapter", help="folder; an adapter there is replaced")


def main(args: argparse.Namespace) -> None:
    machine = env.profile()
    env.quiet()
    name, rate, system = args.model or machine.base, args.learning_rate, args.system
    if rate is None:
        rate = 2e-3 if name == models.EMBEDDED else 2e-4
    if system is None and args.data is None:
        system = records.SYSTEM

    # what is wrong is said before minutes of training
    env.check_whole("rank", args.rank)
    env.check_whole("max_length", args.max_length)
    adapters.check_place(args.output)
    folder = str(env.cache_dir() / "example_run")
    settings = train.sft_config(
        machine, folder, args.steps, args.batch, rate, args.max_length
    )
    settings.eval_on_start = True
    given = records.load("train") if args.data is None else records.read(args.data)

    model, tokenizer = models.load_base(name, train.nf4_config(machine))
    torch.manual_seed(0)
    model = get_peft_model(model, train.lora_config(args.rank, 2 * args.rank))
    how = dict(system=system, max_length=args.max_length, skip_bad=True)
    dataset = records.to_prompt_completion(given, tokenizer, **how)
    if args.data is None:  # 06 has records with new wordings for this
        held_back = records.load("validation")
        validation = records.to_prompt_completion(held_back, tokenizer, **how)
    else:
        dataset, validation = records.hold_back(dataset)

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
        place = tempfile.mkdtemp(prefix="adapter_", dir=env.cache_dir())
        saved = adapters.save_adapter(model, tokenizer, place, identity)
        print(f"{error}; so the adapter is saved in the cache instead")

    del model, trainer  # a GPU may have no room for two bases
    gc.collect()
    torch.cuda.empty_cache()
    fresh, _ = models.load_base(name, train.nf4_config(machine))
    fresh = adapters.load_adapter(fresh, saved, identity)
    tokenizer = AutoTokenizer.from_pretrained(saved)  # it brings its chat template
    asked, expected = validation[0]["prompt"], validation[0]["completion"]
    [(text, _)] = score.generate_answers(fresh, tokenizer, [asked], max_new_tokens=128)
    print(f"question: {asked[-1]['content']}\nanswer: {text}")
    print(f"expected: {expected[0]['content']}\nthe adapter is in {saved}")


if __name__ == "__main__":
    main(parser.parse_args())
