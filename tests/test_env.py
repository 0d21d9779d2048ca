"""What machine is this: profiles, paths, the cache, the pre-flight check, Colab."""

import collections
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from qlora_helpers import env

Disk = collections.namedtuple("Disk", "total used free")
VARIABLES = "QLORA_PROFILE QLORA_BASE QLORA_CACHE KAGGLE_KERNEL_RUN_TYPE".split()


keep_freed_memory = env.keep_freed_memory


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No variable of the author's machine decides what these tests see.

    And setup() leaves the memory of the process that runs all tests alone.
    """
    monkeypatch.setattr(env, "keep_freed_memory", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def gpu(monkeypatch, capability):
    """Let torch report a GPU of this compute capability, which emulates bf16."""
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


@pytest.mark.parametrize("kind", ["cpu", "fp16", "bf16"])
def test_a_kind_can_be_forced_by_argument_or_variable(kind, monkeypatch):
    gpu(monkeypatch, (9, 0))
    assert env.profile(kind).kind == kind
    monkeypatch.setenv("QLORA_PROFILE", kind)
    assert env.profile().kind == kind
    assert env.profile("cpu").kind == "cpu"  # the argument goes before the variable


def test_an_empty_variable_forces_nothing(no_gpu, monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "")
    assert env.profile().kind == "cpu"


def test_an_unknown_kind_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "t4")
    with pytest.raises(ValueError, match="'t4'.*'cpu', 'fp16' or 'bf16'"):
        env.profile()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_gpus_kind_without_cuda_says_how_to_get_out(kind, no_gpu, monkeypatch):
    with pytest.raises(RuntimeError, match=f"{kind}.*QLORA_PROFILE.*Runtime"):
        env.profile(kind)
    monkeypatch.setenv("QLORA_PROFILE", kind)
    with pytest.raises(RuntimeError, match="QLORA_PROFILE"):
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
    monkeypatch.setattr(env.platformdirs, "user_cache_dir", lambda *_, **__: str(there))
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


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("0.19.1", (0, 19, 1)),
        ("2.14.0rc1", (2, 14)),
        ("5.9.dev3", (5, 9)),
        ("missing", ()),
    ],
)
def test_versions_compare_by_their_leading_numbers(text, numbers):
    assert env.version_tuple(text) == numbers


def installed(monkeypatch, **changed):
    """Let the named libraries have these versions; None takes one away."""
    real = env.importlib.metadata.version

    def version(name):
        if name in changed and changed[name] is None:
            raise env.importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(env.importlib.metadata, "version", version)


def test_versions_outside_the_tested_range_are_named(monkeypatch):
    middle = {"torch": "2.12.1+cu128", "transformers": "5.15.0", "peft": "0.20.0"}
    middle |= {"trl": "0.29.1", "bitsandbytes": "0.49.0"}
    installed(monkeypatch, **middle)
    assert env.untested() == []
    installed(monkeypatch, **middle | {"torch": "2.14.0", "peft": "0.19.0"})
    lines = env.untested()
    assert [line.split()[:2] for line in lines] == [
        ["torch", "2.14.0"],
        ["peft", "0.19.0"],
    ]
    assert "from 2.11 to below 2.14" in lines[0]
    installed(monkeypatch, **middle | {"trl": None})
    assert env.untested() == []  # check_machine says it
    assert env.versions()["trl"] == "missing"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which nothing is wrong, whatever this one is."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(env, "total_ram_gib", lambda: 16.0)
    monkeypatch.setattr(env.shutil, "disk_usage", lambda _: Disk(0, 0, 9 * env.GIB))
    return tmp_path


def test_a_good_machine_has_no_fault(machine):
    assert env.check_machine() == []


def test_a_missing_library_is_a_fault(machine, monkeypatch):
    installed(monkeypatch, bitsandbytes=None)
    [fault] = env.check_machine()
    assert fault.startswith("bitsandbytes is missing: pip install")


def test_little_memory_is_a_fault(machine, monkeypatch):
    monkeypatch.setattr(env, "total_ram_gib", lambda: 3.9)
    [fault] = env.check_machine()
    assert fault.startswith("3.9 GiB of memory, 6 are needed") and "Colab" in fault


def test_little_disk_is_a_fault(machine, monkeypatch):
    seen = []

    def disk_usage(folder):
        seen.append(folder)
        return Disk(0, 0, env.GIB // 2)

    monkeypatch.setattr(env.shutil, "disk_usage", disk_usage)
    [fault] = env.check_machine()
    assert fault.startswith("0.5 GiB of disk free") and "QLORA_CACHE" in fault
    assert seen == [machine / "cache"]  # the disk that will hold the model


def test_an_unwritable_cache_is_a_fault(machine, monkeypatch):
    (machine / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("QLORA_CACHE", str(machine / "file"))
    [fault] = env.check_machine()
    assert "cannot be written" in fault


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0)])
def test_another_python_is_a_fault(version, machine, monkeypatch):
    named = collections.namedtuple("Version", "major minor micro")(*version)
    monkeypatch.setattr(env.sys, "version_info", named)
    [fault] = env.check_machine()
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
    monkeypatch.setattr(env, "CGROUP", tmp_path)
    whole = env.psutil.virtual_memory().total / env.GIB
    assert env.total_ram_gib() == (1.0 if limited else whole)


def test_without_a_container_memory_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "CGROUP", tmp_path / "absent")
    whole = env.psutil.virtual_memory().total / env.GIB
    assert env.total_ram_gib() == whole > 0


def test_setup_prints_one_line(machine, no_gpu, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(env, "keep_freed_memory", lambda: called.append(True))
    env.setup()
    assert called
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("ready: Python 3.")
    assert f"torch {torch.__version__}, CPU, " in line
    assert "16 GiB, computes in " in line


def test_setup_describes_a_gpu(machine, monkeypatch, capsys):
    gpu(monkeypatch, (7, 5))
    card = types.SimpleNamespace(name="Tesla T4", total_memory=15 * env.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    env.setup()
    assert "Tesla T4, 15 GiB, computes in float16" in capsys.readouterr().out


def test_setup_names_every_fault_at_once(machine, monkeypatch):
    monkeypatch.setattr(env, "total_ram_gib", lambda: 2.0)
    installed(monkeypatch, trl=None, peft=None)
    with pytest.raises(RuntimeError, match="not ready") as caught:
        env.setup()
    assert len(str(caught.value).splitlines()) == 1 + 3
    assert "trl is missing" in str(caught.value)


def test_setup_warns_of_what_was_not_tested(machine, no_gpu, monkeypatch, capsys):
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
COLABS |= {"datasets": "4.0.0"}


@pytest.fixture
def calls(monkeypatch):
    """Every call of pip that would have been made."""
    made = []
    monkeypatch.setattr(env.subprocess, "check_call", lambda call: made.append(call))
    return made


def on_colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


def on_kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")


def test_elsewhere_nothing_is_installed(calls, monkeypatch):
    installed(monkeypatch, torchao="0.10.0", **COLABS)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "a variable that Kaggle sets too")
    env.install_on_colab()
    assert calls == []


@pytest.mark.parametrize("place", [on_colab, on_kaggle])
def test_colab_and_kaggle_get_what_they_lack(place, calls, monkeypatch):
    place(monkeypatch)
    installed(monkeypatch, torchao="0.10.0", **COLABS)
    env.install_on_colab()
    pip = [sys.executable, "-m", "pip"]
    install, uninstall = calls
    assert install == [
        *pip, "install", "-q", "trl>=0.29,<1.17", "bitsandbytes>=0.49,<0.51",
        "gguf>=0.17,<1", "xllamacpp>=2026.4,<2027", "datasets==4.0.0",
    ]  # fmt: skip
    assert uninstall == [*pip, "uninstall", "-q", "-y", "torchao"]


def test_colab_gets_only_what_is_missing(calls, monkeypatch):
    on_colab(monkeypatch)
    installed(
        monkeypatch,
        torchao=None,
        **COLABS | {"trl": "0.29.1", "gguf": "0.18.0", "xllamacpp": "2026.4"},
    )
    env.install_on_colab()
    [install] = calls
    assert install[5:] == ["bitsandbytes>=0.49,<0.51", "datasets==4.0.0"]


def test_a_second_run_on_colab_does_nothing(calls, monkeypatch):
    on_colab(monkeypatch)
    installed(
        monkeypatch, torchao=None, trl="0.29.1", bitsandbytes="0.50.2", gguf="0.18.0"
    )
    env.install_on_colab()
    assert calls == []


def test_a_failed_install_is_not_hidden(monkeypatch):
    on_colab(monkeypatch)
    installed(monkeypatch, **COLABS)

    def fail(call):
        raise subprocess.CalledProcessError(1, call)

    monkeypatch.setattr(env.subprocess, "check_call", fail)
    with pytest.raises(subprocess.CalledProcessError):
        env.install_on_colab()


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
    monkeypatch.setattr(env.platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
