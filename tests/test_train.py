"""The recipe: what it sets, what it refuses, what it saves."""

import json
import math
import re

import nbformat
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from qlora_helpers import adapters, env, memory, models, nf4, records, train
from qlora_helpers.lesson import exercises, recordings
from qlora_helpers.models import embedded
from qlora_helpers.train import effective, live_loss
from tools import course


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.embedded_dir())


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = models.random_llama("tiny", train.nf4_config(env.profile()))
    return get_peft_model(base, train.lora_config(r=4, alpha=8))


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 4, 4, 1e-2)
    return train.build_trainer(model, tokenizer, rows(tokenizer), settings)


def rows(tokenizer, some=None, **given):
    """Prompts and completions of some records; the task's own, if none are given."""
    some = records.load("train")[:32] if some is None else some
    given = {"system": records.SYSTEM} | given
    return records.to_prompt_completion(some, tokenizer, **given)


def test_training_lowers_the_loss_and_moves_adapters_alone(trainer):
    train.check_effective(trainer, env.profile())
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < losses[0]
    for name, parameter in trainer.model.named_parameters():
        same = torch.equal(frozen[name], parameter)
        assert same != ("lora_" in name), name


def test_adapters_are_fp32_after_trl_cast_them(trainer):
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    "fault, named",
    [
        (lambda t: setattr(t.args, "optim", "sgd"), "optimizer"),
        (  # the argument is as it was, and another optimizer was built
            lambda t: setattr(t, "optimizer", torch.optim.SGD(t.model.parameters())),
            "optimizer",
        ),
        (
            lambda t: setattr(t.accelerator.state, "_mixed_precision", "fp16"),
            "mixed precision",
        ),
        (
            lambda t: setattr(t.model.config, "_attn_implementation", "eager"),
            "attention is sdpa",
        ),
        (
            lambda t: [p.requires_grad_() for p in t.model.parameters() if p.ndim == 1],
            "only adapters are trained",
        ),
        (
            lambda t: [
                setattr(p, "data", p.data.bfloat16())
                for p in t.model.parameters()
                if p.requires_grad
            ],
            "adapters are fp32",
        ),
    ],
)
def test_drift_of_a_setting_is_named(trainer, fault, named):
    fault(trainer)
    with pytest.raises(RuntimeError, match=rf"asked for it: [^(]*{named}"):
        train.check_effective(trainer, env.profile())


def test_fp4_is_noticed(model, trainer):
    for module in model.modules():
        if isinstance(module, effective.Linear4bit):
            module.weight.quant_type = "fp4"
    with pytest.raises(RuntimeError, match=r"asked for it: [^(]*NF4"):
        train.check_effective(trainer, env.profile())


def test_a_layer_that_was_left_in_16_bits_is_noticed(tokenizer, tmp_path):
    quantization = train.nf4_config(env.profile())
    quantization.llm_int8_skip_modules = ["lm_head", "down_proj"]
    base = models.random_llama("tiny", quantization)
    model = get_peft_model(base, train.lora_config(r=4, alpha=8))
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 4, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    said = r"[^(]*NF4.* 12 4-bit and 2 other linear layers"
    with pytest.raises(RuntimeError, match=f"asked for it: {said}"):
        train.check_effective(trainer, env.profile())


def test_the_check_can_be_made_again_after_training(trainer):
    train.check_effective(trainer, env.profile())
    trainer.train()
    train.check_effective(trainer, env.profile())


def test_a_setting_changed_after_the_check_still_counts(trainer):
    train.check_effective(trainer, env.profile())
    trainer.args.learning_rate = 0.0
    before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "steps, batch, rate, said",
    [
        (0, 4, 1e-2, "steps is 0: give a whole"),
        (-1, 4, 1e-2, "steps is -1: give a whole"),
        (None, 4, 1e-2, "steps is None: give a whole"),
        (4, 2.5, 1e-2, "batch is 2.5: give a whole"),
        (4, 4, "2e-4", "learning_rate is '2e-4': give a number above 0"),
        (4, 4, 0, "learning_rate is 0: give a number above 0"),
        (4, 4, True, "learning_rate is True: give a number above 0"),
        (4, 4, float("inf"), "learning_rate is inf: give a number above 0"),
    ],
)
def test_numbers_that_train_nothing_are_refused(tmp_path, steps, batch, rate, said):
    with pytest.raises(ValueError, match=said):
        train.sft_config(env.profile(), str(tmp_path), steps, batch, rate)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_short_run_learns(model, tokenizer, tmp_path, steps):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), steps, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    trainer.train()
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in moved)
    rates = [h["learning_rate"] for h in trainer.state.log_history if "loss" in h]
    assert max(rates) == pytest.approx(1e-2)


