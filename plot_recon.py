"""Draw recon.png, the held-out comparison, from the logs of all runs in a folder, and print it as a table.

    python plot_recon.py [FOLDER ...]  draws every FOLDER/*/log.jsonl (default: runs), a row of panels for each folder
    python plot_recon.py --demo        first trains the three scripts on synthetic data where runs/demo lacks them

Left: a held-out bound while training. Middle: how much each objective's tightest test bound is above that of the first,
in runs of the same seed on the same windows, with the 95 % interval of the mean over seeds. Right: bits per sample.
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
from matplotlib.ticker import FixedLocator  # noqa: E402

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
SPEECH = dict(
    real="real", sample="generated", continued="real, continued", resynthesised="resynthesised"
)
YARDSTICKS = dict(
    flac="FLAC", linear_prediction_16="linear prediction, order 16", histogram="histogram"
)
PERSONAL = {
    "name",
    "seed",
    "out_dir",
    "data",
    "device",
    "monitor_every",
    "eval_recordings",
}  # these set no run apart
SHOWN_BY = {"lr_updates": "max_updates"} | {
    name: "rnn_dim" for name in common.SIZES if name != "rnn_dim"
}
# what the mean of n runs may be off by, in standard errors, at 95 %: Student's t of n - 1 = 1, 2, ... (or more)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
WORDS = dict(
    max_updates="{:,} updates",
    grad_clip="clipped at {:g}",
    rnn_dim="{} units",
    batch_size="{} sequences",
)
LINES = ("-", "--", ":", "-.")


def train_demo_runs(folder):
    for script in SCRIPTS:
        run = folder / script
        if not (run / "eval.json").exists():
            resume = ["--resume"] if (run / "last.pt").exists() else []
            command = [
                sys.executable,
                Path(__file__).with_name(f"{script}.py"),
                "--demo",
                f"--out_dir={run}",
                *resume,
            ]
            if status := subprocess.run(command).returncode:
                sys.exit(status)


# ---- reading ----


def name_of(config):
    """The name of a run: its objective for the three scripts, and otherwise what its script stated to Training."""
    script, name = (
        config["script"],
        str(config.get("name", config["script"])),
    )  # older logs have no name
    if script not in SCRIPTS or name != script:
        return " ".join(
            name.replace("$", r"\$").replace("|", "/").split()
        )  # as Markdown and Matplotlib read it
    k = config["k"]
    name = (
        dict(zip(SCRIPTS, ("VRNN", f"VAE_{k}", f"IWAE_{k}")))[script]
        if config.get("z_dim") != 0
        else "LSTM"
    )
    for variant, suffix in (
        ("as_published", " as published"),
        ("corrections", f" but for {config.get('corrections')}"),
        ("dreg", " DReG"),
        ("resample", " resampled"),
        ("init_from", " warm"),
    ):
        name += suffix if config.get(variant) else ""
    return name + (f" AR-{config['ar_order']}" if config.get("ar_order") else "")


def in_words(setting, config):
    """A setting as a reader would say it. The limit on the gradient is that on the gradient of the mean over sequences,
    of which 2016 took the sum (IWAE) or a k-th (VAE)."""
    value = config.get(setting)
    if (
        setting == "grad_clip"
        and config.get("as_published")
        and "batch" not in config.get("corrections", "")
    ):
        value *= dict(vrnn_gauss_alt_nll=config["k"], vrnn_gauss_iwae=1 / config["batch_size"]).get(
            config["script"], 1
        )
    if value is None or isinstance(value, bool):
        return setting if value else f"no {setting}"
    return (
        "not clipped"
        if setting == "grad_clip" and not value
        else WORDS.get(setting, setting + " {}").format(value)
    )


def label_apart(runs):
    """Give each run its label: its name, and the settings in which runs of that name differ."""
    for run in runs:
        siblings = [other["config"] for other in runs if other["name"] == run["name"]]
        settings = sorted({name for config in siblings for name in config} - PERSONAL)
        settings += ["data"] * (
            run["curve"] is None
        )  # of evaluations, which may be on files of one name
        differing = [
            name for name in settings if len({str(config.get(name)) for config in siblings}) > 1
        ]
        run["settings"] = {name: in_words(name, run["config"]) for name in differing}
        run["label"] = ", ".join(
            [
                run["name"],
                *(
                    words
                    for name, words in run["settings"].items()
                    if SHOWN_BY.get(name) not in differing
                ),
            ]
        )
    ambiguous = [
        run
        for run in runs
        if any(
            run["label"] == other["label"] and run["settings"] != other["settings"]
            for other in runs
        )
    ]
    for run in ambiguous:
        run["label"] = ", ".join([run["name"], *run["settings"].values()])


@contextlib.contextmanager
def reading(path, remedy):
    """Turn what a damaged file raises into one sentence that names it and the remedy."""
    try:
        yield
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        why = f"no {error}" if isinstance(error, KeyError) else common.first_line(error)
        raise common.UserError(
            f"{path.parent} holds no readable {path.name} ({why}); {remedy}"
        ) from None


def read_run(folder):
    """A run's header, its curve and its test bounds (None where there are none yet)."""
    with reading(
        folder / "log.jsonl", "put this folder elsewhere, because its header cannot be repaired"
    ):
        header, *lines = (folder / "log.jsonl").read_text().splitlines() or [""]
        run = described(folder, **{name: json.loads(header)[name] for name in ("config", "data")})
    with reading(
        folder / "log.jsonl",
        "go on with the run by --resume, which drops torn lines, or remove them",
    ):
        curve = [
            (line["sequences"], line["valid"][run["bound"]]["nats_per_frame"])
            for line in map(json.loads, lines)
        ]
        run["curve"] = np.array(curve, float).reshape(-1, 2)
    return run | read_tests(folder, "go on with the run by --resume, which writes it anew")


