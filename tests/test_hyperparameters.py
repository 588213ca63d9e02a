"""The fields that a user adds to a script's dataclass, and the values that are typed in there."""

import dataclasses
import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from tiny import SIZES, write_tiny_data
from torch import nn

import common
import vrnn_gauss
import vrnn_gauss_alt_nll
import vrnn_gauss_iwae


@dataclass
class Added(vrnn_gauss.Hyperparameters):
    lr: float = 1e-3  # another default
    temperature: float = 0.5  # of the softmax, in percent: %
    layers: int = 2  # of the encoder
    tied: bool = False  # whether they share weights
    prior: str = "gauss, # or laplace"  # of z
    widths: tuple[int, ...] = (5, 6)  # of the layers

    @property
    def all_layers(self):
        return 2 * self.layers

    def doubled(self):
        return 2 * self.temperature


@dataclass
class Postponed(vrnn_gauss.Hyperparameters):
    """Types as text, as `from __future__ import annotations` leaves them."""

    temperature: "float" = 0.5
    widths: "tuple[int, ...]" = (5, 6)


@dataclass(frozen=True)
class Frozen:
    """One that stands on its own, as a dataclass that is frozen derives from no other kind."""

    out_dir: str = "runs/frozen"  # where it goes
    evaluate: str = ""
    eval_k: tuple[int, ...] = (5, 100)
    lr: float = 1e-3
    k: int = 1
    z_dim: int = 4
    dequantize: bool = True


@dataclass(slots=True)
class Slotted(vrnn_gauss.Hyperparameters):
    temperature: float = 0.5  # of the softmax


@dataclass
class WithMethods(vrnn_gauss.Hyperparameters):
    """What is no value needs no type."""

    temperature: float = 0.5
    softmax = nn.Softmax
    POWERS: ClassVar[dict] = {}
    _known = 3

    @classmethod
    def cold(cls):
        return cls(temperature=0.1)

    @staticmethod
    def power():
        return 2

    @functools.cached_property
    def squared(self):
        return self.temperature ** self.power()


def parsed(*flags, of=Added):
    return common.parse(of, flags)


