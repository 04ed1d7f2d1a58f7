"""How PyTorch's threads wait for each other: decided before PyTorch is imported, which reads it once.

Between two steps of a computation a thread waits for the others by spinning, which is fastest where nothing else runs.
Beside another program the ones that spin take the processor from the one that they wait for, and all crawl. So where
other programs are busy, the threads of this process sleep instead. Scripts import this module before all others; what
the user has set stays (https://gcc.gnu.org/onlinedocs/libgomp/Environment-Variables.html).
"""

import os
import sys

import psutil

WAIT_POLICY = "OMP_WAIT_POLICY"
# With any of these the user has decided.
DECIDED = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Seconds to look at what else runs, and processors that are busy from which on threads sleep.
LOOK, BUSY = 0.1, 0.5


def busy_processors() -> float:
    """Processors that are busy now, of those that this process may use; call it while it has nothing to do."""
    shares = psutil.cpu_percent(LOOK, percpu=True)
    own = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else range(len(shares))
    return sum(shares[number] for number in own if number < len(shares)) / 100


def let_threads_sleep() -> None:
    """Have threads sleep while they wait, where other programs are busy and the user has not decided."""
    if "torch" not in sys.modules and not any(name in os.environ for name in DECIDED) and busy_processors() > BUSY:
        os.environ[WAIT_POLICY] = "PASSIVE"


let_threads_sleep()
