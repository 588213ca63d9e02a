"""Draw recon.png, the held-out comparison, from the logs of all runs in a folder, and a table.

    python plot_recon.py [FOLDER ...]  draws every FOLDER/*/log.jsonl (default: runs),
                                       a panel of curves for each folder
    python plot_recon.py --demo        first trains the three scripts on synthetic data
                                       where runs/demo lacks them

Left: a held-out bound while training, of folders with the likelihood of the first. Right: bits per
sample by the tightest bound on the test split, beside what a model has to beat. The table also says
by how much that bound is above that of the first objective, in runs of the same seed on the same
windows, with the 95 % interval of the mean over seeds. Folders made by --evaluate are rows of the
table. Beside the .wav files of a run goes their picture, samples.png.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
from tyro.conf import Positional

import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402

SCRIPTS = ("vrnn_gauss", "vrnn_gauss_alt_nll", "vrnn_gauss_iwae")
VARIANTS = {"dreg": "DReG", "resample": "resampled", "init_from": "warm"}

# The bounds on log p(x), loosest first: their name in the logs, where {} is the number of
# particles, and words that no reader takes for an objective. A new one is added here and to
# common.BOUNDS.
BOUNDS = {
    "elbo": "variational bound",
    "iwae_{}": "importance-weighted bound, {} particles",
    "smc_{}": "particle-filter bound, {} particles",
}
YARDSTICKS = {
    "flac": "FLAC",
    "adaptive_filter": "adaptive filter",
    "histogram": "histogram",
}
SPEECH = ("real", "sample", "continued", "resynthesised")  # so begin the names of sound files

# Settings in which runs of one label may differ, and how the others are said.
PERSONAL = {"name", "seed", "out_dir", "data", "device", "monitor_every", "eval_recordings"}
WORDS = {
    "max_updates": "{:,} updates",
    "grad_clip": "clipped at {:g}",
    "rnn_dim": "{} units",
    "batch_size": "batch of {}",
    "rows": "{} rows",
}
# Settings that need not be said where these are changed with them.
SAID_BY = {size: "rnn_dim" for size in common.SIZES if size != "rnn_dim"}
SAID_BY["lr_updates"] = "max_updates"

# By how many standard errors the mean of n runs may be off, at 95 %: Student's t of n - 1 = 1, 2,
# and so on.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

COLOURS = (*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors)
FIRST_COLOURS = ("VRNN", "VAE_5", "IWAE_5")  # get these, in every picture
LINES = ("-", "--", ":", "-.")
LOOK = {
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "lines.linewidth": 1,
    "lines.markersize": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
NUMBER = (int, float)  # in JSON


@dataclass
class Run:
    """What is drawn of a run, or of a folder that --evaluate made, which has no curve."""

    folder: Path
    name: str
    config: dict
    data: dict  # file, created_by, mean and std of the training
    curve: np.ndarray | None = None  # rows: updates made, nats per frame on valid by then
    bounds: dict = field(default_factory=dict)  # {bound: nats per frame on test}; {}: not tested
    kl: float | None = None  # that part of the variational bound
    yardsticks: dict = field(default_factory=dict)  # the same as bounds, of FLAC and the like
    window_count: int = 0  # on test
    label: str = ""  # the name, and the settings that tell it from others of this name

    @property
    def is_evaluation(self):
        return self.curve is None

    @property
    def seed(self):
        return self.config["seed"]

    @property
    def ar_order(self):
        return self.config.get("ar_order", 0)

    @property
    def frame_sizes(self):
        """Samples in a frame, frames in a window."""
        return self.config["x_dim"], self.config["seq_frames"]

    @property
    def monitored(self):
        """The bound on valid by which its checkpoint was chosen."""
        return common.monitored_bound(self.config["eval_k"])

    @property
    def objective(self):
        """Its name without the likelihood and the year: what has a colour."""
        return re.split(" adaptive| of 2016", self.name)[0]


def train_demo_runs(folder):
    """Train the three scripts at small sizes, two at a time, each on one core."""
    common.ensure_demo_data(common.DEMO["data"])
    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(functools.partial(train_demo_run, folder), SCRIPTS))
    if any(statuses):
        sys.exit(next(filter(None, statuses)))


def train_demo_run(folder, script):
    """Train a script, or go on with its run; its exit status."""
    run = folder / script
    if (run / "eval.json").exists():
        return 0
    print(f"training {script} for a minute or two; its progress is in {run / 'log.jsonl'}")
    path = Path(__file__).with_name(f"{script}.py")
    command = [sys.executable, path, "--demo", f"--out_dir={run}"]
    if (run / "last.pt").exists():
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode


# ---- bounds --------------------------------------------------------------------------------------


def kind_of(name):
    """iwae_{} of iwae_5: the key to BOUNDS."""
    return re.sub("[0-9]+", "{}", name)


def particles_of(name):
    return int(re.sub("[^0-9]", "", name) or 0)


def tightness(name):
    """Sorts bounds from the loosest to the tightest."""
    return list(BOUNDS).index(kind_of(name)), particles_of(name)


def in_full(name):
    return BOUNDS[kind_of(name)].format(particles_of(name))


def shared_bounds(tested):
    """Names of the test bounds that all runs have, loosest first."""
    return [name for name in tested[0].bounds if all(name in run.bounds for run in tested)]


def bits_of(run, nats):
    return common.bits_per_sample(nats, run.config["x_dim"], run.data["std"])


def paired(group, reference, bound):
    """Differences of a test bound between two groups of runs, one for each seed that both have.

    A bound is a mean over windows. They must be the same windows in the same unit, so of the same
    data, normalisation and sizes.
    """
    ours = by_seed(group, bound)
    theirs = by_seed(reference, bound)
    differences = []
    for seed in sorted(ours.keys() & theirs.keys()):
        one, other = ours[seed], theirs[seed]
        if one is not other and not differing(one, other, "data", "frame_sizes", "window_count"):
            differences.append(one.bounds[bound] - other.bounds[bound])
    return np.array(differences)


def by_seed(runs, bound):
    return {run.seed: run for run in runs if bound in run.bounds}


def differing(one, other, *fields):
    """Those of the fields of Run in which two runs differ."""
    return [name for name in fields if getattr(one, name) != getattr(other, name)]


def half_width(values):
    """Half the 95 % interval of the mean of two values or more."""
    return t_95(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def t_95(degrees):
    """Student's t that is exceeded, either way, in 5 % of all cases."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    return 1.96 + 2.372 / degrees + 2.823 / degrees**2  # its expansion about the normal quantile


