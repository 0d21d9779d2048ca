"""Merge adapters every way and judge each merge as it would be served.

    python benchmarks/merge.py embedded          data/adapter, on any machine
    python benchmarks/merge.py 4 16 64 256       adapters of these ranks, trained here
    python benchmarks/merge.py 1B 8B             random weights, trained a little here

Adds its rows to data/measured/merge.json, in place of older ones of the same run. A
merge is held against the model that was trained, 4-bit base and adapter.
"""

import sys

import common
import gguf
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_helpers import adapters, env, models, records, score, train
from qlora_helpers.ship import merge, mergeable
from tools import recorder

BF16, NF4 = "bf16", "nf4"
GGUF = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")
RANKS = (4, 16, 64)
STRENGTHS = (0.25, 0.5, 2, 4, 8)
SHAPES, RATE = ("1B", "8B"), 2e-4  # random weights, and their learning rate
FEW_STEPS = 30  # of an 8B, for time's sake


def stored(weight, kind):
    """A weight as a file or a server of this kind keeps it: (out, in), fp32."""
    if kind == BF16:
        return weight.bfloat16().float()
    if kind == NF4:
        return merge.through_nf4(weight.to(env.profile().compute_dtype)).float()
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(weight.cpu().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind)).to(weight.device)


class Study:
    """A trained 4-bit model and its 16-bit base, on which many merges are tried."""

    def __init__(self, trained, plain, tokenizer, questions=()):
        """questions: those that are answered and judged, or none."""
        self.trained, self.plain, self.tokenizer = trained, plain, tokenizer
        self.questions = questions
        self.compared = list(questions or records.load("phrasing"))[:24]  # by logits
        self.parts = {}  # name: 16-bit base, 4-bit base, adapter's change
        for name, layer in trained.named_modules():
            if hasattr(layer, "lora_A"):
                weight = layer.base_layer.weight
                name = name.removeprefix(mergeable.PREFIX)
                self.parts[name] = (
                    plain.get_submodule(name).weight.data.clone(),
                    dequantize_4bit(weight.data, weight.quant_state),
                    layer,
                )
        self.databases = records.open_databases()

    def change(self, layer, strength):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = strength * layer.scaling["default"]
        return merge.lora_change(A.detach(), B.detach(), scale)

    def judge(self, model):
        """Accuracy where there are questions to answer, else None, and the logits."""
        right = None
        if self.questions:
            right = score.execution_accuracy(
                model,
                self.tokenizer,
                self.questions,
                self.databases,
                system=records.SYSTEM,
            )
        return right, score.answer_logits(
            model, self.tokenizer, self.compared, system=records.SYSTEM
        )

    def row(self, facts, right, logits=None):
        row = dict(facts)
        if right is not None:
            row |= {"right": sum(r["right"] for r in right.rows), "asked": right.n}
            row |= {"verdicts": "".join(str(int(r["right"])) for r in right.rows)}
        if logits is not None:
            kl, error = score.divergence(logits, self.reference)
            row |= {"kl_nats": round(kl, 5), "logit_error": round(error, 5)}
        return row | {"gpu": recorder.facts()["gpu"]}

    def rows(self, run, kinds, strength=1):
        """A row for the model that was trained, and one for each merge of it."""
        was = {}
        for _, _, layer in self.parts.values():
            was[layer] = layer.scaling["default"]
            layer.scaling["default"] = strength * was[layer]
        right, self.reference = self.judge(self.trained)
        for layer, scaling in was.items():
            layer.scaling["default"] = scaling
        facts = {"run": run, "strength": strength}
        sizes = [self.sizes(*part, strength) for part in self.parts.values()]
        names = ("change_percent", "quantization_percent")
        middle = torch.tensor(sizes).median(dim=0).values.tolist()
        facts |= {n: round(100 * v, 3) for n, v in zip(names, middle, strict=True)}
        yield self.row(facts | {"into": "none", "kind": NF4}, right)
        for into in ("dequantized", "original"):
            for kind in kinds:
                survived = []
                for name, (sixteen, four, layer) in self.parts.items():
                    base = (sixteen if into == "original" else four).float()
                    change = self.change(layer, strength)
                    merged = stored(base + change, kind)
                    kept = merged - stored(base, kind)
                    survived.append((kept * change).sum() / change.square().sum())
                    weight = self.plain.get_submodule(name).weight
                    weight.data = merged.to(weight.dtype)
                right, logits = self.judge(self.plain)
                share = torch.stack(survived).median().item()
                row = facts | {"into": into, "kind": kind}
                row |= {"survives_percent": round(100 * share, 2)}
                yield self.row(row, right, logits)

    def sizes(self, sixteen, four, layer, strength):
        """Norms of the change and of the quantization error, by the weight's own."""
        sixteen, change = sixteen.float(), self.change(layer, strength)
        whole = sixteen.norm()
        return [
            (change.norm() / whole).item(),
            ((four - sixteen).norm() / whole).item(),
        ]


def trained_here(base, tokenizer, settings, rank=16):
    """Return the model after training with the recipe, with an adapter of this rank."""
    trainer = common.recipe_trainer(base, tokenizer, settings, rank)
    trainer.train()
    return trainer.model.eval()


def embedded_base():
    """Return the 4-bit embedded Llama and its tokenizer."""
    return models.load_base(models.EMBEDDED, train.nf4_config(env.profile()))


def study_embedded():
    """Yield the rows of data/adapter: every kind of file, and several strengths."""
    base, tokenizer = embedded_base()
    identity = models.base_identity(models.EMBEDDED)
    trained = adapters.load_adapter(base, env.path("data/adapter"), identity)
    plain, _ = models.load_base(models.EMBEDDED)
    tests = ("phrasing", "values", "composition")
    questions = [record for test in tests for record in records.load(test)]
    study = Study(trained.eval(), plain, tokenizer, questions)
    yield from study.rows("data/adapter", (BF16, NF4, *GGUF))
    study.questions = records.load("phrasing")
    for strength in STRENGTHS:
        yield from study.rows("data/adapter", (BF16, NF4, "Q4_0"), strength)


def study_rank(rank):
    """Yield the rows of an adapter of this rank, trained here on the embedded Llama."""
    base, tokenizer = embedded_base()
    trained = trained_here(base, tokenizer, common.settings_of(), rank)
    plain, _ = models.load_base(models.EMBEDDED)
    study = Study(trained, plain, tokenizer, records.load("phrasing"))
    yield from study.rows(f"rank {rank}", (BF16, NF4))


def study_random(shape):
    """Yield the rows of a larger Llama with random weights; nothing is asked of it."""
    tokenizer = common.embedded_tokenizer()
    base = models.random_llama(shape, train.nf4_config(env.profile()))
    settings = common.settings_of(FEW_STEPS, rate=RATE)
    trained = trained_here(base, tokenizer, settings)
    plain = models.random_llama(shape)  # the same seed, so the same weights
    study = Study(trained, plain, tokenizer)
    yield from study.rows(f"{shape}, random weights", (BF16, NF4))


def study(name):
    """Return the rows of one name of the command line."""
    if name == "embedded":
        return study_embedded()
    return study_rank(int(name)) if name.isdigit() else study_random(name)


def main(names) -> None:
    env.quiet()
    known = ["embedded", *map(str, RANKS), *SHAPES]
    for name in common.names_or_all(names, known):
        common.record("merge", study(name), same=("run", "strength", "into", "kind"))
        common.clean()


if __name__ == "__main__":
    main(sys.argv[1:])
