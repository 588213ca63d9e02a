"""The steps of gpu_check.sh: versions, equality, benchmark, training.

    python tests/tools/gpu_check.py equality [--device cuda] [--quick]

equality compares a run of replayed graphs with one whose kernels are launched one by one, with that
again, and with one that is resumed. benchmark gives milliseconds and kernels of an update at the
published size. training runs each script at once and in two halves, as processes.
"""

import argparse
import contextlib
import gc
import io
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = map(str, (ROOT, ROOT / "tests", ROOT / "tests/tools"))

import benchmark  # noqa: E402
import tiny  # noqa: E402

import common  # noqa: E402

OF_ONE_RUN = ("log", "config", "seconds")
TINY = (
    "--x_dim=20 --z_dim=4 --rnn_dim=12 --q_z_dim=8 --p_z_dim=8 --p_x_dim=8 --x2s_dim=8 --z2s_dim=8 "
    "--seq_frames=5"
).split()
MIDDLE = (
    "--x_dim=50 --z_dim=32 --rnn_dim=256 --q_z_dim=128 --p_z_dim=128 --p_x_dim=160 --x2s_dim=160 "
    "--z2s_dim=128 --seq_frames=12"
).split()
SMALL = (
    "--x2s_dim=128 --z2s_dim=128 --q_z_dim=128 --p_z_dim=128 --p_x_dim=128 --rnn_dim=128 "
    "--z_dim=32 --seq_frames=20 --lr=1e-3"
).split()
VARIANTS = (
    ["vrnn_gauss"],
    ["vrnn_gauss", "--bf16"],
    ["vrnn_gauss", "--ar_order=16"],
    ["vrnn_gauss", "--z_dim=0"],
    ["vrnn_gauss_alt_nll"],
    ["vrnn_gauss_iwae"],
    ["vrnn_gauss_iwae", "--bf16", "--ar_order=16"],
    ["vrnn_gauss_iwae", "--dreg"],
    ["vrnn_gauss_iwae", "--resample"],
    ["vrnn_gauss_iwae", "--grad_clip=0", "--weight_norm=0"],
)
WIDE = dict(q_z_dim=512, p_z_dim=512, z2s_dim=512)  # multiples of 8 and of 64
TIMED = (
    ("VRNN", {}),
    ("VRNN", dict(bf16=True)),
    ("VRNN", dict(bf16=True) | WIDE),
    ("IWAE_5", {}),
    ("IWAE_5", dict(bf16=True)),
    ("IWAE_5", dict(bf16=True) | WIDE),
    ("VAE_5", {}),
    ("VRNN", dict(ar_order=32)),
    ("IWAE_5", dict(ar_order=32)),
    ("VRNN", dict(z_dim=0)),
    ("IWAE_5", dict(dreg=True)),
    ("IWAE_5", dict(resample=True)),
)


def versions(folder, device, quick):
    print("python", platform.python_version(), "torch", torch.__version__, torch.version.cuda)
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, cuDNN", end=" ")
        print(torch.backends.cudnn.version())
        asked = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        if shutil.which("nvidia-smi"):
            subprocess.run(["nvidia-smi", asked, "--format=csv"])
    return True


# ---- equality ------------------------------------------------------------------------------------


def run_main(script, data, out, device, flags, singly=False):
    """Train by a script's own main; returns its Training, and whether it replayed a graph."""
    kept = {}
    captured = common.Training.captured

    def captured_and_kept(training, update):
        kept["training"] = training
        kept["update"] = update if singly else captured(training, update)
        return kept["update"]

    instead = dict(captured=captured_and_kept, finish=lambda training: None)
    with patch.multiple(common.Training, **instead), patch.object(common, "lock", tiny.unlocked):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            where = (f"--data={data}", f"--out_dir={out}", f"--device={device}")
            tiny.main_of(script, *where, *flags)
    for line in said.getvalue().splitlines():
        if "no CUDA graph" in line:
            print("   ", line)
    return kept["training"], kept["update"].__name__ == "replay"


def leaves(checkpoint):
    return tiny.flat({name: part for name, part in checkpoint.items() if name not in OF_ONE_RUN})


def largest_difference(one, other):
    """(its part, relative to the largest value there) of two checkpoints; ("", 0) where equal."""
    worst = ("", 0.0)
    for name, x in leaves(one).items():
        y = leaves(other)[name]
        if torch.is_tensor(x) and not torch.equal(x, y):
            difference = (x.double() - y.double()).abs().max() / x.double().abs().max()
            worst = max(worst, (name, difference.item()), key=lambda found: found[1])
    return worst


def in_words(difference):
    name, size = difference
    return f"{size:.1e} in {name}" if name else "bit for bit"


def equality(folder, device, quick):
    data = folder / "noise.h5"
    benchmark.write_corpus(data, minutes=1)
    sizes = [*(TINY if quick else MIDDLE), "--reset_freq=2", "--batch_size=16", "--eval_k", "2"]
    sizes += ["--monitor_windows=8", "--monitor_every=6", "--lr_updates=30", "--x_noise_updates=20"]
    return all([is_equal(data, device, sizes, script, *more) for script, *more in VARIANTS])


