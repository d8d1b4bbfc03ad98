"""Images to WebDataset shards with a manifest.

    python -m data.make_shards fashion-mnist --out datasets/fashion-mnist
    python -m data.make_shards digits --out datasets/digits
    python -m data.make_shards cifar10 --out datasets/cifar10                     (cifar100, tiny-imagenet)
    python -m data.make_shards imagefolder photos/ --out datasets/photos          (photos/train, photos/test: splits)
    python -m data.make_shards imagefolder ILSVRC/train --label-conflicts first --out datasets/imagenet
    python -m data.make_shards imagefolder ILSVRC/val --split val --labels LOC_val_solution.csv --out datasets/imagenet
    python -m data.make_shards inat2018 --root inat/ --train train2018.json --val val2018.json --out datasets/inat2018
    python -m data.make_shards csv list.csv --root photos/ --label-column species --out datasets/species
    python -m data.make_shards segmentation camvid/ --out datasets/camvid          (images with label PNGs; VOC, ADE20K)
    python -m data.make_shards lt datasets/imagenet --imbalance 100 --out datasets/imagenet-lt
    python -m data.make_shards holdout datasets/cifar10 --out datasets/cifar10-val (train cut in two, for choices)
    python -m data.make_shards reshuffle others/shards --out datasets/others      (rewrites any set in random order)

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
from typing import TYPE_CHECKING

# What a command needs is imported by its function: a usage line should not wait for torch.
from data.local_errors import line_of
from data.shards import MANIFEST_NAME, DataError, Manifest, load_manifest, split_names
from data.usage import Parser

if TYPE_CHECKING:
    from data.writing.image_sources import FileSource, Listing
    from data.writing.sources import ImageSource, Rejected

_DOWNLOADS = "datasets/downloads"
_MIB = 1024 * 1024
_NUM_NAMED = 5


def main(arguments: list[str] | None = None) -> int:
    """Writes the shards that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    # What goes on is told on stdout; stderr holds the progress bar, or the one line of a mistake.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        _check_options(options)
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {line_of(error, options.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the shards that are missing", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data.make_shards",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_known_sets(commands)
    _add_own_images(commands)
    _add_label_maps(commands)
    _add_sets_of_sets(commands)
    return parser.parse_args(arguments)


def _add_known_sets(commands: argparse._SubParsersAction[Parser]) -> None:
    fashion = commands.add_parser("fashion-mnist", help="fetch Fashion-MNIST and write its two splits")
    fashion.add_argument(
        "--cache", default=f"{_DOWNLOADS}/fashion-mnist", help="where fetched files are kept"
    )
    fashion.set_defaults(run=_make_fashion_mnist)
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 digits, for a look in seconds")
    digits.set_defaults(run=_make_digits)
    known = [fashion, digits]
    for name, run, splits in (
        ("cifar10", _make_cifar, "train and test"),
        ("cifar100", _make_cifar, "train and test"),
        ("tiny-imagenet", _make_tiny_imagenet, "train and val"),
    ):
        command = commands.add_parser(name, help=f"the official archive's splits {splits}")
        command.add_argument(
            "--archive", default="", help="the archive or its unpacked folder; empty: fetch it"
        )
        command.add_argument("--cache", default=_DOWNLOADS, help="where a fetched archive is kept")
        command.set_defaults(run=run)
        known.append(command)
    for command in known:
        _add_common_options(command)


def _add_own_images(commands: argparse._SubParsersAction[Parser]) -> None:
    folder = commands.add_parser(
        "imagefolder", help="a folder of class folders, of images, or of splits of them"
    )
    folder.add_argument("root", help="the folder")
    folder.add_argument("--split", default=None, help="the split to write; default: train")
    folder.add_argument("--labels", default="", help="file of lines 'file name, class' for a flat folder")
    folder.add_argument(
        "--split-folders",
        choices=("auto", "no"),
        default="auto",
        help="whether folders train, val, test, valid and validation are splits; no: they are classes",
    )
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
    for command in (folder, table, inat):
        _add_common_options(command, samples_per_shard=None)
        help_text = "resize images whose shorter side is longer than this; 0 keeps the bytes of all"
        command.add_argument("--max-side", type=int, default=0, help=help_text)
        command.add_argument(
            "--keep-duplicates", action="store_true", help="write images that occur twice twice"
        )
        command.add_argument(
            "--label-conflicts",
            choices=("error", "first", "drop"),
            default="error",
            help="when two classes hold the same image: refuse, keep the first, or leave out all of them",
        )


def _add_label_maps(commands: argparse._SubParsersAction[Parser]) -> None:
    maps = commands.add_parser("segmentation", help="images with a label PNG each: folders, VOC, ADE20K")
    maps.add_argument("root", help="NAME.jpg and NAME.png together, or images/ and labels/; of VOC: VOC2012")
    maps.add_argument("--layout", choices=("auto", "folders", "voc", "ade20k"), default="auto")
    maps.add_argument("--split", default="train", help="of a folder without split folders")
    maps.add_argument("--classes", default="", help="file of names, one a line; default: classes.txt in root")
    maps.add_argument("--first-class", type=int, default=0, help="value in the PNGs of the first class")
    maps.add_argument("--void", type=int, nargs="+", default=[255], help="values that are no class")
    maps.set_defaults(run=_make_segmentation)
    _add_common_options(maps, samples_per_shard=None)


def _add_sets_of_sets(commands: argparse._SubParsersAction[Parser]) -> None:
    tail = commands.add_parser("lt", help="a long-tailed sub-sample of a set, without copying images")
    tail.add_argument("shards", help="folder of the whole set")
    tail.add_argument("--split", default="train", help="the split to thin out; the others are kept whole")
    tail.add_argument(
        "--imbalance", type=float, default=100.0, help="largest class over smallest, such as 10 to 1,000"
    )
    tail.add_argument("--out", required=True)
    tail.add_argument("--seed", type=int, default=0)
    tail.set_defaults(run=_make_long_tail)
    held = commands.add_parser("holdout", help="a set's training split cut in two, without copying images")
    held.add_argument("shards", help="folder of the whole set, whose own test split is left out")
    held.add_argument("--share", type=float, default=0.1, help="of each class that becomes the split test")
    held.add_argument("--out", required=True)
    held.add_argument("--seed", type=int, default=0)
    held.set_defaults(run=_make_held_out)
    again = commands.add_parser("reshuffle", help="any set of shards, rewritten in random order")
    again.add_argument("shards", help="folder of the set; a manifest is not needed")
    again.add_argument(
        "--image-key", default="", help="the image's suffix, where samples hold several images"
    )
    again.add_argument(
        "--last-dot", action="store_true", help="names are KEY.SUFFIX with dots in KEY: cut at the last one"
    )
    again.add_argument("--memory-mib", type=int, default=512, help="of samples that wait for their place")
    _add_common_options(again)
    again.set_defaults(run=_reshuffle)


def _add_common_options(parser: argparse.ArgumentParser, samples_per_shard: int | None = 1500) -> None:
    parser.add_argument("--out", required=True, help="folder for the shards and manifest.json")
    fitting = "" if samples_per_shard else "; default: a 256th of them, 16 to 1500"
    help_text = f"most images in a shard{fitting}"
    parser.add_argument("--samples-per-shard", type=int, default=samples_per_shard, help=help_text)
    parser.add_argument("--shard-mib", type=int, default=256, help="most mebibytes of images in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before writing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)


def _check_options(options: argparse.Namespace) -> None:
    """Raises DataError for the first number that cannot work."""
    least = {
        "samples_per_shard": 1,
        "shard_mib": 1,
        "processes": 1,
        "max_side": 0,
        "memory_mib": 1,
        "seed": 0,
    }
    if not options.out:
        raise DataError("--out is empty; expected a folder for the shards; set --out")
    for name, lowest in least.items():
        value = getattr(options, name, None)
        if value is not None and not value >= lowest:
            flag = "--" + name.replace("_", "-")
            raise DataError(f"{flag} is {value}; expected at least {lowest}; set {flag}")


def _source(listed: Listing, options: argparse.Namespace) -> FileSource:
    from data.writing.image_sources import FileSource

    for line in listed.passed_over.lines():
        print(f"  {line}")
    return FileSource(
        listed.files,
        listed.classes,
        max_side=options.max_side,
        drops_duplicates=not options.keep_duplicates,
        label_conflicts=options.label_conflicts,
    )


def _make_fashion_mnist(options: argparse.Namespace) -> None:
    from data.writing.fashion_mnist import SPLITS, fetch, open_fashion_mnist

    folder = fetch(options.cache)
    for split in SPLITS:
        _write(open_fashion_mnist(folder, split), split, options)


def _make_digits(options: argparse.Namespace) -> None:
    from data.writing.digits import open_digits

    for split in ("train", "test"):
        _write(open_digits(split), split, options)


def _make_cifar(options: argparse.Namespace) -> None:
    from data.writing.cifar import open_cifar

    for split, source in open_cifar(options.command, options.archive, options.cache).items():
        _write(source, split, options)


def _make_tiny_imagenet(options: argparse.Namespace) -> None:
    from data.writing.tiny_imagenet import open_tiny_imagenet

    for split, source in open_tiny_imagenet(options.archive, options.cache).items():
        _write(source, split, options)


def _make_image_folder(options: argparse.Namespace) -> None:
    from data.writing.folder_walk import PassedOver, find_split_folders
    from data.writing.image_sources import list_splits

    auto = options.split_folders == "auto"
    folders, beside = find_split_folders(options.root) if auto else ([], PassedOver())
    if folders and (options.split or options.labels):
        flag = "--split" if options.split else "--labels"
        raise DataError(
            f"{options.root} holds the split folders {', '.join(folders)}; expected none where {flag} is given; pass "
            "one of them, or --split-folders no if they are classes"
        )
    roots = {name.lower(): str(Path(options.root) / name) for name in folders}
    roots = roots or {options.split or "train": options.root}
    listed = list_splits(
        roots, labels_path=options.labels, known_classes=_known_classes(options.out, set(roots))
    )
    for line in beside.lines() if folders else ():
        print(f"  {line}")
    for split, listing in listed.items():
        _write(_source(listing, options), split, options)


def _make_csv(options: argparse.Namespace) -> None:
    from data.writing.image_sources import list_csv

    listed = list_csv(
        options.path,
        root=options.root,
        image_column=options.image_column,
        label_column=options.label_column,
        known_classes=_known_classes(options.out, {options.split}),
    )
    _write(_source(listed, options), options.split, options)


def _make_inat(options: argparse.Namespace) -> None:
    from data.writing.image_sources import list_inaturalist

    by_split = {
        split: list_inaturalist(path, root=options.root, categories_path=options.categories)
        for split, path in (("train", options.train), ("val", options.val))
    }
    if by_split["train"].classes != by_split["val"].classes:
        raise DataError(
            f"{options.train} and {options.val} have different categories; expected the same; mend one"
        )
    for split, listed in by_split.items():
        _write(_source(listed, options), split, options)


def _make_segmentation(options: argparse.Namespace) -> None:
    from data.writing.segmentation import list_segmentation

    by_split, passed_over = list_segmentation(
        options.root,
        layout=options.layout,
        split=options.split,
        classes_path=options.classes,
        first_class=options.first_class,
        void=options.void,
    )
    for line in passed_over.lines():
        print(f"  {line}")
    for split, source in by_split.items():
        _write(source, split, options)


def _make_long_tail(options: argparse.Namespace) -> None:
    from data.writing.subsets import write_long_tail

    for manifest in write_long_tail(
        options.shards, options.out, split=options.split, imbalance=options.imbalance, seed=options.seed
    ):
        _report(manifest, [], 0.0)


def _make_held_out(options: argparse.Namespace) -> None:
    from data.writing.subsets import write_held_out

    for manifest in write_held_out(options.shards, options.out, share=options.share, seed=options.seed):
        _report(manifest, [], 0.0)


def _reshuffle(options: argparse.Namespace) -> None:
    from data.writing.reshuffling import ReshuffleOptions, reshuffle

    started = time.monotonic()
    reshuffle(
        options.shards,
        options.out,
        ReshuffleOptions(
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            max_shard_bytes=options.shard_mib * _MIB,
            buffer_bytes=options.memory_mib * _MIB,
            last_dot=options.last_dot,
            image_key=options.image_key,
            num_processes=options.processes,
        ),
    )
    for split in split_names(options.out):
        _report(load_manifest(options.out, split), [], time.monotonic() - started)


def _known_classes(directory: str, splits: set[str]) -> tuple[str, ...]:
    """Returns the classes of a folder's splits other than these: their numbers hold for a new split, too."""
    if not (Path(directory) / MANIFEST_NAME).is_file():
        return ()
    others = [load_manifest(directory, name) for name in split_names(directory) if name not in splits]
    return next((manifest.classes for manifest in others if manifest.classes), ())


def _write(source: ImageSource, split: str, options: argparse.Namespace) -> None:
    from data.writing.shard_writing import fit_shards, write_split

    Path(options.out).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    manifest, rejected = write_split(
        source,
        split,
        options.out,
        samples_per_shard=options.samples_per_shard or fit_shards(len(source)),
        max_shard_bytes=options.shard_mib * _MIB,
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
        of_kind = [item for item in rejected if item.kind == kind]
        named = [f"{item.name}: {item.detail}" if item.detail else item.name for item in of_kind]
        more = f"; all in {manifest.split}.left_out.txt" if count > _NUM_NAMED else ""
        print(f"  left out, {kind}: {count} ({'; '.join(named[:_NUM_NAMED])}{more})")


if __name__ == "__main__":
    sys.exit(main())
