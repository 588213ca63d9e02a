"""The VRNN, its bounds, its evaluation and its training: everything that the three scripts share.

Sections: likelihood, VRNN, bounds, evaluation, training, windows, HDF5, arrays, run folder and
checkpoints, flags, processes and errors, fast recurrence.

Shape suffixes: T frames, B sequences, K particles, X samples in a frame, Z latent size, R LSTM
size. Tensors of (T, B*K, .) hold particle j of sequence b in row b*K + j. Log-densities are in
nats; a bound on log p(x) is reported in nats per frame (summed over X, averaged over T and B)
unless its name says otherwise.

A recording is cut into excerpts, an excerpt into reset_freq windows, through which the state is
carried, a window into seq_frames frames, a frame into X samples. `h` are hyperparameters; with c it
is the state of the LSTM.
"""

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

SAMPLE_RATE = 16_000
SIGMA_FLOOR = 1e-4  # keeps the sigma of every Gaussian off zero

# ---- likelihood ----------------------------------------------------------------------------------


def gaussian_log_density(x, mean, sigma):
    """log N(x; mean, sigma^2) summed over the last axis."""
    error = (x - mean) / sigma
    log_root = sigma.log().sum(-1) + 0.5 * math.log(2 * math.pi) * error.shape[-1]
    return -0.5 * error.square().sum(-1) - log_root


def gaussian_kl(q_mean, q_sigma, p_mean, p_sigma):
    """KL(N(q_mean, q_sigma^2) || N(p_mean, p_sigma^2)) summed over the last axis."""
    ratio = q_sigma / p_sigma
    distance = (q_mean - p_mean) / p_sigma
    return (0.5 * (ratio**2 + distance**2 - 1) - ratio.log()).sum(-1)


def sample_gaussian(mean, sigma, generator=None):
    """One draw of each element of N(mean, sigma^2)."""
    return mean + sigma * drawn_like(mean, torch.randn, generator, *mean.shape)


def mean_and_sigma(units):
    """Mean and sigma, (., D) each, from the 2D units of a network's last layer."""
    mean, sigma = units.chunk(2, dim=-1)
    return mean, F.softplus(sigma) + SIGMA_FLOOR


@contextlib.contextmanager
def without_tf32():
    """Products in full float32: TF32 would round a prediction by a thousandth of the samples."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FrameLikelihood:
    """p(x_t | z_t, h_{t-1}), as published: given z_t, the samples of a frame are independent.

    The decoder's last layer gives mean and sigma of each. A subclass with another distribution
    replaces `density` (its log, summed over samples) and `draw`; VRNN.Likelihood names the class
    that a model with ar_order = 0 uses.
    """

    ar_order = 0
    active = 32  # latent variables that tell something of x from the first update on
    density = staticmethod(gaussian_log_density)
    draw = staticmethod(sample_gaussian)

    def __init__(self, x_dim):
        self.x_dim = x_dim
        self.units = 2 * x_dim  # of the decoder's last layer

    def initialise(self, head, sigma_gain=1.0):
        """Start with the published sigma; with a small gain it is nearly constant at first."""
        head.weight[self.x_dim :].mul_(sigma_gain)
        head.bias[self.x_dim :].fill_(0.6)

    def zero_memory(self, like, rows):
        """The parts of the state that are the likelihood's, at a start."""
        return ()

    def parameters(self, units):
        """What log_density and sample take, from the decoder's last layer.

        The first two are what a Rollout reports as x_mean and x_sigma.
        """
        return mean_and_sigma(units)

    def log_density(self, x_TBX, parameters, memory, k):
        """log p(x_t | .) of each particle, (T, B, k), and the memory after the last frame.

        parameters: (T, B*k, .) each. All particles of a sequence have seen the same x.
        """
        mean, sigma = (part.unflatten(1, (-1, k)) for part in parameters)
        return self.density(x_TBX.unsqueeze(2), mean, sigma), memory

    def sample(self, parameters, memory, generator=None):
        """Draw a frame (rows, X), and the memory after it. parameters: (rows, .) each."""
        return self.draw(*parameters, generator), memory


POWER_FLOOR = 1e-7  # of normalised samples: about that of their rounding to 16 bits
LOG_SCALE = (math.log(SIGMA_FLOOR), 3.0)  # its least and its largest value, of normalised samples
SUM_OF_EXPONENTS = 0.9  # of levels; below 1, or what a model draws grows louder and louder


class AdaptiveLikelihood:
    """p(x_t | z_t, h_{t-1}, earlier samples), backward-adaptive as in speech coding (ITU-T G.728).

    A frame is cut into blocks of 50 samples; if that leaves a rest, it is one block. Before every
    block a base filter is found that suits the last 320 samples: its reflection coefficients k0
    (P), and the rms v0 of its errors. Before every sample n, its errors at the last 4, 16 and 64
    samples have rms r_n (3). The decoder's last layer gives m, s (X each), and for each of J
    components a weight pi, b, g, nu, c, e (3) and d (P):

        a_j = step_up(tanh(b_j atanh(k0) + d_j)),    u_jn = x_n + sum_i a_ji x_{n-i}
        log scale_jn = s_n + g_j + c_j log v0 + e_j . log r_n,    clamped to LOG_SCALE
        p(block | .) = sum_j pi_j prod_n t_j(u_jn / scale_jn - m_n) / scale_jn

    where pi is the softmax of its units, t_j is Student's density of nu_j > 2 degrees of freedom,
    and c_j and e_j are positive and add up to SUM_OF_EXPONENTS. POWER_FLOOR is added to every
    power. p(frame | .) is the product over its blocks.

    The memory is the last samples, (rows, .), the same for all particles of a sequence. A Rollout
    reports m and s as x_mean and x_sigma. What a VRNN calls is as in FrameLikelihood.
    """

    active = 0  # see FrameLikelihood
    heard = 320  # samples that a base filter suits
    spans = (4, 16, 64)  # samples whose errors tell how loud the next one is
    block_size = 50  # samples between two base filters, where a frame is made of such

    def __init__(self, x_dim, ar_order, components):
        self.x_dim = x_dim
        self.ar_order = ar_order
        self.components = components
        self.block = x_dim if x_dim % self.block_size else self.block_size
        self.units = 2 * x_dim + components * (8 + ar_order)

    def initialise(self, head, sigma_gain=1.0):
        """Start near the base filter, with components from soft to loud."""
        head.weight[self.x_dim :].mul_(0.1)
        head.bias.zero_()
        of_components = head.bias[2 * self.x_dim :].view(self.components, -1)
        of_components[:, 1] = 0.9  # b
        of_components[:, 2] = torch.linspace(-2, 2, self.components + 2)[1:-1]  # g
        of_components[:, 3] = 2.0  # nu

    def zero_memory(self, like, rows):
        return (like.new_zeros(rows, self.heard + self.ar_order),)

    def parameters(self, units):
        m, s, of_components = units.tensor_split((self.x_dim, 2 * self.x_dim), dim=-1)
        return m, s, of_components.unflatten(-1, (self.components, -1))

    def corrected(self, of_components, k0, log_v0):
        """What components (., 8 + P) make of a base filter.

        Their reflection coefficients (., P), g + c log v0 (., 1), e (., 3) and nu (., 1).
        """
        _, b, g, nu, exponents, d = of_components.split((1, 1, 1, 1, 4, self.ar_order), dim=-1)
        reflections = torch.tanh(b * k0.atanh() + d)
        c, e = (SUM_OF_EXPONENTS * exponents.softmax(-1)).split((1, 3), dim=-1)
        return reflections, g + c * log_v0, e, 2 + F.softplus(nu)

    def base_filter(self, samples):
        """k0 (., P) and log v0 (., 1) of the filter that suits the last samples."""
        order, heard = self.ar_order, self.heard
        n = torch.arange(heard, device=samples.device, dtype=torch.float64)
        # A window that rises over nine tenths, and falls to the present in the last one.
        window = torch.sin(math.pi / 2 / heard * torch.minimum(n / 0.9, (heard - n) / 0.1))
        spectrum = torch.fft.rfft(samples[..., -heard:] * window, heard + order)
        power = spectrum.real**2 + spectrum.imag**2
        r = torch.fft.irfft(power, heard + order) / window.square().sum()
        r = r[..., : order + 1].movedim(-1, 0).contiguous()
        # White noise 60 dB down lets no filter ring on; the floor is for silence.
        r[0] = (1 + 1e-6) * r[0] + POWER_FLOOR

        # Schur's recursion on r at lags from 0 and from 1 on; each order leaves one lag less.
        forward, backward = r[:-1], r[1:]
        reflections = []
        for _ in range(order):
            k = -backward[:1] / forward[:1]
            reflections.append(k)
            of_order = torch.addcmul(forward, k, backward)
            backward = torch.addcmul(backward, k, forward)[1:]
            forward = of_order[:-1]
        variance = of_order[:1]
        k0 = torch.cat(reflections).movedim(0, -1)
        log_v0 = 0.5 * variance.log().movedim(0, -1)
        return k0.to(samples.dtype), log_v0.to(samples.dtype)

    def log_levels(self, samples, base):
        """log r_n, (., block, 3), of the sample after the last one and of those before that."""
        order = self.ar_order
        longest = max(self.spans)
        last = samples[..., 1 - order - longest - self.block :]
        errors = last[..., order:]
        for i in range(order):
            shifted = last[..., i : i + errors.shape[-1]]
            errors = torch.addcmul(errors, base[..., i : i + 1], shifted)
        squares = errors.square()
        powers = [squares[..., longest - n :].unfold(-1, n, 1).mean(-1) for n in self.spans]
        return 0.5 * (torch.stack(powers, dim=-1) + POWER_FLOOR).log()

    @without_tf32()
    def log_density(self, x_TBX, parameters, memory, k):
        (recent,) = memory
        remembered = recent.shape[1]
        samples = torch.cat((recent[::k], x_TBX.transpose(0, 1).flatten(1)), dim=1)
        # Axes from here on: T, B, K, components, blocks of a frame, samples. Those of `blocks` begin
        # with what is remembered before each block.
        blocks = samples.unfold(1, remembered + self.block, self.block)
        blocks = blocks.unflatten(1, (len(x_TBX), 1, 1, -1)).transpose(0, 1)

        # Of x alone: once for all particles and components.
        k0, log_v0 = self.base_filter(blocks[..., :remembered])
        past = blocks[..., remembered - self.ar_order : -1].unfold(-1, self.ar_order, 1)
        levels = self.log_levels(blocks[..., :-1], step_up(k0))

        # Of the decoder: what each component makes of it.
        m, s, of_components = (part.unflatten(1, (-1, k)) for part in parameters)
        m, s = (part.unflatten(-1, (1, -1, self.block)) for part in (m, s))
        reflections, log_gain, e, nu = self.corrected(of_components.unsqueeze(4), k0, log_v0)

        # Innovations, their scales, and the mixture of the components over each block.
        u = blocks[..., remembered:] + weighted_sum(step_up(reflections), past)
        log_scale = (weighted_sum(e, levels) + log_gain + s).clamp(*LOG_SCALE)
        z = u * (-log_scale).exp() - m
        log_pi = of_components[..., :1].log_softmax(3)
        log_p = log_pi + student_log_density(z, nu) - log_scale.sum(-1)
        log_density = log_p.logsumexp(3).sum(-1)
        return log_density, (samples[:, -remembered:].repeat_interleave(k, dim=0),)

    def sample(self, parameters, memory, generator=None):
        m, s, of_components = parameters
        (samples,) = memory
        uniform = drawn_like(m, torch.rand, generator, 2, *m.shape)
        rows = torch.arange(len(m), device=m.device)
        for first in range(0, self.x_dim, self.block):
            # One component has the whole block.
            k0, log_v0 = self.base_filter(samples)
            j = torch.multinomial(of_components[..., 0].softmax(1), 1, generator=generator)
            chosen = of_components[rows, j.squeeze(1)]
            reflections, log_gain, e, nu = self.corrected(chosen, k0, log_v0)
            base, a = step_up(torch.stack((k0, reflections)))
            block = slice(first, first + self.block)
            drawn = m[:, block] + student(*uniform[:, :, block], nu)
            parts = (samples, base, a, log_gain + s[:, block], e, drawn)
            of_rows = zip(*[part.tolist() for part in parts])
            x = [self.sample_block(*of_row) for of_row in of_rows]
            samples = torch.cat((samples, samples.new_tensor(x)), dim=1)
        return samples[:, -self.x_dim :], (samples[:, self.x_dim :],)

    def sample_block(self, samples, base, a, log_gain, e, drawn):
        """A block of one sequence after samples, by its filters, log gains, e and Student's noise.

        Of Python's own numbers: a call of PyTorch for each would take ten times as long.
        """
        x = samples[-self.ar_order - max(self.spans) :]

        def power_at(n):
            error = x[n] + dot(base, x[n - self.ar_order : n])
            return error * error + POWER_FLOOR

        powers = [power_at(n) for n in range(self.ar_order, len(x))]
        for log_gain_n, drawn_n in zip(log_gain, drawn):
            log_r = [math.log(sum(powers[-span:]) / span) / 2 for span in self.spans]
            log_scale = min(max(log_gain_n + dot(e, log_r), LOG_SCALE[0]), LOG_SCALE[1])
            x.append(math.exp(log_scale) * drawn_n - dot(a, x[-self.ar_order :]))
            powers.append(power_at(len(x) - 1))
        return x[-self.block :]


def dot(one, other):
    return sum(map(operator.mul, one, other))


def student_log_density(z, nu):
    """log of Student's density of z (., n), summed over n, for nu (., 1) degrees of freedom."""
    constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) + nu / 2 * nu.log()
    constant = z.shape[-1] * (constant - 0.5 * math.log(math.pi))
    tails = torch.addcmul(nu, z, z).log().sum(-1, keepdim=True)
    return (constant - (nu + 1) / 2 * tails).squeeze(-1)


def student(uniform, other, nu):
    """Student's t of two uniform numbers, as Box and Muller's of nu degrees (Bailey 1994)."""
    radius_squared = nu * torch.expm1(-2 / nu * torch.log1p(-uniform))
    return radius_squared.sqrt() * torch.cos(2 * math.pi * other)


def step_up(reflections):
    """The filter (a_P, ..., a_1), as samples lie, of reflection coefficients (., P).

    With all of them within 1 the poles of 1 / (1 + sum_i a_i z^-i) lie inside the unit circle.
    """
    # The axis that grows goes first: its parts are then contiguous.
    return StepUp.apply(reflections.movedim(-1, 0).contiguous()).movedim(0, -1)


class StepUp(torch.autograd.Function):
    """Levinson's recursion over the first axis, with its gradient.

    Autograd, which does not keep the axis first, takes more than twice as long.
    """

    @staticmethod
    def forward(ctx, reflections):
        a = reflections[:0]
        shorter = []
        for k in reflections.unsqueeze(1):
            if ctx.needs_input_grad[0]:
                shorter.append(a)
            a = torch.cat((k, torch.addcmul(a, k, a.flip(0))))
        ctx.save_for_backward(reflections, *shorter)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        reflections, *shorter = ctx.saved_tensors
        d = d.contiguous()
        d_reflections = torch.empty_like(reflections)
        for i in reversed(range(len(reflections))):
            d_k, d_others = d[0], d[1:]
            mirrored = d_others.flip(0)
            d_reflections[i] = d_k + (mirrored * shorter[i]).sum(0)
            d = torch.addcmul(d_others, reflections[i], mirrored)
        return d_reflections


