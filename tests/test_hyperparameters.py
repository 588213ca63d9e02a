"""The fields that a user adds to a script's dataclass, and the values that are typed in there."""

import dataclasses
from dataclasses import dataclass, field

import pytest
from tiny import SIZES, write_tiny_data
from torch import nn

import common
import vrnn_gauss


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


def parsed(*flags, of=Added):
    return common.parse(of, flags)


def refusal(*flags, of=Added):
    with pytest.raises(common.UserError) as error:
        common.parse(of, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "flags, name, value",
    (
        (["--temperature=0.7"], "temperature", 0.7),
        (["--temperature", "2"], "temperature", 2.0),
        (["--temperature=-1e-3"], "temperature", -1e-3),
        (["--layers=3"], "layers", 3),
        (["--layers", "2e4"], "layers", 20_000),
        (["--layers=20_000"], "layers", 20_000),
        (["--layers=-1"], "layers", -1),
        (["--tied"], "tied", True),
        (["--no-tied"], "tied", False),
        (["--prior=5"], "prior", "5"),
        (["--prior="], "prior", ""),
        (["--widths=7"], "widths", (7,)),
        (["--widths", "7,8,1e3"], "widths", (7, 8, 1_000)),
        ([], "lr", 1e-3),
        (["--k", "5"], "k", 5),
        (["--k=5"], "k", 5),
        (["--k=5", "--k=6"], "k", 6),
        (["--eval_k=5,100"], "eval_k", (5, 100)),
    ),
)
def test_an_added_field_is_a_flag_of_its_own_type(flags, name, value):
    found = getattr(parsed(*flags), name)
    assert found == value and type(found) is type(value)


def test_added_fields_keep_their_defaults_and_their_class_its_methods():
    h = parsed("--layers=3")
    assert dataclasses.asdict(h) == dataclasses.asdict(Added()) | dict(layers=3)
    assert h.all_layers == 6 and h.doubled() == 1.0


def test_the_demo_is_small_and_leaves_what_is_given_as_it_is():
    h = parsed("--demo", "--temperature=0.7", "--lr=0.5", "--k=2", of=Added)
    assert (h.rnn_dim, h.data, h.max_updates, h.weight_norm) == (128, "data/demo.h5", 1000, 1.9365)
    assert (h.temperature, h.lr, h.k, h.ar_order) == (0.7, 0.5, 2, 16)


def test_types_as_text_are_types():
    h = parsed("--temperature=1", "--widths=3", of=Postponed)
    assert type(h.temperature) is float and h.widths == (3,)


