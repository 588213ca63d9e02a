"""Subclasses of the VRNN, each with one thing of its own in place of what is written out."""

import torch
from torch import nn

import common


def with_tanh(network):
    """The same network with a Tanh in place of every ReLU."""
    layers = [nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in network]
    return nn.Sequential(*layers)


class TanhPosterior(common.VRNN):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.posterior = with_tanh(self.posterior)


class TanhPhiZ(common.VRNN):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.phi_z = with_tanh(self.phi_z)


class TanhPrior(common.VRNN):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.prior = with_tanh(self.prior)


class TanhDecoder(common.VRNN):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.decoder = with_tanh(self.decoder)


class BoundedLinear(common.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class BoundedFirstLayer(common.VRNN):
    """Of the posterior, where it sees x."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        layer = self.posterior_x
        self.posterior_x = BoundedLinear(layer.in_features, layer.out_features)


class DeepGates(common.VRNN):
    """Two layers from h_{t-1} to the gates."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        deeper = common.Linear(self.rnn_dim, self.rnn_dim)
        self.lstm_h = nn.Sequential(deeper, nn.Tanh(), self.lstm_h)

    def zero_state(self, rows):
        zeros = self.lstm_h[2].weight.new_zeros(rows, self.rnn_dim)
        return zeros, zeros, *self.likelihood.zero_memory(zeros, rows)


class WidePosterior(common.VRNN):
    def q_z(self, phi_x, h):
        mean, sigma = super().q_z(phi_x, h)
        return mean.tanh(), 2 * sigma


class LoudDecoder(common.VRNN):
    def p_x(self, phi_z, h):
        mean, sigma, *others = super().p_x(phi_z, h)
        return mean, 3 * sigma, *others


class GatesOfZTwice(common.VRNN):
    def into_lstm(self, phi_x, phi_z, h):
        return super().into_lstm(phi_x, 2 * phi_z, h)


class LeakyLSTM(common.VRNN):
    def lstm(self, from_input, h, c):
        new_h, new_c = super().lstm(from_input, h, c)
        return (new_h + h) / 2, new_c


class Forgetful(common.VRNN):
    """A recurrence of its own: frames know nothing of each other."""

    def recurrence(self, phi_x, noise, h, c, k, ancestors):
        h_before = []
        for t in range(len(phi_x)):
            h_before.append(h)
            if ancestors is not None:
                h, c = h[ancestors[t]], c[ancestors[t]]
        h_before = torch.stack(h_before)
        q_mean, q_sigma = self.q_z(phi_x, h_before)
        phi_z = self.phi_z(q_mean + q_sigma * noise)
        return h_before, phi_z, (q_mean, q_sigma), h, c


class WithoutNoise(common.VRNN):
    def forward(self, x_TBX, state=None, noise=None, k=1, ancestors=None):
        return super().forward(x_TBX, state, torch.zeros_like(noise), k, ancestors)


# What of its own each has is seen by the recurrence, so that the fast one would be wrong for it.
OF_THE_RECURRENCE = (
    TanhPosterior,
    TanhPhiZ,
    BoundedFirstLayer,
    DeepGates,
    WidePosterior,
    GatesOfZTwice,
    LeakyLSTM,
)
ALL = (*OF_THE_RECURRENCE, TanhPrior, TanhDecoder, LoudDecoder)
