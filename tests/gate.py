"""What the redesign may not change: 21 updates of each variant at tiny sizes, made at once and with a stop between.

python tests/gate.py record FOLDER    writes FOLDER/*.pt, with the data that it trains on
python tests/gate.py compare FOLDER [VARIANT ...]    makes them again, and prints the largest difference of each
"""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = map(str, (Path(__file__).parent.parent, Path(__file__).parent))

import torch  # noqa: E402
from tiny import SIZES, run, write_tiny_data  # noqa: E402

VARIANTS = {
    "vrnn": ("vrnn_gauss",),
    "vae": ("vrnn_gauss_alt_nll", "--k=3"),
    "iwae": ("vrnn_gauss_iwae", "--k=3"),
    "dreg": ("vrnn_gauss_iwae", "--k=3", "--dreg"),
    "resample": ("vrnn_gauss_iwae", "--k=3", "--resample"),
    "ar": ("vrnn_gauss", "--ar_order=3"),
    "ar_resample": ("vrnn_gauss_iwae", "--k=4", "--ar_order=3", "--resample"),
    "lstm": ("vrnn_gauss", "--z_dim=0"),
    "bf16": ("vrnn_gauss", "--bf16"),
}
COMMON = [
    *SIZES,
    "--monitor_every=7",
    "--lr_updates=30",
    "--x_noise_updates=12",
    "--eval_recordings=3",
]


def flat(tree, path=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: leaf
        for key, part in tree.items()
        for name, leaf in flat(part, f"{path}/{key}").items()
    }


def found_in(run):
    last, best = (torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]
    evaluation = json.loads((run / "eval.json").read_text())
    return flat(
        dict(
            model=last["model"],
            averaged=last["averaged"],
            moments=last["optimiser"]["state"],
            best=best["model"],
            log=[
                {name: value for name, value in line.items() if name != "seconds"} for line in lines
            ],
            bounds=evaluation["bounds"],
            whole=evaluation["whole_recordings"]["smc_6"],
            windows=(run / "windows.csv").read_text(),
        )
    )


def train(variant, folder):
    script, *flags = VARIANTS[variant]
    for name, stops in dict(whole=(21,), resumed=(10, 21)).items():
        out = folder / "run" / f"{variant}_{name}"
        shutil.rmtree(out, ignore_errors=True)
        for i, updates in enumerate(stops):
            result = run(
                script,
                *COMMON,
                *flags,
                f"--data={folder}/tiny.h5",
                f"--out_dir={out}",
                f"--max_updates={updates}",
                *["--resume"] * (i > 0),
                cwd=folder,
            )
            assert result.returncode == 0, result.stderr
    whole, resumed = (
        found_in(folder / "run" / f"{variant}_{name}") for name in ("whole", "resumed")
    )
    for name, value in whole.items():
        if name.startswith(("/model", "/averaged", "/moments")):
            assert torch.equal(value, resumed[name]), f"{variant}: {name} of a resumed run differs"
    return whole


def difference(one, other):
    if isinstance(one, str) or one is None:
        return 0.0 if one == other else float("inf")
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return ((one - other).abs() / (1e-3 + one.abs())).max().item() if one.numel() else 0.0


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    variants = sys.argv[3:] or list(VARIANTS)
    if task == "record":
        folder.mkdir(parents=True)
        write_tiny_data(folder / "tiny.h5")
    with ThreadPoolExecutor(2) as threads:
        all_found = threads.map(lambda variant: train(variant, folder), variants)
        for variant, found in zip(variants, all_found):
            if task == "record":
                torch.save(found, folder / f"{variant}.pt")
                continue
            before = torch.load(folder / f"{variant}.pt", weights_only=True)
            assert before.keys() == found.keys(), before.keys() ^ found.keys()
            by_name = {name: difference(value, found[name]) for name, value in before.items()}
            worst = max(by_name, key=by_name.get)
            print(
                f"{variant}: {len(by_name)} values, largest relative difference {by_name[worst]:.3g} in {worst}"
            )


if __name__ == "__main__":
    main()
