"""The byte formulas against the libraries' own code: rehearsed, and run on this CPU."""

import copy
import dataclasses
import json
import subprocess
import sys
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from qlora_helpers import env, memory, models, train
from qlora_helpers.lesson import recordings
from qlora_helpers.memory import (
    byte_formulas,
    fit,
    measuring,
    planned_run,
    prediction,
    rehearse,
)
from qlora_helpers.memory.planned_run import FUSED_LOSS, Extras
from qlora_helpers.models import shapes
from qlora_helpers.models.embedded import embedded_dir

CPU = Extras(device="cpu")
pytestmark = pytest.mark.skipif(
    not FUSED_LOSS, reason="the formulas are those of TRL 1.15 and later"
)


def nf4(double=True, dtype=torch.bfloat16):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def lora(**changes):
    given = {"r": 16, "target_modules": train.PROJECTIONS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**given | changes)


def sft(rows=1, length=256, dtype=torch.bfloat16, every=1, **changes):
    given = {
        "output_dir": "never_written",
        "use_cpu": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "per_device_train_batch_size": rows,
        "max_length": length,
        "gradient_checkpointing": bool(every),
        "optim": "paged_adamw_8bit",
    }
    if every:
        details = {"use_reentrant": False, "every_n_layers": every}
        given["gradient_checkpointing_kwargs"] = details
    return SFTConfig(**given | changes)


def short(shape, layers=3, dtype=None):
    """A shape's config with few layers: each layer's bytes are the same."""
    config = models.llama_config(shape)
    config.num_hidden_layers = layers
    config.dtype = dtype
    return config


def without_what_is_not_rehearsed(prediction):
    """The predicted peak of forward and backward pass alone."""
    left_out = prediction.kinds["optimizer"] + prediction.kinds["workspaces"]
    return max(
        sum(kinds.values()) - left_out
        for name, kinds in prediction.moments.items()
        if "optimizer" not in name
    )


