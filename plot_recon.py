"""Draw recon.png, the held-out comparison, from the logs of all runs in a folder, and print it as a table.

    python plot_recon.py [FOLDER ...]  draws every FOLDER/*/log.jsonl (default: runs), a row of panels for each folder
    python plot_recon.py --demo        first trains the three scripts on synthetic data where runs/demo lacks them

Left: held-out NLL while training, by one bound for all runs. Right: bounds on the test split from each eval.json.
Folders made by --evaluate are rows of the table. Beside the .wav files of a run goes their picture, samples.png.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import soundfile

import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
SPEECH = dict(real="real", sample="generated", continued="real, continued", resynthesised="resynthesised")
YARDSTICKS = dict(flac="FLAC", linear_prediction_16="linear prediction, order 16", histogram="histogram")
MARKERS = "osD^v"
PERSONAL = {"name", "seed", "out_dir", "data", "device", "monitor_every", "eval_recordings"}  # these set no run apart


def train_demo_runs(folder):
    for script in SCRIPTS:
        run = folder / script
        if not (run / "eval.json").exists():
            resume = ["--resume"] if (run / "last.pt").exists() else []
            command = [sys.executable, Path(__file__).with_name(f"{script}.py"), "--demo", f"--out_dir={run}", *resume]
            status = subprocess.run(command).returncode
            if status:
                sys.exit(status)


# ---- reading ----

def name_of(config):
    """The name of a run: its objective for the three scripts, and otherwise what its script stated to Training."""
    script, name = config["script"], str(config.get("name", config["script"]))  # older logs have no name
    if script not in SCRIPTS or name != script:
        return name
    k = config["k"]
    name = dict(zip(SCRIPTS, ("VRNN", f"VAE_{k}", f"IWAE_{k}")))[script] if config.get("z_dim") != 0 else "LSTM"
    if config.get("as_published"):
        name += " as published"
    if config.get("corrections"):
        name += f" but for {config['corrections']}"
    for variant, suffix in (("dreg", " DReG"), ("resample", " resampled"), ("init_from", " warm")):
        name += suffix if config.get(variant) else ""
    return name


def label_apart(runs):
    """Give each run its label: its name, and the settings in which runs of that name differ."""
    for run in runs:
        siblings = [other["config"] for other in runs if other["name"] == run["name"]]
        settings = sorted({name for config in siblings for name in config} - PERSONAL)
        settings += ["data"] * (run["curve"] is None)  # of evaluations, which may be on files of one name
        differing = [name for name in settings if len({str(config.get(name)) for config in siblings}) > 1]
        run["label"] = ", ".join([run["name"], *(f"{name} {run['config'].get(name)}" for name in differing)])


@contextlib.contextmanager
def reading(path, remedy):
    """Turn what a damaged file raises into one sentence that names it and the remedy."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else common.first_line(error)
        raise common.UserError(f"{path.parent} holds no readable {path.name} ({why}); {remedy}") from None


def read_run(folder):
    """A run's header, its curve and its test bounds (None where there are none yet)."""
    with reading(folder / "log.jsonl", "put this folder elsewhere, because its header cannot be repaired"):
        header, *lines = (folder / "log.jsonl").read_text().splitlines() or [""]
        run = described(folder, **{name: json.loads(header)[name] for name in ("config", "data")})
    with reading(folder / "log.jsonl", "go on with the run by --resume, which drops torn lines, or remove them"):
        curve = [(line["sequences"], -line["valid"][run["bound"]]["nats_per_frame"]) for line in map(json.loads, lines)]
        run["curve"] = np.array(curve, float).reshape(-1, 2)
    return run | read_tests(folder, "go on with the run by --resume, which writes it anew")


def read_evaluation(folder):
    """The same of a folder made by --evaluate; it has no curve, and its name tells checkpoint and data."""
    remedy = "put this folder elsewhere, or make it anew if --evaluate made it"
    with reading(folder / "eval.json", remedy):
        evaluation = json.loads((folder / "eval.json").read_text())
        data, checkpoint = evaluation["data"], Path(evaluation["checkpoint"]).name
        title(data), common.bits_per_sample(0.0, 1, data["std"])  # fail here, where the file has a name
    with reading(folder / "config.json", remedy):
        run = described(folder, json.loads((folder / "config.json").read_text()), data)
    run["name"] = f"{run['name']}, {checkpoint} on {data['file']}"
    return run | read_tests(folder, remedy)


