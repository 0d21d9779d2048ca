"""The byte formulas of notebook 04: what each part of a training run holds.

Each is what the libraries' code keeps, written out: transformers' modeling_llama.py,
PEFT's tuners/lora, bitsandbytes' autograd/_functions.py and optim/optimizer.py, TRL's
kernels/chunked_logprob.py. rehearse.py runs that code on tensors without data, and the
tests hold the formulas to it.
"""

from collections import Counter

from qlora_helpers.memory.planned_run import OPTIMIZERS, Plan
from qlora_helpers.models.shapes import projections
from qlora_helpers.nf4 import BLOCK, SCALE_BLOCK

HEAD_TOKENS, HEAD_VOCAB = 4096, 32768  # the tile of logits of TRL's fused loss
EIGHT_BIT_SMALLEST = 4096  # numbers; a smaller tensor's states stay in fp32
PAGED_SMALLEST = 100_000  # numbers of a state that bitsandbytes pages


def weight_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of the base model, by kind; exact."""
    round_up, config, found = plan.round_up, plan.config, Counter()
    for out, inside in projections(config).values():
        size = out * inside
        blocks = -(-size // BLOCK)
        if not plan.four_bit:
            found["linear"] += round_up(size * plan.between)
            continue
        found["packed"] += round_up(-(-size // 2))
        found["scales"] += round_up(blocks if plan.double else 4 * blocks)
        found["tables"] += round_up(16 * 4)
        if plan.double:
            found["scales"] += round_up(4 * -(-blocks // SCALE_BLOCK))
            found["tables"] += round_up(256 * 4) + round_up(4)  # and the offset
    layers, h = config.num_hidden_layers, config.hidden_size
    end = round_up(plan.between * config.vocab_size * h)
    return {kind: layers * size for kind, size in found.items()} | {
        "embedding, output": _ends(config) * end,
        "norms": (2 * layers + 1) * round_up(plan.between * h),
    }


def _ends(config) -> int:
    """How many weights have the vocabulary's size: an untied head is the second."""
    return 1 if config.tie_word_embeddings else 2


def trained_tensors(plan: Plan) -> list[int]:
    """How many numbers each trained tensor has."""
    config, shapes = plan.config, projections(plan.config)
    if plan.targets:
        layer = [n * plan.r for name in plan.targets for n in shapes[name]]
        return config.num_hidden_layers * layer
    h = config.hidden_size
    layer = [out * inside for out, inside in shapes.values()] + [h, h]
    ends = _ends(config) * [config.vocab_size * h]
    return config.num_hidden_layers * layer + ends + [h]


def gradient_bytes(plan: Plan) -> int:
    """Bytes of all gradients; each has its tensor's shape and dtype."""
    return sum(plan.round_up(count * plan.trained) for count in trained_tensors(plan))


