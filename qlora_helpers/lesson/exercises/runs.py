"""The oracles of 00 and 04 to 07: prompts, training runs, and the bytes they take."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_linear_schedule_with_warmup,
)

from qlora_helpers import memory, models, records, sql, train
from qlora_helpers.lesson.exercises.oracle import try_out
from qlora_helpers.memory import byte_formulas, planned_run
from qlora_helpers.models.embedded import embedded_dir


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
    return try_out("exercise 00.1", long_haul_from, cases)


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
        expected = records.prompt(record, tokenizer, records.SYSTEM)
        cases.append(((records.SYSTEM, question), expected))
    return try_out("exercise 00.2", write_prompt, cases)


def check_tokens_until(tokens_until) -> bool:
    """Exercise 04.1: where the plain loss takes more than the base model."""
    cases = []
    for shape in ("1B", "8B", "13B", "70B"):
        config, *run = train.configs(models.llama_config(shape), "qlora", 1, 512)
        size = sum(memory.predict(config, *run).weights.values())
        one = 12 * config.vocab_size
        cases.append(((config.vocab_size, size), size // one + 1))
    return try_out("exercise 04.1", tokens_until, cases)


def check_on_paper(on_paper) -> bool:
    """Exercise 04.2: the first layer's moment on paper, within 2 % of the predictor."""
    cases = []
    for shape, tokens in (("13B", 256), ("13B", 4096), ("65B", 2048)):
        config, *run = train.configs(models.llama_config(shape), "qlora", 1, tokens)
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        moments = memory.predict(config, *run).moments
        at = sum(moments["first layer: backward, down_proj"].values())
        cases.append(((*sizes, config.vocab_size, tokens), at))
    return try_out(
        "exercise 04.2", on_paper, cases, lambda a, b: 0.98 * b <= a <= 1.02 * b
    )


def check_first_rank(first_rank) -> bool:
    """Exercise 05.1: the least rank at which bitsandbytes pages any state."""
    cases = []
    for shape in ("1B", "8B", "13B", "70B"):
        config, base, lora, settings = train.configs(
            models.llama_config(shape), "qlora", 1, 64
        )
        for rank in range(1, 100):
            lora.r = rank
            if memory.predict(config, base, lora, settings).paged:
                break
        widths = [n for pair in models.projections(config).values() for n in pair]
        cases.append(((widths,), lora.r))
    return try_out("exercise 05.1", first_rank, cases)


def check_managed_bytes(managed_bytes) -> bool:
    """Exercise 05.2: the bytes of paged 8-bit states, as the predictor has them."""
    cases = []
    for shape, rank in (("1B", 8), ("1B", 64), ("8B", 16), ("8B", 64)):
        config, base, lora, settings = train.configs(
            models.llama_config(shape), "qlora", 1, 64
        )
        lora.r = rank
        run = planned_run.read(config, base, lora, settings, None)
        expected = memory.predict(config, base, lora, settings).paged
        cases.append(((byte_formulas.trained_tensors(run),), expected))
    return try_out("exercise 05.2", managed_bytes, cases)


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
    return try_out("exercise 06.1", count, cases)


def check_loss_mask(mask) -> bool:
    """Exercise 06.2: labels that carry loss on the completion alone."""
    cases = [
        (([5, 6], [5, 6, 7, 8]), [-100, -100, 7, 8]),
        (([1], [1, 2]), [-100, 2]),
        (([9, 9, 9], [9, 9, 9, 9]), [-100, -100, -100, 9]),
    ]
    return try_out("exercise 06.2", mask, cases, lambda a, b: list(a) == b)


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
    return try_out(
        "exercise 06.3", schedule, cases, lambda a, b: abs(a - b) <= 1e-9 * (b + 1)
    )


def check_held_bytes(held_bytes) -> bool:
    """Exercise 07.3: the most bytes that a merge by shards holds."""
    cases = []
    for name, shard, r in (("70B", 10**9, 16), ("8B", 5 * 10**9, 64), ("1B", 10**8, 8)):
        shape = models.SHAPES[name]
        hidden, intermediate = shape.hidden, shape.intermediate
        key_value = hidden // shape.heads * shape.kv_heads
        sides = 4 * hidden + 2 * (hidden + key_value) + 3 * (hidden + intermediate)
        numbers = (shard, hidden, intermediate, key_value, shape.layers, r)
        adapter = 2 * r * shape.layers * sides
        cases.append((numbers, shard + 4 * hidden * intermediate + adapter))
    return try_out("exercise 07.3", held_bytes, cases)
