"""The parameters of the 2016 scripts under their own names, for a VRNN."""

import numpy as np
import torch


def published_names(model):
    """{our parameter: published names}, several where we hold side by side what the 2016 scripts held apart."""
    names = {}

    def layer(ours, *weights, biases):
        names[f"{ours}.weight"] = weights
        names[f"{ours}.bias"] = biases

    def stack(ours, unit, first_layer, last_layer, first_index, inputs):
        for n in range(first_layer, last_layer + 1):
            source = inputs if n == 1 else f"{unit}_{n - 1}"
            layer(
                f"{ours}.{first_index + 2 * (n - first_layer)}",
                f"W_{source}__{unit}_{n}",
                biases=[f"b_{unit}_{n}"],
            )

    def head(ours, unit):
        layer(
            ours,
            f"W_{unit}_4__{unit}_mu",
            f"W_{unit}_4__{unit}_sig",
            biases=[f"b_{unit}_mu", f"b_{unit}_sig"],
        )

    stack("phi_x", "x", 1, 4, 0, "x_t")
    stack("phi_z", "z", 1, 4, 0, "z_t")
    layer("posterior_x", "W_x_4__phi_1", biases=["b_phi_1"])
    names["posterior_h.weight"] = ["W_s_tm1__phi_1"]
    stack("posterior", "phi", 2, 4, 1, None)
    head("posterior.7", "phi")
    stack("prior", "prior", 1, 4, 0, "s_tm1")
    head("prior.8", "prior")
    layer("decoder_z", "W_z_4__theta_1", biases=["b_theta_1"])
    names["decoder_h.weight"] = ["W_s_tm1__theta_1"]
    stack("decoder", "theta", 2, 4, 1, None)
    head("decoder.7", "theta")
    layer("lstm_x", "W_x_4__rnn", biases=["b_rnn"])
    names["lstm_z.weight"] = ["W_z_4__rnn"]
    names["lstm_h.weight"] = ["U_rnn__rnn"]
    return names


def from_published(model, arrays):
    """{our parameter: array (out, in)} from arrays under the published names, stored (in, out)."""
    return {
        ours: np.concatenate([np.asarray(arrays[name]).T for name in theirs])
        for ours, theirs in published_names(model).items()
    }


@torch.no_grad()
def load_published_parameters(model, arrays):
    """Copy the parameters of a published script into model.

    arrays: published name (W_x_t__x_1, b_x_1, U_rnn__rnn, ...) to array stored (in, out); LSTM column blocks candidate,
    input, forget, output. A missing name raises KeyError, a wrong shape ValueError.
    """
    parameters = dict(model.named_parameters())
    for ours, array in from_published(model, arrays).items():
        if parameters[ours].shape != array.shape:
            raise ValueError(
                f"{ours} has shape {tuple(parameters[ours].shape)}, the published array {array.shape}"
            )
        parameters[ours].copy_(torch.as_tensor(array))
