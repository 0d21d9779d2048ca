"""Merge adapters every way and judge each merge as it would be served.

    python benchmarks/merge.py [workers] [name ...]

The names: "embedded" is data/adapter, and "strengths" the same at other strengths;
"nf4 4 0" an adapter trained here, on the NF4 base, of rank 4, with seed 0; "bf16 16 0"
one that was trained on the 16-bit base; "1B" and "8B" Llamas with random weights,
trained a little. Without a name, all are measured, by so many processes (1 by default),
which share the machine's GPUs.

Writes data/measured/merge.json, whose rows replace older ones of the same run. In a row
with `into` "none" the adapter is not merged, and `kind` says what base it is put on.
Every row is held against the model that was trained.
"""

import itertools
import sys

import common
import gguf
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from qlora_helpers import adapters, env, models, records, score, train
from qlora_helpers.ship import merge, mergeable
from tools import recorder

BF16, NF4 = "bf16", "nf4"
DTYPES = {BF16: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GGUF = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")
STRENGTHS = (0.25, 0.5, 2, 4, 8)
TRAINED = [(NF4, 4), (NF4, 16), (NF4, 64), (BF16, 16)]  # on which base, and the rank
SEEDS = (0, 1, 2)
SHAPES, RATE = ("1B", "8B"), 2e-4  # random weights, and their learning rate
FEW_STEPS = 30  # of random weights, for time's sake


def stored(weight, kind):
    """A weight as a file or a server of this kind keeps it: (out, in), fp32."""
    if kind in DTYPES:
        return weight.to(DTYPES[kind]).float()
    if kind == NF4:
        return merge.through_nf4(weight.to(env.profile().compute_dtype)).float()
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(weight.cpu().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind)).to(weight.device)


class Study:
    """A trained model, of which many merges are made and judged."""

    def __init__(self, load, trained_on, train_it, questions=()):
        """load(quantization) gives a new base; train_it(base) the trained model.

        trained_on: NF4 or BF16. questions: those to answer and judge, or none.
        """
        self.load, self.questions = load, list(questions)
        self.bases = {NF4: train.nf4_config(env.profile()), BF16: None}
        self.trained_on = trained_on
        self.trained = train_it(load(self.bases[trained_on])).eval()
        self.compared = self.questions[:24] or records.load("phrasing")[:24]
        self.tokenizer = common.embedded_tokenizer()
        self.databases = records.open_databases()
        plain = load(None)
        self.parts = {}  # name: the 16-bit weight, and the adapter beside it
        for name, layer in self.trained.named_modules():
            if hasattr(layer, "lora_A"):
                name = name.removeprefix(mergeable.PREFIX)
                self.parts[name] = (plain.get_submodule(name).weight.data, layer)

    def change(self, layer, strength):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = strength * layer.scaling["default"]
        return merge.lora_change(A.detach(), B.detach(), scale)

    def judged(self, model, facts) -> dict:
        """A row: the facts, the answers, and the distance from the trained model."""
        row = dict(facts)
        if self.questions:
            right = score.execution_accuracy(
                model, self.tokenizer, self.questions, self.databases,
                system=records.SYSTEM,
            )  # fmt: skip
            row |= {"right": sum(r["right"] for r in right.rows), "asked": right.n}
            row |= {"verdicts": "".join(str(int(r["right"])) for r in right.rows)}
        logits = score.answer_logits(
            model, self.tokenizer, self.compared, system=records.SYSTEM
        )
        if model is self.trained:
            self.reference = logits
        kl, error = score.divergence(logits, self.reference)
        row |= {"kl_nats": round(kl, 5), "logit_error": round(error, 5)}
        return row | {"gpu": recorder.facts()["gpu"]}

    def rows(self, run, kinds, strength=1):
        """Yield a row for each way to serve the adapter, unmerged and merged."""
        facts = run | {"strength": strength} | self.sizes(strength)
        layers = [layer for _, layer in self.parts.values()]
        was = [layer.scaling["default"] for layer in layers]
        for layer, scaling in zip(layers, was, strict=True):
            layer.scaling["default"] = strength * scaling
        unmerged = facts | {"into": "none", "kind": self.trained_on}
        yield self.judged(self.trained, unmerged)
        if strength == 1:
            [other] = set(self.bases) - {self.trained_on}
            yield self.judged(self.on_base(other), unmerged | {"kind": other})
        for layer, scaling in zip(layers, was, strict=True):
            layer.scaling["default"] = scaling
        for kind, into in itertools.product(kinds, merge.INTO):
            model = self.load(None)
            for weight in model.parameters():  # not buffers: rotary angles stay fp32
                weight.data = weight.data.to(DTYPES.get(kind, model.dtype))
            found = self.merge(model, into, kind, strength)
            yield self.judged(model, facts | {"into": into, "kind": kind} | found)

    def on_base(self, kind):
        """The adapter, unmerged, on a base of this kind."""
        base = self.load(self.bases[kind])
        model = get_peft_model(base, self.trained.peft_config["default"])
        set_peft_model_state_dict(model, get_peft_model_state_dict(self.trained))
        return model.eval()

    def merge(self, model, into, kind, strength) -> dict:
        """Write the merge's weights into a plain model; what arrived of the change.

        The part of what is kept that points in the change's direction survives. The
        rest is noise. Both are shares of the change's norm, medians of all matrices.
        """
        survived, noise = [], []
        for name, (sixteen, layer) in self.parts.items():
            base = sixteen if into == "original" else merge.through_nf4(sixteen)
            base, change = base.float(), self.change(layer, strength)
            merged = stored(base + change, kind)
            kept = merged - stored(base, kind)
            share = (kept * change).sum() / change.square().sum()
            survived.append(share)
            noise.append((kept - share * change).norm() / change.norm())
            weight = model.get_submodule(name).weight
            weight.data = merged.to(weight.dtype)
        return {
            "survives_percent": round(100 * torch.stack(survived).median().item(), 2),
            "noise_percent": round(100 * torch.stack(noise).median().item(), 1),
        }

    def sizes(self, strength) -> dict:
        """Norms of the change and of NF4's error, by the weight's own: medians."""
        changes, errors = [], []
        for sixteen, layer in self.parts.values():
            lost = merge.through_nf4(sixteen).float() - sixteen.float()
            whole = sixteen.float().norm()
            errors.append(lost.norm() / whole)
            changes.append(self.change(layer, strength).norm() / whole)
        pairs = {"change_percent": changes, "quantization_percent": errors}
        return {
            name: round(100 * torch.stack(shares).median().item(), 3)
            for name, shares in pairs.items()
        }


