"""VRNN: the variational bound of Chung et al. 2015 (arXiv 1506.02216, equation 11), with the KL term in closed form.

loss = -1/T sum_t [ log p(x_t | z_<=t, x_<t) - KL(q(z_t | x_<=t, z_<t) || p(z_t | x_<t, z_<t)) ],  z ~ q
"""

from dataclasses import dataclass

import common


@dataclass
class Hyperparameters:
    """Each is also a flag: --lr 1e-4, --lr=1e-4, --no-dequantize. With --demo, small ones replace these."""

    # data
    data: str = "data/blizzard.h5"  # HDF5 file made by prepare_blizzard.py
    out_dir: str = "runs/vrnn_gauss"  # where log, checkpoints, evaluation and speech go
    seed: int = 0  # of initialisation, excerpt order and all noise in training
    device: str = "auto"  # auto takes a GPU if there is one; cpu, cuda, cuda:1, ...
    seq_frames: int = 40  # frames in a window, through which gradients flow (40 = 0.5 s)
    reset_freq: int = 4  # windows in an excerpt, over which the LSTM state is carried (4 = 2 s)
    batch_size: int = 128  # sequences in an update, before they are copied k times

    # model
    x_dim: int = 200  # samples in a frame (12.5 ms at 16 kHz)
    z_dim: int = 200  # latent variables in a frame; 0 = an LSTM without them
    rnn_dim: int = 1000  # LSTM units
    q_z_dim: int = 500  # units in each of the four layers of the posterior
    p_z_dim: int = 500  # ... of the prior
    p_x_dim: int = 600  # ... of the decoder
    x2s_dim: int = 600  # ... of phi_x, which the other networks see in place of x
    z2s_dim: int = 500  # ... of phi_z, which the other networks see in place of z
    ar_order: int = 0  # past samples that predict each one; 0 = none (published)
    components: int = 8  # filters and gains that ar_order > 0 mixes
    mirrored_init: bool = True  # linear at first, narrow posterior; off = uniform, as published
    init_from: str = ""  # best.pt of another run to start from

    # objective
    k: int = 1  # samples of z per sequence; the published script takes one

    # optimiser
    lr: float = 3e-4  # Adam's learning rate; networks 128 wide do better with 1e-3
    lr_updates: int = 0  # updates in which it falls in a line to a hundredth; 0 = constant
    max_updates: int = 100_000  # about six epochs of the 283-hour Blizzard corpus
    grad_clip: float = 2560.0  # largest norm of the gradient; 0 = no limit
    weight_norm: float = 1.9365  # largest norm of a unit's incoming weights (not lstm_h); 0 = none
    ema: float = 0.999  # decay of the averaged weights, which are evaluated; 0 = no averaging
    bf16: bool = False  # matrix products of training in bfloat16; evaluation keeps float32

    # noise
    x_noise: float = 0.3  # initial noise on the normalised samples; 0 = none, as published
    x_noise_updates: int = 2000  # updates in which it falls to a hundredth, and ends
    dequantize: bool = True  # add uniform(-1/2, 1/2) LSB to the 16-bit samples in training

    # evaluation
    monitor_every: int = 500  # updates between evaluations on the valid split
    monitor_windows: int = 512  # windows of the valid split in each, spread evenly
    eval_k: tuple[int, ...] = (5, 100)  # particles of the iwae_k bounds; monitored: the first
    eval_recordings: int = 100  # recordings of the test split evaluated whole as well; 0 = none
    evaluate: str = ""  # checkpoint to evaluate on the test split of data; nothing is trained


def objective(rollout):
    """Mean over sequences and samples of the negative bound, nats per frame."""
    return (rollout.nll_TBK + rollout.kl_TBK).mean()


def main():
    h = common.parse(Hyperparameters)
    if h.evaluate:
        return common.evaluate_checkpoint(h)
    training = common.Training(h, particles=h.k)

    @training.captured
    def update():
        x_TBX = training.window()
        noise = training.noise(h.k, h.z_dim)
        rollout = training.model(x_TBX, training.state, noise, h.k)
        loss = objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)

    for _ in training.updates():
        update()
    training.finish()


if __name__ == "__main__":
    common.run_as_script(main)