Q = (nf4(), lora())
RUNS = {
    "8B, long": (short("8B"), *Q, sft(1, 2048), None),
    "1B, many short rows": (short("1B"), *Q, sft(8, 96), None),
    "1B, no checkpointing": (short("1B"), *Q, sft(2, 512, every=0), None),
    "3B, every second layer": (short("3B", 4), *Q, sft(2, 512, every=2), None),
    "3B, the last one too": (short("3B"), *Q, sft(2, 512, every=2), None),
    "13B, no double quantization": (short("13B"), nf4(False), lora(), sft(), None),
    "70B": (short("70B", 2), *Q, sft(2, 1024), None),
    "fp16": (
        short("3B"),
        nf4(dtype=torch.float16),
        lora(),
        sft(2, 512, torch.float16),
        None,
    ),
    "fp16, no checkpointing": (
        short("8B"),
        nf4(dtype=torch.float16),
        lora(),
        sft(1, 512, torch.float16, every=0),
        None,
    ),
    "fp16, shared keys and values": (
        short("8B"),
        nf4(dtype=torch.float16),
        lora(),
        sft(1, 512, torch.float16, every=0),
        Extras(repeat_kv=False),
    ),
    "kbit casts": (short("3B"), *Q, sft(4, 512), Extras(kbit_casts=True)),
    "kbit casts, no checkpointing": (
        short("3B"),
        *Q,
        sft(4, 512, every=0),
        Extras(kbit_casts=True),
    ),
    "full logits": (short("1B"), *Q, sft(2, 512), Extras(full_logits=True)),
    "attention alone, r=64": (
        short("3B"),
        nf4(),
        lora(r=64, target_modules=["q_proj", "v_proj"]),
        sft(2, 512, every=0),
        None,
    ),
    "16-bit LoRA": (short("3B"), None, lora(), sft(2, 512), None),
    "16-bit LoRA, no checkpointing": (
        short("3B"),
        None,
        lora(),
        sft(2, 512, every=0),
        None,
    ),
    "full, tied": (short("1B"), None, None, sft(2, 512, optim="adamw_torch"), None),
    "full, not tied": (
        short("8B", 2),
        None,
        None,
        sft(2, 512, every=0, optim="adamw_torch"),
        None,
    ),
    "on a CPU": (
        short("tiny", 3),
        nf4(dtype=torch.float32),
        lora(),
        sft(4, 128, torch.float32, every=0),
        CPU,
    ),
    "on a CPU in bf16, dropout": (
        short("1B"),
        nf4(),
        lora(lora_dropout=0.1),
        sft(2, 128, every=0),
        CPU,
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_predicted_is_what_the_libraries_allocate(run):
    configs = RUNS[run]
    predicted, rehearsed = memory.predict(*configs), rehearse.step(*configs)
    weights = predicted.kinds["base weights"] + predicted.kinds["adapters"]
    assert weights == pytest.approx(rehearsed["weights"], abs=4096)  # rotary buffers
    assert predicted.kept == pytest.approx(rehearsed["kept"], rel=0.01)
    peak = without_what_is_not_rehearsed(predicted)
    assert peak == pytest.approx(rehearsed["peak"], rel=0.01)
    # what is neither base model nor adapter: the part that is hard to say
    assert peak - weights == pytest.approx(
        rehearsed["peak"] - rehearsed["weights"], rel=0.06
    )


def test_a_rehearsal_leaves_no_trace():
    mask = rehearse.modeling_llama.create_causal_mask
    tile = rehearse.head._forward_tile
    shares = rehearse.sdpa_attention.use_gqa_in_sdpa
    rehearse.step(*RUNS["fp16"])
    assert rehearse.modeling_llama.create_causal_mask is mask
    assert rehearse.head._forward_tile is tile
    assert rehearse.sdpa_attention.use_gqa_in_sdpa is shares
    assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("setting", planned_run.TABLES["LlamaConfig"]["whole"].split())
def test_a_size_that_is_no_whole_number_is_refused(setting):
    for value in (0, -8, 2.5):
        config = short("1B")
        vars(config)[setting] = value
        with pytest.raises(ValueError, match=f"model_config.{setting} is {value}: "):
            memory.predict(config, *Q, sft())


def test_a_dtype_that_the_4_bit_weights_compute_in_changes_nothing():
    usual = memory.predict(short("1B"), *Q, sft())
    assert memory.predict(short("1B", dtype=torch.bfloat16), *Q, sft()) == usual


@pytest.mark.parametrize("heads", [1, 2, 8, 32])
def test_repeated_keys_and_values_are_as_wide_as_the_queries(heads):
    """One head of keys is only viewed as many; and 32 heads share nothing."""
    config = short("8B", 1)
    config.num_key_value_heads = heads
    run = config, nf4(dtype=torch.float16), lora(), sft(1, 64, torch.float16, every=0)
    shared, repeated = Extras(repeat_kv=False), Extras(repeat_kv=True)
    predicted = [memory.predict(*run, how).kept for how in (shared, repeated)]
    rehearsed = [rehearse.step(*run, how)["kept"] for how in (shared, repeated)]
    wider = 0 if heads == 1 else 64 * 2 * 2 * 128 * (32 - heads)  # bytes
    assert predicted[1] - predicted[0] == rehearsed[1] - rehearsed[0] == wider
    assert memory.predict(*run).kept == predicted[1]  # as the recipe does in fp16


# ---- against a run on this machine


def run_on_this_machine(tmp_path, every, optim="adamw_torch", r=16, length=64):
    machine, rows = env.profile(), 2
    dtype = machine.compute_dtype
    settings = sft(
        rows,
        length,
        dtype,
        every,
        optim=optim,
        output_dir=str(tmp_path),
        max_steps=2,
        use_cpu=machine.use_cpu,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    quantization = nf4(dtype=dtype)
    base = models.random_llama("tiny", quantization)
    model = get_peft_model(base, lora(r=r))
    ids = torch.randint(0, 1000, (2 * rows, length)).tolist()
    data = Dataset.from_dict({"input_ids": ids})
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir())
    trainer = train.build_trainer(model, tokenizer, data, settings)
    configs = (base.config, quantization, lora(r=r), settings)
    return trainer, memory.predict(*configs, Extras(device=machine.device.type))


@pytest.mark.parametrize("every", [0, 1])
def test_predicted_is_what_a_run_takes(tmp_path, every):
    trainer, predicted = run_on_this_machine(tmp_path, every)
    measured = memory.measure(trainer)
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.02)
    assert predicted.kinds["base weights"] == measured["base model"]
    assert predicted.kinds["adapters"] == measured["adapters"]
    assert predicted.kinds["optimizer"] == measured["optimizer"]
    parts = ("base model", "adapters", "optimizer", "passing")
    assert measured["peak"] == sum(measured[kind] for kind in parts)


def test_states_in_8_bits(tmp_path):
    """Also: without a GPU nothing is paged."""
    trainer, predicted = run_on_this_machine(tmp_path, 1, "paged_adamw_8bit", 64)
    trainer.train()
    states = memory.state_bytes(trainer.model, trainer.optimizer)["optimizer"]
    if env.profile().use_cpu:
        assert predicted.paged == 0
        assert predicted.kinds["optimizer"] == states


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_trains_keeps_32_bit_states(tmp_path, tied):
    config = models.llama_config("tiny")
    config.tie_word_embeddings, config.dtype = tied, torch.float32
    settings = SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=64,
        optim="adamw_bnb_8bit",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(copy.deepcopy(config)),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": [[*range(10, 74)]] * 2}),
        processing_class=AutoTokenizer.from_pretrained(embedded_dir()),
    )
    trainer.train()
    states = memory.state_bytes(trainer.model, trainer.optimizer)["optimizer"]
    predicted = memory.predict(config, None, None, settings, Extras(device="cpu"))
    assert predicted.kinds["optimizer"] == states