def mean_and_interval(values, digits=2):
    if len(values) == 0:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {half_width(values):.{digits}f}"


# ---- reading -------------------------------------------------------------------------------------


class Damaged(Exception):
    """What is wrong with a file, in words."""


@contextlib.contextmanager
def reading(path, remedy):
    """Name the file, and what to do, where what it holds is found to be Damaged."""
    try:
        yield
    except Damaged as error:
        raise common.UserError(
            f"{path.parent} holds no readable {path.name} ({error}); {remedy}"
        ) from error


def text_of(path):
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise Damaged("it is no text") from error


def from_json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(common.first_line(error)) from error


def part(tree, *names, kind=dict):
    """tree[name][name].., which must be there and of this kind."""
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            raise Damaged(f"it has no {name}")
        tree = tree[name]
    if not isinstance(tree, kind):
        raise Damaged(f"its {names[-1]} is {tree!r}")
    return tree


def nats_in(table, name):
    return part(table, name, "nats_per_frame", kind=NUMBER)


def checked_config(config):
    """A configuration that has what is drawn of every run."""
    kinds = {"script": str, "seed": int, "eval_k": list, "x_dim": int, "seq_frames": int}
    for name, kind in kinds.items():
        part(config, name, kind=kind)
    if config["script"] in SCRIPTS:
        part(config, "k", kind=int)
    if config["x_dim"] <= 0 or not config["eval_k"]:
        raise Damaged("its x_dim or eval_k is empty")
    return {"model_class": "VRNN", "components": 8} | config  # older logs have no others


