"""How fast training, loading and conversion are, against the machine's own matrix products.

    python tests/tools/benchmark.py [--repeats 5] [--device cpu] [--quick]
    python tests/tools/benchmark.py --against CHECKOUT      updates of this tree and of another one, in turns

Variants alternate within one run after a warm-up, every timing waits for the device, and medians are reported. `plain`
is tests/plain.py, every network inside the loop over frames, in the same training step. --quick shows that all of it
runs, at sizes that say nothing.
"""

import argparse
import contextlib
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from plain import plain_rollout  # noqa: E402

import common  # noqa: E402
import prepare_blizzard  # noqa: E402
import vrnn_gauss  # noqa: E402
import vrnn_gauss_alt_nll  # noqa: E402
import vrnn_gauss_iwae  # noqa: E402

BLIZZARD_HOURS = 283
OBJECTIVES = {"VRNN": (vrnn_gauss, 1), "VAE_5": (vrnn_gauss_alt_nll, 5), "IWAE_5": (vrnn_gauss_iwae, 5)}
QUICK = dict(x_dim=20, z_dim=4, rnn_dim=12, q_z_dim=8, p_z_dim=8, p_x_dim=8, x2s_dim=8, z2s_dim=8, seq_frames=5,
             batch_size=4)


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


def make_training(data, device, objective="VRNN", **sizes):
    """A Training that writes its run folder beside the data."""
    module, k = OBJECTIVES[objective]
    out = tempfile.mkdtemp(dir=data.parent)
    flags = dict(data=data, out_dir=out, device=device, k=k, max_updates=common.MOST, monitor_every=common.MOST) | sizes
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    h = common.parse(module.Hyperparameters, flags)
    with contextlib.redirect_stdout(None):
        return common.Training(h, particles=h.k)


def our_update(training, objective):
    """The update of a script, on a GPU as one CUDA graph."""
    return training.captured(update_with(training, objective, training.model))


def plain_update(training, objective):
    return update_with(training, objective, functools.partial(plain_rollout, training.model))


def update_with(training, objective, rollout_of):
    def update():
        k = training.particles
        x_TBX, noise = training.window(), training.noise(k, training.h.z_dim)
        rollout = rollout_of(x_TBX, training.state, noise, k)
        loss = objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)
    return update


def on_the_next_window(training, update):
    """What the loop of a script does for every update."""
    def turn():
        training.next_window()
        update()
        training.progress["updates"] += 1
    return turn


def flop(training):
    """Floating-point operations of the matrix products of one update: the particles share what sees only x."""
    shared = sum(p.numel() for name, p in training.model.named_parameters()
                 if name.startswith(("phi_x", "posterior_x", "lstm_x")))
    total = sum(p.numel() for p in training.model.parameters())
    h = training.h
    return 6 * h.seq_frames * h.batch_size * (shared + training.particles * (total - shared))


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
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            taken[name].append(seconds(device, function))
    return {name: times[warm_up:] for name, times in taken.items()}


def matrix_products(device, dtype=torch.float32, size=2048):
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products():
        for _ in range(20):
            torch.mm(a, b, out=out)
    return products, 20 * 2 * size ** 3


def peak_memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB resident"


def benchmark_updates(data, device, repeats, product_size=2048, **sizes):
    """Median seconds of an update, {(objective, precision): s}; pairs of ours and plain are neighbours in time."""
    exact = "TF32" if device.type == "cuda" else "float32"
    product = {exact: matrix_products(device, size=product_size),
               "bf16": matrix_products(device, torch.bfloat16, product_size)}
    size = "tiny" if sizes else "published size (T = 40, B = 128, R = 1000)"
    print(f"\nUpdate at {size}, optimiser included; plain in {exact}")
    print(f"{'objective':10}{'products':>9}{'rows':>6}{'ours s':>9}{'plain s':>9}{'plain/ours':>12}{'slowest pair':>14}"
          f"{'GFLOP/s':>9}{'of products':>13}")
    fastest = {}
    for objective in OBJECTIVES:
        fastest |= benchmark_objective(data, device, repeats, objective, product, sizes)
        print(f"  peak so far {peak_memory(device)}", flush=True)
    print(f"K = 5 costs {fastest['IWAE_5', exact] / fastest['VRNN', exact]:.2f} times K = 1")
    updates = BLIZZARD_HOURS * 3600 / 0.5 / 128
    for (objective, precision), time_s in fastest.items():
        print(f"an epoch of {BLIZZARD_HOURS} hours, {updates:,.0f} updates: {objective} {precision} "
              f"{updates * time_s / 3600:.2f} h")
    return fastest


