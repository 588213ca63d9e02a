"""Particle filters of more and more particles, on a few test windows, for several trained models.

    python tests/experiments/filters.py best.pt ... [--particles 100 1000 10000] [--windows 64]
                                        [--data data/speech.h5] [--out it.json]

A filter's mean log-likelihood rises towards log p(x) as its particles grow. While it still rises,
by different amounts for different models, their order may be one of the filters. The windows are
spread evenly over the test split, and all models get the same noise. Prints nats per frame, the
means over windows; --out also keeps those of each window.
"""

import argparse
import json
import sys
from pathlib import Path

import particles
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

FRAMES = 40
SEED = 2015


def filtered(model, corpus, k, windows):
    """The filter's log-likelihood of each window, in nats per frame."""
    starts = common.piece_starts(corpus.test, FRAMES * model.x_dim, windows)
    generator = particles.seeded(SEED)
    x_TBX = common.frames_at(corpus.test, starts, FRAMES, model.x_dim, corpus, generator)
    with torch.no_grad():
        estimate_TB, _ = common.estimate_smc(model, x_TBX, k, generator)
    return (estimate_TB[-1] / FRAMES).tolist()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--particles", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--data", default="data/speech.h5")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    corpus = common.open_corpus(options.data)
    names = [path.resolve().parent.name for path in options.checkpoints]
    if len(set(names)) < len(names):
        raise common.UserError("two checkpoints lie in folders of one name; rename one of these")
    result = dict(commit=common.commit(), windows=options.windows, frames=FRAMES, runs={})
    for path, name in zip(options.checkpoints, names):
        model, checkpoint = particles.trained(path)
        corpus.mean, corpus.std = checkpoint["mean"], checkpoint["std"]
        by_particles = {}
        for k in options.particles:
            nats = filtered(model, corpus, k, options.windows)
            by_particles[k] = nats
            print(f"{name}, {k:,} particles: {sum(nats) / len(nats):.2f}", flush=True)
        result["runs"][name] = by_particles
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    common.run_as_script(main)
