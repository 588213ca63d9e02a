"""The pipeline of 2016 in one file, and for each of its parts a switch that puts ours in its place.

    python tests/experiments/published_2016.py --data data/speech.h5 --objective iwae

Without a switch it does what the scripts of github.com/szcom/nips2015_vrnn did, with the library
github.com/jych/cle. Data are read in order, chapter by chapter, epoch after epoch:

            rows of an update                           limit on the gradient of their mean
    VRNN    the next 128                                640
    VAE_5   the same 128 in five updates in a row       3,200
    IWAE_5  the next 25, five copies of each            25

2016's IWAE_5 asserts that 5 divides the rows of its graph, so it did not run with the 128 of its
configuration file. With 125 it takes windows at the pace of VAE_5, as its curve suggests.

The state goes on from row to row, whatever these are; samples are neither dequantised nor given
noise; no weights are averaged. The log is that of the other scripts, for plot_recon.py: `sequences`
counts windows as they are taken, again at every replay, and `distinct_windows` without replays.
"""

import dataclasses
import itertools
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402


@dataclasses.dataclass
class Hyperparameters:
    """Each is also a flag. None stands for 2016's value, which depends on the objective."""

    objective: Literal["vrnn", "vae", "iwae"] = "vrnn"  # VRNN, VAE_K or IWAE_K
    k: int = 5  # K of VAE_K and IWAE_K

    # data
    data: str = "data/blizzard.h5"  # HDF5 file made by prepare_blizzard.py
    out_dir: str = "runs/published_2016"  # where the run goes: log, checkpoints, evaluation
    resume: bool = False  # go on from last.pt in out_dir
    seed: int = 0  # of initialisation, of all noise, and of the order of excerpts
    device: str = "auto"  # auto takes a GPU if there is one; cpu, cuda, cuda:1, ...
    order: Literal["chapters", "excerpts"] = "chapters"  # excerpts: shuffled, as in common.py
    chapters: Literal["files", "all"] = "files"  # what is cut into streams; all: train as one
    streams: int = 128  # equal parts of a chapter, which are read side by side
    seq_frames: int = 40  # frames in a window, through which gradients flow
    rows: int | None = None  # of the graph: windows, k times for IWAE_K; None: 128 or just less
    replays: int | None = None  # updates in a row on the same windows; None: k of VAE_K, else 1
    carried: Literal["by_row", "by_stream"] = "by_row"  # row i from row i, or its own stream
    reset_freq: int = 4  # updates (by_row) or windows (by_stream) from one zero state to the next

    # model, as in the other scripts
    x_dim: int = 200  # samples in a frame
    z_dim: int = 200  # latent variables in a frame
    rnn_dim: int = 1000  # LSTM units
    q_z_dim: int = 500  # units in each of the four layers of the posterior
    p_z_dim: int = 500  # ... of the prior
    p_x_dim: int = 600  # ... of the decoder
    x2s_dim: int = 600  # ... of phi_x
    z2s_dim: int = 500  # ... of phi_z
    init: Literal["fixed", "by_width"] = "fixed"  # weights to 0.08, or more where inputs are few

    # loss of IWAE_K
    favoured: Literal["worst", "best"] = "worst"  # the sample that gets the largest weight
    over_time: Literal["mean", "sum"] = "mean"  # of log w over the frames, in the weights
    through_weights: bool = True  # the gradient flows through the weights too
    over_batch: Literal["sum", "mean"] = "sum"  # of the windows of an update

    # optimiser
    lr: float = 3e-4  # Adam's learning rate
    raised_after: int = 0  # updates, after which it is another for a while
    raised_until: int = 0  # ... and the last of these updates; 0: none
    raised_to: float = 1e-3  # that other one
    max_updates: int = 200_000  # about as many as the picture of 2016 shows
    grad_clip: float | None = None  # limit on that of the mean over windows; 0: none; None: 2016's
    widened_after: int = 0  # updates, after which the limit is another; 0: never
    widened_to: float = 640.0  # that other one; 0: none
    weight_norm: float = 1.9365  # largest norm of a unit's incoming weights (not lstm_h); 0 = none

    # evaluation
    monitor_every: int = 2000  # updates between evaluations on the valid split
    monitor_windows: int = 512  # windows of the valid split in each, spread evenly
    eval_k: tuple[int, ...] = (5, 100)  # particles of the bounds on test; the first is monitored
    eval_recordings: int = 100  # recordings of test that are also evaluated whole; 0 = none


