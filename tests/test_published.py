"""Equality with the 2016 scripts: outputs, losses, gradients and monitoring channels that their own graphs computed.

tests/reference/ref_*.npz were computed in float64 from the published Theano scripts; the latent noise, the same at
every frame, replaces their random generator.
"""

from pathlib import Path

import numpy as np
import published_2016
import pytest
import torch
from published import from_published, load_published_parameters, published_names

import common

REFERENCE = Path(__file__).parent / "reference"
PARTICLES = dict(vrnn_gauss=1, vrnn_gauss_alt_nll=1, vrnn_gauss_iwae=5)
LOSSES = dict(
    vrnn_gauss=published_2016.vrnn_loss,
    vrnn_gauss_iwae=published_2016.iwae_loss,
    vrnn_gauss_alt_nll=lambda rollout: published_2016.vae_loss(rollout, 5),
)


def load(script):
    """(arrays, float64 model with the published parameters, x_TBX without copies, noise, state)"""
    arrays = dict(np.load(REFERENCE / f"ref_{script}.npz"))
    model = common.VRNN(*map(int, arrays["dims"][:8])).double()
    load_published_parameters(
        model,
        {
            name.removeprefix("param/"): array
            for name, array in arrays.items()
            if name.startswith("param/")
        },
    )
    x_TBX = torch.from_numpy(arrays["in/x"])[:, :: PARTICLES[script]]
    noise = torch.from_numpy(arrays["in/eps"]).expand(len(x_TBX), -1, -1)
    state = torch.from_numpy(arrays["in/s0"]).chunk(2, dim=1)
    return arrays, model, x_TBX, noise, state


def assert_equal(ours, published):
    ours = ours.detach().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    np.testing.assert_allclose(
        ours.reshape(published.shape), published, rtol=1e-9, atol=1e-9 * abs(published).max()
    )


@pytest.mark.parametrize("script", PARTICLES)
def test_outputs_equal_the_published_ones(script):
    arrays, model, x_TBX, noise, state = load(script)
    rollout = model(x_TBX, state, noise, PARTICLES[script])
    for ours, published in (
        ("q_mean", "phi_mu"),
        ("q_sigma", "phi_sig"),
        ("prior_mean", "prior_mu"),
        ("prior_sigma", "prior_sig"),
        ("x_mean", "theta_mu"),
        ("x_sigma", "theta_sig"),
    ):
        assert_equal(getattr(rollout, ours), arrays[f"out/{published}"])
    assert_equal(rollout.kl_TBK, arrays["out/kl"])
    assert_equal(
        rollout.nll_TBK if script == "vrnn_gauss" else -rollout.log_w_TBK,
        arrays["out/per_step_term"],
    )


@pytest.mark.parametrize("script", PARTICLES)
def test_states_equal_the_published_ones_when_run_frame_by_frame(script):
    arrays, model, x_TBX, noise, state = load(script)
    for t, published in enumerate(arrays["out/s_tm1"]):
        assert_equal(torch.cat(state, dim=1), published)
        state = model(x_TBX[t : t + 1], state, noise[t : t + 1], PARTICLES[script]).state


@pytest.mark.parametrize("script", PARTICLES)
def test_loss_and_all_gradients_equal_the_published_ones(script):
    arrays, model, x_TBX, noise, state = load(script)
    loss = LOSSES[script](model(x_TBX, state, noise, PARTICLES[script]))
    loss.backward()
    assert_equal(loss, arrays["out/loss"])
    published = from_published(
        model,
        {
            name.removeprefix("grad/"): array
            for name, array in arrays.items()
            if name.startswith("grad/")
        },
    )
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == published.keys()
    for name, gradient in published.items():
        assert_equal(ours[name], gradient)


@pytest.mark.parametrize("script", PARTICLES)
def test_monitoring_channels_equal_the_published_ones(script):
    arrays, model, x_TBX, noise, _ = load(script)
    rollout = model(x_TBX, None, noise, PARTICLES[script])
    channels = [
        (rollout.nll_TBK + rollout.kl_TBK).mean(),
        rollout.nll_TBK.mean(),
        rollout.kl_TBK.mean(),
    ]
    for tensor in (rollout.q_sigma, rollout.prior_sigma, rollout.x_sigma, x_TBX, rollout.x_mean):
        channels += [tensor.max(), tensor.mean(), tensor.min()]
    assert_equal(torch.stack(channels), arrays["out/monitor"])


def test_published_weights_favour_the_worst_particle():
    arrays, model, x_TBX, noise, state = load("vrnn_gauss_iwae")
    log_w_BK = model(x_TBX, state, noise, 5).log_w_TBK.sum(0)
    assert (arrays["out/ws_normalized"].argmax(1) == log_w_BK.argmin(1).numpy()).all()


def test_every_parameter_has_a_published_name():
    arrays, model, *_ = load("vrnn_gauss")
    mapped = published_names(model)
    assert mapped.keys() == dict(model.named_parameters()).keys()
    assert sorted(name for names in mapped.values() for name in names) == sorted(
        name.removeprefix("param/") for name in arrays if name.startswith("param/")
    )


def test_full_size_model_has_the_published_number_of_parameters():
    model = common.VRNN(
        x_dim=200,
        z_dim=200,
        rnn_dim=1000,
        q_z_dim=500,
        p_z_dim=500,
        p_x_dim=600,
        x2s_dim=600,
        z2s_dim=500,
    )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 15.89


def test_weight_norm_rescales_every_published_column_of_w_and_nothing_else():
    arrays, model, *_ = load("vrnn_gauss")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.constrain_weights(1.9365)
    for name, p in model.named_parameters():
        if name.endswith("bias") or name == "lstm_h.weight":
            assert torch.equal(p, before[name])
        else:
            norms = before[name].norm(dim=1)
            torch.testing.assert_close(p.norm(dim=1), norms.clamp(max=1.9365), rtol=1e-6, atol=0)