def embedded(quantization):
    """The embedded Llama."""
    return models.load_base(models.EMBEDDED, quantization)[0]


def study(name: str) -> list[dict]:
    """Return the rows of one name of the command line."""
    machine = BF16 if env.profile().compute_dtype is torch.bfloat16 else "fp32"
    if name in ("embedded", "strengths"):
        return study_embedded(name)
    if name in SHAPES:
        return study_random(name)
    trained_on, rank, seed = name.split()

    def train_it(base):
        settings = common.settings_of()
        settings.seed = int(seed)
        return trained_here(base, settings, int(rank))

    run = {"run": f"{trained_on}, rank {rank}, seed {seed}", "trained_on": trained_on}
    run |= {"rank": int(rank), "seed": int(seed)}
    found = Study(embedded, trained_on, train_it, common.test_questions())
    return [*found.rows(run, (machine, NF4))]


def trained_here(base, settings, rank=16):
    """Return the model after training with the recipe, with an adapter of this rank."""
    tokenizer = common.embedded_tokenizer()
    trainer = common.recipe_trainer(base, tokenizer, settings, rank)
    trainer.train()
    return trainer.model


def study_embedded(name: str) -> list[dict]:
    """Return the rows of data/adapter: every kind of file, or several strengths."""
    identity = models.base_identity(models.EMBEDDED)

    def train_it(base):  # it is trained already
        return adapters.load_adapter(base, env.path("data/adapter"), identity)

    run = {"run": "data/adapter", "trained_on": NF4, "rank": 16}
    if name == "embedded":
        found = Study(embedded, NF4, train_it, common.test_questions())
        return [*found.rows(run, (BF16, "fp16", NF4, *GGUF))]
    found, kinds = Study(embedded, NF4, train_it, records.load("phrasing")), (BF16, NF4)
    rows = (found.rows(run, (*kinds, "Q4_0"), strength) for strength in STRENGTHS)
    return [*itertools.chain.from_iterable(rows)]


def study_random(shape: str) -> list[dict]:
    """Return the rows of a larger Llama with random weights; nothing is asked of it."""

    def load(quantization):
        return models.random_llama(shape, quantization)

    def train_it(base):
        return trained_here(base, common.settings_of(FEW_STEPS, rate=RATE))

    run = {"run": f"{shape}, random weights", "trained_on": NF4, "rank": 16}
    return [*Study(load, NF4, train_it).rows(run, (BF16, "fp16", "fp32", NF4))]


def main(arguments) -> None:
    workers = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 1
    trained = itertools.product(TRAINED, SEEDS)
    known = ["embedded", "strengths", *SHAPES]
    known += [f"{base} {rank} {seed}" for (base, rank), seed in trained]
    names = common.names_or_all(arguments, known)
    studies = common.shared_out(study, names, workers)
    rows = itertools.chain.from_iterable(studies)
    same = ("run", "strength", "into", "kind")
    common.record("merge", rows, same)


if __name__ == "__main__":
    main(sys.argv[1:])
