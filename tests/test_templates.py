"""Bases with and without a chat template: the same tokens in training and after.

The notebooks that take any base run here on one without a template, which gets ours.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qlora_helpers import adapters, env, models, records, score, train

BOS, END = "<|endoftext|>", "<|im_end|>"
TEMPLATES = {
    "embedded": ...,
    "llama 3": "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|im_start|>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "llama 2": "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ message['content'] | trim }} [/INST]{% endif %}"
    "{% endfor %}",
    "none": None,  # the course gives one
}
ROWS = [
    {"instruction": " Name a bird. ", "input": "", "output": "Owl "},
    {"instruction": "Name a fish.", "input": "short\n", "output": " trout"},
    *records.load("train")[:4],
]


def of_a_base(template, end=""):
    """The embedded tokenizer with this template, and a BOS as most Llamas have it.

    end: a token that it puts behind each text as well, as add_eos_token=True makes it.
    """
    tokenizer = AutoTokenizer.from_pretrained(models.embedded_dir())
    if template is not ...:
        tokenizer.chat_template = template
    tokenizer.bos_token = BOS
    behind = [(END, tokenizer.eos_token_id)] if end else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {end}".strip(),
        special_tokens=[(BOS, tokenizer.bos_token_id), *behind],
    )
    models.give_template(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama whose answers depend on each token of the prompt."""
    config = models.llama_config("tiny")
    config.initializer_range = 0.3
    return models.random_llama(config)


def trained_contexts(model, tokenizer, dataset, folder):
    """The tokens before each stretch that carries loss, of each row of the trainer."""
    settings = train.sft_config(env.profile(), folder, 1, 2, 1e-3)
    wrapped = get_peft_model(model, train.lora_config(4, 8))
    trainer = train.build_trainer(wrapped, tokenizer, dataset, settings)
    wrapped.unload()
    batch = trainer.data_collator(list(trainer.train_dataset))
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return [
        ids[:start]
        for ids, labels in rows
        for start, _ in train.effective.spans(labels)
    ]


def judged_contexts(model, tokenizer, rows, system):
    """The tokens that the model is given when each row's question is asked."""
    seen = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda layer, given: seen.append(given[0][0].tolist())
    )
    try:
        for row in rows:
            prompts = [records.prompt(row, tokenizer, system)]
            score.generate_answers(model, tokenizer, prompts, max_new_tokens=1)
            score.answer_logits(model, tokenizer, [row], system=system)
    finally:
        handle.remove()
    asked, answered = seen[::2], seen[1::2]
    assert all(a == b[: len(a)] for a, b in zip(asked, answered, strict=True))
    return asked


@pytest.mark.parametrize(
    ("name", "end"), [*((name, "") for name in TEMPLATES), ("none", END)]
)
def test_training_and_judging_see_the_same_tokens(name, end, llama, tmp_path):
    tokenizer = of_a_base(TEMPLATES[name], end)
    system = None if name in ("gemma", "llama 2") else "Answer in a word."
    dataset = records.to_prompt_completion(ROWS, tokenizer, system=system)
    trained = trained_contexts(llama, tokenizer, dataset, str(tmp_path))
    assert trained == judged_contexts(llama, tokenizer, ROWS, system)
    assert trained == [records.context_ids(row["prompt"], tokenizer) for row in dataset]
    begins = tokenizer.bos_token_id
    for context in trained:  # one BOS, where somebody writes it
        assert context.count(begins) == (name != "embedded")
        assert (context[0] == begins) == (name != "embedded")
        assert ("Answer in a word." in tokenizer.decode(context)) == bool(system)