def test_only_large_tensors_are_paged():
    small = memory.predict("8B", nf4(), lora(target_modules=["q_proj"], r=24), sft())
    large = memory.predict("8B", nf4(), lora(target_modules=["q_proj"], r=25), sft())
    assert small.paged == 0  # 24 x 4096 numbers are fewer than 100,000
    assert large.paged == 32 * 2 * (2 * 25 * 4096)  # both matrices, both states


def test_gradients_stay_where_they_are_accumulated():
    once = memory.predict("8B", *Q, sft(4, 2048))
    more = memory.predict("8B", *Q, sft(4, 2048, gradient_accumulation_steps=2))
    assert once.moment == more.moment  # in the last layer
    grown = more.kinds["gradients"] - once.kinds["gradients"]
    assert more.peak - once.peak == grown > 0.9 * more.kinds["gradients"]


def test_adamw_that_is_not_fused_needs_more_for_its_step():
    moments = [
        memory.predict("1B", None, None, sft(optim=name)).moments
        for name in ("adamw_torch_fused", "adamw_torch")
    ]
    step = [sum(found["the optimizer's step"].values()) for found in moments]
    # as much again as one number of each weight, in 16 bits
    assert step[1] - step[0] == pytest.approx(2 * 1_235_814_400, rel=1e-3)


