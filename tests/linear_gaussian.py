"""A linear-Gaussian state-space model with the VRNN's interface, and its exact likelihood.

z_t = a z_{t-1} + N(0, s^2),  x_t = c z_t + N(0, r^2),  z_0 = 0,  all scalar
"""

import math

import torch

from common import Rollout, gaussian_kl, gaussian_log_density

A, S, C, R = 0.9, 0.7, 1.3, 0.5


def kalman_log_likelihood(x_TBX):
    """log p(x_1..x_T) of each sequence, (B,), by the Kalman filter."""
    mean, variance, total = torch.zeros_like(x_TBX[0]), 0.0, 0.0
    for x in x_TBX:
        mean, variance = A * mean, A * A * variance + S * S
        total = total + gaussian_log_density(
            x, C * mean, torch.full_like(x, math.sqrt(C * C * variance + R * R))
        )
        gain = variance * C / (C * C * variance + R * R)
        mean, variance = mean + gain * (x - C * mean), (1 - gain * C) * variance
    return total


def sample(frames, batch, generator):
    z, x = torch.zeros(batch, 1, dtype=torch.float64), []
    for _ in range(frames):
        z = A * z + S * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        x.append(C * z + R * torch.randn(z.shape, generator=generator, dtype=z.dtype))
    return torch.stack(x)


class LinearGaussian:
    """proposal: `exact`, the posterior p(z_t | z_{t-1}, x_t..x_T); `filtering`, p(z_t | z_{t-1}, x_t); or `prior`."""

    z_dim = 1

    def __init__(self, proposal):
        self.proposal = proposal

    def evidence(self, x_TBX):
        """Precision and its product with the mean that the x seen by the proposal add to z_t, for every t."""
        precision, shift, evidence = 0.0, torch.zeros_like(x_TBX[0]), []
        for x in x_TBX.flip(0):
            precision, shift = precision + C * C / R**2, shift + C * x / R**2
            evidence.append((precision, shift))
            total = 1 / S**2 + precision  # integrate z_t out, for the proposal at t - 1
            shift = A * shift / (S**2 * total)
            precision = A * A / S**2 - A * A / (S**4 * total)
        if self.proposal == "filtering":
            return [(C * C / R**2, C * x / R**2) for x in x_TBX]
        if self.proposal == "prior":
            return [(0.0, torch.zeros_like(x)) for x in x_TBX]
        return evidence[::-1]

    def __call__(self, x_TBX, state=None, noise=None, k=1):
        frames, batch, _ = x_TBX.shape
        z = x_TBX.new_zeros(batch * k, 1) if state is None else state[0]
        by_time = []
        for x, (precision, shift), eps in zip(x_TBX, self.evidence(x_TBX), noise):
            prior_mean, prior_sigma = A * z, torch.full_like(z, S)
            total = 1 / S**2 + precision
            q_mean = (prior_mean / S**2 + shift.repeat_interleave(k, 0)) / total
            q_sigma = torch.full_like(z, 1 / math.sqrt(total))
            z = q_mean + q_sigma * eps
            x_mean, x_sigma = C * z, torch.full_like(z, R)
            log_px = gaussian_log_density(x.repeat_interleave(k, 0), x_mean, x_sigma)
            log_w = (
                log_px
                + gaussian_log_density(z, prior_mean, prior_sigma)
                - gaussian_log_density(z, q_mean, q_sigma)
            )
            kl = gaussian_kl(q_mean, q_sigma, prior_mean, prior_sigma)
            by_time.append(
                (-log_px, kl, log_w, q_mean, q_sigma, prior_mean, prior_sigma, x_mean, x_sigma)
            )
        nll, kl, log_w, *parameters = map(torch.stack, zip(*by_time))
        by_particle = (frames, batch, k)
        return Rollout(
            nll.view(by_particle),
            kl.view(by_particle),
            log_w.view(by_particle),
            *parameters,
            state=(z,),
            phi_x=None,
        )
