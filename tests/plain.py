"""The VRNN written plainly: every network inside the loop over frames, every particle with a copy of x of its own.

Slow and simple on purpose; the tests hold common.VRNN against it.
"""

import math

import torch
from torch.distributions import Normal, StudentT, kl_divergence
from torch.nn.functional import linear, softplus

from common import Rollout


def through(network, x):
    for layer in network:
        x = linear(x, layer.weight, layer.bias) if hasattr(layer, "weight") else x.relu()
    return x


def gaussian(units):
    mean, sigma = units.chunk(2, dim=-1)
    return Normal(mean, softplus(sigma) + 1e-4)


def base_filter(heard, order):
    """a_1..a_P, k_1..k_P and the variance of the error for the last 320 samples: Makhoul 1975, equations 37 and 38."""
    window = [math.sin(math.pi / 2 * n / 288) for n in range(288)]
    window += [math.cos(math.pi / 2 * (n - 288) / 32) for n in range(288, 320)]
    y = [w * x for w, x in zip(window, heard[-320:], strict=True)]
    power = sum(w**2 for w in window)
    r = [sum(y[n] * y[n - i] for n in range(i, 320)) / power for i in range(order + 1)]
    r[0] = (1 + 1e-6) * r[0] + 1e-7
    a, reflections, variance = [], [], r[0]
    for i in range(1, order + 1):
        k = -(r[i] + sum(a[j - 1] * r[i - j] for j in range(1, i))) / variance
        a = [a[j - 1] + k * a[i - j - 1] for j in range(1, i)] + [k]
        variance = (1 - k**2) * variance
        reflections.append(k)
    return a, reflections, variance


def log_rms(errors):
    return 0.5 * math.log(sum(error**2 for error in errors) / len(errors) + 1e-7)


def innovations(x, recent, m, s, of_components):
    """z and log scale of each component at each sample of one frame, (X, J) each; x, m, s (X), recent (.)."""
    order = of_components.shape[1] - 8
    samples = [*recent.tolist(), *x.tolist()]
    b, g, d = of_components[:, 1], of_components[:, 2], of_components[:, 8:]
    levels = of_components[:, 4:8].exp()
    levels = 0.9 * levels / levels.sum(1, keepdim=True)
    c, e = levels[:, 0], levels[:, 1:]
    z, log_scales = [], []
    for n in range(len(x)):
        now = len(recent) + n
        if n % block_of(x) == 0:
            base, k0, v0 = base_filter(samples[:now], order)
            errors = [
                samples[i] + sum(base[j - 1] * samples[i - j] for j in range(1, order + 1))
                for i in range(order, len(samples))
            ]
            a = []
            for i in range(order):
                k = torch.tanh(b * math.atanh(k0[i]) + d[:, i])
                a = [a_j + k * a_mirrored for a_j, a_mirrored in zip(a, reversed(a))] + [k]
        r = [log_rms(errors[now - order - w : now - order]) for w in (4, 16, 64)]
        log_scale = (
            s[n] + g + c * 0.5 * math.log(v0) + e[:, 0] * r[0] + e[:, 1] * r[1] + e[:, 2] * r[2]
        )
        log_scale = log_scale.clamp(math.log(1e-4), 3)
        u = samples[now] + sum(a[i - 1] * samples[now - i] for i in range(1, order + 1))
        z.append(u / log_scale.exp() - m[n])
        log_scales.append(log_scale)
    return torch.stack(z), torch.stack(log_scales)


def block_of(x):
    return 50 if len(x) % 50 == 0 else len(x)


def adaptive_log_density(x, recent, m, s, of_components):
    """log p of one frame of one particle."""
    z, log_scale = innovations(x, recent, m, s, of_components)
    log_t = StudentT(2 + softplus(of_components[:, 3])).log_prob(z) - log_scale
    total = 0
    for block in log_t.split(block_of(x)):
        total = total + (of_components[:, 0].log_softmax(0) + block.sum(0)).logsumexp(0)
    return total


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
        if model.likelihood.ar_order:
            m, s, of_components = units.split(
                [model.x_dim, model.x_dim, units.shape[1] - 2 * model.x_dim], 1
            )
            of_components = of_components.unflatten(1, (model.likelihood.components, -1))
            log_px = torch.stack(list(map(adaptive_log_density, x, recent, m, s, of_components)))
            recent = torch.cat((recent, x), dim=1)[:, model.x_dim :]
        else:
            m, s = gaussian(units).mean, gaussian(units).stddev
            log_px = Normal(m, s).log_prob(x).sum(-1)
        candidate, i, f, o = (gates + through([model.lstm_h], h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        h = torch.sigmoid(o) * torch.tanh(c)
        log_w = log_px
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
                m,
                s,
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
