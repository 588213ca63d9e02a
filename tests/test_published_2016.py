"""The pipeline of 2016 against what its scripts did, by hand, and each of its switches to ours."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import h5py
import numpy as np
import published_2016
import pytest
import torch
from published_2016 import Hyperparameters, Run, as_in_2016
from tiny import assert_same_run, main_of, write_quiet_data
from torch.testing import assert_close

import common
import vrnn_gauss_iwae

pytestmark = pytest.mark.usefixtures("short_samples")

TINY = dict(
    x_dim=20,
    z_dim=4,
    rnn_dim=12,
    q_z_dim=8,
    p_z_dim=8,
    p_x_dim=8,
    x2s_dim=8,
    z2s_dim=8,
    seq_frames=5,
    streams=3,
    eval_k=(2, 6),
    eval_recordings=2,
    monitor_windows=8,
    init="by_width",
    device="cpu",
)
WINDOW = 100  # samples
# 2016's rows of the training data below, by hand: windows of three streams of each chapter
STARTS = [0, 280, 560, 100, 380, 660]  # two recordings of file a, 840 samples
STARTS += [840, 1130, 1420, 940, 1230, 1520]  # file b, 870 samples
STARTS += [1800, 1950, 2100]  # file d, 450 samples; file c, of 90, holds no window
OBJECTIVES = dict(
    vrnn=dict(objective="vrnn", rows=4),
    vae=dict(objective="vae", k=3, rows=4),
    iwae=dict(objective="iwae", k=2, rows=8),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("chapters") / "chapters.h5"
    write_quiet_data(path, train=(530, 310, 870, 90, 450), valid=(350, 280), test=(310, 470))
    with h5py.File(path, "a") as file:
        del file["train/names"]
        file["train/names"] = ["a/0", "a/1", "b/0", "c", "d"]
    return path


@pytest.fixture
def start(data, tmp_path):
    """A function that starts a run with these changes to the tiny settings."""

    def start_run(**changes):
        folder = tmp_path / "run"
        return Run(settings(data=str(data), out_dir=str(folder), **changes))

    return start_run


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings(**changes):
    return as_in_2016(Hyperparameters(**{**TINY, **changes}))


def updates_of(run, count):
    """Make updates; what the model was given and what state it returned, in each."""
    seen = []

    def remember(model, given, rollout):
        x_TBX, state, _, copies = given
        seen.append(SimpleNamespace(x=x_TBX, before=state, after=rollout.state, copies=copies))

    hook = run.model.register_forward_hook(remember)
    for _ in range(count):
        run.update()
    hook.remove()
    return seen


def windows_at(run, starts):
    """Windows of the training audio, (T, B, X), normalised."""
    audio = run.corpus.train.audio[:]
    windows = [audio[start : start + WINDOW].reshape(5, 20) for start in starts]
    pcm_TBX = torch.from_numpy(np.stack(windows, axis=1))
    return (pcm_TBX - run.corpus.mean) / run.corpus.std


def four_windows(run, first):
    """Those of four rows of 2016, from the first on."""
    return windows_at(run, STARTS[first : first + 4])


def is_zero(state):
    return not any(part.any() for part in state)


def same(state, other):
    return all(map(torch.equal, state, other))


# ---- rows ----


def test_a_chapter_is_the_recordings_of_one_file(start):
    bounds = list(published_2016.chapters_of(start(rows=4).corpus.train))
    assert bounds == [(0, 840), (840, 1710), (1710, 1800), (1800, 2250)]


def test_row_streams_w_plus_j_is_window_w_of_stream_j():
    starts, streams, numbers = published_2016.rows_of([(0, 840), (840, 1710)], 3, WINDOW)
    assert starts.tolist() == STARTS[:12]
    assert streams.tolist() == [0, 1, 2] * 4
    assert numbers.tolist() == [0, 0, 0, 1, 1, 1] * 2


def test_a_short_chapter_has_as_many_streams_as_windows():
    starts, streams, numbers = published_2016.rows_of([(1000, 1250), (1250, 1349)], 3, WINDOW)
    assert starts.tolist() == [1000, 1125]
    assert streams.tolist() == [0, 1]
    assert numbers.tolist() == [0, 0]


@pytest.mark.parametrize(
    "objective, first_rows",
    [
        ("vrnn", [0, 4, 8, 0]),
        ("vae", [0, 0, 0, 4, 4, 4, 8, 8, 8, 0]),
        ("iwae", [0, 4, 8, 0]),
    ],
)
def test_each_objective_takes_its_rows_in_order_epoch_after_epoch(objective, first_rows, start):
    """IWAE_2's 8 rows of the graph are four windows; the last three of 15 rows fill no update."""
    run = start(**OBJECTIVES[objective])
    seen = updates_of(run, len(first_rows))
    for update, first in zip(seen, first_rows):
        assert torch.equal(update.x, four_windows(run, first))
        assert update.copies == (2 if objective == "iwae" else 1)


