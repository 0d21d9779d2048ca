"""Records to prompt and completion: errors by row, layouts, and the loss mask."""

import contextlib
import copy
import math
import pathlib
import re

import pandas
import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qlora_helpers import env, models, records
from qlora_helpers.models.embedded import embedded_dir

ALPACA = [
    {
        "instruction": "Name the odd one out.",
        "input": "owl, raven, trout",
        "output": "trout",
    },
    {"instruction": "Greet the reader.", "input": "", "output": "Good evening."},
]


@pytest.fixture(scope="module")
def chat():
    """The embedded Llama's tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(embedded_dir())


@pytest.fixture(scope="module")
def bare(chat):
    """The same, with the template that a base without one is given."""
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = None
    assert models.give_template(tokenizer) and not models.give_template(tokenizer)
    return tokenizer


def with_bos(tokenizer):
    """A copy that puts a BOS in front of a text, as most Llamas' tokenizers do."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.fixture
def says(capsys):
    """Asks that what is done inside prints a line that matches."""

    @contextlib.contextmanager
    def saying(pattern):
        capsys.readouterr()
        yield
        assert re.search(pattern, capsys.readouterr().out.rstrip())

    return saying


@pytest.mark.parametrize("split", records.SPLITS)
def test_each_split_loads_and_can_be_trained_on(split):
    loaded = records.load(split)
    assert loaded
    for record in loaded:
        records.check_record(record)
        assert set(record) == {*records.COLUMNS, "family", "rule", "ordered"}


def test_an_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'test'.*train, validation, values"):
        records.load("test")


def test_three_databases_with_the_same_tables_and_other_rows():
    scripts = records.database_scripts()
    assert len(set(scripts)) == 3
    assert len({script.split("INSERT")[0] for script in scripts}) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output": ...}, "row 2: no column 'output': the columns .*input.*rename"),
        ({"instruction": ...}, "row 2: no column 'instruction'"),
        ({"output": ""}, "row 2: output is empty"),
        ({"output": " \n"}, "row 2: output is empty"),
        ({"output": None}, "row 2: output is empty"),
        ({"instruction": "  "}, "row 2: instruction is empty"),
        ({"output": 7}, r"row 2: output is not text: it is 7 \(int\)"),
        ({"instruction": ["a"]}, r"row 2: instruction is not text.* \['a'\] \(list\)"),
        ({"input": 3.5}, r"row 2: input is not text: it is 3.5 \(float\)"),
        ({"system": 3}, r"row 2: system is not text: it is 3 \(int\); make it text$"),
        ({"history": [["Who?", "Bob."]]}, "row 2: history holds earlier turns"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named(changed, message, chat, bare):
    broken = {k: v for k, v in (ALPACA[0] | changed).items() if v is not ...}
    for tokenizer in (chat, bare):
        with pytest.raises(ValueError, match=message):
            records.to_prompt_completion([*ALPACA, broken], tokenizer, system=None)


def test_what_is_no_dict_is_named(chat):
    with pytest.raises(
        ValueError, match="row 1: it is no dict: it is 'text'; give .*'instruction'"
    ):
        records.to_prompt_completion([ALPACA[0], "text"], chat, system=None)


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": ["a", "b"], "output": "ho"}, "write a chat into 'messages'"),
        ({"instruction": "a", "response": "b"}, "; rename response to output$"),
        ({"question": "a", "answer": "b", "tags": ["c"]}, "and answer to output"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "a chat into 'messages'"),
        ({"instruction": TURNS, "output": "ho"}, "a chat into 'messages'"),
        ({"prompt": "a", "completion": "b"}, "rename prompt to instruction"),
        ({"question": "a", "answer": "b"}, "and answer to output"),
        ({"text": "a b"}, "'text' seems to hold question and answer"),
    ],
)
def test_rows_of_another_kind_get_advice_that_can_be_followed(row, message, chat):
    with pytest.raises(ValueError, match=message) as error:
        records.to_prompt_completion([row], chat, system=None)
    # a renamed list is still not text
    assert "rename your columns" not in str(error.value)


