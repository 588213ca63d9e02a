"""A model of one's own that is no VRNN: a GRU with latent variables, every network one layer.

    PYTHONPATH=. python tests/examples/stochastic_gru.py --data data/speech.h5

Its call gets a window x_TBX (T, B, X), the state before it (None for zeros), standard normal noise
(T, B*k, Z) and k; particle j of sequence b is row b*k + j. What it returns has nll_TBK, kl_TBK,
log_w_TBK and the state after the window: a tuple of tensors of B*k rows, like that of
zero_state(rows). With a method generate(frames, batch, generator) it would also write samples.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

import vrnn_gauss
from common import (
    Training,
    evaluate_checkpoint,
    gaussian_kl,
    gaussian_log_density,
    mean_and_sigma,
    parse,
    run_as_script,
)


@dataclass
class Hyperparameters(vrnn_gauss.Hyperparameters):
    out_dir: str = "runs/stochastic_gru"
    weight_norm: float = 0.0  # it has no constrain_weights ...
    mirrored_init: bool = False  # ... and no mirror


class StochasticGRU(nn.Module):
    def __init__(self, x_dim, z_dim, units):
        super().__init__()
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.gru = nn.GRUCell(x_dim + z_dim, units)
        self.prior = nn.Sequential(nn.Linear(units, 2 * z_dim))
        self.posterior = nn.Sequential(nn.Linear(units + x_dim, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(units + z_dim, 2 * x_dim))

    def zero_state(self, rows):
        return (self.gru.bias_hh.new_zeros(rows, self.gru.hidden_size),)

    def forward(self, x_TBX, state, noise, k):
        (h,) = self.zero_state(x_TBX.shape[1] * k) if state is None else state
        frames = []
        for x, e in zip(x_TBX.repeat_interleave(k, dim=1), noise):
            p_z = mean_and_sigma(self.prior(h))
            q_z = mean_and_sigma(self.posterior(torch.cat((h, x), dim=1)))
            q_mean, q_sigma = q_z
            z = q_mean + q_sigma * e
            p_x = mean_and_sigma(self.decoder(torch.cat((h, z), dim=1)))
            log_px = gaussian_log_density(x, *p_x)
            log_w = log_px + gaussian_log_density(z, *p_z) - gaussian_log_density(z, *q_z)
            frames.append((-log_px, gaussian_kl(*q_z, *p_z), log_w))
            h = self.gru(torch.cat((x, z), dim=1), h)
        by_frame = (torch.stack(part) for part in zip(*frames))
        nll_TBK, kl_TBK, log_w_TBK = (part.unflatten(1, (-1, k)) for part in by_frame)
        return SimpleNamespace(nll_TBK=nll_TBK, kl_TBK=kl_TBK, log_w_TBK=log_w_TBK, state=(h,))


def main():
    h = parse(Hyperparameters)
    torch.manual_seed(h.seed)
    model = StochasticGRU(h.x_dim, h.z_dim, h.rnn_dim)
    if h.evaluate:
        return evaluate_checkpoint(h, model)
    training = Training(h, particles=h.k, model=model, name="stochastic GRU")

    @training.captured
    def update():
        x_TBX = training.window()
        noise = training.noise(h.k, h.z_dim)
        rollout = training.model(x_TBX, training.state, noise, h.k)
        loss = vrnn_gauss.objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)

    for _ in training.updates():
        update()
    training.finish()


if __name__ == "__main__":
    run_as_script(main)
