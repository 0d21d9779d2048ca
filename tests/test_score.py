"""Asking a model: generation, accuracy, intervals, perplexity."""

import copy
import math

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qlora_helpers import env, records, score, sql
from qlora_helpers.models import give_template
from qlora_helpers.models.load import never_repack
from qlora_helpers.score import (
    bootstrap_interval,
    generate_answers,
    judged,
    paired_interval,
    perplexity,
)
from qlora_helpers.sql import open_database

STARS = """
CREATE TABLE star (id INTEGER, name TEXT, magnitude REAL);
INSERT INTO star VALUES (1, 'Vega', 0.03), (2, 'Deneb', 1.25), (3, 'Altair', 0.76),
  (4, 'dark', NULL);
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def database():
    """A locked database of four stars."""
    opened = open_database(STARS)
    yield opened
    opened.close()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = bootstrap_interval(rng.random(80) < 0.7, confidence=0.8)
        covered += low <= 0.7 <= high
    assert 0.7 <= covered / 200 <= 0.9  # four standard errors about 0.8


def test_an_interval_repeats_holds_its_mean_and_narrows():
    few, many = [1, 0, 1, 1] * 5, [1, 0, 1, 1] * 50
    assert bootstrap_interval(few) == bootstrap_interval(few)
    mean, low, high = bootstrap_interval(few)
    assert mean == 0.75 and low < mean < high
    _, low_many, high_many = bootstrap_interval(many)
    assert low < low_many < 0.75 < high_many < high
    _, low_sure, high_sure = bootstrap_interval(few, confidence=0.99)
    assert low_sure < low and high_sure > high


@pytest.mark.parametrize("n", [1, 50, 300])
def test_all_right_or_all_wrong_is_not_certain(n):
    mean, low, high = bootstrap_interval([0] * n)
    assert (mean, low) == (0, 0)
    # at a true share of `high`, n wrong answers in a row have a chance of 2.5 %
    assert (1 - high) ** n == pytest.approx(0.025)
    assert bootstrap_interval([True] * n) == pytest.approx((1, 1 - high, 1))


@pytest.mark.parametrize("right", [0, 1, 29, 30])
def test_an_exact_interval_ends_where_the_count_is_too_unlikely(right, n=30):
    share, low, high = score.exact_interval(right, n)
    assert share == right / n and 0 <= low <= share <= high <= 1

    def chance(counts, true):
        return sum(math.comb(n, k) * true**k * (1 - true) ** (n - k) for k in counts)

    if right < n:
        assert chance(range(right + 1), high) == pytest.approx(0.025)
    if right > 0:
        assert chance(range(right, n + 1), low) == pytest.approx(0.025)


@pytest.mark.parametrize("right, n", [(1, 0), (3, 2), (-1, 2)])
def test_a_count_beyond_its_total_has_no_interval(right, n):
    with pytest.raises(ValueError):
        score.exact_interval(right, n)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_an_interval_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="expected finite numbers"):
        bootstrap_interval(values)


@pytest.mark.parametrize(
    "lost, gained, p",  # of scipy.stats.binomtest(lost, lost + gained)
    [(13, 0, 0.000244140625), (3, 12, 0.03515625), (25, 19, 0.4513808324), (4, 4, 1.0)],
)
def test_the_paired_test_is_the_exact_binomial_one(lost, gained, p):
    before, after = "1" * lost + "0" * gained, "0" * lost + "1" * gained
    found = score.paired_test(before + "0110", after + "0110")
    assert found == (lost, gained, pytest.approx(p, rel=1e-6))
    turned = score.paired_test([*map(int, after)], [*map(int, before)])
    assert turned == (gained, lost, pytest.approx(p, rel=1e-6))


def test_a_family_counts_once_in_a_paired_test():
    before, after = "1111 1110 00".replace(" ", ""), "0000 0101 00".replace(" ", "")
    families = [*"aaaa", *"bbcc", *"dd"]  # a loses four, b one, c none, d nothing
    assert score.paired_test(before, after)[:2] == (6, 1)
    assert score.paired_test(before, after, families)[:2] == (2, 0)
    with pytest.raises(ValueError):
        score.paired_test(before, after, families[1:])


def test_a_paired_test_without_a_difference_tells_nothing():
    assert score.paired_test("0110", "0110") == score.paired_test([], []) == (0, 0, 1.0)


@pytest.mark.parametrize("before, after", [("01", "011"), ("01", "02"), ([0.5], [1])])
def test_what_is_no_pair_of_verdicts_is_refused(before, after):
    with pytest.raises(ValueError, match="give 0 or 1 for each of the same questions"):
        score.paired_test(before, after)


def test_pairs_see_a_difference_that_two_intervals_miss():
    rng = np.random.default_rng(0)
    before = rng.normal(3.0, 0.5, 40)  # blocks of a text differ much
    after = before + rng.normal(0.05, 0.02, 40)  # models little
    mean, low, high = paired_interval(before, after)
    assert 0 < low < mean < high < 0.1
    assert bootstrap_interval(before).high > bootstrap_interval(after).low


@pytest.mark.parametrize(
    ("before", "after", "mean"), [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, -1)]
)
def test_pairs_that_all_agree_are_not_certain(before, after, mean):
    found, low, high = paired_interval([before] * 50, [after] * 50)
    assert found == mean and -1 <= low <= mean <= high <= 1
    assert 0.05 < high - low < 0.3


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan])
def test_a_confidence_is_a_share(confidence):
    for given in ([1, 0, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="confidence is .* between 0 and 1"):
            bootstrap_interval(given, confidence)
        with pytest.raises(ValueError, match="confidence is .* between 0 and 1"):
            paired_interval([0, 0, 0], given, confidence)


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="expected pairs"):
        paired_interval([1, 0], [1])


LESSONS = {  # what the tiny Llama learns by heart
    "count": "SELECT count(*) FROM star",
    "who is the brightest one": "SELECT name FROM star ORDER BY magnitude LIMIT 1",
    "all names": "SELECT name FROM star",
    "drop": "DROP TABLE star",
    "which stars have no magnitude": "SELECT id FROM star",
}


@pytest.fixture(scope="module")
def parrot():
    """A Llama of two layers that was trained for a second or two on LESSONS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<end>", "<answer>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>",
        additional_special_tokens=["<answer>"], padding_side="right",
    )  # fmt: skip
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=1, pad_token_id=0,
        **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    texts = [f"{q}<answer>{sql}<end>" for q, sql in LESSONS.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
        ).loss.backward()
        optimizer.step()
    return model, tokenizer