def checked_data(data):
    """The data of a run, with what is drawn of them."""
    for name, kind in {"file": str, "created_by": str, "mean": NUMBER, "std": NUMBER}.items():
        part(data, name, kind=kind)
    if not data["std"] > 0:
        raise Damaged("its std is not positive")
    # Two conversions of the same recordings may add up in another order.
    return data | {name: float(f"{data[name]:.12g}") for name in ("mean", "std")}


def read_run(folder):
    """A run in training, or one that has ended, which has test bounds."""
    log = folder / "log.jsonl"
    with reading(log, "put this folder elsewhere, because its header cannot be repaired"):
        first, *lines = text_of(log).splitlines() or [""]
        header = from_json(first)
        config = checked_config(part(header, "config"))
        data = checked_data(part(header, "data"))
    run = Run(folder, name_of(config), config, data)
    with reading(log, "go on with the run by --resume, which drops torn lines, or remove them"):
        run.curve = read_curve(lines, run.monitored)
    if (folder / "eval.json").exists():
        read_test(run, "go on with the run by --resume, which writes it anew")
    return run


def read_curve(lines, bound):
    points = []
    for line in map(from_json, lines):
        update = part(line, "update", kind=NUMBER)
        points.append((update, nats_in(part(line, "valid"), bound)))
    return np.array(points, float).reshape(-1, 2)


def read_evaluation(folder):
    """What --evaluate made: it is named by its checkpoint and its data as well."""
    remedy = "put this folder elsewhere, or make it anew if --evaluate made it"
    with reading(folder / "eval.json", remedy):
        evaluation = from_json(text_of(folder / "eval.json"))
        data = checked_data(part(evaluation, "data"))
        checkpoint = Path(part(evaluation, "checkpoint", kind=str)).name
    with reading(folder / "config.json", remedy):
        config = checked_config(from_json(text_of(folder / "config.json")))
    name = f"{name_of(config)}, {checkpoint} on {data['file']}"
    run = Run(folder, name, config, data)
    read_test(run, remedy)
    return run


def read_test(run, remedy):
    """Add the bounds on the test split, and the yardsticks."""
    path = run.folder / "eval.json"
    with reading(path, remedy):
        evaluation = from_json(text_of(path))
        run.window_count = part(evaluation, "windows", kind=int)
        bounds = part(evaluation, "bounds")
        if "elbo" not in bounds:
            raise Damaged("it has no elbo")
        known = [name for name in bounds if kind_of(name) in BOUNDS]
        run.bounds = {name: nats_in(bounds, name) for name in sorted(known, key=tightness)}
        run.kl = nats_in(bounds, "kl")
        if "yardsticks" in evaluation:  # older ones have none
            yardsticks = part(evaluation, "yardsticks")
            run.yardsticks = {name: nats_in(yardsticks, name) for name in yardsticks}


def read_runs(folder):
    """The runs and the evaluations in a folder."""
    runs = []
    evaluations = []
    for path in sorted(folder.glob("*"), key=common.natural_order):
        if (path / "log.jsonl").exists():
            runs.append(read_run(path))
        elif (path / "eval.json").exists():
            evaluations.append(read_evaluation(path))
    if not runs + evaluations:
        raise common.UserError(
            f"{folder} holds no runs (*/log.jsonl); train one first, or try --demo"
        )
    require_equal(runs, "monitored", "data", "frame_sizes")
    require_equal([run for run in runs if run.bounds], "window_count")
    return runs + evaluations


def require_equal(runs, *fields):
    """Raise UserError where runs cannot be drawn on one axis."""
    for run in runs[1:]:
        for name in differing(run, runs[0], *fields):
            raise common.UserError(
                f"{run.folder} and {runs[0].folder} differ in their {name.replace('_', ' ')}, so "
                "their nats cannot be compared; put them into different folders"
            )


