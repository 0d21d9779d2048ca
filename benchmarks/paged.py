"""Watch a paged optimizer: a spike it survives, what paging costs, what resuming keeps.

    python benchmarks/paged.py [matrices unpaged paged evicted adapters]

With names only those parts are measured; rows of the others stay. Writes
data/measured/paged.json, on an NVIDIA GPU. Torch's cap does not count managed memory,
so that a run survives under it is book-keeping: the driver's count is recorded too.
Managed memory stays under 4 GiB and the card mostly free: a full one was not tried.
"""

import copy
import sys
import time

import bitsandbytes as bnb
import common
import torch
from memory_grid import managed_bytes, managed_tensors
from peft import get_peft_model
from transformers import TrainerCallback

from qlora_helpers import memory, models, train

# The spike: short rows, and a long one among them. Rank 256, so that there is something
# to page; the cap lies between what both optimizers are predicted to need.
SHAPE, RANK, SHORT, LONG, STEPS, SPIKE, CAP_GIB = "1B", 256, 512, 16384, 10, 6, 5.6
MATRICES, WIDTH, MATRICES_CAP_GIB = 20, 4096, 4
TIMED = 10


def card_gib() -> float:
    """What the driver says is taken, of everything on the card."""
    free, whole = torch.cuda.mem_get_info()
    return common.gib(whole - free, 3)