# ---- the state that goes on ----


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_row_i_goes_on_from_row_i_but_in_every_fourth_update(objective, start):
    """A replay of VAE_3 so starts from the end of its own window, with no thought of streams."""
    seen = updates_of(start(**OBJECTIVES[objective]), 9)
    for number, update in enumerate(seen):
        if number % 4 == 0:
            assert is_zero(update.before)
        else:
            assert not is_zero(update.before)
            assert same(update.before, seen[number - 1].after)


# ---- the limit on the gradient ----


@pytest.mark.parametrize(
    "objective, k, rows, limit",
    [
        ("vrnn", 5, 128, 640),
        ("vrnn", 5, 25, 125),
        ("vae", 5, 128, 3200),
        ("vae", 2, 25, 250),
        ("iwae", 5, 125, 25),
        ("iwae", 5, 640, 25),
        ("iwae", 2, 640, 10),
    ],
)
def test_the_limit_on_the_mean_over_windows(objective, k, rows, limit):
    assert settings(objective=objective, k=k, rows=rows).grad_clip == pytest.approx(limit)


def test_iwae_takes_the_mean_over_windows_of_which_the_limit_is_larger():
    h = settings(objective="iwae", k=5, rows=125, over_batch="mean")
    assert h.grad_clip == 625


def test_the_default_rows_are_those_of_2016():
    assert [settings(objective=name, k=5).rows for name in OBJECTIVES] == [128, 128, 125]


def test_rows_that_k_does_not_divide_are_refused():
    with pytest.raises(common.UserError, match="--rows 128"):
        settings(objective="iwae", k=5, rows=128)


@pytest.mark.parametrize("name", ("k", "rows", "replays", "streams", "reset_freq", "monitor_every"))
def test_values_that_make_no_sense_are_refused(name):
    with pytest.raises(common.UserError, match=f"--{name}"):
        settings(**dict(OBJECTIVES["iwae"], **{name: 0}))


# ---- an update ----


def plain_loss(objective, rollout, k):
    """The loss of 2016, and how many times the mean over windows it is."""
    frames, windows, copies = rollout.log_w_TBK.shape
    if objective == "vrnn":
        return (rollout.nll_TBK + rollout.kl_TBK).sum() / frames / windows, 1
    if objective == "vae":
        return -rollout.log_w_TBK.sum() / frames / windows / k, 1 / k
    loss = 0.0
    for b in range(windows):
        s = [-rollout.log_w_TBK[:, b, j].sum() / frames for j in range(copies)]
        powers = [(s_j - max(s)).exp() for s_j in s]
        weights = [power / sum(powers) for power in powers]
        loss = loss + sum(weight * s_j for weight, s_j in zip(weights, s))
    return loss, windows


def plain_run(run, h, batches, limit):
    """The same updates in the most obvious way. limit: on the norm after the division by rows."""
    model = copy.deepcopy(run.model)
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(h.seed)
    losses, norms, clipped = [], [], 0
    state = None
    for update, x_TBX in enumerate(batches, start=1):
        noise = torch.randn(5, h.rows, 4, generator=generator)
        rollout = model(x_TBX, state, noise, h.rows // x_TBX.shape[1])
        state = tuple(part.detach() for part in rollout.state)
        loss, scale = plain_loss(h.objective, rollout, h.k)
        gradients = torch.autograd.grad(loss, parameters.values())
        gradients = [gradient / h.rows for gradient in gradients]
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        losses.append(loss.item())
        norms.append(norm * h.rows / scale)
        clipped += norm > limit
        for (name, p), gradient in zip(parameters.items(), gradients):
            if math.isfinite(norm):
                gradient = gradient * min(1, limit / norm)
            else:
                gradient = 0.1 * p.detach()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean = first[name] / (1 - 0.9**update)
            deviation = (second[name] / (1 - 0.999**update)).sqrt()
            p.data -= h.lr * mean / (deviation + 1e-8)
            if name.endswith("weight") and name != "lstm_h.weight":
                norms_of_units = p.data.norm(dim=1, keepdim=True)
                p.data *= (h.weight_norm / norms_of_units).clamp(max=1)
    return SimpleNamespace(
        parameters=parameters,
        first=first,
        second=second,
        losses=losses,
        norms=norms,
        clipped=clipped,
    )


def assert_equal_runs(run, made, plain):
    losses, norms = zip(*made)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-9)
    np.testing.assert_allclose(norms, plain.norms, rtol=1e-9)
    assert_equal_weights(run, plain)


