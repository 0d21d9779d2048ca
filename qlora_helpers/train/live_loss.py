"""The loss curves, drawn while a model trains."""

import math
import statistics

from tqdm.auto import tqdm
from transformers import TrainerCallback

from qlora_helpers import plots


class LiveLoss(TrainerCallback):
    """A progress bar, and in a notebook the loss curves, drawn as they grow."""

    def __init__(self):
        self.bar = self.picture = None
        self.losses, self.validation = [], []  # the logged pairs (step, loss)
        self.warmup = 0  # steps

    def on_train_begin(self, args, state, control, **kwargs):
        if self.bar is not None:  # the bar of an interrupted run
            self.bar.close()
        logged = [entry for entry in state.log_history if "loss" in entry]
        self.losses = [(entry["step"], entry["loss"]) for entry in logged]
        logged = [entry for entry in state.log_history if "eval_loss" in entry]
        self.validation = [(entry["step"], entry["eval_loss"]) for entry in logged]
        self.warmup = args.get_warmup_steps(state.max_steps)
        done = state.global_step  # above 0 if a run is resumed
        self.bar = tqdm(
            total=state.max_steps, initial=done, desc="training", unit="step"
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in logs:
            self.validation.append((state.global_step, float(logs["eval_loss"])))
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}: halve learning_rate; "
                "on a T4 also look for fp16 overflow in the data's longest rows"
            )
        self.losses.append((state.global_step, loss))
        self.bar.set_postfix(loss=f"{loss:.2f}")
        if len(self.losses) % 10 == 0:
            self.draw()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        if not state.global_step:
            raise RuntimeError(
                "training ended without a step: there are fewer rows than one batch, "
                "and dataloader_drop_last leaves that batch out"
            )
        if self.losses:  # empty if logging is off or its interval exceeds the run
            self.draw()

    def draw(self):
        steps, losses = zip(*self.losses, strict=True)
        every_step = steps == tuple(range(1, steps[-1] + 1))
        fig, ax = plots.figure()
        if every_step and self.warmup:
            ax.axvspan(0, min(self.warmup, steps[-1]), color="0.92", label="warm-up")
        marker = "" if every_step and len(losses) > 1 else "o"
        ax.plot(steps, losses, marker=marker, label="training")
        if self.validation:
            ax.plot(*zip(*self.validation, strict=True), "o--", label="validation")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="step", ylabel="loss (nat per token)", yscale="log")
        ax.yaxis.set_major_formatter(plain)
        ax.yaxis.set_minor_formatter(plain)
        last = losses[-max(1, min(10, len(losses) // 4)) :]
        end = statistics.mean(last)
        since = "" if every_step else ", averaged since the point before"
        title = f"Training loss: {losses[0]:.2g} to {end:.2g}{since}"
        if self.validation:
            (_, high), (_, low) = self.validation[0], self.validation[-1]
            title += f". Validation loss: {high:.2g} to {low:.2g}"
        ax.set_title(title)
        ax.legend(frameon=False)
        alt = (
            f"Training loss from {losses[0]:.1f} at step {steps[0]} to "
            f"{end:.2g} over the last {len(last)} of {len(losses)} "
            f"{'steps' if every_step else 'points'}"
        )
        if self.validation:
            (first, high), (final, low) = self.validation[0], self.validation[-1]
            alt += f"; validation loss from {high:.1f} at step {first} to {low:.2g}"
            alt += f" at step {final}"
        self.picture = plots.redraw(fig, alt, self.picture)


def plain(tick, _=None) -> str:
    """The label of a logarithmic axis: 0.1, 0.2 and 0.5, and nothing in between."""
    return f"{tick:g}" if f"{tick:e}"[0] in "125" else ""
