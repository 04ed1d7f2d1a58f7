"""The data sets the program knows, and the prompts: class names, states, templates, domains and folders.

States, templates and the names of the classes are AA-CLIP's (https://github.com/Mwxinnn/AA-CLIP), quoted exactly, odd
spellings included, because base checkpoints were trained with them. A new data set is one more entry of `DATA_SETS`.
"""

from dataclasses import dataclass, field

NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")
NORMAL_PROMPTS = len(NORMAL_STATES) * len(TEMPLATES)

# Kernel size and sigma, in patches, of the blur on similarity maps at test.
BLUR = {"industrial": (7, 1.0), "medical": (9, 1.5)}


@dataclass(frozen=True)
class DataSetInfo:
    """`folders`: accepted names under the data root, besides the data set's own.

    `classes`: {class: its name in the prompts}, in the published order. `layout`: how the official download lies on
    disk, a name of `dataset.layouts.LAYOUTS`, or "own" (`dataset.own`). `counts`: {class: (normal, anomalous) images} of AA-CLIP's split of it.
    `reported`: {metric: percent} that AA-CLIP's authors report for their base trained on VisA (epoch 15 of 20).
    """

    domain: str
    folders: tuple[str, ...]
    classes: dict[str, str]
    layout: str | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)


def _reported(pixel_auroc: float, pixel_ap: float, image_auroc: float, image_ap: float) -> dict[str, float]:
    return {"pixel_auroc": pixel_auroc, "pixel_ap": pixel_ap, "image_auroc": image_auroc, "image_ap": image_ap}


def _plain(*classes: str) -> dict[str, str]:
    """Classes that are called as they are, underscores as spaces."""
    return {name: name.replace("_", " ") for name in classes}


def _rendered(*classes: str) -> DataSetInfo:
    """A set of the demo."""
    return DataSetInfo("industrial", (), _plain(*classes))