def read_folders(folders):
    """The runs of each folder in the order of its table, labelled alike in all folders."""
    rows = [read_runs(folder) for folder in folders]
    everything = list(itertools.chain.from_iterable(rows))
    label_apart([run for run in everything if not run.is_evaluation], PERSONAL)
    # Evaluations may be on files of one name, so the path of the data can tell them apart.
    label_apart([run for run in everything if run.is_evaluation], PERSONAL - {"data"})
    return [sorted(runs, key=place_in_table) for runs in rows]


def place_in_table(run):
    """Runs before evaluations, tested ones first, and the three objectives before others."""
    script = run.config["script"]
    place = len(SCRIPTS)
    if script in SCRIPTS and run.config.get("z_dim") != 0:
        place = SCRIPTS.index(script)
    return run.is_evaluation, not run.bounds, place, common.natural_order(run.label.lower())


def references(rows):
    """For each folder the runs that its others are compared with: those of the first label.

    It is the first label of the first folder that has been tested, or of the folder itself where the
    bounds of that one would mean something else, or where samples are predicted by another likelihood.
    """
    chosen = []
    first = next((runs for runs in rows if runs[0].bounds), rows[0])
    for runs in rows:
        if differing(runs[0], first[0], "monitored", "data", "frame_sizes", "ar_order"):
            chosen.append(by_label(runs)[runs[0].label])
        else:
            chosen.append(by_label(first)[first[0].label])
    return chosen


# ---- names and labels ----------------------------------------------------------------------------


def name_of(config):
    """The objective of the three scripts, and otherwise the name that a script gives its runs."""
    script = config["script"]
    name = str(config.get("name", script))  # older logs have none
    if script not in SCRIPTS or name != script:
        # As Markdown and Matplotlib read it.
        return " ".join(name.replace("$", r"\$").replace("|", "/").split())
    k = config["k"]
    objectives = dict(zip(SCRIPTS, ("VRNN", f"VAE_{k}", f"IWAE_{k}")))
    words = [objectives[script]]
    if config.get("z_dim") == 0:
        words = ["LSTM"]
    for setting, variant in VARIANTS.items():
        if config.get(setting):
            words.append(variant)
    if config.get("ar_order"):
        words.append("adaptive")
    return " ".join(words)


def in_words(setting, value):
    """A setting as a reader would say it."""
    if value is True:
        return setting
    if not value:
        return "not clipped" if setting == "grad_clip" else f"no {setting}"
    return WORDS.get(setting, setting + " {}").format(value)


def label_apart(runs, ignored):
    """Give each run its label: its name, and the settings that tell it from others of that name."""
    for run in runs:
        words = [run.name]
        siblings = [other.config for other in runs if other.name == run.name]
        for setting in sorted(run.config.keys() - ignored):
            others = [other for other in siblings if is_changed(setting, run.config, other)]
            said_by = SAID_BY.get(setting)
            if any(not is_changed(said_by, run.config, other) for other in others):
                words.append(in_words(setting, run.config.get(setting)))
        run.label = ", ".join(words)


def is_changed(setting, config, other):
    """Whether two configurations differ in a setting.

    What is off (False, 0, "") is as good as not there, because older logs lack newer settings.
    """
    return str(config.get(setting) or None) != str(other.get(setting) or None)


