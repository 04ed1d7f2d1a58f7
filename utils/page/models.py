"""The models of a page, which of them is whose base, and the prompts of what people type."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from dataset.constants import DATA_SETS, describe_class
from dataset.records import check_class
from forward_utils_cross_attention import ClassText, PromptBank
from utils.checkpoints import Checkpoint, checkpoints_of, load_checkpoint
from utils.judging import Detector, load_detectors
from utils.models import ModelLoader

# What photographs show until someone says it; of any, CLIP knows the word.
ANYTHING = "object"
# Classes whose prompts are kept.
KEPT = 16


class PageModels:
    """Trained models on one backbone, each beside its base.

    `detectors`: {name: model}, `bases`: {name: the name of its base}, which of a base is its own. Raises
    FileNotFoundError or ValueError that say what was expected, also where a loop has no loop_0.pth beside it.
    """

    def __init__(self, paths: Sequence[Path], domain: str, loader: ModelLoader, precision: str):
        checkpoints, base_of = with_bases(paths)
        detectors = load_detectors(checkpoints, [ANYTHING], domain, loader, precision)
        self.backbone, self.domain = loader.backbone, domain
        self._bank = lru_cache(KEPT)(self._new_bank)
        self.detectors = {detector.name: detector for detector in detectors}
        self.bases = {detector.name: detectors[base].name for detector, base in zip(detectors, base_of, strict=True)}

    def pair(self, name: str, class_name: str) -> dict[str, Detector]:
        """{what it is: the model} of the base of the model `name` and of it, which may be one, for images of a class.

        Raises ValueError for a class that cannot stand in a prompt.
        """
        check_class(class_name, "What they show")
        bank, base, chosen = self._bank(class_name), self.detectors[self.bases[name]], self.detectors[name]
        pair = {"base": base}
        if chosen is not base:
            pair["extended" if chosen.model.cross_attentions() else "longer base"] = chosen
        return {
            role: replace(detector, text=ClassText(detector.model, bank, fixed=True)) for role, detector in pair.items()
        }

    def unknown_words(self, class_name: str) -> list[str]:
        """The words of a class that this CLIP was never trained on."""
        return self.backbone.unknown_words(describe_class("", class_name)[0])

    def _new_bank(self, class_name: str) -> PromptBank:
        return PromptBank(self.backbone, {class_name: describe_class("", class_name)[0]}, self.domain)


def with_bases(paths: Sequence[Path]) -> tuple[list[Checkpoint], list[int]]:
    """The checkpoints that paths name, each once, with the loop_0.pth beside each loop; of each, where its base is."""
    found: dict[Path, Checkpoint] = {}
    for checkpoint in (checkpoint for path in paths for checkpoint in checkpoints_of(path)):
        if not checkpoint.is_base:
            base = checkpoint.folder / "loop_0.pth"
            found.setdefault(base.resolve(), load_checkpoint(base))
        found.setdefault(checkpoint.path.resolve(), checkpoint)
    places = list(found)
    base_of = [
        places.index(path if checkpoint.is_base else path.with_name("loop_0.pth")) for path, checkpoint in found.items()
    ]
    return list(found.values()), base_of


def known_classes(domain: str) -> list[str]:
    """What people may choose: any object, then what known data sets of a domain show, the demo's first."""
    sets = sorted(DATA_SETS, key=lambda name: not name.startswith("demo_test"))
    known = [words for name in sets if DATA_SETS[name].domain == domain for words in DATA_SETS[name].classes.values()]
    return list(dict.fromkeys((ANYTHING, *known)))
