"""The lost-property task: made again byte for byte, and fair."""

import os
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from qlora_helpers import env, models, records

FOLDER = env.path("data/lost_property")
FILES = ("train.jsonl", "train.csv", "test.jsonl")
SLIP = re.compile(r"[a-z]+ [a-z ]+; [A-Z][a-z]+; \d{1,2} [A-Z][a-z]+")


def chats(name):
    return [row["messages"] for row in records.read(FOLDER / name)]


def test_the_files_are_what_the_script_writes(tmp_path):
    command = [sys.executable, FOLDER / "build.py", tmp_path]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_every_slip_can_be_read_off_the_chat():
    good = [
        chat for chat in chats("train.jsonl") if SLIP.fullmatch(chat[-1]["content"])
    ]
    assert len(good) == 100 and len(chats("test.jsonl")) == 40
    for chat in good + chats("test.jsonl"):
        said = " ".join(turn["content"] for turn in chat if turn["role"] == "user")
        slip = chat[-1]["content"]
        assert SLIP.fullmatch(slip) and all(part in said for part in slip.split("; "))
        assert len(chat) in (3, 5)
        assert len(chat) == 3 or chat[2]["content"] in (
            "On which train?",
            "On which day?",
        )


def test_the_test_file_asks_about_other_losses_in_other_words():
    slips = {chat[-1]["content"] for chat in chats("train.jsonl")}
    for chat in chats("test.jsonl"):
        assert chat[-1]["content"] not in slips
    several = [len(chat) == 5 for chat in chats("test.jsonl")]
    assert 0.2 < sum(several) / len(several) < 0.5


@pytest.mark.parametrize(
    ("name", "kept", "said"),
    [
        (
            "train.jsonl",
            100,
            "3 of 103 records are left out: a turn is empty: 1 (row 17); longer than "
            "max_length=512 tokens: 1 (row 41); the turns do not alternate: 1 (row "
            "66)",
        ),
        ("train.csv", ..., "output is empty: 1 (row "),
    ],
)
def test_the_broken_rows_are_counted(name, kept, said, capsys):
    tokenizer = AutoTokenizer.from_pretrained(models.embedded_dir())
    given = records.read(FOLDER / name)
    dataset = records.to_prompt_completion(given, tokenizer, system=None, skip_bad=True)
    assert said in capsys.readouterr().out
    assert len(dataset) == (len(given) - 2 if kept is ... else kept)
