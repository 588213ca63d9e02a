"""The VRNN against the same model written plainly, and subclasses with something of their own."""

import pytest
import torch
import variants
from plain import plain_rollout
from torch.testing import assert_close

import common
import vrnn_gauss_iwae

SIZES = dict(x_dim=5, z_dim=3, rnn_dim=8, q_z_dim=7, p_z_dim=6, p_x_dim=9, x2s_dim=10, z2s_dim=4)
BATCH = 4
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


def new_model(kind=common.VRNN):
    torch.manual_seed(0)
    return kind(*SIZES.values()).double()


@pytest.fixture
def model():
    return new_model()


def inputs(frames=6, k=1):
    """x_TBX, the state before it, and noise."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x_TBX = draw(frames, BATCH, 5)
    h = draw(BATCH * k, 8).tanh()
    c = draw(BATCH * k, 8)
    noise = draw(frames, BATCH * k, 3)
    return x_TBX, (h, c), noise


def flat_gradient(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def loss_of(rollout):
    """One that every parameter has a part in."""
    return vrnn_gauss_iwae.objective(rollout) + rollout.kl_TBK.mean()


def assert_same_rollout(rollout, other, model):
    for field in (*FIELDS, "phi_x"):
        assert_close(getattr(rollout, field), getattr(other, field))
    assert_close(rollout.state, other.state)
    gradients = torch.autograd.grad(loss_of(rollout), list(model.parameters()))
    others = torch.autograd.grad(loss_of(other), list(model.parameters()))
    for gradient, other_gradient in zip(gradients, others):
        assert_close(gradient, other_gradient, rtol=1e-9, atol=1e-12)


def test_the_faster_product_equals_the_plain_one_with_its_gradients():
    torch.manual_seed(0)
    layer = common.Linear(300, 450)
    x = torch.randn(6, 40, 300, requires_grad=True)
    assert common.by_onednn(6 * 40, layer.weight)
    faster = layer(x)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (faster - plain).norm() < 1e-6 * plain.norm()
    inputs_of_it = (x, layer.weight, layer.bias)
    gradients = torch.autograd.grad((faster**2).sum(), inputs_of_it)
    plain_gradients = torch.autograd.grad((plain**2).sum(), inputs_of_it)
    for gradient, plain_gradient in zip(gradients, plain_gradients):
        assert (gradient - plain_gradient).norm() < 1e-6 * plain_gradient.norm()


@pytest.mark.parametrize("k", (1, 5))
def test_rollout_and_gradients_equal_the_plain_implementation(model, k):
    x_TBX, state, noise = inputs(k=k)
    rollout = model(x_TBX, state, noise, k)
    plain = plain_rollout(model, x_TBX, state, noise, k)
    assert_same_rollout(rollout, plain, model)


# ---- the recurrence, plain and fast ----


def random_ancestors(frames, k):
    """(T, B*k), each of the same sequence."""
    own = torch.arange(BATCH).mul(k).view(1, BATCH, 1)
    chosen = torch.randint(k, (frames, BATCH, k), generator=torch.Generator().manual_seed(3))
    return (own + chosen).flatten(1)


@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize("is_resampled", (False, True))
def test_the_fast_recurrence_equals_the_plain_one_with_its_gradients(model, k, is_resampled):
    x_TBX, (h, c), noise = inputs(k=k)
    ancestors = random_ancestors(len(x_TBX), k) if is_resampled else None
    phi_x = model.phi_x(x_TBX).detach().requires_grad_()
    h.requires_grad_()
    c.requires_grad_()
    own = [phi_x, h, c, *model.parameters()]

    def outputs_and_gradients(recurrence):
        h_before, phi_z, q_z, last_h, last_c = recurrence(model, phi_x, noise, h, c, k, ancestors)
        outputs = [h_before, phi_z, *q_z, last_h, last_c]
        torch.manual_seed(5)
        loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
        return outputs, torch.autograd.grad(loss, own, allow_unused=True)

    assert common.has_fast_recurrence(model)
    outputs, gradients = outputs_and_gradients(common.fast_recurrence)
    plain_outputs, plain_gradients = outputs_and_gradients(common.VRNN.recurrence)
    for output, plain in zip(outputs, plain_outputs, strict=True):
        assert_close(output, plain, rtol=1e-12, atol=1e-12)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert (gradient is None) == (plain is None)
        if gradient is not None:
            assert gradient.any()
            assert_close(gradient, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", (*variants.OF_THE_RECURRENCE, variants.Forgetful))
def test_a_model_with_another_step_or_network_is_not_run_by_the_fast_recurrence(kind, monkeypatch):
    def refuse(*given):
        raise AssertionError("the fast recurrence was run")

    monkeypatch.setattr(common, "fast_recurrence", refuse)
    x_TBX, state, noise = inputs()
    new_model(kind)(x_TBX, state, noise)
    with pytest.raises(AssertionError, match="was run"):
        new_model()(x_TBX, state, noise)


@pytest.mark.parametrize("network", ("posterior_h", "lstm_x", "lstm_z"))
def test_a_linear_layer_of_another_kind_is_called(model, network):
    x_TBX, state, noise = inputs()
    before = model(x_TBX, state, noise)
    getattr(model, network).__class__ = variants.BoundedLinear
    after = model(x_TBX, state, noise)
    assert (before.log_w_TBK - after.log_w_TBK)[1:].abs().min() > 1e-9


# ---- subclasses ----


def rollout_by_methods(model, x_TBX, state, noise, k):
    """Frame by frame, with a copy of x for every particle, by the methods of the model alone."""
    h, c = state
    frames = []
    for x, noise_t in zip(x_TBX.repeat_interleave(k, dim=1), noise):
        phi_x = model.phi_x(x)
        q_mean, q_sigma = model.q_z(phi_x, h)
        prior_mean, prior_sigma = model.p_z(h)
        z = q_mean + q_sigma * noise_t
        phi_z = model.phi_z(z)
        x_mean, x_sigma = model.p_x(phi_z, h)
        log_px = common.gaussian_log_density(x, x_mean, x_sigma)
        log_pz = common.gaussian_log_density(z, prior_mean, prior_sigma)
        log_qz = common.gaussian_log_density(z, q_mean, q_sigma)
        frames.append(
            dict(
                nll_TBK=-log_px.view(-1, k),
                kl_TBK=common.gaussian_kl(q_mean, q_sigma, prior_mean, prior_sigma).view(-1, k),
                log_w_TBK=(log_px + log_pz - log_qz).view(-1, k),
                q_mean=q_mean,
                q_sigma=q_sigma,
                prior_mean=prior_mean,
                prior_sigma=prior_sigma,
                x_mean=x_mean,
                x_sigma=x_sigma,
                phi_x=phi_x[::k],
            )
        )
        h, c = model.lstm(model.into_lstm(phi_x, phi_z, h), h, c)
    by_name = {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}
    return common.Rollout(**by_name, state=(h, c))


@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize("kind", variants.ALL)
def test_a_subclass_is_rolled_out_by_its_own_methods(kind, k):
    model = new_model(kind)
    x_TBX, state, noise = inputs(k=k)
    rollout = model(x_TBX, state, noise, k)
    assert_same_rollout(rollout, rollout_by_methods(model, x_TBX, state, noise, k), model)
    theirs = plain_rollout(new_model(), x_TBX, state, noise, k)
    assert not torch.isclose(rollout.log_w_TBK[1:], theirs.log_w_TBK[1:]).any()


@pytest.mark.parametrize("kind", variants.ALL)
def test_densities_at_fixed_z_are_those_of_the_subclass(kind):
    model = new_model(kind)
    x_TBX, state, noise = inputs(k=3)
    rollout = model(x_TBX, state, noise, 3)
    z = rollout.q_mean + rollout.q_sigma * noise
    log_p_TBK, log_q_TBK = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, 3)
    assert_close(log_p_TBK - log_q_TBK, rollout.log_w_TBK)


@pytest.mark.parametrize("kind", (common.VRNN, *variants.ALL))
def test_generation_is_the_prior_and_decoder_that_training_scores(kind):
    model = new_model(kind)
    x_TBX = model.generate(7, BATCH, torch.Generator().manual_seed(2))
    draws = torch.Generator().manual_seed(2)
    state = model.zero_state(BATCH)
    for x in x_TBX:
        prior_noise = torch.randn(BATCH, 3, generator=draws, dtype=torch.float64)
        seen = model(x[None], state, torch.zeros(1, BATCH, 3, dtype=torch.float64))
        z = seen.prior_mean + seen.prior_sigma * prior_noise
        scored = model(x[None], state, (z - seen.q_mean) / seen.q_sigma)
        x_noise = torch.randn(BATCH, 5, generator=draws, dtype=torch.float64)
        assert_close(x, (scored.x_mean + scored.x_sigma * x_noise)[0])
        state = scored.state


# ---- precision ----


@pytest.mark.parametrize("k", (1, 5))
def test_rollout_and_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(k):
    torch.manual_seed(0)
    model = common.VRNN(20, 10, 64, 48, 48, 48, 48, 48)
    x_TBX = torch.randn(10, 8, 20)
    noise = torch.randn(10, 8 * k, 10)

    def loss_and_gradient():
        rollout = model(x_TBX, None, noise, k)
        for field in FIELDS:
            assert getattr(rollout, field).dtype == torch.float32
        loss = vrnn_gauss_iwae.objective(rollout)
        return loss, flat_gradient(loss, model)

    loss, gradient = loss_and_gradient()
    model.bf16 = True
    rounded_loss, rounded_gradient = loss_and_gradient()
    assert loss != rounded_loss
    assert_close(loss, rounded_loss, rtol=2e-3, atol=0)
    # autocast of the plain model differs by 0.05
    assert (gradient - rounded_gradient).norm() < 0.1 * gradient.norm()


def test_the_plain_recurrence_rounds_to_bfloat16_where_the_fast_one_does():
    torch.manual_seed(0)
    model = common.VRNN(20, 10, 64, 48, 48, 48, 48, 48)
    model.bf16 = True
    phi_x = model.phi_x(torch.randn(10, 8, 20).bfloat16())
    noise = torch.randn(10, 8 * 3, 10)
    h, c = model.zero_state(8 * 3)
    found = common.fast_recurrence(model, phi_x, noise, h, c, 3, None)
    plain = model.recurrence(phi_x, noise, h, c, 3, None)
    for ours, theirs in zip(
        (*found[:2], *found[2], *found[3:]), (*plain[:2], *plain[2], *plain[3:])
    ):
        assert ours.dtype == theirs.dtype
        assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.02)


def test_without_z_too_products_are_in_bfloat16():
    model = common.VRNN(20, 0, 64, 48, 48, 48, 48, 48)
    model.bf16 = True
    seen = []
    model.lstm_h.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    model(torch.randn(3, 8, 20))
    assert seen == [torch.bfloat16] * 3


# ---- what goes on, and what is apart ----


@pytest.mark.parametrize("k", (1, 3))
def test_state_carried_over_windows_equals_one_long_window(model, k):
    x_TBX, state, noise = inputs(frames=12, k=k)
    whole = model(x_TBX, state, noise, k)
    parts = []
    for first in (0, 4, 8):
        parts.append(model(x_TBX[first : first + 4], state, noise[first : first + 4], k))
        state = parts[-1].state
    for field in FIELDS:
        joined = torch.cat([getattr(part, field) for part in parts])
        assert_close(joined, getattr(whole, field))
    assert_close(parts[-1].state, whole.state)


def test_particles_of_a_sequence_are_adjacent_rows(model):
    x_TBX, _, noise = inputs(k=3)
    together = model(x_TBX, None, noise, 3)
    for b in range(BATCH):
        rows = slice(3 * b, 3 * b + 3)
        alone = model(x_TBX[:, b : b + 1], None, noise[:, rows], 3)
        assert_close(together.log_w_TBK[:, b : b + 1], alone.log_w_TBK)
        assert_close(together.x_mean[:, rows], alone.x_mean)


def test_later_frames_cannot_change_earlier_terms(model):
    x_TBX, state, noise = inputs()
    before = model(x_TBX, state, noise).log_w_TBK
    x_TBX[4:] += 1
    after = model(x_TBX, state, noise).log_w_TBK
    assert torch.equal(before[:4], after[:4])
    assert not torch.isclose(before[4:], after[4:]).any()


# ---- initialisation ----


@pytest.mark.parametrize("width", (32, 600))
def test_initialisation_scales_with_fan_in_and_keeps_a_signal_at_any_width(width):
    torch.manual_seed(0)
    model = common.VRNN(200, 16, 64, width, width, width, width, width)
    largest = model.phi_x[2].weight.abs().max().item()
    assert largest == pytest.approx(0.08 * (600 / width) ** 0.5, rel=0.02)
    spread = model.phi_x(torch.randn(1000, 200)).std(0).mean()
    assert spread > 0.05
    for head in (model.posterior[-1], model.prior[-1], model.decoder[-1]):
        mean, sigma = head.bias.chunk(2)
        assert not mean.any()
        assert (sigma == torch.tensor(0.6)).all()
    for block in model.lstm_h.weight.chunk(4):
        assert_close(block @ block.T, torch.eye(64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("odd", (0, 1))
def test_mirrored_layers_start_as_linear_maps_that_keep_x_apart(odd):
    """With the last unit of an odd width, which has no partner, only nearly so."""
    torch.manual_seed(0)
    width = 40 + odd
    model = common.VRNN(12, 6, 32, width, width, width, width, width).double()
    model.mirror()
    one, other = torch.randn(2, 1, 50, 12, dtype=torch.float64)
    zeros = torch.zeros(1, 50, 6, dtype=torch.float64)
    of_one = model(one, noise=zeros)
    of_other = model(other, noise=zeros)
    of_both = model(one + other, noise=zeros)
    difference = of_one.q_mean + of_other.q_mean - of_both.q_mean
    assert difference.norm() < (0.5 if odd else 1e-12) * of_both.q_mean.norm()
    spread = torch.linalg.svdvals(of_one.q_mean[0])
    assert spread[-1] > 0.2 * spread[0], "some directions of x are lost"
    assert 0.15 < of_one.q_sigma.mean() < 0.25
    if not odd:
        for layer in model.modules():
            if isinstance(layer, common.Linear):
                assert layer.weight.norm(dim=1).max() < 1.9365, "the first update would shrink it"


def test_of_many_latents_those_beyond_the_first_begin_as_the_prior():
    torch.manual_seed(0)
    few = common.FrameLikelihood.active
    model, alone = (common.VRNN(12, z, 32, 160, 160, 40, 40, 40) for z in (3 * few, few))
    for vrnn in (model, alone):
        vrnn.mirror()
    rollout = model(torch.randn(4, 50, 12))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(rollout.q_mean, rollout.q_sigma),
        torch.distributions.Normal(rollout.prior_mean, rollout.prior_sigma),
    ).mean((0, 1))
    assert kl[:few].min() > 1
    assert kl[few:].max() < 0.05
    of_active, of_others = model.phi_z[0].weight.split((few, 2 * few), dim=1)
    assert torch.isclose(of_active.norm(), alone.phi_z[0].weight.norm())
    for network in (model.posterior, model.prior):
        weights = network[-1].weight[:few]
        overlaps = weights @ weights.t()
        torch.testing.assert_close(overlaps, overlaps[0, 0] * torch.eye(few))
    assert of_others.norm() < 0.2 * of_active.norm()
    assert of_others.any() and model.posterior[-1].weight[few : 3 * few].any(), (
        "they could not learn"
    )


def test_under_the_adaptive_likelihood_all_latents_begin_as_the_prior():
    torch.manual_seed(0)
    model = common.VRNN(12, 6, 32, 40, 40, 40, 40, 40, ar_order=4, components=2)
    model.mirror()
    rollout = model(torch.randn(4, 50, 12))
    assert rollout.kl_TBK.mean() < 0.05
    assert model.phi_z[0].weight.norm(dim=0).max() < 0.3, "z is hardly heard"
    assert model.phi_z[0].weight.all(), "z could not be learnt"
