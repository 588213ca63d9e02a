"""Tiny recordings, tiny models and runs of the scripts as processes, for tests."""

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# Tiny products gain nothing from threads, and lose much where cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import prepare_blizzard  # noqa: E402

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 600  # seconds, after which a process hangs; it needs ten, but cores may be shared
SIZES = (
    "--x_dim=20 --z_dim=4 --rnn_dim=12 --q_z_dim=8 --p_z_dim=8 --p_x_dim=8 --x2s_dim=8 --z2s_dim=8 "
    "--seq_frames=5 --reset_freq=2 --batch_size=4 --eval_k 2 6 --monitor_windows=8 --device=cpu"
).split()
# What differs between equal runs: in a line of the log, and in a checkpoint.
OF_ONE_RUN = ("seconds", "config")
OF_ONE_STATE = ("seconds", "out_dir", "max_updates")


def smooth_noise(random, samples):
    return np.convolve(random.normal(0, 2_000, samples), np.ones(8) / 8, "valid").astype(np.int16)


def write_recordings(folder):
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    np.savez(folder / "tiny.npz", **{f"rec_{i}": smooth_noise(random, 3_000) for i in range(12)})


def write_tiny_data(path):
    """An HDF5 file of twelve recordings."""
    write_recordings(path.parent / "in")
    prepare_blizzard.convert_files([path.parent / "in"], path, valid=0.2, test=0.2)


def command(script, *arguments):
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def run(script, *arguments, cwd, **options):
    """Run a script as a process, a Fork. Tests of how processes start and end use command()."""
    return Fork(script, *arguments, cwd=cwd, **options).ended()


class Fork:
    """A script as a process, a fork of one that has imported what takes it seconds to import.

    brief: its evaluations write a tenth of a second of speech in place of ten. group: it has a
    group of processes of its own. environment: what is changed in that of this process.
    """

    def __init__(self, script, *arguments, cwd, brief=False, group=False, environment=()):
        self.given = command(script, *arguments)[1:]
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [os.path.join(self.folder.name, name) for name in ("stdout", "stderr")]
        surroundings = os.environ | dict(environment)
        self.pid = ask("start", self.given, str(cwd), self.outputs, surroundings, brief, group)
        self.returncode = None

    def poll(self):
        """As of subprocess.Popen."""
        if self.returncode is None:
            self.returncode = ask("poll", self.pid)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def ended(self):
        """Wait for it: what subprocess.run returns."""
        if self.returncode is None:
            self.returncode = ask("wait", self.pid)
        texts = [Path(path).read_text(errors="surrogateescape") for path in self.outputs]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.given, self.returncode, *texts)


def ask(*request):
    """The answer of the process that forks."""
    print(json.dumps(request), file=forker().stdin, flush=True)
    return json.loads(forker().stdout.readline())


@functools.cache
def forker():
    """The process that makes the forks. It ends with this one."""
    program = "import sys; sys.path[:0] = sys.argv[1:]; import tiny; tiny.fork_on_request()"
    path = ["", str(Path(__file__).parent), str(ROOT)]  # the first is that of the script
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", program, *path], **pipes)


def fork_on_request():
    """In that process: start a fork and print its id, or print the exit status of one."""
    import torch._dynamo  # noqa: F401 (by Adam)

    import plot_recon  # noqa: F401

    for line in sys.stdin:
        what, *given = json.loads(line)
        if what == "start":
            answer = fork(*given)
        else:
            answer = exit_status(*given, 0 if what == "wait" else os.WNOHANG)
        print(json.dumps(answer), flush=True)


def fork(*given):
    child = os.fork()
    if child == 0:
        status = become(*given)
        # Python's own end takes seconds: it visits every object that the fork shares.
        os._exit(status)
    return child


def exit_status(pid, options):
    """None while it runs."""
    found, status = os.waitpid(pid, options)
    return os.waitstatus_to_exitcode(status) if found else None