def as_in_2016(h):
    """h with 2016's value in place of each None. UserError where a value makes no sense."""
    for name in ("k", "rows", "replays", "streams"):
        if getattr(h, name) is not None:
            common.refuse_out_of_range(name, getattr(h, name), least=1)
    k = 1 if h.objective == "vrnn" else h.k
    h = dataclasses.replace(h, k=k)
    copies = copies_of(h)
    if h.rows is None:
        h.rows = 128 // copies * copies
    if h.rows == 0 or h.rows % copies:
        raise common.UserError(f"--rows {h.rows} is no multiple of {copies}, --k; give one that is")
    if h.replays is None:
        h.replays = h.k if h.objective == "vae" else 1
    if h.grad_clip is None:
        h.grad_clip = 5 * h.rows / loss_scale(h)
    common.check_values(h)
    return h


def copies_of(h):
    """Rows of the graph for one window, each with a z and a state of its own."""
    return h.k if h.objective == "iwae" else 1


# ---- losses, in the scale of 2016 ----------------------------------------------------------------


def vrnn_loss(rollout):
    """Mean over frames and sequences of the negative bound with the KL in closed form."""
    return (rollout.nll_TBK + rollout.kl_TBK).mean()


def vae_loss(rollout, k):
    """Mean over frames and sequences of the negative bound by one sample of z, divided by K."""
    return -rollout.log_w_TBK.mean() / k


def iwae_loss(rollout, favoured="worst", over_time="mean", through_weights=True, over_batch="sum"):
    """Sum over sequences of sum_k w_k s_k, s = mean over frames of -log w, w = softmax_k(s).

    The worst of K samples gets the largest weight. Each of the other arguments corrects one thing;
    with all four corrected the gradient is that of the bound of IWAE_K, in nats per frame.
    """
    s_BK = -rollout.log_w_TBK.mean(0)
    logits_BK = s_BK if favoured == "worst" else -s_BK
    if over_time == "sum":
        logits_BK = logits_BK * len(rollout.log_w_TBK)
    weights_BK = logits_BK.softmax(dim=1)
    if not through_weights:
        weights_BK = weights_BK.detach()
    loss_B = (weights_BK * s_BK).sum(1)
    return loss_B.sum() if over_batch == "sum" else loss_B.mean()


def loss_of(h, rollout):
    if h.objective == "vrnn":
        return vrnn_loss(rollout)
    if h.objective == "vae":
        return vae_loss(rollout, h.k)
    return iwae_loss(rollout, h.favoured, h.over_time, h.through_weights, h.over_batch)


def loss_scale(h):
    """How many times the mean over the windows of an update its loss is."""
    if h.objective == "vae":
        return 1 / h.k
    if h.objective == "iwae" and h.over_batch == "sum":
        return h.rows // h.k
    return 1


# ---- rows ----------------------------------------------------------------------------------------


def chapters_of(split):
    """(first sample, end) of each chapter of a split: neighbouring recordings of one file, joined.

    The file is what precedes the last slash in a name; a name without one is a file itself.
    """
    names = split.audio.parent["names"].asstr()[:]
    files = [name.rpartition("/")[0] or name for name in names]
    end = 0
    for _, recordings in itertools.groupby(files):
        first = end
        end += len(list(recordings))
        yield split.offsets[first], split.offsets[end]