def test_rows_that_a_trainer_cannot_read_are_refused(model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    raw = Dataset.from_list(records.load("values")[:4])
    for dataset, said in {
        raw: r"has the columns .*: give .* records.to_prompt_completion",
        raw.select([]): "the dataset is empty",
        raw.to_iterable_dataset(): "the dataset is IterableDataset",
    }.items():
        with pytest.raises(ValueError, match=said):
            train.build_trainer(model, tokenizer, dataset, settings)


def test_a_trainer_of_another_hand_and_packing_get_a_sentence(
    model, tokenizer, trainer
):
    trainer.args.packing = True
    with pytest.raises(RuntimeError, match="packing=False"):
        train.check_effective(trainer, env.profile())
    trainer.args.packing = False
    del trainer.given
    with pytest.raises(RuntimeError, match="expected a trainer of build_trainer"):
        train.check_effective(trainer, env.profile())


def test_rows_of_tokens_that_are_too_long_are_refused(model, tokenizer, tmp_path):
    ids = [list(range(100, 900))] * 4
    masks = [[0] * 400 + [1] * 400] * 4
    dataset = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(
        RuntimeError, match="4 of 4 rows are longer than max_length=512"
    ):
        train.check_effective(trainer, env.profile())


TURNS = [("user", "Name a bird."), ("assistant", "Owl."), ("user", "Another?")]
CHAT = [{"role": role, "content": text} for role, text in TURNS]
CHAT.append({"role": "assistant", "content": "Raven."})


def test_chats_of_several_turns_are_checked_and_learned(
    model, tokenizer, tmp_path, capsys
):
    some = [{"messages": CHAT}] * 3 + [{"instruction": "Sing.", "output": "La."}]
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    dataset = rows(tokenizer, some, system=None)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    train.check_effective(trainer, env.profile())
    said = capsys.readouterr().out
    counted = "rows: 4 of 4 kept, 0 cut at 512 tokens, 0 left out; in 4 of them the end"
    assert counted in said
    batch = trainer.data_collator([trainer.train_dataset[0]])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learned) == "Owl.<|im_end|>\nRaven.<|im_end|>\n"
    trainer.train()


def spoilt(dataset, mask):
    """The dataset with another loss mask, made from the tokens and the right mask."""

    def of_row(row):
        return {"completion_mask": mask(row["input_ids"], row["completion_mask"])}

    return dataset.map(of_row)


def from_the_first(ids, mask):
    first = mask.index(1)
    return [0] * first + [1] * (len(ids) - first)


def the_last_only(ids, mask):
    last = len(mask) - mask[::-1].index(0)
    return [0] * last + [1] * (len(ids) - last)


def without_ends(ids, mask):
    marks = (2, 198)  # <|im_end|> and the line break behind it
    return [m * (i not in marks) for i, m in zip(ids, mask, strict=True)]


def one_earlier(ids, mask):
    return [int(any(mask[n : n + 2])) for n in range(len(mask))]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (from_the_first, "4 of 4 rows carry loss on text that the assistant does not"),
        (one_earlier, "4 of 4 rows are trained with prompt tokens"),
        (the_last_only, "4 of 8 answers carry no loss"),
        (lambda ids, mask: [0, 0, 1] + mask[3:], "4 of 4 rows .* prompt tokens"),
        (lambda ids, mask: [1] * len(ids), "asked for it: the loss mask is as set"),
        (without_ends, "4 of 4 rows do not teach an end token"),
    ],
)
def test_loss_elsewhere_or_nowhere_is_found(mask, said, model, tokenizer, tmp_path):
    dataset = rows(tokenizer, [{"messages": CHAT}] * 4, system=None)
    dataset = spoilt(dataset, mask)
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(RuntimeError, match=said):
        train.check_effective(trainer, env.profile())


