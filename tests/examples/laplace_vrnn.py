"""A likelihood of one's own: VRNN whose samples are Laplace, which has heavier tails than a Gaussian.

    PYTHONPATH=. python tests/examples/laplace_vrnn.py --data data/speech.h5

It takes the place of the Gaussian of --ar_order 0. The decoder's last layer still gives two numbers
for each sample.
"""

from dataclasses import dataclass

import torch

import common
import vrnn_gauss


@dataclass
class Hyperparameters(vrnn_gauss.Hyperparameters):
    out_dir: str = "runs/laplace_vrnn"


class Laplace(common.FrameLikelihood):
    def density(self, x, mean, scale):
        return -((x - mean).abs() / scale + (2 * scale).log()).sum(-1)

    def draw(self, mean, scale, generator):
        u = 1 - torch.rand((2, *mean.shape), generator=generator, device=mean.device)
        return mean + scale * (u[0] / u[1]).log()


class LaplaceVRNN(common.VRNN):
    Likelihood = Laplace


def main():
    h = common.parse(Hyperparameters)
    torch.manual_seed(h.seed)
    model = LaplaceVRNN(*(getattr(h, size) for size in common.SIZES))
    if h.evaluate:
        return common.evaluate_checkpoint(h, model)
    training = common.Training(h, particles=h.k, model=model, name="Laplace VRNN")

    @training.captured
    def update():
        x_TBX, noise = training.window(), training.noise(h.k, h.z_dim)
        rollout = training.model(x_TBX, training.state, noise, h.k)
        loss = vrnn_gauss.objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)

    for _ in training.updates():
        update()
    training.finish()


if __name__ == "__main__":
    common.run_as_script(main)
