"""The example script: from a file to a saved adapter, on a base without a template."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qlora_helpers import env, models

BOS = "<|endoftext|>"
SCRIPT = env.ROOT / "examples" / "train.py"


def process(folder, *arguments):
    """How subprocess starts the script, in a folder, with a cache of its own."""
    variables = {"QLORA_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"}
    return dict(
        args=[sys.executable, "-u", str(SCRIPT), *arguments],
        env={**os.environ, **variables, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *arguments):
    """The finished process of the script."""
    return subprocess.run(**process(folder, *arguments))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama whose tokenizer writes a BOS and has no chat template."""
    folder = tmp_path_factory.mktemp("base")
    models.random_llama("tiny").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models.embedded_dir())
    tokenizer.bos_token, tokenizer.chat_template = BOS, None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def alpaca(path, rows=40):
    """A file with the columns of tatsu-lab/alpaca; rows 3 and 7 have no output."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(rows):
            row = {"instruction": f"Say {n}.", "input": "Twice." if n % 2 else ""}
            row["output"] = "" if n in (3, 7) else f"{n} {n}"
            file.write(json.dumps(row | {"text": "the whole prompt"}) + "\n")
    return str(path)


def test_a_base_without_a_template_learns_alpacas_columns(base, tmp_path):
    data, output = alpaca(tmp_path / "own.jsonl"), tmp_path / "trained"
    how = ["--steps", "5", "--batch", "4", "--rank", "4", "--learning-rate", "2e-2"]
    how += ["--model", str(base), "--data", data, "--output", str(output)]
    done = run(tmp_path, *how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "has no chat template: it gets the layout ### Instruction:" in done.stdout
    assert "2 of 40 records are left out: output is empty: 2 (rows 3, 7)" in done.stdout
    assert "these columns are not used: text" in done.stdout
    assert "rows: 35 of 35 kept, 0 cut at 512 tokens" in done.stdout  # 3 held back
    losses = re.findall(r"validation loss after (\d+) steps: ([\d.]+)", done.stdout)
    assert [step for step, _ in losses] == ["0", "5"]
    assert float(losses[1][1]) < float(losses[0][1])
    question = re.search(r"question: (Say (\d+)\.[^:]*)\n", done.stdout)
    assert f"expected: {question[2]} {question[2]}\n" in done.stdout
    assert "### Input:\nTwice." in alpaca_prompt(output, "Say 1.", "Twice.")
    assert (output / "README.md").exists()


def alpaca_prompt(folder, instruction, extra):
    """What the saved tokenizer writes for a chat, as any server would."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": f"{instruction}\n\n### Input:\n{extra}"}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(f"{BOS}### Instruction:\n") and text.count(BOS) == 1
    return text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none.csv"], "there is no file none.csv"),
        (["--data", "one.csv"], "there is one record to train on"),
        (["--steps", "0"], "steps is 0"),
    ],
)
def test_what_cannot_be_trained_is_said(arguments, said, base, tmp_path):
    (tmp_path / "one.csv").write_text("instruction,output\nSay 1.,1\n", "utf-8")
    done = run(tmp_path, "--model", str(base), *arguments)
    assert done.returncode == 1 and said in done.stderr


def test_data_that_nobody_has_is_named(base, tmp_path):
    done = run(tmp_path, "--model", str(base), "--data", "nobody/has_this")
    assert done.returncode and "'nobody/has_this' is no file here" in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("or OWNER/NAME")


def test_a_file_that_comes_in_meanwhile_loses_no_training(base, tmp_path):
    data, output = alpaca(tmp_path / "own.jsonl"), tmp_path / "trained"
    how = ["--steps", "2", "--batch", "4", "--rank", "4"]
    how += ["--model", str(base), "--data", data, "--output", str(output)]
    with subprocess.Popen(**process(tmp_path, *how)) as started:
        for line in started.stdout:
            if "35 of 35 kept" in line:  # training begins
                output.mkdir()
                (output / "mine.txt").write_text("mine")
                break
        said = started.stdout.read()
        assert started.wait() == 0, started.stderr.read()[-3000:]
    assert "holds mine.txt" in said and "saved in the cache instead" in said
    place = re.search(r"the adapter is in (.+)", said)[1]
    assert (tmp_path / "cache") in pathlib.Path(place).parents
    assert os.listdir(output) == ["mine.txt"]
    assert "adapter_model.safetensors" in os.listdir(place)