@pytest.mark.parametrize("limit", [54, 50, 44])
def test_a_chat_that_is_cut_anywhere_is_found(limit, model, tokenizer, tmp_path):
    dataset = rows(tokenizer, [{"messages": CHAT}] * 4, system=None)
    [length] = {len(ids) for ids in dataset["input_ids"]}
    assert limit < length
    settings = train.sft_config(env.profile(), str(tmp_path / "r"), 1, 4, 1e-2, limit)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(RuntimeError, match=f"4 of 4 rows .* max_length={limit}"):
        train.check_effective(trainer, env.profile())


def test_every_row_s_prompt_must_be_masked(model, tokenizer, tmp_path):
    ids = [list(range(100, 200))] * 9
    masks = [[0] * 50 + [1] * 50] + [[1] * 100] * 8
    dataset = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(
        RuntimeError, match=r"asked for it: [^(]*the loss mask is as set"
    ):
        train.check_effective(trainer, env.profile())


@pytest.mark.parametrize("wanted", [True, False])
def test_checkpointing_is_looked_up_in_the_layers(trainer, capsys, wanted):
    """Set later, the argument does nothing, or something else than it says."""
    setattr(trainer.args, train.CHECKPOINTING, not wanted)
    profile = env.profile()._replace(checkpointing=wanted)
    train.check_effective(trainer, profile)
    layers = "all" if wanted else "none"
    with pytest.raises(RuntimeError, match=f"expected {layers} of them; give "):
        trainer.train()
    assert trainer.state.global_step == 0
    setattr(trainer.args, train.CHECKPOINTING, wanted)
    if wanted:  # transformers only ever switches it on
        trainer.train()
        assert trainer.state.global_step == 4


@pytest.mark.parametrize("wanted", [True, False])
def test_the_recipe_sets_checkpointing_under_the_name_that_counts(tmp_path, wanted):
    profile = env.profile()._replace(checkpointing=wanted)
    settings = train.sft_config(profile, str(tmp_path / "run"), 1, 1, 1e-2)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert getattr(settings, name, wanted) == wanted


def test_paged_8_bit_adamw_is_told_from_others():
    weight = [torch.nn.Parameter(torch.zeros(8))]
    build = effective.bitsandbytes.optim.AdamW
    names = {
        "paged_adamw_8bit": build(weight, optim_bits=8, is_paged=True),
        "adamw_8bit": build(weight, optim_bits=8),
        "paged_adamw_32bit": build(weight, optim_bits=32, is_paged=True),
        "adamw_torch": torch.optim.AdamW(weight),
        "adamw_torch_fused": torch.optim.AdamW(weight, fused=True),
        "SGD": torch.optim.SGD(weight),
    }
    assert {name: effective.optimizer_name(one) for name, one in names.items()} == {
        name: name for name in names
    }


def test_fp16_repeats_keys_and_values_and_nothing_else_does():
    """A T4 has no flash attention: shared keys would take torch's math kernel there."""
    machine, model = env.profile(), models.random_llama("tiny")
    ids = torch.arange(10, 42)[None].to(model.device)
    found = {}
    try:
        for fp16 in (True, False):
            models.choose_attention(machine._replace(fp16=fp16))
            assert models.repeats_keys_and_values() == fp16
            with torch.no_grad():
                found[fp16] = model(input_ids=ids).logits
    finally:
        models.choose_attention(machine)
    torch.testing.assert_close(found[True], found[False])


def test_a_model_that_got_adapters_twice_is_refused(model, tokenizer, tmp_path):
    twice = get_peft_model(model, train.lora_config(r=4, alpha=8))
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(twice, tokenizer, rows(tokenizer), settings)
    with pytest.raises(RuntimeError, match="a PeftModel within a PeftModel.*load the"):
        train.check_effective(trainer, env.profile())