def test_weights_of_a_real_model_to_the_byte():
    for double in (True, False):
        dtype = env.profile().compute_dtype
        base = models.random_llama("tiny", nf4(double, dtype))
        predicted = memory.predict(
            base.config, nf4(double, dtype), lora(), sft(dtype=dtype), CPU
        )
        measured = sum(memory.tensor_bytes(p) for p in base.parameters())
        assert sum(predicted.weights.values()) == measured
        on_cuda = memory.predict(
            base.config, nf4(double, dtype), lora(), sft(dtype=dtype)
        )
        tensors = [t for p in base.parameters() for t in measuring.stored_tensors(p)]
        blocks = sum(-(-t.nbytes // 512) * 512 for t in tensors)  # torch's, on CUDA
        assert sum(on_cuda.weights.values()) == blocks > measured


# ---- against what was recorded on a GPU

GRID = recordings.read("memory_grid")["rows"]


def configs_of(row):
    """What a recorded run was trained with; it did not repeat keys and values."""
    sizes = row["method"], row["rows"], row["length"], row["every"]
    config = models.llama_config(row["shape"])
    run = train.configs(config, *sizes, env.profile_of(row["profile"]))
    return *run, Extras(repeat_kv=False)


def name_of(row):
    how = f"{row['shape']} {row['method']} {row['rows']}x{row['length']}"
    return f"{how} every {row['every']} cap {row['cap_gib']}"


def test_the_grid_is_what_was_asked_for():
    assert len(GRID) >= 24
    assert {row["shape"] for row in GRID} >= {"1B", "3B", "8B", "13B", "34B", "70B"}
    assert {row["method"] for row in GRID} == {"full", "lora", "qlora"}
    assert {row["length"] for row in GRID} >= {512, 8192}
    assert {row["rows"] for row in GRID} >= {1, 8}
    assert {row["every"] for row in GRID} == {0, 1, 2}


def test_the_predictions_beside_the_rows_are_the_committed_ones():
    file = env.ROOT / "benchmarks" / "memory_grid_predicted.json"
    said = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(said) == len(GRID)
    for before, row in zip(said, GRID, strict=True):
        assert before == {key: row[key] for key in before}


@pytest.mark.parametrize("row", GRID, ids=name_of)
def test_predicted_is_what_a_gpu_took(row):
    """What was predicted before the run was made, and what is predicted today."""
    predicted = memory.predict(*configs_of(row))
    assert predicted.peak / env.GIB == pytest.approx(row["predicted_gib"], abs=1e-4)
    assert row["predicted_gib"] == pytest.approx(row["peak_gib"], rel=0.05)
    weights = row["predicted_weights_gib"]
    rest = row["predicted_gib"] - weights, row["peak_gib"] - weights
    assert rest[0] == pytest.approx(rest[1], rel=0.15)


def test_what_torch_needs_is_not_less_than_the_peak():
    for row in GRID:
        answer = fit.will_it_fit(
            row["shape"], 80, row["method"], row["rows"], row["length"]
        )
        if row["every"] == 1:
            assert answer.needed_gib > row["peak_gib"]


def test_the_longest_row_is_the_one_that_was_found():
    usual, growing = recordings.read("longest_row")["rows"]
    card = usual["cap_gib"] + fit.CONTEXT_GIB
    assert fit.longest_row("8B", card) == pytest.approx(
        usual["longest_tokens"], rel=0.1
    )
    assert fit.longest_row("8B", card) <= growing["longest_tokens"]


def test_as_many_states_are_paged_as_predicted():
    rows = [
        row for row in recordings.read("paged")["rows"] if row["part"] == "adapters"
    ]
    assert rows
    for row in rows:
        config, base, adapters, settings = train.configs(
            models.llama_config(row["shape"]), "qlora", 1, 64
        )
        adapters.r = row["rank"]
        predicted = memory.predict(config, base, adapters, settings)
        assert predicted.paged == row["paged_bytes"] > 0


@pytest.mark.parametrize("size", [99_999, 100_000])
def test_bitsandbytes_pages_from_a_size_on(monkeypatch, size):
    """Its rule, without a GPU: what it would call."""
    paged, plain, parameter = object(), object(), mock.Mock()
    parameter.device, parameter.shape = torch.device("cuda", 0), (size,)
    parameter.numel.return_value = size
    monkeypatch.setattr(bnb.functional, "get_paged", lambda *_, **__: paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda *_: None)
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: plain)
    optimizer = bnb.optim.PagedAdamW8bit([torch.nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(optimizer, "page_mng", mock.Mock())
    expected = paged if size >= byte_formulas.PAGED_SMALLEST else plain
    assert optimizer.get_state_buffer(parameter) is expected


def test_a_cpu_is_not_held_to_anything():
    if not env.profile().use_cpu:
        pytest.skip("here is a GPU")
    memory.hold_to(4)
    memory.hold_to(None)


@pytest.mark.parametrize("gib", [0, -1, 8192, float("nan"), True, "15"])
def test_a_limit_that_is_no_memory_of_a_gpu_is_refused(gib):
    with pytest.raises(ValueError, match="expected the memory of one GPU in GiB"):
        memory.hold_to(gib)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, 50 + 2), (0.5, 40 - 6), (0.05, 0)],  # the driver decides, or torch's limit
)
def test_what_torch_may_still_take(monkeypatch, fraction, expected):
    """Of 80: 50 are free, torch has reserved 8 and uses 6 of them."""
    gpu = env.profile_of("bf16")
    monkeypatch.setattr(env, "profile", lambda: gpu)
    known = {
        "memory_allocated": 6,
        "memory_reserved": 8,
        "mem_get_info": (50, 80),
        "get_device_properties": mock.Mock(total_memory=80),
        "get_per_process_memory_fraction": fraction,
    }
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert memory.may_take() == expected


