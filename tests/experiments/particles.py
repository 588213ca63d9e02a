"""How the weights of particles collapse, and the gradient's noise, as K and the length grow.

    python tests/experiments/particles.py best.pt [--data data/speech.h5] [--out it.json]

For T frames and K particles, on windows of the valid split from a zero state: the standard
deviation of log w over particles, the effective sample size (ESS) of the K weights of whole
sequences and, mean over frames, of a particle filter, and both bounds. Next what the 2016 script
made of the same weights, softmax of minus the mean over time of log w: their ESS, and the share of
the worst particle. Then the signal-to-noise ratio (SNR) of the gradient of each objective with
respect to the parameters of the posterior and to all others, over draws of z on a fixed batch of
the training split:

    SNR = |E g| / sqrt(trace Cov g),  |E g|^2 estimated by |mean g|^2 - trace Cov g / draws

without bias. (Rainforth et al. 2018, arXiv 1802.04537, look at single parameters.) Prints
Markdown; --out also keeps the numbers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import vrnn_gauss  # noqa: E402
import vrnn_gauss_alt_nll  # noqa: E402
import vrnn_gauss_iwae  # noqa: E402

FRAMES, PARTICLES = (10, 20, 40, 80, 160), (2, 5, 20, 100)
GRADIENTS = [(40, 1), (40, 2), (40, 5), (40, 20), (10, 5), (160, 5)]  # (T, K)
WINDOWS, BATCH, DRAWS = 64, 8, 50


def trained(path):
    """The model of a best.pt, and what else is in the file."""
    checkpoint = common.read_checkpoint(path, "checkpoint")
    config = checkpoint["config"]  # older ones lack some
    model = common.VRNN(**{name: config[name] for name in common.SIZES if name in config})
    common.load_parameters(model, checkpoint, path, "checkpoint")
    return model, checkpoint


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def windows(model, corpus, split, frames, count):
    """The first `frames` frames of windows, (frames, count, X); these are always the same."""
    starts = common.piece_starts(split, max(FRAMES) * model.x_dim, count)
    return common.frames_at(split, starts, frames, model.x_dim, corpus, seeded(0))


def collapse(model, corpus):
    rows = []
    for frames in FRAMES:
        x_TBX = windows(model, corpus, corpus.valid, frames, WINDOWS)
        bounds = common.estimate_bounds(model, x_TBX, PARTICLES, seeded(1))
        for k in PARTICLES:
            estimate_TB, ess_TB = common.estimate_smc(model, x_TBX, k, seeded(2))
            row = dict(
                frames=frames,
                k=k,
                log_w_std=bounds["log_w_std"].mean().item(),
                ess_iwae=bounds[f"ess_iwae_{k}"].mean().item(),
                ess_smc=ess_TB.mean().item(),
                elbo=bounds["elbo"].mean().item() / frames,
                iwae=bounds[f"iwae_{k}"].mean().item() / frames,
                smc=estimate_TB[-1].mean().item() / frames,
            )
            rows.append(row)
    return rows


def as_published(model, corpus, k=5):
    rows = []
    for frames in FRAMES:
        x_TBX = windows(model, corpus, corpus.valid, frames, WINDOWS)
        noise = torch.randn(frames, WINDOWS * k, model.z_dim, generator=seeded(1))
        log_w_TBK = model(x_TBX, noise=noise, k=k).log_w_TBK
        logits_BK = -log_w_TBK.mean(0)
        row = dict(
            frames=frames,
            k=k,
            ess_iwae=common.effective_sample_size(log_w_TBK.sum(0)).mean().item(),
            ess_published=common.effective_sample_size(logits_BK).mean().item(),
            worst_published=logits_BK.softmax(1).amax(1).mean().item(),
        )
        rows.append(row)
    return rows


def losses(model, x_TBX, k):
    """{objective: function that draws z and returns its loss}."""
    frames, batch, _ = x_TBX.shape
    state = model.zero_state(batch * k)

    def noise():
        return torch.randn(frames, batch * k, model.z_dim)

    def dreg():
        eps = noise()
        rollout = model(x_TBX, state, eps, k)
        z = (rollout.q_mean + rollout.q_sigma * eps).detach()
        at_fixed_z = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, k)
        return vrnn_gauss_iwae.objective_dreg(rollout, *at_fixed_z)

    def resampled():
        eps = noise()
        uniform_TB = torch.rand(frames, batch)
        with torch.no_grad():
            filtering = common.particle_filter(
                model, x_TBX, state, eps, uniform_TB, k, resample_last=True
            )
        rollout = model(x_TBX, state, eps, k, filtering.ancestors)
        return vrnn_gauss_iwae.objective_resampled(rollout, filtering.resampled_TB)

    if k == 1:
        return {
            "VRNN": lambda: vrnn_gauss.objective(model(x_TBX)),
            "VAE_1 = IWAE_1": lambda: vrnn_gauss_alt_nll.objective(model(x_TBX)),
        }
    return {
        f"VAE_{k}": lambda: vrnn_gauss_alt_nll.objective(model(x_TBX, k=k)),
        f"IWAE_{k}": lambda: vrnn_gauss_iwae.objective(model(x_TBX, k=k)),
        f"IWAE_{k} DReG": dreg,
        f"IWAE_{k} resampled": resampled,
    }


def signal_to_noise(model, loss):
    """SNR of the gradient with respect to the posterior's parameters and to the others."""
    names, parameters = zip(*model.named_parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for _ in range(DRAWS):
        gradients = torch.autograd.grad(loss(), parameters)
        for i, gradient in enumerate(gradients):
            sums[i] += gradient
            squares[i] += gradient.double() ** 2
    ratios = []
    for is_wanted in (True, False):
        signal = noise = 0.0
        for i, name in enumerate(names):
            if name.startswith("posterior") == is_wanted:
                mean = sums[i] / DRAWS
                variance = (squares[i] / DRAWS - mean**2) * DRAWS / (DRAWS - 1)
                signal += (mean**2 - variance / DRAWS).sum().item()
                noise += variance.sum().item()
        ratios.append((max(0.0, signal) / noise) ** 0.5)
    return ratios


def gradient_quality(model, corpus):
    rows = []
    for frames, k in GRADIENTS:
        x_TBX = windows(model, corpus, corpus.train, frames, BATCH)
        for name, loss in losses(model, x_TBX, k).items():
            torch.manual_seed(0)
            posterior, others = signal_to_noise(model, loss)
            rows.append(
                dict(frames=frames, k=k, objective=name, snr_posterior=posterior, snr_others=others)
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def markdown(rows):
    def cell(value):
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [
        rows[0].keys(),
        ["---"] * len(rows[0]),
        *([cell(value) for value in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", default="data/speech.h5")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    model, checkpoint = trained(options.checkpoint)
    corpus = common.open_corpus(options.data)
    corpus.mean, corpus.std = checkpoint["mean"], checkpoint["std"]
    with torch.no_grad():
        weights = collapse(model, corpus)
        published = as_published(model, corpus)
    gradients = gradient_quality(model, corpus)
    print(
        f"{options.checkpoint}, update {checkpoint['update']}: {WINDOWS} windows of valid",
        markdown(weights),
        "as published",
        markdown(published),
        f"{DRAWS} draws on {BATCH} windows of the training split",
        markdown(gradients),
        sep="\n\n",
    )
    if options.out:
        result = dict(
            checkpoint=options.checkpoint.parent.name,
            update=checkpoint["update"],
            commit=common.commit(),
            windows=WINDOWS,
            batch=BATCH,
            draws=DRAWS,
            weights=weights,
            published=published,
            gradients=gradients,
        )
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    common.run_as_script(main)
