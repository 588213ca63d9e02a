"""How fast training, loading and conversion are, against the machine's own matrix products.

    python tests/benchmark.py [--repeats 5] [--device cpu]

Variants alternate within one run after a warm-up, every timing waits for the device, and medians are reported. `plain`
is tests/plain.py, every network inside the loop over frames, in the same trainer.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import vrnn_gauss  # noqa: E402
import vrnn_gauss_alt_nll  # noqa: E402
import vrnn_gauss_iwae  # noqa: E402
from plain import plain_rollout  # noqa: E402

BLIZZARD_HOURS = 283
OBJECTIVES = {"VRNN": (vrnn_gauss, 1), "VAE_5": (vrnn_gauss_alt_nll, 5), "IWAE_5": (vrnn_gauss_iwae, 5)}


def write_corpus(path, minutes=30):
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update(format=common.FORMAT, version=common.VERSION, sample_rate=common.SAMPLE_RATE, mean=0.0,
                          std=1000.0, created_by="benchmark")
        for split in common.SPLITS:
            samples = minutes * 60 * common.SAMPLE_RATE
            audio = file.create_dataset(f"{split}/audio", (samples,), "int16", chunks=(common.BLOCK,))
            audio[:] = random.normal(0, 1000, samples).astype(np.int16)
            file[f"{split}/offsets"] = np.array([0, samples])


def make_trainer(data, device, objective="VRNN", plain=False, **sizes):
    module, particles = OBJECTIVES[objective]
    particles = sizes.pop("k", particles)
    flags = [f"--{name}={value}" for name, value in dict(data=data, device=device, **sizes).items()]
    h = common.hyperparameters(dict(vars(module)), flags)
    trainer = common.Trainer(h, module.objective, particles, 1, False)
    if plain:
        model = trainer.model
        model.forward = lambda x_TBX, state, noise, k: plain_rollout(model, x_TBX, state, noise, k)
    elif trainer.device.type == "cuda":
        trainer.capture()
    return trainer


def flop(trainer):
    """Floating-point operations of the matrix products of one update: the particles share what sees only x."""
    shared = sum(p.numel() for name, p in trainer.model.named_parameters()
                 if name.startswith(("phi_x", "posterior_x", "lstm_x")))
    total = sum(p.numel() for p in trainer.model.parameters())
    h = trainer.h
    return 6 * h.seq_frames * h.batch_size * (shared + trainer.particles * (total - shared))


def seconds(device, function):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(device, functions, repeats, warm_up=2):
    """{name: seconds of each turn} of functions that take turns."""
    taken = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            taken[name].append(seconds(device, function))
    return {name: times[warm_up:] for name, times in taken.items()}


def matrix_products(device, dtype=torch.float32):
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products():
        for _ in range(20):
            torch.mm(a, b, out=out)
    return products, 20 * 2 * 2048 ** 3


def peak_memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB resident"


def benchmark_updates(data, device, repeats):
    print("\nUpdate at published size (T = 40, B = 128, R = 1000), optimiser included")
    print(f"{'objective':10}{'rows':>6}{'fast s':>9}{'plain s':>9}{'plain/fast':>12}{'slowest pair':>14}{'GFLOP/s':>10}"
          f"{'of products':>13}")
    products, product_flop = matrix_products(device)
    fastest = {}
    for objective in OBJECTIVES:
        fast, plain = (make_trainer(data, device, objective, plain) for plain in (False, True))
        fast.update()
        memory = peak_memory(device)
        taken = alternate(device, {"products": products, "fast": fast.update, "plain": plain.update}, repeats)
        median = {name: statistics.median(times) for name, times in taken.items()}
        rate, peak = flop(fast) / median["fast"], product_flop / median["products"]
        ratios = [slow / quick for slow, quick in zip(taken["plain"], taken["fast"])]
        fastest[objective] = median["fast"]
        print(f"{objective:10}{128 * fast.particles:6}{median['fast']:9.4f}{median['plain']:9.4f}"
              f"{statistics.median(ratios):12.2f}{min(ratios):14.2f}{rate / 1e9:10.0f}{rate / peak:13.3f}   {memory}",
              flush=True)
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                plain.update()
            print(f"  {sum(event.count for event in profile.key_averages()):,} kernels; one graph launch when captured")
        del fast, plain
    print(f"K = 5 costs {fastest['IWAE_5'] / fastest['VRNN']:.2f} times K = 1")
    updates = BLIZZARD_HOURS * 3600 / 0.5 / 128
    for objective, time_s in fastest.items():
        hours = updates * time_s / 3600
        print(f"an epoch of {BLIZZARD_HOURS} hours, {updates:,.0f} updates: {objective} {hours:.2f} h")
    return fastest


def benchmark_loader(data, device, repeats, update_s):
    trainer = make_trainer(data, device)
    excerpts, samples = trainer.excerpts, 128 * 4 * 8_000
    times = [seconds(device, lambda i=i: excerpts.group(i)) for i in range(20)]
    consumed = 128 * 8_000 / update_s
    print(f"\nLoader alone {samples / statistics.median(times) / 1e6:.0f} M samples/s; an update consumes "
          f"{consumed / 1e6:.2f} M samples/s: {samples / statistics.median(times) / consumed:.0f} times as much")
    taken = alternate(device, {"loader": lambda: [trainer.update() for _ in range(4)],
                               "fixed batch": lambda: [trainer.step() for _ in range(4)]}, repeats)
    ratio = statistics.median(a / b for a, b in zip(taken["loader"], taken["fixed batch"]))
    print(f"update with the loader / update on a fixed batch: {ratio:.3f}")


def benchmark_conversion(folder):
    x = np.random.default_rng(0).normal(0, 1000, 3600 * common.SAMPLE_RATE).astype(np.int16)
    parts = {f"part_{i}": x for i in range(3)} | {f"short_{i}": part for i, part in enumerate(np.array_split(x, 60))}
    np.savez(folder / "four_hours.npz", **parts)
    taken = seconds(torch.device("cpu"), lambda: common.convert([folder / "four_hours.npz"], folder / "out.h5"))
    print(f"\nConversion of a 4-hour .npz: {4 * 3600 / taken:,.0f} times real time")
    import soundfile
    (folder / "audio").mkdir()
    for i in range(20):
        soundfile.write(folder / f"audio/{i}.wav", x[:60 * 44_100], 44_100)
    taken = seconds(torch.device("cpu"), lambda: common.convert([folder / "audio"], folder / "audio.h5"))
    print(f"Conversion of 44.1 kHz .wav: {20 * 60 / taken:,.0f} times real time")


def benchmark_growth(data, device, repeats):
    print("\nSeconds an update as one size grows from T = 40, B = 32, K = 1, R = 1000")
    for name, values in dict(seq_frames=(20, 40, 80), batch_size=(16, 32, 64, 128), k=(1, 2, 5, 10),
                             rnn_dim=(250, 500, 1000, 2000)).items():
        row = []
        for value in values:
            trainer = make_trainer(data, device, **dict(dict(batch_size=32), **{name: value}))
            row.append(statistics.median(alternate(device, {"": trainer.update}, repeats)[""]))
        print(f"{name:11}" + "".join(f"{value:>7}: {time_s:.4f}" for value, time_s in zip(values, row)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    common.keep_freed_memory()
    device = common.choose_device(options.device)
    print(f"{common.describe(device)}; torch {torch.__version__}; commit {common.commit()}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.h5"
        write_corpus(data)
        fastest = benchmark_updates(data, device, options.repeats)
        benchmark_loader(data, device, options.repeats, fastest["VRNN"])
        benchmark_growth(data, device, options.repeats)
        benchmark_conversion(Path(folder))


if __name__ == "__main__":
    main()