def refusal(*flags, of=Added):
    with pytest.raises(common.UserError) as error:
        common.parse(of, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def help_of(script, capsys):
    """The text of --help without its frame and line breaks."""
    with pytest.raises(SystemExit) as end:
        common.parse(script, ["--help"])
    assert end.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize(
    "flags, name, value",
    (
        (["--temperature=0.7"], "temperature", 0.7),
        (["--temperature", "2"], "temperature", 2.0),
        (["--temperature=-1e-3"], "temperature", -1e-3),
        (["--temperature", "-1e-3"], "temperature", -1e-3),
        (["--layers=3"], "layers", 3),
        (["--layers", "20000"], "layers", 20_000),
        (["--layers=20_000"], "layers", 20_000),
        (["--layers=-1"], "layers", -1),
        (["--tied"], "tied", True),
        (["--no-tied"], "tied", False),
        (["--no_tied"], "tied", False),
        (["--no-dequantize"], "dequantize", False),
        (["--prior=5"], "prior", "5"),
        (["--prior="], "prior", ""),
        (["--widths=7"], "widths", (7,)),
        (["--widths", "7", "8", "1000"], "widths", (7, 8, 1_000)),
        (["--widths"], "widths", ()),
        ([], "lr", 1e-3),
        (["--k", "5"], "k", 5),
        (["--k=5"], "k", 5),
        (["--k=5", "--k=6"], "k", 6),
        (["--max-updates=7"], "max_updates", 7),
        (["--eval_k", "5", "100"], "eval_k", (5, 100)),
        (["--eval-k", "2", "6", "--k=3"], "eval_k", (2, 6)),
        (["--eval_k=7"], "eval_k", (7,)),
    ),
)
def test_an_added_field_is_a_flag_of_its_own_type(flags, name, value):
    found = getattr(parsed(*flags), name)
    assert found == value
    assert type(found) is type(value)


def test_added_fields_keep_their_defaults_and_their_class_its_methods():
    h = parsed("--layers=3")
    assert isinstance(h, Added)
    assert dataclasses.asdict(h) == dataclasses.asdict(Added()) | dict(
        layers=3, resume=False, demo=False
    )
    assert h.all_layers == 6
    assert h.doubled() == 1.0


def test_what_is_no_value_needs_no_type():
    h = parsed("--temperature=3", of=WithMethods)
    assert h.squared == 9
    assert h.cold().temperature == 0.1


def test_a_frozen_dataclass_stays_frozen():
    h = parsed("--lr=0.5", "--no-dequantize", "--resume", of=Frozen)
    assert (h.lr, h.dequantize, h.resume, h.out_dir) == (0.5, False, True, "runs/frozen")
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.lr = 1.0
    assert parsed("--demo", of=Frozen).out_dir == "runs/demo/test_hyperparameters"
    assert "--lr=0.0 is out of range" in refusal("--lr=0", of=Frozen)


def test_a_dataclass_with_slots_has_its_flags_and_its_help(capsys):
    h = parsed("--temperature=0.7", "--demo", of=Slotted)
    assert (h.temperature, h.rnn_dim, h.k) == (0.7, 128, 1)
    assert "of the softmax (default: 0.5)" in help_of(Slotted, capsys)


def test_the_demo_is_small_and_leaves_what_is_given_as_it_is():
    h = parsed("--demo", "--temperature=0.7", "--lr=0.5", "--k=2")
    assert (h.rnn_dim, h.data, h.max_updates, h.weight_norm) == (128, "data/demo.h5", 400, 1.9365)
    assert (h.temperature, h.lr, h.k, h.ar_order) == (0.7, 0.5, 2, 0)


def test_types_as_text_are_types():
    h = parsed("--temperature=1", "--widths=3", of=Postponed)
    assert type(h.temperature) is float
    assert h.widths == (3,)


def test_the_comment_behind_a_field_is_its_help_with_the_default(capsys):
    text = help_of(Added, capsys)
    for shown in (
        "--temperature FLOAT of the softmax, in percent: % (default: 0.5)",
        "--layers INT of the encoder (default: 2)",
        "--tied, --no_tied whether they share weights (default: False)",
        "--prior STR of z (default: 'gauss, # or laplace')",
        "--widths [INT [INT ...]] of the layers (default: 5 6)",
        "--lr FLOAT another default (default: 0.001)",
        "--rnn_dim INT LSTM units (default: 1000)",
        "--resume go on from last.pt in out_dir",
        "--demo small sizes and synthetic data",
    ):
        assert shown in text


@pytest.mark.parametrize(
    "flag, words",
    (
        ("--temperature=x", "parsing --temperature: could not convert string to float: 'x'"),
        ("--layers=2.5", "parsing --layers: invalid literal for int() with base 10: '2.5'"),
        ("--layers=2e4", "parsing --layers: invalid literal for int() with base 10: '2e4'"),
        ("--layers=nan", "invalid literal for int() with base 10: 'nan'"),
        ("--layers=1e999", "invalid literal for int() with base 10: '1e999'"),
        ("--layers=", "invalid literal for int() with base 10: ''"),
        ("--widths=", "parsing --widths: Could not find valid parse for arguments: ['']"),
        ("--widths=5,,6", "parsing --widths: Could not find valid parse for arguments: ['5,,6']"),
        ("--eval_k=5,100", "parsing --eval_k: Could not find valid parse for arguments: ['5,100']"),
        ("--tied=yes", "unknown argument 'yes'"),
        ("--temprature=1", "unknown argument '--temprature', did you mean --temperature?"),
        ("--x_dm 3", "unknown argument '--x_dm', did you mean --x_dim?"),
        ("--no-tide", "did you mean --no-tied?"),
        ("--layer=3", "did you mean --layers?"),
        ("--no-temperature", "unknown argument '--no-temperature', did you mean --temperature?"),
        ("--no-resume", "unknown argument '--no-resume', did you mean --resume?"),
        ("--qqq", "unknown argument '--qqq'; test_hyperparameters.py --help lists"),
        ("--k=1e10", "parsing --k: invalid literal"),
        (
            "--k=10000000000",
            "--k=10000000000 is out of range; give a whole number from 1 to 1000000000",
        ),
        ("--seed=1000000000000000000000", "from 0 to 1000000000"),
        ("--lr=nan", "--lr=nan is out of range"),
        ("--grad_clip=inf", "--grad_clip=inf is out of range"),
        ("--ema=nan", "--ema=nan is out of range"),
        ("--lr=0", "a number from 1e-30"),
        ("--eval_k 5 0", "--eval_k=(5, 0) is out of range; give a whole number from 1"),
        ("--eval_k", "--eval_k is empty"),
        ("word", "unknown argument 'word'"),
        ("--layers", "Missing value for argument '--layers'"),
        ("--out_dir=", "--out_dir or --eval_k is empty"),
        ("--z_dim=-1", "a whole number from 0"),
        ("--ar_order=-1", "a whole number from 0"),
        ("--rnn_dim=0", "a whole number from 1"),
        ("--z_dim=0 --k=2", "--k=2: without latent variables"),
        ("--resume --evaluate=x.pt", "--resume cannot be given beside --evaluate=x.pt"),
    ),
)
def test_a_flag_of_another_type_or_name_or_out_of_range_is_refused_in_one_line(flag, words):
    assert words in refusal(*flag.split(" "))


@pytest.mark.parametrize("name", common.LEAST)
def test_every_hyperparameter_with_a_range_has_its_least_and_most(name):
    least = common.LEAST[name]
    kind = float if isinstance(getattr(Added(), name), float) else int
    flags = [] if name == "k" else ["--k=1"]  # of which more would need a z_dim
    assert getattr(parsed(*flags, f"--{name}={kind(least)}"), name) in (least, (least,))
    assert getattr(parsed(f"--{name}={kind(common.MOST)}"), name) in (common.MOST, (common.MOST,))
    too_little = -1 if least == 0 else 0
    words = f"number from {least} to {common.MOST}"
    assert words in refusal(f"--{name}={too_little}")
    assert words in refusal(f"--{name}={common.MOST + 1}")


class TypedIn:
    """Classes as a user might write them."""

    @dataclass
    class WithoutType(vrnn_gauss.Hyperparameters):
        temperature = 0.5

    @dataclass
    class OverrideWithoutType(vrnn_gauss.Hyperparameters):
        lr = 1e-3

    class NoDataclass(vrnn_gauss.Hyperparameters):
        temperature: float = 0.5

    @dataclass
    class BelowNoDataclass(NoDataclass):
        layers: int = 2


@pytest.mark.parametrize(
    "name, value",
    (
        ("WithoutType", "temperature"),
        ("OverrideWithoutType", "lr"),
        ("NoDataclass", "temperature"),
        ("BelowNoDataclass", "temperature"),
    ),
)
def test_a_line_that_cannot_become_a_flag_is_refused_by_name_and_by_its_file(name, value):
    assert refusal(of=getattr(TypedIn, name)) == (
        f"test_hyperparameters.py: {value} cannot become a flag; write {value}: TYPE = VALUE below "
        "@dataclass"
    )


@pytest.mark.parametrize(
    "name, value, words",
    (
        ("lr", "3e-4", "--lr=3e-4 is out of range"),
        ("batch_size", 0, "--batch_size=0 is out of range"),
        ("lr", float("nan"), "--lr=nan is out of range"),
        ("eval_k", (0, 5), "is out of range"),
        ("rnn_dim", (12,), "--rnn_dim=(12,) is out of range"),
        ("rnn_dim", 12.5, "--rnn_dim=12.5 is out of range; give a whole number from 1"),
        ("eval_k", 5, "--eval_k=5 is out of range"),
        ("eval_k", (), "--eval_k is empty"),
        ("seed", None, "--seed=None is out of range"),
    ),
)
def test_a_value_typed_in_at_the_top_is_held_to_the_range_of_its_field(name, value, words):
    mistyped = dataclasses.make_dataclass("Mistyped", [(name, Any, value)], bases=(Added,))
    mistyped.__module__ = __name__
    assert words in refusal(of=mistyped)


# ---- the three scripts ---------------------------------------------------------------------------

SCRIPTS = (vrnn_gauss, vrnn_gauss_alt_nll, vrnn_gauss_iwae)
OF_A_SCRIPT = ("k", "out_dir")  # must differ


def fields_of(module):
    return {field.name: field for field in dataclasses.fields(module.Hyperparameters)}


def comments_of(module):
    """{field: the comment behind it} of the block at the top of a script."""
    source = inspect.getsource(module.Hyperparameters)
    return dict(re.findall(r"^    (\w+): .* = .*?  # (.*)$", source, re.MULTILINE))


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_shows_every_field_of_a_script_with_its_comment_and_default(module, capsys):
    text = help_of(module.Hyperparameters, capsys)
    comments = comments_of(module)
    assert comments.keys() == fields_of(module).keys()
    for name, field in fields_of(module).items():
        default = repr("") if field.default == "" else str(field.default)
        if isinstance(field.default, tuple):
            default = " ".join(map(str, field.default))
        shown = text.split(f"--{name}", 1)[1]
        assert f" {comments[name]} (default: {default})" in shown, name


@pytest.mark.parametrize("module", SCRIPTS[1:])
def test_the_fields_that_scripts_share_are_the_same_in_the_same_order(module):
    ours = fields_of(vrnn_gauss)
    theirs = fields_of(module)
    shared = [name for name in theirs if name in ours]
    assert shared == list(ours)
    comments = comments_of(vrnn_gauss)
    their_comments = comments_of(module)
    for name in shared:
        assert theirs[name].type == ours[name].type, name
        if name not in OF_A_SCRIPT:
            assert theirs[name].default == ours[name].default, name
            assert their_comments[name] == comments[name], name
    assert theirs["out_dir"].default == f"runs/{module.__name__}"
    assert their_comments["out_dir"] == comments["out_dir"]


# ---- what a script or a model lacks ---------------------------------------------------------------


def test_a_script_without_the_field_ar_order_has_none(tmp_path):
    fewer = [(f.name, f.type, f.default) for f in dataclasses.fields(Added) if f.name != "ar_order"]
    fewer = dataclasses.make_dataclass("Fewer", fewer)
    fewer.__module__ = __name__
    write_tiny_data(tmp_path / "tiny.h5")
    where = (f"--data={tmp_path / 'tiny.h5'}", f"--out_dir={tmp_path / 'run'}")
    h = parsed(*SIZES, "--demo", *where, of=fewer)
    assert common.Training(h, particles=1).model.likelihood.ar_order == 0


class Bare(nn.Module):
    """A model that has nothing but the interface, if that."""

    x_dim = 20
    z_dim = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def zero_state(self, rows):
        return (self.weight.bias.new_zeros(rows, 1),)


@pytest.mark.parametrize(
    "asked, off, feature",
    (
        ("--weight_norm=1.9", "--weight_norm=0", "constrain_weights"),
        ("--mirrored_init", "--no-mirrored_init", "mirror"),
        ("--bf16", "--no-bf16", "bf16"),
    ),
)
def test_what_a_model_does_not_have_is_refused_in_one_sentence_that_says_how_to_go_on(
    tmp_path, asked, off, feature
):
    write_tiny_data(tmp_path / "tiny.h5")
    where = (f"--data={tmp_path / 'tiny.h5'}", f"--out_dir={tmp_path / 'run'}")
    none = ("--weight_norm=0", "--no-mirrored_init", "--no-bf16")

    def training(*flags):
        h = parsed(*SIZES, *where, *none, *flags)
        return common.Training(h, particles=1, model=Bare())

    with pytest.raises(common.UserError) as error:
        training(asked)
    assert f"Bare has no {feature}; give {off}, or write it" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert len(training().state) == 1