def assert_equal_weights(run, plain):
    close = dict(rtol=1e-9, atol=1e-12)
    for name, p in run.model.named_parameters():
        moments = run.optimiser.state[p]
        assert_close(p.data, plain.parameters[name].data, **close)
        assert_close(moments["exp_avg"], plain.first[name], **close)
        assert_close(moments["exp_avg_sq"], plain.second[name], **close)


@pytest.mark.parametrize("is_loud", (False, True))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_updates_equal_those_of_a_plain_loop(objective, is_loud, start, in_float64):
    """Loud, every gradient is clipped: at 5, once it is divided by the rows of the graph."""
    run = start(**OBJECTIVES[objective], lr=0.01, weight_norm=0.9, seed=1)
    if is_loud:
        run.corpus.std /= 20
    if objective == "vae":
        batches = [four_windows(run, 0)] * 3
    else:
        batches = [four_windows(run, first) for first in (0, 4, 8)]
    plain = plain_run(run, run.h, batches, limit=5)
    made = [run.update() for _ in batches]
    assert_equal_runs(run, made, plain)
    assert run.progress["clipped"] == plain.clipped == (3 if is_loud else 0)


@pytest.mark.parametrize("grad_clip, clipped", ((1.0, 1), (0.0, 0)))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_limit_that_is_given_is_one_on_the_mean(objective, grad_clip, clipped, start, in_float64):
    run = start(**OBJECTIVES[objective], grad_clip=grad_clip)
    times_mean = dict(vrnn=1, vae=1 / 3, iwae=4)[objective]
    limit = grad_clip * times_mean / run.h.rows if grad_clip else math.inf
    plain = plain_run(run, run.h, [four_windows(run, 0)], limit)
    assert_equal_runs(run, [run.update()], plain)
    assert run.progress["clipped"] == plain.clipped == clipped


def test_a_tight_limit_is_widened_on_the_way(start):
    run = start(**OBJECTIVES["iwae"], grad_clip=1.0, widened_after=2)
    norms, clipped = [], []
    for _ in range(3):
        norms.append(run.update()[1])
        clipped.append(run.progress["clipped"])
    assert 1 < min(norms) and max(norms) < 640
    assert clipped == [1, 2, 2]
    run.corpus.std /= 1000
    assert run.update()[1] > 640
    assert run.progress["clipped"] == 3
    run.h.widened_to = 0.0
    assert run.update()[1] > 640
    assert run.progress["clipped"] == 3


def test_the_learning_rate_is_another_for_a_while(start):
    run = start(**OBJECTIVES["iwae"], raised_after=1, raised_until=3, raised_to=0.0)
    moved = []
    for _ in range(4):
        before = [p.clone() for p in run.model.parameters()]
        run.update()
        moved.append(any((p != was).any() for p, was in zip(run.model.parameters(), before)))
    assert moved == [True, False, False, True]


def test_a_tenth_of_the_parameters_replaces_a_gradient_that_is_not_finite(start, in_float64):
    run = start(**OBJECTIVES["vrnn"], lr=0.01)
    run.corpus.std = 0.0
    plain = plain_run(run, run.h, [four_windows(run, 0)], limit=5)
    run.update()
    assert_equal_weights(run, plain)
    assert run.progress["skipped"] == 1
    assert run.progress["clipped"] == 0


