"""The oracles of 00 and 04 to 07: prompts, training runs, and the bytes they take."""

import functools
import math

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.optimization import get_linear_schedule_with_warmup

from qlora_helpers import memory, models, records, score, sql, train
from qlora_helpers.lesson.exercises.oracle import try_out
from qlora_helpers.models.embedded import embedded_dir

SHAPES = ("1B", "8B", "13B", "70B")
EDGE = "INSERT INTO train VALUES ('Edge','Vienna',1000),('Over','Vienna',1001);"


def check_long_haul(write_sql) -> bool:
    """Exercise 00.1: SQL for the long-haul trains of a city, run on all databases."""
    scripts = records.database_scripts()
    databases = [sql.open_database(text + EDGE) for text in scripts]

    def found(query):
        results = [sql.run_sql(query, database) for database in databases]
        return [result.error or sorted(result.rows, key=repr) for result in results]

    def long_haul_from(city):
        query = write_sql(city)
        return query if query is None or query is ... else found(query)

    gold = "SELECT train FROM train WHERE home='{}' AND km>1000"
    cities = ("Vienna", "Oslo", "Paris")
    cases = [((city,), found(gold.format(city))) for city in cities]
    return try_out("exercise 00.1", long_haul_from, cases)


def check_prompt(write_prompt) -> bool:
    """Exercise 00.2: the chat template by hand, equal to the tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir())
    cases = []
    for system, question in (
        (records.SYSTEM, "How many trips of the Owl were late?"),
        ("Answer in one word.", "Where does the Owl start?"),
    ):
        expected = records.prompt({"instruction": question}, tokenizer, system)
        cases.append(((system, question), expected))
    return try_out("exercise 00.2", write_prompt, cases)


def check_tokens_until(tokens_until) -> bool:
    """Exercise 04.1: where the plain loss takes more than the base model."""
    cases = []
    for config in map(models.llama_config, SHAPES):
        size = sum(_predicted(config).weights.values())
        expected = size // (12 * config.vocab_size) + 1
        cases.append(((config.vocab_size, size), expected))
    return try_out("exercise 04.1", tokens_until, cases)


def check_on_paper(on_paper) -> bool:
    """Exercise 04.2: the first layer's moment on paper, within 2 % of the predictor."""
    cases = []
    for shape, tokens in (("13B", 256), ("13B", 4096), ("65B", 2048)):
        config = models.llama_config(shape)
        hidden, intermediate, _, layers = _sizes(config)
        moments = _predicted(config, tokens=tokens).moments
        at = sum(moments["first layer: backward, down_proj"].values())
        cases.append(((hidden, intermediate, layers, config.vocab_size, tokens), at))
    near = functools.partial(math.isclose, rel_tol=0.02)
    return try_out("exercise 04.2", on_paper, cases, near)


def check_first_rank(first_rank) -> bool:
    """Exercise 05.1: the least rank at which bitsandbytes pages any state."""
    cases = []
    for config in map(models.llama_config, SHAPES):
        ranks = (rank for rank in range(1, 100) if _predicted(config, rank).paged)
        cases.append(((_widths(config),), next(ranks)))
    return try_out("exercise 05.1", first_rank, cases)


def check_managed_bytes(managed_bytes) -> bool:
    """Exercise 05.2: the bytes of paged 8-bit states, as the predictor has them."""
    cases = []
    for shape, rank in (("1B", 8), ("1B", 64), ("8B", 16), ("8B", 64)):
        config = models.llama_config(shape)
        in_layer = [rank * width for width in _widths(config)]
        sizes = in_layer * config.num_hidden_layers
        cases.append(((sizes,), _predicted(config, rank).paged))
    return try_out("exercise 05.2", managed_bytes, cases)


def check_lora_parameters(count) -> bool:
    """Exercise 06.1: LoRA's parameters from a shape alone, as PEFT counts them."""
    cases = []
    for model, rank in (("embedded", 16), ("1B", 8), ("8B", 64)):
        config = models.config_of(model)
        with torch.device("meta"):  # shapes without memory
            lora = LoraConfig(r=rank, target_modules="all-linear")
            adapted = get_peft_model(LlamaForCausalLM(config), lora)
        expected, _ = adapted.get_nb_trainable_parameters()
        cases.append(((rank, *_sizes(config)), expected))
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
    for steps, warmup, peak in [(100, 5, 2e-3), (20, 4, 1e-4)]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        for step in (0, 1, warmup - 1, warmup, steps // 2, steps - 1):
            expected = peak * scheduler.lr_lambdas[0](step)
            cases.append(((step, steps, warmup, peak), expected))
    near = functools.partial(math.isclose, abs_tol=1e-9)
    return try_out("exercise 06.3", schedule, cases, near)


def check_exact_p(exact_p) -> bool:
    """Exercise 07.1: the two-sided p of an exact test of answers lost and gained."""
    cases = []
    for lost, gained in ((13, 0), (3, 12), (25, 19), (5, 5), (0, 0)):
        before = [1] * lost + [0] * gained
        expected = score.paired_test(before, [1 - right for right in before]).p
        cases.append(((lost, gained), expected))
    near = functools.partial(math.isclose, rel_tol=1e-6)
    return try_out("exercise 07.1", exact_p, cases, near)


def _predicted(config, rank=16, tokens=64):
    """The predicted memory of a QLoRA run with one row."""
    config, base, lora, settings = train.configs(config, "qlora", 1, tokens)
    lora.r = rank
    return memory.predict(config, base, lora, settings)


def _sizes(config) -> tuple[int, int, int, int]:
    """Hidden, intermediate, width of keys and values, and layers of a Llama."""
    key_value, hidden = models.projections(config)["k_proj"]
    return hidden, config.intermediate_size, key_value, config.num_hidden_layers


def _widths(config) -> list[int]:
    """Outputs and inputs of the matrices of a Llama's layer."""
    pairs = models.projections(config).values()
    return [width for pair in pairs for width in pair]