def test_several_gpus_are_refused_before_trl_sees_them(model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    settings._n_gpu = 2
    with pytest.raises(RuntimeError, match="sees 2 GPUs, but .* run the set-up cell"):
        train.build_trainer(model, tokenizer, rows(tokenizer), settings)


# ---- rows: kept, cut, left out


def test_rows_are_counted(trainer, capsys):
    train.check_effective(trainer, env.profile())
    said = capsys.readouterr().out
    counted = "rows: 32 of 32 kept, 0 cut at 512 tokens, 0 left out; in 32 of them the"
    assert counted + " end" in said


@pytest.mark.parametrize(
    "long, said",
    [
        ("output", r"rows: 10 of 10 kept, 8 cut at 512 tokens, 0 left out; in 2"),
        ("instruction", r"rows: 2 of 10 kept, 0 cut at 512 tokens, 8 left out; in 2"),
    ],
)
def test_what_trl_cuts_or_leaves_out_is_counted_and_refused(
    model, tokenizer, tmp_path, capsys, long, said
):
    record = {"instruction": "Tell.", "input": "", "output": "Owl."}
    some = [record | {long: "word " * 700}] * 8 + records.load("train")[:2]
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 2, 1e-2)
    dataset = rows(tokenizer, some, max_length=None)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(RuntimeError, match="8 of 10 rows are longer than max_length"):
        train.check_effective(trainer, env.profile())
    assert re.search(said, capsys.readouterr().out)


def test_where_no_row_is_left_it_is_said(model, tokenizer, tmp_path):
    some = [{"instruction": "word " * 700, "input": "", "output": "Owl."}] * 4
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 2, 1e-2)
    dataset = rows(tokenizer, some, max_length=None)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    with pytest.raises(RuntimeError, match="4 of 4 rows are longer than max_length"):
        train.check_effective(trainer, env.profile())


def test_a_length_of_ones_own_goes_for_records_and_trainer(model, tokenizer, tmp_path):
    some = [{"instruction": "Tell.", "input": "", "output": "word " * 700}] * 4
    model.config.max_position_embeddings = 1024
    settings = train.sft_config(env.profile(), str(tmp_path / "r"), 1, 2, 1e-2, 1024)
    dataset = rows(tokenizer, some, max_length=1024)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    train.check_effective(trainer, env.profile())


def test_rows_that_teach_no_end_are_refused(trainer, tmp_path):
    """A tokenizer whose end token is not the one that the template writes."""
    other = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    other.eos_token = "<|endoftext|>"
    trainer.processing_class = other
    trainer.model.generation_config.eos_token_id = other.eos_token_id
    with pytest.raises(RuntimeError, match="32 of 32 rows do not teach an end token"):
        train.check_effective(trainer, env.profile())


def test_another_context_in_training_than_in_judging_is_refused(trainer, monkeypatch):
    real = records.context_ids
    monkeypatch.setattr(records, "context_ids", lambda *given: [0, *real(*given)])
    with pytest.raises(
        RuntimeError, match="32 of 32 rows are trained with prompt tokens"
    ):
        train.check_effective(trainer, env.profile())


# ---- the bar and the curve


def test_a_loss_of_nan_stops_with_advice():
    live = train.LiveLoss()
    live.bar = live_loss.tqdm(total=1, disable=True)
    state = type("State", (), {"global_step": 3, "max_steps": 4})()
    with pytest.raises(FloatingPointError, match="step 3.*learning_rate"):
        live.on_log(None, state, None, logs={"loss": "nan"})


@pytest.fixture
def shown(monkeypatch):
    """What LiveLoss drew: the axes' points, the title and the alt text."""
    seen = []

    def redraw(fig, alt, handle):
        line = fig.axes[0].get_lines()[0]
        title = fig.axes[0].get_title("left")
        seen.append((line.get_xdata().tolist(), title, alt))

    monkeypatch.setattr(live_loss.plots, "redraw", redraw)
    return seen


def live_of(trainer):
    """The LiveLoss of a trainer."""
    callbacks = trainer.callback_handler.callbacks
    return next(one for one in callbacks if isinstance(one, train.LiveLoss))


def test_the_bar_and_the_curve_run_over_the_steps(trainer, shown):
    trainer.train()
    bar = live_of(trainer).bar
    assert (bar.n, bar.total) == (4, 4)
    [(steps, title, alt)] = shown
    assert steps == [1, 2, 3, 4] and title.startswith("Training loss: ")
    assert alt.endswith("over the last 1 of 4 steps")


