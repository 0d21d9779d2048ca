"""The oracles of the exercises: each tries a reader's function and prints a verdict."""

import functools

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_linear_schedule_with_warmup,
)

from qlora_helpers import memory, models, nf4, records, sql, train
from qlora_helpers.memory import byte_formulas, planned_run
from qlora_helpers.models.embedded import embedded_dir


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
    if isinstance(value, torch.Tensor) and value.numel() > 4:
        first = ", ".join(f"{number:.4g}" for number in value.flatten()[:4].tolist())
        return f"tensor of {tuple(value.shape)}: [{first}, ...]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if callable(value):
        return getattr(value, "__name__", "a function")  # repr holds an address
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]} ... {text[-50:]}"


def _near(yours, expected) -> bool:
    """True where two tensors, or two tuples of them, agree to fp32's precision."""
    if isinstance(expected, tuple):
        return len(yours) == len(expected) and all(map(_near, yours, expected))
    yours = torch.as_tensor(yours)
    return yours.shape == expected.shape and torch.allclose(
        yours.float(), expected, rtol=1e-4, atol=1e-6
    )


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
        expected = records.prompt(record, tokenizer, records.SYSTEM)
        cases.append(((records.SYSTEM, question), expected))
    return _try("exercise 00.2", write_prompt, cases)


def check_nf3(nf3_code) -> bool:
    """Exercise 01.1: eight levels from a Gaussian's quantiles, as NF4 has sixteen."""
    cases = []
    for top in (0.9330, 0.95):
        above = torch.special.ndtri(torch.linspace(top, 0.5, 5)[:-1].double())
        below = -torch.special.ndtri(torch.linspace(top, 0.5, 4)[:-1].double())
        code = torch.cat([below, torch.zeros(1), above.flip(0)]).float()
        cases.append(((top,), code / code.max()))
    return _try("exercise 01.1", nf3_code, cases, _near)


def check_gain(gain) -> bool:
    """Exercise 01.2: NF4's gain over INT4, in percent of INT4's error."""
    weight = torch.randn(2**16, generator=torch.Generator().manual_seed(7))
    cases = []
    for block in (32, 64, 1024):
        errors = []
        for code in (nf4.nf4_code(), nf4.int4_code()):
            packed, absmax = nf4.quantize(weight, code, block)
            stored = nf4.dequantize(packed, absmax, code, weight.shape, block)
            errors.append((stored - weight).pow(2).mean().sqrt())
        cases.append(((weight, block), 100 * (1 - errors[0] / errors[1])))
    return _try("exercise 01.2", gain, cases, _near)


def check_bits_per_weight(bits_per_weight) -> bool:
    """Exercise 02.1: weights, scales and smallest values, shared by a block."""
    cases = [
        ((4, 64, 32, False), 4.5),  # NF4 in bitsandbytes
        ((4, 32, 16, True), 5.0),  # GGUF's Q4_1
        ((4, 32, 16, False), 4.5),  # GGUF's Q4_0
        ((8, 256, 32, False), 8.125),
    ]
    return _try("exercise 02.1", bits_per_weight, cases)


def check_layer_bytes(layer_bytes) -> bool:
    """Exercise 02.2: every byte of a Linear4bit, as bitsandbytes has it."""
    cases = []
    for rows, columns in ((1536, 576), (64, 64), (33, 70), (3, 1000)):
        layer = Linear4bit(
            columns, rows, bias=False, quant_type="nf4", compress_statistics=True
        )
        layer = layer.to("cpu")  # this quantizes
        cases.append(((rows, columns), memory.tensor_bytes(layer.weight)))
    return _try("exercise 02.2", layer_bytes, cases)


def check_dropout(with_dropout) -> bool:
    """Exercise 03.1: dropout where PEFT has it, with the same random numbers."""
    cases = []
    for p in (0.1, 0.5):
        torch.manual_seed(3)
        base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["0"])
        layer = get_peft_model(base, lora).base_model.model[0].train()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(B)
        x = torch.randn(16, 24)
        torch.manual_seed(4)
        expected = layer(x).detach()
        W = layer.base_layer.weight
        cases.append(((x, W.detach(), A.detach(), B.detach(), 2.0, p), expected))

    @functools.wraps(with_dropout)
    def seeded(*arguments):
        torch.manual_seed(4)
        return with_dropout(*arguments)

    return _try("exercise 03.1", seeded, cases, _near)