def read_evaluation(folder):
    """The same of a folder made by --evaluate; it has no curve, and its name tells checkpoint and data."""
    remedy = "put this folder elsewhere, or make it anew if --evaluate made it"
    with reading(folder / "eval.json", remedy):
        evaluation = json.loads((folder / "eval.json").read_text())
        data, checkpoint = evaluation["data"], Path(evaluation["checkpoint"]).name
        (
            title(data),
            common.bits_per_sample(0.0, 1, data["std"]),
        )  # fail here, where the file has a name
    with reading(folder / "config.json", remedy):
        run = described(folder, json.loads((folder / "config.json").read_text()), data)
    run["name"] = f"{run['name']}, {checkpoint} on {data['file']}"
    return run | read_tests(folder, remedy)


def described(folder, config, data):
    """What a configuration, and the data of an evaluation or a training, say of a run."""
    config = {"ar_order": 0, "model_class": "VRNN", **config}  # older ones have none
    common.bits_per_sample(
        0.0, config["x_dim"], data["std"]
    )  # fail here, where the file has a name
    is_ours, name = config["script"] in SCRIPTS and config.get("z_dim") != 0, name_of(config)
    return dict(
        folder=folder.name,
        config=config,
        name=name,
        objective=name.split(" AR-")[0],
        seed=int(config["seed"]),
        order=SCRIPTS.index(config["script"]) if is_ours else len(SCRIPTS),
        ar_order=config["ar_order"],
        window=(config["x_dim"], config["seq_frames"]),
        title=title(data),
        data=data,
        curve=None,
        bound=f"iwae_{config['eval_k'][0]}",
    )


def read_tests(folder, remedy):
    with reading(folder / "eval.json", remedy):
        test = read_test(folder / "eval.json")
    with reading(folder / "windows.csv", remedy):
        return dict(
            test=test,
            tested=test and test["windows"],
            windows=read_windows(folder / "windows.csv", test),
        )


def read_test(path):
    """{"windows": n, "yardsticks": {..}, bound: nats per frame} on the test split; None before it was evaluated."""
    if not path.exists():
        return None
    evaluation = json.loads(path.read_text())
    bounds = {
        name: float(bound["nats_per_frame"])
        for name, bound in evaluation["bounds"].items()
        if name.startswith(("kl", *common.BOUNDS))
    }
    bounds["elbo"], bounds["kl"]  # every evaluation has them
    yardsticks = {
        name: float(found["nats_per_frame"])
        for name, found in evaluation.get("yardsticks", {}).items()
    }
    return {"windows": int(evaluation["windows"]), **bounds, "yardsticks": yardsticks}


def read_windows(path, test):
    """{bound: nats per frame of each test window}; None where a run has not stored them."""
    if not path.exists():
        return None
    names, *rows = path.read_text().splitlines()
    if test and len(rows) != test["windows"]:
        raise ValueError(f"{path.name} has {len(rows)} windows, eval.json {test['windows']}")
    return dict(
        zip(names.split(","), np.array([row.split(",") for row in rows], float).T, strict=True)
    )


