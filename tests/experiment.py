"""Train, or resume, every run of the table in the README, and write what plot_recon.py needs of each to a folder.

    python tests/experiment.py [--at_once 2] [--updates 3000] [--runs runs/experiment] [--to data/results/experiment]

It needs data/speech.h5 (all recordings) and data/reader.h5 (the single reader alone), made by prepare_blizzard.py. Runs
go one thread each, at_once at a time, in the order below; finished ones are passed over, interrupted ones resumed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = ("--x2s_dim 128 --z2s_dim 128 --q_z_dim 128 --p_z_dim 128 --p_x_dim 128 --rnn_dim 128 --z_dim 32 --batch_size 8 "
            "--lr 1e-3 --monitor_every 250 --monitor_windows 256 --eval_recordings 8 --device cpu").split()
VRNN, VAE, IWAE = "vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae"
MAIN = {"vrnn": [VRNN], "vae_5": [VAE], "iwae_5": [IWAE], "vae_5_published": [VAE, "--as_published"],
        "iwae_5_published": [IWAE, "--as_published"]}
SAME_COMPUTE = 2.3  # updates of VRNN in the time of one of IWAE_5, on one core at these sizes
KEPT = ("config.json", "log.jsonl", "eval.json", "windows.csv")


def commands(runs, updates):
    """{name of a run: its command line}, in the order in which they are run."""
    def command(name, script, *flags, data="speech", seed=0, updates=updates):
        return [script, *SETTINGS, f"--x_noise_updates={updates_of_noise}", *flags, f"--data=data/{data}.h5",
                f"--seed={seed}", f"--max_updates={updates}", f"--out_dir={runs / name}"]

    updates_of_noise = updates // 2
    warm = ["--init_from", str(runs / "vrnn-0" / "best.pt"), "--x_noise=0"]
    one_seed = {
        "iwae_5_sign": [IWAE, "--as_published", "--corrections=sign"],
        "iwae_5_time": [IWAE, "--as_published", "--corrections=time"],
        "iwae_5_gradient": [IWAE, "--as_published", "--corrections=gradient"],
        "iwae_5_batch": [IWAE, "--as_published", "--corrections=batch"],
        "iwae_5_dreg": [IWAE, "--dreg"], "iwae_5_resample": [IWAE, "--resample"],
        "iwae_5_warm": [IWAE, *warm], "vrnn_warm": [VRNN, *warm],
    }
    table = {f"{name}-{seed}": command(f"{name}-{seed}", *flags, seed=seed)
             for seed in range(3) for name, flags in MAIN.items()}
    table |= {f"{name}-0": command(f"{name}-0", *flags) for name, flags in one_seed.items()}
    table |= {f"vrnn_long-{seed}": command(f"vrnn_long-{seed}", VRNN, seed=seed, updates=round(SAME_COMPUTE * updates))
              for seed in range(3)}
    table |= {f"reader_{name}-0": command(f"reader_{name}-0", *flags, data="reader") for name, flags in MAIN.items()}
    return table


def train(name, command, runs, to):
    folder = runs / name
    script, *flags = command
    if not (folder / "eval.json").exists():
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        with (runs / f"{name}.txt").open("a") as output:
            status = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags, *resume], stdout=output,
                                    stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if status:
            return print(f"{name}: status {status}, see {runs / name}.txt", flush=True)
    group = to / ("reader" if name.startswith("reader_") else "speech")
    (group / name).mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(folder / file, group / name)
    print(f"{name}: done", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at_once", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--to", type=Path, default=Path("data/results/experiment"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        for name, command in commands(options.runs, options.updates).items():
            pool.submit(train, name, command, options.runs, options.to)


if __name__ == "__main__":
    main()
