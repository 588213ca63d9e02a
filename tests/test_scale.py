"""Several processes, and a corpus of 283 hours."""

import os
import signal
import socket
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from tiny import ROOT, SIZES, TIME_LIMIT, Fork, command, log_of

import common

HOURS_283 = 283 * 3600 * common.SAMPLE_RATE


def torchrun(processes, *arguments):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *command(*arguments)[1:],
    ]


def finished_job(processes, *arguments):
    """What torchrun does for processes that start and end together, by forks."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = dict(WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=port)
    forks = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in dict(job, RANK=rank).items()}
        forks.append(Fork(*arguments, cwd=ROOT, brief=True, environment=environment))
    for fork in forks:
        result = fork.ended()
        assert result.returncode == 0, result.stderr


def finished(arguments):
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert result.returncode == 0, result.stderr
    return result


def flags(data, out, *more):
    settings = [*SIZES, "--k=3", "--ar_order=3", f"--data={data}", f"--out_dir={out}"]
    return ["vrnn_gauss_iwae", *settings, *more]


def state(out):
    return torch.load(out / "last.pt", weights_only=True)


def gradient_of_the_first_update(out):
    """Of all parameters, in one piece: Adam's first moment is then a tenth of it."""
    moments = state(out)["optimiser"]["state"].values()
    return torch.cat([10 * each["exp_avg"].flatten() for each in moments])