@pytest.mark.parametrize("init", ("fixed", "by_width"))
def test_initial_weights(init, start):
    model = start(rows=4, init=init).model
    weight = model.phi_x[2].weight  # of 8 inputs
    bound = 0.08 if init == "fixed" else 0.08 * math.sqrt(600 / 8)
    assert 0.9 * bound < weight.abs().max() <= bound
    for block in model.lstm_h.weight.chunk(4):
        assert_close(block @ block.T, torch.eye(12))
    for head in (model.prior[-1], model.posterior[-1]):
        assert head.bias.tolist() == pytest.approx([0.0] * 4 + [0.6] * 4)
    assert model.decoder[-1].bias.tolist() == pytest.approx([0.0] * 20 + [0.6] * 20)


# ---- switches to ours ----


def test_replays_can_be_switched_off_and_on(start):
    vae = start(objective="vae", k=3, rows=4, replays=1)
    for update, first in zip(updates_of(vae, 3), (0, 4, 8)):
        assert torch.equal(update.x, windows_at(vae, STARTS[first : first + 4]))
    vrnn = start(objective="vrnn", rows=4, replays=2)
    for update, first in zip(updates_of(vrnn, 4), (0, 0, 4, 4)):
        assert torch.equal(update.x, windows_at(vrnn, STARTS[first : first + 4]))


def test_excerpts_are_those_of_the_training_scripts(start):
    run = start(objective="vae", k=2, rows=2, order="excerpts", reset_freq=2, seed=3)
    excerpts = common.Excerpts(run.corpus.train, 20, 5, 2, 2, 3)
    for number, update in enumerate(updates_of(run, 12)):
        window = number // 2  # each is made twice
        pcm_TBX = excerpts.batch(window // 2)[window % 2]
        assert torch.equal(update.x, (pcm_TBX - run.corpus.mean) / run.corpus.std)


def test_by_stream_a_window_goes_on_from_the_one_before_it_in_its_stream(start):
    """All of train as one chapter is three streams of seven windows; an update takes two."""
    run = start(objective="iwae", k=2, rows=4, chapters="all", carried="by_stream", reset_freq=3)
    after = []  # of each row of the epoch
    for number, update in enumerate(updates_of(run, 10)):
        starts = []
        for b in range(2):
            window, stream = divmod(2 * number + b, 3)
            starts.append(750 * stream + WINDOW * window)
            before = [part[2 * b : 2 * b + 2] for part in update.before]
            if window % 3 == 0:
                assert is_zero(before)
            else:
                assert same(before, after[2 * number + b - 3])
            after.append([part[2 * b : 2 * b + 2] for part in update.after])
        assert torch.equal(update.x, windows_at(run, starts))


@pytest.mark.parametrize("order", ("chapters", "excerpts"))
def test_by_stream_all_replays_of_a_window_start_alike(order, start):
    run = start(
        objective="vae",
        k=2,
        rows=3,
        order=order,
        chapters="all",
        carried="by_stream",
        reset_freq=3,
    )
    seen = updates_of(run, 10)
    for number, update in enumerate(seen):
        window = number // 2
        if window % 3 == 0:
            assert is_zero(update.before)
        else:
            assert same(update.before, seen[2 * window - 1].after)


def test_by_stream_no_two_windows_of_an_update_may_follow_each_other(start):
    with pytest.raises(common.UserError, match="by_stream"):
        start(rows=4, carried="by_stream")


@pytest.mark.parametrize("favoured", ("worst", "best"))
@pytest.mark.parametrize("over_time", ("mean", "sum"))
@pytest.mark.parametrize("through_weights", (True, False))
@pytest.mark.parametrize("over_batch", ("sum", "mean"))
def test_single_corrections_of_the_loss_of_iwae(favoured, over_time, through_weights, over_batch):
    torch.manual_seed(0)
    log_w_TBK = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    chosen = dict(
        favoured=favoured,
        over_time=over_time,
        through_weights=through_weights,
        over_batch=over_batch,
    )
    loss = published_2016.iwae_loss(SimpleNamespace(log_w_TBK=log_w_TBK), **chosen)
    (gradient,) = torch.autograd.grad(loss, log_w_TBK)

    expected = 0.0
    for log_w_TK in log_w_TBK.unbind(1):
        s = -log_w_TK.sum(0) / 5
        badness = s if favoured == "worst" else -s
        factor = 1 if over_time == "mean" else 5
        powers = (factor * badness).exp()
        weights = powers / powers.sum()
        if not through_weights:
            weights = weights.detach()
        expected = expected + (weights * s).sum() / (1 if over_batch == "sum" else 3)
    (expected_gradient,) = torch.autograd.grad(expected, log_w_TBK)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient)


