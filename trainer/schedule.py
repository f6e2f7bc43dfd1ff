"""Learning-rate schedules as pure functions of the step. No torch."""

import math

from officina.trainer.config import LrScheduleConfig


def lr_factor(config: LrScheduleConfig, step: int, steps: int) -> float:
    """Factor on every learning rate in optimizer step `step` (0-based) of a run of `steps` steps.

    Warm-up step i of w gets (i + 1) / w, so that no step is wasted on a zero rate; step w is the first at the peak, and
    the last step of a decay is at `min_ratio` exactly. A step past the end stays there. Raises ValueError for a negative
    step. WSD decays with 1 - sqrt(share done) (arXiv:2405.18392).
    """
    if step < 0:
        raise ValueError(f"lr_factor: step {step} is negative; the first step is 0")
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant" or (config.kind == "wsd" and not config.decay_steps):
        return 1.0
    last, first = steps - 1, config.warmup_steps
    if config.kind == "wsd":
        first = max(first, last - config.decay_steps)
    done = min(1.0, max(0, step - first) / max(1, last - first))
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "wsd": 1 - math.sqrt(done)}[config.kind]
    return config.min_ratio + (1 - config.min_ratio) * shape