def weighted_sum(weights, past):
    """Sums over the last axis of past (T, B, 1, 1, blocks, n, P), by (T, B, K, J, blocks, P)."""
    return torch.einsum("tbkjip, tbxyinp -> tbkjin", weights, past)


# ---- VRNN ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """What a model says of T frames of B sequences with K particles each. Nats, per frame."""

    nll_TBK: torch.Tensor  # -log p(x_t | z_<=t, x_<t)
    kl_TBK: torch.Tensor  # KL(q(z_t | x_<=t, z_<t) || p(z_t | x_<t, z_<t)), analytic
    log_w_TBK: torch.Tensor  # log p(x_t | z_<=t, x_<t) + log p(z_t | .) - log q(z_t | .)
    q_mean: torch.Tensor  # (T, B*K, Z)
    q_sigma: torch.Tensor
    prior_mean: torch.Tensor
    prior_sigma: torch.Tensor
    x_mean: torch.Tensor  # (T, B*K, X); with ar_order > 0 see AdaptiveLikelihood
    x_sigma: torch.Tensor
    state: tuple  # after the last frame: h and c, (B*K, R) each, and what the likelihood remembers
    phi_x: torch.Tensor  # of x, (T, B, .), for DReG


class Linear(nn.Linear):
    """nn.Linear in the precision of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # autograd's own functions take several times as long to call
        times = Product.apply if torch.is_grad_enabled() else product
        return times(x, self.weight.to(x.dtype), bias)


class Head(Linear):
    """The last layer of a network, in the precision of its own parameters."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def relu_layers(*sizes):
    """A Linear and a ReLU for each pair of neighbouring sizes."""
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [Linear(fan_in, fan_out), nn.ReLU()]
    return layers


def lstm_cell(gates, c):
    """h and c after one LSTM step, from pre-activations (rows, 4R) in the published order."""
    candidate, i, forget, o = gates.chunk(4, dim=-1)
    c = forget.sigmoid() * c + i.sigmoid() * candidate.tanh()
    return o.sigmoid() * c.tanh(), c


# Signs of the weights of a unit alone, and of two that mirror each other.
ONE = torch.tensor([1.0])
PAIR = torch.tensor([1.0, -1.0])


def mirrored(rows, columns, out_signs, in_signs):
    """An orthogonal map, once for each sign of its outputs and inputs, (rows, columns)."""
    block_rows = math.ceil(rows / len(out_signs))
    block_columns = math.ceil(columns / len(in_signs))
    block = nn.init.orthogonal_(torch.empty(block_rows, block_columns))
    block *= math.sqrt(max(1, block_rows / max(1, block_columns)))
    return torch.kron(torch.outer(out_signs, in_signs), block)[:rows, :columns]