def test_the_weights_of_2016_on_a_case_small_enough_to_read():
    """One sequence, two frames, two particles.

    The second is three times as good in each frame: weights 1 and 9.
    """
    one_frame = [[0.0, math.log(3)]]
    log_w_TBK = torch.tensor([one_frame, one_frame], dtype=torch.float64, requires_grad=True)
    rollout = SimpleNamespace(log_w_TBK=log_w_TBK)

    def weights(**corrections):
        """Of the two particles in the gradient."""
        loss = published_2016.iwae_loss(rollout, **corrections)
        (gradient,) = torch.autograd.grad(loss, log_w_TBK)
        return pytest.approx((-gradient.sum(0).flatten()).tolist())

    assert published_2016.iwae_loss(rollout).item() == pytest.approx(-math.log(3) / 4)
    fixed = dict(through_weights=False)
    # the worse particle counts three times as much
    assert weights(**fixed) == [3 / 4, 1 / 4]
    # the mean over time flattens 1 : 9 to 1 : 3
    assert weights(**fixed, favoured="best") == [1 / 4, 3 / 4]
    assert weights(**fixed, favoured="best", over_time="sum") == [1 / 10, 9 / 10]
    assert weights(**fixed, over_time="sum") == [9 / 10, 1 / 10]
    # 0.96 to 0.04: the gradient through the weights adds to it
    s = [0.0, -math.log(3)]
    mean = 3 / 4 * s[0] + 1 / 4 * s[1]
    assert weights() == [3 / 4 * (1 + s[0] - mean), 1 / 4 * (1 + s[1] - mean)]


def test_all_corrections_together_give_the_gradient_of_the_bound():
    torch.manual_seed(0)
    log_w_TBK = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    rollout = SimpleNamespace(log_w_TBK=log_w_TBK)
    loss = published_2016.iwae_loss(rollout, "best", "sum", False, "mean")
    bound = log_w_TBK.sum(0).exp().mean(1).log().mean() / 5
    (gradient,) = torch.autograd.grad(loss, log_w_TBK)
    (correct,) = torch.autograd.grad(-bound, log_w_TBK)
    (of_script,) = torch.autograd.grad(vrnn_gauss_iwae.objective(rollout), log_w_TBK)
    assert_close(gradient, correct)
    assert_close(gradient, of_script)


def test_the_switches_reach_the_loss(start):
    torch.manual_seed(0)
    rollout = SimpleNamespace(log_w_TBK=torch.randn(5, 3, 4))
    switches = dict(favoured="best", over_time="sum", through_weights=False, over_batch="mean")
    h = settings(objective="iwae", k=4, rows=12, **switches)
    expected = published_2016.iwae_loss(rollout, **switches)
    assert published_2016.loss_of(h, rollout) == expected


# ---- the folder of a run ----


