"""What leaves the house: read by transformers alone, by llama.cpp, by any client."""

import json
import math
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gguf
import numpy as np
import openai
import pytest
import torch
import xllamacpp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from qlora_helpers import env, models, records, score, train
from qlora_helpers.ship import gguf_file, llama_cpp, merge

QUESTIONS = records.load("phrasing")[:6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded Llama with the committed adapter merged into it."""
    out = tmp_path_factory.mktemp("ship") / "merged"
    return merge.merge_folder(models.EMBEDDED, env.path("data/adapter"), out)


@pytest.fixture(scope="module")
def source():
    return next(merge.base_folder(models.EMBEDDED).glob("*.gguf"))


@pytest.fixture(scope="module")
def answers(folder):
    """What the merged model answers in this process, in fp32."""
    model, tokenizer = models.load_base(str(folder), dtype=torch.float32)
    prompts = [records.prompt(q, tokenizer, records.SYSTEM) for q in QUESTIONS]
    return [text for text, _ in score.generate_answers(model, tokenizer, prompts)]


# ---- safetensors

STRANGER = """
import json, sys
sys.modules["bitsandbytes"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
said = []
for chat in json.load(sys.stdin):
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=54, do_sample=False)
    new = out[0, ids["input_ids"].shape[1]:]
    said.append(tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(said))
"""


def test_a_fresh_process_without_bitsandbytes_and_peft_answers_the_same(
    folder, answers
):
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        input=json.dumps(
            [records.messages(record, records.SYSTEM) for record in QUESTIONS]
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == answers


def test_the_tokenizer_travels_and_no_note_of_the_base(folder):
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"manifest.json", "base.json", "adapter_config.json"}
    there = AutoTokenizer.from_pretrained(folder)
    base = AutoTokenizer.from_pretrained(merge.base_folder(models.EMBEDDED))
    chat = records.messages(QUESTIONS[0], records.SYSTEM)
    assert there.apply_chat_template(chat) == base.apply_chat_template(chat)


# ---- GGUF of the embedded Llama


def test_what_was_exported_is_read_back_bit_for_bit(folder, source, tmp_path):
    """By transformers' reader of GGUF, which is not ours."""
    file = gguf_file.to_gguf(folder, source, tmp_path / "m.gguf", "BF16")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    found = back.state_dict()
    merged = load_file(folder / "model.safetensors")
    for name, weight in merged.items():
        assert torch.equal(found[name], weight), name
    keys, was = gguf.GGUFReader(file).fields, gguf.GGUFReader(source).fields
    own = {"llama.attention.key_length", "llama.attention.value_length", gguf_file.OURS}
    assert set(keys) == set(was) | own
    others = {"GGUF.kv_count", "general.file_type", "tokenizer.chat_template"}
    for name in was.keys() - others:
        assert keys[name].contents() == was[name].contents(), name
    template = AutoTokenizer.from_pretrained(folder).chat_template
    assert keys["tokenizer.chat_template"].contents() == template


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_llama_cpp_answers_with_the_same_words(folder, source, answers, tmp_path, kind):
    file = gguf_file.to_gguf(folder, source, tmp_path / "m.gguf", kind)
    server = serve_with_llama_cpp(file)
    client = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    said = [ask(client, record) for record in QUESTIONS]
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= 5


def serve_with_llama_cpp(file):
    """A server on loopback, for as long as it is held."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.verbosity, params.warmup = 1024, -1, False
    return xllamacpp.Server(params)


def ask(client, record, model="merged", stream=False):
    """The client's answer: its text, or its parts as they come."""
    answer = client.chat.completions.create(
        model=model,
        messages=records.messages(record, records.SYSTEM),
        max_tokens=64,
        temperature=0,
        stream=stream,
    )
    return answer if stream else answer.choices[0].message.content


def test_the_rows_of_a_head_are_interleaved_and_no_other():
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    rows = gguf_file.interleave(weight, 2)[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- GGUF of small Llamas, as Llama 3: what llama.cpp must not be given

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<unk>", "<s>", "</s>", "<pad>", *ALPHABET, "th"]
ASKED = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"  # writes <s>
STRETCH = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, **STRETCH}
LLAMA3 |= {"original_max_position_embeddings": 256}  # so short that it matters
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}


