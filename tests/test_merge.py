"""Merges: equal to what was trained where they should be, by shards as in memory."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import IDS, adapted, base_model, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import adapters, env, memory, models, records, score, train
from qlora_helpers.models.embedded import embedded_dir
from qlora_helpers.ship import merge, mergeable


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
    reference = score.answer_logits(model, tokenizer, few, system=records.SYSTEM)
    far = {}
    for into, folder in merged_folders.items():
        whole, _ = models.load_base(str(folder))
        found = score.answer_logits(whole, tokenizer, few, system=records.SYSTEM)
        far[into] = score.divergence(found, reference)
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
            kept = found[name.removeprefix(mergeable.PREFIX) + ".weight"]
            expected = (four.float() + change).bfloat16()
            torch.testing.assert_close(kept, expected, rtol=2**-7, atol=1e-6)


def test_four_bits_swallow_a_change_unless_the_base_is_the_original(trained):
    model, _ = trained
    plain, _ = models.load_base(models.EMBEDDED)
    name = "model.layers.15.mlp.down_proj"
    layer = model.get_submodule(mergeable.PREFIX.removesuffix(".") + f".{name}")
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
    pairs = mergeable.read_pairs(adapter, base)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {f"{mergeable.PREFIX}{name}" for name in pairs} == {
        f"{n}.weight" for n in layers
    }
    for name, layer in layers.items():
        change = merge.lora_change(
            *pairs[f"{name.removeprefix(mergeable.PREFIX)}.weight"]
        )
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
        [sys.executable, "-m", "qlora_helpers.ship.merge", *map(str, arguments)],
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


def contents(folder):
    """Every file below a folder with its bytes."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files}


def test_neither_base_nor_adapter_is_replaced_by_the_merge(tiny, tmp_path):
    base, adapter = (shutil.copytree(path, tmp_path / path.name) for path in tiny)
    before = contents(tmp_path)
    for what, out in {"the base": base, "the adapter": adapter}.items():
        with pytest.raises(FileExistsError, match=f"is {what}: name another folder"):
            merge.merge_folder(str(base), adapter, out, "original")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["a person's files", "another model", "a file more"])
def test_what_a_merge_did_not_write_is_never_replaced(tiny, tmp_path, what):
    base, adapter = map(str, tiny)
    out = tmp_path / "out"
    if what == "a person's files":
        out.mkdir()
        shutil.copy(tiny[0] / "config.json", out / "config.json")
        (out / "diary.txt").write_text("mine", "utf-8")
    elif what == "another model":
        shutil.copytree(tiny[0], out)
    else:
        merge.merge_folder(base, adapter, out)
        (out / "notes.md").write_text("mine", "utf-8")
    before = contents(out)
    with pytest.raises(FileExistsError, match="which its merged.json does"):
        merge.merge_folder(base, adapter, out)
    assert contents(out) == before


def test_the_refusal_comes_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    base, adapter = map(str, tiny)
    (tmp_path / "diary").write_text("mine", "utf-8")
    monkeypatch.setattr(merge.models, "base_identity", pytest.fail)
    monkeypatch.setattr(merge, "merge_tensor", pytest.fail)
    with pytest.raises(FileExistsError, match="is a file"):
        merge.merge_folder(base, adapter, tmp_path / "diary")
    with pytest.raises(PermissionError, match="cannot be written"):
        merge.merge_folder(base, adapter, tmp_path / "diary" / "out")


def test_the_command_line_says_it_in_one_line(tiny, tmp_path):
    base, adapter = map(str, tiny)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_alone([base, adapter, base])
    assert caught.value.returncode == 1
    said = caught.value.stderr.strip().splitlines()
    assert said[-1] == f"error: {base} is the base: name another folder"
    assert not any(line.startswith("Traceback") for line in said)


def test_merged_again_the_new_model_stands_there(tiny, tmp_path):
    base, adapter = map(str, tiny)
    out = merge.merge_folder(base, adapter, tmp_path / "out", "original")
    first = tensors(out)
    (out / "README.md").write_text("# Mine", "utf-8")
    merge.merge_folder(base, adapter, out, "dequantized", shard_bytes=50_000)
    second = tensors(out)
    assert set(first) == set(second) and not all(
        torch.equal(first[name], second[name]) for name in first
    )
    assert (out / "README.md").read_text("utf-8") == "# Mine"
    assert not (out / "model.safetensors").exists()


def test_a_second_set_of_weights_is_left_out(tiny, tmp_path):
    base = shutil.copytree(tiny[0], tmp_path / "base")
    double = {f"x.{name}": tensor for name, tensor in tensors(base).items()}
    save_file(double, base / "consolidated.safetensors", metadata={"format": "pt"})
    out = merge.merge_folder(str(base), tiny[1], tmp_path / "out", "original")
    assert set(tensors(out)) == set(tensors(tiny[0]))