def test_the_validation_loss_is_drawn_beside_the_training_loss(
    model, tokenizer, tmp_path, monkeypatch
):
    seen = []

    def redraw(fig, alt, handle):
        [ax] = fig.axes
        lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
        warmup = [patch.get_label() for patch in ax.patches]
        seen.append((lines, warmup, ax.get_yscale(), alt))

    monkeypatch.setattr(live_loss.plots, "redraw", redraw)
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 8, 4, 1e-2)
    held = rows(tokenizer, records.load("validation")[:8])
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings, held)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "eval_loss" in row]
    lines, warmup, scale, alt = seen[-1]
    assert lines["validation"].tolist() == [[r["step"], r["eval_loss"]] for r in logged]
    assert lines["validation"][:, 0].tolist() == [2, 4, 6, 8]
    assert len(lines["training"]) == 8
    assert (warmup, scale) == (["warm-up"], "log")
    assert f"to {logged[-1]['eval_loss']:.2g} at step 8" in alt


@pytest.mark.parametrize(
    "changes, points",
    [
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 3}, [3]),
        ({"logging_steps": 10}, None),
        ({"logging_strategy": "no"}, None),
        ({"logging_steps": 2, "logging_first_step": True}, [1, 2, 4]),
    ],
    ids=str,
)
def test_whatever_is_logged_the_bar_is_right(
    model, tokenizer, tmp_path, shown, changes, points
):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 4, 4, 1e-2)
    for name, value in changes.items():
        setattr(settings, name, value)
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    result = trainer.train()
    bar = live_of(trainer).bar
    assert (bar.n, bar.total, result.global_step) == (4, 4, 4)
    if points is None:
        assert shown == []
    else:
        assert shown[-1][0] == points
        assert shown[-1][1].endswith(", averaged since the point before")


def test_resumed_the_bar_and_the_curve_go_on(tokenizer, tmp_path, shown):
    def trainer(steps):
        torch.manual_seed(0)
        base = models.random_llama("tiny", train.nf4_config(env.profile()))
        model = get_peft_model(base, train.lora_config(r=4, alpha=8))
        settings = train.sft_config(env.profile(), str(tmp_path / "r"), 4, 4, 1e-2)
        settings.save_strategy, settings.save_steps = "steps", 2
        settings.max_steps = steps
        return train.build_trainer(model, tokenizer, rows(tokenizer), settings)

    trainer(2).train()
    goes_on = trainer(4)
    goes_on.train(resume_from_checkpoint=str(tmp_path / "r" / "checkpoint-2"))
    bar = live_of(goes_on).bar
    assert (bar.initial, bar.n, bar.total) == (2, 4, 4)
    assert shown[-1][0] == [1, 2, 3, 4]


def test_state_is_counted_to_the_byte(trainer):
    trainer.train()
    kept = memory.state_bytes(trainer.model, trainer.optimizer)
    trained = trainer.model.get_nb_trainable_parameters()[0]
    assert kept["adapters"] == kept["gradients"] == 4 * trained
    # two averages in fp32, and a step counter of 4 bytes for each tensor
    tensors = sum(p.requires_grad for p in trainer.model.parameters())
    assert kept["optimizer"] == 8 * trained + 4 * tensors