def rows_of(chapters, streams, samples):
    """First sample, stream, and number in its stream of every row, (3, rows), in the order of 2016.

    A chapter is cut into equal contiguous streams, a stream into windows; the rest of both is
    dropped. Row streams * w + j of a chapter is window w of its stream j. A chapter with fewer
    windows than `streams` has a stream for each; one without any has no rows.
    """
    tables = [np.empty((3, 0), np.int64)]
    for first, end in chapters:
        count = min(streams, (end - first) // samples)
        if count > 0:
            length = (end - first) // count
            number, stream = np.divmod(np.arange(length // samples * count), count)
            start = first + stream * length + number * samples
            tables.append(np.stack((start, stream, number)))
    return np.concatenate(tables, axis=1)


class InChapters:
    """Batches of the rows of 2016: the next ones each time, and the first again after the last.

    What an epoch holds beyond whole batches is left out.
    """

    def __init__(self, split, h, windows):
        self.split = split
        self.shape = (windows, h.seq_frames, h.x_dim)
        self.samples = h.seq_frames * h.x_dim
        chapters = chapters_of(split) if h.chapters == "files" else [(0, split.offsets[-1])]
        rows = rows_of(chapters, h.streams, self.samples)
        self.count = rows.shape[1] // windows
        if self.count == 0:
            raise common.UserError(f"train has {rows.shape[1]} windows; give fewer --rows")
        self.batches = rows[:, : self.count * windows].reshape(3, self.count, windows)
        streams = np.sort(self.batches[1])
        if h.carried == "by_stream" and (streams[:, 1:] == streams[:, :-1]).any():
            raise common.UserError(
                f"--carried by_stream: of the {windows} windows of an update some follow others "
                "in a stream, and need the state that those leave; give fewer --rows"
            )

    def batch(self, index):
        """Windows (T, B, X) int16, and of each its stream and its number in that, (B,)."""
        starts, streams, numbers = self.batches[:, index % self.count]
        pcm = torch.from_numpy(self.split.read(starts, self.samples))
        pcm_TBX = pcm.view(self.shape).transpose(0, 1)
        return pcm_TBX, torch.from_numpy(streams), torch.from_numpy(numbers)


class InExcerpts:
    """The same for our own order: an excerpt of a shuffled batch takes the place of a stream."""

    def __init__(self, split, h, windows):
        sizes = (h.x_dim, h.seq_frames, h.reset_freq, windows)
        self.excerpts = common.Excerpts(split, *sizes, h.seed)
        self.reset_freq = h.reset_freq
        self.streams = torch.arange(windows)

    def batch(self, index):
        number = index % self.reset_freq
        pcm_TBX = self.excerpts.batch(index // self.reset_freq)[number]
        return pcm_TBX, self.streams, torch.full_like(self.streams, number)


# ---- a run ---------------------------------------------------------------------------------------


def new_model(h):
    """The VRNN of 2016: uniform weights, orthogonal recurrent blocks, sigma biases of 0.6."""
    sizes = (h.x_dim, h.z_dim, h.rnn_dim, h.q_z_dim, h.p_z_dim, h.p_x_dim, h.x2s_dim, h.z2s_dim)
    torch.manual_seed(h.seed)
    model = common.VRNN(*sizes)
    for name, p in model.named_parameters():
        if h.init == "fixed" and p.dim() == 2 and name != "lstm_h.weight":
            torch.nn.init.uniform_(p, -0.08, 0.08)
    return model


@torch.no_grad()
def clip(parameters, rows, limit):
    """Divide all gradients by `rows`, then clip their norm; returns the norm between the two.

    If that is not finite, a tenth of every parameter takes the place of its gradient.
    """
    gradients = [p.grad.div_(rows) for p in parameters]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    for p in parameters:
        if not math.isfinite(norm):
            p.grad.copy_(0.1 * p)
        elif norm > limit:
            p.grad.mul_(limit / norm)
    return norm


class Run:
    """A model in training, all that its next update depends on, and the folder where it is kept."""

    def __init__(self, h):
        self.h, self.folder = h, Path(h.out_dir)
        self.device = common.choose_device(h.device)
        self.corpus = common.open_corpus(h.data)
        self.copies = copies_of(h)
        self.windows = h.rows // self.copies
        order = InChapters if h.order == "chapters" else InExcerpts
        self.source = order(self.corpus.train, h, self.windows)
        self.model = new_model(h).to(self.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=h.lr)
        self.generator = torch.Generator(self.device).manual_seed(h.seed)  # of z
        # states that windows left behind, each in its place, a row or a stream: (places, copies, .)
        places = max(h.streams, self.windows)
        zeros = self.model.zero_state(places * self.copies)
        self.left = [part.unflatten(0, (places, self.copies)).clone() for part in zeros]
        self.progress = dict(updates=0, seconds=0.0, best=-math.inf, clipped=0, skipped=0)
        self.log = [header_of(h, self.corpus, self.device)]
        if h.resume:
            self.restore()
        elif (self.folder / common.LAST).exists():
            raise common.UserError(
                f"{self.folder} holds a run; --resume, or give another --out_dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / common.EVAL).unlink(missing_ok=True)  # of a run that goes on
        self.write("config.json", json.dumps(self.log[0]["config"], indent=1) + "\n")

    def train(self):
        h, progress = self.h, self.progress
        losses = []
        while progress["updates"] < h.max_updates:
            started = time.monotonic()
            loss, norm = self.update()
            progress["seconds"] += time.monotonic() - started
            losses.append(loss)
            if progress["updates"] % h.monitor_every == 0 or progress["updates"] == h.max_updates:
                self.monitor(losses, norm)
                losses = []

    def update(self):
        """Make one; returns its loss, and the norm of the gradient of the mean over windows."""
        h, progress = self.h, self.progress
        pcm_TBX, places, ages = self.source.batch(progress["updates"] // h.replays)
        if h.carried == "by_row":
            places = torch.arange(self.windows)
            ages = torch.full_like(places, progress["updates"])
        x_TBX = (pcm_TBX.to(self.device) - self.corpus.mean) / self.corpus.std
        shape = (h.seq_frames, h.rows, h.z_dim)
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        rollout = self.model(x_TBX, self.state_in(places, ages), noise, self.copies)
        loss = loss_of(h, rollout)
        loss.backward()

        of_mean = h.rows / loss_scale(h)  # makes 2016's norms those of the mean over windows
        limit = self.limit() / of_mean
        norm = clip(list(self.model.parameters()), h.rows, limit)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if h.weight_norm:
            self.model.constrain_weights(h.weight_norm)

        progress["updates"] += 1
        progress["skipped"] += not math.isfinite(norm)
        progress["clipped"] += limit < norm < math.inf
        if h.carried == "by_row" or progress["updates"] % h.replays == 0:
            for left, part in zip(self.left, rollout.state, strict=True):
                left[places] = part.detach().unflatten(0, (-1, self.copies))
        return loss.item(), norm * of_mean

    def limit(self):
        """On the gradient of the mean over windows, in the next update."""
        is_widened = 0 < self.h.widened_after <= self.progress["updates"]
        return (self.h.widened_to if is_widened else self.h.grad_clip) or math.inf

    def learning_rate(self):
        """In the next update."""
        if self.h.raised_after <= self.progress["updates"] < self.h.raised_until:
            return self.h.raised_to
        return self.h.lr

    def state_in(self, places, ages):
        """Before windows of these ages: zero at each reset_freq-th, else what their place has."""
        goes_on = (ages % self.h.reset_freq != 0).to(self.device).view(-1, 1, 1)
        return tuple(torch.where(goes_on, part[places], 0.0).flatten(0, 1) for part in self.left)

    def monitor(self, losses, norm):
        """A line of the log, last.pt, and best.pt where the raw weights are better than before."""
        h, progress = self.h, self.progress
        bounds = common.window_bounds(
            self.model,
            self.corpus,
            self.corpus.valid,
            h.eval_k[:1],
            h.seq_frames,
            h.monitor_windows,
        )
        valid = common.summarise(bounds, h.seq_frames, h.x_dim, self.corpus)
        finite = [loss for loss in losses if math.isfinite(loss)]
        line = dict(
            update=progress["updates"],
            sequences=progress["updates"] * self.windows,
            distinct_windows=math.ceil(progress["updates"] / h.replays) * self.windows,
            seconds=progress["seconds"],
            train_loss=sum(finite) / len(finite) if finite else None,
            grad_norm=norm,
            clipped=progress["clipped"],
            skipped=progress["skipped"],
            valid=valid,
        )
        self.log.append(line)
        nats = valid[f"iwae_{h.eval_k[0]}"]["nats_per_frame"]
        if nats > progress["best"]:
            progress["best"] = nats
            self.save(common.BEST, self.trained())
        self.write(common.LOG, "".join(json.dumps(line) + "\n" for line in self.log))
        self.save(common.LAST, self.checkpoint())
        print(f"update {line['update']:,} | valid iwae_{h.eval_k[0]} {nats:.2f} nats/frame")

    def finish(self):
        """Evaluate best.pt on the test split, as the other scripts do."""
        best = common.read_checkpoint(self.folder / common.BEST, "--resume")
        self.model.load_state_dict(best["model"])
        config = self.log[0]["config"]
        common.evaluate(
            self.h, self.model, best, self.corpus, self.folder, config, path=common.BEST
        )

    def trained(self):
        """What it takes to evaluate the model."""
        return dict(
            config=self.log[0]["config"],
            mean=self.corpus.mean,
            std=self.corpus.std,
            update=self.progress["updates"],
            model=self.model.state_dict(),
        )

    def checkpoint(self):
        """What it takes to go on as if the run had never stopped."""
        return dict(
            **self.trained(),
            optimiser=self.optimiser.state_dict(),
            generator=self.generator.get_state(),
            left=dict(enumerate(self.left)),
            progress=self.progress,
            log=self.log,
        )

    def restore(self):
        saved = common.read_checkpoint(self.folder / common.LAST, "--resume")
        header, *lines = saved["log"]
        common.refuse_changes(header, self.log[0])
        self.log = [{**header, "config": self.log[0]["config"]}, *lines]
        self.progress = saved["progress"]
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"])
        self.left = [part.to(self.device) for part in saved["left"].values()]

    def save(self, name, checkpoint):
        with common.durably(self.folder / name) as partial:
            torch.save(checkpoint, partial)

    def write(self, name, text):
        common.write_durably(self.folder / name, text)


def header_of(h, corpus, device):
    """The first line of the log."""
    names = dict(vrnn="VRNN", vae=f"VAE_{h.k}", iwae=f"IWAE_{h.k}")
    config = dataclasses.asdict(h)
    del config["resume"]
    config["eval_k"] = list(h.eval_k)  # as it is read from JSON
    config["script"] = "published_2016"
    config["name"] = f"{names[h.objective]} of 2016"
    versions = [platform.python_version(), str(torch.__version__), np.__version__]
    return dict(
        config=config,
        commit=common.commit(),
        device=common.describe(device),
        data=common.describe_corpus(corpus),
        versions=dict(zip(("python", "torch", "numpy"), versions)),
    )


def main():
    h = as_in_2016(common.parse_flags(Hyperparameters()))
    torch.set_flush_denormal(True)  # else products with tiny numbers take many times as long
    run = Run(h)
    run.train()
    run.finish()


if __name__ == "__main__":
    common.run_as_script(main)
