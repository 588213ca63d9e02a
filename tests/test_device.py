"""What a GPU needs, as far as a CPU can tell."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny import SIZES, write_tiny_data

import common
import vrnn_gauss


def test_a_window_lies_in_one_piece_so_that_its_copy_to_a_gpu_can_be_asynchronous():
    split = SimpleNamespace(
        name="train",
        offsets=np.array([0, 4_000, 8_000]),
        read=lambda starts, samples: np.zeros((len(starts), samples), np.int16),
    )
    batch = common.Excerpts(
        split, x_dim=20, seq_frames=5, reset_freq=2, batch_size=4, seed=0
    ).batch(0)
    assert batch.shape == (2, 5, 4, 20) and all(window.is_contiguous() for window in batch)


def test_evaluation_has_no_tf32_though_updates_have(tmp_path, monkeypatch):
    write_tiny_data(tmp_path / "tiny.h5")
    h = common.parse(
        vrnn_gauss.Hyperparameters,
        [
            *SIZES,
            f"--data={tmp_path}/tiny.h5",
            f"--out_dir={tmp_path}/run",
            "--max_updates=2",
            "--monitor_every=1",
        ],
    )
    training, seen, precision = common.Training(h, particles=1), [], []
    training.device = torch.device("cuda")  # as far as allow_tf32 can tell
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda value: precision.append(value)
    )
    estimate = common.estimate_bounds
    monkeypatch.setattr(
        common, "estimate_bounds", lambda *given: seen.append(precision[-1]) or estimate(*given)
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for _ in training.updates():
        seen.append(precision[-1])
    training.finish()
    assert seen == ["high", "highest", "high", "highest", "highest"]


def test_a_clipping_limit_that_changes_between_updates_is_not_a_number_in_a_graph(tmp_path):
    write_tiny_data(tmp_path / "tiny.h5")
    h = common.parse(
        vrnn_gauss.Hyperparameters,
        [*SIZES, f"--data={tmp_path}/tiny.h5", f"--out_dir={tmp_path}/run"],
    )
    training, moments = common.Training(h, particles=1), []
    for limit in (1.0, 1e-6):
        training.grad_clip.fill_(limit)
        training.next_window()
        rollout = training.model(training.window(), training.state, training.noise(1, h.z_dim))
        loss = vrnn_gauss.objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)
        moments.append(
            torch.cat([state["exp_avg"].flatten() for state in training.optimiser.state.values()])
        )
    assert abs(moments[0].norm() - 0.1) < 1e-5  # 0.1 times a gradient of norm 1
    torch.testing.assert_close(moments[1], 0.9 * moments[0], atol=1e-6, rtol=0)


def test_a_gpu_is_taken_with_its_index_without_which_it_cannot_be_set(monkeypatch):
    taken = []
    monkeypatch.setattr(
        torch, "empty", lambda *size, device: SimpleNamespace(device=torch.device(device, 0))
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device.index))
    assert common.choose_device("cuda") == torch.device("cuda:0") and taken == [0]
