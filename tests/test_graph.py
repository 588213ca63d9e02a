"""What a CUDA graph asks of an update, without a GPU: by tensors without data, and by a stand-in."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT, SIZES, assert_same_run, main_of, unlocked
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

VARIANTS = (
    ["vrnn_gauss"],
    ["vrnn_gauss", "--bf16", "--ar_order=3", "--lr_updates=9"],
    ["vrnn_gauss", "--z_dim=0", "--ar_order=3"],
    ["vrnn_gauss_alt_nll", "--k=3"],
    ["vrnn_gauss_iwae", "--k=3", "--grad_clip=0"],
    ["vrnn_gauss_iwae", "--k=3", "--dreg", "--ar_order=3"],
    ["vrnn_gauss_iwae", "--k=3", "--resample", "--ar_order=3", "--weight_norm=0"],
    ["stochastic_gru"],
)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The example of a user's own model can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/examples"))
    yield
    sys.modules.pop("stochastic_gru", None)


def tensors_in(*trees):
    return [part for part in tree_leaves(trees) if torch.is_tensor(part)]


# ---- no word between the host and the device -----------------------------------------------------


class DeviceOnly(TorchDispatchMode):
    """Refuses every operation with a tensor that is not on the device; to read one fails by itself."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        devices = {part.device.type for part in tensors_in(args, kwargs, out)}
        assert devices <= {"meta"}, f"{op} on {sorted(devices)}"
        return out


class HostGenerator(torch.Generator):
    """A generator for a device that has none."""

    def __new__(cls, device):
        return super().__new__(cls)


def optimiser_without_step(parameters, lr, **_):
    """Adam reads its rate once, and its kernel knows no tensors without data."""
    made = torch.optim.Optimizer(parameters, dict(lr=lr))
    made.step = lambda: None
    return made


@pytest.fixture
def update_of(data, tmp_path, monkeypatch):
    """The function that gives a script's update, of tensors without data."""
    updates = []
    monkeypatch.setattr(common, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(torch.optim, "Adam", optimiser_without_step)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(
        common.Training, "captured", lambda training, update: updates.append(update)
    )
    monkeypatch.setattr(common.Training, "updates", lambda training: ())
    monkeypatch.setattr(common.Training, "finish", lambda training: None)

    def made(script, *flags):
        main_of(script, *SIZES, f"--data={data}", f"--out_dir={tmp_path}/run", *flags)
        return updates.pop()

    return made


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_an_update_neither_reads_from_the_device_nor_brings_anything_there(update_of, variant):
    update = update_of(*variant)
    with DeviceOnly():
        update()


# ---- how many kernels ----------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts operations that compute: on a GPU each is a kernel, but for those over lists."""

    WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        self.count += not (op.is_view or name in self.WITHOUT_KERNEL)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "variant, most",
    (
        (["vrnn_gauss"], 2180),
        (["vrnn_gauss", "--bf16"], 2440),
        (["vrnn_gauss", "--ar_order=32"], 2860),
        (["vrnn_gauss_iwae"], 2190),
    ),
    ids=str,
)
def test_an_update_has_no_more_kernels_than_it_needs(update_of, variant, most):
    """At 40 frames, without Adam's. One more in a frame is 40 more."""
    update = update_of(*variant, "--seq_frames=40")
    with Launches() as launches:
        update()
    print(*variant, launches.count, "operations")
    assert most - 30 < launches.count <= most


# ---- a run of replays ----------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """As a CUDA graph: an update's operations again, on the same memory, with the same numbers.

    A number of Python's stays what it was when it was recorded.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = op(*args, **kwargs)
        assert op.overloadpacket is not torch.ops.aten.set_, (
            "no kernel: a graph would not repeat it"
        )
        if "rand" in str(op):
            assert kwargs.get("generator") is not None and self.generators, f"{op} would repeat"
        self.calls.append((op, args, kwargs, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for op, args, kwargs, out in self.calls:
                again = op(*args, **kwargs)
                for part, new in zip(tree_leaves(out), tree_leaves(again)):
                    if torch.is_tensor(part) and part.data_ptr() != new.data_ptr():
                        part.copy_(new)


class Device(str):
    """The CPU in the place of a GPU."""

    type = "cuda"


@pytest.fixture
def pretended_gpu(monkeypatch, short_samples):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = dict(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda _: contextlib.nullcontext(),
        CUDAGraph=Recorder,
        graph=lambda recorder: recorder,
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(common, "choose_device", lambda name: Device("cpu"))
    monkeypatch.setattr(common, "describe", lambda device: "cuda")
    monkeypatch.setattr(common, "lock", unlocked)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_a_run_of_replays_is_a_run_of_updates(data, tmp_path, monkeypatch, pretended_gpu, variant):
    """Bit for bit, also resumed: what it takes to capture leaves no trace, and a replay finds all
    that has changed since."""
    script, *flags = variant
    run = (script, *SIZES, f"--data={data}", "--monitor_every=3", "--eval_recordings=1", *flags)
    captured = common.Training.captured
    made = []

    def captured_and_kept(training, update):
        made.append(captured(training, update))
        return made[-1]

    monkeypatch.setattr(common.Training, "captured", lambda training, update: update)
    main_of(*run, f"--out_dir={tmp_path}/singly", "--max_updates=6")
    monkeypatch.setattr(common.Training, "captured", captured_and_kept)
    main_of(*run, f"--out_dir={tmp_path}/graph", "--max_updates=3")
    main_of(*run, f"--out_dir={tmp_path}/graph", "--max_updates=6", "--resume")
    assert [update.__name__ for update in made] == ["replay", "replay"]
    assert_same_run(tmp_path / "singly", tmp_path / "graph")