def test_the_columns_that_are_not_used_are_named(chat, says, capsys):
    given = [ALPACA[0] | {"text": "as in Alpaca"}, ALPACA[1] | {"id": 3}]
    with says("not used: id, text "):
        records.to_prompt_completion(given, chat, system=None)
    given = [ALPACA[0] | {None: "a line of a CSV file with too many fields", 3: ""}]
    with says("not used: 3, None "):
        records.to_prompt_completion(given, chat, system=None)
    with pytest.raises(
        ValueError, match=r"no column 'output': the columns are 'instruction', N"
    ):
        records.to_prompt_completion([{"instruction": "a", None: ""}], chat, system="")
    # what the task's own records hold is known
    given = [records.load("train")[0] | {"system": "", "history": []}]
    given += [ALPACA[0] | {"history": math.nan}]  # as pandas fills it
    records.to_prompt_completion(given, chat, system=None)
    assert capsys.readouterr().out == ""


def chat_with(**keys):
    """A record with a chat whose last turn has these keys too."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"messages": [turns[0], turns[1] | keys]}


def test_the_keys_of_a_turn_that_are_not_used_are_named(chat, says, capsys):
    with says("not used: name of a turn "):
        records.to_prompt_completion([chat_with(name="Ann")], chat, system=None)
    empty = chat_with(name=None, weight=1, tool_calls=[])
    records.to_prompt_completion([empty], chat, system=None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", [{"weight": 0}, {"tool_calls": [{"id": "1"}]}])
def test_a_key_of_a_turn_that_would_change_the_training_is_refused(key, chat):
    with pytest.raises(ValueError, match=f"a turn has '{[*key][0]}', which is not sup"):
        records.to_prompt_completion([chat_with(**key)], chat, system=None)


def test_a_record_may_bring_its_own_system_message(chat, bare):
    pirate = ALPACA[1] | {"system": "You are a pirate."}
    for tokenizer in (chat, bare):
        own, ours = records.to_prompt_completion(
            [pirate, ALPACA[1]], tokenizer, system="Be brief."
        )
        assert "pirate" in str(own) and "brief" not in str(own)
        assert "brief" in str(ours) and "pirate" not in str(ours)
        asked = records.prompt(pirate, tokenizer, "Be brief.")  # when it is judged
        assert "pirate" in asked and "brief" not in asked


def test_nobody_gets_the_night_trains_tables_unasked(chat):
    with pytest.raises(TypeError, match="system"):
        records.to_prompt_completion(ALPACA, chat)
    with pytest.raises(TypeError, match="system"):
        records.prompt(ALPACA[0], chat)
    with pytest.raises(TypeError, match="system"):
        records.messages(ALPACA[0])


@pytest.mark.parametrize("given", [{"input": None}, {"input": " "}, {}])
def test_an_input_may_be_none_blank_or_absent(given, chat, bare):
    plain = {"instruction": "Greet the reader.", "output": "Good evening."}
    for tokenizer in (chat, bare):
        made = records.to_prompt_completion([plain | given], tokenizer, system=None)
        empty = records.to_prompt_completion(ALPACA[1:], tokenizer, system=None)
        assert made.to_list() == empty.to_list()


@pytest.mark.parametrize("layout", ["chat", "bare"])
def test_records_over_the_limit_are_counted_named_and_left_out(layout, request, says):
    tokenizer = request.getfixturevalue(layout)
    long = ALPACA[0] | {"output": "trout " * 100}
    given = [ALPACA[0], long, ALPACA[1], long]
    with says(r"2 of 4 .*max_length=90 tokens: 2 \(rows 1, 3\)$"):
        made = records.to_prompt_completion(
            given, tokenizer, system=None, max_length=90
        )
    kept = records.to_prompt_completion(ALPACA, tokenizer, system=None)
    assert made.to_list() == kept.to_list()
    with says(r"7 of 8 .*\(rows 0, 1, 2, 3, 4 …\)"):
        records.to_prompt_completion(
            [long] * 7 + ALPACA[:1], tokenizer, system=None, max_length=90
        )


@pytest.mark.parametrize("layout", ["chat", "bare"])
def test_the_limit_is_the_length_that_the_trainer_counts(layout, request, capsys):
    tokenizer = with_bos(request.getfixturevalue(layout))
    # the template writes BOS, and the tokenizer would again
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    [record] = records.load("train")[:1]

    def kept(max_length):
        return len(
            records.to_prompt_completion(
                [record], tokenizer, system=None, max_length=max_length
            )
        )

    whole = records.prompt(record, tokenizer, None) + record["output"] + "<|im_end|>"
    length = len(tokenizer(whole, add_special_tokens=False).input_ids)
    length += layout == "chat"  # the line break behind the end token
    assert kept(length) == 1
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=f"1 of 1 .*max_length={length - 1} tok"):
        kept(length - 1)


def test_a_row_that_the_trainer_would_cut_is_left_out_by_default(chat, says):
    long = ALPACA[0] | {"output": "trout " * records.MAX_LENGTH}
    with says("1 of 2 .*max_length=512"):
        made = records.to_prompt_completion([long, ALPACA[1]], chat, system=None)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (pandas.DataFrame(ALPACA), r"DataFrame: give .*records.to_dict\('records'\)"),
        (DatasetDict(train=Dataset.from_list(ALPACA)), r"give .*such as records\['tr"),
        (ALPACA[0], "a dict: give a list of dicts"),
        ("train.jsonl", "a str: give a list of dicts.* records.read"),
        (pathlib.Path("train.jsonl"), "Path: give a list of dicts.* records.read"),
        (None, "a NoneType: give a list of dicts"),
    ],
)
def test_what_is_no_list_of_records_is_told_how_to_become_one(given, words, chat):
    with pytest.raises(ValueError, match=f"records is .*{words}"):
        records.to_prompt_completion(given, chat, system=None)


@pytest.mark.parametrize("max_length", [0, -5, 2.5, "512", True])
def test_a_limit_that_is_no_length_is_refused(max_length, chat):
    with pytest.raises(ValueError, match="max_length is .* whole number"):
        records.to_prompt_completion(ALPACA, chat, system=None, max_length=max_length)


def test_a_system_message_is_text_or_there_is_none(chat, bare):
    for tokenizer in (chat, bare):
        with pytest.raises(ValueError, match=r"system is 3 \(int\): give .* or None"):
            records.to_prompt_completion(ALPACA, tokenizer, system=3)
        for make in (records.prompt, lambda r, t, system: records.messages(r, system)):
            blank = make(ALPACA[0], tokenizer, " \n")
            assert blank == make(ALPACA[0], tokenizer, None)


def test_no_records_at_all_is_an_error(chat):
    with pytest.raises(ValueError, match="list of records is empty: give at"):
        records.to_prompt_completion([], chat, system=None)


def test_a_tokenizer_without_an_end_is_an_error(bare):
    endless = copy.deepcopy(bare)
    endless.eos_token = endless.chat_template = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        models.give_template(endless)
    for make in (records.prompt, records.to_prompt_completion):
        with pytest.raises(ValueError, match=r"call models.give_template\(tokenizer\)"):
            make(
                ALPACA[:1] if make != records.prompt else ALPACA[0],
                endless,
                system=None,
            )


def test_an_output_that_joins_the_prompt_is_an_error(chat, bare):
    joining = ALPACA[0] | {"output": "\n\ntrout"}
    for tokenizer in (chat, bare):
        with pytest.raises(ValueError, match="row 1: .*white space at the output's"):
            records.to_prompt_completion([ALPACA[1], joining], tokenizer, system=None)
    thinks = copy.deepcopy(chat)
    thinks.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(ValueError, match="row 0: .*a chat template that keeps"):
        records.to_prompt_completion(ALPACA, thinks, system=None)


def test_alpaca_through_the_chat_template(chat):
    with_input, without = records.to_prompt_completion(ALPACA, chat, system="Be brief.")
    assert with_input["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": "Name the odd one out.\n\n### Input:\nowl, raven, trout",
        },
    ]
    assert with_input["completion"] == [{"role": "assistant", "content": "trout"}]
    assert without["prompt"][1]["content"] == "Greet the reader."


def test_the_given_template_writes_alpacas_layout(bare):
    with_input, without = (records.prompt(row, bare, None) for row in ALPACA)
    assert with_input == (
        "### Instruction:\nName the odd one out.\n\n"
        "### Input:\nowl, raven, trout\n\n### Response:\n"
    )
    assert without == "### Instruction:\nGreet the reader.\n\n### Response:\n"
    system = records.prompt(ALPACA[1], bare, "Be brief.")
    assert system == "Be brief.\n\n" + without
    for row in ALPACA:
        for text in (None, "Be brief."):
            asked = records.prompt(row, bare, text)
            assert records.alpaca_layout(row, text) == asked
            whole = bare.decode(records.whole_ids(row, bare, text))
            assert whole == asked + row["output"] + "<|im_end|>"


def test_a_chat_of_several_turns_in_alpacas_layout(bare):
    chat = [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]
    turn = "### Instruction:\nhi\n\n### Response:\nho<|im_end|>"
    [made] = records.to_prompt_completion([{"messages": chat}], bare, system=None)
    assert bare.decode(made["input_ids"]) == "Be brief.\n\n" + turn + turn
    odd = [{"role": "tool", "content": "3"}]
    with pytest.raises(Exception, match="the role tool is unknown"):
        bare.apply_chat_template(odd, tokenize=False)


def test_a_template_that_does_not_show_the_system_message_is_an_error(chat):
    deaf, strict = copy.deepcopy(chat), copy.deepcopy(chat)
    deaf.chat_template = "{{ messages[-1]['content'] }}"
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    for tokenizer, fault in [(deaf, "leaves out"), (strict, "refuses .*not supported")]:
        with pytest.raises(ValueError, match=f"chat template {fault}.*system=None"):
            records.prompt(ALPACA[1], tokenizer, "Be brief.")
        asked = records.prompt(ALPACA[1], tokenizer, None)
        assert asked == "Greet the reader."


def test_a_dataset_of_the_hub_gives_what_a_list_gives(chat):
    given = Dataset.from_list(ALPACA)
    made = records.to_prompt_completion(given, chat, system=None)
    columns = ["prompt", "completion", "input_ids", "completion_mask"]
    assert made.column_names == columns
    listed = records.to_prompt_completion(ALPACA, chat, system=None)
    assert made.to_list() == listed.to_list()


@pytest.mark.parametrize("given", [ALPACA, records.load("composition")[:10]])
def test_the_prompt_is_the_beginning_of_the_whole_example(given, chat):
    for record in given:
        asked = records.prompt(record, chat, records.SYSTEM)
        turns = records.messages(record, records.SYSTEM)
        turns.append({"role": "assistant", "content": record["output"]})
        whole = chat.apply_chat_template(turns, tokenize=False)
        assert whole.removeprefix(asked) == f"{record['output']}<|im_end|>\n"
        ids, all_ids = chat(asked).input_ids, chat(whole).input_ids
        assert all_ids[: len(ids)] == ids  # no token spans the two


def test_the_only_system_message_is_ours(chat):
    asked = records.prompt(ALPACA[0], chat, records.SYSTEM)
    assert asked.count("<|im_start|>system") == 1
    assert f"<|im_start|>system\n{records.SYSTEM}<|im_end|>" in asked
    assert "SmolLM" not in asked
    # without one, the template adds its own: this is why ours is always there
    assert "SmolLM" in records.prompt(ALPACA[0], chat, system=None)


@pytest.mark.parametrize(("layout", "end"), [("chat", "\n"), ("bare", "")])
def test_the_loss_is_on_the_answer_and_its_end_alone(layout, end, request, tmp_path):
    tokenizer = request.getfixturevalue(layout)
    given = [*ALPACA, *records.load("validation")[:4]]
    machine = env.profile()
    trainer = SFTTrainer(
        model=models.random_llama("tiny"),
        args=SFTConfig(
            output_dir=str(tmp_path), report_to="none", completion_only_loss=True,
            use_cpu=machine.use_cpu, fp16=machine.fp16, bf16=machine.bf16,
        ),
        train_dataset=records.to_prompt_completion(given, tokenizer, system="Go."),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["labels"].shape == batch["input_ids"].shape
    rows = zip(given, batch["input_ids"], batch["labels"], strict=True)
    for record, ids, labels in rows:
        learned = labels != -100
        assert (labels[learned] == ids[learned]).all()
        # the chat template closes each turn by a new line, and TRL counts it in
        assert (
            tokenizer.decode(labels[learned]) == record["output"] + "<|im_end|>" + end
        )
        first = learned.nonzero()[0].item()
        assert tokenizer.decode(ids[:first]) == records.prompt(record, tokenizer, "Go.")


# ---- chats of several turns

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "Owl."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "Raven."},
]
SHAREGPT = [
    {"from": "human", "value": "Name a bird."},
    {"from": "gpt", "value": "Owl."},
    {"from": "human", "value": "Another one?"},
    {"from": "gpt", "value": "Raven."},
]
MARKED = (  # ChatML, with what the assistant says marked as transformers wants it
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def test_each_answer_carries_loss_and_nothing_else_as_transformers_marks_it(chat):
    given = [{"messages": CHAT}, {"messages": CHAT[:3]}, ALPACA[0]]
    for row in records.to_prompt_completion(given, chat, system="Go."):
        marked = chat.apply_chat_template(
            row["prompt"] + row["completion"],
            chat_template=MARKED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert row["input_ids"] == marked["input_ids"]
        assert row["completion_mask"] == marked["assistant_masks"]
        assert 0 < sum(row["completion_mask"]) < len(row["input_ids"])


@pytest.mark.parametrize("layout", ["chat", "bare"])
def test_a_chat_is_the_record_that_it_says(layout, request):
    tokenizer = request.getfixturevalue(layout)
    made = records.to_prompt_completion(
        [
            {"messages": CHAT},
            {"conversations": SHAREGPT, "system": "Be brief."},
            {"messages": CHAT[1:], "instruction": None, "output": None},
            {"messages": CHAT[1:3]},
            {"instruction": "Name a bird.", "output": "Owl.", "messages": math.nan},
        ],
        tokenizer,
        system="Be brief.",
    ).to_list()
    assert made[0] == made[1] == made[2] and made[3] == made[4] != made[0]
    assert made[0]["prompt"] == CHAT[:4] and made[0]["completion"] == CHAT[4:]
    asked = records.prompt({"messages": CHAT}, tokenizer, None)
    assert "Owl." in asked and "Raven." not in asked
    assert records.answer({"messages": CHAT}) == "Raven."


@pytest.mark.parametrize(
    ("chat_given", "message"),
    [
        (CHAT[:4], "the turns do not alternate: .*'user'.*the assistant last"),
        (CHAT[:1], "the turns do not alternate"),
        (CHAT[1:3] + CHAT[4:], "the turns do not alternate"),
        (CHAT[1:2] + CHAT[:1] + CHAT[2:3], "the turns do not alternate"),
        ([{"role": "tool", "content": "x"}], r"the turns .*\['tool'\]"),
        ([{"role": "user"}], "a turn lacks 'role' or 'content': turn 0 of messages"),
        (["hi"], "a turn lacks .* is 'hi'"),
        (CHAT[:2] + [CHAT[2] | {"content": " "}], "a turn is empty: turn 2 of messa"),
        (CHAT[:2] + [CHAT[2] | {"content": None}], "a turn is not text: turn 2 of"),
        ("[]", "messages is no list: write a chat into 'messages', as a list"),
        (CHAT[:2] + [CHAT[2] | {"content": "Owl<|im_end|>"}], "output holds the end"),
    ],
)
def test_a_chat_that_cannot_be_trained_on_is_named(chat_given, message, chat):
    given = [ALPACA[0], {"messages": chat_given}]
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        records.to_prompt_completion(given, chat, system=None)


def test_a_record_is_one_thing_only(chat):
    both = ALPACA[0] | {"messages": CHAT}
    with pytest.raises(ValueError, match="messages and instruction are both filled"):
        records.to_prompt_completion([both], chat, system=None)


def test_a_template_that_writes_earlier_turns_in_another_way_is_an_error(chat):
    forgets = copy.deepcopy(chat)  # as templates that drop earlier thoughts do
    forgets.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ 'Hm. ' if m.role == 'assistant' and loop.last }}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    records.to_prompt_completion([{"messages": CHAT[:3]}], forgets, system=None)
    with pytest.raises(ValueError, match="row 0: an answer's tokens change .* turn 2"):
        records.to_prompt_completion([{"messages": CHAT}], forgets, system=None)


# ---- rows that are skipped, and files


def test_bad_rows_are_skipped_and_counted_by_reason(chat, capsys):
    long = ALPACA[0] | {"output": "trout " * 100}
    bad = [ALPACA[0] | {"output": text} for text in ("", None, 7, 8)]
    given = [ALPACA[0], *bad, long, ALPACA[1], {"messages": CHAT[:4]}, "text"]
    made = records.to_prompt_completion(
        given, chat, system=None, max_length=90, skip_bad=True
    )
    assert capsys.readouterr().out == (
        "7 of 9 records are left out: output is empty: 2 (rows 1, 2); output is not "
        "text: 2 (rows 3, 4); longer than max_length=90 tokens: 1 (row 5); the turns "
        "do not alternate: 1 (row 7); it is no dict: 1 (row 8)\n"
    )
    kept = records.to_prompt_completion(ALPACA, chat, system=None)
    assert made.to_list() == kept.to_list()
    with pytest.raises(ValueError, match="no record is left: 4 of 4 .*empty: 2"):
        records.to_prompt_completion(bad, chat, system=None, skip_bad=True)
    with pytest.raises(ValueError, match="row 1: output is empty"):
        records.to_prompt_completion(given, chat, system=None, max_length=90)
    with pytest.raises(ValueError, match="system is 3"):  # no row is at fault
        records.to_prompt_completion(given, chat, system=3, skip_bad=True)


@pytest.mark.parametrize(("rows", "held"), [(2, 1), (30, 3), (2000, 64)])
def test_some_rows_are_held_back_from_training(rows, held, capsys):
    given = Dataset.from_dict({"input_ids": [[n, n] for n in range(rows)]})
    training, validation = records.hold_back(given)
    parts = [tuple(row["input_ids"]) for part in (training, validation) for row in part]
    assert len(validation) == held and sorted(parts) == [(n, n) for n in range(rows)]
    assert capsys.readouterr().out == ""


def test_rows_held_back_that_occur_in_training_are_counted(capsys):
    records.hold_back(Dataset.from_dict({"input_ids": [[1]] * 20}))
    assert "2 of the 2 records held back occur in training" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one record to train on: give two or more"):
        records.hold_back(Dataset.from_dict({"input_ids": [[1]]}))


def test_a_file_gives_its_records(tmp_path):
    lines = tmp_path / "own.jsonl"
    lines.write_text(
        '\ufeff{"instruction": "a", "output": "ü"}\r\n\n{"messages": []}\n'
    )
    assert records.read(lines) == [
        {"instruction": "a", "output": "ü"},
        {"messages": []},
    ]
    table = tmp_path / "own.CSV"
    text = 'instruction,input,output\n"a, b",,007\n"NA","two\nlines",1.50\n'
    table.write_text(text, "utf-8-sig")
    assert records.read(str(table)) == [
        {"instruction": "a, b", "input": "", "output": "007"},
        {"instruction": "NA", "input": "two\nlines", "output": "1.50"},
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3, is not a JSON object .Expect"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2, is not a JSON object .it is a list."),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1, .*Exceeds the limit"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', "a key occurs twice: a, b, a"),
        ("a.jsonl", "[" * 100_000, "line 1, is not a JSON object .maximum recursion"),
        ("a.jsonl", "\n", "a.jsonl holds no rows"),
        ("a.csv", "a,b\n", "a.csv holds no rows"),
        ("a.csv", "", "a.csv holds no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3, is not CSV .3 fields, and 2 names"),
        ("a.csv", 'a,b\n1,"2\n', "line 2, is not CSV .unexpected end of data"),
        ("a.csv", "a,b\n1,2,3\n1,2,3\n", "line 2, is not CSV .3 fields, and 2 names"),
        ("a.csv", "a,a\n1,2\n", "has the columns .'a', 'a'.: give each its own"),
        ("a.csv", b"a,b\n\xe4,1\n", "a.csv is not UTF-8 .*save it again as UTF-8"),
        ("a.jsonl", b'{"a": "\xe4"}', "a.jsonl is not UTF-8"),
        ("a.json", "[]", "a.json ends in '.json': give a .jsonl file"),
        ("a", "[]", "a ends in '': give a .jsonl file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.csv"):
        records.read(tmp_path / "none.csv")


def test_a_stray_quote_swallows_no_lines(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text('instruction,input,output\nq1,,a1\nq2,,"a2\nq3,,a3\nq4,,"a4"\n')
    with pytest.raises(ValueError, match="line 5, is not CSV "):
        records.read(file)


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match="a text holds half a character"):
        records.check_record({"instruction": "hello \ud800", "output": "x"})


def test_examples_need_no_system_message():
    [record, *_] = records.load("phrasing")
    [first, *_] = records.few_shot(record, None, 2)["messages"]
    assert first["role"] == "user"
