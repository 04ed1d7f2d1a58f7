"""Write the lists of images of benchmark data sets from their official downloads, in AA-CLIP's JSON lines.

    python -m dataset.metadata VisA MVTec --data_root DIR
    python -m dataset.metadata demo_train demo_test --data_root DIR

Each goes into <folder of the data set>/full-shot.jsonl, or, where that cannot be written, into
dataset/metadata/<name>/full-shot.jsonl. The demo's sets are rendered with theirs. Training and testing do the same for
a data set that has none. A list that is there already is kept, unless --overwrite says otherwise; rendered sets always
are.
"""

import argparse
from pathlib import Path

from dataset.commands import make_parser, run_command, show
from dataset.constants import DATA_SETS
from dataset.demo.build import DEMO_SETS
from dataset.prepare import prepare, write_metadata
from dataset.records import Record, check_paths, read_records
from dataset.sets import Place, count_images, find_dataset, list_folder, read_place


def parse_arguments() -> argparse.Namespace:
    names = [name for name, info in DATA_SETS.items() if info.layout or name in DEMO_SETS]
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--overwrite", action="store_true", help="replace a list that says something else")
    return parser.parse_args()


def keep(place: Place, records: list[Record], overwrite: bool) -> str:
    """Write the list, unless the same one is there; what was done. Raises ValueError where another would be lost."""
    if place.metadata and not overwrite:
        known, found = set(read_records(place.metadata)), set(records)
        if known == found:
            return f"{place.metadata} says the same"
        raise ValueError(
            f"{place.metadata} is another list: {len(known - found)} of its {len(known)} lines are not in the official "
            f"layout, which has {len(found - known)} more. Move it away, or replace it with --overwrite."
        )
    return f"wrote {write_metadata(place, records)}"


def table(name: str, records: list[Record]) -> str:
    """Images of each class, beside the published numbers."""
    found, published = count_images(records), DATA_SETS[name].counts
    lines = [f"  {'class':20}{'normal':>8}{'anomalous':>11}   published"]
    for class_name in dict.fromkeys([*published, *found]):
        here, there = found.get(class_name, (0, 0)), published.get(class_name)
        note = "as published" if here == there else f"DIFFERS: {there[0]} + {there[1]}" if there else "not published"
        lines.append(f"  {class_name:20}{here[0]:>8}{here[1]:>11}   {note}")
    return "\n".join(lines)


def listed(name: str, data_root: Path, overwrite: bool, follow_links: bool) -> str:
    """List a benchmark data set; what was done, and its images."""
    place = find_dataset(name, data_root)
    if place.note:
        raise ValueError(f"{place.note} Own images need no list.")
    records = list_folder(place)
    check_paths(records, place.folder, follow_links)
    return f"{name}: {len(records)} images, {keep(place, records, overwrite)}\n{table(name, records)}"


def rendered(name: str, data_root: Path) -> str:
    """Render a demo set where it is not there; what is there then."""
    prepare(name, data_root)
    place = find_dataset(name, data_root)
    return f"{name}: {len(read_place(place))} images in {place.folder}"


def main() -> int:
    args = parse_arguments()
    for name in args.names:
        show(
            rendered(name, args.data_root)
            if name in DEMO_SETS
            else listed(name, args.data_root, args.overwrite, args.follow_links)
        )
    return 0


if __name__ == "__main__":
    run_command(main)