def touch(tensors) -> None:
    """Write to each page from the host, which brings it there.

    prefetch_tensor(to_cpu=True) fails with CUDA 13: "invalid device ordinal".
    """
    torch.cuda.synchronize()
    for tensor in tensors:
        tensor.view(-1)[:: 4096 // tensor.itemsize].add_(0)


class Watch(TrainerCallback):
    """A row for each step: bytes before it, at its passes and at its end; seconds."""

    def __init__(self, evicting):
        self.evicting, self.rows = evicting, []

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        before = card_gib()
        if self.evicting and step == SPIKE:
            touch(managed_tensors())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.rows.append(
            {
                "step": step,
                "tokens": LONG if step == SPIKE else SHORT,
                "held_gib": common.gib(torch.cuda.memory_allocated(), 3),
                "managed_gib": common.gib(managed_bytes(), 3),
                "card_before_gib": before,
                "card_gib": card_gib(),
            }
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.rows[-1]["peak_gib"] = common.gib(torch.cuda.max_memory_allocated(), 3)
        self.rows[-1]["card_at_pass_gib"] = card_gib()
        self.start = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.rows[-1]["optimizer_seconds"] = round(seconds, 5)
        self.rows[-1]["card_after_gib"] = card_gib()


def spike(optim: str, evicting: bool) -> list[dict]:
    """Train short rows and a long one under the cap; a row for each step."""
    config, quantization, lora, settings = train.configs(
        models.llama_config(SHAPE), "qlora", 1, LONG
    )
    lora.r, settings.optim = RANK, optim
    settings.max_steps, settings.report_to = STEPS, []
    settings.train_sampling_strategy = "sequential"
    lengths = [LONG if step == SPIKE else SHORT for step in range(1, STEPS + 1)]
    model = get_peft_model(models.random_llama(SHAPE, quantization), lora)
    trainer = common.random_trainer(model, settings, lengths)
    watch = Watch(evicting)
    trainer.add_callback(watch)
    common.clean()
    memory.hold_to(CAP_GIB)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        watch.rows[-1]["out_of_memory"] = common.out_of_memory(error)
    predicted = memory.predict(config, quantization, lora, settings)
    run = {
        "optim": optim,
        "evicted_before_spike": evicting,
        "cap_gib": CAP_GIB,
        "predicted_peak_gib": common.gib(predicted.peak, 3),
        "predicted_paged_gib": common.gib(predicted.paged, 3),
    }
    return [run | row for row in watch.rows]


def adapter(shape: str, rank: int) -> list[dict]:
    """Which states of a real adapter bitsandbytes pages, after a step of the recipe."""
    config, quantization, lora, settings = train.configs(
        models.llama_config(shape), "qlora", 1, 64
    )
    lora.r = rank
    model = get_peft_model(models.random_llama(shape, quantization), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    optimizer = bnb.optim.PagedAdamW8bit(trained)
    optimizer.step()
    states = [
        state[name]
        for state in optimizer.state.values()
        for name in ("state1", "state2")
    ]
    paged = [state for state in states if getattr(state, "is_paged", False)]
    row = {
        "shape": shape,
        "rank": rank,
        "states": len(states),
        "paged_states": len(paged),
        "state_bytes": sum(state.nbytes for state in states),
        "paged_bytes": sum(state.nbytes for state in paged),
        "predicted_paged_bytes": memory.predict(
            config, quantization, lora, settings
        ).paged,
    }
    del optimizer, model, trained, states, paged
    common.clean()
    return [row]


def weights():
    """The matrices to train, with gradients."""
    made = []
    for _ in range(MATRICES):
        weight = torch.randn(WIDTH, WIDTH, device="cuda").requires_grad_()
        weight.grad = torch.randn_like(weight)
        made.append(weight)
    return made


def seconds_of(optimizer, before=lambda: None) -> list[float]:
    """Seconds of some steps, each after `before`."""
    taken = []
    for _ in range(TIMED):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def matrices():
    """Train twenty fp32 matrices under a cap; yield a row for each optimizer."""
    optimizers = ("AdamW32bit", "PagedAdamW32bit", "AdamW8bit", "PagedAdamW8bit")
    for name in optimizers:
        row = {"optimizer": name, "cap_gib": MATRICES_CAP_GIB}
        trained = weights()
        memory.hold_to(MATRICES_CAP_GIB)
        torch.cuda.reset_peak_memory_stats()
        optimizer = getattr(bnb.optim, name)(trained, lr=1e-3)
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
            optimizer = None
            common.clean()
            memory.hold_to(None)
            optimizer = getattr(bnb.optim, name)(trained, lr=1e-3)
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()  # without the cap, to be timed all the same
        memory.hold_to(None)
        most = torch.cuda.max_memory_allocated()
        row["peak_gib"] = common.gib(most, 3)
        states = [s for state in optimizer.state.values() for s in state.values()]
        kept = {id(s): s.nbytes for s in states if isinstance(s, torch.Tensor)}
        row["state_gib"] = common.gib(sum(kept.values()))
        taken = seconds_of(optimizer)
        row["seconds_per_step"] = [round(t, 5) for t in taken]
        if "Paged" in name:
            row |= paging(optimizer, trained, name)
        yield row
        del optimizer, trained, states
        common.clean()


def paging(optimizer, trained, name) -> dict:
    """What leaves the card, what the step that brings it back costs, and a resume."""
    mine = [
        state[key] for state in optimizer.state.values() for key in ("state1", "state2")
    ]
    size = sum(tensor.nbytes for tensor in mine)

    before = card_gib()
    touch(mine)
    away = card_gib()
    optimizer.step()
    back = card_gib()
    taken = seconds_of(optimizer, before=lambda: touch(mine))
    saved = copy.deepcopy(optimizer.state_dict())
    held = torch.cuda.memory_allocated()
    again = getattr(bnb.optim, name)(trained, lr=1e-3)
    again.load_state_dict(saved)
    states = [s for state in again.state.values() for s in state.values()]
    still = sum(getattr(state, "is_paged", False) for state in states)
    grown = torch.cuda.memory_allocated() - held
    return {
        "paged_gib": common.gib(size),
        "card_resident_gib": before,
        "card_evicted_gib": away,
        "card_back_gib": back,
        "seconds_after_eviction": [round(t, 5) for t in taken],
        "paged_after_resume": still,
        "torch_grown_by_resume_gib": common.gib(grown),
    }


PARTS = {
    "matrices": matrices,
    "unpaged": lambda: spike("adamw_torch_fused", False),
    "paged": lambda: spike("paged_adamw_32bit", False),
    "evicted": lambda: spike("paged_adamw_32bit", True),
    "adapters": lambda: adapter("1B", 16) + adapter("8B", 16) + adapter("8B", 64),
}


def measure(part: str):
    """Yield the rows of one of PARTS."""
    for row in PARTS[part]():
        yield {"part": part, **row}


def main(names: list[str]) -> None:
    for part in common.names_or_all(names, PARTS):
        # a process each: managed memory is never freed
        common.record("paged", common.in_child(measure, part), same=("part",))


if __name__ == "__main__":
    main(sys.argv[1:])
