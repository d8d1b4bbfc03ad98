"""Images to WebDataset shards with a manifest.

    python -m data.make_shards fashion-mnist --out datasets/fashion-mnist

A second run keeps the shards that are complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

from data.fashion_mnist import SPLITS, FashionMnistSource, fetch
from data.shard_writing import Rejected, write_split
from data.shards import Manifest


def main(arguments: list[str] | None = None) -> int:
    """Writes the shards that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.run(options)
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.make_shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fashion = commands.add_parser("fashion-mnist", help="fetch Fashion-MNIST and write its two splits")
    fashion.add_argument(
        "--cache", default="datasets/downloads/fashion-mnist", help="where fetched files are kept"
    )
    fashion.set_defaults(run=_make_fashion_mnist)
    _add_common_options(fashion)
    return parser.parse_args(arguments)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder for the shards and manifest.json")
    parser.add_argument("--samples-per-shard", type=int, default=1500)
    parser.add_argument("--shard-mib", type=int, default=256, help="most mebibytes of images in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before writing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)


def _make_fashion_mnist(options: argparse.Namespace) -> None:
    folder = fetch(options.cache)
    for split in SPLITS:
        _write(FashionMnistSource(folder, split), split, options)


def _write(source: FashionMnistSource, split: str, options: argparse.Namespace) -> None:
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