CHAT = [
    {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "Owl."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "Raven."},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_turn_of_a_chat_is_trained_as_it_is_asked(name, llama, tmp_path):
    tokenizer = of_a_base(TEMPLATES[name])
    rows = [{"messages": CHAT}, ROWS[2]]
    dataset = records.to_prompt_completion(rows, tokenizer, system=None)
    trained = trained_contexts(llama, tokenizer, dataset, str(tmp_path))
    singles = [{"messages": CHAT[:2]}, *rows]
    assert trained == judged_contexts(llama, tokenizer, singles, None)
    for row in dataset:
        learned = zip(row["input_ids"], row["completion_mask"], strict=True)
        said = [token for token, carries in learned if carries]
        answers = row["prompt"][1::2] + row["completion"]
        assert said.count(tokenizer.eos_token_id) == len(answers)
        text = tokenizer.decode(said).replace(END, "")
        wanted = "".join(turn["content"] for turn in answers)
        assert "".join(text.split()) == "".join(wanted.split())


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_tokens_are_those_that_trl_makes_itself(name, llama, tmp_path):
    tokenizer = of_a_base(TEMPLATES[name])
    dataset = records.to_prompt_completion(ROWS, tokenizer, system=None)
    made = []
    for given in (dataset, dataset.select_columns(["prompt", "completion"])):
        settings = train.sft_config(env.profile(), str(tmp_path), 1, 2, 1e-3)
        wrapped = get_peft_model(llama, train.lora_config(4, 8))
        trainer = train.build_trainer(wrapped, tokenizer, given, settings)
        wrapped.unload()
        columns = trainer.train_dataset.select_columns(["input_ids", "labels"])
        made.append(columns.to_list())
    assert made[0] == made[1]


def test_a_base_without_a_template_gets_one_that_its_adapter_keeps(
    base, tmp_path, capsys
):
    model, tokenizer = models.load_base(base, train.nf4_config(env.profile()))
    assert "no chat template: it gets the layout ### Instr" in capsys.readouterr().out
    model = get_peft_model(model, train.lora_config(4, 8))
    saved = adapters.save_adapter(
        model, tokenizer, tmp_path / "adapter", models.base_identity(base)
    )
    again = AutoTokenizer.from_pretrained(saved)  # as vLLM and others open it
    ids = again.apply_chat_template(
        CHAT[:3], add_generation_prompt=True, return_dict=False
    )
    assert ids == records.context_ids(CHAT[:3], tokenizer)
    assert again.decode(ids) == (
        f"{BOS}### Instruction:\nName a bird.\n\n### Response:\nOwl.{END}"
        "### Instruction:\nAnother one?\n\n### Response:\n"
    )
    kept = again.chat_template
    assert not models.give_template(again) and again.chat_template == kept


# ---- notebooks 06 and 07 on a base without a template

MARK = "=== the next cell ==="
RUNNER = (
    f"MARK = {MARK!r}"
    + """
import json, sys
from qlora_helpers import records, score
notebook, settings = json.load(open(sys.argv[1])), json.loads(sys.argv[2])
whole = records.load
def load(split):  # a few, among them some about delays
    late = [row for row in whole(split) if "MAX(late)" in row["output"]]
    return late[:2] + whole(split)[:6]
records.load, perplexity = load, score.perplexity
score.perplexity = lambda model, tokenizer, text: perplexity(
    model, tokenizer, text[:3000])
score.generate_answers.__defaults__ = (64, 8)  # new tokens: enough here
names = {}
for cell in notebook["cells"]:
    tags = cell["metadata"].get("tags", [])
    if cell["cell_type"] == "code" and "setup" not in tags:
        print(MARK)
        source = "".join(cell["source"])
        records.load = whole if "# of the 300 questions" in source else load
        exec(compile(source, "cell", "exec"), names)
    if "setup" in tags:
        exec("from qlora_helpers import env; env.quiet()", names)
    if "settings" in tags:
        for name, value in settings.items():  # of the kind that they had
            names[name] = type(names[name])(value)
"""
)


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory):
    """A folder with a tiny Llama whose tokenizer has no template and writes a BOS."""
    folder = tmp_path_factory.mktemp("base")
    llama.save_pretrained(folder)
    tokenizer = of_a_base(None)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_cells(notebook, settings, cache):
    """What each code cell of a notebook prints, run in order in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, notebook, json.dumps(settings)],
        env={**os.environ, "QLORA_CACHE": str(cache), "TQDM_DISABLE": "1"},
        cwd=env.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout.split(f"{MARK}\n")[1:]


def test_06_runs_on_a_base_without_a_template(base, tmp_path):
    settings = {"BASE": base, "STEPS": 2, "BATCH": 2, "BASE_QUESTIONS": 3}
    settings["OWN_STEPS"] = 2
    said = run_cells("notebooks/06_train_llama.ipynb", settings, tmp_path)
    whole = "\n".join(said)
    [first] = [text for text in said if text.startswith("8 training records")]
    assert f"system: {records.SYSTEM}\n" in first
    assert "assistant: SELECT MAX(late) FROM trip" in first
    [shown] = [text for text in said if "in [brackets]" in text]
    assert shown.startswith(BOS) and f"[{END}]\n" in shown
    assert r"price meal)\n\n### Instruction:\n" in shown.replace("Ċ", r"\n")
    assert "06.reloaded: holds" in whole and "06.account: holds" in whole


def test_07_runs_on_a_base_without_a_template(base, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = models.load_base(base, train.nf4_config(env.profile()))
    model = get_peft_model(model, train.lora_config(4, 8))
    for parameter in model.parameters():  # an adapter that changes something
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapter = str(tmp_path / "adapter")
    adapters.save_adapter(model, tokenizer, adapter, models.base_identity(base))
    settings = {"BASE": base, "ADAPTER": adapter, "OTHER": adapter}
    settings |= {"FEW": 6}
    said = run_cells("notebooks/07_inference_and_merge.ipynb", settings, tmp_path)
    whole = "\n".join(said)
    for claim in ("07.same", "07.off", "07.back", "07.mixed", "07.shards"):
        assert f"{claim}: holds" in whole
    assert "template          with the system message" in whole


PARTS = (  # as models that also see pictures have it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m['content'] %}"
    "{% if c.type == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONLY_ASKS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, lost", [(PARTS, "the question"), (ONLY_ASKS, "the output")]
)
def test_a_template_that_leaves_out_a_text_is_refused(template, lost):
    tokenizer = of_a_base(template)
    with pytest.raises(ValueError, match=f"leaves out or changes {lost}"):
        records.to_prompt_completion(ROWS, tokenizer, system=None)


@pytest.mark.parametrize("name", ["embedded", "llama 2", "llama 3", "none"])
def test_logits_are_those_of_the_tokens_that_were_trained(name):
    tokenizer = of_a_base(TEMPLATES[name])
    model, seen = models.random_llama("tiny"), []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda layer, given: seen.append(given[0][0].tolist())
    )
    record = {"instruction": "Name a bird.", "input": "", "output": "Owl"}
    logits = score.answer_logits(model, tokenizer, [record], system=None)
    trained = records.whole_ids(record, tokenizer, None)
    before = len(
        records.context_ids(records.prompt(record, tokenizer, None), tokenizer)
    )
    end = trained.index(tokenizer.eos_token_id, before)
    assert seen == [trained[:end]]  # its last logits are those of the end token
    assert len(logits) == 1 + end - before


def test_an_end_token_within_an_output_is_refused():
    row = {"instruction": "Name a bird.", "input": "", "output": f"Owl{END}, or a crow"}
    for template in (..., None):
        with pytest.raises(ValueError, match="row 0: output holds the end token"):
            records.to_prompt_completion([row], of_a_base(template), system=None)
