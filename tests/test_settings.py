"""The settings and the command line: what they take, and how they refuse the rest."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
from small_runs import plain, plain_network

import train
from train import Config, MachineError, SettingError, choose_runtime, fit


def test_the_command_line_refuses_weights_that_are_none(capsys):
    Path("start.pt").write_bytes(b"hello")
    assert train.main(["--weights", "start.pt", "--name", "plain"]) == 1
    assert "error: start.pt is damaged, or not a file of torch.save" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_machine_of_any_process_is_heard_but_settings_only_once(monkeypatch, capsys):
    def fail(error: Exception) -> str:
        monkeypatch.setattr(train, "fit", mock.Mock(side_effect=error))
        assert train.main([]) == 1
        return capsys.readouterr().err

    monkeypatch.setenv("RANK", "1")
    assert fail(SettingError("lr")) == "error: lr\n"  # a cluster's variable, without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert fail(SettingError("lr")) == ""
    assert fail(MachineError("memory ran out")) == "process 1: error: memory ran out\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 1),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("label_smoothing", 1.0),
        ("cutmix", 1.1),
        ("skip", 0.7),
        ("padding", 32),
        ("weights", ""),
        ("data", "imagenet"),
        ("augment", ("blur",)),
        ("seed", -1),
        ("workers", "two"),
        ("device", "tpu"),
        ("precision", "fp8"),
        ("name", ""),
        ("name", "../elsewhere"),
        ("name", "a\0b"),
        ("data_dir", 5),
    ],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(SettingError, match=f"^{field} must be .*, got "):
        Config(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("batch_size", 201), ("holdout", 200)])
def test_settings_beyond_the_data_are_refused_by_name(field, value):
    with pytest.raises(SettingError, match=field):
        fit(plain(**{field: value}), plain_network())
    assert not Path("runs").exists()


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingError, match="cuda is not available"):
        choose_runtime(device="cuda")


def test_runtime_can_be_overridden():
    assert str(choose_runtime("cpu", "bf16", "contiguous")) == "cpu, bf16, contiguous"
    assert str(choose_runtime("cpu", "fp32", "channels_last")) == "cpu, fp32, channels_last"


def test_the_command_line_has_every_field_and_no_other():
    defaults = train.parse_args([])
    assert defaults == Config()
    command = "--epochs 3 --lr 0.1 --augment crop cutout --data synthetic --batch-size 100"
    parsed = train.parse_args(command.split(" "))
    assert parsed == Config(epochs=3, lr=0.1, augment=("crop", "cutout"), data="synthetic", batch_size=100)
    assert train.parse_args(["--augment"]).augment == ()


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--lr", "fast"], ["--colour", "red"]])
def test_the_command_line_refuses_with_usage_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.parse_args(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_line_says_what_is_missing_without_a_traceback(monkeypatch, capsys):
    monkeypatch.delenv("CIFAR10_ROOT")
    assert train.main(["--epochs", "1"]) == 1
    assert "--data synthetic" in capsys.readouterr().err


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in shown for field in dataclasses.fields(Config))
