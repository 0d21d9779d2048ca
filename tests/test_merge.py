"""Merges: equal to what was trained where they should be, by shards as in memory."""

import json
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import IDS, adapted, base_model, logits
from transformers import AutoModelForCausalLM

from qlora_helpers import adapters, env, evaluate, memory, merge, models, records, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folders of a tiny base, in bf16, and of an adapter of it."""
    folder = tmp_path_factory.mktemp("tiny")
    models.random_llama("tiny").bfloat16().save_pretrained(folder / "base")
    identity = models.base_identity(str(folder / "base"))
    return folder / "base", adapters.save_adapter(
        adapted(0), None, folder / "adapter", identity
    )


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---- the identities


@pytest.fixture(scope="module")
def trained():
    """The embedded Llama in 4 bits with the committed adapter, and its tokenizer."""
    base, tokenizer = models.load_base(models.EMBEDDED, train.nf4_config(env.profile()))
    identity = models.base_identity(models.EMBEDDED)
    folder = env.path("data/adapter")
    return adapters.load_adapter(base, folder, identity).eval(), tokenizer


@pytest.fixture(scope="module")
def merged_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    return {
        into: merge.merge_folder(
            models.EMBEDDED, env.path("data/adapter"), folder / into, into
        )
        for into in merge.INTO
    }


def test_into_the_dequantized_base_it_is_the_trained_model(trained, merged_folders):
    """KL below 0.002 nat: what 16-bit rounding costs. Into the original, more."""
    model, tokenizer = trained
    few = records.load("phrasing")[:12]
    reference = evaluate.answer_logits(model, tokenizer, few)
    far = {}
    for into, folder in merged_folders.items():
        whole, _ = models.load_base(str(folder))
        found = evaluate.answer_logits(whole, tokenizer, few)
        far[into] = evaluate.divergence(found, reference)
    assert far["dequantized"].kl < 0.002 and far["dequantized"].error < 0.06
    assert far["original"].error > 5 * far["dequantized"].error


def test_each_merged_weight_is_the_4_bit_weight_and_the_change(trained, merged_folders):
    model, _ = trained
    found = tensors(merged_folders["dequantized"])
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            stored = layer.base_layer.weight
            four = dequantize_4bit(stored, stored.quant_state).bfloat16()
            change = layer.get_delta_weight("default").float()
            kept = found[name.removeprefix(merge.PREFIX) + ".weight"]
            expected = (four.float() + change).bfloat16()
            torch.testing.assert_close(kept, expected, rtol=2**-7, atol=1e-6)


def test_four_bits_swallow_a_change_unless_the_base_is_the_original(trained):
    model, _ = trained
    plain, _ = models.load_base(models.EMBEDDED)
    name = "model.layers.15.mlp.down_proj"
    layer = model.get_submodule(merge.PREFIX.removesuffix(".") + f".{name}")
    W = plain.get_submodule(name).weight.detach()
    change = layer.get_delta_weight("default").float()

    def survives(base):
        kept = merge.through_nf4((base.float() + change).to(base.dtype))
        kept = (kept - merge.through_nf4(base)).float()
        return ((kept * change).sum() / change.square().sum()).item()

    assert survives(merge.through_nf4(W)) < 0.1
    assert 0.9 < survives(W) < 1.1


def test_merged_unquantized_it_is_peft_s_merge(tiny, tmp_path):
    base, adapter = tiny
    out = merge.merge_folder(str(base), adapter, tmp_path / "out", "original")
    identity = models.base_identity(str(base))
    whole = adapters.load_adapter(plain(base), adapter, identity).merge_and_unload()
    theirs = {n: p.bfloat16() for n, p in whole.state_dict().items()}
    ours = tensors(out)
    assert set(ours) == set(theirs) - {"lm_head.weight"}  # tied
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=2**-7, atol=1e-6)


# PEFT's own scalings, rank by rank
VARIANTS = {
    "rank-stabilized": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up": 3}},
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("more", VARIANTS.values(), ids=list(VARIANTS))
def test_ranks_and_scalings_are_peft_s(tiny, tmp_path, more):
    base, _ = tiny
    identity = models.base_identity(str(base))
    given = {"r": 4, "lora_alpha": 8, "target_modules": train.PROJECTIONS} | more
    model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", **given))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter = adapters.save_adapter(model, None, tmp_path / "adapter", identity)
    pairs = merge.read_pairs(adapter)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {f"{merge.PREFIX}{name}" for name in pairs} == {
        f"{n}.weight" for n in layers
    }
    for name, layer in layers.items():
        change = merge.lora_change(*pairs[f"{name.removeprefix(merge.PREFIX)}.weight"])
        torch.testing.assert_close(change, layer.get_delta_weight("default"))


# ---- by shards


@pytest.mark.parametrize("into", merge.INTO)
def test_shards_hold_what_one_file_holds(tiny, tmp_path, into):
    base, adapter = map(str, tiny)
    one = merge.merge_folder(base, adapter, tmp_path / "one", into)
    many = merge.merge_folder(base, adapter, tmp_path / "many", into, 50_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    for name, weight in tensors(one).items():
        assert torch.equal(weight, tensors(many)[name]), name
    with torch.no_grad():
        assert torch.equal(plain(one)(IDS).logits, plain(many)(IDS).logits)


def test_weights_that_were_4_bit_without_an_adapter_are_dequantized_too(tmp_path):
    """An adapter on two projections: the other five were quantized all the same."""
    models.random_llama("tiny").bfloat16().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    identity = models.base_identity(base)
    adapter = adapters.save_adapter(model, None, tmp_path / "adapter", identity)
    before, after = (
        tensors(folder)["model.layers.0.mlp.up_proj.weight"]
        for folder in (
            tmp_path / "base",
            merge.merge_folder(base, adapter, tmp_path / "out"),
        )
    )
    assert not torch.equal(before, after)
    dtype = env.profile().compute_dtype
    assert torch.equal(merge.through_nf4(before.to(dtype)).bfloat16(), after)


def test_what_is_held_is_predicted(tmp_path):
    """In a process of its own: what was predicted and 30 MB at most, not 269."""
    command = [models.EMBEDDED, env.path("data/adapter"), tmp_path / "out"]
    said = run_alone([*command, "--shard-mb", "60"])
    words = said.replace(",", "").split()
    predicted, held = int(words[1]), int(words[4])
    assert predicted < 80 and held < predicted + 30
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5


def run_alone(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_helpers.merge", *map(str, arguments)],
        cwd=env.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_private_peak_sees_what_was_held():
    with memory.private_peak() as small:
        pass
    with memory.private_peak() as large:
        held = torch.ones(100 * 2**20)  # 400 MiB
        for _ in range(3):
            held.add_(1)
    assert large["bytes"] - small["bytes"] > 250 * 2**20


# ---- whole or not at all


def test_an_interrupted_merge_leaves_the_old_model(tiny, tmp_path, monkeypatch):
    base, adapter = map(str, tiny)
    out = merge.merge_folder(base, adapter, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    saved = []

    def stops_at_the_third(shard, file, metadata):
        saved.append(file)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save_file(shard, file, metadata)

    monkeypatch.setattr(merge, "save_file", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge.merge_folder(base, adapter, out, shard_bytes=50_000)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_model_is_never_replaced(tiny, tmp_path):
    base, adapter = map(str, tiny)
    (tmp_path / "diary.txt").write_text("mine", "utf-8")
    with pytest.raises(FileExistsError, match="is no model"):
        merge.merge_folder(base, adapter, tmp_path)
    assert (tmp_path / "diary.txt").exists()


def edit(file, **changes):
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | changes), "utf-8")


def test_what_cannot_be_merged_is_refused(tiny, tmp_path):
    base, _ = map(str, tiny)
    identity = models.base_identity(base)
    with pytest.raises(ValueError, match="expected one of dequantized, original"):
        merge.merge_folder(base, tiny[1], tmp_path / "out", "4 bits")
    folder = adapters.save_adapter(adapted(0), None, tmp_path / "adapter", identity)
    edit(folder / "adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match="use_dora: it is more than B A"):
        merge.merge_folder(base, folder, tmp_path / "out")
    edit(folder / "adapter_config.json", use_dora=False)
    edit(folder / "base.json", quantization=None)
    with pytest.raises(ValueError, match="trained on a base quantized as None"):
        merge.merge_folder(base, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="another base"):
        merge.merge_folder(models.EMBEDDED, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_base_is_refused(tmp_path):
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    identity = models.base_identity(base)
    adapter = adapters.save_adapter(adapted(0), None, tmp_path / "adapter", identity)
    with pytest.raises(ValueError, match="not a quantized one"):
        merge.merge_folder(base, adapter, tmp_path / "out")


# ---- into 4 bits, with PEFT


def test_a_merge_into_4_bits_is_dequantize_add_quantize():
    model, before = adapted(0), adapted(0)
    merged = model.merge_and_unload()
    name = "model.layers.1.mlp.up_proj"
    layer = before.get_submodule(merge.PREFIX.removesuffix(".") + f".{name}")
    stored = layer.base_layer.weight
    four = dequantize_4bit(stored, stored.quant_state)
    change = layer.get_delta_weight("default").float()  # PEFT adds in fp32
    now = merged.get_submodule(name).weight
    kept = dequantize_4bit(now, now.quant_state)
    assert torch.equal(kept, merge.through_nf4((four.float() + change).detach()))
    assert not torch.equal(logits(merged), logits(before))