def read_runs(folder):
    """The runs and the evaluations in a folder."""
    logs, tests = (
        sorted(folder.glob(f"*/{name}"), key=common.natural_order)
        for name in ("log.jsonl", "eval.json")
    )
    runs = [read_run(log.parent) for log in logs]
    evaluations = [
        read_evaluation(test.parent) for test in tests if not test.with_name("log.jsonl").exists()
    ]
    if not runs + evaluations:
        raise common.UserError(
            f"{folder} holds no runs (*/log.jsonl); train one first, or try --demo"
        )
    require_equal(folder, runs)
    return runs + evaluations


def read_folders(folders):
    """The runs of each folder in the order of its table, with labels that tell those of all folders apart."""
    rows = [read_runs(folder) for folder in folders]
    for is_evaluation in (False, True):
        label_apart(
            [run for runs in rows for run in runs if (run["curve"] is None) == is_evaluation]
        )
    return [
        sorted(
            runs,
            key=lambda r: (
                r["curve"] is None,
                not r["test"],
                r["order"],
                common.natural_order(r["label"].lower()),
            ),
        )
        for runs in rows
    ]


def references(rows):
    """For each folder the runs that its others are compared with: those of the first label of the first folder, or of
    its own where bits of the first would mean something else, or samples are predicted by another likelihood."""
    chosen = [
        rows[0]
        if all(
            runs[0][what] == rows[0][0][what] for what in ("bound", "data", "window", "ar_order")
        )
        else runs
        for runs in rows
    ]
    return [[run for run in runs if run["label"] == runs[0]["label"]] for runs in chosen]


def require_equal(folder, runs):
    """Raise UserError where runs cannot be drawn on one axis."""
    tested = [run for run in runs if run["test"]]
    for some, what in (runs, "bound"), (runs, "data"), (runs, "window"), (tested, "tested"):
        for run in some[1:]:
            if run[what] != some[0][what]:
                raise common.UserError(
                    f"{folder / run['folder']} and {folder / some[0]['folder']} differ in their "
                    f"{what}{' windows' * (what == 'tested')}, so their nats cannot be compared; "
                    "put them into different folders"
                )


def title(data):
    minutes = data["samples"]["train"] / common.SAMPLE_RATE / 60
    what = (
        "synthetic demo data, not speech"
        if data["created_by"].startswith(common.SYNTHETIC)
        else data["file"]
    )
    return f"{what} ({minutes:.3g} minutes of training recordings)"


def shared_bounds(tested):
    """Bounds on the test split that all runs have, from the loosest to the tightest."""
    names = set.intersection(*({"elbo", *run["test"]} for run in tested))
    return sorted(
        (name for name in names if name == "elbo" or name.startswith(("iwae", "smc"))),
        key=lambda name: (name.split("_")[0], int(name.partition("_")[2] or 0)),
    )


# ---- pictures ----