PROMPTS = [f"{question}<answer>" for question in LESSONS]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
)


@pytest.fixture(scope="module")
def nf4_parrot(parrot, tmp_path_factory):
    """The same Llama, its layers in NF4."""
    model, tokenizer = parrot
    folder = tmp_path_factory.mktemp("parrot")
    model.save_pretrained(folder)
    quantized = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=NF4, device_map="cpu"
    )
    never_repack(quantized)
    return quantized, tokenizer


def test_batches_answer_like_one_at_a_time_and_in_order(parrot):
    expected = [(sql, True) for sql in LESSONS.values()]
    for batch_size in (1, 2, 5):
        assert generate_answers(*parrot, PROMPTS, batch_size) == expected
    assert generate_answers(*parrot, PROMPTS[::-1], 3) == expected[::-1]


def test_prompts_that_begin_alike_answer_as_alone(parrot):
    alike = [
        "all names<answer>",
        "all name<answer>",
        "all<answer>",
        "all names<answer>",
    ]
    alone = [generate_answers(*parrot, [prompt])[0] for prompt in alike]
    assert generate_answers(*parrot, alike) == alone
    assert len({text for text, _ in alone}) > 1


def test_answering_leaves_the_layers_as_they_were_even_interrupted(nf4_parrot):
    model, tokenizer = nf4_parrot
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    before = generate_answers(model, tokenizer, PROMPTS)
    inputs = torch.ones(2, 64)
    for layer in layers[:4]:
        expected = layer(inputs)
        with score.answering(model):
            assert torch.equal(layer(inputs), expected)
            assert "forward" in vars(layer)
    with pytest.raises(KeyboardInterrupt), score.answering(model):
        raise KeyboardInterrupt
    assert layers and not any("forward" in vars(layer) for layer in layers)
    assert generate_answers(model, tokenizer, PROMPTS) == before