def test_without_a_gpu_torch_takes_nothing_of_it():
    if not env.profile().use_cpu:
        pytest.skip("here is a GPU")
    with pytest.raises(ValueError, match="Expected a cuda device, but got: cpu"):
        memory.may_take()


# ---- what cannot be predicted


@pytest.mark.parametrize(
    ("configs", "error", "words"),
    [
        (("9B", *Q, sft()), ValueError, "shape '9B' is unknown"),
        ((GPT2Config(), *Q, sft()), TypeError, "GPT2Config, expected LlamaConfig"),
        (("1B", *Q, None), TypeError, "sft_config is NoneType"),
        (("1B", *Q, sft(rows=-1)), ValueError, "batch_size is -1: give a whole"),
        (("1B", *Q, sft(length=None)), ValueError, "max_length is None: give a whole"),
        (("1B", *Q, sft(length=True)), ValueError, "max_length is True: give a whole"),
        (
            ("1B", *Q, TrainingArguments("never_written", use_cpu=True)),
            TypeError,
            "expected SFTConfig",
        ),
        (
            ("1B", GPTQConfig(4), lora(), sft()),
            TypeError,
            "expected BitsAndBytesConfig",
        ),
        (("1B", nf4(), None, sft()), ValueError, "4-bit weights cannot train"),
        (
            ("1B", BitsAndBytesConfig(load_in_8bit=True), lora(), sft()),
            ValueError,
            "load_in_8bit is True",
        ),
        (
            (
                "1B",
                BitsAndBytesConfig(bnb_4bit_compute_dtype="bfloat16"),
                lora(),
                sft(),
            ),
            ValueError,
            "load_in_4bit is False",
        ),
        (("1B", *Q, sft(dtype=torch.float16)), ValueError, "make them the same"),
        (
            ("1B", *Q, sft(optim="adafactor")),
            ValueError,
            "optim is 'adafactor'",
        ),
        (
            ("1B", nf4(), lora(target_modules=["c_attn"]), sft()),
            ValueError,
            "expected 'all-linear' or names of",
        ),
        (("1B", nf4(), lora(use_dora=True), sft()), ValueError, "use_dora is True"),
        (
            ("1B", nf4(), AdaLoraConfig(total_step=9), sft()),
            ValueError,
            "peft_type is 'ADALORA'",
        ),
        (
            ("1B", None, None, sft(dtype=torch.float16)),
            ValueError,
            "full fine-tuning of 16-bit weights does not work in fp16",
        ),
        (
            ("1B", None, lora(), sft(), Extras(kbit_casts=True)),
            ValueError,
            "kbit_casts needs a bnb_config",
        ),
        (("1B", *Q, sft(), {}), TypeError, "extras is dict: give an Extras"),
        *(
            (("1B", nf4(), lora(r=r), sft()), ValueError, "lora_config.r is .* whole")
            for r in (0, -4, 2.5, True)
        ),
        *(
            (("1B", nf4(), lora(lora_dropout=p), sft()), ValueError, "lora_dropout is")
            for p in (-0.1, 1, 1.5, "0.1")
        ),
        (
            (short("1B", dtype=torch.float32), *Q, sft()),
            ValueError,
            "dtype': torch.float32, .*compute_dtype': torch.bfloat16}; make them",
        ),
        (
            ("1B", *Q, sft(gradient_checkpointing_kwargs={"offload": True})),
            ValueError,
            "offload.* cannot be predicted",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(configs, error, words):
    with pytest.raises(error, match=words):
        memory.predict(*configs)


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "mps"), ("full_logits", None), ("kbit_casts", 1), ("repeat_kv", "yes")],
)
def test_an_extra_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{name}'"):
        Extras(**{name: value})


