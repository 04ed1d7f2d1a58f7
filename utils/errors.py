"""How a training ends before it is done."""


class TrainingError(RuntimeError):
    """Training failed; the last saved state is intact."""


class TrainingStoppedError(TrainingError):
    """Training was stopped by a signal; its state is saved."""
