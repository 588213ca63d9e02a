"""A linear-Gaussian state-space model with the VRNN's interface, and its exact likelihood.

z_t = a z_{t-1} + N(0, s^2),  x_t = c z_t + N(0, r^2),  z_0 = 0,  all scalar
"""

import math

import torch

from common import Rollout, gaussian_kl, gaussian_log_density

A, S, C, R = 0.9, 0.7, 1.3, 0.5


def kalman_log_likelihood(x_TBX):
    """log p(x_1..x_T) of each sequence, (B,), by the Kalman filter."""
    mean = torch.zeros_like(x_TBX[0])
    variance = 0.0
    total = 0.0
    for x in x_TBX:
        mean = A * mean
        variance = A * A * variance + S * S
        x_variance = C * C * variance + R * R
        x_sigma = torch.full_like(x, math.sqrt(x_variance))
        total = total + gaussian_log_density(x, C * mean, x_sigma)
        gain = variance * C / x_variance
        mean = mean + gain * (x - C * mean)
        variance = (1 - gain * C) * variance
    return total


def sample(frames, batch, generator):
    def draw():
        return torch.randn(batch, 1, generator=generator, dtype=torch.float64)

    z = torch.zeros(batch, 1, dtype=torch.float64)
    x = []
    for _ in range(frames):
        z = A * z + S * draw()
        x.append(C * z + R * draw())
    return torch.stack(x)


class LinearGaussian:
    """A model with one of these proposals q(z_t | .).

    exact: the posterior p(z_t | z_{t-1}, x_t..x_T); filtering: p(z_t | z_{t-1}, x_t); prior.
    """

    z_dim = 1

    def __init__(self, proposal):
        self.proposal = proposal

    def evidence(self, x_TBX):
        """Precision, and its product with the mean, that the x it sees add to z_t, for every t."""
        if self.proposal == "filtering":
            return [(C * C / R**2, C * x / R**2) for x in x_TBX]
        if self.proposal == "prior":
            return [(0.0, torch.zeros_like(x)) for x in x_TBX]
        precision = 0.0
        shift = torch.zeros_like(x_TBX[0])
        evidence = []
        for x in x_TBX.flip(0):
            precision = precision + C * C / R**2
            shift = shift + C * x / R**2
            evidence.append((precision, shift))
            # integrate z_t out, for the proposal at t - 1
            total = 1 / S**2 + precision
            shift = A * shift / (S**2 * total)
            precision = A * A / S**2 - A * A / (S**4 * total)
        return evidence[::-1]

    def __call__(self, x_TBX, state=None, noise=None, k=1):
        frames, batch, _ = x_TBX.shape
        z = x_TBX.new_zeros(batch * k, 1) if state is None else state[0]
        by_time = []
        for x, (precision, shift), eps in zip(x_TBX, self.evidence(x_TBX), noise):
            prior_mean = A * z
            prior_sigma = torch.full_like(z, S)
            total = 1 / S**2 + precision
            q_mean = (prior_mean / S**2 + shift.repeat_interleave(k, 0)) / total
            q_sigma = torch.full_like(z, 1 / math.sqrt(total))
            z = q_mean + q_sigma * eps
            x_mean = C * z
            x_sigma = torch.full_like(z, R)
            log_px = gaussian_log_density(x.repeat_interleave(k, 0), x_mean, x_sigma)
            log_pz = gaussian_log_density(z, prior_mean, prior_sigma)
            log_qz = gaussian_log_density(z, q_mean, q_sigma)
            kl = gaussian_kl(q_mean, q_sigma, prior_mean, prior_sigma)
            terms = [-log_px, kl, log_px + log_pz - log_qz]
            parameters = [q_mean, q_sigma, prior_mean, prior_sigma, x_mean, x_sigma]
            by_time.append(terms + parameters)
        stacked = [torch.stack(parts) for parts in zip(*by_time)]
        terms = [part.view(frames, batch, k) for part in stacked[:3]]
        return Rollout(*terms, *stacked[3:], state=(z,), phi_x=None)


class WithMemory(LinearGaussian):
    """The same, whose z_{t-1} lies in two parts of its state: half of it in each."""

    def __call__(self, x_TBX, state=None, noise=None, k=1):
        if state is not None:
            state = (state[0] + state[1],)
        rollout = super().__call__(x_TBX, state, noise, k)
        (z,) = rollout.state
        rollout.state = (z / 2, z / 2)
        return rollout