def described(folder, config, data):
    """What a configuration, and the data of an evaluation or a training, say of a run."""
    config = {"ar_order": 0, **config}  # older ones have none
    common.bits_per_sample(0.0, config["x_dim"], data["std"])  # fail here, where the file has a name
    order = SCRIPTS.index(config["script"]) if config["script"] in SCRIPTS else len(SCRIPTS)
    return dict(folder=folder.name, config=config, name=name_of(config), seed=int(config["seed"]), order=order,
                bound=common.tracked_bound(config["eval_k"]), title=title(data), data=data, curve=None,
                window=(config["x_dim"], config["seq_frames"]))


def read_tests(folder, remedy):
    with reading(folder / "eval.json", remedy):
        test = read_test(folder / "eval.json")
    with reading(folder / "windows.csv", remedy):
        return dict(test=test, tested=test and test["windows"], windows=read_windows(folder / "windows.csv", test))


def read_test(path):
    """{"windows": n, bound: (nats per frame, standard error)} on the test split; None before it was evaluated."""
    if not path.exists():
        return None
    evaluation = json.loads(path.read_text())
    bounds = {name: (float(bound["nats_per_frame"]), float(bound["stderr"] or 0))
              for name, bound in evaluation["bounds"].items() if name.startswith(("elbo", "iwae", "smc", "kl"))}
    bounds["elbo"], bounds["kl"]  # every evaluation has them
    yardsticks = {name: float(found["nats_per_frame"]) for name, found in evaluation.get("yardsticks", {}).items()}
    return {"windows": int(evaluation["windows"]), "update": int(evaluation["update"]), **bounds,
            "yardsticks": yardsticks}


def read_windows(path, test):
    """{bound: nats per frame of each test window}; None where a run has not stored them."""
    if not path.exists():
        return None
    names, *rows = path.read_text().splitlines()
    if test and len(rows) != test["windows"]:
        raise ValueError(f"{path.name} has {len(rows)} windows, eval.json {test['windows']}")
    return dict(zip(names.split(","), np.array([row.split(",") for row in rows], float).T, strict=True))


def read_runs(folder):
    """The runs and the evaluations in a folder, with their labels, in the order of the table."""
    logs, tests = (sorted(folder.glob(f"*/{name}"), key=common.natural_order) for name in ("log.jsonl", "eval.json"))
    runs = [read_run(log.parent) for log in logs]
    evaluations = [read_evaluation(test.parent) for test in tests if not test.with_name("log.jsonl").exists()]
    if not runs + evaluations:
        raise common.UserError(f"{folder} holds no runs (*/log.jsonl); train one first, or try --demo")
    require_equal(folder, runs)
    label_apart(runs)
    label_apart(evaluations)

    def in_order(some):
        return sorted(some, key=lambda run: (run["order"], len(run["label"]), run["label"]))
    return in_order(runs) + in_order(evaluations)


def require_equal(folder, runs):
    """Raise UserError where runs cannot be drawn on one axis."""
    tested = [run for run in runs if run["test"]]
    for some, what in (runs, "bound"), (runs, "data"), (runs, "window"), (tested, "tested"):
        for run in some[1:]:
            if run[what] != some[0][what]:
                raise common.UserError(f"{folder / run['folder']} and {folder / some[0]['folder']} differ in their "
                                       f"{what}{' windows' * (what == 'tested')}, so their nats cannot be compared; "
                                       "put them into different folders")


def title(data):
    minutes = data["samples"]["train"] / common.SAMPLE_RATE / 60
    what = "synthetic demo data, not speech" if data["created_by"].startswith(common.SYNTHETIC) else data["file"]
    return f"{what} ({minutes:.3g} minutes of training recordings)"


def labels_of(runs):
    return list(dict.fromkeys(run["label"] for run in runs))


def shared_bounds(tested):
    """Bounds on the test split that all runs have, from the loosest to the tightest."""
    names = [name for name in tested[0]["test"] if name == "elbo" or name.startswith(("iwae", "smc"))]
    return sorted((name for name in names if all(name in run["test"] for run in tested)),
                  key=lambda name: (name.split("_")[0], len(name)))


# ---- pictures ----

