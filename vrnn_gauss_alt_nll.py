"""VAE_K: the mean of K sampled bounds, the baseline to which Burda et al. 2015 (arXiv 1509.00519) compare IWAE_K.

    loss = -1/T 1/K sum_k log w_k,  log w_k = sum_t log [ p(x_t, z_t^k | x_<t, z_<t^k) / q(z_t^k | x_<=t, z_<t^k) ]
"""

import common

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters. Each is also a flag: --lr 1e-4, --lr=1e-4, --no-dequantize. With --demo, small ones replace these.
data = "data/blizzard.h5"             # HDF5 file made by prepare_blizzard.py
out_dir = "runs/vrnn_gauss_alt_nll"   # where the run goes: log, checkpoints, evaluation, generated speech
seed = 0                              # of initialisation, excerpt order and all noise in training
device = "auto"                       # auto takes a GPU if there is one; cpu, cuda, cuda:1, ...
x_dim = 200                           # samples in a frame (12.5 ms at 16 kHz)
z_dim = 200                           # latent variables in a frame
rnn_dim = 1000                        # LSTM units
q_z_dim = 500                         # units in each of the four layers of the posterior
p_z_dim = 500                         # ... of the prior
p_x_dim = 600                         # ... of the decoder
x2s_dim = 600                         # ... of phi_x, which the other networks see in place of x
z2s_dim = 500                         # ... of phi_z, which the other networks see in place of z
k = 5                                 # samples of z per sequence
seq_frames = 40                       # frames in a window, through which gradients flow (40 = 0.5 s)
reset_freq = 4                        # windows in an excerpt, over which the LSTM state is carried (4 = 2 s)
batch_size = 128                      # sequences in an update, before they are copied k times
lr = 3e-4                             # Adam's learning rate
lr_updates = 0                        # updates in which it falls linearly to a hundredth; 0 = constant, as published
max_updates = 100_000                 # about six epochs of the 283-hour Blizzard corpus
monitor_every = 500                   # updates between evaluations on the valid split
monitor_windows = 512                 # windows of the valid split in each, spread evenly
eval_k = (5, 100)                     # particles of the iwae_k bounds on the test split; the first is monitored too
eval_recordings = 100                 # recordings of the test split that are also evaluated whole; 0 = none
grad_clip = 640.0                     # largest norm of the gradient (published: 5 times batch_size); 0 = no limit
weight_norm = 1.9365                  # largest norm of a unit's incoming weights (not the LSTM's from h); 0 = no limit
ema = 0.999                           # decay of the averaged weights, which are the ones evaluated; 0 = no averaging
bf16 = False                          # matrix products of training in bfloat16; the evaluation keeps float32
mirrored_init = True                  # linear at first, with a narrow posterior; off = uniform weights, as published
x_noise = 0.3                         # initial noise on the normalised samples in training; 0 = none, as published
x_noise_updates = 2000                # updates in which it falls to a hundredth, and ends
dequantize = True                     # add uniform(-1/2, 1/2) LSB to the 16-bit samples in training
as_published = False                  # reproduce what the 2016 script computed (see objective_as_published)
init_from = ""                        # best.pt of another run to start from
# ---------------------------------------------------------------------------------------------------------------------


def objective(rollout):
    """Minus the mean over sequences and samples of log w, nats per frame."""
    log_w_BK = rollout.log_w_TBK.sum(0)
    return -log_w_BK.mean() / len(rollout.log_w_TBK)


def objective_as_published(rollout):
    """The 2016 script: one sample, its bound divided by K, and each batch replayed K times in a row (see main)."""
    return -rollout.log_w_TBK.mean() / k


def main():
    h = common.hyperparameters(globals())
    if h.as_published:
        common.train(h, objective_as_published, particles=1, replays=h.k, as_published=True)
    else:
        common.train(h, objective, particles=h.k)


if __name__ == "__main__":
    common.run_as_script(main)
