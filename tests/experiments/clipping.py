"""What about clipping does the harm: train VRNN with gradients of one norm for all batches.

    python tests/experiments/clipping.py [--norm growing|median] [--beta2 0.99] [flags of VRNN]

--norm=growing gives every gradient the norm that those of VRNN have by themselves, in the median
of a trial run at the sizes of experiment.py, until it reaches 640, at which the others are
clipped. No batch then counts more than another, and yet the scale grows as it does without
clipping. --norm=median clips at twice the median norm of the last 100 updates, which last.pt does
not hold: a resumed run begins with none. The log holds the norms before they were scaled.
experiment.py has the runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import vrnn_gauss  # noqa: E402

# linear between them, 640 from there on
UPDATES = (0, 125, 375, 625, 875)
MEDIAN_NORMS = (60, 123, 272, 490, 640)


@dataclass
class Hyperparameters(vrnn_gauss.Hyperparameters):
    """Each is also a flag."""

    out_dir: str = "runs/clipping"  # where log, checkpoints, evaluation and speech go
    norm: Literal["clipped", "growing", "median"] = "clipped"  # clipped: by grad_clip
    beta2: float = 0.999  # decay of Adam's second moment


def median_norms(device):
    """The norm for each update up to the last of UPDATES."""
    norms = np.interp(np.arange(UPDATES[-1] + 1), UPDATES, MEDIAN_NORMS)
    return torch.tensor(norms, dtype=torch.float32, device=device)


def limited(norm, recent, update):
    """A norm, but at most twice the median of `recent`, where it takes the place of the oldest.

    NaN in `recent` stands for none.
    """
    recent[update % len(recent)] = norm
    return torch.minimum(norm, 2 * recent.nanmedian())


def main():
    h = common.parse(Hyperparameters)
    if h.evaluate:
        return common.evaluate_checkpoint(h)
    name = "VRNN limited by the median norm" if h.norm == "median" else "VRNN"
    training = common.Training(h, particles=h.k, name=name)
    training.optimiser.param_groups[0]["betas"] = (0.9, h.beta2)
    norms = median_norms(training.device)
    recent = torch.full((100,), torch.nan, device=training.device)

    @training.captured
    def update():
        x_TBX = training.window()
        noise = training.noise(h.k, h.z_dim)
        rollout = training.model(x_TBX, training.state, noise, h.k)
        loss = vrnn_gauss.objective(rollout)
        loss.backward()
        if h.norm == "clipped":
            training.step(loss, rollout.state)
        else:
            gradients = [p.grad for p in training.model.parameters()]
            norm = torch.nn.utils.get_total_norm(gradients)
            made = training.counts["made"]
            if h.norm == "growing":
                wanted = norms.take(made.clamp(max=UPDATES[-1]))
            else:
                wanted = limited(norm, recent, made)
            clipped = training.counts["clipped"] + (norm.isfinite() & (wanted < norm))
            torch._foreach_mul_(gradients, wanted / norm)
            training.step(loss, rollout.state)
            # For the log, of the gradient as it was.
            training.counts["clipped"].copy_(clipped)
            training.counts["grad_norm"].copy_(norm)

    for _ in training.updates():
        update()
    training.finish()


if __name__ == "__main__":
    common.run_as_script(main)
