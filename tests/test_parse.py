"""Flags and the hyperparameters that come of them."""

from dataclasses import dataclass

import pytest

import common
import vrnn_gauss
import vrnn_gauss_iwae


def parsed(*flags):
    return common.parse(vrnn_gauss.Hyperparameters, flags)


def test_flags_take_the_type_of_their_field():
    h = parsed("--lr", "1e-4", "--max_updates=2e4", "--batch_size=1_000", "--eval_k=3,7", "--no-dequantize", "--bf16")
    assert (h.lr, h.max_updates, h.batch_size, h.eval_k) == (1e-4, 20_000, 1_000, (3, 7))
    assert h.bf16 is True and h.dequantize is False
    assert [type(value) for value in (h.max_updates, h.batch_size, h.eval_k[0])] == [int] * 3
    assert type(parsed("--grad_clip=5").grad_clip) is float
    assert not h.resume and parsed("--resume").resume


def test_values_that_are_not_given_are_those_of_the_script():
    h = parsed("--k=7")
    assert {**vars(h), "k": 1} == {**vars(vrnn_gauss.Hyperparameters()), "resume": False}


def test_the_demo_is_small_and_leaves_what_is_given_as_it_is():
    h = common.parse(vrnn_gauss_iwae.Hyperparameters, ["--demo", "--lr=0.5", "--k=2"])
    assert (h.rnn_dim, h.data, h.out_dir, h.lr, h.k) == (128, "data/demo.h5", "runs/demo/vrnn_gauss_iwae", 0.5, 2)
    assert h.weight_norm == 1.9365


@pytest.mark.parametrize("flag, words", (
    ("--k=2.5", "invalid whole number value: '2.5'"), ("--eval_k=5,x", "list of whole numbers value: '5,x'"),
    ("--dequantize=1", "--dequantize"), ("--lr=inf", "--lr=inf is out of range"), ("--ema=1", "--ema=1.0 is out of"),
    ("--batch_size=0", "at least 1"), ("--grad_clip=-1", "at least 0"), ("--eval_k=5,0", r"\(5, 0\) is out of range"),
    ("--lrr=1", r"did you mean --lr\?"), ("--seed=1e10", "at most 1000000000"),
))
def test_values_of_another_type_or_out_of_range_are_refused_by_name(flag, words):
    with pytest.raises(common.UserError, match=words):
        parsed(flag)


@dataclass
class WithOneMore(vrnn_gauss.Hyperparameters):
    temperature: float = 0.5  # of the softmax, in percent: %


@dataclass
class WithoutType(vrnn_gauss.Hyperparameters):
    temperature = 0.5


def test_a_field_that_is_added_is_a_flag_with_its_comment_as_help(capsys):
    assert common.parse(WithOneMore, ["--temperature=0.7"]).temperature == 0.7
    with pytest.raises(SystemExit):
        common.parse(WithOneMore, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of the softmax, in percent: % (default: 0.5)" in text and "Adam's learning rate (default: 0.0003)" in text


def test_a_line_without_a_type_is_refused_by_name():
    with pytest.raises(common.UserError, match="temperature = 0.5 has no type; write temperature: float = 0.5"):
        common.parse(WithoutType, [])