def test_4_bit_layers_stay_4_bit_where_memory_is_short(nf4_parrot, monkeypatch):
    model, tokenizer = nf4_parrot
    expected = generate_answers(model, tokenizer, PROMPTS)
    monkeypatch.setattr(env, "total_ram_gib", lambda: 1e-6)
    with score.answering(model):
        assert not any("forward" in vars(module) for module in model.modules())
    assert generate_answers(model, tokenizer, PROMPTS) == expected


def test_generating_leaves_model_and_tokenizer_as_they_were(parrot):
    model, tokenizer = parrot
    for training in (True, False):
        model.train(training)
        generate_answers(model, tokenizer, PROMPTS[:2])
        assert model.training is training
        assert model.model.layers[0].mlp.training is training
    model.train()
    with pytest.raises(RuntimeError), torch.device("meta"):
        generate_answers(model, tokenizer, PROMPTS[:2])
    assert model.training
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "<pad>"


def test_an_answer_that_was_cut_says_so(parrot):
    [(text, stopped)] = generate_answers(*parrot, PROMPTS[:1], max_new_tokens=6)
    assert (text, stopped) == ("SELECT", False)
    assert generate_answers(*parrot, []) == []


def test_every_end_token_stops(parrot):
    model, tokenizer = parrot
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    space = tokenizer.convert_tokens_to_ids("Ġ")
    model.generation_config.eos_token_id = [1, space]  # as Llama 3: two ends
    assert generate_answers(model, tokenizer, PROMPTS[:1]) == [("SELECT", True)]
    model.generation_config.eos_token_id = None  # the tokenizer's own is enough
    model.generation_config.do_sample = True  # as instruct models ask
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 9.0
    tokenizer.pad_token = None
    assert generate_answers(model, tokenizer, PROMPTS) == [
        (sql, True) for sql in LESSONS.values()
    ]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        generate_answers(model, tokenizer, PROMPTS)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_but_the_end_is_taken_from_the_generation_config(wrapped, parrot):
    model, tokenizer = copy.deepcopy(parrot[0]), parrot[1]
    own = model.generation_config
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    own.no_repeat_ngram_size = 1
    own.suppress_tokens = tokenizer("S")["input_ids"]
    before = own.to_dict()
    assert generate_answers(model, tokenizer, PROMPTS) == [
        (sql, True) for sql in LESSONS.values()
    ]
    seen = []
    layer = (model.get_base_model() if wrapped else model).lm_head
    layer.register_forward_hook(
        lambda *_: seen.append(model.generation_config.to_dict())
    )
    assert score.generation_speed(model, 1, prompt=4, tokens=2) > 0
    assert {each["no_repeat_ngram_size"] for each in seen} == {None}
    assert model.generation_config.to_dict() == before == own.to_dict()


@pytest.mark.parametrize(
    ("prompts", "batch_size", "words"),
    [
        ("count<answer>", 64, "prompts is one text: give a list"),
        (PROMPTS, 0, "batch_size is 0"),
        (PROMPTS, 2.5, "batch_size is 2.5"),
        ([*PROMPTS, ""], 64, "prompt 5 is empty"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts, batch_size, words, parrot):
    with pytest.raises(ValueError, match=words):
        generate_answers(*parrot, prompts, batch_size)
    if prompts[-1] == "":  # BOS is a prompt
        tokenizer = bos(parrot[1])
        assert len(generate_answers(parrot[0], tokenizer, prompts)) == len(prompts)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_peft_model_answers_and_still_trains(kind, parrot, tmp_path):
    model, tokenizer = parrot
    model.save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16 if kind == "bf16" else torch.float32,
        quantization_config=NF4 if kind == "nf4" else None,
        device_map="cpu",
    )
    plain = generate_answers(base, tokenizer, PROMPTS)
    right = sum(
        text == sql for (text, _), sql in zip(plain, LESSONS.values(), strict=True)
    )
    assert right >= 3  # what four bits, or eight bits of mantissa, leave
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    computed = set()
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *a: computed.add(a[2].dtype))
    assert generate_answers(adapted, tokenizer, PROMPTS) == plain  # B is zero
    # as the Trainer computes them: in bf16 under autocast, where the model is bf16
    assert computed == {base.dtype}
    assert perplexity(adapted, tokenizer, "all names" * 5, block=8).value > 1
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)