def flags(data, **changes):
    values = {**TINY, "data": data, **changes}
    values["eval_k"] = "2 6"
    return [part for name, value in values.items() for part in f"--{name} {value}".split()]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with a run of each objective."""
    folder = tmp_path_factory.mktemp("runs")
    for name, of_objective in OBJECTIVES.items():
        length = dict(max_updates=8, monitor_every=2, lr=0.01)
        main_of("published_2016", *flags(data, out_dir=folder / name, **of_objective, **length))
    return folder


def log_in(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_counts_windows_with_and_without_replays(runs):
    header, _, line, *_ = log_in(runs / "vae")
    assert header["config"]["name"] == "VAE_3 of 2016"
    assert header["config"]["grad_clip"] == 5 * 4 * 3
    assert line["update"] == 4
    assert line["sequences"] == 4 * 4
    assert line["distinct_windows"] == 2 * 4  # the second batch has been begun
    _, _, line, *_ = log_in(runs / "iwae")
    assert line["sequences"] == line["distinct_windows"] == 4 * 4


def test_the_log_has_the_mean_loss_of_its_interval_and_the_last_norm(start):
    run = start(**OBJECTIVES["vrnn"], max_updates=5, monitor_every=3)
    made = []
    make_one = run.update

    def update():
        made.append(make_one())
        return made[-1]

    run.update = update
    run.train()
    lines = run.log[1:]
    assert [line["update"] for line in lines] == [3, 5]
    losses, norms = zip(*made)
    assert [line["grad_norm"] for line in lines] == [norms[2], norms[4]]
    expected = [np.mean(losses[:3]), np.mean(losses[3:])]
    assert [line["train_loss"] for line in lines] == pytest.approx(expected)


def model_in(checkpoint):
    model = common.VRNN(20, 4, 12, 8, 8, 8, 8, 8)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_raw_weights_are_evaluated_on_valid(objective, runs, data):
    model = model_in(runs / objective / "last.pt")
    corpus = common.open_corpus(data)
    bounds = common.window_bounds(model, corpus, corpus.valid, (2,), 5, 8)
    *_, line = log_in(runs / objective)
    assert line["valid"] == common.summarise(bounds, 5, 20, corpus)


def test_the_weights_of_the_best_bound_on_valid_are_tested(start, tmp_path):
    """Of three evaluations on valid, which are made up, the second is the best."""
    run = start(**OBJECTIVES["vrnn"], lr=0.01, max_updates=3, monitor_every=1)
    made_up = iter((1.0, 3.0, 2.0))

    def window_bounds(*_, **__):
        return {"iwae_2": torch.full((8,), next(made_up))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "window_bounds", window_bounds)
        run.train()
    run.corpus.yardsticks = {WINDOW: dict(flac=7.0)}  # as if the file had them
    run.finish()
    model = model_in(run.folder / "best.pt")
    bounds = common.window_bounds(model, run.corpus, run.corpus.test, (2, 6), 5, smc=6)
    evaluation = json.loads((run.folder / "eval.json").read_text())
    assert evaluation["update"] == 2
    assert evaluation["script"] == "published_2016"
    assert evaluation["name"] == "VRNN of 2016"
    assert evaluation["bounds"] == common.summarise(bounds, 5, 20, run.corpus)
    assert evaluation["yardsticks"] == dict(flac=common.yardstick(7.0, 20, run.corpus.std))
    common.write_windows(bounds, 5, tmp_path / "expected.csv")
    assert (run.folder / "windows.csv").read_text() == (tmp_path / "expected.csv").read_text()
    whole = common.evaluate_recordings(model, run.corpus, run.corpus.test, 6, 2)
    assert evaluation["whole_recordings"] == whole
    assert (run.folder / "samples/continued_1.wav").exists()


@pytest.mark.parametrize(
    "changes",
    [
        OBJECTIVES["vrnn"],
        OBJECTIVES["vae"],
        dict(OBJECTIVES["iwae"], rows=6, order="excerpts", carried="by_stream"),
    ],
    ids=lambda changes: changes["objective"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(changes, data, tmp_path):
    """It stops after seven updates, amid the replays of VAE_3 and amid an excerpt."""
    common_flags = dict(**changes, lr=0.01, monitor_every=7)
    at_once = flags(data, **common_flags, out_dir=tmp_path / "at_once")
    in_two = flags(data, **common_flags, out_dir=tmp_path / "in_two")
    main_of("published_2016", *at_once, "--max_updates=14")
    main_of("published_2016", *in_two, "--max_updates=7")
    main_of("published_2016", *in_two, "--max_updates=14", "--resume")
    assert_same_run(tmp_path / "at_once", tmp_path / "in_two")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(data, start):
    run = start(rows=4, max_updates=1)
    run.train()
    stale = run.folder / "eval.json"
    stale.write_text("{}")
    with pytest.raises(common.UserError, match="--resume"):
        start(rows=4)
    with pytest.raises(common.UserError, match="grad_clip was 20.0 and is now 1.0"):
        Run(dataclasses.replace(run.h, resume=True, grad_clip=1.0))
    assert stale.exists()
    Run(dataclasses.replace(run.h, resume=True, max_updates=2))
    assert not stale.exists()


def test_plot_recon_draws_the_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main_of("plot_recon", runs)
    printed = capsys.readouterr().out
    for name in ("VRNN of 2016", "VAE_3 of 2016", "IWAE_2 of 2016"):
        assert f"| {name} | 1 |" in printed
    assert (tmp_path / "recon.png").stat().st_size > 0