def settings_of(kind):
    """Every setting of a kind of config in the installed library."""
    usual = {
        "LlamaConfig": short("1B"),
        "BitsAndBytesConfig": nf4(),
        "LoraConfig": lora(),
        "SFTConfig": sft(),
    }
    return sorted(planned_run.defaults(usual[kind]))


def changed(config, setting):
    """A copy of a config with another value of a setting, unchecked by its library."""
    changed, old = copy.copy(config), getattr(config, setting, None)
    if setting in planned_run.HARMLESS_VALUES:
        new = "another"
    elif isinstance(old, bool | None):
        new = not old
    elif isinstance(old, int | float):
        new = old + 1
    else:
        new = "another"
    if setting in planned_run.ATTRIBUTES:
        setattr(changed, setting, new)
    else:
        vars(changed)[setting] = new
    return changed


@pytest.mark.parametrize(
    ("place", "kind", "setting"),
    [
        (place, kind, setting)
        for place, kind in enumerate(planned_run.TABLES)
        for setting in settings_of(kind)
    ],
)
def test_each_setting_is_counted_harmless_or_refused(place, kind, setting):
    """Also of a library that is newer than these tables."""
    names = {how: text.split() for how, text in planned_run.TABLES[kind].items()}
    if setting in names["counted"] + names["whole"]:
        return  # the tests above
    run = [short("1B"), *Q, sft()]
    before = memory.predict(*run)
    run[place] = changed(run[place], setting)
    if setting in names["harmless"]:
        assert memory.predict(*run) == before
        return
    with pytest.raises(ValueError, match=rf"_config\.{setting.lstrip('_')} is .*leave"):
        memory.predict(*run)


@pytest.mark.parametrize(
    "setting",
    """use_liger_kernel packing padding_free torch_compile fsdp deepspeed eval_strategy
    label_smoothing_factor activation_offloading auto_find_batch_size optim_args
    resume_from_checkpoint neftune_noise_alpha dataset_kwargs layers_to_transform
    exclude_modules use_dora modules_to_save rank_pattern lora_bias attention_bias
    llm_int8_skip_modules mlp_bias attention_dropout hidden_act""".split(),
)
def test_what_changes_bytes_is_in_no_table(setting):
    for table in planned_run.TABLES.values():
        assert setting not in " ".join(table.values()).split()


def test_a_setting_that_a_later_library_adds_is_refused():
    @dataclasses.dataclass
    class Later(SFTConfig):
        turbo: bool = True

    settings = Later(**{"output_dir": "never_written", "use_cpu": True})
    assert memory.predict("1B", *Q, settings).peak > 0
    settings.turbo = False
    with pytest.raises(ValueError, match="sft_config.turbo is False.*setting at True"):
        memory.predict("1B", *Q, settings)


def test_an_accumulation_that_accelerate_would_do_is_refused():
    settings = sft(
        accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 4}}
    )
    with pytest.raises(ValueError, match="accelerator_config is .*num_steps"):
        memory.predict("1B", *Q, settings)


def test_a_switch_that_was_set_too_late_is_told():
    settings = sft()
    if not hasattr(settings, "activation_checkpointing"):
        pytest.skip("this transformers has one name for it")
    settings.gradient_checkpointing = False  # the trainer reads the other one
    with pytest.raises(ValueError, match="contradicts itself"):
        memory.predict("1B", *Q, settings)


# ---- will it fit


def test_a_model_that_fits():
    answer = fit.will_it_fit("meta-llama/Llama-3.1-8B", gpu_gib=15)
    assert answer.fits
    assert str(answer).startswith(
        "meta-llama/Llama-3.1-8B, QLoRA, 1 x 512 tokens in bf16: fits"
    )


def test_a_gpu_without_bf16_needs_more():
    """It repeats keys and values; the 13B's heads share none."""
    for name, shares in (("8B", True), ("13B", False)):
        old, new = (
            fit.will_it_fit(name, 15, length=4096, kind=kind)
            for kind in ("fp16", "bf16")
        )
        assert "4,096 tokens in fp16: " in old.sentence
        assert (old.needed_gib > new.needed_gib) == shares
    length = fit.longest_row("8B", 15, kind="fp16")
    assert length < fit.longest_row("8B", 15)
    assert fit.will_it_fit("8B", 15, length=length, kind="fp16").fits
    assert not fit.will_it_fit("8B", 15, length=length + 64, kind="fp16").fits


