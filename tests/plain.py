"""The VRNN written plainly: every network inside the loop over frames, every particle with a copy of x of its own.

Slow and simple on purpose; the tests hold common.VRNN against it.
"""

import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import linear, softplus

from common import Rollout


def through(network, x):
    for layer in network:
        x = linear(x, layer.weight, layer.bias) if hasattr(layer, "weight") else x.relu()
    return x


def gaussian(network, *inputs):
    mean, sigma = through(network, sum(inputs)).chunk(2, dim=-1)
    return Normal(mean, softplus(sigma) + 1e-4)


def plain_rollout(model, x_TBX, state, noise, k):
    """What model(x_TBX, state, noise, k) returns, from the same parameters."""
    x_TRX = torch.stack([x for x in x_TBX.unbind(1) for _ in range(k)], dim=1)
    h, c = state
    frames = []
    for x, eps in zip(x_TRX, noise):
        phi_x = through(model.phi_x, x)
        prior = gaussian(model.prior, h)
        posterior = gaussian(model.posterior, through([model.posterior_x], phi_x), through([model.posterior_h], h))
        z = posterior.mean + posterior.stddev * eps
        phi_z = through(model.phi_z, z)
        decoder = gaussian(model.decoder, through([model.decoder_z], phi_z), through([model.decoder_h], h))
        gates = through([model.lstm_x], phi_x) + through([model.lstm_z], phi_z) + through([model.lstm_h], h)
        candidate, i, f, o = gates.chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        h = torch.sigmoid(o) * torch.tanh(c)
        log_px = decoder.log_prob(x).sum(-1)
        log_w = log_px + prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)
        frames.append((phi_x[::k], -log_px, kl_divergence(posterior, prior).sum(-1), log_w, posterior.mean,
                       posterior.stddev, prior.mean, prior.stddev, decoder.mean, decoder.stddev))
    phi_x, nll, kl, log_w, *parameters = map(torch.stack, zip(*frames))
    by_particle = (len(x_TBX), -1, k)
    return Rollout(nll.view(by_particle), kl.view(by_particle), log_w.view(by_particle), *parameters, state=(h, c),
                   phi_x=phi_x)