def by_label(runs):
    """{label: its runs}, in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


# ---- pictures ------------------------------------------------------------------------------------


def draw(rows, out):
    """The curves of each folder's runs, and bits per sample of all of them beside the yardsticks.

    A folder whose likelihood is not that of the first has no curves here: they would be far off. A
    colour means one objective in all panels, and the first colours in all pictures.
    """
    with_curves = [runs for runs in rows if runs[0].ar_order == rows[0][0].ar_order]
    everything = list(itertools.chain.from_iterable(rows))
    objectives = [run.objective for run in everything]
    colours = dict(zip(dict.fromkeys([*FIRST_COLOURS, *objectives]), itertools.cycle(COLOURS)))
    tested = [run for run in everything if run.bounds]
    height = 1.3 + 0.24 * max(8, len(by_label(tested)))
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            1,
            len(with_curves) + 1,
            figsize=(4.3 * (len(with_curves) + 1), height),
            squeeze=False,
            layout="constrained",
        )
        *left, right = axes[0]
        for runs, axis in zip(with_curves, left):
            draw_curves(axis, runs, styles_of(runs, colours))
        if tested:
            draw_bits(right, tested, colours)
        figure.savefig(out, dpi=150)
    plt.close(figure)


def styles_of(runs, colours):
    """{label: (colour, line style)}: the objective, and which of its variants in this folder."""
    styles = {}
    lines = collections.defaultdict(lambda: itertools.cycle(LINES))
    for label, group in by_label(runs).items():
        objective = group[0].objective
        styles[label] = colours[objective], next(lines[objective])
    return styles


def draw_curves(axis, runs, styles):
    for label, group in by_label(runs).items():
        colour, line = styles[label]
        for run in group:
            # The first of each label alone is named.
            named = in_lines(label) if run is group[0] else None
            axis.plot(*run.curve.T, line, color=colour, label=named)
    points = np.concatenate([run.curve[:, 1] for run in runs])
    finite = points[np.isfinite(points)]
    if len(finite) == 0:
        raise common.UserError(
            f"no finite held-out bound yet in {', '.join(run.folder.name for run in runs)}; wait "
            "for the first monitoring interval, or leave the folder out"
        )
    # The first steep updates and single spikes would stretch the axis: an eighth lies below it.
    axis.set_ylim(bottom=np.quantile(finite, 0.125))
    axis.locator_params("x", nbins=6)
    axis.legend()
    axis.set(
        title=title(runs[0]),
        xlabel="updates",
        ylabel=f"held-out nats per frame (higher is better),\n{in_full(runs[0].monitored)}",
    )


def title(run):
    folder = run.folder.parent.name.replace("_", " ")
    if run.data["created_by"].startswith(common.SYNTHETIC):
        return f"{folder}: synthetic, not speech"
    return folder


def draw_bits(axis, tested, colours):
    """A row for each label, a point for each run, a line for each yardstick that is not far off."""
    groups = by_label(tested)
    names = []
    for place, (label, group) in enumerate(groups.items()):
        bits = [bits_of(run, run.bounds[tightest_of(run)]) for run in group]
        axis.plot(bits, [place] * len(bits), "o", color=colours[group[0].objective])
        names.append(in_lines(f"{label}: {np.mean(bits):.2f}"))
    highest = axis.get_xlim()[1]
    for (words, (_, bits)), line in zip(yardsticks_of(tested).items(), itertools.cycle(LINES)):
        if bits < highest:
            axis.axvline(bits, color="0.3", linestyle=line, label=f"{words}: {bits:.2f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axis.set_yticks(range(len(groups)), names)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    for tick, group in zip(axis.get_yticklabels(), groups.values()):
        tick.set_color(colours[group[0].objective])
    axis.set(xlabel="bits per sample on the test split (lower is better)")


def in_lines(label):
    """A long label takes the room of the panel beside it."""
    return textwrap.fill(label, 36)


def tightest_of(run):
    return max(run.bounds, key=tightness)


def first_excerpts(folder):
    """The first sound file of each kind."""
    files = []
    for kind in SPEECH:
        files += sorted(folder.glob(f"{kind}_[0-9].wav"))[:1]
    return files


def draw_samples(files, out):
    """Waveform over spectrogram of each sound file."""
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
        samples, rate = read_sound(file)
        wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.3, color="black")
        wave.set(title=file.name, xlim=(0, len(samples) / rate))
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
    figure.savefig(out, dpi=130)
    plt.close(figure)


def read_sound(file):
    """Samples of the first channel, at least as many as two windows of the spectrogram; rate."""
    try:
        samples, rate = soundfile.read(os.fsencode(file), always_2d=True)
    except soundfile.LibsndfileError as error:
        raise common.UserError(
            f"{file.parent} holds no readable {file.name} ({common.first_line(error)}); remove it, "
            "or have it made anew by --resume of the run, or by --evaluate"
        ) from error
    missing = max(0, 1024 - len(samples))
    return np.pad(samples[:, 0], (0, missing)), rate


# ---- table ---------------------------------------------------------------------------------------


def markdown(rows):
    """Dicts of {heading: cell} as a table with the headings of the first; cells may be missing."""
    headings = list(rows[0])
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in rows:
        cells = [row.get(heading, "") for heading in headings]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(runs, reference):
    """The test bounds as Markdown: mean over the runs of each label, and its 95 % interval.

    The last column compares the tightest bound to that of the reference, in runs of the same seed
    on the same windows.
    """
    tested = [run for run in runs if run.bounds]
    if not tested:
        return "no run has an eval.json yet"
    bounds = shared_bounds(tested)
    tightest = bounds[-1]
    in_bits = f"bits/sample ({tightest})"
    rows = []
    for label, group in by_label(tested).items():
        row = {"objective": label, "runs": str(len(group))}
        for bound in bounds:
            row[bound] = mean_and_interval([run.bounds[bound] for run in group])
        row["kl"] = mean_and_interval([run.kl for run in group])
        row[in_bits] = mean_and_interval([bits_of(run, run.bounds[tightest]) for run in group], 3)
        differences = paired(group, reference, tightest)
        row[f"{tightest} against {reference[0].label}, same seeds"] = mean_and_interval(differences)
        rows.append(row)
    return markdown(rows + yardstick_rows(tested, tightest, in_bits))


def yardstick_rows(runs, in_nats, in_bits):
    """A row for each yardstick, with its numbers under these two headings."""
    rows = []
    for words, (nats, bits) in yardsticks_of(runs).items():
        rows.append({"objective": words, in_nats: f"{nats:.2f}", in_bits: f"{bits:.3f}"})
    return rows


def yardsticks_of(runs):
    """{name: (nats per frame, bits per sample)} of each yardstick on each data file."""
    files = {run.data["file"] for run in runs}
    found = {}
    for run in runs:
        for name, nats in run.yardsticks.items():
            words = YARDSTICKS.get(name, name)
            if len(files) > 1:
                words += f" on {run.data['file']}"
            found[words] = nats, bits_of(run, nats)
    return found


# ---- command line --------------------------------------------------------------------------------


@dataclass
class Flags:
    """Flags of this script."""

    folders: Positional[tuple[Path, ...]] = ()  # of runs (default: runs; runs/demo with --demo)
    out: Path = Path("recon.png")  # picture to write
    demo: bool = False  # train the three scripts on synthetic data first


def main():
    flags = common.parse_flags(Flags())
    if flags.out.suffix not in (".png", ".pdf", ".svg"):
        raise common.UserError(
            f"--out={flags.out} is no picture; give a name that ends in .png, .pdf or .svg"
        )
    folders = flags.folders or [Path("runs/demo" if flags.demo else "runs")]
    if flags.demo:
        train_demo_runs(folders[0])
    rows = read_folders(folders)
    compared_with = references(rows)
    drawn = []
    for runs in rows:
        trained = [run for run in runs if not run.is_evaluation]
        if trained:
            drawn.append(trained)
    if drawn:
        draw(drawn, flags.out)
    for folder, runs, reference in zip(folders, rows, compared_with):
        print(f"{folder}: {', '.join(run.folder.name for run in runs)}\n")
        print(table(runs, reference), end="\n\n")
    for run in itertools.chain.from_iterable(rows):
        files = first_excerpts(run.folder / "samples")
        if files:
            picture = run.folder / "samples/samples.png"
            draw_samples(files, picture)
            print(picture)
    if drawn:
        print(flags.out)


if __name__ == "__main__":
    common.run_as_script(main)
