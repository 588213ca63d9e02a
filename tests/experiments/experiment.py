"""Train, or resume, every run behind the README files, and copy its logs to data/results.

    python tests/experiments/experiment.py [--at_once 2] [--updates 5000]
                                           [--runs runs/experiment] [--to data/results]

It needs data/speech.h5 (all recordings) and data/reader.h5 (the single reader alone), made by
prepare_blizzard.py. Runs go one thread each, at_once at a time, in the order below. Those whose
logs are in the folder --to are passed over, so name another folder to train all anew; interrupted
ones are resumed from --runs. The warm starts need the checkpoint of vrnn-0 there, and from_prior
those of latent_variables.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--x2s_dim 128 --z2s_dim 128 --q_z_dim 128 --p_z_dim 128 --p_x_dim 128 --rnn_dim 128 "
    "--z_dim 32 --batch_size 8 --grad_clip 640 --lr 1e-3 --monitor_every 250 --monitor_windows 256 "
    "--eval_recordings 8 --device cpu"
).split()
VRNN = ["vrnn_gauss"]
VAE = ["vrnn_gauss_alt_nll"]
IWAE = ["vrnn_gauss_iwae"]
RESAMPLED = [*IWAE, "--resample"]
VRNN_SCALED = ["tests/experiments/clipping"]
ADAPTIVE = ["--ar_order=32", "--x_noise=0"]
PIPELINE = ["tests/experiments/published_2016"]
PIPELINE_SETTINGS = (
    "--x2s_dim 128 --z2s_dim 128 --q_z_dim 128 --p_z_dim 128 --p_x_dim 128 --rnn_dim 128 "
    "--z_dim 32 --init by_width --monitor_every 50 --monitor_windows 256 --max_updates 600 "
    "--eval_k 5 --eval_recordings 0 --device cpu --data data/speech.h5"
).split()
OURS_IN_PIPELINE = "--grad_clip=640 --order=excerpts --carried=by_stream".split()
CORRECT_WEIGHTS = "--favoured=best --over_time=sum --no-through_weights --over_batch=mean".split()
OBJECTIVES = {"vrnn": VRNN, "vae_5": VAE, "iwae_5": IWAE}
WITH_RESAMPLED = OBJECTIVES | {"iwae_5_resample": RESAMPLED}
# Objective, limits on the gradient, and number of seeds.
CLIPS = (
    ("vrnn", (0, 5), 5),
    ("iwae_5", (5,), 5),
    ("vrnn", (40, 160), 1),
    ("iwae_5", (0,), 3),
    ("vae_5", (0, 5), 3),
)
DEFAULT_LIMIT = "--grad_clip=2560"
QUICKLY_TESTED = ["--eval_k=5", "--eval_recordings=0"]
REGIME = "--no-mirrored_init --x_noise=0 --batch_size=128 --lr=3e-4 --lr_updates=0".split()
SAME_COMPUTE = 2.5  # updates of VRNN in the time of one of IWAE_5, on one core at these sizes
# 15.89 M parameters.
PUBLISHED_SIZE = (
    "--x2s_dim 600 --p_x_dim 600 --rnn_dim 1000 --z2s_dim 500 --q_z_dim 500 --p_z_dim 500 "
    "--z_dim 200"
).split()
# What is copied of a run; the last one says that all are there.
KEPT = ("log.jsonl", "eval.json", "config.json")
# 2016's pipeline is compared by its curves on valid.
KEPT_OF_PIPELINE = ("log.jsonl", "config.json")
# Those that are compared window by window.
WITH_WINDOWS = ("our_training", "likelihood", "likelihood_larger")


def lengths(updates):
    """Flags of a run whose last fifth, at the lowest learning rate, shows if it has settled."""
    return [f"--max_updates={round(updates)}", f"--lr_updates={round(0.8 * updates)}"]


def table(runs, updates):
    """(group, name, script, flags) of every run, in the order in which they are run."""
    longer = lengths(SAME_COMPUTE * updates)
    yield from objectives(range(3))
    yield from resampled(range(3))
    yield from variants(runs)
    yield from adam()
    for seed in range(3):
        yield "objectives", f"vrnn_long-{seed}", *VRNN, *longer, f"--seed={seed}"
    for name, script in OBJECTIVES.items():
        yield "reader", f"reader_{name}-0", *script, "--data=data/reader.h5"
    yield "latents", "uniform-0", *VRNN, "--no-mirrored_init", "--x_noise=0"
    yield "latents", "uniform_noise-0", *VRNN, "--no-mirrored_init"
    yield "latents", "mirrored-0", *VRNN, "--x_noise=0"
    yield from objectives((3, 4))
    yield from resampled((3, 4))
    yield from clips()
    yield from default_limit(updates)
    yield "without_z", "lstm-0", *VRNN, "--z_dim=0", DEFAULT_LIMIT
    yield from regime(updates)
    for name in ("vae_5", "iwae_5"):
        yield "objectives", f"{name}_long-0", *OBJECTIVES[name], *longer
    lstm = [*VRNN, *ADAPTIVE, "--z_dim=0"]
    yield "likelihood", "lstm_ar_32-0", *lstm
    for name, script in OBJECTIVES.items():
        yield "likelihood_z", f"{name}_ar_32-0", *script, *ADAPTIVE, *QUICKLY_TESTED
    wide = [f"--{size}=256" for size in ("x2s_dim", "p_x_dim", "rnn_dim")]
    yield "likelihood_larger", "lstm_ar_32_wide-0", *lstm, *wide, "--batch_size=16"
    yield "likelihood_larger", "lstm_ar_32_components_40-0", *lstm, "--components=40"
    yield from published_size()
    yield from latent_variables(runs)
    yield from pipeline_of_2016()


def objectives(seeds):
    for seed in seeds:
        for name, script in OBJECTIVES.items():
            yield "objectives", f"{name}-{seed}", *script, f"--seed={seed}"


def resampled(seeds):
    for seed in seeds:
        yield "variants", f"iwae_5_resample-{seed}", *RESAMPLED, f"--seed={seed}"


def variants(runs):
    warm = [f"--init_from={runs / 'objectives' / 'vrnn-0' / 'best.pt'}", "--x_noise=0"]
    yield "variants", "iwae_5_dreg-0", *IWAE, "--dreg"
    yield "variants", "iwae_5_warm-0", *IWAE, *warm
    yield "variants", "vrnn_warm-0", *VRNN, *warm


def adam():
    """What about clipping does the harm."""
    clip_5 = [*VRNN_SCALED, "--grad_clip=5"]
    short = "--beta2=0.99"
    yield "adam", "growing-0", *VRNN_SCALED, "--norm=growing"
    for seed in range(3):
        median = ("--norm=median", "--grad_clip=0", f"--seed={seed}")
        yield "adam", f"median-{seed}", *VRNN_SCALED, *median
    yield "adam", "beta2-0", *VRNN_SCALED, short
    yield "adam", "clip_5-0", *clip_5
    yield "adam", "clip_5_beta2-0", *clip_5, short
    yield "adam", "clip_5_no_noise-0", *clip_5, "--x_noise=0"
    yield "adam", "clip_5_beta2_no_noise-0", *clip_5, short, "--x_noise=0"


def clips():
    """The limit on the gradient as a dose, for each objective."""
    for name, limits, seeds in CLIPS:
        for seed in range(seeds):
            for limit in limits:
                flags = [*OBJECTIVES[name], f"--grad_clip={limit}", f"--seed={seed}"]
                yield "clip", f"{name}_clip_{limit}-{seed}", *flags
    for seed in range(3):
        yield "clip", f"vae_1-{seed}", *VAE, "--k=1", f"--seed={seed}"


def default_limit(updates):
    longer = lengths(SAME_COMPUTE * updates)
    for seed in range(5):
        for name, script in WITH_RESAMPLED.items():
            flags = [*script, DEFAULT_LIMIT, f"--seed={seed}"]
            yield "our_training", f"{name}-{seed}", *flags
    for seed in range(5):
        for name, script in WITH_RESAMPLED.items():
            flags = [*script, DEFAULT_LIMIT, *longer, f"--seed={seed}"]
            yield "our_training_long", f"{name}_long-{seed}", *flags


def published_size():
    """The published size and a small one: one thing at a time for 1,000 updates, and to the end."""
    large_3e_4 = [*PUBLISHED_SIZE, "--lr=3e-4", "--monitor_every=500"]
    yield "size", "large_lr_3e-4-0", *VRNN, *large_3e_4, DEFAULT_LIMIT, *QUICKLY_TESTED
    short = ["--batch_size=16", *lengths(1000), *QUICKLY_TESTED]
    small = [*VRNN, *short]
    large = [*VRNN, *PUBLISHED_SIZE, *short]
    for size, flags in (("small", small), ("large", large)):
        yield "published_size", f"{size}-0", *flags
        yield "published_size", f"{size}_lr_3e-4-0", *flags, "--lr=3e-4"
    yield "published_size", "small_z_200-0", *small, "--z_dim=200"
    yield "published_size", "large_z_32-0", *large, "--z_dim=32"


def regime(updates):
    """Initialisation, batch and constant rate of 2016: fewer updates, of 16 times the sequences."""
    half = f"--max_updates={updates // 2}"
    quarter = f"--max_updates={updates // 4}"
    yield "regime", "2016_vrnn_clip_640-0", *VRNN, *REGIME, half, "--grad_clip=640"
    for limit in (5, 0):
        flags = [*REGIME, quarter, f"--grad_clip={limit}"]
        yield "regime", f"2016_vrnn_clip_{limit}-0", *VRNN, *flags
    yield "regime", "2016_iwae_5_clip_640-0", *IWAE, *REGIME, quarter, "--grad_clip=640"


def latent_variables(runs):
    """The adaptive likelihood with and without latent variables: short runs, many components or one."""
    short = [*ADAPTIVE, "--max_updates=500", "--lr_updates=400", "--monitor_every=100"]
    short += QUICKLY_TESTED
    for seed in range(3):
        for name, script in WITH_RESAMPLED.items():
            yield "latent_variables", f"{name}-{seed}", *script, *short, f"--seed={seed}"
        yield "latent_variables", f"lstm-{seed}", *VRNN, *short, "--z_dim=0", f"--seed={seed}"
    for seed in range(3):
        for name in WITH_RESAMPLED:
            trained = runs / "latent_variables" / f"{name}-{seed}" / "best.pt"
            flags = [f"--evaluate={trained}", *QUICKLY_TESTED]
            yield "from_prior", f"{name}-{seed}", "tests/experiments/from_prior", *flags
    yield "latent_variables", "lstm_one-0", *VRNN, *short, "--z_dim=0", "--components=1"
    yield "latent_variables", "vrnn_one-0", *VRNN, *short, "--components=1"
    # As many filters in all as five particles have.
    yield "latent_variables", "lstm_40-0", *VRNN, *short, "--z_dim=0", "--components=40"


def pipeline_of_2016():
    """2016 as it was, and with one of its ingredients exchanged."""
    for seed in range(5):
        flags = ["--objective=iwae", f"--seed={seed}"]
        yield "pipeline_of_2016", f"iwae-{seed}", *PIPELINE, *flags
        yield "pipeline_exchanged", f"iwae_limit_640-{seed}", *PIPELINE, *flags, "--grad_clip=640"
        flags = ["--objective=vrnn", f"--seed={seed}"]
        yield "pipeline_of_2016", f"vrnn-{seed}", *PIPELINE, *flags
        yield "pipeline_exchanged", f"vrnn_limit_25-{seed}", *PIPELINE, *flags, "--grad_clip=25"
    for seed in range(3):
        flags = ["--objective=vae", f"--seed={seed}"]
        yield "pipeline_of_2016", f"vae-{seed}", *PIPELINE, *flags
        flags = ["--objective=iwae", "--grad_clip=640", *CORRECT_WEIGHTS, f"--seed={seed}"]
        yield "pipeline_exchanged", f"iwae_correct_weights-{seed}", *PIPELINE, *flags
        flags = ["--objective=vrnn", "--rows=25", f"--seed={seed}"]
        yield "pipeline_exchanged", f"vrnn_rows_25-{seed}", *PIPELINE, *flags
        for limit in (25, 640):
            name = f"vrnn_rows_25_limit_{limit}-{seed}"
            yield "pipeline_exchanged", name, *PIPELINE, *flags, f"--grad_clip={limit}"
        flags = ["--objective=iwae", "--grad_clip=1", "--widened_after=100", "--widened_to=25"]
        yield "pipeline_exchanged", f"iwae_early_steps-{seed}", *PIPELINE, *flags, f"--seed={seed}"
        flags = ["--objective=vae", "--grad_clip=640", f"--seed={seed}"]
        yield "pipeline_exchanged", f"vae_limit_640-{seed}", *PIPELINE, *flags
        flags = ["--objective=vrnn", "--grad_clip=25.6", "--widened_after=100", f"--seed={seed}"]
        yield "pipeline_exchanged", f"vrnn_early_steps-{seed}", *PIPELINE, *flags
        for objective in ("vrnn", "iwae"):
            for name, rate in (
                ("lr_1e-3", ["--lr=1e-3"]),
                ("lr_raised", ["--raised_after=100", "--raised_until=300"]),
            ):
                flags = [f"--objective={objective}", *rate, f"--seed={seed}"]
                yield "pipeline_exchanged", f"{objective}_{name}-{seed}", *PIPELINE, *flags
    # To the first evaluation of 2016: the left of recon.png.
    to_2016 = "--max_updates=2000"
    long_steps = ["--grad_clip=1", "--widened_after=1000", "--widened_to=25"]
    vrnn_long_steps = ["--objective=vrnn", "--grad_clip=25.6", "--widened_after=1000"]
    for name, flags in (
        ("iwae", ["--objective=iwae"]),
        ("iwae_limit_640", ["--objective=iwae", "--grad_clip=640"]),
        ("vrnn", ["--objective=vrnn"]),
        ("vae", ["--objective=vae"]),
    ):
        yield "copy_of_2016", f"{name}-3", *PIPELINE, *flags, to_2016, "--seed=3"
    for name, flags in (
        ("iwae_limit_640_later-3", ["--objective=iwae", "--widened_after=1000", "--seed=3"]),
        ("iwae_long_steps-3", ["--objective=iwae", *long_steps, "--seed=3"]),
        ("iwae_long_steps-4", ["--objective=iwae", *long_steps, "--seed=4"]),
        ("iwae-4", ["--objective=iwae", "--seed=4"]),
        ("iwae_limit_640-4", ["--objective=iwae", "--grad_clip=640", "--seed=4"]),
        ("vrnn-4", ["--objective=vrnn", "--seed=4"]),
        ("vrnn_long_steps-3", [*vrnn_long_steps, "--seed=3"]),
        ("vrnn_long_steps-4", [*vrnn_long_steps, "--seed=4"]),
        ("vrnn_limit_25-3", ["--objective=vrnn", "--grad_clip=25", "--seed=3"]),
        ("vae-4", ["--objective=vae", "--seed=4"]),
        ("vae_limit_640-3", ["--objective=vae", "--grad_clip=640", "--seed=3"]),
    ):
        yield "pipeline_to_2000", name, *PIPELINE, *flags, to_2016
    # The published size and initialisation: how long are its gradients beside the limits?
    published = [*PUBLISHED_SIZE, "--init=fixed", "--max_updates=200", "--monitor_windows=64"]
    for name, flags in (
        ("vrnn", ["--objective=vrnn"]),
        ("iwae", ["--objective=iwae"]),
        ("iwae_limit_640", ["--objective=iwae", "--grad_clip=640"]),
    ):
        yield "pipeline_size", f"{name}-0", *PIPELINE, *flags, *published, "--seed=0"
    # One ingredient of ours each, in the objectives as they were.
    for seed in range(3):
        for objective, name, flag in (
            ("vae", "once", "--replays=1"),
            ("vae", "by_stream", "--carried=by_stream"),
            ("vrnn", "excerpts", "--order=excerpts"),
            ("vae", "excerpts", "--order=excerpts"),
            ("iwae", "by_stream", "--carried=by_stream"),
            ("iwae", "excerpts", "--order=excerpts"),
            ("iwae", "favoured_best", "--favoured=best"),
        ):
            flags = [f"--objective={objective}", flag, f"--seed={seed}"]
            yield "pipeline_exchanged", f"{objective}_{name}-{seed}", *PIPELINE, *flags
    # The other way round: one ingredient of 2016 each, in an IWAE_5 and a VAE_5 with ours.
    weights_of_2016 = ["--over_batch=sum", "--over_time=mean", "--through_weights"]
    for name, flags in (
        ("iwae_ours", []),
        ("iwae_ours_limit_25", ["--grad_clip=25"]),
        ("iwae_ours_in_rows", ["--order=chapters", "--carried=by_row"]),
        ("iwae_ours_favoured_worst", ["--favoured=worst"]),
        ("iwae_ours_weights", ["--favoured=worst", *weights_of_2016]),
        ("iwae_ours_windows_128", ["--rows=640"]),
    ):
        flags = ["--objective=iwae", *OURS_IN_PIPELINE, *CORRECT_WEIGHTS, *flags]
        for seed in range(3):
            yield "pipeline_from_ours", f"{name}-{seed}", *PIPELINE, *flags, f"--seed={seed}"
    for name, flags in (
        ("vae_ours", []),
        ("vae_ours_limit_3200", ["--grad_clip=3200"]),
        ("vae_ours_in_rows", ["--order=chapters", "--carried=by_row"]),
        ("vae_ours_replays_5", ["--replays=5"]),
    ):
        flags = ["--objective=vae", "--replays=1", *OURS_IN_PIPELINE, *flags]
        for seed in range(3):
            yield "pipeline_from_ours", f"{name}-{seed}", *PIPELINE, *flags, f"--seed={seed}"
    # Fresh data: 900 updates of VRNN are one epoch.
    epoch = ["--grad_clip=640", "--max_updates=900", "--monitor_every=100"]
    for seed in range(3):
        for objective in ("vrnn", "vae", "iwae"):
            flags = [f"--objective={objective}", "--rows=10", *epoch, f"--seed={seed}"]
            yield "pipeline_fresh", f"{objective}-{seed}", *PIPELINE, *flags
        flags = ["--objective=vrnn", "--rows=2", *epoch, f"--seed={seed}"]
        yield "pipeline_fresh", f"vrnn_rows_2-{seed}", *PIPELINE, *flags
    # As many streams as rows, as in 2016; VAE_5 and IWAE_5 stay for 900 updates in each file.
    chapters = ["--rows=10", "--streams=10", "--grad_clip=640", "--max_updates=4500"]
    for seed in range(3):
        for objective in ("vrnn", "vae", "iwae"):
            flags = [f"--objective={objective}", *chapters, "--monitor_every=150", f"--seed={seed}"]
            yield "pipeline_chapters", f"{objective}-{seed}", *PIPELINE, *flags


def train(runs, updates, to, group, name, script, *flags):
    """Train a run, go on with it, or evaluate another's checkpoint, and copy its logs to `to`."""
    folder = runs / group / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = to / group / name
    if (kept / KEPT[-1]).exists():
        return
    if not (folder / "eval.json").exists():
        status = start(folder, updates, script, *flags)
        if status:
            print(f"{name}: status {status}, see {folder}.txt", flush=True)
            return
    kept.mkdir(parents=True, exist_ok=True)
    files = KEPT_OF_PIPELINE if [script] == PIPELINE else KEPT
    if group in WITH_WINDOWS:
        files = ("windows.csv", *files)
    for file in files:
        if (folder / file).exists():  # an evaluation has no log
            text = (folder / file).read_text()
            # Wherever the runs were on this machine.
            (kept / file).write_text(text.replace(f"{runs}/", "runs/experiment/"))
    print(f"{name}: done", flush=True)


def start(folder, updates, script, *flags):
    """Run a script to its end, with what it prints in a file beside its folder; its status."""
    command = [sys.executable, ROOT / f"{script}.py", f"--out_dir={folder}"]
    if [script] == PIPELINE:
        command += PIPELINE_SETTINGS
    elif not flags or not flags[0].startswith("--evaluate"):  # a checkpoint has its own settings
        command += [*SETTINGS, "--data=data/speech.h5", "--x_noise_updates=1500", *lengths(updates)]
    command += flags
    if (folder / "last.pt").exists():
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path(f"{folder}.txt").open("a") as output:
        return subprocess.run(command, stdout=output, stderr=output, env=environment).returncode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at_once", type=int, default=2)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--to", type=Path, default=Path("data/results"))
    options = parser.parse_args()
    with ThreadPoolExecutor(options.at_once) as pool:
        started = [
            pool.submit(train, options.runs, options.updates, options.to, *run)
            for run in table(options.runs, options.updates)
        ]
        try:
            for run in started:
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C begins no more of them


if __name__ == "__main__":
    main()
