"""How fast training, loading and conversion are, against the machine's own matrix products.

    python tests/benchmark.py [--repeats 5] [--device cpu]

Variants alternate within one run after a warm-up, every timing waits for the device, and medians are reported. `plain`
is tests/plain.py, every network inside the loop over frames, in the same trainer.
"""

import argparse
import os
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
    bf16 = sizes.pop("bf16", False)
    flags = [f"--{name}={value}" for name, value in dict(data=data, device=device, **sizes).items()] + ["--bf16"] * bf16
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
    """Median seconds of an update, {(objective, precision): s}; pairs of ours and plain are neighbours in time."""
    exact = "TF32" if device.type == "cuda" else "float32"
    product = {exact: matrix_products(device), "bf16": matrix_products(device, torch.bfloat16)}
    print("\nUpdate at published size (T = 40, B = 128, R = 1000), optimiser included; plain in " + exact)
    print(f"{'objective':10}{'products':>9}{'rows':>6}{'ours s':>9}{'plain s':>9}{'plain/ours':>12}{'slowest pair':>14}"
          f"{'GFLOP/s':>9}{'of products':>13}")
    fastest = {}
    for objective in OBJECTIVES:
        ours = {precision: make_trainer(data, device, objective, bf16=precision == "bf16") for precision in product}
        plain = make_trainer(data, device, objective, plain=True)
        turns = {f"products {precision}": function for precision, (function, _) in product.items()}
        turns |= {f"ours {precision}": trainer.update for precision, trainer in ours.items()} | {"plain": plain.update}
        taken = alternate(device, turns, repeats)
        median = {name: statistics.median(times) for name, times in taken.items()}
        for precision, trainer in ours.items():
            fastest[objective, precision] = time_s = median[f"ours {precision}"]
            rate, peak = flop(trainer) / time_s, product[precision][1] / median[f"products {precision}"]
            ratios = [slow / quick for slow, quick in zip(taken["plain"], taken[f"ours {precision}"])]
            print(f"{objective:10}{precision:>9}{128 * trainer.particles:6}{time_s:9.4f}{median['plain']:9.4f}"
                  f"{statistics.median(ratios):12.2f}{min(ratios):14.2f}{rate / 1e9:9.0f}{rate / peak:13.3f}",
                  flush=True)
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                plain.update()
            print(f"  plain: {sum(event.count for event in profile.key_averages()):,} kernels; ours: one graph launch")
        print(f"  peak so far {peak_memory(device)}", flush=True)
        del ours, plain
    print(f"K = 5 costs {fastest['IWAE_5', exact] / fastest['VRNN', exact]:.2f} times K = 1")
    updates = BLIZZARD_HOURS * 3600 / 0.5 / 128
    for (objective, precision), time_s in fastest.items():
        print(f"an epoch of {BLIZZARD_HOURS} hours, {updates:,.0f} updates: {objective} {precision} "
              f"{updates * time_s / 3600:.2f} h")
    return min(fastest.values())


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
    parts = {f"minute_{i}": part for i, part in enumerate(np.array_split(x, 60))} | {"three_hours": np.tile(x, 3)}
    np.savez(folder / "four_hours.npz", **parts)
    taken = seconds(torch.device("cpu"), lambda: common.convert([folder / "four_hours.npz"], folder / "out.h5"))
    print(f"\nConversion of a 4-hour .npz: {4 * 3600 / taken:,.0f} times real time")
    import soundfile
    for suffix in ("wav", "flac", "mp3", "ogg"):
        audio = folder / suffix
        audio.mkdir()
        for i in range(40):
            with soundfile.SoundFile(audio / f"{i}.{suffix}", "w", 44_100, 1) as file:
                for start in range(0, 60 * 44_100, 44_100):  # libvorbis crashes on long writes
                    file.write(x[start:start + 44_100])
        taken = seconds(torch.device("cpu"), lambda: common.convert([audio], folder / f"{suffix}.h5"))
        print(f"Conversion of 44.1 kHz .{suffix}: {40 * 60 / taken:,.0f} times real time on {os.cpu_count()} cores")


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
        benchmark_loader(data, device, options.repeats, fastest)
        benchmark_growth(data, device, options.repeats)
        benchmark_conversion(Path(folder))


if __name__ == "__main__":
    main()
