"""The VRNN, its bounds, its evaluation and its training: everything that the three scripts share.

Sections: model, bounds, evaluation, training, run folder, hyperparameters, excerpts, HDF5, arrays, processes, errors.

Shape suffixes: T frames, B sequences, K particles, X samples in a frame, Z latent size. Tensors of (T, B*K, .) hold
particle j of sequence b in row b*K + j. Log-densities are in nats; a bound on log p(x) is reported in nats per frame
(summed over X, averaged over T and B) unless its name says otherwise."""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

SAMPLE_RATE = 16_000
SIGMA_FLOOR = 1e-4  # keeps the sigma of every Gaussian off zero
EVAL_ROWS = 1280  # particles at once in an evaluation
sigmoid_backward, tanh_backward, threshold_backward = (
    getattr(torch.ops.aten, f"{name}_backward").grad_input
    for name in ("sigmoid", "tanh", "threshold")
)


# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """What a model says of T frames of B sequences with K particles each. Nats, per frame and particle."""

    nll_TBK: torch.Tensor  # -log p(x_t | z_<=t, x_<t)
    kl_TBK: torch.Tensor  # KL(q(z_t | x_<=t, z_<t) || p(z_t | x_<t, z_<t)), analytic
    log_w_TBK: (
        torch.Tensor
    )  # log p(x_t | z_<=t, x_<t) + log p(z_t | .) - log q(z_t | .), at the sampled z
    q_mean: torch.Tensor  # (T, B*K, Z)
    q_sigma: torch.Tensor
    prior_mean: torch.Tensor
    prior_sigma: torch.Tensor
    x_mean: torch.Tensor  # (T, B*K, X), without what a filter adds to it
    x_sigma: torch.Tensor
    state: tuple  # after the last frame: h and c, (B*K, R) each, and what the likelihood remembers
    phi_x: torch.Tensor  # of x, (T, B, .), for DReG