@pytest.mark.parametrize(
    ("given", "change", "words"),
    [
        (("8B", 16, "lora", 1, 512), ("8B", 16, "qlora", 1, 512), "with QLoRA"),
        (("8B", 8, "qlora", 8, 1024), ("8B", 8, "qlora", 2, 1024), "most 2 rows at"),
        (("8B", 8, "qlora", 8, 2048), ("8B", 8, "qlora", 1, 2048), "most 1 row at a"),
        (("8B", 16, "lora", 16), ("8B", 16, "qlora", 16), "with QLoRA."),
        (
            ("8B", 16, "lora", 16, 2048),
            ("8B", 16, "qlora", 7, 2048),
            "QLoRA and at most 7 rows at a time.",
        ),
    ],
)
def test_the_change_it_proposes_works(given, change, words):
    answer = fit.will_it_fit(*given)
    assert not answer.fits
    assert words in answer.sentence
    assert fit.will_it_fit(*change).fits


def test_the_rows_it_proposes_are_the_most():
    answer = fit.will_it_fit("8B", 16, batch=16, length=2048)
    assert "It fits with at most 7 rows at a time." in answer.sentence
    assert fit.will_it_fit("8B", 16, batch=7, length=2048).fits
    assert not fit.will_it_fit("8B", 16, batch=8, length=2048).fits


def test_the_length_it_proposes_is_the_longest():
    answer = fit.will_it_fit("8B", 8, "qlora", 1, 16384)
    said = answer.sentence.partition("rows of at most ")[2].partition(" ")[0]
    length = int(said.replace(",", ""))
    assert fit.will_it_fit("8B", 8, "qlora", 1, length).fits
    assert not fit.will_it_fit("8B", 8, "qlora", 1, length + 64).fits


def test_the_longest_row_fits_and_a_longer_one_does_not():
    length = fit.longest_row("8B", 16)
    assert length % 64 == 0
    assert fit.will_it_fit("8B", 16, length=length).fits
    assert not fit.will_it_fit("8B", 16, length=length + 64).fits
    assert fit.longest_row("1B", 80) == models.SHAPES["1B"].positions
    assert fit.longest_row("70B", 24) == 0


def test_a_method_is_known_wherever_it_is_asked_for():
    with pytest.raises(ValueError, match="method 'dora' is unknown"):
        fit.longest_row("8B", 16, "dora")


def test_loading_is_told():
    answer = fit.will_it_fit("8B", 80)
    assert answer.disk_gib == pytest.approx(2 * 8_030_261_248 / env.GIB, rel=1e-4)
    assert answer.ram_gib < answer.disk_gib
    assert f"{answer.disk_gib:.1f} GiB of disk" in answer.sentence
    tied = fit.will_it_fit("1B", 80)  # its head is the embedding
    assert tied.disk_gib == pytest.approx(2 * 1_235_814_400 / env.GIB, rel=1e-4)


def test_what_torch_cannot_use_counts():
    """A card that has room for the peak, and not for what is lost beside it."""
    answer = fit.will_it_fit("8B", 80, length=8192)
    peak = answer.prediction.peak / env.GIB
    assert not fit.will_it_fit("8B", peak + fit.CONTEXT_GIB, length=8192).fits
    enough = answer.needed_gib + fit.CONTEXT_GIB + 0.01
    assert fit.will_it_fit("8B", enough, length=8192).fits


