"""Write the lists of images of benchmark data sets, or of own folders, in AA-CLIP's JSON lines.

    python -m dataset.metadata VisA MVTec --data_root DIR
    python -m dataset.metadata demo_train demo_test --data_root DIR
    python -m dataset.metadata DIR/hazelnut_toy
    python -m dataset.metadata DIR/bolt --normal_dir train --normal_test_dir fine --abnormal_dir bent --mask_dir where

Each goes into <folder of the data set>/full-shot.jsonl, or, where that cannot be written, into
dataset/metadata/<name>/full-shot.jsonl. The demo's sets are rendered with theirs. Training and testing do the same for
a benchmark data set that has none. A list that is there already is kept, unless --overwrite says otherwise; rendered
sets always are.

A folder is given by its path (a word with a path separator), as to test.py. Its tree is understood as there, anomalib's
among others; where names do not tell, the arguments of anomalib's Folder do.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from dataset.anomalib_folder import folder_records
from dataset.commands import make_parser, name_argument, run_command, show
from dataset.constants import DATA_SETS
from dataset.demo.build import DEMO_SETS
from dataset.prepare import prepare, write_metadata
from dataset.records import Record, check_paths, read_records
from dataset.sets import Place, count_images, find_dataset, is_list, is_path, read_place

NAMES = [name for name, info in DATA_SETS.items() if info.layout or name in DEMO_SETS]
# Arguments of anomalib's Folder, and what lies there.
FOLDERS = {
    "normal_dir": "good images; of the test, unless there is --normal_test_dir",
    "abnormal_dir": "anomalous images",
    "normal_test_dir": "good images of the test",
    "mask_dir": "the masks of the anomalous images, in their order and with their names",
}


def named_or_folder(text: str) -> str:
    """A known data set, or a folder by its path."""
    name = name_argument(text)
    if name not in NAMES and (not is_path(name) or is_list(name)):
        raise argparse.ArgumentTypeError(
            f"'{name}': expected a folder by its path, as ./NAME, or one of {', '.join(NAMES)}"
        )
    return name


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "names", nargs="+", type=named_or_folder, metavar="NAME", help=f"the path of a folder, or {', '.join(NAMES)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a list that says something else")
    group = parser.add_argument_group("what lies where in one folder, by paths from there, as anomalib's Folder has it")
    for flag, what in FOLDERS.items():
        group.add_argument(f"--{flag}", nargs="+", default=[], metavar="DIR", help=what)
    args = parser.parse_args()
    given = [f"--{flag}" for flag in FOLDERS if getattr(args, flag)]
    if given and (len(args.names) > 1 or not is_path(args.names[0])):
        parser.error(f"{', '.join(given)}: expected the path of one folder before it, found {' '.join(args.names)}")
    return args


def keep(place: Place, records: list[Record], overwrite: bool) -> str:
    """Write the list, unless the same one is there; what was done. Raises ValueError where another would be lost."""
    if place.metadata and not overwrite:
        known, found = set(read_records(place.metadata)), set(records)
        if known == found:
            return f"{place.metadata} says the same"
        where = "official layout, which has" if place.source in DATA_SETS else "folders, which have"
        raise ValueError(
            f"{place.metadata} is another list: {len(known - found)} of its {len(known)} lines are not in the {where} "
            f"{len(found - known)} more. Move it away, or replace it with --overwrite."
        )
    return f"wrote {write_metadata(place, records)}"


def table(source: str, records: list[Record]) -> str:
    """Images of each class, of a known data set beside the published numbers."""
    found, info = count_images(records), DATA_SETS.get(source)
    published = info.counts if info else {}
    lines = [f"  {'class':20}{'normal':>8}{'anomalous':>11}{'   published' if info else ''}"]
    for class_name in dict.fromkeys([*published, *found]):
        here, there = found.get(class_name, (0, 0)), published.get(class_name)
        note = "as published" if here == there else f"DIFFERS: {there[0]} + {there[1]}" if there else "not published"
        lines.append(f"  {class_name:20}{here[0]:>8}{here[1]:>11}{f'   {note}' if info else ''}")
    return "\n".join(lines)


def listed(name: str, args: argparse.Namespace) -> str:
    """List a benchmark data set or a folder of own images; what was done, and its images."""
    place, folders = find_dataset(name, args.data_root), {flag: getattr(args, flag) for flag in FOLDERS}
    info = DATA_SETS.get(place.source)
    if place.note:
        raise ValueError(f"{place.note} Own images need no list.")
    if info and (any(folders.values()) or not info.layout):
        raise ValueError(
            f"{name}: expected a folder of own images, found one that is called as {place.source}, whose layout is "
            "known or which comes with a list. Rename it, if it holds others."
        )
    if any(folders.values()):
        records = folder_records(place.folder, **folders)
        check_paths(records, place.folder, args.follow_links)
    else:
        records = read_place(replace(place, metadata=None), args.follow_links)
    masks = sum(record.mask_path is not None for record in records)
    done = keep(place, records, args.overwrite)
    return f"{name}: {len(records)} images, {masks} masks, {done}\n{table(place.source, records)}"


def rendered(name: str, data_root: Path) -> str:
    """Render a demo set where it is not there; what is there then."""
    prepare(name, data_root)
    place = find_dataset(name, data_root)
    return f"{name}: {len(read_place(place))} images in {place.folder}"


def main() -> int:
    args = parse_arguments()
    for name in args.names:
        show(rendered(name, args.data_root) if name in DEMO_SETS else listed(name, args))
    return 0


if __name__ == "__main__":
    run_command(main)
