"""Stage configs: identity, aliases, errors that are one line."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from pipeline.config import config_hash, execution, identity, parse, run
from pipeline.errors import DataError, EngineError


@dataclass(frozen=True)
class Refuel:
    eta: float = 1.0
    """Multiplies the reward difference."""


@dataclass(frozen=True)
class Config:
    """Do something."""

    lr: float = 1e-3
    """Learning rate."""
    refuel: Refuel = field(default_factory=Refuel)
    folder: str = execution("here")
    """Where."""
    names: tuple[str, ...] = ()
    """Names."""
    public: bool = False
    """Flag."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise DataError(f"--lr {self.lr}: above 0")


def test_execution_fields_stay_out_of_the_identity():
    assert identity(Config(folder="there")) == identity(Config())
    assert identity(Config(names=("a",))) == {
        "lr": 1e-3,
        "refuel": {"eta": 1.0},
        "names": ["a"],
        "public": False,
    }


@dataclass(frozen=True)
class Resolving:
    """Decide by what a setting resolves to."""

    DECIDING: ClassVar[tuple[str, ...]] = ("size",)

    local: int = execution(2)
    """Examples of a process."""
    processes: int = execution(4)
    """Processes."""

    @property
    def size(self) -> int:
        return self.local * self.processes


def test_what_settings_resolve_to_enters_the_identity_in_their_place():
    assert identity(Resolving()) == {"size": 8}
    assert identity(Resolving(local=8, processes=1)) == identity(Resolving())
    assert identity(Resolving(local=8)) == {"size": 32}


def test_hash_ignores_order_and_sees_values():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_underscores_dots_flags_and_aliases():
    argv = ["--rebel.eta", "1e3", "--names", "x", "y", "--public", "--lr=0.5"]
    config = parse(Config, argv, {"--rebel.": "--refuel."})
    assert config == Config(lr=0.5, refuel=Refuel(1000.0), names=("x", "y"), public=True)


def test_an_unknown_flag_is_an_error_that_names_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--lrr", "1"])
    assert stopped.value.code == 2
    assert "--lrr" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DataError("no such repo"), EngineError("server gone")])
def test_errors_that_a_user_can_mend_are_one_line(error, capsys, monkeypatch):
    def main(config: Config) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(SystemExit) as stopped:
        run(main, Config)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(config: Config) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("sys.argv", ["stage"])
    with pytest.raises(KeyError):
        run(main, Config)


def test_a_config_that_refuses_itself_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage", "--lr", "-1"])
    with pytest.raises(SystemExit) as stopped:
        run(lambda config: None, Config)
    assert stopped.value.code == 2
    assert "--lr -1.0: above 0" in capsys.readouterr().err