@pytest.fixture
def asked(monkeypatch):
    """Prompts in the parrot's own layout; the system messages they were made with."""
    systems = []

    def prompt(record, tokenizer, system):
        systems.append(system)
        return f"{record['instruction']}<answer>"

    monkeypatch.setattr(records, "prompt", prompt)
    return systems


def test_accuracy_of_a_model_and_its_rows(parrot, database, asked):
    golds = {
        "count": "SELECT count(id) FROM star",
        "all names": "SELECT name FROM star WHERE id > 0",
        "which stars have no magnitude": "SELECT id FROM star WHERE magnitude IS NULL",
        "drop": "SELECT name FROM star",
    }
    golded = [
        {"instruction": question, "input": "", "output": sql, "ordered": False}
        for question, sql in golds.items()
    ]
    found = score.execution_accuracy(*parrot, golded, [database], system="Tables")
    assert asked == ["Tables"] * 4
    assert [row["right"] for row in found.rows] == [True, True, False, False]
    assert [row["question"] for row in found.rows] == list(golds)
    assert found.rows[2]["reason"] == "4 rows, not 1"
    assert found.rows[3]["reason"].startswith("error: only a query may run")
    assert found.rows[3]["predicted"] == "DROP TABLE star"
    assert (found.accuracy, found.n, found.stopped) == (0.5, 4, 1.0)
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert repr(found).startswith("50.0% right (") and "n = 4" in repr(found)


COUNT = {"instruction": "count", "output": "SELECT count(id) FROM star"}


def test_records_of_ones_own_need_no_order_and_no_list(parrot, database, asked):
    found = score.execution_accuracy(
        *parrot, (record for record in [COUNT]), [database], system=None
    )
    assert (found.accuracy, found.n) == (1, 1)


@pytest.mark.parametrize(
    ("given", "script", "error", "words"),
    [
        ([], None, ValueError, "list of records is empty"),
        (
            [COUNT, {"instruction": "a"}],
            None,
            ValueError,
            "row 1: no column 'output",
        ),
        ([COUNT | {"output": "SELECT 1 WHERE 0"}], None, ValueError, "cannot judge"),
        ([COUNT], STARS, TypeError, "databases is .*sql.open_database"),
    ],
)
def test_what_cannot_be_judged_is_not_asked(
    given, script, error, words, database, monkeypatch
):
    monkeypatch.setattr(score, "generate_answers", None)  # a call would fail
    with pytest.raises(error, match=words):
        score.execution_accuracy(None, None, given, [script or database], system=None)
    if script is None and "cannot judge" not in words:
        with pytest.raises(error, match=words):
            score.answer_logits(None, None, given, system=None)


NAMES = [
    {"instruction": question, "output": sql}
    for question, sql in LESSONS.items()
    if question != "drop"
]