def check_adapter_gradients(adapter_gradients) -> bool:
    """Exercise 03.2: the gradients of A and of B, as autograd finds them."""
    cases = []
    for rows, width, out, r in ((5, 7, 3, 2), (16, 24, 40, 4)):
        generator = torch.Generator().manual_seed(rows)
        x, A, B, grad = (
            torch.randn(shape, generator=generator)
            for shape in ((rows, width), (r, width), (out, r), (rows, out))
        )
        ours = [A.clone().requires_grad_(), B.clone().requires_grad_()]
        y = 0.5 * (x @ ours[0].T) @ ours[1].T
        expected = torch.autograd.grad(y, ours, grad)
        cases.append(((x, A, B, 0.5, grad), tuple(expected)))
    return _try("exercise 03.2", adapter_gradients, cases, _near)


def check_tokens_until(tokens_until) -> bool:
    """Exercise 04.1: where the plain loss takes more than the base model."""
    cases = []
    for shape in ("1B", "8B", "13B", "70B"):
        config, *run = train.configs(models.llama_config(shape), "qlora", 1, 512)
        size = sum(memory.predict(config, *run).weights.values())
        one = 12 * config.vocab_size
        cases.append(((config.vocab_size, size), size // one + 1))
    return _try("exercise 04.1", tokens_until, cases)


def check_on_paper(on_paper) -> bool:
    """Exercise 04.2: the first layer's moment on paper, within 2 % of the predictor."""
    cases = []
    for shape, tokens in (("13B", 256), ("13B", 4096), ("65B", 2048)):
        config, *run = train.configs(models.llama_config(shape), "qlora", 1, tokens)
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        moments = memory.predict(config, *run).moments
        at = sum(moments["first layer: backward, down_proj"].values())
        cases.append(((*sizes, config.vocab_size, tokens), at))
    return _try(
        "exercise 04.2", on_paper, cases, lambda a, b: 0.98 * b <= a <= 1.02 * b
    )


def check_first_rank(first_rank) -> bool:
    """Exercise 05.1: the least rank at which bitsandbytes pages any state."""
    cases = []
    for shape in ("1B", "8B", "13B", "70B"):
        config, base, lora, settings = train.configs(
            models.llama_config(shape), "qlora", 1, 64
        )
        for lora.r in range(1, 100):
            if memory.predict(config, base, lora, settings).paged:
                break
        widths = [n for pair in models.projections(config).values() for n in pair]
        cases.append(((widths,), lora.r))
    return _try("exercise 05.1", first_rank, cases)


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
    return _try("exercise 05.2", managed_bytes, cases)


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


def check_surviving_share(surviving_share) -> bool:
    """Exercise 07.1: the share of a change that a way of storing weights keeps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    change = 0.1 * torch.randn(64, 64, generator=generator)

    def expected(weight, change, stored):
        kept = stored(weight + change) - stored(weight)
        return (kept * change).sum() / change.square().sum()

    def coarse(weight):  # whole numbers
        return weight.round()

    def scaled(weight):
        return 0.5 * weight

    cases = [
        ((base, change, stored), expected(base, change, stored))
        for base, stored in (
            (weight, coarse),
            (weight.round(), coarse),
            (weight, scaled),
        )
    ]
    return _try("exercise 07.1", surviving_share, cases, _near)


def check_merged_at(merged_at) -> bool:
    """Exercise 07.2: a weight with an adapter merged at some strength."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    A, B = (
        torch.randn(2, 4, generator=generator),
        torch.randn(6, 2, generator=generator),
    )
    cases = [
        ((weight, A, B, alpha, 2, strength), weight + strength * alpha / 2 * (B @ A))
        for alpha, strength in ((4, 1), (4, 0), (2, 0.5))
    ]
    return _try("exercise 07.2", merged_at, cases, _near)


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
    return _try("exercise 07.3", held_bytes, cases)
