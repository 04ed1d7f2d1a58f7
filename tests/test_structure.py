"""Rules of import that need a running program; `make lint` has the others."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imported", "unwanted"),
    [
        ("predict", ("utils.training", "utils.testing")),
        ("test", ("utils.training",)),
        ("forward_utils_cross_attention", ("utils",)),
        ("utils.judging", ("matplotlib", "utils.report", "utils.testing", "utils.training")),
    ],
)
def test_what_an_import_does_not_load(imported, unwanted):
    program = f"import sys, {imported}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert imported in loaded
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_every_logger_of_the_repository_is_heard():
    program = (
        "import logging, forward_utils_cross_attention as f, utils.logs as logs\n"
        "logs.setup_logging()\n"
        "for name in (f.__name__, 'dataset.sets', 'train', '__main__'):\n"
        "    logging.getLogger(name).info('heard %s', name)\n"
        "logging.getLogger('other').info('not this')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heard = ["forward_utils_cross_attention", "dataset.sets", "train", "__main__"]
    assert [line.split()[-1] for line in done.stderr.splitlines()] == heard