def become(given, cwd, outputs, environment, brief, group):
    """Be the process of a script to its end; its exit status."""
    signal.alarm(TIME_LIMIT)
    if group:
        os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if brief:
        common.write_samples = write_short_samples
    sys.argv = given
    sys.path[0] = str(Path(given[0]).parent)
    status = 0
    try:
        runpy.run_path(given[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # as multiprocessing has it: a thread that does not end is no end
    sys.stdout.flush()
    sys.stderr.flush()
    return status


# A tenth of a second of speech in place of ten.
write_short_samples = functools.partial(common.write_samples, frames=8, given=2)


def unlocked(path):
    """In place of common.lock, where a run goes on in the process that holds its folder."""
    return os.open(path, os.O_RDONLY)


def main_of(script, *arguments):
    """Call the main of a script in this process."""
    module = importlib.import_module(script)
    before = sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


def lines_of(path):
    """The objects of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder):
    """The lines of a log without what differs between equal runs."""
    lines = lines_of(folder / "log.jsonl")
    for line in lines:
        for name in OF_ONE_RUN:
            line.pop(name, None)
    return lines


def assert_same_run(one, other):
    """The same log, and the same state at the end, bit for bit."""
    for line, other_line in zip(log_of(one), log_of(other), strict=True):
        assert line == other_line, f"{line} is not {other_line}"
    assert (one / "eval.json").read_text() == (other / "eval.json").read_text(), "eval.json differs"
    for file in ("last.pt", "best.pt"):
        state = state_in(one / file)
        other_state = state_in(other / file)
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            if not name.endswith(OF_ONE_STATE):
                assert is_same(value, other_state[name]), f"{name} of {file} differs"


def is_same(one, other):
    """Whether two leaves of a checkpoint are equal, in type as well."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def tiny_training(module, data, out, *flags, particles=None, **options):
    """(hyperparameters, Training) of a script's module at tiny sizes.

    particles: by default h.k of them.
    """
    given = [f"--data={data}", f"--out_dir={out}", *map(str, flags)]
    h = common.parse(module.Hyperparameters, [*SIZES, *given])
    return h, common.Training(h, particles or h.k, **options)


def update_with(training, objective):
    """An update such as the scripts have, with this objective."""

    def update():
        k = training.particles
        x_TBX = training.window()
        noise = training.noise(k, training.h.z_dim)
        rollout = training.model(x_TBX, training.state, noise, k)
        loss = objective(rollout)
        loss.backward()
        training.step(loss, rollout.state)

    return update


def make_updates(training, update, count):
    """The loop of the scripts, count updates further.

    It ends with an evaluation and a checkpoint.
    """
    training.h.max_updates = training.made + count
    for _ in training.updates():
        update()


def state_in(path):
    """{path: leaf} of a checkpoint, without its log, which must be the one beside it."""
    state = torch.load(path, weights_only=True)
    log = state.pop("log", None)
    if log:
        assert log == lines_of(path.parent / "log.jsonl")
    return flat(state)


def flat(tree, path=""):
    """{path: leaf} of nested dicts."""
    if not isinstance(tree, dict):
        return {path: tree}
    leaves = {}
    for key, part in tree.items():
        leaves |= flat(part, f"{path}/{key}")
    return leaves


def write_quiet_data(path, **recordings):
    """An HDF5 file of smooth noise of a few LSB; recordings: {split: samples of each}."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, lengths in recordings.items():
            audio = [smooth_noise(random, samples + 7) // 180 + 2 for samples in lengths]
            file[f"{split}/audio"] = np.concatenate(audio)
            file[f"{split}/offsets"] = np.cumsum([0, *lengths])
            file[f"{split}/names"] = [f"{split}_{i}" for i in range(len(lengths))]
        train = file["train/audio"][:]
        file.attrs.update(
            format="vrnn-audio",
            version=1,
            sample_rate=16_000,
            mean=train.mean(),
            std=train.std(),
            created_by="test",
        )
