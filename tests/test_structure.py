"""Rules of import that need a running program; `make lint` has the others."""

import json
import subprocess
import sys

import pytest

# What runs an exported model.
WITHOUT_PYTORCH = [("predict", ["torch", "open_clip", "utils.judging", "utils.testing", "utils.training"])]
# (module, what it and all before it must not have loaded), in the order of importing.
RULES = [
    ("forward_utils_cross_attention", ["utils"]),
    ("utils.judging", ["matplotlib", "utils.report", "utils.testing", "utils.training"]),
    ("test", ["utils.training"]),
]


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("rules", [WITHOUT_PYTORCH, RULES], ids=["exported", "trained"])
def test_what_an_import_does_not_load(rules):
    program = (
        "import importlib, json, sys\n"
        f"for name, _ in {rules!r}:\n"
        "    importlib.import_module(name)\n"
        "    print(json.dumps(list(sys.modules)))\n"
    )
    for (name, unwanted), line in zip(rules, run(program).stdout.splitlines(), strict=True):
        loaded = json.loads(line)
        assert name in loaded
        assert not [module for module in loaded if module.startswith(tuple(unwanted))], name


def test_every_logger_of_the_repository_is_heard():
    heard = ["forward_utils_cross_attention", "dataset.sets", "train", "__main__"]
    program = (
        "import logging, utils.logs as logs\n"
        "logs.setup_logging()\n"
        f"for name in {heard!r}:\n"
        "    logging.getLogger(name).info('heard %s', name)\n"
        "logging.getLogger('other').info('not this')\n"
    )
    assert [line.split()[-1] for line in run(program).stderr.splitlines()] == heard
