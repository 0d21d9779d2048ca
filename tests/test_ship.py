"""What leaves the house: read by transformers alone, by llama.cpp, by any client."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gguf
import openai
import pytest
import torch
import xllamacpp
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_helpers import env, evaluate, merge, models, records, ship

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
    prompts = [records.prompt(record, tokenizer) for record in QUESTIONS]
    return [text for text, _ in evaluate.generate_answers(model, tokenizer, prompts)]


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
    out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    new = out[0, ids["input_ids"].shape[1]:]
    said.append(tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(said))
"""


def test_a_fresh_process_without_bitsandbytes_and_peft_answers_the_same(
    folder, answers
):
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        input=json.dumps([records.messages(record) for record in QUESTIONS]),
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
    chat = records.messages(QUESTIONS[0])
    assert there.apply_chat_template(chat) == base.apply_chat_template(chat)


# ---- the card

ACCURACY = evaluate.Accuracy(0.96, 0.92, 0.99, 100, 1.0, [])


def write_card(folder):
    adapter = env.path("data/adapter")
    facts = {"into": "dequantized", "data": "questions on night trains"}
    facts |= {"licence": "Apache-2.0", "system": records.SYSTEM, "asked": "new words"}
    return ship.write_card(folder, adapter, facts, ACCURACY)


def test_the_card_says_what_the_model_is(folder):
    card = ModelCard.load(write_card(folder))
    base = models.base_identity(models.EMBEDDED)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    parts = (base["name"], base["revision"], "96.0% right", "night trains")
    for said in (
        *parts,
        "bitsandbytes 0.",
        "Apache-2.0",
        "dequantized",
        records.SYSTEM,
    ):
        assert said in card.text


def test_an_interrupted_card_leaves_the_old_one(folder, monkeypatch):
    before = write_card(folder).read_bytes()

    def stopped(card, _file):
        raise KeyboardInterrupt

    monkeypatch.setattr(ship.ModelCard, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_card(folder)
    assert (folder / "README.md").read_bytes() == before
    assert not list(folder.glob("*.part"))


# ---- GGUF


def test_what_was_exported_is_read_back_bit_for_bit(folder, source, tmp_path):
    """By transformers' reader of GGUF, which is not ours."""
    file = ship.to_gguf(folder, source, tmp_path / "m.gguf", "BF16")
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
    assert set(keys) == set(was)
    for name in ("tokenizer.chat_template", "llama.rope.freq_base"):
        assert keys[name].contents() == was[name].contents()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_llama_cpp_answers_with_the_same_words(folder, source, answers, tmp_path, kind):
    file = ship.to_gguf(folder, source, tmp_path / "m.gguf", kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.verbosity, params.warmup = 1024, -1, False
    server = xllamacpp.Server(params)
    client = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    said = [ask(client, record) for record in QUESTIONS]
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= 5


def ask(client, record, model="merged", stream=False):
    """The client's answer: its text, or its parts as they come."""
    answer = client.chat.completions.create(
        model=model,
        messages=records.messages(record),
        max_tokens=64,
        temperature=0,
        stream=stream,
    )
    return answer if stream else answer.choices[0].message.content


def test_the_rows_of_a_head_are_interleaved_and_no_other(folder):
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    rows = ship.interleave(weight, 2)[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_bad_export_is_refused_and_leaves_nothing(folder, source, tmp_path):
    with pytest.raises(ValueError, match="kind 'Q2' is unknown: take one of F16"):
        ship.to_gguf(folder, source, tmp_path / "m.gguf", "Q2")
    with pytest.raises(FileNotFoundError, match="not a merged model"):
        ship.to_gguf(tmp_path, source, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(folder, source, tmp_path, monkeypatch):
    def stopped(_writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        ship.to_gguf(folder, source, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


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