def draw(rows, compared_with, out):
    """A row of three panels for the runs of each folder; a colour means one objective in all of them."""
    heights = [1.3 + 0.24 * max(8, len({run["label"] for run in runs})) for runs in rows]
    figure, axes = plt.subplots(
        len(rows),
        3,
        figsize=(12.5, sum(heights)),
        width_ratios=(1, 0.9, 0.7),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    names = list(dict.fromkeys(run["objective"] for runs in rows for run in runs))
    colours = dict(
        zip(names, [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors] * len(names))
    )
    for runs, reference, (left, middle, right) in zip(rows, compared_with, axes):
        styles = styles_of(runs, colours)
        draw_curves(left, runs, styles)
        for axis in (left, middle, right):
            axis.grid(alpha=0.25)
        if tested := [run for run in runs if run["test"]]:
            draw_differences(middle, tested, reference, styles)
            draw_bits(right, tested, styles)
        middle.set_yticks(range(len(styles)), styles, fontsize=8)
        right.set_yticks(range(len(styles)), [])
        middle.set_ylim(len(styles) - 0.4, -0.6)
        right.set_ylim(middle.get_ylim())
        for tick, (colour, _) in zip(middle.get_yticklabels(), styles.values()):
            tick.set_color(colour)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def styles_of(runs, colours):
    """{label: (colour, line style)}: the objective, and which of its variants in this folder."""
    styles, variants = {}, dict.fromkeys(colours, 0)
    for run in runs:
        if run["label"] not in styles:
            styles[run["label"]] = (
                colours[run["objective"]],
                LINES[variants[run["objective"]] % len(LINES)],
            )
            variants[run["objective"]] += 1
    return styles


def draw_curves(axis, runs, styles):
    for run in runs:
        colour, line = styles[run["label"]]
        axis.plot(*run["curve"].T, line, color=colour, linewidth=1)
    points = np.concatenate([run["curve"][:, 1] for run in runs])
    if not len(finite := points[np.isfinite(points)]):
        raise common.UserError(
            f"no finite held-out bound yet in {', '.join(run['folder'] for run in runs)}; wait for "
            "the first monitoring interval, or leave the folder out"
        )
    lowest = np.quantile(
        finite, 0.05
    )  # the first steep updates and single spikes would stretch the axis
    axis.set_ylim(bottom=lowest)
    axis.set_xlabel(
        f"training sequences ({math.prod(runs[0]['window']) / common.SAMPLE_RATE:g} s each)",
        fontsize=9,
    )
    axis.set_ylabel(f"{in_full(runs[0]['bound'])}\n(nats/frame)", fontsize=9)
    axis.set_title(f"valid split while training\n{runs[0]['title']}", fontsize=9)
    axis.text(
        0.98,
        0.03,
        f"{(~(points >= lowest)).sum()} of {len(points)} points lie below",
        color="0.4",
        transform=axis.transAxes,
        fontsize=8,
        ha="right",
    )


def draw_differences(axis, tested, reference, styles):
    *_, tightest = shared_bounds(tested)
    for y, (label, (colour, _)) in enumerate(styles.items()):
        differences = paired([run for run in tested if run["label"] == label], reference, tightest)
        if len(differences):
            axis.plot(
                differences, [y] * len(differences), "o", markersize=3, color=colour, alpha=0.4
            )
            interval = half_width(differences) if len(differences) > 1 else None
            axis.errorbar(
                differences.mean(),
                y,
                xerr=interval,
                fmt="D",
                markersize=5,
                color=colour,
                capsize=3,
                markerfacecolor=colour if interval else "white",
            )
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_xscale("symlog", linthresh=20, linscale=1)  # linear between -20 and 20
    axis.xaxis.set(
        major_locator=FixedLocator((-200, -50, -20, -10, 0, 10, 20, 50, 200)),
        major_formatter="{x:g}",
    )
    axis.set_xlabel(f"{in_full(tightest)},\nabove {reference[0]['label']} (nats/frame)", fontsize=8)
    axis.set_title(
        "test split, runs of the same seed\n95 % intervals; hollow: one seed", fontsize=9
    )


def draw_bits(axis, tested, styles):
    loosest, tightest = (shared_bounds(tested)[end] for end in (0, -1))
    for run in tested:
        for bound, marker in ((loosest, "|"), (tightest, "o")):
            axis.plot(
                bits_of(run, run["test"][bound]),
                list(styles).index(run["label"]),
                marker,
                markersize=5,
                color=styles[run["label"]][0],
            )
    if flac := {
        bits_of(run, run["test"]["yardsticks"]["flac"])
        for run in tested
        if run["test"]["yardsticks"]
    }:
        axis.axvline(flac.pop(), color="0.3", linestyle="--", linewidth=1)
    axis.set_xlabel(
        f"bits per sample by that bound (bar: by the\n{in_full(loosest)}; dashed: FLAC)", fontsize=8
    )
    axis.set_title(
        f"test split, {tested[0]['test']['windows']} windows\nlower is better", fontsize=9
    )


def bits_of(run, nats):
    return common.bits_per_sample(nats, run["window"][0], run["data"]["std"])


def draw_samples(folder):
    """Waveform over spectrogram of one excerpt of each kind, as samples.png beside them; its path."""
    files = [file for kind in SPEECH for file in sorted(folder.glob(f"{kind}_*.wav"))[:1]]
    figure, axes = plt.subplots(
        2,
        len(files),
        figsize=(4.4 * len(files), 4.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for file, (wave, spectrum) in zip(files, axes.T):
        with reading(
            file, "remove it, or have it made anew by --resume of the run, or by --evaluate"
        ):
            samples, rate = soundfile.read(file, always_2d=True)
            samples = np.pad(samples[:, 0], (0, max(0, 1024 - len(samples))))
        wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.3, color="black")
        wave.set(title=SPEECH[file.name.split("_")[0]], xlim=(0, len(samples) / rate))
        *_, image = spectrum.specgram(
            samples,
            NFFT=512,
            Fs=rate,
            noverlap=384,
            scale="linear",
            cmap="magma",
            norm=LogNorm(1e-13, 1e-3, clip=True),
        )
        spectrum.set(xlabel="seconds")
    axes[0, 0].set_ylabel("amplitude")
    axes[1, 0].set_ylabel("Hz")
    figure.colorbar(image, ax=axes[1], label="power per Hz", pad=0.01)
    figure.savefig(folder / "samples.png", dpi=130)
    plt.close(figure)
    return folder / "samples.png"


# ---- table ----


def table(runs, reference):
    """The test bounds as Markdown: mean over the runs of each label, and the 95 % interval of that mean.

    The last column compares the tightest bound to that of the reference, in runs of the same seed on the same windows.
    """
    tested = [run for run in runs if run["test"]]
    if not tested:
        return "no run has an eval.json yet"
    *_, tightest = bounds = shared_bounds(tested)
    bounds.append("kl")
    lines = [
        " | ".join(
            [
                "| objective",
                "runs",
                *bounds,
                f"bits/sample ({tightest})",
                f"{tightest} against {reference[0]['label']}, same seeds |",
            ]
        ),
        "|---" * (len(bounds) + 4) + "|",
    ]
    for name in dict.fromkeys(run["label"] for run in tested):
        group = [run for run in tested if run["label"] == name]
        cells = [mean_and_interval([run["test"][bound] for run in group]) for bound in bounds]
        bits = [bits_of(run, run["test"][tightest]) for run in group]
        lines.append(
            " | ".join(
                [
                    f"| {name}",
                    str(len(group)),
                    *cells,
                    mean_and_interval(bits, 3),
                    f"{mean_and_interval(paired(group, reference, tightest))} |",
                ]
            )
        )
    return "\n".join(lines + yardstick_rows(tested, bounds))


def yardstick_rows(tested, bounds):
    """A row for each yardstick of each data file, with its number where the tightest bound stands."""
    rows = {}
    for run in tested:
        of_file = f" on {run['data']['file']}" * (
            len({other["data"]["file"] for other in tested}) > 1
        )
        for name, nats in run["test"]["yardsticks"].items():
            cells = [
                f"| {YARDSTICKS.get(name, name)}{of_file}",
                "",
                *[""] * (len(bounds) - 2),
                f"{nats:.2f}",
                "",
                f"{bits_of(run, nats):.3f}",
                " |",
            ]
            rows[cells[0]] = " | ".join(cells)
    return list(rows.values())


def paired(group, reference, bound):
    """Differences of a bound between two groups of runs, one for each seed that both have: means over windows that are
    the same, in the same unit: of equal data, normalisation and sizes."""
    by_seed = [
        {run["seed"]: run for run in runs if bound in (run["windows"] or ())}
        for runs in (group, reference)
    ]
    pairs = [
        (by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0].keys() & by_seed[1])
    ]
    return np.array(
        [
            (one["windows"][bound] - other["windows"][bound]).mean()
            for one, other in pairs
            if one is not other
            and all(one[what] == other[what] for what in ("data", "window", "tested"))
        ]
    )


def half_width(values):
    """Half the 95 % interval of the mean of two values or more."""
    return T_95[min(len(values) - 1, len(T_95)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5


def mean_and_interval(values, digits=2):
    if not len(values):
        return ""
    return f"{np.mean(values):.{digits}f}" + (
        f" ± {half_width(values):.{digits}f}" if len(values) > 1 else ""
    )


def in_full(name):
    """A bound, by its name in the logs, in words that no reader takes for an objective."""
    kind, _, k = name.partition("_")
    return {
        "elbo": "variational bound",
        "iwae": f"importance-weighted bound, {k} particles",
        "smc": f"particle-filter bound, {k} particles",
    }[kind]


def main():
    parser = common.OneLineParser(
        prog="plot_recon.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="of runs (default: runs; runs/demo with --demo)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("recon.png"), help="picture to write (%(default)s)"
    )
    parser.add_argument(
        "--demo", action="store_true", help="train the three scripts on synthetic data first"
    )
    options = parser.parse_args()
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise common.UserError(
            f"--out={options.out} is no picture; give a name that ends in .png, .pdf or .svg"
        )
    folders = options.folders or [Path("runs/demo" if options.demo else "runs")]
    if options.demo:
        train_demo_runs(folders[0])
    rows = read_folders(folders)
    compared_with = references(rows)
    drawn = [
        ([run for run in runs if run["curve"] is not None], reference)
        for runs, reference in zip(rows, compared_with)
    ]
    if drawn := [pair for pair in drawn if pair[0]]:
        draw(*zip(*drawn), options.out)
    for folder, runs, reference in zip(folders, rows, compared_with):
        print(f"{folder}: {', '.join(run['folder'] for run in runs)}\n")
        print(table(runs, reference), end="\n\n")
    for samples in sorted(
        {
            wav.parent
            for folder in folders
            for kind in SPEECH
            for wav in folder.glob(f"*/samples/{kind}_[0-9].wav")
        },
        key=common.natural_order,
    ):
        print(draw_samples(samples))
    if drawn:
        print(options.out)


if __name__ == "__main__":
    common.run_as_script(main)