def llama(**changes):
    """A Llama's config: grouped keys, a head width of its own, an untied head."""
    given = {"vocab_size": len(TOKENS), "hidden_size": 128, "intermediate_size": 256}
    given |= {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
    given |= {"num_key_value_heads": 2, "max_position_embeddings": 2048}
    given |= {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "bos_token_id": 1}
    given |= {"eos_token_id": 2, "tie_word_embeddings": False}
    return LlamaConfig(**given | {"initializer_range": 0.05} | changes)


def a_tokenizer(template=ASKED, adds_start=False):
    made = Tokenizer(BPE({t: n for n, t in enumerate(TOKENS)}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if adds_start:
        made.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, pad_token="<pad>", **named
    )


def write_source(file, config, keys=None, tensors=None, arch="llama", tokens=TOKENS):
    """A base's own GGUF as gguf writes one; it needs no weights."""
    writer = gguf.GGUFWriter(file, arch=arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in (keys or {}).items():
        write = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        write(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(3)  # not the folder's
    writer.add_chat_template("{{ 'not the folder`s' }}")
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def save(folder, config, tokenizer=None):
    """A merged model's folder."""
    models.random_llama(config).half().save_pretrained(folder)
    (tokenizer or a_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """A small Llama's folder, and its base's own GGUF."""
    config = llama()
    source = write_source(tmp_path / "source.gguf", config)
    return save(tmp_path / "small", config), source


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "m.gguf"


def change(file, **changes):
    """Change a JSON file, as another version of a library would have written it."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), "utf-8")


def rewrite(folder, change):
    """Change the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def contents(file):
    """The keys of a GGUF, and its tensors."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor.data for tensor in reader.tensors}


def refused(folder, source, out, said, kind="F16", error=ValueError):
    """The export is refused with these words, and nothing is left."""
    with pytest.raises(error, match=said) as caught:
        gguf_file.to_gguf(folder, source, out, kind)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists() or not [*out.parent.iterdir()]


def greedy(file, prompts):
    """The tokens with which llama.cpp goes on."""
    server, said = serve_with_llama_cpp(file), []
    for ids in prompts:
        asked = {"prompt": ids, "n_predict": 5, "temperature": 0, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said.append(json.load(answer)["tokens"])
    return said


def test_a_llama_3_goes_on_in_llama_cpp_as_in_transformers(small, out):
    folder, source = small
    seed = torch.Generator().manual_seed(0)
    lengths = (300, 420)  # all beyond the original 256
    prompts = [torch.randint(4, 260, (n,), generator=seed).tolist() for n in lengths]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = []
    for ids in prompts:
        ids = torch.tensor([ids])
        said = model.generate(ids, max_new_tokens=5, do_sample=False)
        ours.append(said[0, ids.shape[1] :].tolist())
    assert greedy(gguf_file.to_gguf(folder, source, out), prompts) == ours

    # the same weights without the factors (on some CPUs one of the two still agrees)
    change(folder / "config.json", rope_parameters=DEFAULT)
    without = greedy(gguf_file.to_gguf(folder, source, out), prompts)
    assert without != ours


def test_llama_3_s_factors_are_computed_where_the_source_has_none(small, out):
    _, tensors = contents(gguf_file.to_gguf(*small, out))
    wanted = []
    for pair in range(32):  # Llama 3's rule, pair by pair
        length = 2 * math.pi * 5e5 ** (pair / 32)
        share = min(max((256 / length - 1) / (4 - 1), 0), 1)
        wanted.append(1 / ((1 - share) / 8 + share))
    assert tensors["rope_freqs.weight"] == pytest.approx(wanted, rel=1e-5)
    assert min(wanted) == 1 and max(wanted) == 8


def test_the_source_s_factors_must_be_the_folder_s(tmp_path, out):
    config = llama(rope_parameters=DEFAULT)
    folder = save(tmp_path / "small", config)
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    source = write_source(tmp_path / "ones.gguf", config, tensors=ones)
    _, tensors = contents(gguf_file.to_gguf(folder, source, out))
    assert (tensors["rope_freqs.weight"] == 1).all()
    out.unlink()
    for count, value in ((32, 8), (16, 1)):
        more = {"rope_freqs.weight": np.full(count, value, np.float32)}
        source = write_source(tmp_path / f"{count}.gguf", config, tensors=more)
        refused(folder, source, out, "rope_freqs.weight in the source is not config")


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": YARN}, "rope_type 'yarn', expected default or llama3"),
        ({"rope_parameters": YARN | {"rope_type": "linear"}}, "rope_type 'linear'"),
        ({"rope_parameters": YARN | {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        (
            {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected silu"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config .*, expected None",
        ),
        ({"model_type": "mistral"}, "model_type 'mistral', expected llama"),
        ({"head_dim": 32}, r"is \[256, 128\] in .*, but \[128, 128\] by"),
        ({"num_key_value_heads": 4}, r"k_proj.weight .* \[256, 128\] by config.json"),
        (
            {"num_hidden_layers": 3},
            r"model.layers.2.* is missing in .*, but \[256, 128\] by",
        ),
        ({"num_hidden_layers": 1}, "model.layers.1.* has no place in a GGUF"),
        ({"attention_bias": True}, "layers.0.self_attn.[a-z]_proj.bias is missing"),
    ],
)
def test_a_network_that_llama_cpp_s_llama_is_not(small, out, changes, said):
    change(small[0] / "config.json", **changes)
    refused(*small, out, said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 30),
        ("llama.context_length", 8192),
        ("llama.embedding_length", 576),
        ("llama.feed_forward_length", 1536),
        ("llama.attention.head_count", 9),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.key_length", 32),
        ("llama.attention.layer_norm_rms_epsilon", 1e-6),
        ("llama.rope.dimension_count", 32),
        ("llama.rope.freq_base", 1e4),
        ("llama.vocab_size", 49152),
        ("llama.expert_count", 8),
        ("llama.rope.scaling.factor", 4.0),
    ],
)
def test_a_source_of_another_network_is_refused(small, tmp_path, out, key, value):
    source = write_source(tmp_path / "other.gguf", llama(), {key: value})
    said = f"{key} is .* in the source and .* in the folder.*give the base's own"
    refused(small[0], source, out, said)


def test_a_source_s_tensor_that_the_folder_lacks_is_named(small, tmp_path, out):
    bias = {"blk.0.attn_q.bias": np.ones(256, np.float32)}
    source = write_source(tmp_path / "bias.gguf", llama(), tensors=bias)
    refused(small[0], source, out, "the source has blk.0.attn_q.bias but the folder")


def test_what_is_no_gguf_of_a_llama_is_no_source(small, tmp_path, out):
    folder, source = small
    (tmp_path / "text.gguf").write_text("not one")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:3000])
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("text", "cut", "empty"):
        refused(folder, tmp_path / f"{name}.gguf", out, "cannot be read as GGUF")
    other = write_source(tmp_path / "qwen2.gguf", llama(), arch="qwen2")
    refused(
        folder, other, out, "architecture is 'qwen2' in the source.*give the base's own"
    )
    said = "is not a file: give the base's own GGUF"
    refused(folder, tmp_path / "absent", out, said, error=FileNotFoundError)


def test_the_vocabularies_of_model_tokenizer_and_source_are_one(tmp_path, out):
    config = llama()
    source = write_source(tmp_path / "source.gguf", config)
    folder = save(tmp_path / "padded", llama(vocab_size=len(TOKENS) + 8))
    refused(folder, source, out, "tokens is 261 in the source and 269 in the folder")
    more = a_tokenizer()
    more.add_tokens(["<sql>"])
    folder = save(tmp_path / "more", config, more)
    refused(folder, source, out, "token 261 is None in the source and '<sql>' in the")
    folder = save(tmp_path / "small", config)
    swapped = [*TOKENS[:-2], TOKENS[-1], TOKENS[-2]]
    source = write_source(tmp_path / "swapped.gguf", config, tokens=swapped)
    refused(folder, source, out, "token 259 is .* give the base's own GGUF")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, source, out, "holds no tokenizer", error=FileNotFoundError)


def test_a_model_that_is_no_llama_or_still_in_4_bits_is_refused(small, tmp_path, out):
    _, source = small
    sizes = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, num_key_value_heads=2))
    qwen.save_pretrained(tmp_path / "qwen")
    refused(
        tmp_path / "qwen", source, out, "model_type 'qwen2', expected llama.*convert_hf"
    )
    four = models.random_llama(llama(), train.nf4_config(env.profile()))
    four.save_pretrained(tmp_path / "four")
    said = r"\.down_proj\.weight in .* is torch.uint8, expected 16 or 32 bits: give a"
    refused(tmp_path / "four", source, out, said)
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    del config["quantization_config"]  # and where config.json does not say so
    (tmp_path / "four" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "four", source, out, said)


def test_a_second_set_of_weights_is_not_read(small, out):
    folder, source = small
    wanted = contents(gguf_file.to_gguf(folder, source, out))
    weights = load_file(folder / "model.safetensors")
    second = {f"x.{name}": weight for name, weight in weights.items()}
    save_file(second, folder / "consolidated.safetensors")
    found = contents(gguf_file.to_gguf(folder, source, out))
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "score.weight", "lora_A.weight"]
)
def test_a_tensor_without_a_name_in_gguf_is_named(small, out, name):
    rewrite(small[0], lambda weights: weights.update({name: torch.ones(256)}))
    refused(*small, out, f"{name} in .* has no place in a GGUF")


def test_the_frequencies_in_an_old_llama_s_files_are_left_out(small, out):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(small[0], lambda weights: weights.update({name: torch.ones(32)}))
    _, tensors = contents(gguf_file.to_gguf(*small, out))
    assert len(tensors) == 3 + 2 * 9 + 1  # and the factors


def test_a_head_is_written_as_transformers_reads_it(small, tmp_path, out):
    folder, source = small
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    refused(folder, source, out, "lm_head.weight is missing in .*: copy or merge")
    change(folder / "config.json", tie_word_embeddings=True)
    _, tensors = contents(gguf_file.to_gguf(folder, source, out))
    assert "output.weight" not in tensors
    head = torch.ones(len(TOKENS), 128)  # there, and another: it is not tied
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": head}))
    _, tensors = contents(gguf_file.to_gguf(folder, source, out))
    assert (tensors["output.weight"] == 1).all()


def test_a_width_that_does_not_fill_a_block_is_refused(tmp_path, out):
    config = llama(hidden_size=120)
    folder = save(tmp_path / "narrow", config)
    source = write_source(tmp_path / "narrow.gguf", config)
    for kind in ("Q8_0",):
        said = "32 does not divide its width: take F16"
        refused(folder, source, out, said, kind)
    assert gguf_file.to_gguf(folder, source, out, "F16").exists()


@pytest.mark.parametrize("number", [1e5, float("nan")])
def test_a_number_that_the_type_cannot_hold_is_refused(small, out, number):
    folder, source = small

    def spoil(weights):
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = weights[name].float()
        weights[name][0, 0] = number

    rewrite(folder, spoil)
    for kind in ("F16", "Q8_0"):
        refused(folder, source, out, f"blk.1.ffn_up.weight .* {kind} cannot", kind)
    if number == 1e5:
        assert gguf_file.to_gguf(folder, source, out, "BF16").exists()


def test_template_and_end_token_are_the_folder_s(small, out):
    folder, source = small
    keys, _ = contents(gguf_file.to_gguf(folder, source, out))
    assert keys["tokenizer.chat_template"] == ASKED
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    out.unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    refused(folder, source, out, r"ends at token 2 but its .* at \[0, 3\], .*: make")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (folder / "chat_template.jinja").unlink()
    keys, _ = contents(gguf_file.to_gguf(folder, source, out))
    assert "tokenizer.chat_template" not in keys


UNSTARTED = ASKED.replace("<s>", "Q:")


@pytest.mark.parametrize("adds_start", [True, False])
@pytest.mark.parametrize("template", [ASKED, UNSTARTED, None])
def test_a_prompt_begins_in_llama_cpp_as_in_transformers(
    tmp_path, out, template, adds_start
):
    tokenizer = a_tokenizer(template, adds_start)
    folder = save(tmp_path / "small", llama(), tokenizer)
    source = write_source(tmp_path / "source.gguf", llama())
    server = serve_with_llama_cpp(gguf_file.to_gguf(folder, source, out))
    client = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    if template:
        chat = [{"role": "user", "content": "the"}]
        said = client.chat.completions.create(model="m", messages=chat, max_tokens=1)
        ours = tokenizer.apply_chat_template(chat, return_dict=False)
        assert said.usage.prompt_tokens == len(ours)
    if template != UNSTARTED:  # there a chat's beginning decides
        said = client.completions.create(model="m", prompt="the", max_tokens=1)
        assert said.usage.prompt_tokens == len(tokenizer("the").input_ids)


def test_no_other_file_is_replaced(small, tmp_path):
    folder, source = small
    before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    for file in (source, tmp_path / "link.gguf"):
        with pytest.raises(FileExistsError, match="is the source itself: name another"):
            gguf_file.to_gguf(folder, source, file)
    assert source.read_bytes() == before
    (tmp_path / "notes.txt").write_text(f"{gguf_file.OURS}: weeks of work")
    with pytest.raises(FileExistsError, match="was not written by this package: name"):
        gguf_file.to_gguf(folder, source, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == f"{gguf_file.OURS}: weeks of work"
    with pytest.raises(IsADirectoryError, match="small"):
        gguf_file.to_gguf(folder, source, folder)
    theirs = write_source(tmp_path / "theirs.gguf", llama())
    with pytest.raises(FileExistsError, match="was not written by this package: name"):
        gguf_file.to_gguf(folder, source, theirs)
    for _ in range(2):  # what it wrote itself it replaces
        _, tensors = contents(gguf_file.to_gguf(folder, source, tmp_path / "mine.gguf"))
        assert "output.weight" in tensors


def test_where_nothing_can_be_written_nothing_is_computed(small, tmp_path, monkeypatch):
    def computed(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(gguf_file, "add_tensor", computed)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=f"File exists: '{tmp_path}/file'"):
        gguf_file.to_gguf(*small, tmp_path / "file" / "m.gguf")


def test_a_bad_export_is_refused_and_leaves_nothing(small, tmp_path, out):
    folder, source = small
    refused(folder, source, out, "kind 'Q2' is unknown: take one of F16", "Q2")
    refused(tmp_path, source, out, "no model.safetensors", error=FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, source, out, "model_type.* in its config.json")


def test_an_interrupted_export_leaves_nothing(small, out, monkeypatch):
    def stopped(_writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        gguf_file.to_gguf(*small, out)
    assert list(out.parent.iterdir()) == []


# ---- an endpoint


def test_transformers_serve_answers_and_streams(folder, answers):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += [str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            address = f"http://127.0.0.1:{port}/v1"
            client = openai.OpenAI(base_url=address, api_key="none")
            assert ask(client, QUESTIONS[1], str(folder)) == answers[1]
            parts = ask(client, QUESTIONS[1], str(folder), stream=True)
            texts = [part.choices[0].delta.content for part in parts if part.choices]
            assert len(texts) > 3 and "".join(filter(None, texts)) == answers[1]
        finally:
            server.terminate()


def wait_for(address, server, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=1)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise TimeoutError(f"{address} does not answer after {seconds} s")


# ---- llama.cpp's own quantizer


@pytest.fixture(scope="module")
def sixteen(folder, source, tmp_path_factory):
    """The merged folder as a GGUF file of type F16."""
    return gguf_file.to_gguf(
        folder, source, tmp_path_factory.mktemp("f16") / "f16.gguf"
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_llama_cpp_writes_the_bytes_of_the_gguf_package(sixteen, tmp_path, kind):
    """So what a merge loses in such a type can be simulated without llama.cpp."""
    file = llama_cpp.quantize(sixteen, tmp_path / "m.gguf", kind)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(sixteen).tensors}
    quantized = 0
    for tensor in gguf.GGUFReader(file).tensors:
        weight = np.float32(before[tensor.name].data)
        expected = gguf.quants.quantize(weight, tensor.tensor_type)
        assert np.array_equal(tensor.data, expected), tensor.name
        quantized += tensor.tensor_type.name == kind
    assert quantized >= 210
    llama_cpp.quantize(sixteen, file, kind)  # over its own file
    assert [*tmp_path.iterdir()] == [file]


def test_q4_k_m_is_more_than_its_name_where_rows_are_short(sixteen, answers, tmp_path):
    file = llama_cpp.quantize(sixteen, tmp_path / "m.gguf", "Q4_K_M")
    types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors]
    assert types.count("Q4_K") == 16 and types.count("Q5_0") == 166
    server = serve_with_llama_cpp(file)
    client = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    said = [ask(client, record) for record in QUESTIONS]
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= 4


def test_what_llama_cpp_refuses_is_said_in_its_words(sixteen, tmp_path):
    four_bits = llama_cpp.quantize(sixteen, tmp_path / "four.gguf", "Q4_0")
    with pytest.raises(ValueError, match="requantizing from type q4_0.*as F16 or BF16"):
        llama_cpp.quantize(four_bits, tmp_path / "eight.gguf", "Q8_0")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(sixteen.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="cannot make Q8_0 from .*broken.gguf"):
        llama_cpp.quantize(broken, tmp_path / "eight.gguf", "Q8_0")
    assert {*tmp_path.iterdir()} == {four_bits, broken}


def test_an_unknown_type_a_lost_source_and_a_foreign_file_are_refused(tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="'Q4_K_L' is unknown: take one of Q8_0, Q6_K"):
        llama_cpp.quantize(other, tmp_path / "m.gguf", "Q4_K_L")
    with pytest.raises(FileNotFoundError, match="gone.gguf is not a file"):
        llama_cpp.quantize(tmp_path / "gone.gguf", tmp_path / "m.gguf")
    with pytest.raises(FileExistsError, match="was not written by this package"):
        llama_cpp.quantize(__file__, other)
    assert other.read_bytes() == b"somebody's"


def test_without_its_wheel_the_quantizer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_wheel")
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-wheel"):
        llama_cpp.llama_library()
