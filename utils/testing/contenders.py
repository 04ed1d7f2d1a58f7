"""Which checkpoints are tested, and which of them is compared with which."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dataset.sets import OWN_SUFFIX, DataSet, canonical_name
from model.adapter_cross_attention import CrossAttentionCLIP
from model.config import ModelConfig, model_fields
from utils.checkpoints import Checkpoint, checkpoint_names, checkpoints_of, load_checkpoint
from utils.files import unused_name
from utils.options import completed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Contender:
    """A model under test; `references`: what it is compared with, {"base": ..., "control": ...}; a base: nothing.

    `results`: the folder for files about it, where that is not the checkpoint's own.
    """

    checkpoint: Checkpoint
    model: CrossAttentionCLIP
    name: str
    references: dict[str, "Contender"] = field(default_factory=dict)
    results: Path | None = None

    @property
    def folder(self) -> Path:
        """Where files about it go."""
        return self.results or self.checkpoint.folder

    @property
    def stem(self) -> Path:
        """Where the names of files about it alone begin."""
        return self.folder / self.checkpoint.stem.name

    def was_trained_on(self, data: DataSet) -> bool | str:
        """Whether the model has seen this data set, "unknown" where its base does not tell.

        Own images in a folder that is called as a known set count as that: either may have been trained on there.
        """
        seen = {canonical_name(name) for name in self.checkpoint.seen()}
        known = data.source.removesuffix(OWN_SUFFIX)
        return not seen.isdisjoint((data.source, known)) or ("unknown" if "unknown" in seen else False)


class Wanted(NamedTuple):
    """A checkpoint to test and the identities of what it is compared with, {"base": ..., "control": ...}."""

    checkpoint: Checkpoint
    references: dict[str, str]


def identity(checkpoint: Checkpoint) -> str:
    """The same for two checkpoints of one model: a base is known by its files and how it reads them, in any run."""
    if checkpoint.is_base:
        names = {entry.name for entry in model_fields(extension=True)}
        known = completed(ModelConfig, checkpoint.model or {})
        model = {name: value for name, value in known.items() if name not in names}
        return " ".join([*sorted(checkpoint.base["sha256"].values()), repr(sorted(model.items()))])
    return str(checkpoint.path.resolve())


def load_contenders(
    paths: list[Path],
    controls: list[Path],
    load: Callable[[Checkpoint], CrossAttentionCLIP],
    results: Path | None = None,
) -> list[Contender]:
    """Every checkpoint asked for and what it is compared with, which comes before it.

    `load` makes the models, all on one backbone. `results`: a folder for files about them, in which each run has one of
    its own. Raises what `collect` raises.
    """
    wanted = collect(paths, controls)
    names = checkpoint_names([entry.checkpoint for entry in wanted.values()])
    found: dict[str, Contender] = {}
    folders = [entry.checkpoint.folder.resolve() for entry in wanted.values()]
    taken: set[str] = set()
    places = {folder: results and results / unused_name(folder.name, taken) for folder in dict.fromkeys(folders)}
    for (key, (checkpoint, references)), name in zip(wanted.items(), names, strict=True):
        known = {role: found[other] for role, other in references.items()}
        place = places[checkpoint.folder.resolve()]
        found[key] = Contender(checkpoint, load(checkpoint), name, known, place)
    return list(found.values())


def collect(paths: list[Path], controls: list[Path]) -> dict[str, Wanted]:
    """{identity: ...} of all that is asked for and what it is compared with; references come before what needs them.

    A loop's base is the loop_0.pth beside it; its control the same loop of `controls`, of its own seed where there are
    several. Raises FileNotFoundError where a base is missing, ValueError where no loop has a control.
    """
    found: dict[str, Wanted] = {}
    pool = [checkpoint for path in controls for checkpoint in checkpoints_of(path) if not checkpoint.is_base]

    def add(checkpoint: Checkpoint, control: Checkpoint | None = None) -> str:
        key = identity(checkpoint)
        references = {}
        if not checkpoint.is_base:
            references["base"] = add(load_checkpoint(checkpoint.folder / "loop_0.pth"))
            if control and identity(control) != key:
                references["control"] = add(control)
        known = found.get(key)
        # AA-CLIP's own files of a base hold no calibration, a loop_0.pth of the same base does.
        if known is None or (known.checkpoint.calibration is None and checkpoint.calibration is not None):
            found[key] = Wanted(checkpoint, references)
        return key

    warn_of_extensions(pool)
    for path in paths:
        for checkpoint in checkpoints_of(path):
            add(checkpoint, choose_control(checkpoint, pool))
    if controls and not any("control" in wanted.references for wanted in found.values()):
        loops = sorted({checkpoint.loop for checkpoint in pool})
        raise ValueError(
            f"--control {' '.join(map(str, controls))}: expected other runs with the loops of --ckpt, of the same "
            f"seeds where there are several. Found loops {loops}; none of them goes with a run in --ckpt."
        )
    return found


def warn_of_extensions(controls: list[Checkpoint]) -> None:
    """Say which controls are not longer training alone."""
    for control in controls:
        feedback = (control.training or {}).get("feedback", "off")
        if feedback != "off" or any(control.modules[name] for name in control.modules if "cross" in name):
            what = "it has feedback or cross-attention"
            logger.warning("--control: %s is not longer training alone: %s.", control.path, what)


def choose_control(checkpoint: Checkpoint, controls: list[Checkpoint]) -> Checkpoint | None:
    """The same loop of another run, of the same seed where there are several. Raises ValueError for two of a seed."""
    if not controls or checkpoint.is_base:
        return None
    same = [control for control in controls if control.loop == checkpoint.loop]
    own = [control for control in same if control.seed == checkpoint.seed] if len(same) > 1 else same
    if not own:
        logger.warning("--control: none of its files is loop %d, to compare %s with.", checkpoint.loop, checkpoint.path)
        return None
    if len(own) > 1:
        raise ValueError(f"--control: {len(own)} are loop {own[0].loop} of seed {own[0].seed}.")
    if own[0].seed != checkpoint.seed:
        logger.warning("--control: %s is of another seed than %s.", own[0].path, checkpoint.path)
    return own[0]
