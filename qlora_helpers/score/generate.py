"""Let a model generate: its answers to prompts, and its speed."""

import contextlib
import os.path
import time
from unittest import mock

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from tqdm.auto import tqdm
from transformers import GenerationConfig

from qlora_helpers import env, records

MAX_NEW_TOKENS = 64  # the longest gold answer has 37, and its end token
STEP = 8  # new tokens between two looks at which answers have ended


def _as_trained(model):
    """Autocast a bf16 model on a CPU, as the Trainer does; elsewhere change nothing.

    Without it, each layer would cast its input to the fp32 of its adapter and back.
    """
    device = model.device.type
    enabled = device == "cpu" and model.dtype == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def answering(model):
    """Set a model to answer; afterwards it is as it was before.

    It computes as it was trained, in eval mode and without gradients. bitsandbytes
    dequantizes a 4-bit layer at each token. On a CPU each layer is dequantized once
    instead, which gives the same products, if all of them fit into an eighth of the
    memory. Source: bitsandbytes/backends/default/ops.py, gemm_4bit.
    """
    layers = [module for module in model.modules() if _can_be_dense(module)]
    size = sum(
        layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize
        for layer in layers
    )
    if size > env.total_ram_gib() * env.GIB / 8:
        layers = []
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        for layer in layers:
            forward = _dense_forward(layer)
            stack.enter_context(mock.patch.object(layer, "forward", forward))
        with torch.no_grad(), _as_trained(model):
            yield


def _can_be_dense(module) -> bool:
    """Whether a module is a 4-bit layer that can be dequantized beforehand."""
    if not isinstance(module, Linear4bit) or module.weight.device.type != "cpu":
        return False
    state = module.weight.quant_state
    # repacked for AVX512-BF16: dequantize_4bit would read it wrongly
    repacked = getattr(state, "packing_format_for_cpu", False)
    offloaded = "forward" in vars(module)  # accelerate's, which moves weights
    ready = state is not None and module.compute_dtype is not None
    return ready and not repacked and not offloaded


def _dense_forward(layer):
    """The forward pass of a Linear4bit with its weight dequantized beforehand."""
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = weight.to(layer.compute_dtype)
    bias = layer.bias if layer.bias is None else layer.bias.to(layer.compute_dtype)

    def forward(x):
        product = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        return product.to(x.dtype)

    return forward


def _only_as_asked(model):
    """Hide the model's own generation_config, with which generate() fills gaps.

    It is emptied in place, because a PEFT model and its base share the object.
    """
    own = vars(model.generation_config)
    return mock.patch.dict(own, vars(GenerationConfig()), clear=True)


def end_tokens(model, tokenizer) -> list[int]:
    """The tokens at which an answer ends, for the model and for the tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *ends} - {None})


def generate_answers(
    model, tokenizer, prompts, batch_size=64, max_new_tokens=MAX_NEW_TOKENS
):
    """Let the model answer each prompt greedily; prompts are texts of `records.prompt`.

    Returns [(text, stopped)] in the prompts' order; `stopped` says that the answer
    ended by itself and was not cut at `max_new_tokens`. Only the end tokens are taken
    from the model's generation_config.

    Raises ValueError for one text in place of a list, an empty prompt, a size below 1,
    and a tokenizer without an end token.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list of texts")
    env.check_whole("batch_size", batch_size)
    env.check_whole("max_new_tokens", max_new_tokens)
    ends = end_tokens(model, tokenizer)
    if not ends:
        raise ValueError("no end token: set tokenizer.eos_token to where answers end")
    ids = [records.context_ids(prompt, tokenizer) for prompt in prompts]
    if [] in ids:
        raise ValueError(
            f"prompt {ids.index([])} is empty, and the tokenizer puts no token before "
            "it: give a prompt with text"
        )
    answers = {}
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # little padding
    with (
        tqdm(total=len(ids), desc="answers", disable=not ids) as bar,
        answering(model),
        _only_as_asked(model),
    ):
        for start in range(0, len(ids), batch_size):
            batch = order[start : start + batch_size]
            rows = [ids[i] for i in batch]
            for row, new in _continue(model, rows, ends, max_new_tokens):
                stopped = new[-1] in ends
                said = new[:-1] if stopped else new
                text = tokenizer.decode(said, skip_special_tokens=True)
                answers[batch[row]] = (text, stopped)
                bar.update()
    return [answers[i] for i in range(len(ids))]


def _continue(model, prompts, ends, max_new_tokens):
    """Yield (row, new tokens) for each prompt, in the order in which they end.

    What all prompts begin with is read once, and rows that have ended are dropped every
    few tokens: both need keys and values per token, which stateful models do not keep.
    """
    shared, step = 0, max_new_tokens
    if prompts[1:] and not model._is_stateful:
        shortest = min(map(len, prompts))
        shared = min(len(os.path.commonprefix(prompts)), shortest - 1)
        step = STEP
    longest = max(map(len, prompts))
    inputs, mask = [], []
    for ids in prompts:
        # An answer must follow the question's last token, so the padding stands before
        # the question, behind the shared start, where no tokenizer puts it.
        padding = longest - len(ids)
        inputs.append(ids[:shared] + [ends[0]] * padding + ids[shared:])
        mask.append([1] * shared + [0] * padding + [1] * (len(ids) - shared))
    inputs = torch.tensor(inputs).to(model.device)
    mask = torch.tensor(mask).to(model.device)
    cache = None
    if shared:
        cache = model(input_ids=inputs[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
    rows, new = list(range(len(prompts))), [[] for _ in prompts]
    for done in range(0, max_new_tokens, step):
        greedy = GenerationConfig(
            max_new_tokens=min(step, max_new_tokens - done), eos_token_id=ends,
            pad_token_id=ends[0], do_sample=False, num_beams=1, repetition_penalty=1.0,
            use_cache=True, return_dict_in_generate=True,
        )  # fmt: skip
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=greedy,
        )
        added = output.sequences[:, inputs.shape[1] :]
        open_rows = []
        for place, (row, tokens) in enumerate(zip(rows, added.tolist(), strict=True)):
            end = next((n for n, token in enumerate(tokens) if token in ends), None)
            new[row] += tokens if end is None else tokens[: end + 1]
            if end is None and done + step < max_new_tokens:
                open_rows.append(place)
            else:
                yield row, new[row]
        if not open_rows:
            return
        rows = [rows[place] for place in open_rows]
        mask = torch.cat([mask, torch.ones_like(added)], dim=1)[open_rows]
        inputs, cache = output.sequences[open_rows], output.past_key_values
        cache.batch_select_indices(torch.tensor(open_rows, device=model.device))


def generation_speed(model, batch: int, prompt: int = 64, tokens: int = 16) -> float:
    """Tokens a second that a model generates, all rows together, after a warm-up.

    batch: rows. prompt: tokens of each, arbitrary ones. tokens: new ones a row; the
    time for reading the prompt is in it. 4-bit layers are dequantized at each token.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("tokens", tokens)):
        env.check_whole(name, value)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(10, vocabulary, (batch, prompt), generator=generator)
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exact = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip

    def run():
        with _as_trained(model), _only_as_asked(model):
            model.generate(**inputs, generation_config=exact)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    run()
    start = time.perf_counter()
    run()
    return batch * tokens / (time.perf_counter() - start)
