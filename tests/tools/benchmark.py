"""How fast training, evaluation, loading and conversion are, against the machine's own products.

    python tests/tools/benchmark.py [--only updates,variants,...] [--json FILE] [--repeats 5]
                                    [--device cpu] [--quick]
    python tests/tools/benchmark.py --against CHECKOUT      this tree and another one, in turns

Variants alternate within one run after a warm-up, every timing waits for the device, and medians
are reported: of seconds, and of the ratios of turns that are neighbours in time. `plain` is
tests/plain.py, every network inside the loop over frames, in the same training step. What ends in
_small has the sizes of the experiments and, on a CPU, one thread. --json keeps every table. --quick
shows that all of it runs, at sizes that say nothing.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
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
OBJECTIVES = {
    "VRNN": (vrnn_gauss, 1),
    "VAE_5": (vrnn_gauss_alt_nll, 5),
    "IWAE_5": (vrnn_gauss_iwae, 5),
}
QUICK = dict(
    x_dim=20,
    z_dim=4,
    rnn_dim=12,
    q_z_dim=8,
    p_z_dim=8,
    p_x_dim=8,
    x2s_dim=8,
    z2s_dim=8,
    seq_frames=5,
    batch_size=4,
)
SMALL = dict(x2s_dim=128, z2s_dim=128, q_z_dim=128, p_z_dim=128, p_x_dim=128, rnn_dim=128, z_dim=32)
BATCHES = [("VRNN", 128), ("VAE_5", 128), ("IWAE_5", 128)]
SMALL_BATCHES = [("VRNN", 8), ("VRNN", 16), ("VRNN", 32), ("VAE_5", 8), ("IWAE_5", 8)]
OF_IWAE = [("IWAE_5", dict(resample=True)), ("IWAE_5", dict(dreg=True))]
OF_LIKELIHOOD = [("VRNN", dict(ar_order=32)), ("IWAE_5", dict(ar_order=32))]
PARTS = dict(  # and the titles of their tables
    updates="Update at published size (T = 40, R = 1000), optimiser included; ratio: plain / ours",
    updates_small=(
        "Update at small size (T = 40, R = 128), one thread, optimiser included; "
        "ratio: plain / ours"
    ),
    variants="Update at published size, B = 128; ratio: with a flag / without",
    variants_small="Update at small size, B = 8, one thread; ratio: with a flag / without",
    likelihood="Update at published size, B = 64; ratio: with a flag / without",
    likelihood_small="Update at small size, B = 8, one thread; ratio: with a flag / without",
    evaluation="Evaluation at published size",
    evaluation_small="Evaluation at small size, one thread",
    growth="Update as one size grows from T = 40, B = 32, K = 1, R = 1000",
    growth_small="Update as one size grows from T = 40, B = 32, K = 1, R = 128, one thread",
    loader=(
        "Loader alone, and what updates use of it; "
        "ratio: updates with the loader / on a fixed batch"
    ),
    conversion="Conversion of an .npz, and of 44.1 kHz sound files",
)


def write_corpus(path, minutes=30):
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update(**common.FORMAT, mean=0.0, std=1000.0, created_by="benchmark")
        for split in common.SPLITS:
            samples = minutes * 60 * common.SAMPLE_RATE
            audio = file.create_dataset(
                f"{split}/audio", (samples,), "int16", chunks=(common.BLOCK,)
            )
            audio[:] = random.normal(0, 1000, samples).astype(np.int16)
            file[f"{split}/offsets"] = np.array([0, samples])


def flags_of(values):
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value is not False
    ]


def make_training(data, device, objective="VRNN", **flags):
    """A Training that writes its run folder beside the data."""
    module, k = OBJECTIVES[objective]
    out = tempfile.mkdtemp(dir=data.parent)
    start = dict(
        data=data,
        out_dir=out,
        device=device,
        k=k,
        max_updates=common.MOST,
        monitor_every=common.MOST,
    )
    h = common.parse(module.Hyperparameters, flags_of(start | flags))
    with contextlib.redirect_stdout(None):
        return common.Training(h, particles=h.k)


def our_update(training, objective):
    """The update of a script with its flags, on a GPU as one CUDA graph."""
    forward = scored_by(objective, training.model)
    if getattr(training.h, "resample", False):
        forward = resampled
    if getattr(training.h, "dreg", False):
        forward = dreg
    return training.captured(update_with(training, forward))


def plain_update(training, objective):
    return update_with(
        training, scored_by(objective, functools.partial(plain_rollout, training.model))
    )


def update_with(training, forward):
    def update():
        x_TBX = training.window()
        noise = training.noise(training.particles, training.h.z_dim)
        rollout, loss = forward(training, x_TBX, noise)
        loss.backward()
        training.step(loss, rollout.state)

    return update


def scored_by(objective, rollout_of):
    def forward(training, x_TBX, noise):
        rollout = rollout_of(x_TBX, training.state, noise, training.particles)
        return rollout, objective(rollout)

    return forward


def resampled(training, x_TBX, noise):
    """What --resample of the IWAE_K script does."""
    model, state, k = training.model, training.state, training.particles
    uniform_TB = training.draw(torch.rand, training.h.batch_size, 1).squeeze(2)
    with torch.no_grad():
        filtering = common.particle_filter(
            model, x_TBX, state, noise, uniform_TB, k, resample_last=True
        )
    rollout = model(x_TBX, state, noise, k, filtering.ancestors)
    return rollout, vrnn_gauss_iwae.objective_resampled(rollout, filtering.resampled_TB)


def dreg(training, x_TBX, noise):
    """What --dreg of the IWAE_K script does."""
    model, state, k = training.model, training.state, training.particles
    rollout = model(x_TBX, state, noise, k)
    z = (rollout.q_mean + rollout.q_sigma * noise).detach()
    at_fixed_z = vrnn_gauss_iwae.at_fixed_z(model, x_TBX, rollout.phi_x, z, state, k)
    return rollout, vrnn_gauss_iwae.objective_dreg(rollout, *at_fixed_z)


def on_the_next_window(training, update, updates=1):
    """A turn: what the loop of a script does for every update, so many times."""

    def turn():
        for _ in range(updates):
            training.next_window()
            training.allow_tf32(True)
            update()
            training.allow_tf32(False)
            training.made += 1

    return turn


def our_turn(data, device, objective="VRNN", updates=1, **flags):
    training = make_training(data, device, objective, **flags)
    module, _ = OBJECTIVES[objective]
    return on_the_next_window(training, our_update(training, module.objective), updates)


def multiplications(model, k, rollouts=1):
    """In the matrix products for a frame of one sequence.

    The particles of a rollout share what sees only x.
    """
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    shared = sum(
        count
        for name, count in weights.items()
        if name.startswith(("phi_x", "posterior_x", "lstm_x"))
    )
    return rollouts * shared + k * (sum(weights.values()) - shared)


def flop(training):
    """Floating-point operations of the products of one update: x itself needs no gradient."""
    h, model = training.h, training.model
    of_a_frame = 6 * multiplications(model, training.particles) - 2 * model.phi_x[0].weight.numel()
    return h.seq_frames * h.batch_size * of_a_frame


def seconds(device, function):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def alternate(device, functions, repeats, warm_up=2):
    """{name: seconds of each turn} of functions that take turns."""
    taken = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            taken[name].append(seconds(device, function))
    return {name: times[warm_up:] for name, times in taken.items()}


def ratios(times, other_times):
    """Of turns that are neighbours in time."""
    each = [time_s / other_s for time_s, other_s in zip(times, other_times)]
    return dict(ratio=statistics.median(each), least=min(each), most=max(each))


def rates(operations, time_s, product_operations, product_times):
    """Of the matrix products in something, and as a fraction of what the machine does alone."""
    rate = operations / time_s
    peak = product_operations / statistics.median(product_times)
    return dict(gflops=rate / 1e9, of_products=rate / peak)


def matrix_products(device, precision="float32", size=2048):
    """A function, and its floating-point operations."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products():
        if precision == "TF32":
            torch.set_float32_matmul_precision("high")
        for _ in range(20):
            torch.mm(a, b, out=out)
        if precision == "TF32":
            torch.set_float32_matmul_precision("highest")

    return products, 20 * 2 * size**3


