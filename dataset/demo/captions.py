"""Captions of rendered images, as data: what they say, their wordings, and of which images they are true."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.constants import ABNORMAL_STATES, DATA_SETS, NORMAL_STATES, TEMPLATES
from dataset.demo.defects import DEFECTS
from dataset.demo.drawing import PALETTE
from dataset.demo.products import PRODUCTS

CATEGORIES, COLOURS, KINDS = list(PRODUCTS), list(PALETTE), list(DEFECTS)
TRAIN, DEV, TEST = (
    [CATEGORIES.index(name) for name in DATA_SETS[data_set].classes]
    for data_set in ("demo_train", "demo_dev", "demo_test")
)
# Conditions of an image; kinds of defect count from DAMAGED on. UNKNOWN: captions must not speak of it.
UNKNOWN, INTACT, DAMAGED = -1, 0, 1
# What a caption says of the condition: nothing, a word for either, or the kind of defect (from NAMED on).
SILENT, SAYS_INTACT, SAYS_DAMAGED, NAMED = 0, 1, 2, 3

INTACT_STATES = ("an intact {}", "a flawless {}", "a perfect {}", "a {} without defect")
ANY_PRODUCT = ("object", "product", "item")


@dataclass(frozen=True)
class Caption:
    """What a caption says: `category` and `colour` by number, None where it does not; `says` of the condition."""

    category: int | None
    colour: int | None
    says: int

    def words(self, rng: np.random.Generator) -> str:
        """One of its wordings; the family is that of AA-CLIP's prompts."""
        name = rng.choice(ANY_PRODUCT) if self.category is None else CATEGORIES[self.category].replace("_", " ")
        if self.colour is not None:
            name = f"{COLOURS[self.colour]} {name}"
        if self.says >= NAMED:
            kind = KINDS[self.says - NAMED]
            states: tuple[str, ...] = (f"a {{}} with {kind}", f"a {{}} with a {kind}")
        else:
            states = (NORMAL_STATES, INTACT_STATES, ABNORMAL_STATES)[self.says]
        return str(rng.choice(TEMPLATES)).format(str(rng.choice(states)).format(name))


def draw_captions(category: Tensor, colour: Tensor, condition: Tensor, rng: np.random.Generator) -> list[Caption]:
    """Captions for a batch: every category's bare name, one about each image, and with each that speaks of the
    condition its opposite as a hard negative."""
    captions = {Caption(number, None, SILENT): None for number in range(len(CATEGORIES))}
    for kind, tone, state in zip(category.tolist(), colour.tolist(), condition.tolist(), strict=True):
        says = SILENT
        if state != UNKNOWN and rng.random() < 0.8:
            says = SAYS_INTACT if state == INTACT else SAYS_DAMAGED if rng.random() < 0.6 else NAMED + state - DAMAGED
        about = None if says != SILENT and rng.random() < 0.25 else kind
        shade = tone if rng.random() < 0.35 else None
        captions[Caption(about, shade, says)] = None
        if says != SILENT:
            captions[Caption(about, shade, SAYS_DAMAGED if says == SAYS_INTACT else SAYS_INTACT)] = None
    return list(captions)


def truth(captions: list[Caption], category: Tensor, colour: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Which captions are true of which images, and of which that is known, two of [B, captions]."""

    def column(name: str) -> Tensor:
        values = [getattr(caption, name) for caption in captions]
        return torch.tensor([-1 if value is None else value for value in values])

    about, shade, says = column("category"), column("colour"), column("says")
    same = ((about == -1) | (category[:, None] == about)) & ((shade == -1) | (colour[:, None] == shade))
    state = condition[:, None]
    fits = (
        (says == SILENT)
        | ((says == SAYS_INTACT) & (state == INTACT))
        | ((says == SAYS_DAMAGED) & (state >= DAMAGED))
        | ((says >= NAMED) & (state - DAMAGED == says - NAMED))
    )
    # A caption about the condition is false anyway where category or colour differ.
    known = (says == SILENT) | (state != UNKNOWN) | ~same
    return same & fits, known