def test_accuracy_by_exact_match_and_by_a_judge_of_ones_own(parrot, asked):
    wrong = [NAMES[0], NAMES[1] | {"output": f" {NAMES[1]['output']}\n"}, *NAMES[2:]]
    wrong[-1] = wrong[-1] | {"output": "SELECT another"}
    found = score.accuracy(*parrot, wrong, system="Tables")
    assert asked == ["Tables"] * len(wrong)
    assert [row["right"] for row in found.rows] == [True] * (len(wrong) - 1) + [False]
    assert found.rows[1]["gold"] == wrong[1]["output"]
    assert found.rows[-1]["predicted"] == NAMES[-1]["output"]
    assert found.stopped == 1 and found.n == len(wrong)

    def selects(text, record):
        return text.startswith(record["output"][:6])

    assert score.accuracy(*parrot, wrong[2:], selects, system=None).accuracy == 1
    cut = score.accuracy(*parrot, wrong, system=None, max_new_tokens=2)
    assert (cut.accuracy, cut.stopped) == (0, 0)


def test_accuracy_judges_the_last_answer_of_a_chat(parrot, monkeypatch):
    def prompt(record, tokenizer, system):
        return records.messages(record, system)[-1]["content"] + "<answer>"

    monkeypatch.setattr(records, "prompt", prompt)
    turns = [("user", "drop"), ("assistant", "?"), ("user", "count")]
    chat = [{"role": role, "content": text} for role, text in turns]
    chat.append({"role": "assistant", "content": LESSONS["count"]})
    found = score.accuracy(*parrot, [{"messages": chat}], system=None)
    assert found.rows[0] | {"reason": ""} == {
        "question": "count", "gold": LESSONS["count"],
        "predicted": LESSONS["count"], "right": True, "reason": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda text, record: None, r"row 0: the judge returned None \(NoneType\) for"),
        (lambda text, record: record["gold"], "row 0: the judge raised KeyError"),
        (lambda text, record: False, "row 0: the judge calls the record's own answer"),
        (lambda text: True, "row 0: the judge raised TypeError"),
        (lambda text, record: text == NAMES[0]["output"], "row 1: .* own answer wrong"),
    ],
)
def test_a_judge_that_cannot_judge_is_named_before_anything_is_asked(
    judge, words, monkeypatch
):
    monkeypatch.setattr(judged, "generate_answers", None)  # a call would fail
    with pytest.raises(ValueError, match=words):
        score.accuracy(None, None, NAMES, judge, system=None)


def test_a_judge_that_fails_at_an_answer_names_its_row(parrot, asked):
    given = [NAMES[0], NAMES[1] | {"output": "SELECT another"}]
    golds = [record["output"] for record in given]

    def only_golds(text, record):
        return golds.index(text) >= 0

    with pytest.raises(ValueError, match="row 1: the judge raised ValueError") as error:
        score.accuracy(*parrot, given, only_golds, system=None)
    assert isinstance(error.value.__cause__, ValueError)  # with its traceback


@pytest.mark.parametrize("wrong", [STARS, [], [STARS], None])
def test_databases_that_are_not_open_are_refused(wrong, database):
    for given in (wrong, database):  # one database is no list of them
        with pytest.raises(
            TypeError, match="give a list of one or more open databases"
        ):
            sql.judge("SELECT 1", COUNT, given)
    with pytest.raises(TypeError, match="give a list of one or more open databases"):
        score.ask("count", None, None, wrong, system=None)


def test_ask_shows_sql_and_rows(parrot, database, asked):
    answer = score.ask("all names", *parrot, database, system=None)
    assert answer.rows == [("Vega",), ("Deneb",), ("Altair",), ("dark",)]
    shown = [line.strip() for line in repr(answer).splitlines()]
    assert shown == [
        "SELECT name FROM star", "name", "Vega", "Deneb", "Altair", "dark",
    ]  # fmt: skip
    refused = score.ask("drop", *parrot, database, system=None)
    assert repr(refused).startswith("DROP TABLE star\nerror: only a query may run")


def test_the_system_message_can_be_another(parrot, database):
    model, tokenizer = parrot
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<answer>"  # what comes first
    answer = score.ask("n", model, tokenizer, database, system="all names")
    assert answer.sql == LESSONS["all names"]
    assert score.ask("drop", model, tokenizer, database, system=None).error
    for question, system, right in [
        ("n", "count", 1),  # a letter of each system message
        ("n", "all names", 0),
        ("drop", None, 0),
    ]:
        gold = {"instruction": question, "output": LESSONS["count"], "ordered": False}
        found = score.execution_accuracy(
            model, tokenizer, [gold], [database], system=system, batch_size=1
        )
        assert found.accuracy == right


