"""The data sets the program knows, and the prompts: class names, states, templates, domains and folders.

States, templates and the names of the classes are AA-CLIP's (https://github.com/Mwxinnn/AA-CLIP), quoted exactly, odd
spellings included, because base checkpoints were trained with them. A new data set is one more entry of `DATA_SETS`.
"""

from dataclasses import dataclass

NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")
NORMAL_PROMPTS = len(NORMAL_STATES) * len(TEMPLATES)

# Kernel size and sigma, in patches, of the blur on similarity maps at test.
BLUR = {"industrial": (7, 1.0), "medical": (9, 1.5)}


@dataclass(frozen=True)
class DataSetInfo:
    """`folders`: accepted names under the data root, besides the data set's own.

    `classes`: {class: its name in the prompts}, in the published order.
    """

    domain: str
    folders: tuple[str, ...]
    classes: dict[str, str]


DATA_SETS = {
    "Brain": DataSetInfo(
        domain="medical",
        folders=("MedAD/Brain_AD",),
        classes={
            "Brain": "scan",
        },
    ),
    "Liver": DataSetInfo(
        domain="medical",
        folders=("MedAD/Liver_AD",),
        classes={
            "Liver": "scan",
        },
    ),
    "Retina": DataSetInfo(
        domain="medical",
        folders=("MedAD/Retina_RESC_AD",),
        classes={
            "Retina": "scan",
        },
    ),
    "Colon_clinicDB": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-ClinicDB",),
        classes={
            "Colon_clinicDB": "colon endoscopy image",
        },
    ),
    "Colon_colonDB": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-ColonDB",),
        classes={
            "Colon_colonDB": "colon endoscopy image",
        },
    ),
    "Colon_Kvasir": DataSetInfo(
        domain="medical",
        folders=("Colon/Kvasir",),
        classes={
            "Kvasir": "colon endoscopy image",
        },
    ),
    "Colon_cvc300": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-300",),
        classes={
            "CVC-300": "colon endoscopy image",
        },
    ),
    "MVTec": DataSetInfo(
        domain="industrial",
        folders=("mvtec_ad",),
        classes={
            "bottle": "dark bottle",
            "cable": "top view of three cables",
            "capsule": "black and orange capsule",
            "carpet": "gray carpet",
            "grid": "metal or plastic mesh",
            "hazelnut": "single brown hazelnut",
            "leather": "brown leather",
            "metal_nut": "metal nut which has four notched edges",
            "pill": "oval white pill with small red speckles and the letters 'FF' engraved",
            "screw": "screw",
            "tile": "speckled tile surface",
            "transistor": "a three-legged transistor placed vertically",
            "toothbrush": "toothbrush head",
            "wood": "wood surface",
            "zipper": "a black zipper",
        },
    ),
    "VisA": DataSetInfo(
        domain="industrial",
        folders=("VisA_20220922",),
        classes={
            "candle": "candle",
            "pcb3": "infrared sensor pcb module",
            "capsules": "capsules",
            "pipe_fryum": "pipe-shaped fryum",
            "pcb4": "battery charging pcb module",
            "macaroni2": "scattered yellow macaroni",
            "pcb2": "integrated circuits board",
            "chewinggum": "chewing gum",
            "macaroni1": "orange macaroni",
            "cashew": "cashew nut",
            "fryum": "wheel-shaped fryum snack",
            "pcb1": "dual ultrasonic distance sensor pcb module",
        },
    ),
    "MPDD": DataSetInfo(
        domain="industrial",
        folders=("MPDD",),
        classes={
            "connector": "metal clamps with black adjustment knobs",
            "tubes": "scattered metal objects",
            "metal_plate": "blue rectangular metal plate with a notch on one side",
            "bracket_white": "white, elongated triangular metal bracket with a smooth, matte finish",
            "bracket_brown": "brown L-shaped metal bracket with smooth, glossy finish and multiple mounting holes along its arms",
            "bracket_black": "black ornamental metal bracket with spiral design attached to a rectangular frame",
        },
    ),
    "BTAD": DataSetInfo(
        domain="industrial",
        folders=("BTech_Dataset_transformed",),
        classes={
            "01": "Bright concentric rings in neon yellow and blue tones against a dark blue background, resembling a stylized wave or energy field radiating outward.",
            "02": "vertical fabric lines in warm, dusty pink and beige tones",
            "03": "oval concentric circular rings in gradient shades of blue and white",
        },
    ),
    "demo_train": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={
            "bolt": "bolt",
            "gear": "gear",
            "coin": "coin",
            "pill": "pill",
            "candle": "candle",
            "circuit_board": "circuit board",
            "cable": "cable",
            "button": "button",
            "wood": "wood",
            "leather": "leather",
            "fabric": "fabric",
            "tile": "tile",
        },
    ),
    "demo_test": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={
            "nut": "nut",
            "capsule": "capsule",
            "chip": "chip",
            "bottle_top": "bottle top",
            "key": "key",
            "cookie": "cookie",
            "battery": "battery",
            "spring": "spring",
            "mesh": "mesh",
            "carpet": "carpet",
            "marble": "marble",
            "cork": "cork",
        },
    ),
    "mtd": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={"magnetic_tile": "magnetic tile surface"},
    ),
    "bsdata": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={"ball_screw": "metal ball screw drive"},
    ),
}


def class_prompts(description: str) -> list[str]:
    """The prompts of a class: the normal ones first (3 states x 2 templates), then the abnormal ones (5 x 2)."""
    return [
        template.format(state.format(description))
        for states in (NORMAL_STATES, ABNORMAL_STATES)
        for state in states
        for template in TEMPLATES
    ]


def describe_class(dataset: str, class_name: str) -> tuple[str, bool]:
    """Name of `class_name` in the prompts, and whether it is a given one rather than the class's own."""
    info = DATA_SETS.get(dataset)
    if info and class_name in info.classes:
        return info.classes[class_name], True
    return class_name.replace("_", " "), class_name == "object"