def optimizer_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of Adam's states: (counted by torch, in managed memory)."""
    round_up, tensors = plan.round_up, trained_tensors(plan)
    size = OPTIMIZERS[plan.optim]  # bytes of a number of a state; 0: as its tensor
    # An embedding that trains keeps 32-bit states: transformers/trainer.py,
    # create_optimizer. Behind it come an untied head and the last norm.
    embedding = None if plan.targets else len(tensors) - 1 - _ends(plan.config)
    held = paged = 0
    for i, count in enumerate(tensors):
        if not size:
            held += 2 * round_up(count * plan.trained) + round_up(4)  # and its step
            continue
        eight_bit = size == 1 and count >= EIGHT_BIT_SMALLEST and i != embedding
        states = 2 * round_up(count * (1 if eight_bit else 4))
        if plan.on_gpu and "paged" in plan.optim and count >= PAGED_SMALLEST:
            paged += states
        else:
            held += states
        held += 2 * round_up(4 * -(-count // 256)) if eight_bit else 0
    if size == 1 and max(tensors) >= EIGHT_BIT_SMALLEST:
        held += 2 * 256 * 4  # the codes of the two states, shared by all
    return held, paged


def layer_bytes(plan: Plan) -> int:
    """What one layer keeps for its backward pass."""
    config, c, shapes = plan.config, plan.compute, projections(plan.config)
    h, f = config.hidden_size, config.intermediate_size
    q, kv = shapes["q_proj"][0], shapes["k_proj"][0]
    if plan.repeat_kv and config.num_key_value_heads > 1:  # a single head is not copied
        kv = q
    token = 2 * (4 * h + 4)  # what goes into the two norms, in fp32; 1 / rms
    token += c * (2 * q + 2 * kv) + 4 * config.num_attention_heads  # attention
    token += 3 * plan.between * f  # gate, silu(gate), up
    if not plan.targets:
        token += 2 * c * h  # the norms' results before their weights
    # What an adapter multiplies: q, k and v share it, as do gate and up.
    using = plan.targets or shapes
    for names in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        token += h * _kept_input(plan, sum(name in using for name in names))
    token += f * _kept_input(plan, int("down_proj" in using))
    if "o_proj" in plan.targets and (plan.dropout or _casts_inputs(plan)):
        token += q * _kept_input(plan, 1)  # else attention keeps it already
    token += c * plan.r * len(plan.targets)  # the adapters' middle
    total = token * plan.tokens
    if plan.targets and c < 4:  # their 16-bit copies
        total += c * sum(trained_tensors(plan)) // config.num_hidden_layers
    return total


def _casts_inputs(plan: Plan) -> bool:
    """True where PEFT makes an adapter's input fp32, which autocast turns back.

    For 4-bit layers it asks first whether autocast is on, for CUDA alone.
    """
    asks = plan.four_bit and plan.on_gpu
    return bool(plan.targets) and plan.compute < 4 and not asks


def _mask(plan: Plan) -> int:
    """Bytes of one number of a dropout's mask, which a CPU keeps as a number."""
    if not plan.dropout or plan.on_gpu:
        return int(plan.dropout)
    return 4 if _casts_inputs(plan) else plan.compute


def _kept_input(plan: Plan, users: int) -> int:
    """Bytes of one number of what `users` adapters multiply."""
    if plan.dropout:  # each its own
        return users * (plan.compute + _mask(plan))
    each_its_own = _casts_inputs(plan) or plan.between != plan.compute
    return plan.compute * (users if each_its_own else min(users, 1))


def activation_bytes(plan: Plan) -> tuple[int, int, int]:
    """(what all layers keep, what the last one makes again, what the first holds)."""
    config, layer = plan.config, layer_bytes(plan)
    layers, h = config.num_hidden_layers, config.hidden_size
    if not plan.every:
        kept = layers * layer
        if plan.targets:  # frozen embeddings: nothing goes back through the first norm
            users = len({"q_proj", "k_proj", "v_proj"} & set(plan.targets))
            kept -= (h * (4 + users * _mask(plan)) + 4) * plan.tokens
        return kept, 0, layer
    checkpoint = plan.between * h * plan.tokens
    checkpointed = -(-layers // plan.every)
    kept = checkpointed * checkpoint + (layers - checkpointed) * layer
    # in fp32 the checkpoint is the norm's input
    again = layer - (checkpoint if plan.between == 4 else 0)
    last = again if (layers - 1) % plan.every == 0 else 0
    return kept, last, checkpoint + again


def end_bytes(plan: Plan) -> int:
    """What the last norm, the head and the rotary tables keep."""
    h = plan.config.hidden_size
    head = projections(plan.config)["q_proj"][0] // plan.config.num_attention_heads
    token = 4 * h + 4
    if not (plan.full_logits and plan.targets):  # the fused loss keeps its input
        token += plan.between * h
    if not plan.targets:
        token += plan.compute * h
    return token * plan.tokens + 2 * plan.between * head * plan.length


def loss_bytes(plan: Plan) -> tuple[int, int]:
    """What the loss holds in its backward pass, and the head's gradient after it."""
    c, e = plan.compute, plan.between
    h, vocab = plan.config.hidden_size, plan.config.vocab_size
    gradient = 0 if plan.targets else c * vocab * h
    if plan.full_logits:  # log-probabilities and two gradients, in fp32
        return 12 * vocab * plan.tokens, gradient
    labels = plan.rows * (plan.length - 1)
    at_once, width = min(HEAD_TOKENS, labels), min(HEAD_VOCAB, vocab)
    held = c * HEAD_VOCAB * at_once  # the tile
    held += (4 + (e if e < 4 else 0)) * h * labels  # its gradient, then as it came
    if not plan.on_gpu:  # many operations on the tile, not one kernel
        product = 4 * width * (at_once + h) if c < 4 else 0  # of fp32 copies
        held += max(29 * width * at_once, product)
    if e != c:
        held += 2 * c * width * h + c * h * at_once
    return held + 4 * gradient // c, gradient


def dequantized_bytes(shape, itemsize, double=True) -> int:
    """What a 4-bit matrix takes while it is multiplied: itself, and its scales."""
    size = shape[0] * shape[1]
    return itemsize * size + (4 * -(-size // BLOCK) if double else 0)


def extra_within_layer(plan: Plan) -> dict[str, tuple[int, int]]:
    """What a layer adds to what it keeps, at the three moments that can be its worst.

    {moment: (activations, dequantized weight)}
    """
    c, e = plan.compute, plan.between
    h, f = plan.config.hidden_size, plan.config.intermediate_size
    wide, incoming = f * plan.tokens, e * h * plan.tokens
    scratch = dequantized_bytes((h, f), c, plan.double) if plan.four_bit else 0
    adapted = "down_proj" in plan.targets
    forward = 3 * incoming
    if plan.targets and not adapted:
        forward += e * wide
    if e != c:
        forward += e * wide
    if _casts_inputs(plan) and adapted:
        forward += (4 + e) * wide + 2 * incoming
    backward = incoming
    if adapted:
        backward -= c * wide  # the product of gate and up is freed by then
    if not plan.targets:
        backward += c * h * f  # the matrix's gradient
    return {
        "forward, down_proj": (forward, scratch),
        "backward, down_proj": (backward + e * wide * (2 if adapted else 1), scratch),
        "backward, SwiGLU": (backward + 3 * e * wide, 0),
    }