def test_nothing_fits():
    answer = fit.will_it_fit("70B", 24)
    assert not answer.fits
    assert answer.sentence.endswith("Choose a smaller model or a larger card.")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("7B", 15), r"'7B' is not known: give one of the shapes \['tiny', '1B'"),
        ((Qwen2Config(), 15), "model is Qwen2Config, expected a LlamaConfig"),
        ((None, 15), "model is NoneType, expected a LlamaConfig"),
        (("~/no/such/model", 15), "nor a directory here"),
        (("8B", 0), "gpu_gib is 0, expected the memory of one GPU in GiB"),
        (("8B", 8192), "gpu_gib is 8192, expected the memory of one GPU in GiB"),
        (("8B", "8"), "gpu_gib is '8', expected"),
        (("8B", float("nan")), "gpu_gib is nan, expected"),
        (("8B", True), "gpu_gib is True, expected"),
        (("8B", 15, "dora"), "method 'dora' is unknown"),
        (("8B", 15, "qlora", -1), "batch is -1: give a whole number of"),
        (("8B", 15, "qlora", 1.5), "batch is 1.5: give a whole number of"),
        (("8B", 15, "qlora", 1, "512"), "length is '512': give a whole number of"),
        (("13B", 80, "qlora", 1, 5000), "13B was made for rows of at most 4,096"),
        (("8B", 15, "qlora", 1, 512, "cpu"), "kind 'cpu' is unknown"),
        (("8B", 15, "full", 1, 512, "fp16"), "does not work in fp16"),
        ((LlamaConfig(mlp_bias=True), 15), "mlp_bias is True"),
    ],
)
def test_bad_questions_get_clear_answers(given, words):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words):
        fit.will_it_fit(*given)
    if len(given) == 2:
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words):
            fit.longest_row(*given)


# ---- whose config


def test_a_known_name_needs_no_network(monkeypatch):
    monkeypatch.setattr(shapes, "base_folder", mock.Mock(side_effect=AssertionError))
    for name in ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B", "1B"):
        assert models.config_of(name).hidden_size == 2048


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model_type": "qwen2"}, ValueError, "not a Llama .its model_type is 'qwen2'"),
        ({"model_type": "later"}, ValueError, "not a Llama .its model_type is 'later'"),
        ({}, ValueError, "not a Llama .its model_type is None"),
        (None, FileNotFoundError, "holds no config.json"),
    ],
)
def test_a_folder_that_is_no_llama_is_refused(tmp_path, config, error, words):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(error, match=words):
        models.config_of(tmp_path)


def test_a_folder_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    short("3B").save_pretrained(tmp_path / "llama")
    assert fit.will_it_fit("~/llama", 15).fits
    assert models.config_of("~/llama").hidden_size == 3072


def test_a_quantized_checkpoint_is_refused(tmp_path):
    config = short("3B")
    config.quantization_config = nf4().to_dict()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is already quantized: give the model"):
        fit.will_it_fit(tmp_path, 15)
    with pytest.raises(ValueError, match="is already quantized"):
        fit.will_it_fit(config, 15)


def test_the_config_of_a_model_in_4_bits_is_a_shape():
    config = models.random_llama("tiny", nf4(dtype=torch.float32)).config
    for method in planned_run.METHODS:
        asked, usual = (
            fit.will_it_fit(model, 15, method) for model in (config, "tiny")
        )
        assert asked.prediction == usual.prediction
    settings = sft(dtype=torch.float32)
    with pytest.raises(ValueError, match="is not the bnb_config"):
        memory.predict(config, nf4(False, torch.float32), lora(), settings)


WILL_IT_FIT = """import sys
from qlora_helpers.memory import longest_row, will_it_fit
print(will_it_fit("8B", 24), longest_row("8B", 15, kind="fp16"))
print(*{"trl", "matplotlib", "IPython"} & sys.modules.keys())"""


def test_the_calculator_imports_neither_trl_nor_what_draws():
    done = subprocess.run(
        [sys.executable, "-c", WILL_IT_FIT], capture_output=True, text=True, check=True
    )
    answer, imported = done.stdout.splitlines()
    assert "fits" in answer and imported == ""


@pytest.mark.parametrize(
    "method, kind",
    [
        (method, kind)
        for method in planned_run.METHODS
        for kind in fit.KINDS
        if (method, kind) != ("full", "fp16")  # which is refused
    ],
)
def test_the_recipes_plan_is_what_its_configs_say(method, kind):
    machine, config = env.profile_of(kind), models.llama_config("8B")
    configs = train.configs(config, method, 4, 2048, machine=machine)
    read = planned_run.read(*configs, None)
    built = fit.of_recipe(config, method, 4, 2048, kind)
    assert read._replace(config=None) == built._replace(config=None)
    assert memory.predict(*configs) == prediction.predict_plan(built)
