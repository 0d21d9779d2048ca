"""The recipe: what it sets, what it refuses, what it saves."""

import json

import nbformat
import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from qlora_helpers import (
    adapters,
    course,
    embedded,
    env,
    exercises,
    memory,
    models,
    quant,
    recorded,
    records,
    train,
)


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
    dataset = records.to_prompt_completion(records.load("train")[:32], tokenizer)
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 4, 4, 1e-2)
    return train.build_trainer(model, tokenizer, dataset, settings)


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
        (lambda t: setattr(t.args, "fp16", True), "mixed precision"),
        (
            lambda t: [p.requires_grad_() for p in t.model.parameters() if p.ndim == 1],
            "only adapters train",
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
    with pytest.raises(RuntimeError, match=named):
        train.check_effective(trainer, env.profile())


def test_fp4_is_noticed(model, trainer):
    for module in model.modules():
        if isinstance(module, train.Linear4bit):
            module.weight.quant_type = "fp4"
    with pytest.raises(RuntimeError, match="NF4"):
        train.check_effective(trainer, env.profile())


def test_a_loss_of_nan_stops_with_advice():
    live = train.LiveLoss()
    live.bar = train.tqdm(total=1, disable=True)
    state = type("State", (), {"global_step": 3, "max_steps": 4})()
    with pytest.raises(FloatingPointError, match="step 3.*learning_rate"):
        live.on_log(None, state, None, logs={"loss": "nan"})


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
    rows = {row["run"]: row for row in recorded.read("recipe")["rows"]}
    for seed in (0, 1, 2):
        row = rows[f"recipe, seed {seed}"]
        assert row["values_percent"] >= 75 and row["phrasing_percent"] >= 55
        assert row["tokens"] <= 60_000
    assert rows["base model, asked as it is"]["phrasing_percent"] <= 10


@pytest.mark.parametrize("path", course.find(), ids=lambda path: path.stem)
def test_headers_say_what_was_measured(path):
    header = nbformat.read(path, as_version=4).cells[0].source
    assert header == course.cost(header, path.stem), "run: course stamp"
    assert "; its cells ran " in header


def test_the_map_says_what_was_measured():
    text = (env.ROOT / "README.md").read_text(encoding="utf-8")
    assert text == course.the_map(text), "run: course stamp"
    for path in course.find():
        rows = [row for row in text.splitlines() if f"{path.stem}.ipynb) | " in row]
        assert [" min, " in row for row in rows] == [True]


# ---- exercises: a wrong answer is told from a right one


@pytest.mark.parametrize(
    "check, wrong",
    [
        (exercises.check_long_haul, lambda city: "SELECT train FROM train"),
        (exercises.check_long_haul, lambda city: "SELECT nothing"),
        (exercises.check_prompt, lambda system, question: system + question),
        (exercises.check_lora_parameters, lambda r, h, i, k, n: r * h * n),
        (exercises.check_loss_mask, lambda prompt, ids: ids),
        (exercises.check_learning_rate, lambda step, steps, warmup, peak: peak),
        (exercises.check_learning_rate, lambda *given: 1 / 0),
        (exercises.check_nf3, lambda top: torch.linspace(-1, 1, 8)),
        (exercises.check_nf3, lambda top: quant.nf4_code(top)),
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
        (exercises.check_surviving_share, lambda weight, change, stored: 1.0),
        (
            exercises.check_merged_at,
            lambda W, A, B, alpha, r, strength: strength * (W + alpha / r * (B @ A)),
        ),
        (exercises.check_held_bytes, lambda shard, h, f, kv, n, r: shard + 4 * h * f),
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
