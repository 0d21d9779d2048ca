"""The oracles of the exercises: each tries a reader's function and prints a verdict."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_linear_schedule_with_warmup,
)

from . import records, sql
from .embedded import embedded_dir


def _try(name, function, cases, same=lambda yours, expected: yours == expected):
    """True if the function gives what is expected in every case; prints one line.

    `cases` is a list of (arguments, expected). Nothing a reader's function raises
    stops the notebook.
    """
    for arguments, expected in cases:
        call = f"{function.__name__}({', '.join(map(_short, arguments))})"
        try:
            yours = function(*arguments)
        except Exception as error:  # a reader's function may raise anything
            print(f"{name}: not yet: {call} raises {type(error).__name__}: {error}")
            return False
        if yours is None or yours is ...:
            print(f"{name}: not yet: {call} returns nothing; write its body above")
            return False
        if not same(yours, expected):
            print(
                f"{name}: not yet: {call} gives yours {_short(yours)}, "
                f"expected {_short(expected)}"
            )
            return False
    print(f"{name}: right, in {len(cases)} of {len(cases)} cases")
    return True


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"


def check_long_haul(write_sql) -> bool:
    """Exercise 00.1: SQL for the long-haul trains of a city, run on all databases."""
    databases = [sql.open_database(text) for text in records.database_scripts()]

    def long_haul_from(city):
        query = write_sql(city)
        if query is None or query is ...:
            return None
        return [_rows(query, database) for database in databases]

    gold = "SELECT train FROM train WHERE home='{}' AND km>1000"
    cases = [
        ((city,), [_rows(gold.format(city), database) for database in databases])
        for city in ("Vienna", "Oslo", "Paris")
    ]
    return _try("exercise 00.1", long_haul_from, cases)


def _rows(query, database):
    """What a query finds, in no order; its error's text where it fails."""
    found = sql.run_sql(query, database)
    return found.error or sorted(found.rows)


def check_prompt(write_prompt) -> bool:
    """Exercise 00.2: the chat template by hand, equal to the tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir())
    questions = ["How many trips of the Owl were late?", "Trains from Oslo?"]
    cases = []
    for question in questions:
        record = {"instruction": question, "input": ""}
        expected = records.prompt(record, tokenizer)
        cases.append(((records.SYSTEM, question), expected))
    return _try("exercise 00.2", write_prompt, cases)


def check_lora_parameters(count) -> bool:
    """Exercise 06.1: LoRA's parameters from a shape alone, as PEFT counts them."""
    cases = []
    for r, hidden, intermediate, heads, kv_heads, layers in [
        (16, 576, 1536, 9, 3, 30),  # the embedded Llama
        (8, 256, 688, 8, 2, 3),
        (64, 4096, 14336, 32, 8, 32),  # Llama-3.1-8B
    ]:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=layers,
            vocab_size=128,
        )
        with torch.device("meta"):  # shapes without memory
            lora = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(LlamaForCausalLM(config), lora)
        expected = model.get_nb_trainable_parameters()[0]
        key_value = hidden // heads * kv_heads
        cases.append(((r, hidden, intermediate, key_value, layers), expected))
    return _try("exercise 06.1", count, cases)


def check_loss_mask(mask) -> bool:
    """Exercise 06.2: labels that carry loss on the completion alone."""
    cases = [
        (([5, 6], [5, 6, 7, 8]), [-100, -100, 7, 8]),
        (([1], [1, 2]), [-100, 2]),
        (([9, 9, 9], [9, 9, 9, 9]), [-100, -100, -100, 9]),
    ]
    return _try("exercise 06.2", mask, cases, lambda a, b: list(a) == b)


def check_learning_rate(schedule) -> bool:
    """Exercise 06.3: the linear schedule with warm-up, as transformers computes it."""
    cases = []
    for steps, warmup, peak in [(100, 5, 2e-3), (20, 5, 1e-4)]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        for step in range(steps):
            if step in (0, 1, warmup, steps // 2, steps - 1):
                expected = scheduler.get_last_lr()[0]
                cases.append(((step, steps, warmup, peak), expected))
            optimizer.step()
            scheduler.step()
    return _try(
        "exercise 06.3", schedule, cases, lambda a, b: abs(a - b) <= 1e-9 * (b + 1)
    )
