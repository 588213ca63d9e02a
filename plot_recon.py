"""Draw recon.png, the held-out comparison, from the logs of all runs in a folder.

    python plot_recon.py [FOLDER]      draws every FOLDER/*/log.jsonl (default: runs)
    python plot_recon.py --demo        first trains the three scripts on synthetic data where runs/demo lacks them

Left: held-out NLL while training, by one bound for all runs. Right: bounds on the test split from each eval.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
MARKERS = "osD^v"


def train_demo_runs(folder):
    for script in SCRIPTS:
        run = folder / script
        if not (run / "eval.json").exists():
            resume = ["--resume"] if (run / "last.pt").exists() else []
            command = [sys.executable, Path(__file__).with_name(f"{script}.py"), "--demo", f"--out_dir={run}", *resume]
            status = subprocess.run(command).returncode
            if status:
                sys.exit(status)


def label(config):
    """The objective of a run, as the legend names it."""
    name = {"vrnn_gauss": "VRNN", "vrnn_gauss_alt_nll": f"VAE$_{{{config['k']}}}$",
            "vrnn_gauss_iwae": f"IWAE$_{{{config['k']}}}$"}[config["script"]]
    return name + (" as published" if config.get("as_published") else "") + (" warm" if config["init_from"] else "")


def read_run(folder):
    """A run's header, its curve and its test bounds (None where there are none yet)."""
    try:
        header, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        bound = common.tracked_bound(header["config"]["eval_k"])
        curve = [(line["sequences"], -line["valid"][bound]["nats_per_frame"]) for line in lines]
        return dict(name=folder.name, label=label(header["config"]), bound=bound, title=title(header["data"]),
                    data=header["data"], window=(header["config"]["x_dim"], header["config"]["seq_frames"]),
                    order=SCRIPTS.index(header["config"]["script"]), test=read_test(folder / "eval.json"),
                    curve=np.array(curve, float).reshape(-1, 2))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise common.UserError(f"{folder} holds no readable log of a run ({error}); remove it or run again") from None


def read_test(path):
    """{"windows": n, bound: (nats per frame, standard error)} on the test split; None before it was evaluated."""
    if not path.exists():
        return None
    evaluation = json.loads(path.read_text())
    bounds = {name: (float(bound["nats_per_frame"]), float(bound["stderr"] or 0))
              for name, bound in evaluation["bounds"].items() if name == "elbo" or name.startswith("iwae")}
    return {"windows": int(evaluation["windows"]), **bounds}


def read_runs(folder):
    runs = [read_run(log.parent) for log in sorted(folder.glob("*/log.jsonl"), key=common.natural_order)]
    if not runs:
        raise common.UserError(f"{folder} holds no runs (*/log.jsonl); train one first, or try --demo")
    for run in runs[1:]:
        for what in ("bound", "data", "window"):
            if run[what] != runs[0][what]:
                raise common.UserError(f"{folder / run['name']} and {folder / runs[0]['name']} differ in their {what}, "
                                       "so their nats cannot be compared; put them into different folders")
    return sorted(runs, key=lambda run: (run["order"], run["label"]))


def title(data):
    minutes = data["samples"]["train"] / common.SAMPLE_RATE / 60
    what = "synthetic demo data, not speech" if data["created_by"].startswith(common.SYNTHETIC) else data["file"]
    return f"Variational RNN on raw audio: {what} ({minutes:.3g} minutes of training recordings)"


def draw(runs, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2), layout="constrained")
    labels = list(dict.fromkeys(run["label"] for run in runs))
    colours = {name: f"C{i}" for i, name in enumerate(labels)}

    for run in runs:
        first = run is next(r for r in runs if r["label"] == run["label"])
        left.plot(*run["curve"].T, color=colours[run["label"]], linewidth=1.4, label=run["label"] if first else None)
    points = np.concatenate([run["curve"][:, 1] for run in runs])
    low, high = robust_limits(points)
    outside = int((~((points >= low) & (points <= high))).sum())
    left.set(xlabel="training sequences (0.5 s each)" if is_half_second(runs) else "training sequences",
             ylabel=f"held-out NLL $\\leq$ {bound_name(runs[0]['bound'])} (nats/frame)", ylim=(low, high),
             title="valid split while training")
    left.text(0.02, 0.02, f"{outside} of {len(points)} points lie outside the axis" if outside else "all points shown",
              transform=left.transAxes, fontsize=8, color="0.4")
    left.legend(frameon=False)
    left.grid(alpha=0.25)

    tested = [run for run in runs if run["test"]]
    bounds = [name for name in (tested[0]["test"] if tested else ())
              if name != "windows" and all(name in run["test"] for run in tested)]
    for i, name in enumerate(bounds):
        for run in tested:
            nats, stderr = run["test"][name]
            siblings = [r for r in tested if r["label"] == run["label"]]
            x = labels.index(run["label"]) + 0.22 * (i - (len(bounds) - 1) / 2) + 0.05 * siblings.index(run)
            right.errorbar(x, -nats, stderr, fmt=MARKERS[i % len(MARKERS)], capsize=3,
                           color=colours[run["label"]], markersize=5)
        right.plot([], [], MARKERS[i % len(MARKERS)], color="0.3", label=bound_name(name))
    right.set_xticks(range(len(labels)), labels)
    right.set(xlim=(-0.6, len(labels) - 0.4), title="test split, best checkpoint",
              ylabel="NLL $\\leq$ (nats/frame)")
    right.grid(axis="y", alpha=0.25)
    if tested:
        low, high = right.get_ylim()
        right.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        right.legend(loc="upper center", ncols=len(bounds), frameon=False, columnspacing=1, handletextpad=0.2,
                     title=f"bars: standard error over the same {tested[0]['test']['windows']} windows",
                     title_fontsize=8)
    else:
        right.text(0.5, 0.5, "no run has an eval.json yet", transform=right.transAxes, ha="center", color="0.4")
    figure.suptitle(runs[0]["title"])
    figure.savefig(out, dpi=150)


def bound_name(name):
    """elbo as -ELBO, iwae_5 as -IWAE with index 5."""
    kind, _, k = name.upper().partition("_")
    return f"$-${kind}" + (f"$_{{{k}}}$" if k else "")


def robust_limits(points):
    """Limits that the first steep updates and single spikes do not stretch."""
    finite = points[np.isfinite(points)]
    if len(finite) == 0:
        raise common.UserError("no run has a finite held-out bound yet; wait for the first monitoring interval")
    low, high = np.quantile(finite, (0.0, 0.95))
    margin = 0.06 * (high - low) + 1e-3
    return low - margin, high + margin


def is_half_second(runs):
    x_dim, seq_frames = runs[0]["window"]
    return x_dim * seq_frames == common.SAMPLE_RATE // 2


def main():
    parser = common.OneLineParser(prog="plot_recon.py", description=__doc__, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of runs (default: runs; runs/demo with --demo)")
    parser.add_argument("--out", type=Path, default=Path("recon.png"), help="picture to write (%(default)s)")
    parser.add_argument("--demo", action="store_true", help="train the three scripts on synthetic data first")
    options = parser.parse_args()
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise common.UserError(f"--out={options.out} is no picture; give a name that ends in .png, .pdf or .svg")
    folder = options.folder or Path("runs/demo" if options.demo else "runs")
    if options.demo:
        train_demo_runs(folder)
    runs = read_runs(folder)
    draw(runs, options.out)
    print(f"{options.out}: {', '.join(run['name'] for run in runs)}")


if __name__ == "__main__":
    common.run_as_script(main)