DATA_SETS = {
    "Brain": DataSetInfo(
        domain="medical",
        folders=("MedAD/Brain_AD", "Brain_AD"),
        classes={
            "Brain": "scan",
        },
        layout="good_ungood",
        counts={"Brain": (640, 3075)},
        reported=_reported(95.72, 44.91, 79.26, 94.41),
    ),
    "Liver": DataSetInfo(
        domain="medical",
        folders=("MedAD/Liver_AD", "Liver_AD"),
        classes={
            "Liver": "scan",
        },
        layout="good_ungood",
        counts={"Liver": (833, 660)},
    ),
    "Retina": DataSetInfo(
        domain="medical",
        folders=("MedAD/Retina_RESC_AD", "Retina_RESC_AD"),
        classes={
            "Retina": "scan",
        },
        layout="good_ungood",
        counts={"Retina": (1041, 764)},
    ),
    "Colon_clinicDB": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-ClinicDB",),
        classes={
            "Colon_clinicDB": "colon endoscopy image",
        },
        layout="images_masks",
        counts={"Colon_clinicDB": (0, 612)},
    ),
    "Colon_colonDB": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-ColonDB",),
        classes={
            "Colon_colonDB": "colon endoscopy image",
        },
        layout="images_masks",
        counts={"Colon_colonDB": (0, 380)},
    ),
    "Colon_Kvasir": DataSetInfo(
        domain="medical",
        folders=("Colon/Kvasir", "Kvasir-SEG", "Colon/Kvasir-SEG"),
        classes={
            "Kvasir": "colon endoscopy image",
        },
        layout="images_masks",
        counts={"Kvasir": (0, 1000)},
    ),
    "Colon_cvc300": DataSetInfo(
        domain="medical",
        folders=("Colon/CVC-300",),
        classes={
            "CVC-300": "colon endoscopy image",
        },
        layout="images_masks",
        counts={"CVC-300": (0, 60)},
    ),
    "MVTec": DataSetInfo(
        domain="industrial",
        folders=("mvtec_ad", "mvtec_anomaly_detection", "MVTecAD"),
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
        layout="mvtec",
        counts={
            "bottle": (20, 63),
            "cable": (58, 92),
            "capsule": (23, 109),
            "carpet": (28, 89),
            "grid": (21, 57),
            "hazelnut": (40, 70),
            "leather": (32, 92),
            "metal_nut": (22, 93),
            "pill": (26, 141),
            "screw": (41, 119),
            "tile": (33, 84),
            "transistor": (60, 40),
            "toothbrush": (12, 30),
            "wood": (19, 60),
            "zipper": (32, 119),
        },
        reported=_reported(91.88, 45.27, 90.47, 95.39),
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
        layout="visa",
        counts={
            "candle": (100, 100),
            "pcb3": (101, 100),
            "capsules": (60, 100),
            "pipe_fryum": (50, 100),
            "pcb4": (101, 100),
            "macaroni2": (100, 100),
            "pcb2": (100, 100),
            "chewinggum": (50, 100),
            "macaroni1": (100, 100),
            "cashew": (50, 100),
            "fryum": (50, 100),
            "pcb1": (100, 100),
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
        layout="mvtec",
        counts={
            "connector": (30, 14),
            "tubes": (32, 69),
            "metal_plate": (26, 71),
            "bracket_white": (30, 30),
            "bracket_brown": (26, 51),
            "bracket_black": (32, 47),
        },
        reported=_reported(96.62, 26.81, 77.46, 80.58),
    ),
    "BTAD": DataSetInfo(
        domain="industrial",
        folders=("BTech_Dataset_transformed", "BTech"),
        classes={
            "01": "Bright concentric rings in neon yellow and blue tones against a dark blue background, resembling a stylized wave or energy field radiating outward.",
            "02": "vertical fabric lines in warm, dusty pink and beige tones",
            "03": "oval concentric circular rings in gradient shades of blue and white",
        },
        layout="mvtec",
        counts={"01": (21, 49), "02": (30, 200), "03": (400, 41)},
        reported=_reported(97.01, 52.80, 94.32, 96.74),
    ),
    "MVTec-LOCO": DataSetInfo(
        domain="industrial",
        folders=("mvtec_loco_anomaly_detection", "mvtec_loco", "MVTecLOCO"),
        classes=_plain("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
        layout="mvtec",
        counts={
            "breakfast_box": (102, 173),
            "juice_bottle": (94, 236),
            "pushpins": (138, 172),
            "screw_bag": (122, 219),
            "splicing_connectors": (119, 193),
        },
    ),
    "MVTec-3D": DataSetInfo(
        domain="industrial",
        folders=("mvtec_3d_anomaly_detection", "mvtec_3d", "MVTec-3D-AD"),
        classes=_plain("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire"),
        layout="own",
        counts={
            "bagel": (22, 88),
            "cable_gland": (21, 87),
            "carrot": (27, 132),
            "cookie": (28, 103),
            "dowel": (26, 104),
            "foam": (20, 80),
            "peach": (26, 106),
            "potato": (22, 92),
            "rope": (32, 69),
            "tire": (25, 87),
        },
    ),
    "MVTec-AD-2": DataSetInfo(
        domain="industrial",
        folders=("mvtec_ad_2", "MVTecAD2"),
        classes=_plain("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
        layout="own",
        counts={
            "can": (72, 90),
            "fabric": (66, 90),
            "fruit_jelly": (20, 60),
            "rice": (42, 90),
            "sheet_metal": (24, 90),
            "vial": (35, 105),
            "wallplugs": (60, 90),
            "walnuts": (60, 90),
        },
    ),
    "KSDD2": DataSetInfo(
        domain="industrial",
        folders=("KolektorSDD2",),
        classes={
            "KSDD2": "metal surface",
        },
        layout="own",
        counts={
            "KSDD2": (894, 110),
        },
    ),
    "DAGM": DataSetInfo(
        domain="industrial",
        folders=("DAGM_KaggleUpload", "DAGM2007"),
        classes={f"Class{number}": "textured surface" for number in range(1, 11)},
        layout="own",
    ),
    "GoodsAD": DataSetInfo(
        domain="industrial",
        folders=(),
        classes=_plain("cigarette_box", "drink_bottle", "drink_can", "food_bottle", "food_box", "food_package"),
        layout="mvtec",
        counts={
            "cigarette_box": (183, 246),
            "drink_bottle": (356, 425),
            "drink_can": (147, 147),
            "food_bottle": (243, 361),
            "food_box": (146, 251),
            "food_package": (253, 230),
        },
    ),
    "Real-IAD": DataSetInfo(
        domain="industrial",
        folders=("realiad", "Real_IAD"),
        classes=_plain(
            "audiojack",
            "bottle_cap",
            "button_battery",
            "end_cap",
            "eraser",
            "fire_hood",
            "mint",
            "mounts",
            "pcb",
            "phone_battery",
            "plastic_nut",
            "plastic_plug",
            "porcelain_doll",
            "regulator",
            "rolled_strip_base",
            "sim_card_set",
            "switch",
            "tape",
            "terminalblock",
            "toothbrush",
            "toy",
            "toy_brick",
            "transistor1",
            "u_block",
            "usb",
            "usb_adaptor",
            "vcpill",
            "wooden_beads",
            "woodstick",
            "zipper",
        ),
        layout="real_iad",
    ),
    "demo_train": _rendered(
        "bolt",
        "gear",
        "coin",
        "pill",
        "candle",
        "circuit_board",
        "cable",
        "button",
        "wood",
        "leather",
        "fabric",
        "tile",
    ),
    "demo_dev": _rendered(
        "bearing",
        "ruler",
        "comb",
        "zipper",
        "plate",
        "propeller",
        "padlock",
        "plug",
        "brick",
        "gravel",
        "bamboo",
        "denim",
    ),
    "demo_test": _rendered(
        "nut", "capsule", "chip", "bottle_top", "key", "cookie", "battery", "spring", "mesh", "carpet", "marble", "cork"
    ),
    "mtd": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={"magnetic_tile": "magnetic tile surface"},
        layout="mvtec",
        counts={"magnetic_tile": (400, 388)},
    ),
    "bsdata": DataSetInfo(
        domain="industrial",
        folders=(),
        classes={"ball_screw": "metal ball screw drive"},
        layout="mvtec",
        counts={"ball_screw": (145, 145)},
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