# ---- every setting of PEFT's LoraConfig is merged as PEFT does it, or refused by name


def edit(file, **changes):
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | changes), "utf-8")


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# setting: (the value that is tried, what the refusal names; None where it is merged)
SETTINGS = {
    "r": (3, None),
    "lora_alpha": (5, None),
    "use_rslora": (True, None),
    "rank_pattern": ({"q_proj": 2, r"layers\.1\..*up_proj": 3}, None),
    "alpha_pattern": ({"down_proj": 3}, None),
    "target_modules": ("all-linear", None),
    "exclude_modules": (["up_proj"], None),
    "layers_to_transform": ([1], None),
    "layers_pattern": ("layers", None),
    "lora_dropout": (0.5, None),
    "task_type": ("CAUSAL_LM", None),
    "peft_type": ("LORA", None),
    "auto_mapping": (None, None),
    "peft_version": (None, None),
    "base_model_name_or_path": ("x", None),
    "revision": ("main", None),
    "inference_mode": (True, None),
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
    "runtime_config": ({"ephemeral_gpu_offload": False}, None),
    "eva_config": ({}, None),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa'"),
    "use_dora": (True, "use_dora=True"),
    "bias": ("all", "bias='all'"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "trainable_token_indices": ([5], "trainable_token_indices"),
    "lora_bias": (True, "lora_bias=True"),
    "fan_in_fan_out": (True, "fan_in_fan_out=True"),
    "target_parameters": (["mlp.up_proj.weight"], "target_parameters"),
    "layer_replication": ([[0, 2], [1, 2]], "layer_replication"),
    "megatron_config": ({"a": 1}, "megatron_config"),
    "loftq_config": ({"loftq_bits": 4}, "loftq_config"),
    "corda_config": ({"rho": 1}, "corda_config"),
    "lora_ga_config": ({"direction": "x"}, "lora_ga_config"),
    "velora_config": ({"a": 1}, "velora_config"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens"),
    "use_qalora": (True, "use_qalora=True"),
    "monteclora_config": ({"a": 1}, "monteclora_config"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora"),
    "arrow_config": ({"top_k": 1}, "arrow_config"),
    "kasa_config": ({"a": 1}, "kasa_config"),
    "ensure_weight_tying": (True, "ensure_weight_tying=True"),
}


def test_the_table_has_every_setting_of_this_peft():
    """A setting that PEFT adds needs a row, and is refused until it has one."""
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("key", [k for k, (_, named) in SETTINGS.items() if named])
def test_a_setting_that_is_more_than_b_a_is_refused_by_name(tiny, tmp_path, key):
    folder = shutil.copytree(tiny[1], tmp_path / "adapter")
    value, named = SETTINGS[key]
    edit(folder / "adapter_config.json", **{key: value})
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        merge.merge_folder(str(tiny[0]), folder, tmp_path / "out", "original")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def peft_adapter(base, folder, **given):
    """An adapter of PEFT that changes something: the folder, and PEFT's own merge."""
    identity = models.base_identity(str(base))
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | given
    torch.manual_seed(0)
    model = get_peft_model(plain(base), LoraConfig(**{"task_type": "CAUSAL_LM"} | lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapter = adapters.save_adapter(model.eval(), None, folder, identity)
    return adapter, model.merge_and_unload()


@pytest.mark.parametrize(
    "key",
    [k for k, (value, named) in SETTINGS.items() if not named and value is not None],
)
def test_every_other_setting_is_merged_as_peft_does_it(tiny, tmp_path, key):
    given = {key: SETTINGS[key][0]}
    if key in ("runtime_config", "eva_config", "inference_mode"):
        given = {}  # written into the file below: no way of making another adapter
    if key == "layers_pattern":
        given["layers_to_transform"] = [0]
    adapter, theirs = peft_adapter(tiny[0], tmp_path / "adapter", **given)
    if not given:
        edit(adapter / "adapter_config.json", **{key: SETTINGS[key][0]})
    out = merge.merge_folder(str(tiny[0]), adapter, tmp_path / "out", "original")
    theirs, base = theirs.state_dict(), tensors(tiny[0])
    changed = 0
    for name, weight in tensors(out).items():
        torch.testing.assert_close(
            weight, theirs[name].bfloat16(), rtol=2**-7, atol=1e-6
        )
        changed += not torch.equal(weight, base[name])
    assert changed > 0


@pytest.mark.parametrize("start", [*mergeable.STARTS, "Gaussian"], ids=str)
def test_a_start_that_leaves_the_base_is_merged_as_peft_does_it(tiny, tmp_path, start):
    if start == "eva":  # needs data; what it saves is an A of its own
        adapter, theirs = peft_adapter(tiny[0], tmp_path / "adapter")
        edit(adapter / "adapter_config.json", init_lora_weights="eva")
    else:
        adapter, theirs = peft_adapter(
            tiny[0], tmp_path / "adapter", init_lora_weights=start
        )
    out = merge.merge_folder(str(tiny[0]), adapter, tmp_path / "out", "original")
    theirs = theirs.state_dict()
    for name, weight in tensors(out).items():
        torch.testing.assert_close(
            weight, theirs[name].bfloat16(), rtol=2**-7, atol=1e-6
        )


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_a_start_that_changes_the_base_is_refused_by_name(tiny, tmp_path, start):
    if start in ("pissa", "olora"):
        adapter, _ = peft_adapter(
            tiny[0], tmp_path / "adapter", init_lora_weights=start
        )
    else:
        adapter = shutil.copytree(tiny[1], tmp_path / "adapter")
        edit(adapter / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(ValueError, match=f"initialized with init.*='{start}', which"):
        merge.merge_folder(str(tiny[0]), adapter, tmp_path / "out", "original")


def test_a_setting_of_a_newer_peft_is_refused_unless_it_is_off(tiny, tmp_path):
    folder = shutil.copytree(tiny[1], tmp_path / "adapter")
    edit(folder / "adapter_config.json", use_next_year=False)
    mergeable.read_pairs(folder, tiny[0])
    edit(folder / "adapter_config.json", use_next_year=True)
    with pytest.raises(ValueError, match="use_next_year=True, which is"):
        mergeable.read_pairs(folder, tiny[0])


@pytest.mark.parametrize("kind", sorted(set(PeftType) - {PeftType.LORA}))
def test_every_other_kind_of_adapter_is_refused_by_name(tiny, tmp_path, kind):
    folder = shutil.copytree(tiny[1], tmp_path / "adapter")
    edit(folder / "adapter_config.json", peft_type=kind.value)
    with pytest.raises(ValueError, match=f"has peft_type='{kind.value}', which is"):
        merge.merge_folder(str(tiny[0]), folder, tmp_path / "out", "original")


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        {"bias": "lora_only"},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_tensor_that_is_no_a_or_b_is_refused_by_its_own_name(tmp_path, more):
    """Whatever the config says: nothing in the file is passed over."""
    config = models.llama_config("tiny")
    config.tie_word_embeddings, config.attention_bias = False, True
    models.random_llama(config).bfloat16().save_pretrained(tmp_path / "base")
    adapter, _ = peft_adapter(tmp_path / "base", tmp_path / "adapter", **more)
    with pytest.raises(ValueError):
        mergeable.read_pairs(adapter, tmp_path / "base")
    plain_config = {"bias": "none", "modules_to_save": None, "use_dora": False}
    plain_config |= {"trainable_token_indices": None, "lora_bias": False}
    edit(adapter / "adapter_config.json", **plain_config)
    with pytest.raises(ValueError, match=r"(holds |others \[')base_model\.model\.\S+"):
        mergeable.read_pairs(adapter, tmp_path / "base")


def test_the_head_is_merged_where_it_is_its_own_and_refused_where_it_is_tied(
    tiny, tmp_path
):
    config = models.llama_config("tiny")
    config.tie_word_embeddings = False
    models.random_llama(config).bfloat16().save_pretrained(tmp_path / "base")
    head = {"target_modules": [*ATTENTION, "lm_head"]}
    adapter, theirs = peft_adapter(tmp_path / "base", tmp_path / "adapter", **head)
    base = str(tmp_path / "base")
    out = merge.merge_folder(base, adapter, tmp_path / "out", "original")
    weight = theirs.get_output_embeddings().weight.bfloat16()
    torch.testing.assert_close(
        tensors(out)["lm_head.weight"], weight, rtol=2**-7, atol=1e-6
    )
    adapter, _ = peft_adapter(tiny[0], tmp_path / "tied", **head)
    with pytest.raises(
        ValueError, match="changes lm_head.weight, .* it is tied to the"
    ):
        merge.merge_folder(str(tiny[0]), adapter, tmp_path / "out2", "original")


def test_a_tokenizer_that_has_outgrown_the_base_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny[1], tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(models.embedded_dir())
    tokenizer.save_pretrained(folder)
    merge.merge_folder(str(tiny[0]), folder, tmp_path / "out")
    tokenizer.add_tokens(["<sql>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 49,153 tokens, .* rows for 49,152"):
        merge.merge_folder(str(tiny[0]), folder, tmp_path / "out2")


def half(folder):
    kept = dict(list(load_file(folder / adapters.WEIGHTS).items())[:14])
    save_file(kept, folder / adapters.WEIGHTS)


def cut(folder):
    whole = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(whole[: len(whole) // 2])


def pickled(folder):
    (folder / adapters.WEIGHTS).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    "fault, said",
    [
        (half, "holds 14 of the 28 tensors"),
        (lambda f: save_file({}, f / adapters.WEIGHTS), "holds 0 of the 28 tensors"),
        (
            lambda f: edit(f / "adapter_config.json", r=8),
            r"lora_A.weight in .* is not \[8, 128\], as",
        ),
        (cut, "damaged or cut short"),
        (pickled, "is a pickle"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "json is damaged"),
        (lambda f: (f / "base.json").write_text("{}"), "base.json is damaged"),
    ],
)
def test_a_damaged_adapter_is_never_merged(tiny, tmp_path, fault, said):
    folder = shutil.copytree(tiny[1], tmp_path / "adapter")
    fault(folder)
    with pytest.raises(ValueError, match=said):
        merge.merge_folder(str(tiny[0]), folder, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_a_base_that_lacks_a_tensor_is_never_merged(tiny, tmp_path):
    base = shutil.copytree(tiny[0], tmp_path / "base")
    kept = load_file(base / "model.safetensors")
    del kept["model.layers.1.input_layernorm.weight"]
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layers.1.input_layernorm.weight is missing in"
    ):
        merge.merge_folder(str(base), tiny[1], tmp_path / "out", "original")


def test_all_of_a_tokenizer_is_copied_and_nothing_private(tiny, tmp_path):
    base = shutil.copytree(tiny[0], tmp_path / "base")
    more = {"merges.txt", "vocab.json", "chat_template.jinja", "tokenizer.model"}
    for name in more | {"my_private_data.json"}:
        (base / name).write_text("x", "utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("x", "utf-8")
    out = merge.merge_folder(str(base), tiny[1], tmp_path / "out", "original")
    names = {file.name for file in out.iterdir()}
    assert more <= names and "my_private_data.json" not in names
    assert (out / "additional_chat_templates" / "tool_use.jinja").exists()
    merge.merge_folder(str(base), tiny[1], out, "original")  # and it is replaced


def test_what_cannot_be_merged_is_refused(tiny, tmp_path):
    base, _ = map(str, tiny)
    identity = models.base_identity(base)
    with pytest.raises(ValueError, match="expected one of dequantized, original"):
        merge.merge_folder(base, tiny[1], tmp_path / "out", "4 bits")
    folder = adapters.save_adapter(adapted(0), None, tmp_path / "adapter", identity)
    edit(folder / "base.json", quantization=None)
    with pytest.raises(ValueError, match="trained on a base quantized as None, not"):
        merge.merge_folder(base, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="give the base that it was trained on"):
        merge.merge_folder(models.EMBEDDED, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_base_elsewhere_and_in_shards_is_the_same_base(tiny, tmp_path):
    moved = shutil.copytree(tiny[0], tmp_path / "moved")
    merge.merge_folder(str(moved), tiny[1], tmp_path / "one", "original")
    plain(tiny[0]).bfloat16().save_pretrained(tmp_path / "cut", max_shard_size="2MB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    merge.merge_folder(str(tmp_path / "cut"), tiny[1], tmp_path / "two", "original")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_quantized_base_is_refused(tmp_path):
    model = base_model()
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    identity = models.base_identity(base)
    adapter = adapters.save_adapter(adapted(0), None, tmp_path / "adapter", identity)
    with pytest.raises(
        ValueError, match="expected 16 or 32 bits: give a model that is not"
    ):
        merge.merge_folder(base, adapter, tmp_path / "out")


# ---- into 4 bits, with PEFT


def test_a_merge_into_4_bits_is_dequantize_add_quantize():
    model, before = adapted(0), adapted(0)
    merged = model.merge_and_unload()
    name = "model.layers.1.mlp.up_proj"
    layer = before.get_submodule(mergeable.PREFIX.removesuffix(".") + f".{name}")
    stored = layer.base_layer.weight
    four = dequantize_4bit(stored, stored.quant_state)
    change = layer.get_delta_weight("default").float()  # PEFT adds in fp32
    now = merged.get_submodule(name).weight
    kept = dequantize_4bit(now, now.quant_state)
    assert torch.equal(kept, merge.through_nf4((four.float() + change).detach()))
    assert not torch.equal(logits(merged), logits(before))


@pytest.mark.parametrize("brings", [True, False])
def test_a_merged_model_has_one_tokenizer_whole(tiny, tmp_path, brings):
    """A chat template that only the base has would change a trained prompt."""
    base = shutil.copytree(tiny[0], tmp_path / "base")
    AutoTokenizer.from_pretrained(embedded_dir()).save_pretrained(base)
    own = AutoTokenizer.from_pretrained(embedded_dir())
    own.chat_template = None
    adapter = adapters.save_adapter(
        adapted(0),
        own if brings else None,
        tmp_path / "adapter",
        models.base_identity(str(base)),
    )
    out = merge.merge_folder(str(base), adapter, tmp_path / "out", "original")
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert (template is None) == brings