def draw(folders, out):
    """A row of two panels for the runs of each folder."""
    heights = [1.6 + 0.34 * max(6, len(labels_of(runs))) for runs in folders]
    figure, axes = plt.subplots(len(folders), 2, figsize=(11, sum(heights)), width_ratios=(1, 1), squeeze=False,
                                height_ratios=heights, layout="constrained")
    for runs, (left, right) in zip(folders, axes):
        labels = labels_of(runs)
        colours = dict(zip(labels, [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors] * len(labels)))
        draw_curves(left, runs, colours)
        draw_bounds(right, runs, labels, colours)
    figure.suptitle("Variational RNN on raw audio")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def draw_curves(axis, runs, colours):
    for run in runs:
        axis.plot(*run["curve"].T, color=colours[run["label"]], linewidth=1.2)
    points = np.concatenate([run["curve"][:, 1] for run in runs])
    low, high = robust_limits(points)
    outside = int((~((points >= low) & (points <= high))).sum())
    axis.set(xlabel="training sequences (0.5 s each)" if is_half_second(runs) else "training sequences",
             ylabel=f"NLL $\\leq$ {bound_name(runs[0]['bound'])} (nats/frame)", ylim=(low, high),
             title=f"valid split while training, {runs[0]['title']}")
    axis.title.set_fontsize(9)
    axis.text(0.98, 0.97, f"{outside} of {len(points)} points lie outside the axis" if outside else "all points shown",
              transform=axis.transAxes, fontsize=8, color="0.4", ha="right", va="top")
    axis.grid(alpha=0.25)


def draw_bounds(axis, runs, labels, colours):
    tested = [run for run in runs if run["test"]]
    bounds = shared_bounds(tested) if tested else []
    for i, name in enumerate(bounds):
        for run in tested:
            siblings = [r for r in tested if r["label"] == run["label"]]
            y = labels.index(run["label"]) + 0.15 * (siblings.index(run) - (len(siblings) - 1) / 2)
            axis.plot(-run["test"][name][0], y, MARKERS[i % len(MARKERS)], color=colours[run["label"]], markersize=5)
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="0.3", label=bound_name(name))
    axis.set_yticks(range(len(labels)), labels)
    for tick, name in zip(axis.get_yticklabels(), labels):
        tick.set_color(colours[name])
    axis.set(ylim=(len(labels) - 0.4, -0.6), xlabel="NLL $\\leq$ (nats/frame)")
    (x_dim, _), std = runs[0]["window"], runs[0]["data"]["std"]
    bits = axis.secondary_xaxis("top", functions=(lambda nll: common.bits_per_sample(-nll, x_dim, std),
                                                  lambda bits: -common.nats_of_code(bits * x_dim, x_dim, std)))
    bits.set_xlabel("bits per sample", fontsize=8)
    bits.tick_params(labelsize=8)
    if flac := {run["test"]["yardsticks"].get("flac") for run in tested} - {None}:
        axis.axvline(-flac.pop(), color="0.3", linestyle="--", linewidth=1, label="FLAC")
    axis.grid(alpha=0.25)
    if tested:
        windows, stderr = tested[0]["test"]["windows"], np.mean([run["test"][bounds[0]][1] for run in tested])
        axis.set_title(f"test split, best checkpoints; a point is a run\nthe same {windows} windows for all: "
                       f"standard error {stderr:.1f}, common to all", fontsize=9, loc="right")
        axis.legend(loc="best", frameon=True, handletextpad=0.2, fontsize=8)
    else:
        axis.text(0.5, 0.5, "no run has an eval.json yet", transform=axis.transAxes, ha="center", color="0.4")


