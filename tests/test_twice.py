"""Each cell may be run again, and after an interrupt, and ends as it did at first."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import nbformat
import pytest
import rules
import torch
import twice
from peft import get_peft_model
from transformers import LlamaConfig

from qlora_helpers import adapters, env, models, train
from qlora_helpers.models import embedded
from tools import course

NOTEBOOKS = {path.stem[:2]: path for path in course.find()}
SMALL = {  # settings with which a notebook takes seconds; the claims may not hold
    "00": 'ADAPTER = env.cache_dir() / "one"\n'
    "QUESTION, STEPS, BATCH, QUESTIONS = 0, 2, 2, 3",
    "01": "SAMPLES, SEEDS, FRESH_STEPS, LAYERS = 2**14, 2, 4, [0, 15]",
    "02": 'SAMPLES, SHAPES = 2, ["1B", "8B"]',
    "03": "ROWS, TOKENS, STEPS, BATCH = 4, 32, 2, 2",
    "04": 'SHAPE, ROWS, LAYERS, CARDS = "tiny", 2, 1, [15]\n'
    "LENGTH, PROSE_LENGTH, PROSE_ROWS = 256, 16, 2",
    "05": "RANKS = [4, 16]",
    "06": "STEPS, BATCH, BASE_QUESTIONS, OWN_STEPS = 2, 2, 3, 2",
    "07": 'ADAPTER, OTHER = [env.cache_dir() / NAME for NAME in ("one", "two")]\n'
    "FEW = 6",
    "08": 'ADAPTER = env.cache_dir() / "one"\nQUESTIONS, FEW, TOKENS = 6, 6, 8',
}
TINY = {  # of the embedded Llama; 16 layers, as the notebooks look at one of them
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 16,
}
GGUF_NAMES = {
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.rope.dimension_count": "head_dim",
    "llama.block_count": "num_hidden_layers",
}


def make_embedded(cache):
    """Put a tiny Llama where the embedded one would be, with its tokenizer and GGUF."""
    real, folder = models.embedded_dir(), cache / embedded.SMOLLM2.folder
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("model*", "*.gguf"))
    config = LlamaConfig.from_pretrained(real, **TINY)
    models.random_llama(config).bfloat16().save_pretrained(folder)
    source = next(real.glob("*.gguf"))
    writer = gguf.GGUFWriter(folder / source.name, arch="llama")
    for key, field in gguf.GGUFReader(source).fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = TINY[GGUF_NAMES[key]] if key in GGUF_NAMES else field.contents()
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, value, field.types[0], sub_type=sub)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / embedded.MANIFEST).unlink(missing_ok=True)
    embedded.write_manifest(folder, embedded.SMOLLM2)


def make_adapter(folder, seed):
    model, _ = models.load_base(models.EMBEDDED, train.nf4_config(env.profile()))
    model = get_peft_model(model, train.lora_config())
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapters.save_adapter(model, None, folder, models.base_identity())


def report(path, settings, cache):
    """What tests/twice.py says of a notebook: a line for each difference."""
    file = cache / f"{path.stem}.txt"
    script = env.ROOT / "tests" / "twice.py"
    more = {
        "QLORA_CACHE": str(cache),
        "PYTHONPATH": str(env.ROOT),
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script, path, settings, file],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
    )
    return file.read_text(encoding="utf-8") if not done.returncode else done.stderr


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """What each chosen notebook reports, two notebooks at a time: {number: future}."""
    cache = tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patch:
        make_embedded(cache)
        patch.setenv("QLORA_CACHE", str(cache))
        for seed, name in enumerate(("one", "two")):
            make_adapter(cache / name, seed)
        prose = env.path("data/prose.txt").read_text(encoding="utf-8")[:2500]
        (cache / "prose.txt").write_text(prose, encoding="utf-8")

    def of_notebook(number):
        return report(NOTEBOOKS[number], SMALL[number], cache)

    # cells of notebooks, which nbval collects, have no fixtures
    items = request.session.items
    users = [i for i in items if "reports" in getattr(i, "fixturenames", ())]
    chosen = {item.callspec.params["number"] for item in users}
    # those that take longest come last in the course, and begin first here
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(of_notebook, n) for n in sorted(chosen, reverse=True)}


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_each_cell_ends_the_same_when_it_is_run_again(number, reports):
    found = reports[number].result()
    assert not found, found


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_the_small_settings_are_settings(number):
    assert number in SMALL, f"give SMALL settings with which {number} takes seconds"
    [cell] = [
        cell
        for cell in nbformat.read(NOTEBOOKS[number], as_version=4).cells
        if rules.tagged(cell, "settings")
    ]
    assert twice.bound(SMALL[number]).keys() <= twice.bound(cell.source).keys()


UNSAFE = [
    "import torch",
    "ONE = 1",
    "rows, gone, seen = [], 1, []",
    "rows.append(ONE)\nprint(len(rows))",  # 1, then 2
    "print(gone)\ndel gone",
    "layer = torch.nn.Embedding(1, 1)",
    # says 1 where it ran to its end before
    "seen.append(1)\nfor _ in range(4):\n    layer(torch.tensor(0))\nprint(len(seen))\n"
    "seen.clear()",
]


def test_what_is_not_safe_is_found(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in UNSAFE]
    cells[1].metadata["tags"] = ["settings"]
    path = tmp_path / "99_unsafe.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)), "utf-8")
    found = report(path, "ONE = 2", tmp_path).splitlines()
    assert [line for line in found if line.startswith("code cell")] == [
        "code cell 4, twice in a row:",
        "code cell 5, twice in a row: NameError: name 'gone' is not defined",
        "code cell 7, twice in a row:",
    ]


# ---- a name that means two things gives wrong numbers when cells run out of order


def ambiguous(sources):
    """The names that two cells bind to different things, and another one reads."""
    meanings, needed = {}, set()
    for source in sources:
        given = twice.bound(source)
        for name, statement in given.items():
            meanings.setdefault(name, set()).add(statement)
        needed |= twice.read(source) - given.keys()
    return sorted(name for name in needed if len(meanings.get(name, ())) > 1)


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_what_several_cells_read_has_one_meaning(number):
    notebook = nbformat.read(NOTEBOOKS[number], as_version=4)
    assert ambiguous(cell.source for cell in rules.code_cells(notebook)) == []


@pytest.mark.parametrize(
    "sources, found",
    [
        (["x = 1", "x = 2", "print(x)"], ["x"]),
        (["x = 1", "for x in []:\n    pass", "def f():\n    return x"], ["x"]),
        (["def f():\n    x = 1", "x = 2", "x = 3\nprint(x)"], []),
        (["x = 1", "print(x)", "x = None"], []),
        (["x = f()", "x = f()", "print(x)"], []),
        (["import x", "from y import x", "print(x)"], []),
    ],
)
def test_names_of_two_meanings_are_found(sources, found):
    assert ambiguous(sources) == found