@pytest.mark.parametrize("ar_order", (0, 3))
def test_two_processes_compute_the_gradient_of_one(data, tmp_path, ar_order):
    """In float64: matrix products of another number of rows round otherwise."""
    script = tmp_path / "double.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        "import vrnn_gauss_iwae\n"
        "vrnn_gauss_iwae.main()\n"
    )
    first_update = ["--max_updates=1", "--grad_clip=0", f"--ar_order={ar_order}"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    for processes, out in ((1, one), (2, two)):
        _, *given = flags(data, out, *first_update)
        finished_job(processes, script.with_suffix(""), *given)
    gradient = gradient_of_the_first_update(one)
    gradient_of_two = gradient_of_the_first_update(two)
    assert gradient.norm() > 1
    assert gradient.dtype == torch.float64
    assert (gradient - gradient_of_two).norm() < 1e-12 * gradient.norm()
    nats, nats_of_two = (log_of(out)[1]["valid"]["elbo"]["nats_per_frame"] for out in (one, two))
    assert nats == pytest.approx(nats_of_two, rel=1e-9)


def test_a_job_goes_on_with_another_number_of_processes(data, tmp_path):
    """From two processes to one, in the middle of an excerpt, against one process throughout."""
    whole = tmp_path / "whole"
    mixed = tmp_path / "mixed"
    finished_job(1, *flags(data, whole, "--max_updates=6", "--monitor_every=3"))
    finished_job(2, *flags(data, mixed, "--max_updates=3", "--monitor_every=3"))
    finished_job(1, *flags(data, mixed, "--max_updates=6", "--monitor_every=3", "--resume"))
    expected = state(whole)
    found = state(mixed)
    for part in ("model", "averaged", "counts", "states"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(tensor, found[part][name], rtol=1e-3, atol=1e-4)
    assert [line.get("update") for line in log_of(mixed)] == [None, 3, 6]


def start_job(data, out):
    """A job of two processes that has saved its state, and the processes."""
    job = subprocess.Popen(
        torchrun(2, *flags(data, out, "--max_updates=100_000", "--monitor_every=20")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "last.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True).stdout
    return job, list(map(int, children.split()))


def test_a_process_that_dies_ends_the_job_with_a_sentence_and_the_job_can_be_resumed(
    data, tmp_path
):
    out = tmp_path / "run"
    job, processes = start_job(data, out)
    # Stopped first, until the other one waits for it: a send that is the first to find it gone is
    # forgotten by gloo, which then waits half an hour. torchrun ends that after half a minute.
    os.kill(processes[-1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(processes[-1], signal.SIGKILL)
    _, errors = job.communicate(timeout=TIME_LIMIT)
    assert job.returncode != 0
    lost = [line for line in errors.splitlines() if "lost the others" in line]
    assert len(lost) == 1
    assert lost[0].startswith("error: process 0 of 2 lost the others")
    last = state(out)["update"]
    more = (f"--max_updates={last + 20}", "--monitor_every=20", "--resume")
    finished_job(1, *flags(data, out, *more))
    assert [line["update"] for line in log_of(out)[1:]] == list(range(20, last + 21, 20))


def test_a_job_that_is_asked_to_stop_saves_its_state(data, tmp_path):
    out = tmp_path / "run"
    job, processes = start_job(data, out)
    for process in processes:
        os.kill(process, signal.SIGTERM)
    output, _ = job.communicate(timeout=TIME_LIMIT)
    stopped = int(output.split("stopped after update ")[1].split(";")[0])
    assert state(out)["update"] == stopped


def write_corpus(path, samples):
    """An HDF5 file whose chunks are all allocated and never written: it takes no room on disk."""
    with h5py.File(path, "w") as file:
        file.attrs.update(**common.FORMAT, mean=0.0, std=1000.0, created_by="test")
        for split, length in dict(train=samples, valid=160_000, test=160_000).items():
            group = file.create_group(split)
            create_unwritten_audio(group, length)
            group["audio"][:160_000] = np.random.default_rng(0).normal(0, 1_000, 160_000)
            group["offsets"] = np.arange(0, length + 1, 160_000)


def create_unwritten_audio(group, length):
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((common.BLOCK,))
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = h5py.h5s.create_simple((length,))
    h5py.h5d.create(group.id, b"audio", h5py.h5t.NATIVE_INT16, shape, settings)


# A small process in between, because a child's peak begins with that of its parent.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(data, folder):
    """KiB, of 40 updates with excerpts of the published size: the least of three; threads may meet."""
    published_excerpts = ["--x_dim=200", "--seq_frames=40", "--reset_freq=4", "--batch_size=32"]
    # The adaptive likelihood takes minutes to speak, and its peaks vary by more than the test allows.
    lengths = ["--max_updates=40", "--monitor_every=20", "--ar_order=0"]
    peaks = []
    for attempt in range(3):
        out = folder / f"{data.stem}-{attempt}"
        job = command(*flags(data, out, *published_excerpts, *lengths))
        peaks.append(int(finished([sys.executable, "-c", PEAK, *job]).stdout))
    return min(peaks)


def test_memory_does_not_depend_on_the_size_of_the_corpus(tmp_path, monkeypatch):
    # Threads that each keep a heap of their own add up to 10 MB, more or less by chance.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    write_corpus(tmp_path / "minutes.h5", 160_000 * 100)
    write_corpus(tmp_path / "hours.h5", HOURS_283 // 160_000 * 160_000)
    assert (tmp_path / "hours.h5").stat().st_size > 2 * 16e9
    of_minutes = peak_memory(tmp_path / "minutes.h5", tmp_path)
    of_hours = peak_memory(tmp_path / "hours.h5", tmp_path)
    print(f"peak memory: {of_minutes >> 10} MB with 17 minutes, {of_hours >> 10} MB with 283 hours")
    assert of_hours < 1.05 * of_minutes


READ_ALL_OVER = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np, common
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
train = common.open_corpus(sys.argv[1]).train
starts = np.random.default_rng(0).integers(0, len(train.audio) - 32_000, (100, 32))
found = []
for some in starts:
    train.read(some, 32_000)
    found.append(resident())
print(found[-1] - found[4])  # after both of the buffers have been there
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_all_over_a_large_corpus_keeps_no_more_of_its_index_in_memory(tmp_path):
    write_corpus(tmp_path / "hours.h5", HOURS_283 // 160_000 * 160_000)
    grown = int(finished([sys.executable, "-c", READ_ALL_OVER, tmp_path / "hours.h5", ROOT]).stdout)
    assert grown < 2 << 20