def draw_samples(folder):
    """Waveform over spectrogram of one excerpt of each kind, as samples.png beside them; its path."""
    path = folder / "samples.png"
    files = [file for kind in SPEECH for file in sorted(folder.glob(f"{kind}_*.wav"))[:1]]
    figure, axes = plt.subplots(2, len(files), figsize=(4.4 * len(files), 4.4), sharex=True, sharey="row",
                                squeeze=False, layout="constrained")
    for file, (wave, spectrum) in zip(files, axes.T):
        with reading(file, "remove it, or have it made anew by --resume of the run, or by --evaluate"):
            samples, rate = soundfile.read(file, always_2d=True)
            samples = np.pad(samples[:, 0], (0, max(0, 1024 - len(samples))))
        wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.3, color="black")
        wave.set(title=SPEECH[file.name.split("_")[0]], xlim=(0, len(samples) / rate))
        *_, image = spectrum.specgram(samples, NFFT=512, Fs=rate, noverlap=384, scale="linear", cmap="magma",
                                      norm=LogNorm(1e-13, 1e-3, clip=True))
        spectrum.set(xlabel="seconds")
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("Hz")
    figure.colorbar(image, ax=axes[1], label="power per Hz", pad=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


# ---- table ----

def table(runs, others):
    """The test bounds as Markdown: mean and standard error over the runs of each label.

    The last column compares the last bound to that of the first label of the others, in runs of the same seed, on the
    same windows; it is empty where the windows are others.
    """
    tested = [run for run in runs if run["test"]]
    if not tested:
        return "no run has an eval.json yet"
    *_, tightest = bounds = shared_bounds(tested)
    bounds.append("kl")
    reference = [run for run in others if run["label"] == others[0]["label"]]
    lines = [" | ".join(["| objective", "runs", "best updates", *bounds, f"bits/sample ({tightest})",
                         f"{tightest} against {reference[0]['label']}, same seeds |"]),
             "|---" * (len(bounds) + 5) + "|"]
    for name in labels_of(tested):
        group = [run for run in tested if run["label"] == name]
        cells = [mean_and_error([run["test"][bound][0] for run in group]) for bound in bounds]
        bits = [common.bits_per_sample(run["test"][tightest][0], run["window"][0], run["data"]["std"]) for run in group]
        updates = [run["test"]["update"] for run in group]
        updates = f"{min(updates)}" if min(updates) == max(updates) else f"{min(updates)} to {max(updates)}"
        is_reference = runs is others and name == reference[0]["label"]
        difference = "" if is_reference else paired(group, reference, tightest)
        lines.append(" | ".join([f"| {name}", str(len(group)), updates, *cells, mean_and_error(bits, 3),
                                 f"{difference} |"]))
    return "\n".join(lines + yardstick_rows(tested, bounds))


def yardstick_rows(tested, bounds):
    """A row for each yardstick of each data file, with its number where the tightest bound stands."""
    rows = {}
    for run in tested:
        of_file = f" on {run['data']['file']}" * (len({other["data"]["file"] for other in tested}) > 1)
        for name, nats in run["test"]["yardsticks"].items():
            bits = common.bits_per_sample(nats, run["window"][0], run["data"]["std"])
            cells = [f"| {YARDSTICKS.get(name, name)}{of_file}", "", "", *[""] * (len(bounds) - 2), f"{nats:.2f}", "",
                     f"{bits:.3f}", " |"]
            rows[cells[0]] = " | ".join(cells)
    return list(rows.values())


def paired(group, reference, bound):
    """Mean difference of a bound between two groups of runs over the seeds that both have, and its standard errors."""
    by_seed = [{run["seed"]: run for run in runs if bound in (run["windows"] or ())} for runs in (group, reference)]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in by_seed[0] if seed in by_seed[1]]
    differences = np.array([ours["windows"][bound] - theirs["windows"][bound] for ours, theirs in pairs
                            if same_windows(ours, theirs)])
    if not len(differences):
        return ""
    of_windows = differences.mean(0)
    over_windows = of_windows.std(ddof=1) / len(of_windows) ** 0.5 if len(of_windows) > 1 else math.nan
    return f"{mean_and_error(differences.mean(1))} (± {over_windows:.2f} over windows)"


def same_windows(one, other):
    """Whether two runs were evaluated on the same windows in the same unit: data, its normalisation, and sizes."""
    return all(one[what] == other[what] for what in ("data", "window", "tested"))


def mean_and_error(values, digits=2):
    values = np.asarray(values)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


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
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER",
                        help="of runs (default: runs; runs/demo with --demo)")
    parser.add_argument("--out", type=Path, default=Path("recon.png"), help="picture to write (%(default)s)")
    parser.add_argument("--demo", action="store_true", help="train the three scripts on synthetic data first")
    options = parser.parse_args()
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise common.UserError(f"--out={options.out} is no picture; give a name that ends in .png, .pdf or .svg")
    folders = options.folders or [Path("runs/demo" if options.demo else "runs")]
    if options.demo:
        train_demo_runs(folders[0])
    rows = [read_runs(folder) for folder in folders]
    drawn = [trained for runs in rows if (trained := [run for run in runs if run["curve"] is not None])]
    if drawn:
        draw(drawn, options.out)
    for folder, runs in zip(folders, rows):
        is_comparable = all(runs[0][what] == rows[0][0][what] for what in ("bound", "data", "window"))
        print(f"{folder}: {', '.join(run['folder'] for run in runs)}\n")
        print(table(runs, rows[0] if is_comparable else runs), end="\n\n")
    for samples in sorted({wav.parent for folder in folders for kind in SPEECH
                           for wav in folder.glob(f"*/samples/{kind}_[0-9].wav")}, key=common.natural_order):
        print(draw_samples(samples))
    if drawn:
        print(options.out)


if __name__ == "__main__":
    common.run_as_script(main)
