import pytest
import torch
from plain import plain_rollout

import common
import vrnn_gauss_iwae

SIZES = dict(x_dim=5, z_dim=3, rnn_dim=8, q_z_dim=7, p_z_dim=6, p_x_dim=9, x2s_dim=10, z2s_dim=4)
FIELDS = (
    "nll_TBK",
    "kl_TBK",
    "log_w_TBK",
    "q_mean",
    "q_sigma",
    "prior_mean",
    "prior_sigma",
    "x_mean",
    "x_sigma",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return common.VRNN(**SIZES).double()


def inputs(frames=6, batch=4, k=1):
    random = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    return (
        draw(frames, batch, 5),
        (draw(batch * k, 8).tanh(), draw(batch * k, 8)),
        draw(frames, batch * k, 3),
    )


def test_the_faster_product_equals_the_plain_one_with_its_gradients():
    torch.manual_seed(0)
    layer, x = common.Linear(300, 450), torch.randn(6, 40, 300, requires_grad=True)
    assert common.by_onednn(6 * 40, layer.weight)
    results = []
    for y in (layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)):
        results.append((y, *torch.autograd.grad((y**2).sum(), (x, layer.weight, layer.bias))))
    for faster, plain in zip(*results):
        assert (faster - plain).norm() < 1e-6 * plain.norm()


@pytest.mark.parametrize("k", (1, 5))
def test_rollout_and_gradients_equal_the_plain_implementation(model, k):
    x_TBX, state, noise = inputs(k=k)
    rollouts = model(x_TBX, state, noise, k), plain_rollout(model, x_TBX, state, noise, k)
    for field in (*FIELDS, "phi_x"):
        torch.testing.assert_close(getattr(rollouts[0], field), getattr(rollouts[1], field))
    torch.testing.assert_close(rollouts[0].state, rollouts[1].state)
    losses = [vrnn_gauss_iwae.objective(rollout) + rollout.kl_TBK.mean() for rollout in rollouts]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for fast, plain in zip(*gradients):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", (1, 5))
def test_rollout_and_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(k):
    torch.manual_seed(0)
    model = common.VRNN(20, 10, 64, 48, 48, 48, 48, 48)
    x_TBX, noise = torch.randn(10, 8, 20), torch.randn(10, 8 * k, 10)
    losses, gradients = [], []
    for model.bf16 in (False, True):
        rollout = model(x_TBX, None, noise, k)
        assert all(getattr(rollout, field).dtype == torch.float32 for field in FIELDS)
        losses.append(vrnn_gauss_iwae.objective(rollout))
        gradients.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(losses[-1], list(model.parameters()))]
            )
        )
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[
        0
    ].norm()  # autocast of the plain one differs by 0.05


def test_without_z_too_products_are_in_bfloat16():
    model = common.VRNN(20, 0, 64, 48, 48, 48, 48, 48)
    model.bf16, seen = True, []
    model.lstm_h.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    model(torch.randn(3, 8, 20))
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("k", (1, 3))
def test_state_carried_over_windows_equals_one_long_window(model, k):
    x_TBX, state, noise = inputs(frames=12, k=k)
    whole = model(x_TBX, state, noise, k)
    parts = []
    for first in (0, 4, 8):
        parts.append(model(x_TBX[first : first + 4], state, noise[first : first + 4], k))
        state = parts[-1].state
    for field in FIELDS:
        torch.testing.assert_close(
            torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)
        )
    torch.testing.assert_close(parts[-1].state, whole.state)


def test_particles_of_a_sequence_are_adjacent_rows(model):
    x_TBX, _, noise = inputs(k=3)
    together = model(x_TBX, None, noise, 3)
    for b in range(4):
        alone = model(x_TBX[:, b : b + 1], None, noise[:, 3 * b : 3 * b + 3], 3)
        torch.testing.assert_close(together.log_w_TBK[:, b : b + 1], alone.log_w_TBK)
        torch.testing.assert_close(together.x_mean[:, 3 * b : 3 * b + 3], alone.x_mean)


def test_generation_is_the_prior_and_decoder_that_training_scores(model):
    x_TBX = model.generate(7, 4, torch.Generator().manual_seed(2))
    draws, state = torch.Generator().manual_seed(2), model.zero_state(4)
    for x in x_TBX:
        prior_noise = torch.randn(4, 3, generator=draws, dtype=torch.float64)
        seen = model(x[None], state, torch.zeros(1, 4, 3, dtype=torch.float64))
        z = seen.prior_mean + seen.prior_sigma * prior_noise
        scored = model(x[None], state, (z - seen.q_mean) / seen.q_sigma)
        x_noise = torch.randn(4, 5, generator=draws, dtype=torch.float64)
        torch.testing.assert_close(x, (scored.x_mean + scored.x_sigma * x_noise)[0])
        state = scored.state


def test_later_frames_cannot_change_earlier_terms(model):
    x_TBX, state, noise = inputs()
    before = model(x_TBX, state, noise).log_w_TBK
    x_TBX[4:] += 1
    after = model(x_TBX, state, noise).log_w_TBK
    assert torch.equal(before[:4], after[:4])
    assert not torch.isclose(before[4:], after[4:]).any()


def test_initialisation_scales_with_fan_in_and_keeps_a_signal_at_any_width():
    torch.manual_seed(0)
    spread = []
    for width in (32, 600):
        model = common.VRNN(
            x_dim=200,
            z_dim=16,
            rnn_dim=64,
            q_z_dim=width,
            p_z_dim=width,
            p_x_dim=width,
            x2s_dim=width,
            z2s_dim=width,
        )
        largest = model.phi_x[2].weight.abs().max().item()
        assert largest == pytest.approx(0.08 * (600 / width) ** 0.5, rel=0.02)
        spread.append(model.phi_x(torch.randn(1000, 200)).std(0).mean().item())
        for head in (model.posterior[-1], model.prior[-1], model.decoder[-1]):
            mean, sigma = head.bias.chunk(2)
            assert not mean.any() and (sigma == torch.tensor(0.6)).all()
        for block in model.lstm_h.weight.chunk(4):
            torch.testing.assert_close(block @ block.T, torch.eye(64), atol=1e-5, rtol=0)
    assert min(spread) > 0.05


@pytest.mark.parametrize("odd", (0, 1))
def test_mirrored_layers_start_as_linear_maps_that_keep_x_apart(odd):
    """With the last unit of an odd width, which has no partner, only nearly so."""
    torch.manual_seed(0)
    model = common.VRNN(12, 6, 32, 40 + odd, 40 + odd, 40 + odd, 40 + odd, 40 + odd).double()
    model.mirror()
    one, other = torch.randn(2, 1, 50, 12, dtype=torch.float64)
    zeros = torch.zeros(1, 50, 6, dtype=torch.float64)
    mean = [model(x, noise=zeros).q_mean for x in (one, other, one + other)]
    difference = (mean[0] + mean[1] - mean[2]).norm() / mean[2].norm()
    assert difference < (0.5 if odd else 1e-12)
    spread = torch.linalg.svdvals(mean[0][0])
    assert spread[-1] > 0.2 * spread[0], "some directions of x are lost"
    sigma = model(one, noise=zeros).q_sigma
    assert 0.15 < sigma.mean() < 0.25
    norms = torch.cat(
        [layer.weight.norm(dim=1) for layer in model.modules() if isinstance(layer, common.Linear)]
    )
    assert odd or norms.max() < 1.9365, "the first update would shrink it"
