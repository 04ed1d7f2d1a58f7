"""Open every image and mask of data sets and list what is wrong with them.

    python -m dataset.check VisA MVTec --data_root DIR

Numbers of images that are not the published ones, missing and unreadable files, masks of another size than their
image, masks that are grey around their edges, empty masks of anomalous images, masks of normal images, files of several
pages, images that use few of their 16 bits, images that are not read, and the same image twice: within a data set, in
two of those named (training and test data, say), and in the train and the test split of an MVTec-like tree. Nothing is
written. Exit code 0: nothing found; 1: see the list; 2: no such data set.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from dataset.commands import make_parser, name_argument, run_command, show
from dataset.images import pages, read_image, read_mask_pixels, readers
from dataset.layouts import train_images
from dataset.own import unread
from dataset.records import Record, link_target, read_entries, two_labels
from dataset.sets import Place, count_differences, find_dataset, list_folder, one_sided
from dataset.survey import SeenMask, found_depth, mask_words, pages_words, usual_words


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        type=name_argument,
        metavar="NAME",
        help="known names, folders under --data_root, or paths of folders and lists",
    )
    return parser.parse_args()


@dataclass
class Look:
    """What was seen of one entry: what is wrong, what tells its image from others, its mask, and its pages."""

    problems: list[str] = field(default_factory=list)
    pixels: str | None = None
    mask: SeenMask | None = None
    pages: int = 1


class Finder:
    """Looks at images one by one; what it finds is in `problems`, and how often an image was seen in `places`."""

    def __init__(self, follow_links: bool = False) -> None:
        self.follow_links = follow_links
        self.problems: list[str] = []
        self.places: dict[str, list[Path]] = {}

    def look(self, folder: Path, entry: dict, bits: int) -> Look:
        """One entry, an image with so many bits; safe to run in threads."""
        path, look = folder / entry["image_path"], Look()
        for part in ("image_path", "mask_path"):
            if entry.get(part) and not self.follow_links and (target := link_target(folder, entry[part])):
                look.problems.append(f"link out of the data set's folder: {folder / entry[part]} -> {target}")
                return look
        if not path.is_file():
            look.problems.append(f"missing image: {path}")
            return look
        try:
            image, look.pages = read_image(path, bits), pages(path)
        except ValueError as error:
            look.problems.append(f"unreadable image: {error}")
            return look
        if entry["mask_path"] is not None:
            self.look_at_mask(folder / entry["mask_path"], bool(entry["label"]), image.size, look)
        look.pixels = hashlib.blake2b(image.tobytes(), key=repr(image.size).encode()).hexdigest()
        return look

    def look_at_mask(self, path: Path, anomalous: bool, size: tuple[int, int], look: Look) -> None:
        """The mask of an image of `size` (width, height) in pixels."""
        if not path.exists():
            # Some published lists name masks of normal images that were never there.
            if anomalous:
                look.problems.append(f"missing mask: {path}")
            return
        try:
            found = read_mask_pixels(path)
        except ValueError as error:
            look.problems.append(f"unreadable mask: {error}")
            return
        mask, look.mask = found.defect, SeenMask.of(path.name, found)
        height, width = mask.shape
        if (width, height) != size:
            look.problems.append(f"size mismatch: {path} is {width} x {height}, its image {size[0]} x {size[1]}")
        if anomalous and not mask.any():
            look.problems.append(f"empty mask of an anomalous image: {path}")
        if not anomalous and mask.any():
            look.problems.append(f"mask of a normal image: {path}")

    def run(self, place: Place) -> None:
        """Look at all images of a data set, and at those of the train splits beside it."""
        entries = list(entries_of(place))
        listed = [Record(e["image_path"], int(e["label"]), e["class_name"], e["mask_path"]) for e in entries]
        if not entries:
            self.problems.append(f"no images: {place.name}, {place.metadata or place.folder} names none")
        self.problems += [f"two labels: {path} is called normal and anomalous" for path in two_labels(listed)]
        self.problems += [f"number of images: {place.name}, {line}" for line in count_differences(place.source, listed)]
        if place.note:
            self.problems.append(f"called as another: {place.note}")
        if place.is_own:
            self.problems += [f"not read: {place.name}, {line}" for line in unread(place.folder, listed)]
            self.problems += [f"of one kind: {place.name}, {line}" for line in one_sided(listed)]
        tested = {(place.folder / entry["image_path"]).resolve() for entry in entries}
        for path in train_images(place.folder):
            if path.resolve() not in tested:
                entries.append({"image_path": path.relative_to(place.folder).as_posix(), "label": 0, "mask_path": None})
        depth = found_depth([place.folder / entry["image_path"] for entry in entries])
        bits = depth.bits if depth else 16
        with readers() as pool:
            looked = pool.map(lambda entry: self.look(place.folder, entry, bits), entries)
            bar = tqdm(looked, total=len(entries), desc=place.name, unit="image", disable=None)
            looks = list(bar)
        for entry, look in zip(entries, looks, strict=True):
            self.problems += look.problems
            if look.pixels:
                self.places.setdefault(look.pixels, []).append(place.folder / entry["image_path"])
        words = mask_words([look.mask for look in looks if look.mask])
        self.problems += [f"doubtful masks: {place.name}, {line}" for line in words]
        if several := [entry["image_path"] for entry, look in zip(entries, looks, strict=True) if look.pages > 1]:
            self.problems.append(f"several pages: {place.name}, {pages_words(several)}")
        if depth and depth.usual < depth.bits:
            self.problems.append(f"dark images: {place.name}, {usual_words(depth)}")
        elif depth and depth.bits < 16:
            self.problems.append(
                f"dark images: {place.name}, images of 16 bits have values up to {depth.highest}: {depth.bits} bits"
            )

    def repeated(self) -> list[str]:
        """A line for every image that was seen more than once."""
        return [f"same image: {', '.join(map(str, paths))}" for paths in self.places.values() if len(paths) > 1]


def entries_of(place: Place) -> Iterator[dict]:
    """The lines of the list of a data set as they are, or those its folders give."""
    if place.metadata:
        return read_entries(place.metadata)
    return (asdict(record) for record in list_folder(place))


def main() -> int:
    args = parse_arguments()
    finder = Finder(args.follow_links)
    places = [find_dataset(name, args.data_root) for name in args.names]
    for place in {(place.folder.resolve(), place.metadata): place for place in places}.values():
        finder.run(place)
    problems = finder.problems + finder.repeated()
    show(*problems)
    images = sum(map(len, finder.places.values()))
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)} found; {images} images are readable."
    print(found if problems else f"{images} images, all well.")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