def is_equal(data, device, sizes, script, *flags):
    """Whether a variant's replayed graph does what its kernels do one by one."""
    out = Path(tempfile.mkdtemp(dir=data.parent))

    def train(name, updates, *more, singly=False):
        given = [*sizes, *flags, f"--max_updates={updates}", *more]
        return run_main(script, data, out / name, device, given, singly)

    one, _ = train("one", 12, singly=True)
    again, _ = train("again", 12, singly=True)
    graph, is_replayed = train("graph", 12)
    train("halves", 6)
    halves, _ = train("halves", 12, "--resume")
    singly = largest_difference(one.checkpoint(), again.checkpoint())
    by_graph = largest_difference(one.checkpoint(), graph.checkpoint())
    resumed = largest_difference(graph.checkpoint(), halves.checkpoint())
    is_well = by_graph[1] <= max(1e-4, 10 * singly[1]) and graph.counts["skipped"].item() == 0
    is_well &= is_replayed or device == "cpu"
    print(
        "ok " if is_well else "BAD",
        script,
        *flags,
        "| a graph" if is_replayed else "| NO GRAPH",
        f"| again: {in_words(singly)} | graph: {in_words(by_graph)}",
        f"| resumed: {in_words(resumed)}",
        flush=True,
    )
    return is_well


# ---- benchmark -----------------------------------------------------------------------------------


def milliseconds(function, device, repeats):
    times = benchmark.alternate(torch.device(device), {"it": function}, repeats, warm_up=1)
    return 1e3 * statistics.median(times["it"])


def kernels_of(update, repeats=2):
    """[(name, how many in an update, microseconds in them)], the most time first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            update()
        torch.cuda.synchronize()
    found = []
    for event in profiled.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time_us = event.self_device_time_total / repeats
            found.append((event.key, event.count / repeats, time_us))
    return sorted(found, key=lambda kernel: -kernel[2])


def benchmark_updates(folder, device, quick):
    data = folder / "published.h5"
    benchmark.write_corpus(data, minutes=1 if quick else 5)
    sizes = benchmark.QUICK if quick else {}
    repeats = 2 if quick else 20
    for objective, flags in TIMED:
        flags = {name: value for name, value in flags.items() if not (quick and name in WIDE)}
        module, _ = benchmark.OBJECTIVES[objective]
        training = benchmark.make_training(
            data, common.choose_device(device), objective, **sizes | flags
        )
        start = time.perf_counter()
        update = benchmark.our_update(training, module.objective)
        capture_s = time.perf_counter() - start
        turn = benchmark.on_the_next_window(training, update)
        turn_ms = milliseconds(turn, device, repeats)
        update_ms = milliseconds(update, device, repeats)
        teraflops = benchmark.flop(training) / update_ms / 1e9
        print(
            f"\n{objective} {flags}: {turn_ms:.2f} ms an update, {update_ms:.2f} without the "
            f"window, {teraflops:.1f} TFLOP/s, captured in {capture_s:.1f} s: {update.__name__}",
            flush=True,
        )
        if device == "cuda":
            print_kernels(kernels_of(update), update_ms)
        del training, update, turn
        gc.collect()
    return True


def print_kernels(kernels, update_ms):
    count = sum(many for _, many, _ in kernels)
    inside_ms = sum(time_us for _, _, time_us in kernels) / 1e3
    print(
        f"  {count:.0f} kernels, {inside_ms:.2f} ms in them, {1 - inside_ms / update_ms:.0%} idle"
    )
    for name, many, time_us in kernels[:12]:
        print(f"  {time_us / 1e3:7.3f} ms {many:6.0f} x {time_us / many:7.2f} us  {name[:110]}")


# ---- training ------------------------------------------------------------------------------------


def training(folder, device, quick):
    """The bound must rise, and two halves must equal the whole."""
    data = folder / "train.h5"
    recordings = 5 if quick else 40
    tiny.write_quiet_data(data, train=[90_000] * recordings, valid=[40_000] * 6, test=[40_000] * 6)
    sizes = [*TINY, "--batch_size=4"] if quick else [*SMALL, "--batch_size=16"]
    updates = 10 if quick else 200
    flags = [*sizes, "--ar_order=4", "--eval_k", "5", "20", "--eval_recordings=2"]
    flags += ["--monitor_windows=32", f"--monitor_every={updates // 2}"]
    scripts = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
    return all([trains_well(data, device, script, updates, *flags) for script in scripts])


def trains_well(data, device, script, updates, *flags):
    folder = data.parent / script

    def train(name, updates, *more):
        where = (f"--data={data}", f"--out_dir={folder / name}", f"--device={device}")
        job = tiny.command(script, *flags, *where, f"--max_updates={updates}", *more)
        return subprocess.run(job, stdout=subprocess.DEVNULL).returncode

    statuses = [train("whole", updates), train("halves", updates // 2)]
    statuses.append(train("halves", updates, "--resume"))
    if any(statuses):
        print("BAD", script, "ended with", statuses)
        return False
    whole, halves = (
        torch.load(folder / name / "last.pt", weights_only=True) for name in ("whole", "halves")
    )
    _, *lines = tiny.log_of(folder / "whole")
    bounds = [line["valid"]["iwae_5"]["nats_per_frame"] for line in lines]
    difference = largest_difference(whole, halves)
    is_well = bounds[-1] > bounds[0] and difference[1] < 1e-3
    print(
        "ok " if is_well else "BAD",
        f"{script}: valid iwae_5 {bounds}, two halves against the whole:",
        in_words(difference),
        flush=True,
    )
    return is_well


STEPS = dict(versions=versions, equality=equality, benchmark=benchmark_updates, training=training)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="at sizes that say nothing")
    options = parser.parse_args()
    common.start_processes()
    with tempfile.TemporaryDirectory() as folder:
        is_well = STEPS[options.step](Path(folder), options.device, options.quick)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
