"""IWAE_K: the importance-weighted bound of Burda et al. 2015 (arXiv 1509.00519, equation 8) over whole sequences.

loss = -1/T log 1/K sum_k w_k,  log w_k = sum_t log [ p(x_t, z_t^k | x_<t, z_<t^k) / q(z_t^k | x_<=t, z_<t^k) ]
"""

from dataclasses import dataclass

import torch

import common


@dataclass
class Hyperparameters:
    """Each is also a flag: --lr 1e-4, --lr=1e-4, --no-dequantize. With --demo, small ones replace these."""

    # data
    data: str = "data/blizzard.h5"  # HDF5 file made by prepare_blizzard.py
    out_dir: str = "runs/vrnn_gauss_iwae"  # where log, checkpoints, evaluation and speech go
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
    k: int = 5  # particles per sequence
    dreg: bool = False  # doubly reparameterised gradient (see objective_dreg)
    resample: bool = False  # resample the particles within a window (see objective_resampled)

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
    """Minus the mean over sequences of the bound, nats per frame.

    Its gradient weighs particle k by w_k / sum w. The states of the K particles are carried on
    unweighted: from the second window of an excerpt on this bounds log E[p(x_w | h)] over the
    states that q has led to, not log p(x_w | x_<w).
    """
    log_w_BK = rollout.log_w_TBK.sum(0)
    return -common.importance_weighted(log_w_BK).mean() / len(rollout.log_w_TBK)


def objective_dreg(rollout, log_p_TBK, log_q_TBK):
    """The same loss with the doubly reparameterised gradient of Tucker et al. 2018 (arXiv 1810.04152, equation 8).

    With v_k = w_k / sum w, the parameters get sum_k v_k d log p(x, z_k) at fixed z_k in their part as a model, and
    sum_k v_k^2 (d log w_k / d z_k) (d z_k / d parameters) in their part as a posterior, whose whole path z_1..z_T
    counts. Networks that play both parts get both. Here v_k^2 log w_k gives the second term, and besides it
    v_k^2 d log p - v_k^2 d log q at fixed z_k, which the other two terms complete and cancel. log_p_TBK, log_q_TBK:
    log p(x_t, z_t | .) and log q(z_t | .) at fixed z, as functions of the parameters alone.
    """
    log_w_BK = rollout.log_w_TBK.sum(0)
    v_BK = log_w_BK.detach().softmax(dim=1)
    surrogate_BK = v_BK**2 * (log_w_BK + log_q_TBK.sum(0)) + (v_BK - v_BK**2) * log_p_TBK.sum(0)
    gradient_only = (surrogate_BK - surrogate_BK.detach()).sum(1).mean() / len(rollout.log_w_TBK)
    return objective(rollout).detach() - gradient_only


def at_fixed_z(model, x_TBX, phi_x, z, state, k):
    """log p(x_t, z_t | .) and log q(z_t | .), (T, B, k) each, of a given z (T, B*k, Z).

    Functions of the parameters alone, where z is detached. phi_x: that of the Rollout. state:
    before the window.
    """
    h, c, *memory = state
    phi_z = model.phi_z(z.to(phi_x.dtype)) if model.z_dim else None
    h_before, _, _ = model.along(model.into_lstm(phi_x, phi_z, h), h, c)
    q_z = p_z = z, z  # of no width, without z
    if model.z_dim:
        q_z = model.q_z(phi_x, h_before)
        p_z = model.p_z(h_before)
    log_px, _ = model.likelihood.log_density(x_TBX, model.p_x(phi_z, h_before), memory, k)
    log_pz = common.gaussian_log_density(z, *p_z).view_as(log_px)
    log_qz = common.gaussian_log_density(z, *q_z).view_as(log_px)
    return log_px + log_pz, log_qz


def objective_resampled(rollout, resampled_TB):
    """Minus the mean over sequences of the bound of a particle filter (FIVO, Maddison et al. 2017, arXiv 1705.09279,
    algorithm 1), nats per frame: the log-mean-weights of the pieces between its resamplings, added up.

    rollout: along the filter's ancestors. resampled_TB: whether it resampled after a frame.
    """
    log_w_TBK = rollout.log_w_TBK
    piece_TB1 = (resampled_TB.cumsum(0) - resampled_TB.long()).unsqueeze(2)  # in which a frame lies
    log_w_PBK = torch.zeros_like(log_w_TBK).scatter_add(
        0, piece_TB1.expand_as(log_w_TBK), log_w_TBK
    )
    bound_B = sum(map(common.importance_weighted, log_w_PBK))  # a piece without frames adds log 1
    return -bound_B.mean() / len(log_w_TBK)


def refuse_contradictions(h):
    """UserError where the flags of IWAE_K make no sense together."""
    if h.dreg and h.resample:
        raise common.UserError("--dreg and --resample exclude each other; give one of them")
    if h.resample and h.k < 3:
        raise common.UserError(
            f"--resample with --k={h.k} never resamples: the effective sample size of two particles "
            "is not under 1; give 3 or more"
        )


def main():
    h = common.parse(Hyperparameters)
    if h.evaluate:
        return common.evaluate_checkpoint(h)
    refuse_contradictions(h)
    training = common.Training(h, particles=h.k, monitor_smc=h.resample)

    @training.captured
    def update():
        x_TBX = training.window()
        noise = training.noise(h.k, h.z_dim)
        if h.resample:
            uniform_TB = training.draw(torch.rand, h.batch_size, 1).squeeze(2)
            with torch.no_grad():  # no gradient flows through the choice of ancestors
                filtering = common.particle_filter(
                    training.model,
                    x_TBX,
                    training.state,
                    noise,
                    uniform_TB,
                    h.k,
                    resample_last=True,
                )
            rollout = training.model(x_TBX, training.state, noise, h.k, filtering.ancestors)
            loss = objective_resampled(rollout, filtering.resampled_TB)
        else:
            rollout = training.model(x_TBX, training.state, noise, h.k)
            loss = objective(rollout)
            if h.dreg:
                z = (rollout.q_mean + rollout.q_sigma * noise).detach()
                log_p_TBK, log_q_TBK = at_fixed_z(
                    training.model, x_TBX, rollout.phi_x, z, training.state, h.k
                )
                loss = objective_dreg(rollout, log_p_TBK, log_q_TBK)
        loss.backward()
        training.step(loss, rollout.state)

    for _ in training.updates():
        update()
    training.finish()


if __name__ == "__main__":
    common.run_as_script(main)
