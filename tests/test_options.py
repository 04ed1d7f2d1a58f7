"""Fields to flags: what a flag takes, and that each is read."""

import argparse
import re
from dataclasses import dataclass, field, fields

import pytest

from model.adapter_cross_attention import STAGES
from model.config import REPOSITORY, ModelConfig
from utils.options import add_fields, completed, flag_fields
from utils.settings import Settings


def about(**described) -> dict:
    return {"help": "something", "group": "one", **described}


@dataclass
class Example:
    rate: float = field(default=0.5, metadata=about(least=0))
    epochs: list[int] = field(default_factory=lambda: [5, 3], metadata=about(least=1, added=True))
    size: int | None = field(default=None, metadata=about(least=2))
    attends: bool = field(default=True, metadata=about(flag="no_attention"))
    inner: int = 7


def parse(*words: str, **options) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_fields(parser, Example, flag_fields(Example), **options)
    return parser.parse_args(words)


def test_types_and_defaults_are_those_of_the_fields():
    assert vars(parse()) == {"rate": 0.5, "epochs": [5, 3], "size": None, "attends": True}
    given = parse("--rate", "0.25", "--epochs", "1", "2", "--size", "4", "--no_attention")
    assert vars(given) == {"rate": 0.25, "epochs": [1, 2], "size": 4, "attends": False}
    assert parse(defaults={"epochs": [20]}, several=False).epochs == [20]
    assert parse("--epochs", "9", several=False).epochs == [9]
    assert set(vars(parse(keep_open="nothing")).values()) == {None}


@pytest.mark.parametrize("words", [("--rate", "-1"), ("--rate", "nan"), ("--epochs", "0"), ("--size", "1")])
def test_limits_are_kept(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert "expected" in capsys.readouterr().err


def test_a_description_that_is_not_understood_is_refused():
    @dataclass
    class Misspelt:
        rate: float = field(default=0.5, metadata=about(lest=0))

    with pytest.raises(TypeError, match="a flag has no lest"):
        add_fields(argparse.ArgumentParser(), Misspelt, flag_fields(Misspelt))


def test_records_are_completed_by_what_was_added():
    assert completed(Example, {"rate": 1.0}) == {"rate": 1.0, "epochs": [5, 3]}
    assert completed(Example, {"epochs": [1]}) == {"epochs": [1]}


@pytest.mark.parametrize(
    ("kind", "names", "folders"),
    [(Settings, "settings", ("utils",)), (ModelConfig, "config", ("utils", "model"))],
)
def test_every_field_is_a_flag_and_is_read(kind, names, folders):
    assert [entry.name for entry in flag_fields(kind)] == [entry.name for entry in fields(kind)]
    sources = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    sources.append(REPOSITORY / "forward_utils_cross_attention.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(re.findall(rf"\b{names}\.(\w+)", text))
    # Those of a stage are read by its name.
    read |= {
        f"{stage}{ending}" for stage in STAGES for ending in re.findall(rf'getattr\({names}, f"{{name}}(\w+)"\)', text)
    }
    assert {entry.name for entry in fields(kind)} - read == set()