def gaussian_log_density(x, mean, sigma):
    """log N(x; mean, sigma^2) summed over the last axis."""
    return (-0.5 * ((x - mean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(q_mean, q_sigma, p_mean, p_sigma):
    """KL(N(q_mean, q_sigma^2) || N(p_mean, p_sigma^2)) summed over the last axis."""
    ratio = q_sigma / p_sigma
    return (0.5 * (ratio**2 + ((q_mean - p_mean) / p_sigma) ** 2 - 1) - ratio.log()).sum(-1)


def sample_gaussian(mean, sigma, generator=None):
    return mean + sigma * torch.randn(
        mean.shape, generator=generator, device=mean.device, dtype=mean.dtype
    )


def mean_and_sigma(units):
    """(., D) each, from the 2D units of a head."""
    mean, sigma = units.chunk(2, dim=-1)
    return mean, F.softplus(sigma) + SIGMA_FLOOR


def step_up(k):
    """Predictor coefficients a_1..a_P, (., P), from reflection coefficients (Levinson's recursion): with all |k_i| < 1
    the poles of 1 / (1 - sum_i a_i z^-i) lie inside the unit circle."""
    a, *others = k.movedim(-1, 0).unsqueeze(
        1
    )  # the axis that grows goes first: its parts are then contiguous
    for k_i in others:
        a = torch.cat((torch.addcmul(a, k_i, a.flip(0), value=-1), k_i))
    return a.movedim(0, -1)


class FrameLikelihood:
    """p(x_t | z_t, h_{t-1}, earlier samples): each sample is predicted from the P before it,
        x_n | x_<n  ~  N(m_n + sum_i a_i x_{n-i}, s_n^2),    a = step_up(0.9999 tanh(.)).
    The decoder's last layer gives m, s (X each) and what a comes from (P), once per frame and particle. The filter runs
    on across frames and windows: the P last samples, (rows, P), are its memory, the last part of the model's state.
    With P = 0 there is none, and given z_t the samples of a frame are independent, as published.
    For another distribution about the prediction replace `density` (its log, summed over samples) and `draw`; for all
    else, methods (of `parameters` the first two are reported as x_mean and x_sigma). The class is VRNN.Likelihood."""

    density, draw = staticmethod(gaussian_log_density), staticmethod(sample_gaussian)

    def __init__(self, x_dim, ar_order):
        self.x_dim, self.ar_order, self.units = x_dim, ar_order, 2 * x_dim + ar_order

    def initialise(self, head, sigma_gain=1.0):
        """Start with the published sigma, and without a filter."""
        head.weight[self.x_dim :].mul_(sigma_gain)
        head.weight[2 * self.x_dim :].zero_()
        head.bias[self.x_dim : 2 * self.x_dim].fill_(0.6)

    def zero_memory(self, like, rows):
        """The parts of the state that are the likelihood's, at a start."""
        return (like.new_zeros(rows, self.ar_order),) if self.ar_order else ()

    def parameters(self, units):
        """m, s (., X) and a (., P) from the units of the decoder's last layer."""
        gaussian, k = units.split([2 * self.x_dim, self.ar_order], dim=-1)
        return *mean_and_sigma(gaussian), step_up(0.9999 * k.tanh()) if self.ar_order else None

    def log_density(self, x_TBX, parameters, memory, k):
        """log p(x_t | .) of each particle, (T, B, k), and the memory after the last frame; parameters: (T, B*k, .)
        each. All samples are predicted at once, in one copy of x, which all particles of a sequence have seen."""
        frames, batch, _ = x_TBX.shape
        mean, sigma, a = (
            part if part is None else part.view(frames, batch, k, -1) for part in parameters
        )
        error = x_TBX.unsqueeze(2)
        if self.ar_order:
            (recent,) = memory
            samples = torch.cat((recent[::k], x_TBX.transpose(0, 1).flatten(1)), dim=1)
            for i, a_i in enumerate(
                a.split(1, dim=-1), start=1
            ):  # no matrix product, which a GPU rounds to TF32
                past = samples[:, self.ar_order - i : -i].view(batch, frames, 1, -1).transpose(0, 1)
                error = torch.addcmul(error, a_i, past, value=-1)
            memory = (samples[:, -self.ar_order :].repeat_interleave(k, dim=0),)
        return self.density(error, mean, sigma), memory

    def sample(self, parameters, memory, generator=None):
        """Draw a frame (rows, X), and the memory after it. parameters: (rows, .) each."""
        mean, sigma, a = parameters
        x = self.draw(mean, sigma, generator)
        if (
            self.ar_order
        ):  # drawn = whiten (recent, x): row n of whiten is (-a_P, ..., -a_1, 1) from column n on
            (recent,), width = memory, self.ar_order + self.x_dim
            rows = F.pad(
                torch.cat((-a.flip(-1), torch.ones_like(a[:, :1])), dim=1), (0, self.x_dim)
            )
            whiten = rows.repeat(1, self.x_dim)[:, : self.x_dim * width].view(-1, self.x_dim, width)
            of_recent, of_x = whiten.split([self.ar_order, self.x_dim], dim=2)
            drawn = x.unsqueeze(2) - of_recent @ recent.unsqueeze(2)
            x = torch.linalg.solve_triangular(of_x, drawn, upper=False, unitriangular=True).squeeze(
                2
            )
            memory = (torch.cat((recent, x), dim=1)[:, self.x_dim :],)
        return x, memory


def by_onednn(rows, weight):
    """Whether to ask oneDNN for a product with so many rows: on a CPU in float32, where there is much to multiply, it
    is faster than the library that PyTorch asks on AMD, and as fast on Intel. To set it up takes 20 us."""
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() >= 1 << 17
        and rows * weight.numel() >= 1 << 24
        and torch.backends.mkldnn.is_available()
    )


def onednn(weight, bias, then, x, out=None):
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return y if out is None else out.copy_(y)


def product(x, weight, bias=None):
    """x weight^T + bias, for x of (., in) and weight of (out, in)."""
    return (
        onednn(weight, bias, "none", x)
        if by_onednn(x.shape[:-1].numel(), weight)
        else F.linear(x, weight, bias)
    )


def framewise(weight, rows, bias=None):
    """For what every frame multiplies by: the function from x, of at most (rows, in), to x weight^T or, with a bias, to
    relu(x weight^T + bias), written to its second argument if any. To lay the weight out saves up to half the time."""
    if by_onednn(rows, weight):
        return functools.partial(onednn, weight, bias, "none" if bias is None else "relu")
    transposed = weight.t().contiguous()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x, out=None: torch._addmm_activation(bias, x, transposed, out=out)


def laid_out(network, rows, dtype):
    """The function that a network is for x of at most (rows, in), without a gradient; its hidden layers in a dtype."""
    *hidden, head = network
    layers = [
        framewise(layer.weight.to(dtype), rows, layer.bias.to(dtype))
        for layer in hidden
        if isinstance(layer, Linear)
    ]
    if isinstance(head, Head):
        from_hidden = framewise(head.weight, rows)
        layers.append(lambda x: from_hidden(x.to(head.weight.dtype)).add_(head.bias))
    return lambda x: functools.reduce(lambda below, layer: layer(below), layers, x)


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
        return (
            d_x,
            over_all_rows(d, x),
            d.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear in the precision of its input."""

    def forward(self, x):
        return Product.apply(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class Head(Linear):
    """The last layer of a network, in the precision of its parameters, whatever that of the layers before it."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def relu_layers(*sizes):
    return [
        layer
        for fan_in, fan_out in zip(sizes, sizes[1:])
        for layer in (Linear(fan_in, fan_out), nn.ReLU())
    ]


def lstm_cell(gates, c):
    """One LSTM step from pre-activations (rows, 4R) in the published order: candidate, input, forget, output."""
    candidate, i, f, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
    return o.sigmoid() * c.tanh(), c


class Recurrence(torch.autograd.Function):
    """The part of a rollout that must run frame by frame, with its gradient written out.

        a_t = from_x_t + [posterior_h | lstm_h] h_{t-1},    split into a_t^q and a_t^gates
        q_mean_t, q_sigma_t = head(ReLU layers(relu(a_t^q))),    z_t = q_mean_t + q_sigma_t * noise_t
        h_t, c_t = lstm_cell(a_t^gates + lstm_z phi_z(z_t), c_{t-1})

    The backward sweep carries gradients of activations from frame to frame, and leaves those of pre-activations in
    `d_*` for all frames, so that the gradient of each weight is one product over all T*B*K rows. Products are in the
    precision of from_x, but for the head; noise, z, c, mean and sigma keep their own. Ancestors get no gradient."""

    @staticmethod
    def forward(
        ctx, k, keep, ancestors, from_x, noise, h, c, head, head_bias, h_weight, z_weight, *layers
    ):
        """from_x: (T, B, Q + 4R); noise: (T, B*k, Z); h, c: (B*k, R). keep: whether a backward sweep will follow. head:
        the posterior's. layers: weight and bias of its second to fourth layer, and of the four of phi_z. Returns
        h_before (T, B*k, R), phi_z (T, B*k, P), q_mean, q_sigma (T, B*k, Z), and h, c after the last frame."""
        (frames, rows, z_dim), rnn_dim, layers = (
            noise.shape,
            h.shape[1],
            list(zip(layers[::2], layers[1::2])),
        )
        posterior, phi_z = layers[:3], layers[3:]

        def room(
            width, like=from_x, keep=keep
        ):  # without a backward sweep every frame writes over the one before
            return like.new_empty(frames if keep else 1, rows, width).expand(frames, -1, -1)

        h_all, c_all = (
            from_x.new_empty(frames + 1, rows, rnn_dim),
            c.new_empty(frames + 1, rows, rnn_dim),
        )
        h_all[0], c_all[0] = h, c
        mean, sigma, last_phi_z = (
            room(z_dim, c, True),
            room(z_dim, c, True),
            room(len(phi_z[-1][0]), keep=True),
        )
        pre, tanh_c, z = room(len(h_weight)), room(rnn_dim, c), room(z_dim, c)
        q, f = ([room(len(weight)) for weight, _ in stack] for stack in (posterior, phi_z[:-1]))
        f.append(last_phi_z)
        from_h, from_z, from_q = (
            framewise(h_weight, rows),
            framewise(z_weight, rows),
            framewise(head, rows),
        )
        q_layers, f_layers = (
            [framewise(weight, rows, bias) for weight, bias in stack]
            for stack in (posterior, phi_z)
        )
        # .._at[t]: views of single frames, made once, since to make them in the loop takes longer than small products
        pre_q, gates = pre.tensor_split([-4 * rnn_dim], dim=2)
        (
            x_at,
            noise_at,
            h_at,
            c_at,
            mean_at,
            sigma_at,
            z_at,
            tanh_c_at,
            pre_at,
            pre_q_at,
            gates_at,
            sigmoids_at,
            gate_at,
            q_at,
            f_at,
        ) = frame_by_frame(
            from_x.unsqueeze(2),
            noise,
            h_all,
            c_all,
            mean,
            sigma,
            z,
            tanh_c,
            pre.unflatten(1, (-1, k)),
            pre_q,
            gates,
            gates[:, :, rnn_dim:],
            gates.chunk(4, dim=2),
            q,
            f,
        )
        for t in range(frames):
            torch.add(from_h(h_at[t]).view_as(pre_at[t]), x_at[t], out=pre_at[t])
            below = pre_q_at[t].relu_()
            for layer, out in zip(q_layers, q_at[t]):
                below = layer(below, out)
            pre_mean, pre_sigma = from_q(below.to(head.dtype)).add_(head_bias).chunk(2, dim=1)
            mean_at[t].copy_(pre_mean)
            torch.add(F.softplus(pre_sigma), SIGMA_FLOOR, out=sigma_at[t])
            below = torch.addcmul(mean_at[t], sigma_at[t], noise_at[t], out=z_at[t]).to(
                from_x.dtype
            )
            for layer, out in zip(f_layers, f_at[t]):
                below = layer(below, out)
            gates_at[t].add_(from_z(below))
            candidate, i, forget, o = gate_at[t]
            candidate.tanh_()
            sigmoids_at[t].sigmoid_()
            torch.mul(forget, c_at[t], out=c_at[t + 1]).addcmul_(i, candidate)
            torch.mul(o, torch.tanh(c_at[t + 1], out=tanh_c_at[t]), out=h_at[t + 1])
            if ancestors is not None:
                for part in (h_at[t + 1], c_at[t + 1]):
                    part.copy_(part[ancestors[t]])
        ctx.k, ctx.ancestors = k, ancestors
        ctx.save_for_backward(
            noise,
            h_weight,
            z_weight,
            head,
            sigma,
            h_all,
            c_all,
            tanh_c,
            pre,
            z,
            *q,
            *f,
            *(weight for weight, _ in layers),
        )
        return (
            h_all[:-1],
            last_phi_z,
            mean,
            sigma,
            h_all[-1].to(h.dtype, copy=True),
            c_all[-1].clone(),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, d_h_before, d_phi_z, d_mean, d_sigma, d_h, d_c):
        noise, h_weight, z_weight, head, sigma, h_all, c_all, tanh_c, pre, z, *rest = (
            ctx.saved_tensors
        )
        q, f, posterior, phi_z = rest[:3], rest[3:7], rest[7:10], rest[10:]
        frames, rows, rnn_dim = tanh_c.shape
        d_pre, d_head = torch.empty_like(pre), head.new_empty(frames, rows, len(head))
        d_q, d_f = ([torch.empty_like(out) for out in outputs] for outputs in (q, f))
        d_h, d_c, scratch = d_h.clone(), d_c.clone(), torch.empty_like(d_c)
        slope = -torch.expm1(SIGMA_FLOOR - sigma)  # of softplus, from its value
        (pre_q, gates), (d_pre_q, d_gates) = (
            both.tensor_split([-4 * rnn_dim], dim=2) for both in (pre, d_pre)
        )
        noise_at, c_at, tanh_c_at, slope_at, pre_q_at, d_h_at, d_phi_z_at, d_mean_at, d_sigma_at = (
            frame_by_frame(noise, c_all, tanh_c, slope, pre_q, d_h_before, d_phi_z, d_mean, d_sigma)
        )
        d_pre_at, d_pre_q_at, d_gates_at, d_head_at, gate_at, d_gate_at, d_heads_at = (
            frame_by_frame(
                d_pre,
                d_pre_q,
                d_gates,
                d_head,
                gates.chunk(4, dim=2),
                d_gates.chunk(4, dim=2),
                d_head.chunk(2, dim=2),
            )
        )
        to_h, to_phi_z, to_q = (
            framewise(weight.t(), rows) for weight in (h_weight, z_weight, head)
        )
        q_at, d_q_at, f_at, d_f_at = frame_by_frame(
            *(outputs[::-1] for outputs in (q, d_q, f, d_f))
        )  # last first
        below_q, below_f = (
            [framewise(weight.t(), rows) for weight in stack[::-1]] for stack in (posterior, phi_z)
        )
        for t in reversed(range(frames)):
            if ctx.ancestors is not None:
                d_h, d_c = (
                    torch.zeros_like(d).index_add_(0, ctx.ancestors[t], d) for d in (d_h, d_c)
                )
            candidate, i, forget, o = gate_at[t]
            d_candidate, d_i, d_forget, d_o = d_gate_at[t]
            d_c.add_(torch.ops.aten.tanh_backward(torch.mul(d_h, o, out=scratch), tanh_c_at[t]))
            sigmoid_backward(torch.mul(d_h, tanh_c_at[t], out=scratch), o, grad_input=d_o)
            sigmoid_backward(torch.mul(d_c, candidate, out=scratch), i, grad_input=d_i)
            sigmoid_backward(torch.mul(d_c, c_at[t], out=scratch), forget, grad_input=d_forget)
            tanh_backward(torch.mul(d_c, i, out=scratch), candidate, grad_input=d_candidate)
            d_c.mul_(forget)

            d = to_phi_z(d_gates_at[t]).add_(d_phi_z_at[t])
            for to_input, out, d_out in zip(below_f, f_at[t], d_f_at[t]):
                d = to_input(threshold_backward(d, out, 0, grad_input=d_out))
            d_z, (d_pre_mean, d_pre_sigma) = d.to(d_mean.dtype), d_heads_at[t]
            torch.add(d_z, d_mean_at[t], out=d_pre_mean)
            torch.mul(d_z.mul_(noise_at[t]).add_(d_sigma_at[t]), slope_at[t], out=d_pre_sigma)
            d = to_q(d_head_at[t]).to(pre.dtype)
            for to_input, out, d_out in zip(below_q, q_at[t], d_q_at[t]):
                d = to_input(threshold_backward(d, out, 0, grad_input=d_out))
            threshold_backward(d, pre_q_at[t], 0, grad_input=d_pre_q_at[t])
            torch.add(to_h(d_pre_at[t]), d_h_at[t], out=d_h)

        d_from_x = d_pre.view(frames, -1, ctx.k, pre.shape[2]).sum(2) if ctx.k > 1 else d_pre
        d_weights = [
            over_all_rows(d_head, q[-1].to(d_head.dtype)),
            d_head.sum((0, 1)),
            over_all_rows(d_pre, h_all[:-1]),
            over_all_rows(d_gates, f[-1]),
        ]
        for d, below in zip([*d_q, *d_f], [pre_q, *q[:-1], z.to(pre.dtype), *f[:-1]]):
            d_weights += over_all_rows(d, below), d.sum((0, 1))
        return None, None, None, d_from_x, None, d_h, d_c, *d_weights


def frame_by_frame(*parts):
    """[views of the single frames of a tensor, or tuples of those of several tensors], for each part."""
    return [
        part.unbind() if torch.is_tensor(part) else list(zip(*map(torch.unbind, part)))
        for part in parts
    ]


def over_all_rows(d, below):
    """Gradient of a weight from those of its outputs and from its inputs, both (., rows, .)."""
    return d.flatten(0, -2).t() @ below.flatten(0, -2)


class VRNN(nn.Module):
    """Variational RNN (Chung et al. 2015, arXiv 1506.02216, equations 5-11) with Gaussian prior, posterior and output.
    Every network has four ReLU layers before its Gaussian head. A first layer that sees two inputs is the sum of two
    products, so that the one with phi_x(x_t) can run before the recurrence. With z_dim = 0 what is left is an LSTM,
    whose log p(x) is exact. ar_order: see Likelihood. tests/plain.py is the same model in 50 lines, slowly."""

    Likelihood = FrameLikelihood

    def __init__(
        self, x_dim, z_dim, rnn_dim, q_z_dim, p_z_dim, p_x_dim, x2s_dim, z2s_dim, ar_order=0
    ):
        super().__init__()
        self.x_dim, self.z_dim, self.rnn_dim = x_dim, z_dim, rnn_dim
        self.likelihood = self.Likelihood(x_dim, ar_order)
        self.bf16 = False  # products in bfloat16, except for those of the Gaussian heads
        self.phi_x = nn.Sequential(*relu_layers(x_dim, *[x2s_dim] * 4))
        if z_dim:
            self.phi_z = nn.Sequential(*relu_layers(z_dim, *[z2s_dim] * 4))
            self.posterior_x = Linear(x2s_dim, q_z_dim)
            self.posterior_h = Linear(rnn_dim, q_z_dim, bias=False)
            self.posterior = nn.Sequential(
                nn.ReLU(), *relu_layers(*[q_z_dim] * 4), Head(q_z_dim, 2 * z_dim)
            )
            self.prior = nn.Sequential(
                *relu_layers(rnn_dim, *[p_z_dim] * 4), Head(p_z_dim, 2 * z_dim)
            )
            self.decoder_z = Linear(z2s_dim, p_x_dim)
        self.decoder_h = Linear(rnn_dim, p_x_dim, bias=not z_dim)
        self.decoder = nn.Sequential(
            nn.ReLU(), *relu_layers(*[p_x_dim] * 4), Head(p_x_dim, self.likelihood.units)
        )
        self.lstm_x = Linear(x2s_dim, 4 * rnn_dim)
        if z_dim:
            self.lstm_z = Linear(z2s_dim, 4 * rnn_dim, bias=False)
        self.lstm_h = Linear(rnn_dim, 4 * rnn_dim, bias=False)
        self.initialise()

    def parts(self, *names):
        """Those of its networks and layers that it has: without z some are missing."""
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @torch.no_grad()
    def initialise(self):
        """Published: uniform(-0.08, 0.08), zero biases, sigma biases 0.6, orthogonal recurrent blocks. Here 600 inputs
        give 0.08, and fewer more: at a fixed 0.08 narrow four-layer stacks pass no signal and z stays unused."""
        for p in self.parameters():
            bound = 0.08 * math.sqrt(600 / p.shape[-1])
            p.uniform_(-bound, bound) if p.dim() == 2 else p.zero_()
        for network in self.parts("posterior", "prior"):
            network[-1].bias.chunk(2)[1].fill_(0.6)
        self.likelihood.initialise(self.decoder[-1])
        for block in self.lstm_h.weight.chunk(4):
            nn.init.orthogonal_(block)

    @torch.no_grad()
    def mirror(self):
        """Initialise such that z is of use from the first update on. Every stack of ReLU layers starts as an orthogonal
        linear map: units come in pairs of opposite weights, and relu(a) - relu(-a) = a (looks-linear initialisation,
        Balduzzi et al. 2017, arXiv 1702.08591); independent weights in the sixteen layers from x to its reconstruction
        map all inputs to nearly the same output. A narrow posterior lets z tell more of x than of noise."""
        stacks = self.parts("phi_x", "phi_z", "posterior", "prior", "decoder")
        heads = [stack[-1] for stack in stacks if isinstance(stack[-1], Head)]
        to_no_relu = self.parts("lstm_x", "lstm_z") + heads
        from_no_relu = self.parts("posterior_h", "decoder_h") + [stack[0] for stack in stacks]
        for layer in [
            *(layer for stack in stacks for layer in stack if type(layer) is Linear),
            *self.parts("posterior_x", "decoder_z", "posterior_h", "decoder_h"),
            *to_no_relu,
        ]:
            signs = torch.outer(
                *(
                    torch.tensor([1.0] if layer in unpaired else [1.0, -1.0])
                    for unpaired in (to_no_relu, from_no_relu)
                )
            )
            rows, columns = (
                math.ceil(size / copies) for size, copies in zip(layer.weight.shape, signs.shape)
            )
            weight = math.sqrt(max(1, rows / columns)) * nn.init.orthogonal_(
                torch.empty(rows, columns)
            )
            weight = torch.kron(signs, weight)[: layer.out_features, : layer.in_features]
            layer.weight.copy_((0.3 if layer in heads else 1.0) * weight)
        for network, bias in zip(
            self.parts("posterior", "prior"), (-1.5, 0.6)
        ):  # sigmas of 0.2 and 1.0
            network[-1].weight.chunk(2)[1].mul_(0.1)
            network[-1].bias.chunk(2)[1].fill_(bias)
        self.likelihood.initialise(self.decoder[-1], sigma_gain=0.1)

    def zero_state(self, rows):
        zeros = self.lstm_h.weight.new_zeros(rows, self.rnn_dim)
        return zeros, zeros, *self.likelihood.zero_memory(zeros, rows)

    def decode(self, phi_z, h_before):
        """Parameters of the likelihood of x_t, from phi_z(z_t), None where there is no z, and h_{t-1}."""
        from_h = self.decoder_h(h_before)
        return self.likelihood.parameters(
            self.decoder(from_h if phi_z is None else self.decoder_z(phi_z) + from_h)
        )

    def forward(self, x_TBX, state=None, noise=None, k=1, ancestors=None):
        """Sample z from the posterior along x_TBX and score both; returns a Rollout. state: as returned, or
        zero_state(B*k) if None; what it remembers of x must be the same in the k rows of a sequence. noise: standard
        normal (T, B*k, Z), drawn if None. ancestors: (T, B*k), the row whose state each row goes on with after a frame,
        of the same sequence; its own if None. The k particles of a sequence share phi_x(x_t)."""
        h, c, *memory = self.zero_state(x_TBX.shape[1] * k) if state is None else state
        phi_x = self.phi_x(x_TBX.bfloat16() if self.bf16 else x_TBX)
        if noise is None:
            noise = torch.randn(len(x_TBX), len(h), self.z_dim, dtype=h.dtype, device=h.device)
        if self.z_dim:
            from_x, h_weight = self.into_posterior_and_lstm(phi_x)
            *layers, head, bias = self.posterior.parameters()
            layers = [
                part.to(phi_x.dtype)
                for part in (self.lstm_z.weight, *layers, *self.phi_z.parameters())
            ]
            h_before, phi_z, q_mean, q_sigma, next_h, next_c = Recurrence.apply(
                k,
                torch.is_grad_enabled(),
                ancestors,
                from_x,
                noise,
                h,
                c,
                head,
                bias,
                h_weight,
                *layers,
            )
            prior = mean_and_sigma(self.prior(h_before))
        else:
            phi_z, gates = None, self.lstm_x(phi_x).repeat_interleave(k, 1)
            h_before, next_h, next_c = self.along(gates, h, c)
            q_mean, q_sigma, *prior = [noise] * 4
        decoded = self.decode(phi_z, h_before)
        log_px, memory = self.likelihood.log_density(x_TBX, decoded, memory, k)
        log_pz = gaussian_log_density(q_mean + q_sigma * noise, *prior)
        log_qz = (-0.5 * noise**2 - q_sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        kl = gaussian_kl(q_mean, q_sigma, *prior)
        return Rollout(
            -log_px,
            kl.view_as(log_px),
            log_px + (log_pz - log_qz).view_as(log_px),
            q_mean,
            q_sigma,
            *prior,
            *decoded[:2],
            state=(next_h, next_c, *memory),
            phi_x=phi_x,
        )

    def into_posterior_and_lstm(self, phi_x):
        """What x adds to the posterior's first layer and the gates, (T, B, Q + 4R); h's weights there, (Q + 4R, R)."""
        for layer in (*self.posterior, *self.phi_z, *self.prior, *self.decoder):
            if type(layer) not in (
                Linear,
                Head,
                nn.ReLU,
            ):  # the written-out recurrence would pass it over
                raise UserError(
                    f"a VRNN with a {type(layer).__name__} needs a forward of its own; write one"
                )
        x_weight, x_bias, h_weight = (
            torch.cat(both).to(phi_x.dtype)
            for both in (
                (self.posterior_x.weight, self.lstm_x.weight),
                (self.posterior_x.bias, self.lstm_x.bias),
                (self.posterior_h.weight, self.lstm_h.weight),
            )
        )
        return Product.apply(phi_x, x_weight, x_bias), h_weight

    def __init_subclass__(cls):
        if {"forward", "decode"} & vars(cls).keys() and "stepper" not in vars(cls):
            cls.stepper = None  # it would not know of them

    @torch.no_grad()
    def stepper(self, x_TBX, state, k):
        """`forward` frame by frame: a state, and two functions. weigh(t, state, noise): log_w_BK of frame t, by noise
        (B*k, Z), and the particles. go_on(particles, ancestors): the state in which row i has gone on with particle
        ancestors[i]. What sees h alone runs once for all children of a particle, since few have any (not on a GPU)."""
        phi_x, rows = self.phi_x(x_TBX.bfloat16() if self.bf16 else x_TBX), x_TBX.shape[1] * k
        from_x, h_weight = self.into_posterior_and_lstm(phi_x)
        posterior, phi_z, prior, decoder = (
            laid_out(network, rows, phi_x.dtype)
            for network in (self.posterior, self.phi_z, self.prior, self.decoder)
        )
        from_h, gates_from_z, decoder_from_h, decoder_from_z = (
            framewise(weight.to(phi_x.dtype), rows)
            for weight in (
                h_weight,
                self.lstm_z.weight,
                self.decoder_h.weight,
                self.decoder_z.weight,
            )
        )
        decoder_bias, own = (
            self.decoder_z.bias.to(phi_x.dtype),
            torch.arange(rows, device=x_TBX.device),
        )

        def weigh(t, state, noise):
            parents, parent_of, h, c, *memory = (
                state  # h and c of the parents; parent_of: each row's, among them
            )
            h = h.to(phi_x.dtype)
            below_q, gates = (from_h(h) + from_x[t, parents // k]).tensor_split(
                [-4 * self.rnn_dim], dim=1
            )
            q, p = (
                [part[parent_of] for part in mean_and_sigma(units)]
                for units in (posterior(below_q.relu()), prior(h))
            )
            z = torch.addcmul(*q, noise)
            from_z = phi_z(z.to(phi_x.dtype))
            below_x = (
                (decoder_from_z(from_z) + decoder_bias).add_(decoder_from_h(h)[parent_of]).relu()
            )
            decoded = self.likelihood.parameters(decoder(below_x).unsqueeze(0))
            log_px, memory = self.likelihood.log_density(x_TBX[t : t + 1], decoded, memory, k)
            log_pz, log_qz = (gaussian_log_density(z, *of_z) for of_z in (p, q))
            return log_px[0] + (log_pz - log_qz).view(-1, k), (from_z, parent_of, gates, c, *memory)

        def go_on(particles, ancestors):
            from_z, parent_of, gates, c, *memory = particles
            on_cpu = own.device.type == "cpu"
            parents, next_parent_of = (
                ancestors.unique(return_inverse=True) if on_cpu else (ancestors, own)
            )
            theirs = parent_of[parents]
            h, c = lstm_cell(gates_from_z(from_z[parents]).add_(gates[theirs]), c[theirs])
            return parents, next_parent_of, h, c, *(part[ancestors] for part in memory)

        return (own, own, *(self.zero_state(rows) if state is None else state)), weigh, go_on

    def along(self, gates, h, c):
        """h_{t-1} of each frame, (T, rows, R), and h, c after the last, from what x and z add to the gates."""
        h_before = []
        for gates_t in gates:
            h_before.append(h)
            h, c = lstm_cell(gates_t + self.lstm_h(h.to(gates.dtype)), c)
        return torch.stack(h_before).to(gates.dtype), h, c

    @torch.no_grad()
    def generate(self, frames, batch, generator=None, state=None, heard=None):
        """Sample x (frames, batch, X) from the model itself: z_t from the prior given h_{t-1}, x_t from the decoder;
        state: that after what is to be continued, of `batch` rows; zero_state(batch) if None. Or resynthesise `heard`,
        of that shape: z_t from its posterior, h along it, and the filter along what is drawn."""
        h, c, *memory = self.zero_state(batch) if state is None else state
        x, phi_x, phi_z, from_z = [], None if heard is None else self.phi_x(heard), None, 0.0
        for t in range(frames):
            if self.z_dim:
                of_z = (
                    self.prior(h)
                    if heard is None
                    else self.posterior(self.posterior_x(phi_x[t]) + self.posterior_h(h))
                )
                phi_z = self.phi_z(sample_gaussian(*mean_and_sigma(of_z), generator))
                from_z = self.lstm_z(phi_z)
            x_t, memory = self.likelihood.sample(self.decode(phi_z, h), memory, generator)
            from_x = self.lstm_x(self.phi_x(x_t) if heard is None else phi_x[t])
            h, c = lstm_cell(from_x + from_z + self.lstm_h(h), c)
            x.append(x_t)
        return torch.stack(x)

    @torch.no_grad()
    def constrain_weights(self, max_norm):
        """Rescale the incoming weights of each unit to norm at most max_norm, as published for W (not U, not b)."""
        for name, layer in self.named_modules():
            if isinstance(layer, Linear) and name != "lstm_h":
                norm = layer.weight.norm(dim=1, keepdim=True)
                is_longer = norm > max_norm * (
                    1 + 1e-6
                )  # but for rounding: to constrain twice is to constrain once
                layer.weight.mul_(torch.where(is_longer, max_norm / norm, 1.0))


# ---- bounds ---------------------------------------------------------------------------------------------------------


def importance_weighted(log_w_BK):
    """log of the mean weight of K particles, (B,): the bound of Burda et al. 2015 (arXiv 1509.00519), equation 8."""
    return log_w_BK.logsumexp(dim=1) - math.log(log_w_BK.shape[1])


@torch.no_grad()
def estimate_bounds(model, x_TBX, ks, generator, max_rows=EVAL_ROWS):
    """Lower bounds on log p(x) of each sequence from a zero state, by K = max(ks) particles, max_rows at once in all.
    model: anything with `z_dim` and model(x_TBX, state, noise, k) -> Rollout. Returns {name: (B,) float64, in nats per
    sequence}: `elbo` (analytic KL) and its `kl`, over all particles; `elbo_K`, by sampled log-weights, and their
    deviation `log_w_std`; for k in ks `iwae_k`, averaged over K // k disjoint groups, and their `ess_iwae_k`."""
    (frames, batch, _), particles, rollouts = x_TBX.shape, max(ks), []
    drawn = torch.arange(particles if model.z_dim else 1)  # without z all particles are the same
    for k in map(len, drawn.split(max(1, max_rows // batch))):
        noise = torch.randn(
            frames,
            batch * k,
            model.z_dim,
            generator=generator,
            dtype=x_TBX.dtype,
            device=x_TBX.device,
        )
        rollout = model(x_TBX, None, noise, k)
        rollouts.append(
            [part.double().sum(0) for part in (rollout.nll_TBK, rollout.kl_TBK, rollout.log_w_TBK)]
        )
    nll_BK, kl_BK, log_w_BK = (
        torch.cat(parts, dim=1).expand(-1, particles) for parts in zip(*rollouts)
    )
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


def effective_sample_size(log_w_BK):
    """(sum_k w_k)^2 / sum_k w_k^2 of each sequence, (B,): K for equal weights, 1 where one particle has them all."""
    return (2 * log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1)).exp()


def particle_filter(model, x_TBX, state, noise, uniform_TB, k, resample_last=False):
    """Sample z of k particles frame by frame, and resample them whenever their effective sample size falls under k / 2.
    The log-mean-weights at each resampling and after the last frame add up to the bound of Maddison et al. 2017 (FIVO,
    arXiv 1705.09279, algorithm 1). Gradients flow through weights and states, not through the choice of ancestors.
    model: as in estimate_bounds; x_TBX and state: as in VRNN.forward; noise: T standard normal tensors (B*k, Z);
    uniform_TB: on [0, 1), for the resampling. resample_last: to resample at the last frame in any case, as who carries
    the states on must: weights stay behind. Returns log_likelihood_TB (log of an unbiased estimate of p(x_1..x_t), in
    nats), ess_TB (before resampling), resampled_TB, and as in VRNN.forward ancestors and, with gradients, the state."""

    def weigh(t, state, noise):
        rollout = model(x_TBX[t : t + 1], state, noise.unsqueeze(0), k)
        return rollout.log_w_TBK[0], rollout.state

    def go_on(state, ancestors):
        return tuple(part[ancestors] for part in state)

    if model.z_dim and getattr(model, "stepper", None) and not torch.is_grad_enabled():
        state, weigh, go_on = model.stepper(x_TBX, state, k)
    own_BK = torch.arange(k * x_TBX.shape[1], device=x_TBX.device).view(-1, k)
    log_w_BK, gathered_B, found = 0.0, 0.0, []
    for t, (frame_noise, uniform_B) in enumerate(zip(noise, uniform_TB)):
        frame_log_w_BK, particles = weigh(t, state, frame_noise)
        log_w_BK = log_w_BK + frame_log_w_BK
        log_likelihood_B = gathered_B + importance_weighted(log_w_BK)
        ess_B = effective_sample_size(log_w_BK.detach())
        resampled_B = ess_B < (math.inf if resample_last and t == len(x_TBX) - 1 else k / 2)
        gathered_B = torch.where(resampled_B, log_likelihood_B, gathered_B)
        resampled_B1 = resampled_B.unsqueeze(1)
        points_BK = (
            own_BK[0] + uniform_B.unsqueeze(1)
        ) / k  # particle j holds floor or ceil of K w_j / sum w of them
        drawn_BK = torch.searchsorted(
            log_w_BK.detach().softmax(dim=1).cumsum(dim=1), points_BK
        ).clamp(max=k - 1)
        ancestors = torch.where(resampled_B1, own_BK[:, :1] + drawn_BK, own_BK).flatten()
        log_w_BK = torch.where(resampled_B1, 0.0, log_w_BK)
        state = go_on(particles, ancestors)
        found.append((log_likelihood_B, ess_B, resampled_B, ancestors))
    by_name = zip(("log_likelihood_TB", "ess_TB", "resampled_TB", "ancestors"), zip(*found))
    return SimpleNamespace(**{name: torch.stack(frames) for name, frames in by_name}, state=state)


@torch.no_grad()
def estimate_smc(model, x_TBX, k, generator, max_rows=EVAL_ROWS):
    """The particle filter's log_likelihood_TB from a zero state, whose mean is a bound, and ess_TB, in float64; model:
    as in estimate_bounds. No more than max_rows particles are there at once, or k."""
    k, same, found = (
        (k, 1, []) if model.z_dim else (1, k, [])
    )  # without z all particles are the same: one is run
    drawn_like_x = dict(generator=generator, dtype=x_TBX.dtype, device=x_TBX.device)
    for x in x_TBX.split(max(1, max_rows // k), dim=1):
        uniform_TB = torch.rand(x.shape[:2], **drawn_like_x)
        noise = (
            torch.randn(rows, model.z_dim, **drawn_like_x) for rows in [x.shape[1] * k] * len(x)
        )
        filtering = particle_filter(model, x, None, noise, uniform_TB, k)
        found.append((filtering.log_likelihood_TB.double(), same * filtering.ess_TB.double()))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*found))


# ---- evaluation -----------------------------------------------------------------------------------------------------

EVAL_BATCH = 128  # windows; fixed, because the evaluation noise is drawn batch by batch
EVAL_SEED = 2015  # not the training seed: every run is evaluated with the same noise
BOUNDS = ("elbo", "iwae", "smc")  # so begin the names of bounds on log p(x)


def bits_per_sample(nats_per_frame, x_dim, std):
    """Upper bound on the bits per 16-bit sample of a code made from the model; std is that of the data, in LSB."""
    return (math.log(std) - nats_per_frame / x_dim) / math.log(2)


def frames_at(split, starts, frames, x_dim, corpus, generator):
    """Dequantised audio from each start on, normalised, on the device of the generator: (frames, len(starts), X)."""
    pcm = torch.from_numpy(split.read(starts, frames * x_dim)).to(generator.device)
    pcm = pcm.view(len(pcm), frames, x_dim).transpose(0, 1)
    return normalise(
        pcm, corpus, torch.rand(pcm.shape, generator=generator, device=generator.device)
    )


def batches_of_windows(
    split, frames, x_dim, corpus, device="cpu", at_most=math.inf, rank=0, processes=1
):
    """Yield (starts, x_TBX, generator) of every processes-th batch of windows, each dequantised with its generator."""
    starts = window_starts(split, frames * x_dim, at_most)
    for index in range(rank, math.ceil(len(starts) / EVAL_BATCH), processes):
        generator = torch.Generator(device).manual_seed(EVAL_SEED + index)
        chosen = starts[index * EVAL_BATCH : (index + 1) * EVAL_BATCH]
        yield chosen, frames_at(split, chosen, frames, x_dim, corpus, generator), generator


def window_bounds(model, corpus, split, ks, seq_frames, at_most=math.inf, smc=0):
    """The bounds of estimate_bounds on each window of a split, {name: (windows,)}; with smc > 0 particles also `smc_k`
    and `ess_smc_k` (mean over frames). All models of a size, in any number of processes, get the same noise."""
    device, mine = next(model.parameters()).device, {}
    for starts, x_TBX, generator in batches_of_windows(
        split, seq_frames, model.x_dim, corpus, device, at_most, *job()
    ):
        bounds = estimate_bounds(model, x_TBX, ks, generator)
        if smc:
            estimate_TB, ess_TB = estimate_smc(model, x_TBX, smc, generator)
            bounds |= {f"smc_{smc}": estimate_TB[-1], f"ess_smc_{smc}": ess_TB.mean(0)}
        mine[starts[0]] = {name: bound.cpu() for name, bound in bounds.items()}
    _, batches = zip(*sorted(item for part in gather(mine) for item in part.items()))
    return {name: torch.cat([bounds[name] for bounds in batches]) for name in batches[0]}


def summarise(by_window, seq_frames, x_dim, corpus):
    """Means over windows: {bound: {nats_per_frame, stderr, nats_per_sequence, bits_per_sample}}, stderr over windows.
    What is no bound has no bits (kl and log_w_std), or {mean, stderr} alone (effective sample sizes, in particles)."""
    result = {}
    for name, values in by_window.items():
        mean, stderr = (
            values.mean().item(),
            (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None,
        )
        result[name] = (
            dict(mean=mean, stderr=stderr)
            if name.startswith("ess")
            else dict(
                nats_per_frame=mean / seq_frames,
                stderr=stderr and stderr / seq_frames,
                nats_per_sequence=mean,
            )
        )
        if not name.startswith(("kl", "log_w_std", "ess")):
            result[name]["bits_per_sample"] = bits_per_sample(mean / seq_frames, x_dim, corpus.std)
    return result


def evaluate_recordings(model, corpus, split, k, at_most):
    """smc_k on whole recordings from a zero state, at_most of them evenly spread, and FLAC on the same: means over all
    frames, and stderr over recordings, of the ratio of their nats to their frames."""
    lengths = np.diff(split.offsets) // model.x_dim
    usable = np.flatnonzero(lengths)
    chosen = usable[np.linspace(0, len(usable) - 1, min(at_most, len(usable))).round().astype(int)]
    chosen = chosen[
        lengths[chosen].argsort(kind="stable")
    ]  # so that little of a batch lies after the end
    generator = torch.Generator(next(model.parameters()).device).manual_seed(EVAL_SEED)
    frames, nats, ess, found = lengths[chosen], [], [], {}
    for batch in np.array_split(chosen, math.ceil(len(chosen) / max(1, EVAL_ROWS // k))):
        audio = [
            frames_at(split, split.offsets[[i]], lengths[i], model.x_dim, corpus, generator)[:, 0]
            for i in batch
        ]
        estimate_TB, ess_TB = estimate_smc(model, nn.utils.rnn.pad_sequence(audio), k, generator)
        nats += [estimate_TB[len(x_TX) - 1, b].item() for b, x_TX in enumerate(audio)]
        ess += [ess_TB[: len(x_TX), b].sum().item() for b, x_TX in enumerate(audio)]
    bits = np.array(
        [flac_size(*split.read(split.offsets[[i]], lengths[i] * model.x_dim))[0] for i in chosen]
    )
    flac = frames * model.x_dim * math.log(corpus.std) - bits * math.log(2)
    for name, of_recordings in {f"smc_{k}": np.array(nats), "flac": flac}.items():
        mean = of_recordings.sum() / frames.sum()
        deviations = (of_recordings - mean * frames) / frames.mean()
        found[name] = dict(
            recordings=len(chosen),
            frames=int(frames.sum()),
            nats_per_frame=mean,
            stderr=deviations.std(ddof=1) / len(chosen) ** 0.5 if len(chosen) > 1 else None,
            bits_per_sample=bits_per_sample(mean, model.x_dim, corpus.std),
        )
    found[f"smc_{k}"]["ess"] = sum(ess) / frames.sum()
    return found


def describe_corpus(corpus):
    return dict(
        file=Path(corpus.path).name,
        created_by=corpus.created_by,
        mean=corpus.mean,
        std=corpus.std,
        samples={split: len(getattr(corpus, split).audio) for split in SPLITS},
    )


def windows_table(by_window, seq_frames):
    """A line per window of the test split, in order: its bounds in nats per frame, for paired comparisons of runs."""
    names = [name for name in by_window if name.startswith(("kl", *BOUNDS))]
    rows = torch.stack([by_window[name] / seq_frames for name in names], dim=1).tolist()
    return (
        "\n".join([",".join(names), *(",".join(f"{value:.3f}" for value in row) for row in rows)])
        + "\n"
    )


def evaluation_table(result):
    """Yield what is printed of eval.json, a line for each bound."""
    whole = {
        f"{name} of {found['recordings']} whole recordings": found
        for name, found in result.get("whole_recordings", {}).items()
    }
    for name, bound in (result["bounds"] | result["yardsticks"] | whole).items():
        stderr = (
            "" if bound["stderr"] is None else f" +- {bound['stderr']:.2f}"
        )  # one window has none
        bits = (
            f" nats/frame, {bound['bits_per_sample']:.3f} bits/sample"
            if "bits_per_sample" in bound
            else ""
        )
        yield f"test {name:20} {bound.get('nats_per_frame', bound.get('mean')):8.2f}{stderr}{bits}"


@torch.no_grad()
def write_samples(model, corpus, split, folder, frames=800, given=80, count=2):
    """Speech as .wav files, as loud as it comes, at most `frames` long: real_N, beginnings of the longest recordings;
    sample_N, generated; of a VRNN also resynthesised_N, and continued_N after the first `given` frames of real_N."""
    import soundfile

    folder.mkdir(exist_ok=True)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(EVAL_SEED)
    lengths = np.diff(split.offsets) // model.x_dim
    longest = lengths.argsort(kind="stable")[::-1][: min(count, np.count_nonzero(lengths))]
    real = frames_at(
        split,
        split.offsets[longest],
        min(frames, lengths[longest[-1]]),
        model.x_dim,
        corpus,
        generator,
    )
    speech = dict(real=real, sample=model.generate(frames, count, generator))
    if isinstance(model, VRNN):
        heard = real[:given]
        noise = torch.randn(*heard.shape[:2], model.z_dim, generator=generator, device=heard.device)
        goes_on = model.generate(
            frames - len(heard), len(longest), generator, model(heard, noise=noise).state
        )
        speech |= dict(
            continued=torch.cat((heard, goes_on)),
            resynthesised=model.generate(len(real), len(longest), generator, heard=real),
        )
    for kind, x_TBX in speech.items():
        for i, x_TX in enumerate(x_TBX.unbind(1)):
            samples = to_int16((x_TX.double() * corpus.std + corpus.mean).flatten().cpu().numpy())
            soundfile.write(folder / f"{kind}_{i}.wav", samples, SAMPLE_RATE)


# ---- training -------------------------------------------------------------------------------------------------------

MAX_SKIPPED = 10  # updates in a row
SIZES = (
    "x_dim",
    "z_dim",
    "rnn_dim",
    "q_z_dim",
    "p_z_dim",
    "p_x_dim",
    "x2s_dim",
    "z2s_dim",
    "ar_order",
)  # of a VRNN
OF_EVALUATION = (
    "data",
    "out_dir",
    "device",
    "seq_frames",
    "eval_k",
    "eval_recordings",
)  # beside --evaluate


class Training:
    """A model in training on excerpts of h.data, with all that a resumed run needs to go on as if it had never stopped.
    particles: rows of the state for each sequence. model: any module with the interface of VRNN (x_dim, z_dim,
    zero_state, the call; generate if it can), by default the VRNN of h. name: of the objective in tables and pictures,
    by default the script's. replays: updates in a row on each window, from one state. monitor_smc: to log smc_k."""

    def __init__(self, h, particles, model=None, name=None, replays=1, monitor_smc=False):
        self.h, self.particles, self.replays, self.monitor_smc = h, particles, replays, monitor_smc
        script = script_of(type(h))
        self.config = json.loads(
            json.dumps({**dataclasses.asdict(h), "script": script, "name": name or script})
        )
        del self.config["evaluate"]
        self.processes = start_processes(h.batch_size)
        self.folder, self.device = RunFolder(h), choose_device(h.device)
        ensure_demo_data(h.data)
        self.corpus = open_corpus(h.data)
        if model is None:
            torch.manual_seed(h.seed)
            model = VRNN(**{size: getattr(h, size) for size in SIZES if hasattr(h, size)})
        for option, feature in dict(
            weight_norm="constrain_weights", mirrored_init="mirror", bf16="bf16"
        ).items():
            if getattr(h, option) and not hasattr(model, feature) and not h.evaluate:
                off = "--weight_norm=0" if option == "weight_norm" else f"--no-{option}"
                raise UserError(
                    f"--{option}: {type(model).__name__} has no {feature}; give {off}, or write it"
                )
        if h.mirrored_init and not h.evaluate:
            model.mirror()
        self.model, self.config["model_class"] = model.to(self.device), type(model).__name__
        if h.init_from and not (h.resume or h.evaluate):
            load_checkpoint(
                h.init_from, "--init_from", lambda saved: self.model.load_state_dict(saved["model"])
            )
        self.averaged = copy.deepcopy(
            self.model, {id(b): b for b in self.model.buffers()}
        ).eval()  # but for buffers
        self.progress, self.log = dict(updates=0, seconds=0.0, best=-math.inf), []
        self.create_state()
        load_checkpoint(h.evaluate, "--evaluate", self.take_trained) if h.evaluate else self.begin()
        self.folder.start(self.config, self.log)
        if is_first() and not h.evaluate:
            print(
                f"{self.config['name']}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on "
                f"{self.processes} x {describe(self.device)}; {self.excerpts.batches_per_epoch} batches an epoch; "
                f"log in {self.folder.log}",
                flush=True,
            )

    def create_state(self):
        """Everything besides the model that a checkpoint holds, in place on the device."""
        h, model = self.h, self.model
        model.bf16 = h.bf16
        self.optimiser = torch.optim.Adam(
            model.parameters(),
            lr=torch.tensor(h.lr, device=self.device),
            fused=True,
            capturable=self.device.type == "cuda",
        )
        for p in (
            model.parameters()
        ):  # as its first step would create it, so that it can be restored in place
            self.optimiser.state[p] = dict(
                step=torch.zeros((), device=self.device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
        self.generator = torch.Generator(self.device).manual_seed(
            h.seed
        )  # of dequantisation and latent noise
        self.grad_clip = torch.tensor(h.grad_clip or math.inf, device=self.device)
        sequences = h.batch_size // self.processes
        self.state, self.next_state = (  # before and after the window
            tuple(part.clone() for part in model.zero_state(sequences * self.particles))
            for _ in range(2)
        )
        self.pcm = torch.zeros(
            h.seq_frames, sequences, h.x_dim, dtype=torch.int16, device=self.device
        )
        self.counts = SimpleNamespace(
            **{
                name: torch.tensor(zero, device=self.device)
                for name, zero in dict(
                    updates=0,
                    clipped=0,
                    skipped=0,
                    skipped_in_a_row=0,
                    loss_sum=0.0,
                    losses=0.0,
                    grad_norm=0.0,
                ).items()
            }
        )

    def begin(self):
        """Start the log and the excerpts, or go on from the state in the run folder."""
        h = self.h
        versions = dict(
            python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__
        )
        self.log = [
            dict(
                config=self.config,
                particles=self.particles,
                replays=self.replays,
                processes=self.processes,
                commit=commit(),
                device=describe(self.device),
                data=describe_corpus(self.corpus),
                versions=versions,
            )
        ]
        self.excerpts = Excerpts(
            self.corpus.train, h.x_dim, h.seq_frames, h.reset_freq, h.batch_size, h.seed
        )
        for held_out in (self.corpus.valid, self.corpus.test):
            window_starts(held_out, h.seq_frames * h.x_dim)  # refused now, not after the training
        self.reader, self.read_ahead = ThreadPoolExecutor(max_workers=1), {}
        if h.resume:
            load_checkpoint(self.folder.last, "--resume", self.restore)
            gather("restored")

    def take_trained(self, checkpoint):
        """Parameters and settings of what is to be evaluated, and mean and std of what it was trained on."""
        trained, model_class = (
            json.loads(json.dumps(checkpoint["config"])),
            self.config["model_class"],
        )
        if (
            trained.get("model_class", model_class) != model_class
        ):  # to which the same parameters mean something else
            raise ValueError(
                f"it holds another model than this {model_class}, a {trained['model_class']}"
            )
        self.averaged.load_state_dict(checkpoint["model"])
        self.corpus.mean, self.corpus.std, self.progress["updates"] = (
            checkpoint[x] for x in ("mean", "std", "update")
        )
        self.config |= {name: value for name, value in trained.items() if name not in OF_EVALUATION}

    def window(self):
        """The present window on the device, (T, B, X): dequantised, normalised, with noise that fades and ends."""
        h = self.h
        uniform = self.draw(torch.rand, h.batch_size, h.x_dim) if h.dequantize else None
        x_TBX = normalise(self.pcm, self.corpus, uniform)
        if h.x_noise:
            done = self.counts.updates / h.x_noise_updates
            sigma = torch.where(done < 1, h.x_noise * 0.01**done, 0.0)
            x_TBX = x_TBX + sigma * self.draw(torch.randn, h.batch_size, h.x_dim)
        return x_TBX

    def noise(self, k, z_dim):
        """Standard normal (T, B*k, z_dim), for the posterior's samples."""
        return self.draw(torch.randn, self.h.batch_size * k, z_dim)

    def draw(self, distribution, rows, width):
        """(T, rows of this process, width); drawn for all rows, so that it is the same for any number of processes."""
        drawn = distribution(
            self.h.seq_frames, rows, width, generator=self.generator, device=self.device
        )
        return drawn[:, my_part(rows)]

    @torch.no_grad()
    def step(self, loss, state, divide_by=1, replace_non_finite=False):
        """After loss.backward(): clip the gradient, step Adam, constrain and average the weights, carry the state on.
        loss: nats per frame. state: after the window. A loss or gradient that is not finite changes no parameter and is
        counted. What the 2016 scripts did: divide_by, by which they divided the gradient before they clipped it at
        grad_clip / divide_by; replace_non_finite, 0.1 times the parameters in place of such a gradient."""
        h, counts, loss = self.h, self.counts, loss.detach().clone()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.processes > 1 and replace_non_finite:
            raise UserError(
                "--as_published: what the 2016 scripts did runs in one process; start without torchrun"
            )
        if self.processes > 1:
            total = nn.utils.parameters_to_vector([*gradients, loss])
            dist.all_reduce(total)
            nn.utils.vector_to_parameters(total / self.processes, [*gradients, loss])
        if divide_by != 1:
            torch._foreach_div_(gradients, divide_by)
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(
            gradients, (self.grad_clip / divide_by * (norm + 1e-6).reciprocal()).clamp(max=1)
        )
        norm = divide_by * norm
        is_finite = norm.isfinite() & loss.isfinite()
        if h.lr_updates:
            self.optimiser.param_groups[0]["lr"].copy_(
                h.lr * (1 - counts.updates / h.lr_updates).clamp(min=0.01)
            )
        if replace_non_finite:
            for p in parameters:
                p.grad.copy_(torch.where(is_finite, p.grad, 0.1 * p))
        else:
            self.optimiser.found_inf = (~is_finite).float()  # Adam then leaves everything as it is
        self.optimiser.step()
        self.optimiser.zero_grad()
        if h.weight_norm:
            self.model.constrain_weights(h.weight_norm)
        share = 1 - ((1 + counts.updates) / (10 + counts.updates)).clamp(max=h.ema)  # more at first
        for averaged, p in zip(
            self.averaged.parameters(), self.model.parameters()
        ):  # single updates jump by nats
            averaged.lerp_(p, share)
        for carried, part in zip(self.next_state, state, strict=True):
            carried.copy_(torch.where(is_finite, part, 0.0))
        counts.updates += 1
        counts.clipped += is_finite & (norm > self.grad_clip)
        counts.skipped += ~is_finite
        counts.skipped_in_a_row.add_(1).mul_(~is_finite)
        counts.loss_sum += torch.where(is_finite, loss, 0.0)
        counts.losses += is_finite
        counts.grad_norm.copy_(norm)

    def captured(self, update):
        """Decorator of a script's update: on a GPU one CUDA graph, since to launch its thousands of kernels takes
        longer than to run them; one by one where that fails, and in several processes. Leaves the state as it is."""
        if self.device.type != "cuda" or self.processes > 1 or self.h.evaluate:
            return update
        before = copy.deepcopy(self.checkpoint())
        self.allow_tf32(True)
        try:
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
            update = graph.replay
        except RuntimeError as error:
            print(
                f"no CUDA graph ({first_line(error.__context__ or error)}); kernels are launched singly",
                flush=True,
            )
            self.generator = torch.Generator(self.device)  # the capture may still hold the other
            self.optimiser.zero_grad()
        self.allow_tf32(False)
        self.restore(before)
        return update

    def allow_tf32(self, is_allowed):
        """In the products of updates on a GPU, not in those of evaluation. On a CPU to say so at all costs 4 %."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if is_allowed else "highest")

    def updates(self):
        """Yield once for every update that is still to be made, with its window in place; none with --evaluate. Between
        them it monitors, logs and saves, and stops on Ctrl-C or SIGTERM with a state to go on from."""
        h, progress = self.h, self.progress
        if h.evaluate:
            return
        bar = tqdm(
            total=h.max_updates,
            initial=progress["updates"],
            unit=" updates",
            disable=not is_first() or None,
        )
        with stop_requests() as received, bar:
            while progress["updates"] < h.max_updates:
                started = time.monotonic()
                self.next_window()
                self.allow_tf32(True)
                yield
                self.allow_tf32(False)
                progress["updates"] += 1
                is_due = (
                    progress["updates"] % h.monitor_every == 0
                    or progress["updates"] >= h.max_updates
                )
                if is_due:
                    self.counts.updates.item()  # wait for the device
                progress["seconds"] += time.monotonic() - started
                bar.update()
                if (
                    progress["updates"] % MAX_SKIPPED == 0
                    and self.counts.skipped_in_a_row >= MAX_SKIPPED
                ):
                    raise UserError(
                        f"the loss or its gradient was not finite in {MAX_SKIPPED} updates in a row, up to "
                        f"update {progress['updates']}; start again with a lower --lr or --grad_clip"
                    )
                if is_due:
                    self.monitor()
                if signal_number := max(gather(max(received, default=0))):
                    self.folder.save(self.folder.last, self.checkpoint())
                    if is_first():
                        print(
                            f"stopped after update {progress['updates']}; go on with the same command and --resume"
                        )
                    sys.exit(128 + signal_number)

    def next_window(self):
        """Put the next window in place, and the state before it: zeros at the start of an excerpt."""
        windows, replay = divmod(self.progress["updates"], self.replays)
        batch, window = divmod(windows, self.h.reset_freq)
        self.read_ahead = {
            i: self.read_ahead.get(i)
            or self.reader.submit(self.excerpts.batch, i, self.device.type == "cuda")
            for i in (batch, batch + 1)
        }  # by a thread
        self.pcm.copy_(self.read_ahead[batch].result()[window], non_blocking=True)
        if replay == 0:
            for before, after in zip(self.state, self.next_state):
                before.zero_() if window == 0 else before.copy_(after)

    def monitor(self):
        """A log line with held-out bounds, best.pt where iwae_k, of every objective, is highest yet, and last.pt."""
        h, folder, counts, progress = self.h, self.folder, self.counts, self.progress
        by_window = window_bounds(
            self.averaged,
            self.corpus,
            self.corpus.valid,
            h.eval_k[:1],
            h.seq_frames,
            h.monitor_windows,
            smc=h.eval_k[0] if self.monitor_smc else 0,
        )
        line = dict(
            update=progress["updates"],
            sequences=progress["updates"] * h.batch_size,
            seconds=progress["seconds"],
            train_loss=(counts.loss_sum / counts.losses).item() if counts.losses else None,
            grad_norm=counts.grad_norm.item(),
            clipped=counts.clipped.item(),
            skipped=counts.skipped.item(),
            valid=summarise(by_window, h.seq_frames, h.x_dim, self.corpus),
        )
        counts.loss_sum.zero_()
        counts.losses.zero_()
        self.log.append(line)
        if is_first():
            with folder.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write(progress_line(h, line))  # above the bar, where there is one
            sys.stdout.flush()
        tracked, checkpoint = (
            line["valid"][f"iwae_{h.eval_k[0]}"]["nats_per_frame"],
            self.checkpoint(),
        )
        if tracked > progress["best"]:
            progress["best"] = tracked
            folder.save(
                folder.best,
                {**{name: checkpoint[name] for name in PARTS}, "model": checkpoint["averaged"]},
            )
        folder.save(folder.last, checkpoint)

    def checkpoint(self):
        """The state of the whole job, however many processes share it; each of them must ask."""
        states = {
            i: torch.cat(gather(part.cpu())) for i, part in enumerate(self.state + self.next_state)
        }
        return dict(
            config=self.config,
            mean=self.corpus.mean,
            std=self.corpus.std,
            update=self.progress["updates"],
            model=self.model.state_dict(),
            averaged=self.averaged.state_dict(),
            states=states,
            counts=vars(self.counts),
            optimiser=self.optimiser.state_dict(),
            log=self.log,
            generator=self.generator.get_state(),
            progress=self.progress,
        )

    def restore(self, checkpoint):
        """Go on from a state, in place. UserError where it is of another run; a damaged one may raise anything."""
        before, *lines = checkpoint["log"]
        refuse_changes(before, self.log[0])
        self.log = [{**before, "config": self.config}, *lines]
        self.model.load_state_dict(checkpoint["model"])
        self.averaged.load_state_dict(checkpoint["averaged"])
        self.generator.set_state(checkpoint["generator"])
        for name, count in vars(self.counts).items():
            count.copy_(checkpoint["counts"][name])
        for part, saved in zip(
            self.state + self.next_state, checkpoint["states"].values(), strict=True
        ):
            part.copy_(saved[my_part(len(saved))].view_as(part))
        for i, moments in enumerate(self.optimiser.state.values()):
            for name, tensor in moments.items():
                tensor.copy_(checkpoint["optimiser"]["state"][i][name])
        self.progress |= {
            name: type(zero)(checkpoint["progress"][name]) for name, zero in self.progress.items()
        }
        if self.progress["updates"] != checkpoint["update"]:
            raise ValueError("its numbers of updates differ")
        if checkpoint["update"] > self.h.max_updates:
            raise UserError(
                f"--max_updates={self.h.max_updates}: {checkpoint['update']} are made; give no fewer"
            )

    def finish(self):
        """Evaluate best.pt, or the checkpoint of --evaluate, on the test split: eval.json, windows.csv and samples/."""
        h, folder, model, corpus = self.h, self.folder, self.averaged, self.corpus
        if not h.evaluate:
            if not folder.best.exists():
                raise UserError(
                    f"{folder.best} is missing, or no bound was finite; start again, with a lower --lr"
                )
            load_checkpoint(folder.best, "--resume", self.take_trained)
        smc = max(h.eval_k)
        by_window = window_bounds(model, corpus, corpus.test, h.eval_k, h.seq_frames, smc=smc)
        if is_first():
            result = dict(
                script=self.config["script"],
                name=self.config["name"],
                checkpoint=h.evaluate or folder.best.name,
                data=describe_corpus(corpus),
                split="test",
                update=self.progress["updates"],
                windows=len(by_window["elbo"]),
                frames=h.seq_frames,
                bounds=summarise(by_window, h.seq_frames, h.x_dim, corpus),
                yardsticks=evaluate_yardsticks(corpus, corpus.test, h.seq_frames, h.x_dim),
            )
            if h.eval_recordings:
                result["whole_recordings"] = evaluate_recordings(
                    model, corpus, corpus.test, smc, h.eval_recordings
                )
            write_durably(folder.windows, windows_table(by_window, h.seq_frames))
            write_durably(folder.eval, json.dumps(result, indent=1) + "\n")
            print(
                f"{h.evaluate or folder.best}, update {result['update']:,}",
                *evaluation_table(result),
                sep="\n",
            )
            if hasattr(model, "generate"):
                write_samples(model, corpus, corpus.test, folder.samples)
            print(folder.eval, flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def ensure_demo_data(path):
    """Make the synthetic data that --demo trains on, where it is not there yet."""
    if path == DEMO["data"] and not Path(path).exists() and is_first():
        print(f"making synthetic demo data in {path}", flush=True)
        script = Path(__file__).with_name("prepare_blizzard.py")
        if status := subprocess.run(
            [sys.executable, script, "--demo"], stdout=subprocess.DEVNULL
        ).returncode:
            sys.exit(status)
    gather("the data is there")


def progress_line(h, line):
    bound, rate = f"iwae_{h.eval_k[0]}", line["update"] / line["seconds"]
    nats = " ".join(
        f"{name} {line['valid'][name]['nats_per_frame']:.2f}" for name in (bound, "elbo", "kl")
    )
    skipped = f" | {line['skipped']} updates skipped as not finite" if line["skipped"] else ""
    return (
        f"update {line['update']:,} | {line['sequences']:,} sequences | valid {nats} nats/frame | "
        f"{line['valid'][bound]['bits_per_sample']:.3f} bits/sample | {rate:.2f} updates/s{skipped}"
    )


# ---- run folder -----------------------------------------------------------------------------------------------------

FREE_ON_RESUME = {
    "max_updates",
    "monitor_every",
    "out_dir",
}  # nothing in the state of a run depends on them
ANOTHER_RUN = "start another --out_dir, with --init_from best.pt or last.pt, if whole, to keep what was learnt"


class RunFolder:
    """The files of a run, of which only the first process of a job writes any; --resume needs last.pt and best.pt."""

    def __init__(self, h):
        folder = self.folder = Path(h.out_dir)
        self.config, self.log, self.last, self.best, self.eval, self.windows, self.samples = map(
            folder.joinpath,
            (
                "config.json",
                "log.jsonl",
                "last.pt",
                "best.pt",
                "eval.json",
                "windows.csv",
                "samples",
            ),
        )
        has_state = self.last.exists()
        if h.resume and not has_state:
            raise UserError(
                f"--resume: there is no {self.last} to go on from; start without --resume"
            )
        if not h.resume and (has_state or self.eval.exists() or h.evaluate and self.log.exists()):
            remedy = (
                "pass --resume to go on with it, or " * (has_state and not h.evaluate)
                + "give another --out_dir"
            )
            raise UserError(f"{folder} already holds a run or an evaluation; {remedy}")

    def start(self, config, log):
        """Keep other processes out, and begin the log; an evaluation has none."""
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = lock(self.folder)
            self.eval.unlink(missing_ok=True)  # of a run that goes on
            write_durably(self.config, json.dumps(config, indent=1) + "\n")
            if log:
                write_durably(self.log, "".join(json.dumps(line) + "\n" for line in log))

    def save(self, path, checkpoint):
        """Write a checkpoint such that path holds the old or the new one, whole."""
        if is_first():
            try:
                with durably(path) as partial:
                    torch.save(checkpoint, partial)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{path} cannot be written ({first_line(error)}); make room and --resume"
                ) from None


def refuse_changes(before, now):
    """UserError where the state that is saved does not fit what the header of the log would be now."""
    was, is_now = (
        {**header["config"], "data": header["data"], "device": header["device"][:4]}
        for header in (before, now)
    )
    for name in is_now:
        if name not in FREE_ON_RESUME and was.get(name) != is_now[name]:
            raise UserError(
                f"--resume: --{name} was {was.get(name)} and is now {is_now[name]}, which does not fit the "
                "saved state; give the old value, or start another --out_dir"
            )


PARTS = dict(
    model=dict, config=dict, update=int, mean=float, std=float
)  # what it takes to evaluate a checkpoint


def load_checkpoint(path, option, use=lambda checkpoint: None):
    """Read a checkpoint, executing nothing in it, and use it, as an option asks. UserError where it is of no use."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for part, kind in PARTS.items():
            if not isinstance(checkpoint.get(part), kind):
                raise ValueError(f"it has no usable {part}")
        if not (
            math.isfinite(checkpoint["mean"])
            and 0 < checkpoint["std"] < math.inf
            and checkpoint["update"] >= 0
        ):
            raise ValueError("its mean, std or update is out of range")
        if not all(p.isfinite().all() for p in checkpoint["model"].values()):
            raise ValueError("its parameters are not finite")
        use(checkpoint)
        return checkpoint
    except UserError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything
        why = f"is not a usable checkpoint ({first_line(error)})"
        if isinstance(error, FileNotFoundError):
            why = "does not exist"
        elif of_model := re.search(
            r"loading state_dict for (\w+)", str(error)
        ):  # so PyTorch says it
            why = f"holds another model than this {of_model[1]}, or one of other sizes"
        remedy = ANOTHER_RUN if option == "--resume" else f"name another, or start without {option}"
        raise UserError(f"{option}: {path} {why}; {remedy}") from None


def commit():
    """The commit of this code, with + where a file differs from it; None outside a repository."""
    git = [
        "git",
        "-C",
        Path(__file__).parent,
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=12",
        "--dirty=+",
    ]
    with contextlib.suppress(OSError):  # where there is no git
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


# ---- hyperparameters ------------------------------------------------------------------------------------------------

# What --demo puts in place of the values at the top of a script: small enough for two CPU cores and three minutes.
DEMO = dict(
    data="data/demo.h5",
    x2s_dim=128,
    z2s_dim=128,
    q_z_dim=128,
    p_z_dim=128,
    p_x_dim=128,
    rnn_dim=128,
    z_dim=32,
    ar_order=16,
    batch_size=16,
    lr=1e-3,
    max_updates=1000,
    monitor_every=50,
    x_noise_updates=500,
)

MOST = 1_000_000_000
RANGES = {
    name: (1, MOST)
    for name in (
        "k",
        *SIZES,
        "seq_frames",
        "reset_freq",
        "batch_size",
        "max_updates",
        "monitor_every",
        "monitor_windows",
        "eval_k",
        "x_noise_updates",
    )
}
RANGES |= {
    name: (0, MOST)
    for name in (
        "z_dim",
        "ar_order",
        "seed",
        "lr_updates",
        "eval_recordings",
        "grad_clip",
        "weight_norm",
        "x_noise",
    )
} | dict(lr=(1e-30, MOST), ema=(0, 1 - 1e-9))
RESERVED = ("resume", "demo", "help", "script", "name", "model_class")
NEEDED = {
    *RANGES,
    "data",
    "out_dir",
    "device",
    "bf16",
    "mirrored_init",
    "dequantize",
    "init_from",
    "evaluate",
} - {"k", *SIZES[1:]}  # by Training


def parse(script, argv=None):
    """The hyperparameters of a script, a dataclass whose fields are int, float, str, bool or tuple[int, ...], each with
    a default and each a flag, whose help is the comment behind it; beside them are --resume and --demo. With --evaluate
    CHECKPOINT, what is not given is the checkpoint's. Returns an instance, with `resume` set. Raises UserError."""
    kinds = kinds_of(script)
    parser = OneLineParser(
        prog=f"{script_of(script)}.py",
        description=sys.modules[script.__module__].__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = dict(
        found
        for cls in reversed(script.__mro__[:-1])
        for found in re.findall(r"^ +(\w+):.*? # *(.*)$", inspect.getsource(cls), re.MULTILINE)
    )
    for field in dataclasses.fields(script):
        about = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        how = (
            dict(action=argparse.BooleanOptionalAction)
            if kinds[field.name] is bool
            else dict(type=FROM_TEXT[kinds[field.name]], metavar=field.name.upper())
        )
        parser.add_argument(f"--{field.name}", help=about, **how)
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on from last.pt in out_dir"
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        default=False,
        help="small sizes and synthetic data, for about three minutes on two CPU cores",
    )
    given = vars(parser.parse_args(argv))
    changed = dict(DEMO, out_dir=f"runs/demo/{script_of(script)}") if given["demo"] else {}
    if path := given.get("evaluate"):
        for name in ["resume"] * given["resume"] + [size for size in SIZES if size in given]:
            raise UserError(
                f"--{name} cannot be given beside --evaluate={path}, which trains nothing and takes its "
                "sizes from the checkpoint; leave it out"
            )
        config = {
            "ar_order": 0,
            **load_checkpoint(path, "--evaluate")["config"],
        }  # older ones have none
        changed |= {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items()
            if name not in ("out_dir", "device", "evaluate")
        }
    h = script(**{name: value for name, value in {**changed, **given}.items() if name in kinds})
    check_values(h, kinds)
    h.resume = given["resume"]
    return h


def script_of(cls):
    return Path(sys.modules[cls.__module__].__file__).stem


def kinds_of(script):
    """{field: type} of a script's dataclass. Raises UserError where a line of it cannot become a flag."""
    kinds = typing.get_type_hints(script)
    with_default = {
        f.name for f in dataclasses.fields(script) if f.default is not dataclasses.MISSING
    }
    without_type = [
        name
        for cls in script.__mro__[:-1]
        for name, value in vars(cls).items()
        if not (
            name.startswith("_")
            or callable(value)
            or hasattr(value, "__get__")
            or name in inspect.get_annotations(cls)
        )
    ]
    for name, kind in (kinds | dict.fromkeys(without_type)).items():
        if kind not in FROM_TEXT or name not in with_default - {*RESERVED}:
            raise UserError(
                f"{script_of(script)}.py: {name} cannot become a flag; write {name}: TYPE = VALUE below "
                "@dataclass, with a type of int, float, str, bool or tuple[int, ...], and by no name of "
                f"{', '.join(RESERVED)}"
            )
    for name in sorted(NEEDED - kinds.keys()):
        raise UserError(
            f"{script_of(script)}.py: there is no hyperparameter {name}; add one, as in vrnn_gauss.py"
        )
    return kinds


def whole_number(text):
    """'20000', '20_000' and '2e4' as an int."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


FROM_TEXT = {
    int: whole_number,
    float: float,
    str: str,
    bool: bool,
    tuple[int, ...]: lambda text: tuple(map(whole_number, text.split(","))),
}
whole_number.__name__, FROM_TEXT[tuple[int, ...]].__name__ = (
    "whole number",
    "comma-separated list of whole numbers",
)


def check_values(h, kinds):
    """Raise UserError where a hyperparameter is of another type than its field's, or out of its range."""
    for name, kind in kinds.items():
        value = getattr(h, name)
        if kind is float and type(value) is int:
            setattr(h, name, value := float(value))
        parts, part_kind = (value, int) if kind == tuple[int, ...] else ((value,), kind)
        if type(parts) is not tuple or {*map(type, parts)} != {part_kind}:
            raise UserError(f"--{name}={value!r} is no {FROM_TEXT[kind].__name__}; give one")
        least, most = RANGES.get(name, (-sys.float_info.max, sys.float_info.max))
        if kind not in (str, bool) and not all(least <= part <= most for part in parts):
            raise UserError(
                f"--{name}={value} is out of range; give a number of at least {least}, at most {most}"
            )
    if not h.out_dir:
        raise UserError("--out_dir is empty; give the folder of the run, such as runs/first")
    if getattr(h, "z_dim", 1) == 0 and getattr(h, "k", 1) > 1:
        raise UserError(
            f"--k={h.k}: without latent variables (--z_dim=0) all particles are the same; give --k=1"
        )


# ---- excerpts -------------------------------------------------------------------------------------------------------


class Excerpts:
    """Training excerpts of reset_freq windows each, in an order that is a function of (seed, epoch) alone. Each
    recording is cut into as many whole excerpts as it holds, from a start that is drawn anew every epoch, so that all
    of it is seen. What an epoch holds beyond whole batches is left out of it."""

    def __init__(self, split, x_dim, seq_frames, reset_freq, batch_size, seed):
        self.split, self.batch_size, self.seed, self.epoch = split, batch_size, seed, None
        self.shape = (-1, reset_freq, seq_frames, x_dim)
        self.samples = reset_freq * seq_frames * x_dim
        self.counts, self.slack = np.divmod(np.diff(split.offsets), self.samples)
        self.batches_per_epoch = int(self.counts.sum()) // batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"train has {self.counts.sum()} excerpts of {self.samples / SAMPLE_RATE:g} s, too few for "
                f"--batch_size={batch_size}; give a smaller one or --reset_freq, or more recordings"
            )

    def batch(self, index, is_pinned=False):
        """This process's windows of batch `index`, counted from the start of training: int16 (reset_freq, T, B, X)."""
        epoch, index = divmod(index, self.batches_per_epoch)
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            order, shift = (
                random.permutation(self.counts.sum()),
                random.integers(0, self.slack, endpoint=True),
            )
            starts = window_starts(self.split, self.samples) + np.repeat(shift, self.counts)
            self.epoch, self.starts = epoch, starts[order]
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size][
            my_part(self.batch_size)
        ]
        pcm = torch.from_numpy(self.split.read(starts, self.samples))
        windows = (
            pcm.view(self.shape).permute(1, 2, 0, 3).contiguous()
        )  # else copying one to a GPU waits for it
        return windows.pin_memory() if is_pinned else windows


def window_starts(split, samples, at_most=math.inf):
    """First samples of the non-overlapping windows of every recording: all, or at_most of them evenly spread."""
    counts = np.diff(split.offsets) // samples
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(split.offsets[:-1], counts) + nth * samples
    if len(starts) == 0:
        raise UserError(
            f"no recording of the split {split.name} holds a window of {samples / SAMPLE_RATE:g} s; give "
            "longer recordings or a smaller --seq_frames"
        )
    return (
        starts
        if at_most >= len(starts)
        else starts[np.linspace(0, len(starts) - 1, at_most).round().astype(int)]
    )


def normalise(pcm, corpus, uniform=None):
    """int16 samples to zero mean and unit variance; with uniform noise on [0, 1), dequantised by +-1/2 LSB."""
    x = pcm.float() if uniform is None else pcm + (uniform - 0.5)
    return (x - corpus.mean) / corpus.std


# ---- HDF5 -----------------------------------------------------------------------------------------------------------

FORMAT = dict(format="vrnn-audio", version=1, sample_rate=SAMPLE_RATE)  # attributes of every file
SPLITS = ("train", "valid", "test")
SYNTHETIC = (
    "prepare_blizzard.py --demo: synthetic, not speech"  # so begins created_by of the demo data
)
REMAKE = "make it again with prepare_blizzard.py"
MIN_FREE = 16 << 20  # bytes of the disk that a conversion leaves free


class SplitWriter:
    """Appends whole recordings to one group of the HDF5 file; total and squares are sums over their samples."""

    def __init__(self, group, share):
        self.group, self.share, self.offsets, self.names, self.total, self.squares = (
            group,
            share,
            [0],
            [],
            0,
            0,
        )
        self.audio = group.create_dataset("audio", (0,), "int16", chunks=(BLOCK,), maxshape=(None,))

    def append(self, name, blocks):
        """Append one recording; the next is written over one that fails half-way. Raises BadAudio."""
        start, end, total, squares = self.offsets[-1], self.offsets[-1], 0, 0
        for block in guarded(blocks):
            require_space(Path(self.group.file.filename).parent)
            self.audio.resize((end + len(block),))
            self.audio[end:] = block
            end += len(block)
            wide = block.astype(np.int64)
            total, squares = total + int(wide.sum()), squares + int(wide @ wide)
        if squares * (end - start) == total**2:
            raise BadAudio(
                f"all of its {end - start:,} samples are the same"
                if end > start
                else "it holds no samples"
            )
        self.offsets.append(end)
        self.names.append(name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0"))
        self.total, self.squares = self.total + total, self.squares + squares

    def close(self):
        """Returns mean and standard deviation."""
        self.audio.resize((self.offsets[-1],))
        self.group["offsets"] = np.array(self.offsets, np.int64)
        self.group.create_dataset("names", data=self.names, dtype=h5py.string_dtype())
        mean = self.total / self.offsets[-1]
        return mean, math.sqrt(max(0.0, self.squares / self.offsets[-1] - mean * mean))


def convert(
    recordings,
    out,
    valid=0.05,
    test=0.05,
    force=False,
    strict=False,
    created_by="prepare_blizzard.py",
    complete=None,
):
    """Write recordings to one HDF5 file, which appears under its name only when it is complete: (source, name, blocks)
    each, where it lies, its name, and an iterator over its samples in 1-D int16 arrays at 16 kHz, or the exception that
    stands in their way. Each goes, whole, to the split that is furthest below its share of the samples so far, so that
    a rerun gives the same splits; one that raises is skipped, or an error (strict). `complete`, if any, is called with
    the path of the whole file before that gets its name, and may add to it. Returns ["source: why skipped"]."""
    if not (0 < valid and 0 < test and valid + test < 1):
        raise UserError(f"--valid={valid} and --test={test} must be above 0 and sum to less than 1")
    out = Path(out)
    if out.exists() and not force:
        raise UserError(f"{out} already exists; pass --force to replace it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with stop_requests() as received, durably(out) as partial:
        with h5py.File(partial, "w", locking=False, rdcc_nbytes=1 << 20) as file:
            writers = [
                SplitWriter(file.create_group(split), share)
                for split, share in zip(SPLITS, (1 - valid - test, valid, test))
            ]
            skipped = []
            for source, name, blocks in recordings:
                if received:
                    sys.exit(128 + received[0])
                so_far = sum(writer.offsets[-1] for writer in writers)
                neediest = max(
                    writers, key=lambda writer: writer.share * so_far - writer.offsets[-1]
                )
                try:
                    neediest.append(name, blocks)
                except BadAudio as why:
                    skipped.append(f"{source}: {why}")
                    if strict:
                        raise UserError(
                            f"{skipped[-1]}; mend or remove it, or do without --strict"
                        ) from None
            counts = [len(writer.names) for writer in writers]
            if 0 in counts:
                why = f" (skipped: {skipped[0]})" if skipped else ""
                raise UserError(
                    f"{sum(counts)} usable recordings leave none for the split {SPLITS[counts.index(0)]}{why}; "
                    "give more recordings or a larger --valid and --test"
                )
            (mean, std), *_ = [writer.close() for writer in writers]
            file.attrs.update(**FORMAT, mean=mean, std=std, created_by=created_by)
        if complete is not None:
            complete(partial)
        if received:
            sys.exit(128 + received[0])
    return skipped


def require_space(folder):
    """Raise UserError before the disk is full, because HDF5 crashes when it meets the end of it."""
    if shutil.disk_usage(folder).free < MIN_FREE:
        raise UserError(f"the disk of {folder} is nearly full; make room, or give another --out")


@dataclasses.dataclass
class Split:
    """audio: int16 HDF5 dataset, recordings back to back; offsets: (recordings + 1,) int64."""

    name: str
    audio: h5py.Dataset
    offsets: np.ndarray

    def read(self, starts, samples):
        """(B, samples) int16 from B starting points."""
        try:
            return np.stack([self.audio[start : start + samples] for start in starts])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data file {self.audio.file.filename} is damaged in split {self.name} "
                f"({first_line(error)}); {REMAKE}"
            ) from None


def open_corpus(path):
    """An HDF5 file: its Splits train, valid and test, path, created_by, mean and std (int16 units, of train)."""
    try:
        file = h5py.File(
            path, "r", rdcc_nbytes=0
        )  # excerpts are random: a chunk cache would only read more
        cache = (
            file.id.get_mdc_config()
        )  # of the chunk index: it would grow by 38 MB over 283 hours, and win no time
        cache.set_initial_size, cache.initial_size, cache.min_size, cache.max_size = (
            True,
            *[1 << 17] * 3,
        )
        file.id.set_mdc_config(cache)
        if {name: file.attrs.get(name) for name in FORMAT} != FORMAT:
            raise BadAudio(
                f"is HDF5 but not of {', '.join(f'{name} {value}' for name, value in FORMAT.items())}"
            )
        mean, std = (float(file.attrs.get(name, math.nan)) for name in ("mean", "std"))
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise BadAudio("has no usable mean and std")
        splits = {
            name: Split(name, file[name]["audio"], file[name]["offsets"][:]) for name in SPLITS
        }
        for name, split in splits.items():
            audio, offsets = split.audio, split.offsets
            if not (
                isinstance(audio, h5py.Dataset)
                and (audio.dtype, audio.ndim) == ("int16", 1)
                and (offsets.dtype, offsets.ndim) == ("int64", 1)
                and len(offsets) > 1
                and offsets[0] == 0
                and offsets[-1] == len(audio)
                and (np.diff(offsets) > 0).all()
            ):
                raise BadAudio(f"has inconsistent offsets in split {name}")
        return SimpleNamespace(
            path=str(path),
            created_by=str(file.attrs.get("created_by")),
            mean=mean,
            std=std,
            **splits,
        )
    except Exception as error:  # a damaged file can raise anything
        if not Path(path).exists():
            raise UserError(
                f"data file {path} does not exist; make it with 'python prepare_blizzard.py FOLDER --out "
                f"{path}', name another with --data, or try --demo"
            ) from None
        why = (
            error
            if isinstance(error, BadAudio)
            else f"is not a readable HDF5 file ({first_line(error)})"
        )
        raise UserError(f"data file {path} {why}; {REMAKE}") from None


# ---- arrays (.npz, .npy) --------------------------------------------------------------------------------------------

BLOCK = 1 << 16  # samples at a time, so that memory does not depend on the length of a recording
MAX_EXPANSION = (
    100  # of a zip archive; speech shrinks to about a half, digital silence to a thousandth
)


class BadAudio(Exception):
    """Why a file or recording cannot be used."""


def natural_order(text):
    """Sort key that puts data_9 before data_10, and no two texts in one place."""
    return [
        int(part) if n % 2 else part for n, part in enumerate(re.split("([0-9]+)", str(text)))
    ], str(text)


def guarded(blocks):
    """blocks, with whatever a damaged file makes NumPy, zipfile or soundfile raise, here or before, as BadAudio."""
    try:
        if isinstance(blocks, Exception):
            raise blocks
        yield from blocks
    except Exception as error:
        raise (
            error
            if isinstance(error, BadAudio)
            else BadAudio(f"it cannot be read ({first_line(error)})")
        ) from None


def array_recordings(path, name, allow_pickle=False):
    """Yield (name, blocks), as for `convert`, of each recording in a .npz or .npy file: an array or, with allow_pickle,
    one of an array of arrays, to read which executes what the file says. Raises what makes the whole file unusable."""
    load = functools.partial(
        np.load, allow_pickle=allow_pickle, encoding="latin1"
    )  # Python 2 wrote some
    if path.suffix.lower() == ".npy":
        yield from recordings_of(lambda: load(path, mmap_mode=None if allow_pickle else "r"), name)
        return
    with path.open("rb") as file, load(file) as archive:
        expanded = sum(member.file_size for member in archive.zip.infolist())
        if expanded > max(MAX_EXPANSION * path.stat().st_size, 1 << 20):
            raise BadAudio(
                f"it expands {expanded // path.stat().st_size:,}-fold, as no speech does; store what it "
                "should hold with numpy.savez"
            )
        members = {member for member in archive.zip.namelist() if member.endswith(".npy")}
        if not members:
            raise BadAudio("it holds no arrays")
        for member in sorted(members, key=natural_order):
            yield from recordings_of(
                functools.partial(archive.__getitem__, member),
                f"{name}/{member.removesuffix('.npy')}",
            )


def recordings_of(load, name):
    """The recordings of one array: itself, or each of its elements where it is an array of arrays."""
    try:
        array = np.asanyarray(load())
    except Exception as error:  # a damaged header can raise anything
        if re.search("allow_pickle|Python objects", str(error)):
            error = BadAudio(
                "it is an array of arrays, a pickle, and reading one executes what it says; save every "
                "recording with numpy.savez, or pass --allow_pickle if you trust the file"
            )
        yield name, error
    else:
        parts = (
            {f"{name}/{i}": part for i, part in enumerate(array.flat)}
            if array.dtype.hasobject
            else {name: array}
        )
        yield from ((name, pcm16_blocks(part)) for name, part in parts.items())


def pcm16_blocks(array):
    """int16 blocks of one recording, its first channel, of any real dtype: int16 as it is; wider integers as int16
    where all fit, as 32-bit full scale where some exceed 24 bits; floats of full scale 1, or as int16 where whole."""
    array = np.asarray(array)
    shape, kind, itemsize = array.shape, array.dtype.kind, array.dtype.itemsize
    if len(shape) not in (1, 2) or len(shape) == 2 and shape[1] > min(shape[0], 1024):
        raise BadAudio(
            f"its shape {shape} is neither (samples,) nor (samples, channels); transpose or split it"
        )
    if kind not in "if" or itemsize == 1:
        raise BadAudio(f"its type {array.dtype} is not audio; save int16, int32 or floats")
    samples = array[:, 0] if len(shape) == 2 else array
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    if (kind, itemsize) == ("i", 2):
        yield from (block.astype(np.int16) for block in blocks)
        return
    peak = np.max([0, *(np.abs(block.astype(np.float64)).max() for block in blocks)])
    is_whole = all((np.rint(block) == block).all() for block in blocks)
    if is_whole and (kind != "f" or peak > 1) and peak <= 1 << 15:
        scale = 1
    elif kind == "f" and peak <= 2:
        scale = 1 << 15
    elif kind == "i" and 1 << 23 < peak <= 1 << 31:
        scale = 2.0**-16
    else:
        raise BadAudio(
            f"its peak {peak:g} fits neither int16 nor full scale; scale it to [-1, 1] or save int16"
            if np.isfinite(peak)
            else "it holds NaN or infinity; remove or repair these samples"
        )
    yield from (to_int16(block.astype(np.float64) * scale) for block in blocks)


def to_int16(samples):
    """Round and clip samples in int16 units."""
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


# ---- processes and errors -------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something only the user can mend; its text names the file or option, the problem and the remedy."""


def run_as_script(main):
    """Call main(); what only the user can mend becomes one sentence on stderr and exit status 2."""
    try:
        return main()
    except UserError as error:
        why = error
    except OSError as error:
        why = (
            f"{error.filename or 'a file'} cannot be read or written ({first_line(error)}); check its path, its "
            "permissions and the free space"
        )
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search(
            "out of memory|allocate memory|enough memory", str(error)
        ):
            why = "the memory does not suffice for these sizes; lower --batch_size, --k, --eval_k or the widths"
        elif job()[1] > 1:
            why = (
                f"process {job()[0]} of {job()[1]} lost the others ({first_line(error)}); see what the first of "
                "them to end said, and go on with --resume"
            )
        else:
            raise
    print(f"error: {why}", file=sys.stderr, flush=True)
    if job()[1] > 1:
        sys.stdout.flush()
        os._exit(2)  # no clean-up that would wait for processes that are gone
    sys.exit(2)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest valid flag where one was mistyped."""

    def error(self, message):
        if unknown := re.match("unrecognized arguments: ([^ =]+)", message):
            nearest = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown argument {unknown[1]!r}" + (
                f", did you mean {nearest[0]}?" if nearest else ""
            )
        raise UserError(f"{message}; {self.prog} --help lists what is valid")


@contextlib.contextmanager
def stop_requests():
    """A list that gets Ctrl-C or SIGTERM, so that what is in hand can be finished; the same once more kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as last:
        for number in (signal.SIGINT, signal.SIGTERM):
            last.callback(signal.signal, number, signal.signal(number, receive))
        yield received


def lock(path):
    """A descriptor that holds a file or folder against other processes, until it is closed or the process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another process; wait for it, or give another name"
        ) from None
    except OSError:  # some network file systems know no locks
        pass
    return descriptor


@contextlib.contextmanager
def durably(path):
    """Where to write a file, by one process at a time; it becomes `path` once it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    descriptor, folder = lock(partial), os.open(path.parent, os.O_RDONLY)
    try:
        yield partial
        os.fsync(descriptor)
        partial.replace(path)
        os.fsync(folder)  # the new name as well
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor), os.close(folder)


def write_durably(path, text):
    with durably(path) as partial:
        partial.write_text(text)


def start_processes(batch_size):
    """Set up arithmetic, memory and, under torchrun, the job; returns its number of processes."""
    torch.set_flush_denormal(
        True
    )  # the gradients of particles that have lost their weight are denormal, and slow
    with contextlib.suppress(OSError, AttributeError):  # where the C library is not glibc
        # keep what is freed: faulting the same large blocks in again costs a tenth of every update on a CPU
        m_trim_threshold, m_mmap_max, libc = -1, -4, ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0), libc.mallopt(m_trim_threshold, -1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group()  # gloo between CPUs, NCCL between GPUs
    if batch_size % (processes := job()[1]):
        raise UserError(
            f"--batch_size={batch_size} does not divide among {processes} processes; start as many as do"
        )
    return processes


def choose_device(name):
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
        ) from None
    return device


def describe(device):
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return (
        f"{device}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )


def job():
    """(rank of this process, number of processes) under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
