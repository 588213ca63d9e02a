"""What a GPU needs, as far as a CPU can tell."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny import tiny_training, update_with

import common
import vrnn_gauss


def test_a_window_lies_in_one_piece_so_that_its_copy_to_a_gpu_can_be_asynchronous():
    split = SimpleNamespace(
        name="train",
        offsets=np.array([0, 4_000, 8_000]),
        read=lambda starts, samples: np.zeros((len(starts), samples), np.int16),
    )
    excerpts = common.Excerpts(split, x_dim=20, seq_frames=5, reset_freq=2, batch_size=4, seed=0)
    batch = excerpts.batch(0)
    assert batch.shape == (2, 5, 4, 20)
    assert all(window.is_contiguous() for window in batch)


def test_evaluation_has_no_tf32_though_updates_have(tmp_path, data, monkeypatch):
    flags = ("--max_updates=2", "--monitor_every=1")
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run", *flags)
    training.device = torch.device("cuda")  # as far as allow_tf32 can tell
    precision = []
    seen = []
    estimate_bounds = common.estimate_bounds

    def seen_bounds(*given):
        seen.append(precision[-1])
        return estimate_bounds(*given)

    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision.append)
    monkeypatch.setattr(common, "estimate_bounds", seen_bounds)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for _ in training.updates():
        seen.append(precision[-1])
    training.finish()
    assert seen == ["high", "highest", "high", "highest", "highest"]


def test_a_clipping_limit_that_changes_between_updates_is_not_a_number_in_a_graph(tmp_path, data):
    _, training = tiny_training(vrnn_gauss, data, tmp_path / "run")
    update = update_with(training, vrnn_gauss.objective)
    moments = []
    for limit in (1.0, 1e-6):
        training.grad_clip.fill_(limit)
        training.next_window()
        update()
        states = training.optimiser.state.values()
        moments.append(torch.cat([state["exp_avg"].flatten() for state in states]))
    first, second = moments
    assert abs(first.norm() - 0.1) < 1e-5  # 0.1 times a gradient of norm 1
    torch.testing.assert_close(second, 0.9 * first, atol=1e-6, rtol=0)


def test_a_gpu_is_taken_with_its_index_without_which_it_cannot_be_set(monkeypatch):
    taken = []

    def empty(*size, device):
        return SimpleNamespace(device=torch.device(device, 0))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    assert common.choose_device("cuda") == torch.device("cuda:0")
    assert taken == [0]
