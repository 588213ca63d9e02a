"""What about clipping does the harm: train VRNN with gradients scaled to a norm that is the same for all batches.

    python tests/clipping.py [--norm clipped] [--beta2 0.999] [flags of vrnn_gauss.py]

--norm growing gives every gradient the norm that those of VRNN have by themselves, in the median of a trial run at the
sizes of tests/experiment.py, until it reaches 640, at which VRNN is clipped by default. No batch then counts more than
another, and yet the scale grows as it does without clipping. --beta2 is the decay of Adam's second moment. The log
holds the norms before they were scaled. tests/experiment.py has the runs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import vrnn_gauss  # noqa: E402

UPDATES, MEDIAN_NORMS = (0, 125, 375, 625, 875), (60, 123, 272, 490, 640)  # linear between them, 640 from there on


class Trainer(common.Trainer):
    def __init__(self, h, *others):
        super().__init__(h, *others)
        self.optimiser.param_groups[0]["betas"] = (0.9, h.beta2)
        if h.norm == "growing":
            torch.nn.utils.clip_grad_norm_ = self.scale_gradients

    def scale_gradients(self, parameters, max_norm):
        """In place of clip_grad_norm_: returns the norm before."""
        gradients = [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, float(np.interp(self.progress["update"], UPDATES, MEDIAN_NORMS)) / norm)
        return norm


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("clipped", "growing"), default="clipped")
    parser.add_argument("--beta2", type=float, default=0.999)
    options, others = parser.parse_known_args()
    h = common.hyperparameters(vars(vrnn_gauss), others)
    h.norm, h.beta2 = options.norm, options.beta2  # in the log as well
    common.Trainer = Trainer
    common.train(h, vrnn_gauss.objective, particles=h.k)


if __name__ == "__main__":
    common.run_as_script(main)