def test_peak_sees_what_was_held():
    with memory.peak() as small:
        pass
    with memory.peak() as large:
        held = torch.ones(300 * 2**20 // 4)
        for _ in range(3):
            held.add_(1)
            torch.ones(2**22).sort()
    assert large["bytes"] - small["bytes"] > 250 * 2**20


# ---- the committed adapter, and what was recorded


def test_the_committed_adapter_is_whole_and_fits_the_base():
    folder = env.path("data/adapter")
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 10_000_000
    identity = models.base_identity(models.EMBEDDED)
    model, _ = models.load_base(models.EMBEDDED, train.nf4_config(env.profile()))
    loaded = adapters.load_adapter(model, folder, identity)
    changed = [p for n, p in loaded.named_parameters() if "lora_B" in n]
    assert len(changed) == 7 * 30 and all(p.abs().max() > 0 for p in changed)
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    assert facts["accuracy"]["values_percent"][0] >= 75
    assert facts["accuracy"]["phrasing_percent"][0] >= 55


def test_the_recipe_meets_its_bars_on_three_recorded_seeds():
    rows = recordings.read("recipe")["rows"]
    runs = [row for row in rows if row["run"] == "recipe"]
    assert sorted(row["seed"] for row in runs) == [0, 1, 2]
    for row in runs:
        phrasing, values = row["verdicts"][:100], row["verdicts"][100:200]
        assert values.count("1") >= 75 and phrasing.count("1") >= 55
        assert row["tokens"] <= 60_000
    for row in rows:
        if row["run"].startswith("base model"):
            assert row["verdicts"].count("1") <= 30


@pytest.mark.parametrize("path", course.find(), ids=lambda path: path.stem)
def test_headers_say_what_was_measured(path):
    header = nbformat.read(path, as_version=4).cells[0].source
    assert header == course.cost(header, path.stem), "run: course stamp"
    assert "; the cells ran for " in header
    wrapped = header.replace(" on one ", "\non one ")  # as an editor may leave it
    assert wrapped != header == course.cost(wrapped, path.stem)


def test_the_map_says_what_was_measured():
    text = (env.ROOT / "README.md").read_text(encoding="utf-8")
    assert text == course.readme_map(text), "run: course stamp"
    for path in course.find():
        rows = [row for row in text.splitlines() if f"{path.stem}.ipynb) | " in row]
        assert [" min, " in row for row in rows] == [True]


# ---- exercises: a wrong answer is told from a right one


def one_sided(lost, gained):
    n = lost + gained
    return sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n


@pytest.mark.parametrize(
    "check, wrong",
    [
        (exercises.check_long_haul, lambda city: "SELECT train FROM train"),
        (exercises.check_long_haul, lambda city: "SELECT nothing"),
        (
            exercises.check_long_haul,
            lambda city: f"SELECT train FROM train WHERE home='{city}' AND km>=1000",
        ),
        (exercises.check_prompt, lambda system, question: system + question),
        (exercises.check_lora_parameters, lambda r, h, i, k, n: r * h * n),
        (exercises.check_loss_mask, lambda prompt, ids: ids),
        (exercises.check_learning_rate, lambda step, steps, warmup, peak: peak),
        (exercises.check_learning_rate, lambda *given: 1 / 0),
        (
            exercises.check_learning_rate,
            lambda step, steps, warmup, peak: (
                peak * (step / 5 if step < 5 else (steps - step) / (steps - 5))
            ),
        ),
        (exercises.check_nf3, lambda top: torch.linspace(-1, 1, 8)),
        (exercises.check_nf3, lambda top: nf4.nf4_code(top)),
        (exercises.check_gain, lambda weight, block: 15.0),
        (exercises.check_bits_per_weight, lambda bits, n, scale, low: bits + scale / n),
        (exercises.check_layer_bytes, lambda rows, columns: rows * columns // 2),
        (exercises.check_tokens_until, lambda vocab, size: size // (2 * vocab)),
        (exercises.check_on_paper, lambda h, f, layers, vocab, tokens: 16e9),
        (
            exercises.check_on_paper,
            lambda h, f, layers, vocab, tokens: layers * h * (4 * h + 3 * f) / 2,
        ),
        (exercises.check_dropout, lambda x, W, A, B, s, p: x @ W.T + s * x @ A.T @ B.T),
        (exercises.check_exact_p, lambda lost, gained: 0.5 ** abs(lost - gained)),
        (exercises.check_exact_p, one_sided),
        (
            exercises.check_merged,
            lambda W, A, B, alpha, r, rs: W + (alpha / r * (B @ A)).bfloat16(),
        ),
        (
            exercises.check_merged,
            lambda W, A, B, alpha, r, rs: (W.float() + alpha / r * B @ A).bfloat16(),
        ),
        (
            exercises.check_merged,
            lambda W, A, B, alpha, r, rs: (
                W.float() + alpha / r * (4 if rs else 1) * B @ A
            ).bfloat16(),
        ),
        (
            exercises.check_adapter_gradients,
            lambda x, A, B, s, g: (s * (g @ B).T @ x, g.T @ (x @ A.T)),
        ),
    ],
)
def test_a_wrong_answer_is_told_and_stops_nothing(check, wrong, capsys):
    assert check(wrong) is False
    said = capsys.readouterr().out
    assert "not yet" in said and ("yours" in said or "raises" in said)
    assert len(said.splitlines()) == 1


def test_a_wrong_tensor_is_shown_where_it_is_wrong(capsys):
    exercises.check_interleaved(lambda weight, heads: weight)  # the first row is right
    [yours, expected] = re.findall(r"\): \[(.+?)\]", capsys.readouterr().out)[-2:]
    assert yours.startswith("..., ") and yours != expected


# ---- what would train on nothing, or not as it says


def test_stacked_experts_in_16_bits_are_noticed(trainer):
    trainer.model.base_model.model.experts = torch.nn.Parameter(
        torch.zeros(2, 4, 4), requires_grad=False
    )
    with pytest.raises(RuntimeError, match=r"asked for it: [^(]*linear layers are NF4"):
        train.check_effective(trainer, env.profile())


def test_layers_without_an_adapter_are_counted(tokenizer, tmp_path, capsys):
    base = models.random_llama("tiny", train.nf4_config(env.profile()))
    some = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    model = get_peft_model(base, some)
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    train.check_effective(trainer, env.profile())
    assert "12 of 14 4-bit layers have no adapter" in capsys.readouterr().out


def test_rows_longer_than_the_model_was_made_for_are_refused(trainer):
    trainer.model.config.max_position_embeddings = 40
    with pytest.raises(
        RuntimeError, match="32 of 32 rows are longer than the 40 tokens .* leave"
    ):
        train.check_effective(trainer, env.profile())


def test_a_token_without_a_row_is_refused(model, tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    own.add_tokens(["<sql>"])
    some = [{"instruction": "Say it.", "input": "", "output": "<sql>"}] * 4
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(model, own, rows(own, some), settings)
    with pytest.raises(
        RuntimeError, match="4 of 4 rows hold a token from 49,152 on, for which"
    ):
        train.check_effective(trainer, env.profile())


def test_merged_adapters_are_refused(trainer):
    trainer.model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call model\.unmerge_adapter"):
        train.check_effective(trainer, env.profile())


def trainer_with(model, tokenizer, tmp_path, **changed):
    """A trainer whose settings differ from the recipe's in what is named."""
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    for name, value in changed.items():
        setattr(settings, name, value)
    return train.build_trainer(model, tokenizer, rows(tokenizer), settings)


def test_shuffled_rows_are_no_fault(model, tokenizer, tmp_path):
    trainer = trainer_with(model, tokenizer, tmp_path, shuffle_dataset=True)
    train.check_effective(trainer, env.profile())


def test_a_prompt_that_carries_loss_is_called_so(model, tokenizer, tmp_path):
    trainer = trainer_with(model, tokenizer, tmp_path, completion_only_loss=False)
    with pytest.raises(RuntimeError, match=r"asked for it: [^(]*the loss mask is"):
        train.check_effective(trainer, env.profile())


def test_a_run_without_a_step_is_an_error(model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 64, 1e-2)
    settings.dataloader_drop_last = True
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    with pytest.raises(RuntimeError, match="ended without a step"):
        trainer.train()


def test_an_adapter_that_cannot_learn_is_refused(tokenizer, tmp_path):
    base = models.random_llama("tiny", train.nf4_config(env.profile()))
    model = get_peft_model(base, train.lora_config(r=4, alpha=0))
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 4, 1e-2)
    trainer = train.build_trainer(model, tokenizer, rows(tokenizer), settings)
    with pytest.raises(RuntimeError, match="alpha is 0, so the adapters"):
        train.check_effective(trainer, env.profile())


@pytest.mark.parametrize("length", [0, -5, "512", 1.5])
def test_a_length_that_is_none_is_refused(length, model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path), 1, 4, 1e-2)
    settings.max_length = length
    with pytest.raises(ValueError, match="max_length is"):
        train.build_trainer(model, tokenizer, rows(tokenizer), settings)


# ---- what was trained, and to the end


def test_only_a_whole_training_of_this_model_passes(trainer, model):
    with pytest.raises(RuntimeError, match="0 of 4 steps were trained: train again"):
        train.check_trained(trainer, trainer.model)
    trainer.train()
    train.check_trained(trainer, trainer.model)
    with pytest.raises(RuntimeError, match="not the one that the trainer trained"):
        train.check_trained(trainer, object())


def test_validation_rows_that_trl_would_cut_are_refused(model, tokenizer, tmp_path):
    settings = train.sft_config(env.profile(), str(tmp_path), 1, 4, 1e-2, 16)
    short, long = rows(tokenizer).select([0]), rows(tokenizer)
    trainer = train.build_trainer(model, tokenizer, long, settings, short)
    trainer.given_validation = long
    trainer.args.max_length = min(map(len, long["input_ids"])) - 1
    with pytest.raises(RuntimeError, match="validation rows are longer than max_len"):
        train.check_effective(trainer, env.profile())
