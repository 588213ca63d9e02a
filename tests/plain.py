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


def gaussian(units):
    mean, sigma = units.chunk(2, dim=-1)
    return Normal(mean, softplus(sigma) + 1e-4)


def predictor(reflections):
    """a_1..a_P, each (rows,), of reflection coefficients: Levinson's recursion as it stands in textbooks."""
    a = []
    for k in reflections:
        a = [a_i - k * a_mirrored for a_i, a_mirrored in zip(a, reversed(a))] + [k]
    return a


def predicted(x, recent, a):
    """sum_i a_i x_{n-i} for each sample n of a frame (rows, X), and the samples that the next frame remembers."""
    samples = torch.cat((recent, x), dim=1)
    sums = [
        sum(
            (a_i * samples[:, n - i] for i, a_i in enumerate(a, start=1)), torch.zeros_like(x[:, 0])
        )
        for n in range(len(a), samples.shape[1])
    ]
    return torch.stack(sums, dim=1), samples[:, x.shape[1] :]


def plain_rollout(model, x_TBX, state, noise, k):
    """What model(x_TBX, state, noise, k) returns, from the same parameters."""
    x_TRX = torch.stack([x for x in x_TBX.unbind(1) for _ in range(k)], dim=1)
    h, c, recent = state if len(state) == 3 else (*state, state[0][:, :0])
    frames = []
    for x, eps in zip(x_TRX, noise):
        phi_x = through(model.phi_x, x)
        decoder_below, gates = through([model.decoder_h], h), through([model.lstm_x], phi_x)
        prior = posterior = Normal(eps, eps.exp())  # of no width, where there is no z
        if model.z_dim:
            prior = gaussian(through(model.prior, h))
            posterior = gaussian(
                through(
                    model.posterior,
                    through([model.posterior_x], phi_x) + through([model.posterior_h], h),
                )
            )
            z = posterior.mean + posterior.stddev * eps
            phi_z = through(model.phi_z, z)
            decoder_below = through([model.decoder_z], phi_z) + decoder_below
            gates = gates + through([model.lstm_z], phi_z)
        units = through(model.decoder, decoder_below)
        decoder, a = (
            gaussian(units[:, : 2 * model.x_dim]),
            predictor(0.9999 * units[:, 2 * model.x_dim :].tanh().T),
        )
        from_the_past, recent = predicted(x, recent, a)
        candidate, i, f, o = (gates + through([model.lstm_h], h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        h = torch.sigmoid(o) * torch.tanh(c)
        log_px = log_w = Normal(decoder.mean + from_the_past, decoder.stddev).log_prob(x).sum(-1)
        if model.z_dim:
            log_w = log_px + prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)
        frames.append(
            (
                phi_x[::k],
                -log_px,
                kl_divergence(posterior, prior).sum(-1),
                log_w,
                posterior.mean,
                posterior.stddev,
                prior.mean,
                prior.stddev,
                decoder.mean,
                decoder.stddev,
            )
        )
    phi_x, nll, kl, log_w, *parameters = map(torch.stack, zip(*frames))
    by_particle = (len(x_TBX), -1, k)
    return Rollout(
        nll.view(by_particle),
        kl.view(by_particle),
        log_w.view(by_particle),
        *parameters,
        state=(h, c, recent)[: len(state)],
        phi_x=phi_x,
    )