def test_an_answer_shows_ten_rows_and_says_how_many_more():
    rows = [(i, None) for i in range(13)]
    shown = repr(score.Answer("SELECT 1", ["id", "x"], rows, None)).splitlines()
    assert [line.split() for line in shown[1:3]] == [["id", "x"], ["0", "NULL"]]
    assert len(shown) == 13 and shown[-1] == "... 3 more rows"
    empty = repr(score.Answer("SELECT 1", ["id"], [], None))
    assert empty.splitlines() == ["SELECT 1", "no rows"]


def test_perplexity_is_the_models_own_loss(parrot):
    model, tokenizer = parrot
    text = "SELECT name FROM star ORDER BY magnitude LIMIT 1" * 3
    found = perplexity(model, tokenizer, text, block=16)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert found.tokens == 16 * ((ids.shape[1] - 1) // 16) == 16 * len(found.nll)
    for i in (0, len(found.nll) - 1):
        piece = ids[:, 16 * i : 16 * i + 17]
        with torch.no_grad():
            loss = model(input_ids=piece, labels=piece).loss.item()
        assert found.nll[i] == pytest.approx(loss, rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(found.nll) / len(found.nll)))
    assert found.low < found.value < found.high
    assert f"{found.tokens} tokens" in repr(found)


def bos(tokenizer):
    """A copy that puts <answer> in front of a text and <end> behind it by itself."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<answer> $A <end>", special_tokens=[("<answer>", 2), ("<end>", 1)]
    )
    return tokenizer


def test_perplexity_gives_each_block_the_token_that_texts_begin_with(parrot):
    model, tokenizer = parrot
    text = "SELECT name FROM star ORDER BY magnitude LIMIT 1" * 3
    found = perplexity(model, bos(tokenizer), text, block=16)
    ids = tokenizer(text)["input_ids"]
    for i in (0, len(found.nll) - 1):
        piece = torch.tensor([[2, *ids[16 * i : 16 * i + 17]]])
        labels = piece.clone()
        labels[0, :2] = -100  # BOS and the first token are given
        with torch.no_grad():
            loss = model(input_ids=piece, labels=labels).loss.item()
        assert found.nll[i] == pytest.approx(loss, rel=1e-5)
    without = perplexity(model, tokenizer, text, block=16)
    assert found.tokens == without.tokens and found.nll != without.nll


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)
def test_a_prompt_begins_with_bos_where_no_template_writes_it(template, parrot):
    model, tokenizer = parrot[0], bos(parrot[1])
    tokenizer.chat_template = template
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda layer, given, out: seen.append(given[0][0].tolist())
    )
    record = {"instruction": "count", "output": "SELECT"}
    try:
        generate_answers(model, tokenizer, ["count"], max_new_tokens=1)
        give_template(tokenizer)
        score.answer_logits(model, tokenizer, [record], system=None)
    finally:
        handle.remove()
    given, judged = seen
    ids = parrot[1]("count")["input_ids"]
    assert given == ([2, *ids] if template is None else ids)
    assert (judged[0] == 2) == (template is None)
    assert 1 not in judged  # no end token before the answer, nor behind it


def test_perplexity_of_noise_on_an_untrained_model_is_the_vocabulary(parrot):
    _, tokenizer = parrot
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)  # in training mode
    found = perplexity(model, tokenizer, "some prose. " * 40, block=64)
    assert found.value == pytest.approx(len(tokenizer), rel=0.1)
    assert model.training
    assert len(perplexity(model, tokenizer, "short", block=64).nll) == 1
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, tokenizer, "x")
    for block in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"block is {block}"):
            perplexity(model, tokenizer, "some prose", block=block)


def test_equal_pairs_of_nats_have_no_width():
    assert paired_interval([3.1, 2.9], [3.1, 2.9]) == (0, 0, 0)