class VRNN(nn.Module):
    """Variational RNN (Chung et al. 2015, arXiv 1506.02216, equations 5-11), with Gaussian z.

    Every network has four ReLU layers before its last one. A first layer that sees two inputs is
    the sum of two products, so that the one with phi_x(x_t) can run before the recurrence. With
    z_dim = 0 what is left is an LSTM, whose log p(x) is exact. With ar_order = 0 p_x is of the
    class Likelihood; with more it is an AdaptiveLikelihood of that many components.

    A subclass may replace any network, and q_z, p_z, p_x, into_lstm or lstm. p_z and p_x are given
    all frames at once, (T, B*K, .), or one, (B*K, .). Where q_z, into_lstm, lstm or a network in
    them is not as here, they are called frame by frame, and autograd finds the gradient.
    tests/plain.py is the same model in 50 lines, slowly.
    """

    Likelihood = FrameLikelihood

    def __init__(
        self,
        x_dim,
        z_dim,
        rnn_dim,
        q_z_dim,
        p_z_dim,
        p_x_dim,
        x2s_dim,
        z2s_dim,
        ar_order=0,
        components=8,
    ):
        super().__init__()
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.rnn_dim = rnn_dim
        if ar_order and self.Likelihood is not FrameLikelihood:
            raise UserError(
                "--ar_order has a likelihood of its own; give --ar_order=0 beside yours"
            )
        self.likelihood = (
            AdaptiveLikelihood(x_dim, ar_order, components) if ar_order else self.Likelihood(x_dim)
        )
        self.bf16 = False  # products in bfloat16, except for those of the heads
        self.phi_x = nn.Sequential(*relu_layers(x_dim, x2s_dim, x2s_dim, x2s_dim, x2s_dim))
        if z_dim:
            self.phi_z = nn.Sequential(*relu_layers(z_dim, z2s_dim, z2s_dim, z2s_dim, z2s_dim))
            self.posterior_x = Linear(x2s_dim, q_z_dim)
            self.posterior_h = Linear(rnn_dim, q_z_dim, bias=False)
            layers = relu_layers(q_z_dim, q_z_dim, q_z_dim, q_z_dim)
            self.posterior = nn.Sequential(nn.ReLU(), *layers, Head(q_z_dim, 2 * z_dim))
            layers = relu_layers(rnn_dim, p_z_dim, p_z_dim, p_z_dim, p_z_dim)
            self.prior = nn.Sequential(*layers, Head(p_z_dim, 2 * z_dim))
            self.decoder_z = Linear(z2s_dim, p_x_dim)
        self.decoder_h = Linear(rnn_dim, p_x_dim, bias=not z_dim)
        layers = relu_layers(p_x_dim, p_x_dim, p_x_dim, p_x_dim)
        self.decoder = nn.Sequential(nn.ReLU(), *layers, Head(p_x_dim, self.likelihood.units))
        self.lstm_x = Linear(x2s_dim, 4 * rnn_dim)
        if z_dim:
            self.lstm_z = Linear(z2s_dim, 4 * rnn_dim, bias=False)
        self.lstm_h = Linear(rnn_dim, 4 * rnn_dim, bias=False)
        self.initialise()

    def q_z(self, phi_x, h):
        """Mean and sigma of q(z_t | x_<=t, z_<t), equation 9.

        phi_x: (., B, .) of x_t; h: (., B*K, R), h_{t-1}.
        """
        from_x = for_particles(self.posterior_x(phi_x), h)
        return mean_and_sigma(self.posterior(from_x + self.posterior_h(h.to(phi_x.dtype))))

    def p_z(self, h):
        """Mean and sigma of p(z_t | x_<t, z_<t), equation 5, from h_{t-1}."""
        return mean_and_sigma(self.prior(h))

    def p_x(self, phi_z, h):
        """Parameters of p(x_t | z_<=t, x_<t), equation 6. phi_z: of z_t, None where z_dim is 0."""
        units = self.decoder_h(h)
        if phi_z is not None:
            units = self.decoder_z(phi_z) + units
        return self.likelihood.parameters(self.decoder(units))

    def into_lstm(self, phi_x, phi_z, h):
        """What x_t and z_t add to the gates of the LSTM of h's rows, (., B*K, 4R)."""
        gates = for_particles(self.lstm_x(phi_x), h)
        return gates if phi_z is None else gates + self.lstm_z(phi_z)

    def lstm(self, from_input, h, c):
        """h_t and c_t from what x_t and z_t add to the gates, h_{t-1} and c_{t-1}: equation 7."""
        return lstm_cell(from_input + self.lstm_h(h.to(from_input.dtype)), c)

    def forward(self, x_TBX, state=None, noise=None, k=1, ancestors=None):
        """Sample z from the posterior along x_TBX and score both; returns a Rollout.

        state: as returned, or zero_state(B*k) if None; what it remembers of x must be the same in
        the k rows of a sequence. noise: standard normal (T, B*k, Z), drawn if None. ancestors:
        (T, B*k), the row whose state each row goes on with after a frame, of the same sequence;
        its own if None. The k particles of a sequence share phi_x(x_t).
        """
        h, c, *memory = self.zero_state(x_TBX.shape[1] * k) if state is None else state
        if noise is None:
            noise = torch.randn(len(x_TBX), len(h), self.z_dim, dtype=h.dtype, device=h.device)
        phi_x = self.phi_x(x_TBX.bfloat16() if self.bf16 else x_TBX)
        if self.z_dim:
            recurrence = fast_recurrence if has_fast_recurrence(self) else type(self).recurrence
            h_before, phi_z, q_z, h, c = recurrence(self, phi_x, noise, h, c, k, ancestors)
            p_z = self.p_z(h_before)
        else:
            phi_z = None
            q_z = p_z = noise, noise  # of no width, so that all of its densities are 1
            h_before, h, c = self.along(self.into_lstm(phi_x, None, h), h, c)
        p_x = self.p_x(phi_z, h_before)

        log_px, memory = self.likelihood.log_density(x_TBX, p_x, memory, k)
        q_mean, q_sigma = q_z
        log_pz = gaussian_log_density(q_mean + q_sigma * noise, *p_z)
        log_qz = (-0.5 * noise**2 - q_sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return Rollout(
            nll_TBK=-log_px,
            kl_TBK=gaussian_kl(*q_z, *p_z).view_as(log_px),
            log_w_TBK=log_px + (log_pz - log_qz).view_as(log_px),
            q_mean=q_mean,
            q_sigma=q_sigma,
            prior_mean=p_z[0],
            prior_sigma=p_z[1],
            x_mean=p_x[0],
            x_sigma=p_x[1],
            state=(h, c, *memory),
            phi_x=phi_x,
        )

    def recurrence(self, phi_x, noise, h, c, k, ancestors):
        """The part of `forward` that must run frame by frame, in the order of the equations.

        Returns h_{t-1} and phi_z(z_t), (T, B*k, .), mean and sigma of q_z, and h, c at the end.
        `fast_recurrence` is the same, written out.
        """
        frames = []
        for t in range(len(phi_x)):
            q_mean, q_sigma = self.q_z(phi_x[t], h)
            phi_z = self.phi_z((q_mean + q_sigma * noise[t]).to(phi_x.dtype))
            frames.append((h.to(phi_x.dtype), phi_z, q_mean, q_sigma))
            h, c = self.lstm(self.into_lstm(phi_x[t], phi_z, h), h, c)
            if ancestors is not None:
                h, c = h[ancestors[t]], c[ancestors[t]]
        h_before, phi_z, q_mean, q_sigma = map(torch.stack, zip(*frames))
        return h_before, phi_z, (q_mean, q_sigma), h, c

    def along(self, from_input, h, c):
        """h_{t-1} of each frame, (T, rows, R), and h, c after the last; from_input: of lstm."""
        h_before = []
        for from_input_t in from_input:
            h_before.append(h)
            h, c = self.lstm(from_input_t, h, c)
        return torch.stack(h_before).to(from_input.dtype), h, c

    @torch.no_grad()
    def generate(self, frames, batch, generator=None, state=None, resynthesised=None):
        """Sample x (frames, batch, X) from the model itself: z_t from the prior, x_t from p_x.

        state: that after what is to be continued, of `batch` rows; zero_state(batch) if None.
        resynthesised: speech of that shape: z_t comes from its posterior, h runs along it, and the
        filter along what is drawn.
        """
        h, c, *memory = self.zero_state(batch) if state is None else state
        phi_z = None
        x = []
        for t in range(frames):
            if resynthesised is not None:
                phi_x = self.phi_x(resynthesised[t])
            if self.z_dim:
                of_z = self.p_z(h) if resynthesised is None else self.q_z(phi_x, h)
                phi_z = self.phi_z(sample_gaussian(*of_z, generator))
            x_t, memory = self.likelihood.sample(self.p_x(phi_z, h), memory, generator)
            if resynthesised is None:
                phi_x = self.phi_x(x_t)
            h, c = self.lstm(self.into_lstm(phi_x, phi_z, h), h, c)
            x.append(x_t)
        return torch.stack(x)

    def zero_state(self, rows):
        """The state at a start: zeros."""
        zeros = self.lstm_h.weight.new_zeros(rows, self.rnn_dim)
        return zeros, zeros, *self.likelihood.zero_memory(zeros, rows)

    def existing(self, *names):
        """The named networks and layers that exist: without z some do not."""
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @torch.no_grad()
    def initialise(self):
        """Uniform weights, zero biases, sigma biases 0.6, orthogonal recurrence.

        As published, but for one thing: published weights all lie within 0.08, which suits 600
        inputs. At 0.08 narrow stacks of four layers pass no signal and z stays unused, so that here
        the fewer the inputs, the wider the weights.
        """
        for p in self.parameters():
            if p.dim() == 2:
                bound = 0.08 * math.sqrt(600 / p.shape[-1])
                p.uniform_(-bound, bound)
            else:
                p.zero_()
        for network in self.existing("posterior", "prior"):
            network[-1].bias.chunk(2)[1].fill_(0.6)
        self.likelihood.initialise(self.decoder[-1])
        for block in self.lstm_h.weight.chunk(4):
            nn.init.orthogonal_(block)

    @torch.no_grad()
    def mirror(self):
        """Initialise such that z is of use from the first update on.

        Every stack of ReLU layers starts as an orthogonal linear map: units come in pairs of
        opposite weights, and relu(a) - relu(-a) = a (looks-linear initialisation, Balduzzi et al.
        2017, arXiv 1702.08591); independent weights in the sixteen layers from x to its
        reconstruction map all inputs to nearly the same output. A narrow posterior lets z tell
        more of x than of noise. Only the first latent variables begin like this, as many as the
        likelihood calls active; the others begin as the prior, and are hardly heard.
        """
        stacks = self.existing("phi_x", "phi_z", "posterior", "prior", "decoder")
        hidden = [layer for stack in stacks for layer in stack if type(layer) is Linear]
        hidden += self.existing("posterior_x", "decoder_z", "posterior_h", "decoder_h")
        heads = [stack[-1] for stack in stacks if isinstance(stack[-1], Head)]
        before_no_relu = self.existing("lstm_x", "lstm_z") + heads
        after_no_relu = self.existing("posterior_h", "decoder_h") + [stack[0] for stack in stacks]
        for layer in hidden + before_no_relu:
            out_signs = ONE if layer in before_no_relu else PAIR
            in_signs = ONE if layer in after_no_relu else PAIR
            weight = mirrored(*layer.weight.shape, out_signs, in_signs)
            layer.weight.copy_((0.3 if layer in heads else 1.0) * weight)
        active = self.likelihood.active
        if self.z_dim > active:
            # The active ones begin as if there were no others.
            phi_z = self.phi_z[0]
            phi_z.weight[:, :active] = mirrored(phi_z.out_features, active, PAIR, ONE)
            for head in (self.posterior[-1], self.prior[-1]):
                weight = 0.3 * mirrored(2 * active, head.in_features, ONE, PAIR)
                of_both = head.weight.unflatten(0, (2, self.z_dim))  # mean and sigma
                of_both[:, :active] = weight.unflatten(0, (2, active))
        # sigmas of 0.2 for the posterior, 1.0 for the prior
        for network, bias in zip(self.existing("posterior", "prior"), (-1.5, 0.6)):
            network[-1].weight.chunk(2)[1].mul_(0.1)
            network[-1].bias.chunk(2)[1].fill_(bias)
        if self.z_dim > active:
            head = self.posterior[-1]
            head.bias[self.z_dim + active :].fill_(0.6)
            head.weight[active : self.z_dim].mul_(0.1)
            self.phi_z[0].weight[:, active:].mul_(0.1)
        self.likelihood.initialise(self.decoder[-1], sigma_gain=0.1)

    @torch.no_grad()
    def constrain_weights(self, max_norm):
        """Rescale each row of each weight matrix, but for lstm_h's, to norm at most max_norm.

        As published, where they are columns of W.
        """
        layers = [layer for name, layer in self.named_modules() if name != "lstm_h"]
        weights = [layer.weight for layer in layers if isinstance(layer, Linear)]
        # Of all units at once: a GPU takes as long for those of one layer.
        norms = torch.cat([torch.linalg.vector_norm(weight, dim=1) for weight in weights])
        # But for rounding: to constrain twice is to constrain once.
        is_longer = norms > max_norm * (1 + 1e-6)
        shares = torch.where(is_longer, max_norm / norms, 1.0)
        for weight, share in zip(weights, shares.split([len(weight) for weight in weights])):
            weight.mul_(share.unsqueeze(1))


def for_particles(from_x, h):
    """Each sequence's row of from_x, (., B, .), repeated for its particles: as many rows as h."""
    return from_x.repeat_interleave(h.shape[-2] // from_x.shape[-2], dim=-2)


# Hyperparameters that are arguments of a VRNN. A new one is an argument of VRNN.__init__ and a field
# of the three scripts; where 0 makes sense, also in LEAST.
SIZES = tuple(inspect.signature(VRNN).parameters)


def vrnn_of(h):
    """The VRNN of hyperparameters, with the parameters that their seed gives."""
    torch.manual_seed(h.seed)
    return VRNN(**{size: getattr(h, size) for size in SIZES if hasattr(h, size)})


# ---- bounds --------------------------------------------------------------------------------------

EVAL_ROWS = 1280  # particles at once in an evaluation


def importance_weighted(log_w_BK):
    """log of the mean weight of K particles, (B,): Burda et al. 2015, arXiv 1509.00519, eq. 8."""
    return log_w_BK.logsumexp(dim=1) - math.log(log_w_BK.shape[1])


def effective_sample_size(log_w_BK):
    """(sum_k w_k)^2 / sum_k w_k^2 of each sequence, (B,): 1 where one has all weight, up to K."""
    return (2 * log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1)).exp()


@torch.no_grad()
def estimate_bounds(model, x_TBX, ks, generator, max_rows=EVAL_ROWS):
    """Lower bounds on log p(x) of each sequence from a zero state, by K = max(ks) particles.

    model: anything with `z_dim` and model(x_TBX, state, noise, k) -> Rollout; no more than
    max_rows of its particles are there at once. Returns {name: (B,) float64, in nats per
    sequence}: `elbo` (analytic KL) and its `kl`, over all particles; `elbo_K`, by sampled
    log-weights, and their deviation `log_w_std`; for k in ks `iwae_k`, averaged over K // k
    disjoint groups, and their effective sample size `ess_iwae_k`.
    """
    frames, batch = x_TBX.shape[:2]
    particles = max(ks)
    drawn = particles if model.z_dim else 1  # without z all particles are the same

    # In parts that fit into memory, each with sums over its frames alone.
    at_once = max(1, max_rows // batch)
    rollouts = []
    for first in range(0, drawn, at_once):
        k = min(at_once, drawn - first)
        noise = drawn_like(x_TBX, torch.randn, generator, frames, batch * k, model.z_dim)
        rollout = model(x_TBX, None, noise, k)
        by_frame = (rollout.nll_TBK, rollout.kl_TBK, rollout.log_w_TBK)
        rollouts.append([part.double().sum(0) for part in by_frame])
    nll_BK, kl_BK, log_w_BK = (
        torch.cat(parts, dim=1).expand(-1, particles) for parts in zip(*rollouts)
    )

    # Tighter from one to the next, but for kl and log_w_std, which are no bounds.
    bounds = {
        "elbo": (-nll_BK - kl_BK).mean(1),
        "kl": kl_BK.mean(1),
        f"elbo_{particles}": log_w_BK.mean(1),
        "log_w_std": log_w_BK.std(1, correction=0),
    }
    for k in sorted(ks):
        groups = log_w_BK[:, : particles // k * k].reshape(-1, k)
        bounds[f"iwae_{k}"] = importance_weighted(groups).view(batch, -1).mean(1)
        bounds[f"ess_iwae_{k}"] = effective_sample_size(groups).view(batch, -1).mean(1)
    return bounds


def drawn_like(x, distribution, generator, *shape):
    """Noise of a shape, with the precision and on the device of x."""
    return distribution(*shape, generator=generator, dtype=x.dtype, device=x.device)


@dataclasses.dataclass
class Filtering:
    """What a particle filter finds."""

    log_likelihood_TB: torch.Tensor  # log of an unbiased estimate of p(x_1..x_t), in nats
    ess_TB: torch.Tensor  # effective sample size of the particles, before resampling
    resampled_TB: torch.Tensor  # whether they were resampled after the frame
    ancestors: torch.Tensor  # (T, B*K), the row that each row goes on from: of VRNN.forward
    state: tuple  # after the last frame


def particle_filter(model, x_TBX, state, noise, uniform_TB, k, resample_last=False):
    """Sample z of k particles frame by frame; resample them where few of them carry the weight.

    They are resampled whenever their effective sample size falls under k / 2. The
    log-mean-weights at each resampling and after the last frame add up to the bound of Maddison et
    al. 2017 (FIVO, arXiv 1705.09279, algorithm 1). Gradients flow through weights and states, not
    through the choice of ancestors.

    model: as in estimate_bounds; x_TBX and state: as in VRNN.forward. noise: T standard normal
    tensors (B*k, Z); uniform_TB: on [0, 1), for the resampling. resample_last: also at the last
    frame, whatever the weights: whoever carries the states on needs it, since the weights are not
    carried. Returns a Filtering.
    """
    batch = x_TBX.shape[1]
    own_BK = torch.arange(batch * k, device=x_TBX.device).view(batch, k)
    log_w_BK = torch.zeros(1, device=x_TBX.device)  # since the last resampling
    gathered_B = torch.zeros(1, device=x_TBX.device)  # log-mean-weights up to it
    frames = []
    for t, noise_t in enumerate(noise):
        rollout = model(x_TBX[t : t + 1], state, noise_t.unsqueeze(0), k)
        log_w_BK = log_w_BK + rollout.log_w_TBK[0]
        log_likelihood_B = gathered_B + importance_weighted(log_w_BK)

        # Who goes on from whom: from itself, or from whom resampling has drawn.
        ess_B = effective_sample_size(log_w_BK.detach())
        must_resample = resample_last and t == len(x_TBX) - 1
        resampled_B = (ess_B < k / 2) | must_resample
        drawn_BK = own_BK[:, :1] + systematic(log_w_BK.detach(), uniform_TB[t])
        ancestors = torch.where(resampled_B.unsqueeze(1), drawn_BK, own_BK).flatten()

        # Resampled particles weigh the same again; what they weighed is gathered.
        gathered_B = torch.where(resampled_B, log_likelihood_B, gathered_B)
        log_w_BK = torch.where(resampled_B.unsqueeze(1), 0.0, log_w_BK)
        state = tuple(part[ancestors] for part in rollout.state)
        frames.append((log_likelihood_B, ess_B, resampled_B, ancestors))
    return Filtering(*map(torch.stack, zip(*frames)), state=state)


def systematic(log_w_BK, uniform_B):
    """k numbers of particles for each sequence, (B, k), drawn by their weights.

    Systematic resampling, from one uniform number a sequence: particle j is drawn k w_j / sum w
    times, rounded down or up.
    """
    k = log_w_BK.shape[1]
    points_BK = (torch.arange(k, device=log_w_BK.device) + uniform_B.unsqueeze(1)) / k
    passed_BK = log_w_BK.softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(passed_BK, points_BK).clamp(max=k - 1)


@torch.no_grad()
def estimate_smc(model, x_TBX, k, generator, max_rows=EVAL_ROWS):
    """The particle filter's log_likelihood_TB from a zero state, and ess_TB, in float64.

    The mean of the former is a bound. model: as in estimate_bounds; no more than max_rows of its
    particles are there at once, or k.
    """
    # Without z all particles are copies of one, which is run.
    copies = 1 if model.z_dim else k
    k = k if model.z_dim else 1
    filterings = []
    for x in x_TBX.split(max(1, max_rows // k), dim=1):
        frames, batch = x.shape[:2]
        uniform_TB = drawn_like(x, torch.rand, generator, frames, batch)
        noise = (
            drawn_like(x, torch.randn, generator, batch * k, model.z_dim) for _ in range(frames)
        )
        filterings.append(particle_filter(model, x, None, noise, uniform_TB, k))
    estimate_TB = torch.cat([found.log_likelihood_TB for found in filterings], dim=1)
    ess_TB = torch.cat([found.ess_TB for found in filterings], dim=1)
    return estimate_TB.double(), copies * ess_TB.double()


# ---- evaluation ----------------------------------------------------------------------------------

EVAL_BATCH = 128  # windows; fixed, because the evaluation noise is drawn batch by batch
EVAL_SEED = 2015  # not the training seed: every run is evaluated with the same noise
BOUNDS = ("elbo", "iwae", "smc")  # so begin the names of bounds; plot_recon.BOUNDS has their words

# What a user may choose anew beside --evaluate; all else is the checkpoint's.
OF_EVALUATION = ("data", "out_dir", "device", "seq_frames", "eval_k", "eval_recordings")


def evaluate_checkpoint(h, model=None):
    """--evaluate: the bounds of a checkpoint on the test split of h.data; nothing is trained.

    model: of the class and the sizes of the checkpoint h.evaluate, by default the VRNN of h.
    Samples are normalised as in the training of the checkpoint. Raises UserError.
    """
    start_processes()
    folder = check_folder(h)
    device = choose_device(h.device)
    corpus = open_corpus(h.data)
    model = (vrnn_of(h) if model is None else model).to(device)
    checkpoint = read_checkpoint(h.evaluate, "--evaluate")
    load_parameters(model, checkpoint, h.evaluate, "--evaluate")
    chosen = {name: value for name, value in config_of(h).items() if name in OF_EVALUATION}
    config = {**config_of(h), **checkpoint["config"], **chosen}
    claim_folder(folder, config)
    evaluate(h, model, checkpoint, corpus, folder, config, h.evaluate)


def evaluate(h, model, checkpoint, corpus, folder, config, path):
    """Write eval.json, windows.csv and samples/ of a model with the parameters of a checkpoint."""
    model.eval()
    corpus.mean, corpus.std = checkpoint["mean"], checkpoint["std"]
    particles = max(h.eval_k)
    by_window = window_bounds(model, corpus, corpus.test, h.eval_k, h.seq_frames, smc=particles)
    if is_first():
        result = dict(
            script=config["script"],
            name=config["name"],
            checkpoint=path,
            data=describe_corpus(corpus),
            split="test",
            update=checkpoint["update"],
            windows=len(by_window["elbo"]),
            frames=h.seq_frames,
            bounds=summarise(by_window, h.seq_frames, model.x_dim, corpus),
            yardsticks={
                name: yardstick(bits, model.x_dim, corpus.std)
                for name, bits in corpus.yardsticks.get(h.seq_frames * model.x_dim, {}).items()
            },
        )
        if h.eval_recordings:
            result["whole_recordings"] = evaluate_recordings(
                model, corpus, corpus.test, particles, h.eval_recordings
            )
        write_windows(by_window, h.seq_frames, folder / "windows.csv")
        write_durably(folder / EVAL, json.dumps(result, indent=1) + "\n")
        print(f"{path}, update {result['update']:,}", *evaluation_table(result), sep="\n")
        if hasattr(model, "generate"):
            write_samples(model, corpus, corpus.test, folder / "samples")
        print(folder / EVAL, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def bits_per_sample(nats_per_frame, x_dim, std):
    """Upper bound on the bits per 16-bit sample of a code made from the model.

    std: that of the data which the model was trained on, in LSB.
    """
    return (math.log(std) - nats_per_frame / x_dim) / math.log(2)


def frames_at(split, starts, frames, x_dim, corpus, generator):
    """Dequantised, normalised audio from each start on, (frames, len(starts), X)."""
    device = generator.device
    pcm = torch.from_numpy(split.read(starts, frames * x_dim)).to(device)
    pcm = pcm.view(len(pcm), frames, x_dim).transpose(0, 1)
    return normalise(pcm, corpus, torch.rand(pcm.shape, generator=generator, device=device))


def window_bounds(model, corpus, split, ks, seq_frames, at_most=math.inf, smc=0):
    """The bounds of estimate_bounds on each window of a split, {name: (windows,)}.

    With smc > 0 particles also `smc_k` and `ess_smc_k` (mean over frames). at_most: of the
    windows, evenly spread. All models of a size get the same noise, in any number of processes,
    which share the batches.
    """
    device = next(model.parameters()).device
    starts = piece_starts(split, seq_frames * model.x_dim, at_most)
    rank, processes = job()
    mine = {}
    for index in range(rank, math.ceil(len(starts) / EVAL_BATCH), processes):
        generator = torch.Generator(device).manual_seed(EVAL_SEED + index)
        chosen = starts[index * EVAL_BATCH : (index + 1) * EVAL_BATCH]
        x_TBX = frames_at(split, chosen, seq_frames, model.x_dim, corpus, generator)
        bounds = estimate_bounds(model, x_TBX, ks, generator)
        if smc:
            estimate_TB, ess_TB = estimate_smc(model, x_TBX, smc, generator)
            bounds[f"smc_{smc}"] = estimate_TB[-1]
            bounds[f"ess_smc_{smc}"] = ess_TB.mean(0)
        mine[index] = {name: bound.cpu() for name, bound in bounds.items()}
    batches = {}
    for part in gather(mine):
        batches |= part
    in_order = [batches[index] for index in sorted(batches)]
    return {name: torch.cat([bounds[name] for bounds in in_order]) for name in in_order[0]}


def summarise(by_window, seq_frames, x_dim, corpus):
    """Means over windows: {bound: {nats_per_frame, stderr, bits_per_sample}}.

    stderr is over windows. What is no bound has no bits (kl and log_w_std), or {mean, stderr}
    alone (effective sample sizes, in particles).
    """
    result = {}
    for name, values in by_window.items():
        mean = values.mean().item()
        stderr = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
        if name.startswith("ess"):
            result[name] = dict(mean=mean, stderr=stderr)
            continue
        result[name] = dict(
            nats_per_frame=mean / seq_frames,
            stderr=None if stderr is None else stderr / seq_frames,
        )
        if name.startswith(BOUNDS):
            bits = bits_per_sample(mean / seq_frames, x_dim, corpus.std)
            result[name]["bits_per_sample"] = bits
    return result


def yardstick(bits, x_dim, std):
    """What is to be beaten, in the form of `summarise`, from its bits per sample."""
    nats = x_dim * (math.log(std) - bits * math.log(2))
    return dict(nats_per_frame=nats, stderr=None, bits_per_sample=bits)


def evaluate_recordings(model, corpus, split, k, at_most):
    """smc_k on whole recordings from a zero state, at_most of them evenly spread, and yardsticks.

    The mean over all frames; stderr over recordings, of the ratio of their nats to their frames.
    """
    lengths = np.diff(split.offsets) // model.x_dim
    # Of those that prepare_blizzard.py has measured, where it has measured any.
    measured = [i for i in corpus.recording_samples if lengths[i]]
    chosen = evenly_spread(np.array(measured or np.flatnonzero(lengths)), at_most)
    # Recordings of a batch are about as long, so that little of it lies after an end.
    chosen = chosen[lengths[chosen].argsort(kind="stable")]
    frames = lengths[chosen]
    generator = torch.Generator(next(model.parameters()).device).manual_seed(EVAL_SEED)
    nats = []
    # Each recording is dequantised alone, then a batch is padded to its longest.
    for batch in np.array_split(chosen, math.ceil(len(chosen) / max(1, EVAL_ROWS // k))):
        audio = []
        for i in batch:
            start = split.offsets[[i]]
            x_TBX = frames_at(split, start, lengths[i], model.x_dim, corpus, generator)
            audio.append(x_TBX[:, 0])
        estimate_TB, _ = estimate_smc(model, nn.utils.rnn.pad_sequence(audio), k, generator)
        nats += [estimate_TB[lengths[i] - 1, b].item() for b, i in enumerate(batch)]
    # The mean is a ratio of two sums, and so is its standard error.
    mean = sum(nats) / frames.sum()
    deviations = (nats - mean * frames) / frames.mean()
    stderr = deviations.std(ddof=1) / len(nats) ** 0.5 if len(nats) > 1 else None
    found = dict(
        recordings=len(nats),
        frames=int(frames.sum()),
        nats_per_frame=mean,
        stderr=stderr,
        bits_per_sample=bits_per_sample(mean, model.x_dim, corpus.std),
    )
    result = {f"smc_{k}": found}
    for name, bits in corpus.recording_bits.items():
        bits_of_all = sum(bits[i] for i in chosen)
        if math.isfinite(bits_of_all):
            samples = sum(corpus.recording_samples[i] for i in chosen)
            result[name] = yardstick(bits_of_all / samples, model.x_dim, corpus.std)
    return result


def describe_corpus(corpus):
    """What logs and evaluations say of their data."""
    return dict(
        file=printable(Path(corpus.path).name),
        created_by=corpus.created_by,
        mean=corpus.mean,
        std=corpus.std,
        samples={split: len(getattr(corpus, split).audio) for split in SPLITS},
    )


def write_windows(by_window, seq_frames, path):
    """windows.csv: a line for each test window, in order, of its bounds in nats per frame."""
    names = [name for name in by_window if name.startswith(("kl", *BOUNDS))]
    rows = torch.stack([by_window[name] / seq_frames for name in names], dim=1)
    with durably(path) as partial:
        np.savetxt(partial, rows, "%.3f", ",", header=",".join(names), comments="")


def evaluation_table(result):
    """Yield what is printed of eval.json, a line for each bound."""
    rows = result["bounds"] | result["yardsticks"]
    for name, found in result.get("whole_recordings", {}).items():
        rows[f"{name}, whole recordings"] = found
    for name, found in rows.items():
        line = f"test {name:20} {found.get('nats_per_frame', found.get('mean')):8.2f}"
        if found["stderr"] is not None:  # one window has none
            line += f" +- {found['stderr']:.2f}"
        if "bits_per_sample" in found:
            line += f" nats/frame, {found['bits_per_sample']:.3f} bits/sample"
        yield line
    if not result["yardsticks"]:
        yield "the data file holds no yardsticks, such as FLAC; prepare_blizzard.py measures them"


@torch.no_grad()
def write_samples(model, corpus, split, folder, frames=400, given=80, count=2):
    """Speech as .wav files, as loud as it comes, at most `frames` long.

    real_N are beginnings of the longest recordings, sample_N are generated. Of a VRNN there are
    also resynthesised_N, and continued_N, generated after the first `given` frames of real_N.
    """
    folder.mkdir(exist_ok=True)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(EVAL_SEED)
    lengths = np.diff(split.offsets) // model.x_dim
    longest = lengths.argsort(kind="stable")[::-1]
    longest = longest[: min(count, np.count_nonzero(lengths))]
    real_frames = min(frames, lengths[longest[-1]])
    real = frames_at(split, split.offsets[longest], real_frames, model.x_dim, corpus, generator)
    speech = dict(real=real, sample=model.generate(frames, count, generator))
    if isinstance(model, VRNN):
        heard = real[:given]
        noise = drawn_like(heard, torch.randn, generator, *heard.shape[:2], model.z_dim)
        after = model(heard, noise=noise).state
        goes_on = model.generate(frames - len(heard), len(longest), generator, after)
        speech["continued"] = torch.cat((heard, goes_on))
        resynthesised = model.generate(len(real), len(longest), generator, resynthesised=real)
        speech["resynthesised"] = resynthesised
    for kind, x_TBX in speech.items():
        for i, x_TX in enumerate(x_TBX.unbind(1)):
            samples = x_TX.double().flatten() * corpus.std + corpus.mean
            path = os.fsencode(folder / f"{kind}_{i}.wav")
            soundfile.write(path, to_int16(samples.cpu().numpy()), SAMPLE_RATE)


# ---- training ------------------------------------------------------------------------------------

MAX_SKIPPED = 10  # updates in a row


class Training:
    """A model in training on excerpts of h.data, and all that a resumed run needs to go on.

    particles: rows of the state for each sequence. model: any module with the interface of VRNN
    (x_dim, z_dim, zero_state, the call; generate if it can), by default the VRNN of h. name: of
    the objective in tables and pictures, by default the script's. monitor_smc: to log smc_k.
    """

    def __init__(self, h, particles, model=None, name=None, monitor_smc=False):
        self.h = h
        self.particles = particles
        self.monitor_smc = monitor_smc
        self.processes = start_processes()
        if h.evaluate:
            raise UserError(
                "--evaluate trains nothing, but this script does; let it begin with 'if "
                "h.evaluate: return common.evaluate_checkpoint(h)'"
            )
        if h.batch_size % self.processes:
            raise UserError(
                f"--batch_size={h.batch_size} does not divide among {self.processes} processes; "
                "start as many as do"
            )
        self.folder = check_folder(h)
        self.device = choose_device(h.device)
        ensure_demo_data(h.data)
        self.corpus = open_corpus(h.data)
        self.create_model(vrnn_of(h) if model is None else model)
        self.create_state()
        self.config = config_of(h, name) | dict(model_class=type(self.model).__name__)
        self.log = [self.header()]
        self.open_excerpts()
        if h.resume:
            self.restore(read_checkpoint(self.folder / LAST, "--resume", STATE))
            gather("restored")  # before any of them writes
        claim_folder(self.folder, self.config, self.log)
        if is_first():
            parameters = sum(p.numel() for p in self.model.parameters())
            print(
                f"{self.config['name']}: {parameters / 1e6:.2f} M parameters on {self.processes} x "
                f"{describe(self.device)}, about {self.memory_in_gb():.1f} GB of memory each; "
                f"{self.excerpts.batches_per_epoch} batches an epoch; log in {self.folder / LOG}",
                flush=True,
            )

    def create_model(self, model):
        """Put the model in the state that the hyperparameters ask for, its average beside it."""
        h = self.h
        refuse_missing_features(h, model)
        if h.mirrored_init:
            model.mirror()
        self.model = model.to(self.device)
        if h.init_from and not h.resume:
            checkpoint = read_checkpoint(h.init_from, "--init_from")
            load_parameters(model, checkpoint, h.init_from, "--init_from")
        buffers = {id(buffer): buffer for buffer in model.buffers()}
        # deepcopy takes what its memo holds for copied: buffers stay shared
        self.averaged = copy.deepcopy(model, memo=buffers).eval()
        model.bf16 = h.bf16  # evaluation keeps float32

    def create_state(self):
        """Everything besides the model that a checkpoint holds, in place on the device."""
        h = self.h
        model, device = self.model, self.device
        self.optimiser = torch.optim.Adam(
            model.parameters(),
            lr=torch.tensor(h.lr, device=device),
            fused=True,
            capturable=device.type == "cuda",
        )
        # As its first step would create it, so that it can be restored in place.
        for p in model.parameters():
            self.optimiser.state[p] = dict(
                step=torch.zeros((), device=device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
        # Of dequantisation, of the noise on x and of that for z.
        self.generator = torch.Generator(device).manual_seed(h.seed)
        self.grad_clip = torch.tensor(h.grad_clip or math.inf, device=device)
        sequences = h.batch_size // self.processes
        zero_state = model.zero_state(sequences * self.particles)
        self.state = tuple(part.clone() for part in zero_state)  # before the window
        self.next_state = tuple(part.clone() for part in zero_state)  # after it
        self.pcm = torch.zeros(h.seq_frames, sequences, h.x_dim, dtype=torch.int16, device=device)
        self.seconds = 0.0  # of training
        self.best = -math.inf  # highest bound on valid
        # The updates made are counted twice: on the host, which decides when to monitor, and on
        # the device, where an update learns its own number without the host. A CUDA graph would
        # repeat the number that the host had when it was captured.
        self.made = 0
        zeros = dict(made=0, clipped=0, skipped=0, skipped_in_a_row=0)
        zeros |= dict(loss_sum=0.0, losses=0.0, grad_norm=0.0)
        self.counts = {name: torch.tensor(zero, device=device) for name, zero in zeros.items()}

    def memory_in_gb(self):
        """Roughly what an update takes: more of it than there is would end the process wordlessly.

        Parameters with gradient, moments and average, and what each row keeps of each layer's
        output: itself, its gradient, and about as much again on the way.
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        parameters = sum(layer.weight.numel() for layer in layers)
        rows = self.h.seq_frames * len(self.state[0])
        return 4e-9 * (5 * parameters + 3 * rows * sum(layer.out_features for layer in layers))

    def header(self):
        """The first line of the log."""
        versions = dict(
            python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__
        )
        return dict(
            config=self.config,
            particles=self.particles,
            processes=self.processes,
            commit=commit(),
            device=describe(self.device),
            data=describe_corpus(self.corpus),
            versions=versions,
        )

    def open_excerpts(self):
        """The excerpts of train, and the thread that reads them ahead."""
        h = self.h
        self.excerpts = Excerpts(
            self.corpus.train, h.x_dim, h.seq_frames, h.reset_freq, h.batch_size, h.seed
        )
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.read_ahead = {}
        for held_out in (self.corpus.valid, self.corpus.test):
            # refused now, not after the training
            piece_starts(held_out, h.seq_frames * h.x_dim)

    # ---- what an update calls: nothing here may read a tensor on the host, since a CUDA graph
    # repeats the kernels alone

    def window(self):
        """The present window (T, B, X): dequantised, normalised, with noise that fades and ends."""
        h = self.h
        uniform = self.draw(torch.rand, h.batch_size, h.x_dim) if h.dequantize else None
        x_TBX = normalise(self.pcm, self.corpus, uniform)
        if h.x_noise:
            done = self.counts["made"] / h.x_noise_updates
            sigma = torch.where(done < 1, h.x_noise * 0.01**done, 0.0)
            x_TBX = x_TBX + sigma * self.draw(torch.randn, h.batch_size, h.x_dim)
        return x_TBX

    def noise(self, k, z_dim):
        """Standard normal (T, B*k, z_dim), for the posterior's samples."""
        return self.draw(torch.randn, self.h.batch_size * k, z_dim)

    def draw(self, distribution, rows, width):
        """(T, rows of this process, width).

        Drawn for all rows, so that it is the same for any number of processes.
        """
        drawn = distribution(
            self.h.seq_frames, rows, width, generator=self.generator, device=self.device
        )
        return drawn[:, my_part(rows)]

    @torch.no_grad()
    def step(self, loss, state):
        """After loss.backward(): clip the gradient, step Adam, constrain and average the weights.

        loss: nats per frame. state: after the window, to be carried on. Where loss or gradient is
        not finite, Adam does nothing, the next state is zero, and the update is counted as skipped.
        """
        loss = loss.detach().clone()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.processes > 1:
            average_over_processes([*gradients, loss])
        norm = nn.utils.get_total_norm(gradients)
        is_finite = norm.isfinite() & loss.isfinite()
        torch._foreach_mul_(gradients, (self.grad_clip * (norm + 1e-6).reciprocal()).clamp(max=1))
        self.step_adam(is_finite)
        if self.h.weight_norm:
            self.model.constrain_weights(self.h.weight_norm)
        self.average_weights()
        for carried, part in zip(self.next_state, state, strict=True):
            carried.copy_(torch.where(is_finite, part, 0.0))
        self.count(loss, norm, is_finite)

    def step_adam(self, is_finite):
        """One step of Adam, at the present learning rate, where the gradient is finite."""
        h = self.h
        if h.lr_updates:
            share = (1 - self.counts["made"] / h.lr_updates).clamp(min=0.01)
            self.optimiser.param_groups[0]["lr"].copy_(h.lr * share)
        self.optimiser.found_inf = (~is_finite).float()  # Adam then leaves everything as it is
        self.optimiser.step()
        self.optimiser.zero_grad()

    def average_weights(self):
        """Move the averaged weights on, faster at first.

        The bound by the weights of single updates jumps by several nats.
        """
        made = self.counts["made"]
        share = 1 - ((1 + made) / (10 + made)).clamp(max=self.h.ema)
        averaged = list(self.averaged.parameters())
        moves = torch._foreach_sub(list(self.model.parameters()), averaged)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(averaged, moves)

    def count(self, loss, norm, is_finite):
        """What the log says of the updates since its last line."""
        counts = self.counts
        counts["made"] += 1
        counts["clipped"] += is_finite & (norm > self.grad_clip)
        counts["skipped"] += ~is_finite
        counts["skipped_in_a_row"].add_(1).mul_(~is_finite)
        counts["loss_sum"] += torch.where(is_finite, loss, 0.0)
        counts["losses"] += is_finite
        counts["grad_norm"].copy_(norm)

    # ---- around the updates

    def captured(self, update):
        """Decorator of a script's update: on a GPU it becomes one CUDA graph.

        To launch its thousands of kernels takes longer than to run them. They are launched one by
        one where that fails, and in several processes. The graph repeats kernels alone: an update
        may not read a tensor (.item(), print, if), and it learns its number from counts["made"].
        The training's state is afterwards what it was before.
        """
        if self.device.type != "cuda" or self.processes > 1:
            return update
        before = copy.deepcopy(self.checkpoint())
        self.allow_tf32(True)
        try:
            captured = self.capture(update)
        except RuntimeError as error:
            why = first_line(error.__context__ or error)
            print(f"no CUDA graph ({why}); kernels are launched singly", flush=True)
            captured = update
            self.generator = torch.Generator(self.device)  # the capture may still hold the other
            self.optimiser.zero_grad()
        self.allow_tf32(False)
        self.restore(before)
        return captured

    def capture(self, update):
        """The function that repeats an update's kernels, after three updates to warm up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            update()
        return graph.replay

    def allow_tf32(self, is_allowed):
        """In the products of updates on a GPU, not in those of evaluation."""
        if self.device.type == "cuda":  # on a CPU to say so at all costs 4 %
            torch.set_float32_matmul_precision("high" if is_allowed else "highest")

    def updates(self):
        """Yield once for every update that is still to be made, with its window in place.

        Between them it monitors, logs and saves, and stops on Ctrl-C or SIGTERM with a state to go
        on from.
        """
        h = self.h
        bar = tqdm(
            total=h.max_updates,
            initial=self.made,
            unit=" updates",
            disable=not is_first() or None,
        )
        with stop_requests() as received, bar:
            try:
                while self.made < h.max_updates:
                    started = time.monotonic()
                    self.next_window()
                    self.allow_tf32(True)
                    yield
                    self.allow_tf32(False)
                    self.made += 1
                    is_due = self.made % h.monitor_every == 0 or self.made >= h.max_updates
                    if is_due:
                        self.counts["made"].item()  # wait for the device
                    self.seconds += time.monotonic() - started

                    # Not counted as training.
                    bar.update()
                    self.stop_if_nothing_is_learnt()
                    if is_due:
                        self.monitor()
                    signal_number = max(gather(max(received, default=0)))  # of any process
                    if signal_number:
                        self.save_and_exit(signal_number)
            except UserError:
                # Data that cannot be read, for one: keep what is learnt. A checkpoint needs all
                # processes, and the others may not have come here.
                if self.processes == 1:
                    save_checkpoint(self.checkpoint(), self.folder / LAST)
                raise

    def next_window(self):
        """Put the next window in place, and the state before it: zeros at an excerpt's start."""
        batch, window = divmod(self.made, self.h.reset_freq)
        is_pinned = self.device.type == "cuda"
        # The reader is a batch ahead of the updates.
        self.read_ahead.pop(batch - 1, None)
        for index in (batch, batch + 1):
            if index not in self.read_ahead:
                reading = self.reader.submit(self.excerpts.batch, index, is_pinned)
                self.read_ahead[index] = reading
        self.pcm.copy_(self.read_ahead[batch].result()[window], non_blocking=True)
        for before, after in zip(self.state, self.next_state):
            if window == 0:
                before.zero_()
            else:
                before.copy_(after)

    def stop_if_nothing_is_learnt(self):
        if self.made % MAX_SKIPPED == 0 and self.counts["skipped_in_a_row"] >= MAX_SKIPPED:
            raise UserError(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} updates in a row, up to "
                f"update {self.made}; start again in another --out_dir with a lower --lr or "
                "--grad_clip"
            )

    def save_and_exit(self, signal_number):
        save_checkpoint(self.checkpoint(), self.folder / LAST)
        if is_first():
            print(f"stopped after update {self.made}; go on with the same command and --resume")
        sys.exit(128 + signal_number)

    def monitor(self):
        """A log line with held-out bounds; best.pt where monitored_bound is best yet; last.pt."""
        h = self.h
        folder, counts = self.folder, self.counts
        by_window = window_bounds(
            self.averaged,
            self.corpus,
            self.corpus.valid,
            h.eval_k[:1],
            h.seq_frames,
            h.monitor_windows,
            smc=h.eval_k[0] if self.monitor_smc else 0,
        )
        train_loss = counts["loss_sum"] / counts["losses"]
        line = dict(
            update=self.made,
            sequences=self.made * h.batch_size,
            seconds=self.seconds,
            train_loss=train_loss.item() if counts["losses"] else None,
            grad_norm=counts["grad_norm"].item(),
            clipped=counts["clipped"].item(),
            skipped=counts["skipped"].item(),
            valid=summarise(by_window, h.seq_frames, h.x_dim, self.corpus),
        )
        counts["loss_sum"].zero_()
        counts["losses"].zero_()

        # The log first: whatever is lost after it can be made again.
        self.log.append(line)
        if is_first():
            with (folder / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
        chosen_by = line["valid"][monitored_bound(h.eval_k)]["nats_per_frame"]
        is_best = chosen_by > self.best
        self.best = max(self.best, chosen_by)
        checkpoint = self.checkpoint()
        if is_best:
            best = {part: checkpoint[part] for part in PARTS}
            save_checkpoint(best | dict(model=checkpoint["averaged"]), folder / BEST)
        save_checkpoint(checkpoint, folder / LAST)
        if is_first():
            tqdm.write(progress_line(h, line))  # above the bar, where there is one
            sys.stdout.flush()

    def checkpoint(self):
        """The state of the whole job, however many processes share it; each of them must ask."""
        states = self.state + self.next_state
        return dict(
            config=self.config,
            mean=self.corpus.mean,
            std=self.corpus.std,
            update=self.made,
            model=self.model.state_dict(),
            averaged=self.averaged.state_dict(),
            states={i: torch.cat(gather(part.cpu())) for i, part in enumerate(states)},
            counts=self.counts,
            optimiser=self.optimiser.state_dict(),
            log=self.log,
            generator=self.generator.get_state(),
            seconds=self.seconds,
            best=self.best,
        )

    def restore(self, checkpoint):
        """Go on from a state, in place. UserError where it is of another run."""
        before, *lines = checkpoint["log"]
        refuse_changes(before, self.log[0])
        if checkpoint["update"] > self.h.max_updates:
            raise UserError(
                f"--max_updates={self.h.max_updates}: {checkpoint['update']} are made; "
                "give no fewer"
            )
        ours = self.checkpoint()
        for part in ("model", "averaged", "states", "counts", "optimiser", "generator"):
            if not is_built_like(checkpoint[part], ours[part]):
                why = f"is not a usable checkpoint (its {part} does not fit this run)"
                raise refusal(self.folder / LAST, "--resume", why)
        self.log = [{**before, "config": self.config}, *lines]
        self.model.load_state_dict(checkpoint["model"])
        self.averaged.load_state_dict(checkpoint["averaged"])
        self.generator.set_state(checkpoint["generator"])
        for name, count in self.counts.items():
            count.copy_(checkpoint["counts"][name])
        saved_states = checkpoint["states"].values()
        for part, saved in zip(self.state + self.next_state, saved_states, strict=True):
            part.copy_(saved[my_part(len(saved))].view_as(part))
        for i, moments in enumerate(self.optimiser.state.values()):
            for name, tensor in moments.items():
                tensor.copy_(checkpoint["optimiser"]["state"][i][name])
        self.made = checkpoint["update"]
        self.seconds = checkpoint["seconds"]
        self.best = checkpoint["best"]

    def finish(self):
        """Evaluate best.pt on the test split: eval.json, windows.csv and samples/."""
        best = self.folder / BEST
        if not best.exists():
            raise UserError(
                f"{best} is missing, or no bound was finite; start again, with a lower --lr"
            )
        checkpoint = read_checkpoint(best, "--resume")
        load_parameters(self.averaged, checkpoint, best, "--resume")
        evaluate(self.h, self.averaged, checkpoint, self.corpus, self.folder, self.config, BEST)


def refuse_missing_features(h, model):
    """UserError where a hyperparameter asks for what a user's model does not have."""
    asked = (
        ("weight_norm", "constrain_weights", "--weight_norm=0"),
        ("mirrored_init", "mirror", "--no-mirrored_init"),
        ("bf16", "bf16", "--no-bf16"),
    )
    for option, feature, off in asked:
        if getattr(h, option) and not hasattr(model, feature):
            raise UserError(
                f"--{option}: {type(model).__name__} has no {feature}; give {off}, or write it"
            )


def average_over_processes(tensors):
    """Replace tensors by their means over all processes."""
    total = nn.utils.parameters_to_vector(tensors)
    dist.all_reduce(total)
    nn.utils.vector_to_parameters(total / job()[1], tensors)


def ensure_demo_data(path):
    """Make the synthetic data that --demo trains on, where it is not there yet."""
    if path == DEMO["data"] and not Path(path).exists() and is_first():
        print(f"making synthetic demo data in {path}", flush=True)
        script = Path(__file__).with_name("prepare_blizzard.py")
        making = subprocess.run([sys.executable, script, "--demo"], stdout=subprocess.DEVNULL)
        if making.returncode:
            sys.exit(making.returncode)
    gather("the data is there")  # before any of them opens it


def monitored_bound(eval_k):
    """The name of the bound on valid by which best.pt is chosen, for every objective."""
    return f"iwae_{eval_k[0]}"


def progress_line(h, line):
    """What is printed of a line of the log."""
    valid, tracked = line["valid"], monitored_bound(h.eval_k)
    nats = [f"{name} {valid[name]['nats_per_frame']:.2f}" for name in (tracked, "elbo", "kl")]
    text = (
        f"update {line['update']:,} | {line['sequences']:,} sequences | "
        f"valid {' '.join(nats)} nats/frame | "
        f"{valid[tracked]['bits_per_sample']:.3f} bits/sample | "
        f"{line['update'] / line['seconds']:.2f} updates/s"
    )
    if line["skipped"]:
        text += f" | {line['skipped']} updates skipped as not finite"
    return text


# ---- windows -------------------------------------------------------------------------------------


class Excerpts:
    """Training excerpts of reset_freq windows each, in an order set by (seed, epoch) alone.

    Each recording is cut into as many whole excerpts as it holds, from a start that is drawn anew
    every epoch, so that all of it is seen. What an epoch holds beyond whole batches is left out.
    """

    def __init__(self, split, x_dim, seq_frames, reset_freq, batch_size, seed):
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = None
        self.shape = (-1, reset_freq, seq_frames, x_dim)
        self.samples = reset_freq * seq_frames * x_dim
        self.counts, self.slack = np.divmod(np.diff(split.offsets), self.samples)
        self.batches_per_epoch = int(self.counts.sum()) // batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"train has {self.counts.sum()} excerpts of {self.samples / SAMPLE_RATE:g} s, too "
                f"few for --batch_size={batch_size}; give a smaller one or --reset_freq, or more "
                "recordings"
            )

    def batch(self, index, is_pinned=False):
        """This process's windows of batch `index` of training: int16 (reset_freq, T, B, X)."""
        epoch, index = divmod(index, self.batches_per_epoch)
        if epoch != self.epoch:
            self.starts = self.starts_of(epoch)
            self.epoch = epoch
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size]
        pcm = torch.from_numpy(self.split.read(starts[my_part(self.batch_size)], self.samples))
        # Contiguous: to copy a window to a GPU would wait for it otherwise.
        windows = pcm.view(self.shape).permute(1, 2, 0, 3).contiguous()
        return windows.pin_memory() if is_pinned else windows

    def starts_of(self, epoch):
        """First samples of the excerpts of an epoch, in its order."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.counts.sum())
        shift = random.integers(0, self.slack, endpoint=True)
        starts = piece_starts(self.split, self.samples) + np.repeat(shift, self.counts)
        return starts[order]


def piece_starts(split, samples, at_most=math.inf):
    """First samples of the non-overlapping pieces of `samples` that the recordings hold.

    All of them, or at_most, evenly spread. Raises UserError where there are none.
    """
    counts = np.diff(split.offsets) // samples
    ends = np.cumsum(counts)
    if ends[-1] == 0:
        raise UserError(
            f"no recording of the split {split.name} holds a window of "
            f"{samples / SAMPLE_RATE:g} s; give longer recordings or a smaller --seq_frames"
        )
    chosen = evenly_spread(np.arange(ends[-1]), at_most)
    recording = np.searchsorted(ends, chosen, side="right")
    first = (ends - counts)[recording]  # piece of the recording
    return split.offsets[recording] + (chosen - first) * samples


def evenly_spread(items, at_most):
    """At most so many of the elements of an array, the first and the last among them."""
    if at_most >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, at_most).round().astype(int)]


def normalise(pcm, corpus, uniform=None):
    """int16 samples to zero mean and unit variance; dequantised by uniform noise on [0, 1)."""
    x = pcm.float() if uniform is None else pcm + (uniform - 0.5)
    return (x - corpus.mean) / corpus.std


# ---- HDF5 ----------------------------------------------------------------------------------------

FORMAT = dict(format="vrnn-audio", version=1, sample_rate=SAMPLE_RATE)  # attributes of every file
SPLITS = ("train", "valid", "test")
SYNTHETIC = "prepare_blizzard.py --demo: synthetic, not speech"  # so begins created_by of the demo
REMAKE = "make it again with prepare_blizzard.py"
SHORTEST = 200  # samples of a recording: a frame of the published size
MIN_FREE = 16 << 20  # bytes of the disk that a conversion leaves free


class SafeFile(io.FileIO):
    """A file for HDF5 to write to. HDF5 crashes where a write fails, so here none does.

    Whoever uses it calls `check` after every few writes: HDF5 crashes as well where it goes on and
    needs what it has not written.
    """

    problem = None

    def write(self, data):
        try:
            while data:
                data = data[super().write(data) :]
        except OSError as error:
            self.problem = first_line(error)

    def truncate(self, size):
        try:
            super().truncate(size)
        except OSError as error:
            self.problem = first_line(error)

    def check(self):
        """Raise UserError where a write has failed, or will soon."""
        folder = self.name.parent
        if shutil.disk_usage(folder).free < MIN_FREE:
            self.problem = f"the disk of {folder} is nearly full"
        if self.problem:
            raise UserError(
                f"{self.name} cannot be written: {self.problem}; make room, raise the limit on the "
                "size of files, or give another --out"
            )

    def close(self):
        super().close()
        self.check()


class SplitWriter:
    """Appends whole recordings to one group of the HDF5 file. check: called after every write."""

    def __init__(self, group, share, check):
        self.group = group
        self.share = share
        self.check = check
        self.offsets = [0]
        self.names = []
        self.total = self.squares = 0  # sums over all samples
        self.audio = group.create_dataset("audio", (0,), "int16", chunks=(BLOCK,), maxshape=(None,))

    def append(self, recording):
        """Append it; the next is written over one that fails half-way. Raises BadAudio."""
        start = end = self.offsets[-1]
        total = squares = 0
        for block in blocks_of(recording):
            self.audio.resize((end + len(block),))
            self.audio[end:] = block
            self.check()
            end += len(block)
            wide = block.astype(np.int64)
            total += int(wide.sum())
            squares += int(wide @ wide)
        if end == start:
            raise BadAudio("it holds no samples")
        if end - start < SHORTEST:
            raise BadAudio(f"its {end - start} samples are fewer than a frame's {SHORTEST}")
        if squares * (end - start) == total**2:
            raise BadAudio(f"all of its {end - start:,} samples are the same")
        self.offsets.append(end)
        self.names.append(printable(recording.name).replace("\0", "\\0"))
        self.total += total
        self.squares += squares

    def close(self):
        """Returns mean and standard deviation."""
        samples = self.offsets[-1]
        self.audio.resize((samples,))
        self.group["offsets"] = np.int64(self.offsets)
        self.group["names"] = self.names
        variance = self.squares * samples - self.total**2  # times samples^2, exactly
        return self.total / samples, math.sqrt(variance) / samples


def convert(recordings, out, shares, strict=False, created_by="prepare_blizzard.py", complete=None):
    """Write Recordings to one HDF5 file, which appears under its name only when it is complete.

    Each goes, whole, to the split that is furthest below its share, {split: of all samples}, of the
    samples so far, so that a rerun gives the same splits; one that is not usable is skipped, or an
    error (strict).
    complete: called with the path of the file when all recordings are in it, to add to it. Returns
    ["source: why skipped"]. Raises UserError.
    """
    with stop_requests() as received, durably(out) as partial:
        with SafeFile(partial, "w+") as safe, h5py.File(safe, "w", rdcc_nbytes=1 << 20) as file:
            writers = [
                SplitWriter(file.create_group(split), share, safe.check)
                for split, share in shares.items()
            ]
            skipped = write_recordings(recordings, writers, strict, received)
            (mean, std), *_ = [writer.close() for writer in writers]
            file.attrs.update(**FORMAT, mean=mean, std=std, created_by=created_by)
        if complete:
            complete(partial)
        if received:
            sys.exit(128 + received[0])
    return skipped


def write_recordings(recordings, writers, strict, received):
    """Append each to a split. Returns ["source: why skipped"]. received: signals to stop."""
    skipped = []
    for recording in recordings:
        if received:
            sys.exit(128 + received[0])
        so_far = sum(writer.offsets[-1] for writer in writers)
        neediest = max(writers, key=lambda writer: writer.share * so_far - writer.offsets[-1])
        try:
            neediest.append(recording)
        except BadAudio as why:
            skipped.append(f"{recording.source}: {why}")
            if strict:
                raise UserError(
                    f"{skipped[-1]}; mend or remove it, or do without --strict"
                ) from why
    counts = [len(writer.names) for writer in writers]
    if 0 in counts:
        why = f" (skipped: {skipped[0]})" if skipped else ""
        raise UserError(
            f"{sum(counts)} usable recordings leave none for the split "
            f"{SPLITS[counts.index(0)]}{why}; give more recordings or a larger --valid and --test"
        )
    return skipped


@dataclasses.dataclass
class Split:
    """Recordings back to back. audio: int16 HDF5 dataset; offsets: (recordings + 1,) int64."""

    name: str
    audio: h5py.Dataset
    offsets: np.ndarray

    def read(self, starts, samples):
        """(B, samples) int16 from B starting points."""
        try:
            return np.stack([self.audio[start : start + samples] for start in starts])
        except (OSError, RuntimeError) as error:
            path, why = self.audio.file.filename, first_line(error)
            # so HDF5 passes on what the system said, such as errno = 5, an input/output error
            if re.search("errno = [1-9]", str(error)):
                raise UserError(
                    f"data file {path} cannot be read ({why}); see to its disk or network, and go "
                    "on with --resume"
                ) from error
            raise UserError(
                f"data file {path} is damaged in split {self.name} ({why}); {REMAKE}"
            ) from error


@dataclasses.dataclass
class Corpus:
    """A data file that is open. mean and std: of train, in int16 units."""

    path: str
    created_by: str
    mean: float
    std: float
    train: Split
    valid: Split
    test: Split
    yardsticks: dict  # {samples of a window: {name: bits per sample of test}}
    recording_bits: dict  # {name: {recording of test: bits; NaN where it was not measured}}
    recording_samples: dict  # {recording of test: how many samples these are of}


def open_corpus(path):
    """The Corpus of an HDF5 file. Raises UserError where it is none."""
    try:
        file = open_hdf5(path)
        if {name: file.attrs.get(name) for name in FORMAT} != FORMAT:
            expected = ", ".join(f"{name} {value}" for name, value in FORMAT.items())
            raise ValueError(f"it is not of {expected}")
        mean = float(file.attrs.get("mean", math.nan))
        std = float(file.attrs.get("std", math.nan))
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError("it has no usable mean and std")
        splits = {name: read_split(file, name) for name in SPLITS}
        created_by = str(file.attrs.get("created_by"))
        yardsticks = read_yardsticks(file)
        return Corpus(str(path), created_by, mean, std, **splits, **yardsticks)
    except FileNotFoundError as error:
        raise UserError(
            f"data file {path} does not exist; make it with 'python prepare_blizzard.py FOLDER "
            f"--out {path}', name another with --data, or try --demo"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        why = first_line(error)
        raise UserError(f"data file {path} is not readable HDF5 ({why}); {REMAKE}") from error


def open_hdf5(path):
    # Excerpts are random: a cache of chunks would only read more.
    # It is written once, so no lock is needed, and some network file systems have none.
    file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)
    # That of the chunk index would grow by 38 MB over 283 hours, and win no time.
    cache = file.id.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = 1 << 17
    file.id.set_mdc_config(cache)
    return file


def read_split(file, name):
    """A Split of an HDF5 file. Raises ValueError."""
    audio, offsets = file[name]["audio"], file[name]["offsets"][:]
    is_audio = isinstance(audio, h5py.Dataset) and (audio.dtype, audio.ndim) == ("int16", 1)
    if not (is_audio and (offsets.dtype, offsets.ndim) == ("int64", 1)):
        raise ValueError(f"its split {name} is not of int16 audio and int64 offsets")
    ends_match = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(audio)
    if not (ends_match and (np.diff(offsets) > 0).all()):
        raise ValueError(f"it has inconsistent offsets in split {name}")
    return Split(name, audio, offsets)


def read_yardsticks(file):
    """Those fields of a Corpus, as prepare_blizzard.py measured them, or empty if it did not."""
    if "yardsticks" not in file:
        return dict(yardsticks={}, recording_bits={}, recording_samples={})
    windows, recordings = file["yardsticks/windows"], file["yardsticks/recordings"]
    samples = int(windows.attrs["samples"])
    yardsticks = {}
    for name, bits in windows.items():
        if name != "starts" and len(bits):
            yardsticks[name] = float(bits[:].mean()) / samples
    index = recordings["index"][:].tolist()
    by_recording = {}
    for name, values in recordings.items():
        if name != "index":
            by_recording[name] = dict(zip(index, values[:].tolist()))
    return dict(
        yardsticks={samples: yardsticks},
        recording_samples=by_recording.pop("samples"),
        recording_bits=by_recording,
    )


# ---- arrays (.npz, .npy) -------------------------------------------------------------------------

BLOCK = 1 << 16  # samples at a time, so that memory does not depend on the length of a recording
MAX_CHANNELS = 8  # more have spectra and other features, not recordings
MAX_EXPANSION = 100  # of a zip archive; speech shrinks to about half, silence to a thousandth


class BadAudio(Exception):
    """Why a file or recording cannot be used."""


@dataclasses.dataclass
class Recording:
    """What is to become one recording of a data file, or a file that cannot."""

    source: str  # where it lies, for messages
    name: str
    blocks: object = None  # an iterator over its samples, 1-D int16 arrays at 16 kHz
    problem: str = None  # what stands in the way of them


def natural_order(text):
    """Sort key that puts data_9 before data_10, and no two texts in one place."""
    parts = re.split("([0-9]+)", str(text))
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], str(text)


def printable(name):
    """A file name in UTF-8, whatever its bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def blocks_of(recording):
    """Its blocks. Raises BadAudio, also for what a damaged file makes NumPy or zipfile raise."""
    if recording.problem:
        raise BadAudio(recording.problem)
    try:
        yield from recording.blocks
    except BadAudio:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise BadAudio(f"it cannot be read ({first_line(error)})") from error


def array_recordings(path, name, allow_pickle=False):
    """Yield the Recordings in a .npz or .npy file.

    A recording is an array or, with allow_pickle, one of an array of arrays, to read which
    executes what the file says. Raises what makes the whole file unusable.
    """
    if path.suffix.lower() == ".npy":
        yield from recordings_of(lambda: npy_array(path, allow_pickle), path, name)
        return
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # so every zip archive begins
            raise BadAudio("it is no .npz file")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # a damaged directory can raise anything
            raise BadAudio(f"it cannot be read ({first_line(error)})") from error
        expanded = sum(member.file_size for member in archive.infolist())
        if expanded > max(MAX_EXPANSION * path.stat().st_size, 1 << 20):
            fold = expanded // path.stat().st_size
            raise BadAudio(
                f"it expands {fold:,}-fold, as no speech does; store what it should hold with "
                "numpy.savez"
            )
        members = {member for member in archive.namelist() if member.endswith(".npy")}
        if not members:
            raise BadAudio("it holds no arrays")
        for member in sorted(members, key=natural_order):
            load = functools.partial(npz_array, archive, member, allow_pickle)
            yield from recordings_of(load, path, f"{name}/{member.removesuffix('.npy')}")


def npy_array(path, allow_pickle):
    """The array of a .npy file, which stays there as long as it is no pickle."""
    with path.open("rb") as file:
        if allow_pickle:
            return only_array(file, allow_pickle)
        require_npy(file)
    array = np.load(path, mmap_mode="r")
    refuse_surplus(path.stat().st_size - array.offset - array.nbytes)
    return array


def npz_array(archive, member, allow_pickle):
    with archive.open(member) as file:
        return only_array(file, allow_pickle)


def only_array(file, allow_pickle):
    """The array of an open .npy file. Raises BadAudio where there is none, or more than one."""
    require_npy(file)
    array = np.load(file, allow_pickle=allow_pickle, encoding="latin1")  # Python 2 wrote some
    refuse_surplus(len(file.read()))
    return array


def require_npy(file):
    # NumPy takes whatever begins otherwise for a pickle.
    if file.read(6) != b"\x93NUMPY":
        raise BadAudio("it is no .npy file")
    file.seek(0)


def refuse_surplus(count):
    if count:
        raise BadAudio(
            f"{count:,} bytes follow its first array; save every array in a file of its own, or "
            "all with numpy.savez"
        )


def recordings_of(load, path, name):
    """The recordings of one array: itself, or each of its elements where it is one of arrays."""
    try:
        array = np.asanyarray(load())
    except BadAudio as why:
        yield Recording(path, name, problem=str(why))
        return
    except Exception as error:  # a damaged header can raise anything
        why = f"it cannot be read ({first_line(error)})"
        if re.search("allow_pickle|Python objects", str(error)):
            why = (
                "it is an array of arrays, a pickle, and reading one executes what it says; save "
                "every recording with numpy.savez, or pass --allow_pickle if you trust the file"
            )
        yield Recording(path, name, problem=why)
        return
    if not array.dtype.hasobject:
        yield Recording(path, name, pcm16_blocks(array))
        return
    if array.size == 0:
        yield Recording(path, name, problem="it holds no recordings")
        return
    parts = array.flat
    if np.ndim(parts[0]) == 0:  # NumPy has split recordings of equal lengths into samples
        length = array.shape[-1]
        parts = array.reshape(-1, length) if length > MAX_CHANNELS else [array]
    for i, part in enumerate(parts):
        yield Recording(path, f"{name}/{i}", pcm16_blocks(part))


def pcm16_blocks(array):
    """int16 blocks of one recording, its first channel, of any real dtype.

    int16 as it is; wider integers as int16 where all fit, as 32-bit full scale where some exceed
    24 bits; floats of full scale 1, or as int16 where whole.
    """
    array = np.asarray(array)
    if array.dtype.hasobject:
        array = np.array(array.tolist())
    shape = array.shape
    kind, itemsize = array.dtype.kind, array.dtype.itemsize
    if len(shape) not in (1, 2) or len(shape) == 2 and shape[1] > min(shape[0], MAX_CHANNELS):
        raise BadAudio(
            f"its shape {shape} is neither (samples,) nor (samples, channels) with at most "
            f"{MAX_CHANNELS} channels; transpose or split it, or leave it out if it is no audio"
        )
    if kind not in "if" or itemsize == 1:
        raise BadAudio(f"its type {array.dtype} is not audio; save int16, int32 or floats")
    samples = array[:, 0] if len(shape) == 2 else array
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    if kind == "i" and itemsize == 2:
        yield from (block.astype(np.int16) for block in blocks)
        return
    peak = np.max([0, *(np.abs(block.astype(np.float64)).max() for block in blocks)])
    is_whole = all((np.rint(block) == block).all() for block in blocks)
    if kind == "f" and blocks and peak <= 1 and all((block >= 0).all() for block in blocks):
        raise BadAudio("none of its values is negative, as samples are; it is no audio")
    if is_whole and (kind != "f" or peak > 1) and peak <= 1 << 15:
        scale = 1
    elif kind == "f" and peak <= 2:
        scale = 1 << 15
    elif kind == "i" and 1 << 23 < peak <= 1 << 31:
        scale = 2.0**-16
    elif not np.isfinite(peak):
        raise BadAudio("it holds NaN or infinity; remove or repair these samples")
    else:
        raise BadAudio(
            f"its peak {peak:g} fits neither int16 nor full scale; scale it to [-1, 1] or save "
            "int16"
        )
    yield from (to_int16(block.astype(np.float64) * scale) for block in blocks)


def to_int16(samples):
    """Round and clip samples in int16 units."""
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


# ---- run folder and checkpoints ------------------------------------------------------------------

# Files of a run.
LOG = "log.jsonl"
LAST = "last.pt"
BEST = "best.pt"
EVAL = "eval.json"
FREE_ON_RESUME = {"max_updates", "monitor_every", "out_dir"}  # no state of a run depends on them

# What it takes to evaluate a checkpoint, and what a training needs besides to go on from one.
PARTS = dict(model=dict, config=dict, update=int, mean=float, std=float)
STATE = dict(
    averaged=dict,
    states=dict,
    counts=dict,
    optimiser=dict,
    log=list,
    generator=torch.Tensor,
    seconds=float,
    best=float,
)
HEADER = dict(config=dict, data=dict, device=str)  # what decides whether a log can go on


def check_folder(h):
    """The folder of a run or an evaluation that begins or goes on. UserError where it is taken."""
    folder = Path(h.out_dir)
    has_state = (folder / LAST).exists()
    if h.resume and not has_state:
        raise UserError(
            f"--resume: there is no {folder / LAST} to go on from; start without --resume"
        )
    is_evaluated = (folder / EVAL).exists() or (h.evaluate and (folder / LOG).exists())
    if (has_state or is_evaluated) and not h.resume:
        remedy = "give another --out_dir"
        if has_state and not h.evaluate:
            remedy = f"pass --resume to go on with it, or {remedy}"
        raise UserError(f"{folder} already holds a run or an evaluation; {remedy}")
    return folder


def claim_folder(folder, config, log=()):
    """Keep other processes out of a folder, and begin its log; an evaluation has none.

    Only the first process of a job writes anything.
    """
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)  # until the process ends
    (folder / EVAL).unlink(missing_ok=True)  # of a run that goes on
    write_durably(folder / "config.json", json.dumps(config, indent=1) + "\n")
    if log:
        write_durably(folder / LOG, "".join(json.dumps(line) + "\n" for line in log))


def save_checkpoint(checkpoint, path):
    """Write a checkpoint such that path holds the old or the new one, whole."""
    if is_first():
        try:
            with durably(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:
            remedy = "--resume" if path.exists() else "start again in another --out_dir"
            raise UserError(
                f"{path} cannot be written ({first_line(error)}); make room and {remedy}"
            ) from error


def config_of(h, name=None):
    """Hyperparameters as they are kept, with their script and the name of the objective."""
    config = json.loads(json.dumps(dataclasses.asdict(h)))
    for not_kept in ("evaluate", "resume", "demo"):
        del config[not_kept]
    script = script_of(type(h))
    return config | dict(script=script, name=name or script)


def refuse_changes(before, now):
    """UserError where a saved state does not fit what the header of the log would be now."""
    was, is_now = (
        {**header["config"], "data": header["data"], "device": header["device"][:4]}
        for header in (before, now)
    )
    for name in is_now:
        if name not in FREE_ON_RESUME and was.get(name) != is_now[name]:
            raise UserError(
                f"--resume: --{name} was {was.get(name)} and is now {is_now[name]}, which does not "
                "fit the saved state; give the old value, or start another --out_dir"
            )


def read_checkpoint(path, option, more_parts=None):
    """Read a checkpoint, executing nothing in it.

    option: the flag that asks for it; more_parts: what it needs besides PARTS, {name: type}.
    UserError where it is of no use.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_parts(checkpoint, PARTS | (more_parts or {}))
        return checkpoint
    except FileNotFoundError as error:
        raise refusal(path, option, "does not exist") from error
    except Exception as error:  # a damaged file can raise anything
        why = f"is not a usable checkpoint ({first_line(error)})"
        raise refusal(path, option, why) from error


def check_parts(checkpoint, parts):
    """ValueError where a checkpoint lacks a part, or has a senseless one. parts: {name: type}."""
    check_types(checkpoint, parts)
    if "log" in parts:
        check_types(next(iter(checkpoint["log"]), None), HEADER)
    std_is_usable = math.isfinite(checkpoint["mean"]) and 0 < checkpoint["std"] < math.inf
    if not std_is_usable or checkpoint["update"] < 0:
        raise ValueError("its mean, std or update is out of range")
    if not all(torch.is_tensor(p) and p.isfinite().all() for p in checkpoint["model"].values()):
        raise ValueError("its parameters are not finite")
    checkpoint["config"] = json.loads(json.dumps(checkpoint["config"]))


def check_types(saved, kinds):
    """ValueError where a dict lacks a part, or has one of another type. kinds: {name: type}."""
    for name, kind in kinds.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(name), kind):
            raise ValueError(f"it has no usable {name}")


def is_built_like(saved, ours):
    """Whether nested dicts have the same keys, and tensors the same shapes and types."""
    if isinstance(ours, dict):
        has_same_keys = isinstance(saved, dict) and saved.keys() == ours.keys()
        return has_same_keys and all(is_built_like(saved[key], ours[key]) for key in ours)
    if torch.is_tensor(ours):
        return torch.is_tensor(saved) and (saved.shape, saved.dtype) == (ours.shape, ours.dtype)
    return type(saved) is type(ours)


def load_parameters(model, checkpoint, path, option):
    """Give a model the parameters of a checkpoint. UserError where they are another model's."""
    name = type(model).__name__
    why = f"holds another model than this {name}, or one of other sizes"
    # The same parameters mean something else to another class.
    if checkpoint["config"].get("model_class", name) != name:
        raise refusal(path, option, why)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:  # so PyTorch says that names or shapes differ
        raise refusal(path, option, why) from error


def refusal(path, option, why):
    """The UserError for a checkpoint that an option asks for in vain."""
    remedy = f"name another, or start without {option}"
    if option == "--resume":
        remedy = (
            "start another --out_dir, with --init_from best.pt or last.pt, if whole, to keep what "
            "was learnt"
        )
    return UserError(f"{option}: {path} {why}; {remedy}")


def commit():
    """The commit of this code, with + where a file differs from it; None outside a repository."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    git = ["git", "-C", Path(__file__).parent, *describe]
    with contextlib.suppress(OSError):  # where there is no git
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


# ---- flags ---------------------------------------------------------------------------------------

# What --demo puts in place of the values at the top of a script: small enough for two CPU cores.
DEMO = dict(
    data="data/demo.h5",
    x2s_dim=128,
    z2s_dim=128,
    q_z_dim=128,
    p_z_dim=128,
    p_x_dim=128,
    rnn_dim=128,
    z_dim=32,
    batch_size=8,
    lr=1e-3,
    max_updates=400,
    monitor_every=50,
    monitor_windows=32,
    x_noise_updates=200,
    eval_recordings=2,
)

# The smallest value of each that makes sense; what is not here may be any. MOST is the largest of
# all: more than anyone needs, and less than what overflows.
LEAST = dict.fromkeys(SIZES, 1)
LEAST |= dict.fromkeys(("k", "seq_frames", "reset_freq", "batch_size", "max_updates"), 1)
LEAST |= dict.fromkeys(("monitor_every", "monitor_windows", "eval_k", "x_noise_updates"), 1)
LEAST |= dict.fromkeys(("z_dim", "ar_order", "seed", "lr_updates", "eval_recordings"), 0)
FRACTIONS = ("lr", "grad_clip", "weight_norm", "x_noise", "ema")  # all others are whole numbers
LEAST |= dict.fromkeys(FRACTIONS, 0) | dict(lr=1e-30)
MOST = 10**9

RESUME = "go on from last.pt in out_dir"
SMALL = "small sizes and synthetic data, for about three minutes on two CPU cores"


def parse(cls, argv=None):
    """The hyperparameters of a script: an instance of its dataclass cls, with `resume`, `demo`.

    Every field is a flag, whose help is the comment behind it; beside them are --resume and
    --demo. With --evaluate CHECKPOINT, what is not given is the checkpoint's. Raises UserError.
    """
    refuse_untyped(cls)
    bare = [("resume", bare_flag(RESUME), False), ("demo", bare_flag(SMALL), False)]
    is_frozen = cls.__dataclass_params__.frozen
    flags = dataclasses.make_dataclass(cls.__name__, bare, bases=(cls,), frozen=is_frozen)
    flags.__module__ = cls.__module__

    # Twice: --demo and --evaluate change the values of the flags that are not given.
    h = parse_flags(flags(), argv)
    defaults = {}
    if h.demo:
        defaults = dict(DEMO, out_dir=f"runs/demo/{script_of(cls)}")
    if h.evaluate:
        if h.resume:
            raise UserError(
                f"--resume cannot be given beside --evaluate={h.evaluate}, which trains nothing; "
                "leave it out"
            )
        defaults = configuration_in(h.evaluate)
    fields = {field.name for field in dataclasses.fields(cls)}
    defaults = {name: value for name, value in defaults.items() if name in fields}
    if defaults:
        with warnings.catch_warnings():
            # tyro warns of a checkpoint's senseless values, which are refused below.
            warnings.simplefilter("ignore")
            h = parse_flags(flags(**defaults), argv)
    check_values(h)
    return h


def bare_flag(text):
    """The type of a Boolean field without a --no-flag."""
    return Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=text)]


def configuration_in(path):
    """The hyperparameters of a checkpoint that --evaluate takes over."""
    config = read_checkpoint(path, "--evaluate")["config"]
    config = {"ar_order": 0, **config}  # older ones have none, whatever the script's is now
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name not in ("out_dir", "device")
    }


def parse_flags(defaults, argv=None):
    """An instance of a dataclass, from its defaults and command-line arguments.

    argv: by default those of the process. Help is made of the comments behind the fields and of
    the module's docstring. UserError in place of tyro's framed message; SystemExit after --help.
    """
    script = f"{script_of(type(defaults))}.py"
    argv = sys.argv[1:] if argv is None else argv
    # The shell leaves the ~ of --out_dir=~/run as it is.
    home = os.path.expanduser("~")
    argv = [re.sub("^(--[^=]*=)~(?=/|$)", rf"\1{home}", text) for text in argv]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                type(defaults),
                prog=script,
                description=sys.modules[type(defaults).__module__].__doc__,
                args=argv,
                default=defaults,
                use_underscores=True,
            )
    except SystemExit as end:
        if end.code == 0:  # after --help
            raise
        message = framed_message(printed.getvalue())
    names = [field.name for field in dataclasses.fields(defaults)]
    candidates = [prefix + name for name in names for prefix in ("--", "--no-")]
    if unknown := re.match("Unrecognized options: ([^ ,=]+)", message):
        message = f"unknown argument {unknown[1]!r}"
        # not all of them are flags: --no-resume is none
        candidates = [name for name in candidates if name != unknown[1]]
        if nearest := difflib.get_close_matches(unknown[1], candidates, n=1):
            message += f", did you mean {nearest[0]}?"
    raise UserError(f"{message}; {script} --help lists what is valid")


def framed_message(text):
    """The sentence that tyro prints at the top of its frame."""
    lines = []
    for line in re.findall(r"^│ (.*) │$", text, re.MULTILINE):
        if line.startswith("───"):
            break
        lines.append(line.strip())
    return " ".join(lines).rstrip(".")


def script_of(cls):
    """The name of the file that a class is written in."""
    return Path(sys.modules[cls.__module__].__file__).stem


def refuse_untyped(script):
    """UserError where a value in a script's dataclass would be no flag.

    It has no type, or @dataclass is missing.
    """
    for cls in script.__mro__[:-1]:
        is_dataclass = "__dataclass_fields__" in vars(cls)
        typed = inspect.get_annotations(cls) if is_dataclass else ()
        for name, value in vars(cls).items():
            is_method = callable(value) or hasattr(value, "__get__")  # or a property
            if name not in typed and not is_method and not name.startswith("_"):
                raise UserError(
                    f"{script_of(script)}.py: {name} cannot become a flag; write {name}: TYPE = "
                    "VALUE below @dataclass"
                )


def check_values(h):
    """UserError where a hyperparameter is out of its range."""
    for name, least in LEAST.items():
        if hasattr(h, name):
            refuse_out_of_range(name, getattr(h, name), least)
    if not (h.out_dir and h.eval_k):
        raise UserError("--out_dir or --eval_k is empty; give the folder of the run, or a number")
    if h.z_dim == 0 and h.k > 1:
        raise UserError(
            f"--k={h.k}: without latent variables (--z_dim=0) all particles are the same; "
            "give --k=1"
        )


def refuse_out_of_range(name, value, least):
    """UserError where a value is no number of its kind, as one of a damaged checkpoint may be."""
    has_several = isinstance(value, tuple)
    numbers = value if has_several else (value,)
    kind = (int, float) if name in FRACTIONS else int
    are_in_range = all(isinstance(n, kind) and least <= n <= MOST for n in numbers)
    if has_several != (name == "eval_k") or not are_in_range:
        what = "a number" if name in FRACTIONS else "a whole number"
        raise UserError(f"--{name}={value} is out of range; give {what} from {least} to {MOST}")


# ---- processes and errors ------------------------------------------------------------------------


class UserError(Exception):
    """Something only the user can mend; its text names file or option, problem and remedy."""


class Unfailing:
    """A stream to print to. Where it fails, as a closed pipe does, the run goes on in silence."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        try:
            action(*arguments)
        except OSError:
            # what is still in its buffer goes there as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_as_script(main):
    """Call main(); what only the user can mend becomes one sentence and exit status 2."""
    sys.stdout = Unfailing(sys.stdout or open(os.devnull, "w"))
    sys.stderr = Unfailing(sys.stderr or open(os.devnull, "w"))
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        why = explanation(error)
        if why is None:
            raise
    print(f"error: {why}", file=sys.stderr, flush=True)
    if job()[1] > 1:
        sys.stdout.flush()
        os._exit(2)  # no clean-up that would wait for processes that are gone
    sys.exit(2)


def explanation(error):
    """What a user can do about an error; None where it is a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'a file'} cannot be read or written ({first_line(error)}); check "
            "its path, its permissions and the free space"
        )
    is_memory = re.search("out of memory|allocate memory|enough memory", str(error))
    if isinstance(error, MemoryError) or is_memory:
        return (
            "the memory does not suffice for these sizes; lower --batch_size, --k, --eval_k or the "
            "widths"
        )
    rank, processes = job()
    if processes > 1:
        return (
            f"process {rank} of {processes} lost the others ({first_line(error)}); see what the "
            "first of them to end said, and go on with --resume"
        )
    return None


def first_line(error):
    """The first line of an error's text, for a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextlib.contextmanager
def stop_requests():
    """A list that gets Ctrl-C and other requests to end, so that what is in hand can be finished.

    The same signal once more kills. What is ignored, as SIGHUP under nohup, stays ignored.
    """
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as last:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks some
            if number and signal.getsignal(number) != signal.SIG_IGN:
                before = signal.signal(number, receive)
                last.callback(signal.signal, number, before)
        yield received


def lock(path):
    """A descriptor that holds a file or folder against other processes, until it is closed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path} is being written by another process; wait for it, or give another name"
        ) from error
    except (ImportError, OSError):  # Windows and some network file systems know no such locks
        pass
    return descriptor


@contextlib.contextmanager
def durably(path):
    """Where to write a file; it becomes `path` once it is whole and on the disk.

    One process at a time.
    """
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    descriptor = lock(partial)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield partial
        os.fsync(descriptor)
        partial.replace(path)
        os.fsync(folder)  # the new name as well
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)
        os.close(folder)


def write_durably(path, text):
    """Write a text file by `durably`."""
    with durably(path) as partial:
        partial.write_text(text)


def start_processes():
    """Set up arithmetic, memory and, under torchrun, the job; returns its number of processes."""
    # The gradients of particles that have lost their weight are denormal, and slow.
    torch.set_flush_denormal(True)
    # Keep what is freed: faulting the same large blocks in again costs a tenth of every update.
    with contextlib.suppress(OSError, AttributeError):  # where the C library is not glibc
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
    of_torchrun = [os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR")]
    if all(of_torchrun) and int(of_torchrun[0]) > 1 and not dist.is_initialized():
        # gloo between CPUs, NCCL between GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return job()[1]


def choose_device(name):
    """The torch.device of --device. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and job()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device  # with its index
        if device.type != "cpu":
            torch.cuda.set_device(device)  # refuses what is no GPU
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise UserError(
            f"--device={name} cannot be used ({first_line(error)}); try --device=cpu"
        ) from error
    return device


def describe(device):
    """A device in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    cpu = platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, {cpu}"


def job():
    """(rank of this process, number of processes) under torchrun; (0, 1) without it."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first():
    """Whether this process writes and speaks for its job."""
    return job()[0] == 0


def my_part(count):
    """The slice of `count` things that falls to this process."""
    rank, processes = job()
    return slice(count * rank // processes, count * (rank + 1) // processes)


def gather(value):
    """[value of every process], in the order of their ranks."""
    values = [value] * job()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# ---- fast recurrence (skip it at a first reading) ------------------------------------------------
#
# VRNN.recurrence once more, with its gradient written out: four times as fast at small sizes.
# tests/test_model.py holds it to tests/plain.py. First the products, then the two sweeps.


def by_onednn(rows, weight):
    """Whether to ask oneDNN for a product with so many rows.

    On a CPU in float32, where there is much to multiply, it is faster than the library that PyTorch
    asks on AMD, and as fast on Intel. To set it up takes 20 us.
    """
    is_large = weight.numel() >= 1 << 17 and rows * weight.numel() >= 1 << 24
    is_float_on_cpu = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_large and is_float_on_cpu and torch.backends.mkldnn.is_available()


def onednn(weight, bias, then, x):
    """then(x weight^T + bias), where `then` is "none" or "relu"."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")


def product(x, weight, bias=None):
    """x weight^T + bias, for x of (., in) and weight of (out, in)."""
    if by_onednn(x.shape[:-1].numel(), weight):
        return onednn(weight, bias, "none", x)
    return F.linear(x, weight, bias)


def repeated_product(weight, rows):
    """The function x -> x weight^T, of at most (rows, in), for many frames.

    To lay the weight out once saves up to half the time.
    """
    if by_onednn(rows, weight):
        return functools.partial(onednn, weight, None, "none")
    transposed = weight.t().contiguous()
    return lambda x: torch.mm(x, transposed)


def repeated_addition(weight, rows):
    """The function that adds x weight^T to its second argument, for many frames."""
    if by_onednn(rows, weight):
        return lambda x, out: out.add_(onednn(weight, None, "none", x))
    transposed = weight.t().contiguous()
    return lambda x, out: out.addmm_(x, transposed)


def repeated_layer(weight, bias, rows, then="none"):
    """The function that writes then(x weight^T + bias) to its second argument, for many frames."""
    if by_onednn(rows, weight):
        return lambda x, out: out.copy_(onednn(weight, bias, then, x))
    transposed = weight.t().contiguous()
    layer = torch._addmm_activation if then == "relu" else torch.addmm
    return lambda x, out: layer(bias, x, transposed, out=out)


class Product(torch.autograd.Function):
    """`product` with its gradient by products of the same speed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        d_x = product(d, weight.t()) if ctx.needs_input_grad[0] else None
        d_bias = d.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return d_x, over_all_rows(d, x), d_bias


def over_all_rows(d, below):
    """Gradient of a weight from those of its outputs and from its inputs, both (., rows, .)."""
    return d.flatten(0, -2).t() @ below.flatten(0, -2)


# The ReLU layers of the two networks inside the recurrence, as they lie in one list.
POSTERIOR = range(3)  # layers two to four of the posterior
PHI_Z = range(3, 7)


def has_fast_recurrence(model):
    """Whether a VRNN has the steps and the networks that are written out below."""
    steps = [getattr(type(model), step) for step in ("q_z", "into_lstm", "lstm", "recurrence")]
    if steps != [VRNN.q_z, VRNN.into_lstm, VRNN.lstm, VRNN.recurrence]:
        return False
    products = (model.posterior_x, model.posterior_h, model.lstm_x, model.lstm_z, model.lstm_h)
    networks = nn.ModuleList([*products, model.posterior, model.phi_z])
    posterior = [nn.Sequential, nn.ReLU, *[Linear, nn.ReLU] * 3, Head]
    phi_z = [nn.Sequential, *[Linear, nn.ReLU] * 4]
    written_out = [nn.ModuleList, *[Linear] * 5, *posterior, *phi_z]
    if [type(layer) for layer in networks.modules()] != written_out:
        return False
    without_bias = (model.posterior_h, model.lstm_z, model.lstm_h)
    return all(layer.bias is None for layer in without_bias)


def fast_recurrence(model, phi_x, noise, h, c, k, ancestors):
    """What VRNN.recurrence returns."""
    dtype = phi_x.dtype
    # The posterior's first layer and the gates see phi_x(x_t) and h_{t-1}: one product for both.
    x_weight = torch.cat((model.posterior_x.weight, model.lstm_x.weight)).to(dtype)
    x_bias = torch.cat((model.posterior_x.bias, model.lstm_x.bias)).to(dtype)
    h_weight = torch.cat((model.posterior_h.weight, model.lstm_h.weight)).to(dtype)
    from_x = Product.apply(phi_x, x_weight, x_bias)
    *hidden, head_weight, head_bias = model.posterior.parameters()
    layers = [p.to(dtype) for p in (*hidden, *model.phi_z.parameters())]
    h_before, phi_z, q_mean, q_sigma, h, c = Recurrence.apply(
        k,
        torch.is_grad_enabled(),
        ancestors,
        from_x,
        noise,
        h,
        c,
        head_weight,
        head_bias,
        h_weight,
        model.lstm_z.weight.to(dtype),
        *layers,
    )
    return h_before, phi_z, (q_mean, q_sigma), h, c


relu_backward = torch.ops.aten.threshold_backward.grad_input


class Recurrence(torch.autograd.Function):
    """The frames of a rollout, forwards and backwards.

        a_t = from_x_t + [posterior_h | lstm_h] h_{t-1},    split into a_t^q and a_t^gates
        q_mean_t, q_sigma_t = head(ReLU layers(relu(a_t^q))),  z_t = q_mean_t + q_sigma_t * noise_t
        h_t, c_t = lstm_cell(a_t^gates + lstm_z phi_z(z_t), c_{t-1})

    The backward sweep carries gradients of h and c from frame to frame, and leaves those of
    pre-activations in `d_*` for all frames, so that the gradient of each weight is one product over
    all T*B*K rows. Products are in the precision of from_x, but for the head; noise, z, c, mean and
    sigma keep their own. Ancestors and noise get no gradient.

    Below, name_at[t] is the view of frame t of the tensor `name` (a tuple of views, where it is a
    list of tensors), made once: to make them in the loop takes longer than small products.
    """

    @staticmethod
    def forward(
        ctx,
        k,
        keep,
        ancestors,
        from_x,
        noise,
        h,
        c,
        head_weight,
        head_bias,
        h_weight,
        z_weight,
        *layers,
    ):
        """All frames of a rollout.

        from_x: (T, B, Q + 4R), Q the width of the posterior; noise: (T, B*k, Z); h, c: (B*k, R).
        keep: every frame for a backward sweep. layers: weight and bias of those of POSTERIOR and of
        PHI_Z. Returns h_before (T, B*k, R), phi_z (T, B*k, .), q_mean, q_sigma (T, B*k, Z), and h,
        c after the last frame.
        """
        frames, rows, z_dim = noise.shape
        rnn_dim = h.shape[1]
        weights, biases = layers[::2], layers[1::2]

        def room(width, like=from_x, keep=keep):
            """For all frames; without a backward sweep each writes over the one before."""
            return like.new_empty(frames if keep else 1, rows, width).expand(frames, -1, -1)

        h_all = from_x.new_empty(frames + 1, rows, rnn_dim)
        c_all = c.new_empty(frames + 1, rows, rnn_dim)
        h_all[0] = h
        c_all[0] = c
        units = room(2 * z_dim, head_weight, keep=True)
        mean, units_of_sigma = units.chunk(2, dim=2)
        sigma = room(z_dim, c, keep=True)
        # acts holds a_t at first, then activations: relu(a_t^q) and the four gates.
        acts = room(len(h_weight))
        acts_q, gates = acts.tensor_split([-4 * rnn_dim], dim=2)
        z = room(z_dim, c)
        tanh_c = room(rnn_dim, c)
        # of each layer; the last one's is phi_z(z_t), which is returned
        outputs = [room(len(weight)) for weight in weights[:-1]]
        outputs.append(room(len(weights[-1]), keep=True))

        from_h = repeated_product(h_weight, rows)
        head = repeated_layer(head_weight, head_bias, rows)
        add_from_phi_z = repeated_addition(z_weight, rows)
        relu_layer = [
            repeated_layer(weight, bias, rows, "relu") for weight, bias in zip(weights, biases)
        ]

        x_at, noise_at = views(from_x.unsqueeze(2), noise)
        h_at, c_at, tanh_c_at = views(h_all, c_all, tanh_c)
        acts_q_at, gates_at = views(acts_q, gates)
        acts_by_particle_at = acts.unflatten(1, (-1, k)).unbind()
        sigmoids_at = gates[:, :, rnn_dim:].unbind()
        each_gate_at = frame_by_frame(gates.chunk(4, dim=2))
        units_at, z_at = views(units, z)
        mean_at, sigma_at = views(mean, sigma)
        units_of_sigma_at = units_of_sigma.unbind()
        output_at = views(*outputs)

        for t in range(frames):
            # what x_t and h_{t-1} say of z_t and of the gates
            acts_t = acts_by_particle_at[t]
            torch.add(from_h(h_at[t]).view_as(acts_t), x_at[t], out=acts_t)

            # posterior: mean and sigma of z_t
            below = acts_q_at[t].relu_()
            for i in POSTERIOR:
                below = relu_layer[i](below, output_at[i][t])
            head(below.to(head_weight.dtype), units_at[t])
            torch.add(F.softplus(units_of_sigma_at[t]), SIGMA_FLOOR, out=sigma_at[t])

            # z_t and phi_z(z_t)
            torch.addcmul(mean_at[t], sigma_at[t], noise_at[t], out=z_at[t])
            below = z_at[t].to(from_x.dtype)
            for i in PHI_Z:
                below = relu_layer[i](below, output_at[i][t])

            # the LSTM: c_t and h_t
            add_from_phi_z(below, gates_at[t])
            candidate, input_, forget, o = each_gate_at[t]
            candidate.tanh_()
            sigmoids_at[t].sigmoid_()
            torch.mul(forget, c_at[t], out=c_at[t + 1]).addcmul_(input_, candidate)
            torch.tanh(c_at[t + 1], out=tanh_c_at[t])
            torch.mul(o, tanh_c_at[t], out=h_at[t + 1])

            if ancestors is not None:
                for part in (h_at[t + 1], c_at[t + 1]):
                    part.copy_(part[ancestors[t]])

        ctx.k = k
        ctx.ancestors = ancestors
        own = (noise, h_weight, z_weight, head_weight, sigma, h_all, c_all, tanh_c, acts, z)
        ctx.save_for_backward(*own, *outputs, *weights)
        last_h = h_all[-1].to(h.dtype, copy=True)
        return h_all[:-1], outputs[-1], mean, sigma, last_h, c_all[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_h_before, d_phi_z, d_mean, d_sigma, d_h, d_c):
        *own, sigma, h_all, c_all, tanh_c, acts, z = ctx.saved_tensors[:10]
        noise, h_weight, z_weight, head_weight = own
        outputs, weights = ctx.saved_tensors[10:17], ctx.saved_tensors[17:]
        frames, rows, rnn_dim = tanh_c.shape
        acts_q, gates = acts.tensor_split([-4 * rnn_dim], dim=2)
        candidate, input_, forget, o = gates.chunk(4, dim=2)

        # Of pre-activations, in the layout of the forward sweep. d_gates begins as the slopes of
        # c_t, or for the last gate of h_t; the sweep multiplies them by the gradients of those.
        d_acts = torch.empty_like(acts)
        d_acts_q, d_gates = d_acts.tensor_split([-4 * rnn_dim], dim=2)
        d_candidate, d_input, d_forget, d_o = d_gates.chunk(4, dim=2)
        torch.mul(input_, 1 - candidate**2, out=d_candidate)
        torch.mul(candidate, input_ * (1 - input_), out=d_input)
        torch.mul(c_all[:-1], forget * (1 - forget), out=d_forget)
        torch.mul(tanh_c, o * (1 - o), out=d_o)
        h_by_c = o * (1 - tanh_c**2)  # dh / dc

        # Of the head's units for mean and sigma. d_units begins without what comes through z_t.
        # The slope of softplus from its value: d softplus(a) / da = 1 - exp(-softplus(a)).
        sigma_by_units = -torch.expm1(SIGMA_FLOOR - sigma)
        d_units = torch.stack((d_mean, d_sigma * sigma_by_units), dim=2)
        z_by_units = torch.stack((torch.ones_like(noise), noise * sigma_by_units), dim=2)

        # Of h before and after each frame, and of phi_z(z_t): the sweep adds what lies behind.
        d_h_all = torch.cat((d_h_before, d_h.unsqueeze(0).to(d_h_before.dtype)))
        d_phi_z = d_phi_z.clone()
        d_c = d_c.clone()
        d_outputs = [torch.empty_like(output) for output in outputs]

        add_to_h = repeated_addition(h_weight.t(), rows)
        add_to_phi_z = repeated_addition(z_weight.t(), rows)
        to_q = repeated_product(head_weight.t(), rows)
        to_input = [repeated_product(weight.t(), rows) for weight in weights]

        forget_at, h_by_c_at = views(forget, h_by_c)
        z_by_units_at = z_by_units.unbind()
        d_acts_at, d_acts_q_at, d_gates_at, d_o_at = views(d_acts, d_acts_q, d_gates, d_o)
        d_gates_of_c_at = d_gates[:, :, : 3 * rnn_dim].unflatten(2, (3, -1)).unbind()
        acts_q_at, d_h_at, d_phi_z_at, d_units_at = views(acts_q, d_h_all, d_phi_z, d_units)
        output_at = views(*outputs)
        d_output_at = views(*d_outputs)

        for t in reversed(range(frames)):
            d_h_t = d_h_at[t + 1]
            if ctx.ancestors is not None:
                d_h_t = torch.zeros_like(d_h_t).index_add_(0, ctx.ancestors[t], d_h_t)
                d_c = torch.zeros_like(d_c).index_add_(0, ctx.ancestors[t], d_c)

            # the LSTM: from h_t and c_t to its gates and c_{t-1}
            d_c.addcmul_(d_h_t, h_by_c_at[t])
            d_gates_of_c_at[t].mul_(d_c.unsqueeze(1))
            d_o_at[t].mul_(d_h_t)
            d_c.mul_(forget_at[t])

            # phi_z, to z_t
            d = d_phi_z_at[t]
            add_to_phi_z(d_gates_at[t], d)
            for i in reversed(PHI_Z):
                relu_backward(d, output_at[i][t], 0, grad_input=d_output_at[i][t])
                d = to_input[i](d_output_at[i][t])
            d_z = d.to(d_units.dtype)

            # the posterior: mean and sigma, to a_t^q
            d_units_at[t].addcmul_(d_z.unsqueeze(1), z_by_units_at[t])
            d = to_q(d_units_at[t].flatten(1)).to(acts.dtype)
            for i in reversed(POSTERIOR):
                relu_backward(d, output_at[i][t], 0, grad_input=d_output_at[i][t])
                d = to_input[i](d_output_at[i][t])
            relu_backward(d, acts_q_at[t], 0, grad_input=d_acts_q_at[t])

            # to h_{t-1}
            add_to_h(d_acts_at[t], d_h_at[t])

        d_units = d_units.flatten(2)
        d_from_x = d_acts
        if ctx.k > 1:
            d_from_x = d_acts.view(frames, -1, ctx.k, acts.shape[2]).sum(2)
        d_layers = []
        # of each layer: that below it, but for the first of each network
        inputs = [acts_q, *outputs[:2], z.to(acts.dtype), *outputs[3:-1]]
        for d, below in zip(d_outputs, inputs):
            d_layers += [over_all_rows(d, below), d.sum((0, 1))]
        return (
            *(None, None, None, d_from_x, None, d_h_all[0].to(d_c.dtype), d_c),
            over_all_rows(d_units, outputs[2].to(d_units.dtype)),
            d_units.sum((0, 1)),
            over_all_rows(d_acts, h_all[:-1]),
            over_all_rows(d_gates, outputs[-1]),
            *d_layers,
        )


def views(*tensors):
    """For each tensor the views of its frames."""
    return [tensor.unbind() for tensor in tensors]


def frame_by_frame(tensors):
    """For each frame a tuple of its views in several tensors."""
    return list(zip(*views(*tensors)))