def test_the_comment_behind_a_field_is_its_help_with_the_default(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for shown in (
        "of the softmax, in percent: % (default: 0.5)",
        "of the encoder (default: 2)",
        "--no-tied",
        "of z (default: gauss, # or laplace)",
        "of the layers (default: (5, 6))",
        "another default (default: 0.001)",
        "LSTM units (default: 1000)",
    ):
        assert shown in text


@pytest.mark.parametrize(
    "flag, words",
    (
        ("--temperature=x", "--temperature: invalid float value: 'x'"),
        ("--temperature=nan", "--temperature=nan is out of"),
        ("--temperature=inf", "--temperature=inf is out of range"),
        ("--layers=2.5", "--layers: invalid whole number value"),
        ("--layers=nan", "invalid whole number value: 'nan'"),
        ("--layers=1e999", "invalid whole number value"),
        ("--layers=", "invalid whole number"),
        ("--widths=", "list of whole numbers"),
        ("--widths=5,,6", "list of whole numbers"),
        ("--tied=yes", "--tied"),
        ("--temprature=1", "did you mean --temperature?"),
        ("--no-tide", "did you mean --no-tied?"),
        ("--layer=3", "did you mean --layers?"),
        ("--k=1e10", "at most 1000000000"),
        ("--lr=nan", "--lr=nan is out of range"),
        ("--lr=0", "at least 1e-30"),
        ("--ema=1", "--ema=1.0 is out of range"),
        ("--eval_k=5,0", "at least 1"),
        ("word", "unknown argument 'word'"),
        ("--layers", "expected one argument"),
        ("--out_dir=", "--out_dir is empty"),
        ("--z_dim=-1", "at least 0"),
        ("--ar_order=-1", "at least 0"),
        ("--rnn_dim=0", "at least 1"),
        ("--z_dim=0 --k=2", "--k=2: without latent variables"),
    ),
)
def test_a_flag_of_another_type_or_name_or_out_of_range_is_refused_in_one_line(flag, words):
    assert words in refusal(*flag.split(" "))


class TypedIn:
    """Classes as a user might write them."""

    @dataclass
    class WithoutType(vrnn_gauss.Hyperparameters):
        temperature = 0.5

    @dataclass
    class OverrideWithoutType(vrnn_gauss.Hyperparameters):
        lr = 1e-3

    @dataclass
    class OfNoKind(vrnn_gauss.Hyperparameters):
        widths: list = field(default_factory=list)

    @dataclass
    class OfTwoKinds(vrnn_gauss.Hyperparameters):
        temperature: float | None = None

    @dataclass
    class OfAnotherTuple(vrnn_gauss.Hyperparameters):
        betas: tuple[float, float] = (0.9, 0.999)

    class NoDataclass(vrnn_gauss.Hyperparameters):
        temperature: float = 0.5

    @dataclass(kw_only=True)
    class WithoutDefault(vrnn_gauss.Hyperparameters):
        temperature: float

    @dataclass
    class NameTaken(vrnn_gauss.Hyperparameters):
        resume: bool = False

    @dataclass
    class NameOfConfig(vrnn_gauss.Hyperparameters):
        name: str = "cosine"

    @dataclass
    class Few:
        data: str = "data/blizzard.h5"


@pytest.mark.parametrize(
    "name, words",
    (
        (
            "WithoutType",
            "temperature cannot become a flag; write temperature: TYPE = VALUE below @dataclass",
        ),
        ("OverrideWithoutType", "lr cannot become a flag"),
        ("OfNoKind", "widths cannot become a flag"),
        ("OfTwoKinds", "temperature cannot become a flag"),
        (
            "OfAnotherTuple",
            "betas cannot become a flag; write betas: TYPE = VALUE below @dataclass, with a type of int, "
            "float, str, bool or tuple[int, ...]",
        ),
        ("NoDataclass", "temperature cannot become a flag"),
        ("WithoutDefault", "temperature cannot become a flag"),
        ("NameTaken", "resume cannot become a flag"),
        ("NameOfConfig", "name cannot become a flag"),
        ("Few", "there is no hyperparameter batch_size"),
    ),
)
def test_a_line_that_cannot_become_a_flag_is_refused_by_name_and_by_its_file(name, words):
    text = refusal(of=getattr(TypedIn, name))
    assert words in text and "test_hyperparameters.py" in text


def test_every_field_that_training_reads_is_missed_by_name():
    for name in sorted(common.NEEDED):
        fewer = [(f.name, f.type, f.default) for f in dataclasses.fields(Added) if f.name != name]
        fewer = dataclasses.make_dataclass("Fewer", fewer)
        fewer.__module__ = __name__
        assert f"no hyperparameter {name};" in refusal(of=fewer)


@pytest.mark.parametrize(
    "name, value, words",
    (
        ("lr", "3e-4", "--lr='3e-4' is no float"),
        ("max_updates", 1e5, "--max_updates=100000.0 is no whole number"),
        ("k", True, "--k=True is no whole number"),
        ("bf16", 1, "--bf16=1 is no"),
        ("data", None, "--data=None is no"),
        ("eval_k", 5, "--eval_k=5 is no"),
        ("eval_k", [5, 100], "is no"),
        ("eval_k", (), "is no"),
        ("eval_k", (5, 1e2), "is no"),
        ("batch_size", 0, "--batch_size=0 is out of range"),
        ("lr", float("nan"), "--lr=nan is out of range"),
        ("ema", 1.5, "--ema=1.5 is out of range"),
        ("eval_k", (0, 5), "is out of range"),
        ("temperature", float("inf"), "--temperature=inf is out of range"),
    ),
)
def test_a_value_typed_in_at_the_top_is_held_to_the_type_and_the_range_of_its_field(
    name, value, words
):
    with pytest.raises(common.UserError) as error:
        common.check_values(dataclasses.replace(Added(), **{name: value}), common.kinds_of(Added))
    assert words in str(error.value) and "\n" not in str(error.value)


@dataclass
class Mistyped(vrnn_gauss.Hyperparameters):
    """Values that a checker of types would complain of."""

    lr: float = 1
    max_updates: int = 1e5


def test_a_value_typed_in_is_checked_where_no_flag_replaces_it_and_a_whole_number_is_a_float_too():
    assert "--max_updates=100000.0 is no whole number; give one" == refusal(of=Mistyped)
    lr = parsed("--max_updates=1e5", of=Mistyped).lr
    assert lr == 1 and type(lr) is float


def test_a_script_without_the_field_ar_order_has_none(tmp_path, monkeypatch):
    fewer = [(f.name, f.type, f.default) for f in dataclasses.fields(Added) if f.name != "ar_order"]
    fewer = dataclasses.make_dataclass("Fewer", fewer)
    fewer.__module__ = __name__
    monkeypatch.setattr(common.inspect, "getsource", lambda cls: "")  # this one has none
    write_tiny_data(tmp_path / "tiny.h5")
    h = parsed(
        *SIZES,
        "--demo",
        f"--data={tmp_path / 'tiny.h5'}",
        f"--out_dir={tmp_path / 'run'}",
        of=fewer,
    )
    assert common.Training(h, particles=1).model.likelihood.ar_order == 0


class Bare(nn.Module):
    """A model that has nothing but the interface, if that."""

    x_dim, z_dim = 20, 4

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
    none = ("--weight_norm=0", "--no-mirrored_init", "--no-bf16")

    def training(*flags):
        h = parsed(
            *SIZES, f"--data={tmp_path / 'tiny.h5'}", f"--out_dir={tmp_path / 'run'}", *none, *flags
        )
        return common.Training(h, particles=1, model=Bare())

    with pytest.raises(
        common.UserError, match=f"Bare has no {feature}; give {off}, or write it"
    ) as error:
        training(asked)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert len(training().state) == 1