def benchmark_objective(data, device, repeats, objective, product, sizes):
    """A line for each precision; returns {(objective, precision): median seconds}."""
    loss = OBJECTIVES[objective][0].objective
    ours = {precision: make_training(data, device, objective, bf16=True, **sizes) if precision == "bf16" else
            make_training(data, device, objective, **sizes) for precision in product}
    plain = make_training(data, device, objective, **sizes)
    plain_turn = on_the_next_window(plain, plain_update(plain, loss))
    turns = {f"products {precision}": function for precision, (function, _) in product.items()}
    turns |= {f"ours {precision}": on_the_next_window(training, our_update(training, loss))
              for precision, training in ours.items()}
    taken = alternate(device, turns | {"plain": plain_turn}, repeats)
    median = {name: statistics.median(times) for name, times in taken.items()}
    for precision, training in ours.items():
        time_s = median[f"ours {precision}"]
        rate, peak = flop(training) / time_s, product[precision][1] / median[f"products {precision}"]
        ratios = [slow / quick for slow, quick in zip(taken["plain"], taken[f"ours {precision}"])]
        print(f"{objective:10}{precision:>9}{training.h.batch_size * training.particles:6}{time_s:9.4f}"
              f"{median['plain']:9.4f}{statistics.median(ratios):12.2f}{min(ratios):14.2f}{rate / 1e9:9.0f}"
              f"{rate / peak:13.3f}", flush=True)
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            plain_turn()
        print(f"  plain: {sum(event.count for event in profile.key_averages()):,} kernels; ours: one graph launch")
    return {(objective, precision): median[f"ours {precision}"] for precision in product}


def benchmark_loader(data, device, repeats, update_s, **sizes):
    training = make_training(data, device, **sizes)
    excerpts, h = training.excerpts, training.h
    update = our_update(training, vrnn_gauss.objective)
    turn = on_the_next_window(training, update)
    window = h.batch_size * h.seq_frames * h.x_dim
    times = [seconds(device, lambda i=i: excerpts.batch(i)) for i in range(20)]
    read, consumed = h.reset_freq * window / statistics.median(times), window / update_s
    print(f"\nLoader alone {read / 1e6:.0f} M samples/s; an update consumes {consumed / 1e6:.2f} M samples/s: "
          f"{read / consumed:.0f} times as much")
    taken = alternate(device, {"loader": lambda: [turn() for _ in range(h.reset_freq)],
                               "fixed batch": lambda: [update() for _ in range(h.reset_freq)]}, repeats)
    ratio = statistics.median(a / b for a, b in zip(taken["loader"], taken["fixed batch"]))
    print(f"update with the loader / update on a fixed batch: {ratio:.3f}")


def benchmark_growth(data, device, repeats, **sizes):
    """Each row in the sizes that are not given here."""
    start = dict(batch_size=32) | sizes
    print("\nSeconds an update as one size grows from T = 40, B = 32, K = 1, R = 1000" + ", quick" * bool(sizes))
    for name, values in dict(seq_frames=(20, 40, 80), batch_size=(16, 32, 64, 128), k=(1, 2, 5, 10),
                             rnn_dim=(250, 500, 1000, 2000)).items():
        row = []
        for value in values:
            training = make_training(data, device, **start | {name: value})
            turn = on_the_next_window(training, our_update(training, vrnn_gauss.objective))
            row.append(statistics.median(alternate(device, {"": turn}, repeats)[""]))
        print(f"{name:11}" + "".join(f"{value:>7}: {time_s:.4f}" for value, time_s in zip(values, row)), flush=True)


