"""The bounds of a trained VRNN whose z comes from the prior, not the posterior.

    python tests/experiments/from_prior.py --evaluate RUN/best.pt --out_dir FOLDER

log p(x | z) in the mean over z of the prior is a lower bound on log p(x), without a KL. How far it
lies below the bound with the posterior is what the posterior earns beyond its KL.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import vrnn_gauss  # noqa: E402


@dataclass
class Hyperparameters(vrnn_gauss.Hyperparameters):
    out_dir: str = "runs/from_prior"  # where the evaluation goes


class VRNN(common.VRNN):
    """It has the name of the class whose checkpoints it reads."""

    def q_z(self, phi_x, h):
        return self.p_z(h)


def main():
    h = common.parse(Hyperparameters)
    sizes = {size: getattr(h, size) for size in common.SIZES}
    common.evaluate_checkpoint(h, VRNN(**sizes))


if __name__ == "__main__":
    common.run_as_script(main)
