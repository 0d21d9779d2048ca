"""Predict the bytes of a training run from its configs."""

import warnings
from typing import NamedTuple

from qlora_helpers.memory import byte_formulas as formulas
from qlora_helpers.memory.planned_run import FUSED_LOSS, Plan, read

# cuBLAS on Hopper, for the forward and the backward thread: torch's default sizes, with
# which data/measured/memory_grid.json agrees; other cards' are smaller.
WORKSPACES = 2 * 32 * 2**20


class Prediction(NamedTuple):
    """What a run will hold, in bytes."""

    weights: dict[str, int]  # the base model, by kind
    kept: int  # what the forward pass keeps for the backward pass
    moments: dict[str, dict[str, int]]  # each moment that can be the peak, by kind
    paged: int  # optimizer states in managed memory, which torch does not count

    @property
    def moment(self) -> str:
        """The moment that holds most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind at that moment."""
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return sum(self.kinds.values())


def predict(
    model_config, bnb_config=None, lora_config=None, sft_config=None, extras=None
) -> Prediction:
    """The bytes of a training run, from its configs alone.

    model_config: a LlamaConfig or a name of models.SHAPES. bnb_config: a 4-bit
    BitsAndBytesConfig; without it weights are as model_config.dtype says (16-bit, or
    fp32). lora_config: without it every weight trains. sft_config must be given; rows
    count as full: `max_length` tokens, no padding, loss on each. extras: an Extras.

    On a GPU the peak is that of torch's allocator (`max_memory_allocated`) in a step
    after the first. Raises TypeError or ValueError, naming the setting, for a setting
    that is not counted: settings.toml lists those that may be set.
    """
    return predict_plan(read(model_config, bnb_config, lora_config, sft_config, extras))


def predict_plan(plan: Plan) -> Prediction:
    """The bytes of a run that was read already, as `predict` gives them."""
    if not FUSED_LOSS:
        warnings.warn("TRL before 1.15 keeps more than is predicted", stacklevel=3)
    weights = formulas.weight_bytes(plan)
    gradients = formulas.gradient_bytes(plan)
    states, paged = formulas.optimizer_bytes(plan)
    kept, last_layer, first_layer = formulas.activation_bytes(plan)
    ends = formulas.end_bytes(plan)
    loss, head_gradient = formulas.loss_bytes(plan)
    # tied: the head's gradient waits for the embedding's, then their sum is made
    tied = plan.config.tie_word_embeddings
    at_loss = head_gradient
    at_last_layer = head_gradient + gradients // plan.config.num_hidden_layers
    at_first_layer = gradients - (0 if tied else head_gradient)
    if plan.accumulates:  # from the second batch on they are there all the time
        at_loss = at_last_layer = at_first_layer = gradients
    moments = {
        "the loss, backward": {
            "activations": kept + ends,
            "logits and loss": loss,
            "gradients": at_loss,
        }
    }
    for layer, held, of_layers in [
        ("last layer", kept + last_layer, at_last_layer),
        ("first layer", first_layer, at_first_layer),
    ]:
        for moment, (extra, scratch) in formulas.extra_within_layer(plan).items():
            moments[f"{layer}: {moment}"] = {
                "activations": held + extra,
                "dequantized weight": scratch,
                "gradients": of_layers,
            }
    if not plan.every:  # it is not gone through again
        del moments["first layer: forward, down_proj"]
    if not plan.targets:
        embedding = gradients + (2 * head_gradient if tied else 0)
        moments["the embedding, backward"] = {"gradients": embedding}
    # On a GPU, torch's AdamW without `fused` holds the square roots for all tensors at
    # once. Source: torch/optim/adam.py, _multi_tensor_adam.
    roots = gradients if plan.optim == "adamw_torch" and plan.on_gpu else 0
    moments["the optimizer's step"] = {"gradients": gradients, "square roots": roots}
    always = {
        "base weights": sum(weights.values()),
        "adapters": gradients if plan.targets else 0,  # gradients have their size
        "optimizer": states,
        "workspaces": WORKSPACES if plan.on_gpu else 0,
    }
    moments = {name: always | kinds for name, kinds in moments.items()}
    log_probabilities = loss // 3 if plan.full_logits else 0  # of three tensors
    return Prediction(weights, kept + ends + log_probabilities, moments, paged)
