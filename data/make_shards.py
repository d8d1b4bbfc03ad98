"""Images to WebDataset shards with a manifest.

    python -m data.make_shards fashion-mnist --out datasets/fashion-mnist
    python -m data.make_shards digits --out datasets/digits
    python -m data.make_shards imagefolder photos/ --out datasets/photos
    python -m data.make_shards imagefolder ILSVRC/train --out datasets/imagenet
    python -m data.make_shards imagefolder ILSVRC/val --split val --labels LOC_val_solution.csv --out datasets/imagenet
    python -m data.make_shards inat2018 --root inat/ --train train2018.json --val val2018.json --out datasets/inat2018
    python -m data.make_shards csv list.csv --root photos/ --label-column species --out datasets/species
    python -m data.make_shards lt datasets/imagenet --imbalance 100 --out datasets/imagenet-lt

A second run keeps the shards that are complete. Images are shuffled before they are written; broken ones and
duplicates are left out and counted. `--keep-duplicates` keeps the latter: a benchmark's validation set is judged whole.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

from data.digits import DigitsSource
from data.fashion_mnist import SPLITS, FashionMnistSource, fetch
from data.image_sources import FileSource, ImageFile, list_csv, list_image_folder, list_inaturalist
from data.shard_writing import ImageSource, Rejected, write_split
from data.shards import MANIFEST_NAME, DataError, Manifest, load_manifest, split_names
from data.subsets import write_long_tail


def main(arguments: list[str] | None = None) -> int:
    """Writes the shards that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    # What goes on is told on stdout; stderr holds the progress bar, or the one line of a mistake.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        _check_options(options)
        options.run(options)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the shards that are missing", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fashion = commands.add_parser("fashion-mnist", help="fetch Fashion-MNIST and write its two splits")
    fashion.add_argument(
        "--cache", default="datasets/downloads/fashion-mnist", help="where fetched files are kept"
    )
    fashion.set_defaults(run=_make_fashion_mnist)
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 digits, for a look in seconds")
    digits.set_defaults(run=_make_digits)
    folder = commands.add_parser("imagefolder", help="a folder of class folders, or of images")
    folder.add_argument("root", help="the folder")
    folder.add_argument("--split", default="train")
    folder.add_argument("--labels", default="", help="file of lines 'file name, class' for a flat folder")
    folder.set_defaults(run=_make_image_folder)
    table = commands.add_parser("csv", help="images that a CSV file with a header lists")
    table.add_argument("path", help="the CSV file")
    table.add_argument("--root", default=".", help="folder to which its paths are relative")
    table.add_argument("--split", default="train")
    table.add_argument("--image-column", default="path")
    table.add_argument("--label-column", default="", help="empty: images without labels")
    table.set_defaults(run=_make_csv)
    inat = commands.add_parser("inat2018", help="iNaturalist's official JSON files and image tree")
    inat.add_argument("--root", required=True, help="folder to which file_name is relative")
    inat.add_argument("--train", required=True, help="train2018.json")
    inat.add_argument("--val", required=True, help="val2018.json")
    inat.add_argument("--categories", default="", help="categories.json with the taxonomy")
    inat.set_defaults(run=_make_inat)
    tail = commands.add_parser("lt", help="a long-tailed sub-sample of a set, without copying images")
    tail.add_argument("shards", help="folder of the whole set")
    tail.add_argument("--split", default="train", help="the split to thin out; the others are kept whole")
    tail.add_argument(
        "--imbalance", type=float, default=100.0, help="largest class over smallest, 10 to 1,000"
    )
    tail.add_argument("--out", required=True)
    tail.add_argument("--seed", type=int, default=0)
    tail.set_defaults(run=_make_long_tail)
    for command in (fashion, digits, folder, table, inat):
        _add_common_options(command)
    for command in (folder, table, inat):
        help_text = "resize images whose shorter side is longer than this; 0 keeps the bytes of all"
        command.add_argument("--max-side", type=int, default=0, help=help_text)
        command.add_argument(
            "--keep-duplicates", action="store_true", help="write images that occur twice twice"
        )
    return parser.parse_args(arguments)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for the shards and manifest.json")
    parser.add_argument("--samples-per-shard", type=int, default=1500)
    parser.add_argument("--shard-mib", type=int, default=256, help="most mebibytes of images in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before writing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)


def _check_options(options: argparse.Namespace) -> None:
    """Raises DataError for the first number that cannot work."""
    least = {"samples_per_shard": 1, "shard_mib": 1, "processes": 1, "max_side": 0, "imbalance": 1}
    for name, lowest in least.items():
        value = getattr(options, name, lowest)
        if not value >= lowest:
            flag = "--" + name.replace("_", "-")
            raise DataError(f"{flag} is {value}; expected at least {lowest}; set {flag}")


def _source(listed: tuple[list[ImageFile], tuple[str, ...]], options: argparse.Namespace) -> FileSource:
    files, classes = listed
    return FileSource(files, classes, max_side=options.max_side, drops_duplicates=not options.keep_duplicates)


def _make_fashion_mnist(options: argparse.Namespace) -> None:
    folder = fetch(options.cache)
    for split in SPLITS:
        _write(FashionMnistSource(folder, split), split, options)


def _make_digits(options: argparse.Namespace) -> None:
    for split in SPLITS:
        _write(DigitsSource(split), split, options)


def _make_image_folder(options: argparse.Namespace) -> None:
    known = _known_classes(options.out, options.split)
    listed = list_image_folder(options.root, labels_path=options.labels, known_classes=known)
    _write(_source(listed, options), options.split, options)


def _make_csv(options: argparse.Namespace) -> None:
    listed = list_csv(
        options.path,
        root=options.root,
        image_column=options.image_column,
        label_column=options.label_column,
        known_classes=_known_classes(options.out, options.split),
    )
    _write(_source(listed, options), options.split, options)


def _make_inat(options: argparse.Namespace) -> None:
    by_split = {
        split: list_inaturalist(path, root=options.root, categories_path=options.categories)
        for split, path in (("train", options.train), ("val", options.val))
    }
    if by_split["train"][1] != by_split["val"][1]:
        raise DataError(
            f"{options.train} and {options.val} have different categories; expected the same; mend one"
        )
    for split, listed in by_split.items():
        _write(_source(listed, options), split, options)


def _make_long_tail(options: argparse.Namespace) -> None:
    for manifest in write_long_tail(
        options.shards, options.out, split=options.split, imbalance=options.imbalance, seed=options.seed
    ):
        _report(manifest, [], 0.0)


def _known_classes(directory: str, split: str) -> tuple[str, ...]:
    """Returns the classes of the other splits of a folder: their numbers hold for a new split, too."""
    if not (Path(directory) / MANIFEST_NAME).is_file():
        return ()
    others = [name for name in split_names(directory) if name != split]
    return next((load_manifest(directory, name).classes for name in others), ())


def _write(source: ImageSource, split: str, options: argparse.Namespace) -> None:
    Path(options.out).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    manifest, rejected = write_split(
        source,
        split,
        options.out,
        samples_per_shard=options.samples_per_shard,
        max_shard_bytes=options.shard_mib * 1024 * 1024,
        seed=options.seed,
        num_processes=options.processes,
    )
    _report(manifest, rejected, time.monotonic() - started)


def _report(manifest: Manifest, rejected: list[Rejected], seconds: float) -> None:
    gib = sum(shard.bytes for shard in manifest.shards) / 1024**3
    print(
        f"{manifest.split}: {manifest.num_samples} images, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {gib:.2f} GiB, {seconds:.1f} s, in {manifest.directory}"
    )
    for kind, count in sorted(Counter(item.kind for item in rejected).items()):
        examples = ", ".join(item.name for item in rejected if item.kind == kind)[:300]
        print(f"  left out, {kind}: {count} ({examples})")


if __name__ == "__main__":
    sys.exit(main())