def benchmark_conversion(folder):
    x = np.random.default_rng(0).normal(0, 1000, 3600 * common.SAMPLE_RATE).astype(np.int16)
    parts = {f"minute_{i}": part for i, part in enumerate(np.array_split(x, 60))} | {"three_hours": np.tile(x, 3)}
    np.savez(folder / "four_hours.npz", **parts)
    taken = seconds(torch.device("cpu"), lambda: prepare_blizzard.convert_files([folder / "four_hours.npz"],
                                                                                folder / "out.h5"))
    print(f"\nConversion of a 4-hour .npz: {4 * 3600 / taken:,.0f} times real time")
    import soundfile
    for suffix in ("wav", "flac", "mp3", "ogg"):
        audio = folder / suffix
        audio.mkdir()
        for i in range(40):
            with soundfile.SoundFile(audio / f"{i}.{suffix}", "w", 44_100, 1) as file:
                for start in range(0, 60 * 44_100, 44_100):  # libvorbis crashes on long writes
                    file.write(x[start:start + 44_100])
        taken = seconds(torch.device("cpu"), functools.partial(common.convert, [audio], folder / f"{suffix}.h5"))
        print(f"Conversion of 44.1 kHz .{suffix}: {40 * 60 / taken:,.0f} times real time on {os.cpu_count()} cores")


class Worker:
    """The benchmark of a checkout, as a process that makes an update whenever it is asked to."""

    def __init__(self, checkout, objective, data, device, quick):
        command = [sys.executable, Path(checkout) / "tests/tools/benchmark.py", f"--serve={objective}",
                   f"--data={data}", f"--device={device}", *["--quick"] * quick]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self):
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve(data, device, objective, **sizes):
    """Make an update for every line that comes in, and say how many seconds it took."""
    training = make_training(data, device, objective, **sizes)
    turn = on_the_next_window(training, our_update(training, OBJECTIVES[objective][0].objective))
    for _ in sys.stdin:
        print(seconds(device, turn), flush=True)


def compare_with(checkout, data, device, repeats, quick=False, warm_up=1):
    """Print a line for each objective: the seconds of an update in both trees, and the median of their ratios."""
    print(f"{'objective':10}{'here s':>9}{'there s':>9}{'there/here':>12}{'least':>8}{'most':>8}")
    for objective in OBJECTIVES:
        here, there = (Worker(tree, objective, data, device, quick) for tree in (Path(__file__).parents[2], checkout))
        pairs = [(here.seconds(), there.seconds()) for _ in range(warm_up + repeats)][warm_up:]
        here.end(), there.end()
        medians = [statistics.median(times) for times in zip(*pairs)]
        ratios = [theirs / ours for ours, theirs in pairs]
        print(f"{objective:10}{medians[0]:9.4f}{medians[1]:9.4f}{statistics.median(ratios):12.3f}{min(ratios):8.3f}"
              f"{max(ratios):8.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another tree with this tool")
    parser.add_argument("--serve", choices=OBJECTIVES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    common.start_processes(1)
    device = common.choose_device(options.device)
    sizes = QUICK if options.quick else {}
    if options.serve:
        return serve(options.data, device, options.serve, **sizes)

    print(f"{common.describe(device)}; torch {torch.__version__}; commit {common.commit()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.h5"
        write_corpus(data, minutes=1 if options.quick else 30)
        if options.against:
            return compare_with(options.against, data, device, options.repeats, options.quick)
        fastest = benchmark_updates(data, device, options.repeats, 64 if options.quick else 2048, **sizes)
        benchmark_loader(data, device, options.repeats, min(fastest.values()), **sizes)
        benchmark_growth(data, device, options.repeats, **sizes)
        if not options.quick:
            benchmark_conversion(Path(folder))


if __name__ == "__main__":
    main()