def peak_memory(device):
    """GiB so far: of GPU memory, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def benchmark_updates(data, device, repeats, product_size, cases, bf16=True, updates=1, **sizes):
    """A row for each (objective, batch) of the cases and each precision.

    plain is in float32, on a GPU in TF32.
    """
    exact = "TF32" if device.type == "cuda" else "float32"
    product = {
        precision: matrix_products(device, precision, product_size)
        for precision in [exact, *["bf16"] * bf16]
    }
    of_one_particle = {}
    for objective, batch in cases:
        flags = sizes | dict(batch_size=batch)
        for row in benchmark_objective(data, device, repeats, objective, product, updates, flags):
            first = of_one_particle.setdefault((row["batch"], row["products"]), row["seconds"])
            yield row | dict(times_vrnn=row["seconds"] / first, peak_gib=peak_memory(device))


def benchmark_objective(data, device, repeats, objective, product, updates, flags):
    """A row for each precision, of turns that they, plain and the matrix products take together."""
    loss = OBJECTIVES[objective][0].objective
    ours = {
        precision: make_training(data, device, objective, **flags, bf16=precision == "bf16")
        for precision in product
    }
    plain = make_training(data, device, objective, **flags)
    plain_turn = on_the_next_window(plain, plain_update(plain, loss), updates)
    turns = {f"products {precision}": function for precision, (function, _) in product.items()}
    turns |= {
        f"ours {precision}": on_the_next_window(training, our_update(training, loss), updates)
        for precision, training in ours.items()
    }
    taken = alternate(device, turns | {"plain": plain_turn}, repeats)
    kernels = {}
    if device.type == "cuda":  # ours is one graph launch
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            plain_turn()
        kernels = dict(
            plain_kernels=sum(
                event.count
                for event in profile.key_averages()  # not what launches them
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
            // updates
        )
    for precision, training in ours.items():
        h = training.h
        times = taken[f"ours {precision}"]
        time_s = statistics.median(times) / updates
        samples_an_update = h.batch_size * h.seq_frames * h.x_dim
        updates_an_epoch = BLIZZARD_HOURS * 3600 * common.SAMPLE_RATE / samples_an_update
        yield dict(
            objective=objective,
            products=precision,
            batch=h.batch_size,
            rows=h.batch_size * h.k,
            seconds=time_s,
            plain_seconds=statistics.median(taken["plain"]) / updates,
            **ratios(taken["plain"], times),
            **rates(flop(training), time_s, product[precision][1], taken[f"products {precision}"]),
            blizzard_epoch_hours=updates_an_epoch * time_s / 3600,
            **kernels,
        )


def benchmark_variants(data, device, repeats, variants, updates=1, **sizes):
    for objective, flags in variants:
        taken = alternate(
            device,
            {
                "with": our_turn(data, device, objective, updates, **sizes, **flags),
                "without": our_turn(data, device, objective, updates, **sizes),
            },
            repeats,
        )
        yield dict(
            objective=objective,
            flag=" ".join(flags_of(flags)),
            seconds=statistics.median(taken["with"]) / updates,
            without_seconds=statistics.median(taken["without"]) / updates,
            **ratios(taken["with"], taken["without"]),
        )


def benchmark_evaluation(data, device, repeats, product_size, **sizes):
    """What a batch of windows of the final evaluation takes, float32 on every device."""
    training = make_training(data, device, **sizes)
    model = training.averaged
    h = training.h
    particles = max(h.eval_k)
    windows = common.EVAL_BATCH
    x_TBX = torch.randn(h.seq_frames, windows, h.x_dim, device=device)
    generator = torch.Generator(device).manual_seed(0)
    products, product_operations = matrix_products(device, size=product_size)
    estimates = dict(
        estimate_bounds=lambda: common.estimate_bounds(model, x_TBX, h.eval_k, generator),
        estimate_smc=lambda: common.estimate_smc(model, x_TBX, particles, generator),
    )
    taken = alternate(device, dict(products=products) | estimates, repeats, warm_up=1)
    # What sees x alone runs once in each rollout: the filter has one.
    rollouts = dict(
        estimate_bounds=math.ceil(particles / (common.EVAL_ROWS // windows)), estimate_smc=1
    )
    for name in estimates:
        time_s = statistics.median(taken[name])
        of_a_frame = multiplications(model, particles, rollouts[name])
        operations = 2 * h.seq_frames * windows * of_a_frame
        yield dict(
            estimate=name,
            particles=particles,
            windows=windows,
            seconds=time_s,
            windows_per_second=windows / time_s,
            **rates(operations, time_s, product_operations, taken["products"]),
        )


def benchmark_growth(data, device, repeats, updates=1, **sizes):
    """A row for each value; the others are as given, or T = 40, B = 32, K = 1, R = 1000."""
    start = dict(batch_size=32, rnn_dim=1000) | sizes
    for name, values in dict(
        seq_frames=(20, 40, 80),
        batch_size=(16, 32, 64, 128),
        k=(1, 2, 5, 10),
        rnn_dim=[start["rnn_dim"] * eighths // 8 for eighths in (2, 4, 8, 16)],
    ).items():
        taken = alternate(
            device,
            {
                value: our_turn(data, device, updates=updates, **start | {name: value})
                for value in values
            },
            repeats,
        )
        for value, times in taken.items():
            yield dict(size=name, value=value, seconds=statistics.median(times) / updates)


def benchmark_loader(data, device, repeats, **sizes):
    training = make_training(data, device, **sizes)
    excerpts, h = training.excerpts, training.h
    update = our_update(training, vrnn_gauss.objective)
    with_loader = on_the_next_window(training, update, h.reset_freq)
    samples = h.reset_freq * h.batch_size * h.seq_frames * h.x_dim
    times = [seconds(device, lambda i=i: excerpts.batch(i)) for i in range(20)]
    taken = alternate(
        device,
        {"loader": with_loader, "fixed batch": lambda: [update() for _ in range(h.reset_freq)]},
        repeats,
    )
    loaded = samples / statistics.median(times)
    used = samples / statistics.median(taken["fixed batch"])
    yield dict(
        loaded_per_second=loaded,
        used_by_vrnn_per_second=used,
        times_as_much=loaded / used,
        **ratios(taken["loader"], taken["fixed batch"]),
    )


def benchmark_conversion(folder, minutes=240):
    """Of an .npz of so many minutes, and of 40 sound files.

    A quarter of the minutes is in 60 recordings, and the rest in one.
    """
    convert = prepare_blizzard.convert_files
    length = minutes // 4  # of a recording, in seconds
    x = np.random.default_rng(0).normal(0, 1000, 60 * length * common.SAMPLE_RATE).astype(np.int16)
    parts = {f"short_{i}": part for i, part in enumerate(np.array_split(x, 60))}
    parts["long"] = np.tile(x, 3)
    np.savez(folder / "x.npz", **parts)
    taken = seconds(
        torch.device("cpu"), functools.partial(convert, [folder / "x.npz"], folder / "npz.h5")
    )
    yield dict(kind=".npz", cores=1, times_real_time=4 * 60 * length / taken)
    import soundfile

    for suffix in ("wav", "flac", "mp3", "ogg"):
        audio = folder / suffix
        audio.mkdir()
        for i in range(40):
            with soundfile.SoundFile(audio / f"{i}.{suffix}", "w", 44_100, 1) as file:
                for start in range(0, length * 44_100, 44_100):  # libvorbis crashes on long writes
                    file.write(x[start : start + 44_100])
        taken = seconds(
            torch.device("cpu"), functools.partial(convert, [audio], folder / f"{suffix}.h5")
        )
        yield dict(kind=f".{suffix}", cores=os.cpu_count(), times_real_time=40 * length / taken)


class Worker:
    """The benchmark of a checkout, as a process that makes an update whenever it is asked to."""

    def __init__(self, checkout, objective, data, device, quick):
        command = [
            sys.executable,
            Path(checkout) / "tests/tools/benchmark.py",
            f"--serve={objective}",
            f"--data={data}",
            f"--device={device}",
            *["--quick"] * quick,
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self):
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self):
        self.process.communicate()


def serve(data, device, objective, **sizes):
    """Make an update for every line that comes in, and say how many seconds it took."""
    turn = our_turn(data, device, objective, **sizes)
    for _ in sys.stdin:
        print(seconds(device, turn), flush=True)


def compare_with(checkout, data, device, repeats, quick=False, warm_up=1):
    """A row for each objective: the seconds of an update in both trees, and their ratios."""
    for objective in OBJECTIVES:
        here = Worker(Path(__file__).parents[2], objective, data, device, quick)
        there = Worker(checkout, objective, data, device, quick)
        pairs = [(here.seconds(), there.seconds()) for _ in range(warm_up + repeats)]
        here.end()
        there.end()
        ours, theirs = zip(*pairs[warm_up:])
        yield dict(
            objective=objective,
            here_seconds=statistics.median(ours),
            there_seconds=statistics.median(theirs),
            **ratios(theirs, ours),
        )


def rows_of(part, data, device, repeats, quick=False):
    """The rows of one of PARTS, as they are measured."""
    where = (data, device, repeats)
    published = QUICK if quick else {}
    small = QUICK if quick else SMALL
    of_8 = small | dict(batch_size=8)
    of_64 = published | dict(batch_size=64)
    product_size = 64 if quick else 2048
    minutes = 4 if quick else 240
    updates = 2 if quick else 20  # in a turn: a small one alone is too short to time
    rows = dict(
        updates=lambda: benchmark_updates(*where, product_size, BATCHES, **published),
        updates_small=lambda: benchmark_updates(
            *where, product_size, SMALL_BATCHES, bf16=False, updates=updates, **small
        ),
        variants=lambda: benchmark_variants(*where, OF_IWAE, **published),
        variants_small=lambda: benchmark_variants(*where, OF_IWAE, updates, **of_8),
        likelihood=lambda: benchmark_variants(*where, OF_LIKELIHOOD, **of_64),
        likelihood_small=lambda: benchmark_variants(*where, OF_LIKELIHOOD, updates, **of_8),
        evaluation=lambda: benchmark_evaluation(*where, product_size, **published),
        evaluation_small=lambda: benchmark_evaluation(*where, product_size, **small),
        growth=lambda: benchmark_growth(*where, **published),
        growth_small=lambda: benchmark_growth(*where, updates, **small),
        loader=lambda: benchmark_loader(*where, **published),
        conversion=lambda: benchmark_conversion(data.parent, minutes),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if part.endswith("_small") else threads)
    try:
        yield from rows[part]()
    finally:
        torch.set_num_threads(threads)


def shown(title, rows):
    """Print a table row by row as they come; returns them all."""
    print(f"\n{title}\n")
    kept = []
    for row in rows:
        for cells in [row.values()] if kept else [row, ["---"] * len(row), row.values()]:
            print(f"| {' | '.join(map(as_text, cells))} |", flush=True)
        kept.append(row)
    return kept


def as_text(cell):
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.4g}" if cell < 1000 else f"{cell:.0f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the tables")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another tree with this tool"
    )
    parser.add_argument("--serve", choices=OBJECTIVES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {','.join(PARTS)}")
    if options.json:
        options.json.touch()  # fail now, not once all is measured
    if options.quick:
        torch.set_num_threads(1)  # more only wait for each other
    common.start_processes()
    device = common.choose_device(options.device)
    if options.serve:
        return serve(options.data, device, options.serve, **(QUICK if options.quick else {}))

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.h5"
        write_corpus(data, minutes=1 if options.quick else 30)
        where = data, device, options.repeats, options.quick
        tables = [(part, PARTS[part], rows_of(part, *where)) for part in chosen]
        if options.against:
            title = "Updates in two trees; ratio: there / here"
            tables = [("against", title, compare_with(options.against, *where))]
        measure(tables, device, options.json)


def measure(tables, device, file):
    """Print the tables, (name, title, rows) each; keep those that are complete in a file, if any."""
    found = dict(
        commit=common.commit(),
        device=common.describe(device),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        tables={},
    )
    print(f"{found['device']}; torch {found['torch']}; commit {found['commit']}", flush=True)
    for name, title, rows in tables:
        found["tables"][name] = shown(title, rows)
        if file:
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
