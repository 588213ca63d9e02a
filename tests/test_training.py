"""What Training does around the update of a script."""

import torch

import common


class FixedWeights:
    """One latent number; log_w given for each frame and particle; the state counts the rows."""

    z_dim = 1

    def __init__(self, log_w_TBK):
        self.frames = iter(log_w_TBK)

    def __call__(self, x_TBX, state, noise, k):
        log_w_TBK = next(self.frames)[None]
        rows = torch.arange(log_w_TBK.numel(), dtype=torch.float64).unsqueeze(1)
        return common.Rollout(None, None, log_w_TBK, *[None] * 6, state=(rows,), phi_x=None)


def test_a_filter_whose_states_are_carried_on_resamples_at_its_last_frame_and_at_no_other():
    log_w_TBK = torch.tensor([[[0.5, 0.3, 0.2]], [[1.0, 1.0, 1.0]]], dtype=torch.float64).log()  # effective size 2.6
    x_TBX, noise, uniform_TB = torch.zeros(2, 1, 1), torch.zeros(2, 3, 1), torch.full((2, 1), 0.1)
    kept, resampled = (common.particle_filter(FixedWeights(log_w_TBK), x_TBX, None, noise, uniform_TB, 3, resample_last)
                       for resample_last in (False, True))
    assert kept.state[0].flatten().tolist() == [0, 1, 2]
    assert resampled.state[0].flatten().tolist() == [0, 0, 1]  # half, 0.8 and 1 are passed by 0.03, 0.37 and 0.70
    assert torch.equal(kept.log_likelihood_TB, resampled.log_likelihood_TB)
