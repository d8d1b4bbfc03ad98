"""Photographs of ImageNet's size for the loader's benchmark: cut from whatever photographs this machine can have."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

PACKAGES = ("lomiri-wallpapers", "plasma-workspace-wallpapers")
SIZE = (500, 375)
_JPEG_QUALITY = 92
# Tiles below this are sky or gradients: ImageNet's photographs have about 110 KB.
_LEAST_BYTES = 30_000
_FETCH_TIMEOUT_S = 300


def make_photographs(work: Path, num_images: int) -> tuple[Path, str]:
    """Returns a folder of 500 x 375 JPEGs in two class folders, and where they come from.

    They are cut from Debian's wallpaper packages, fetched without root; where that does not work, from the two
    photographs inside scikit-learn, whose tiles overlap much.

    Raises:
        ValueError: there are neither, or too few tiles.
    """
    out = work / f"tiles-{num_images}"
    note = out / "source.txt"
    if note.is_file() and len(list(out.rglob("*.jpg"))) == num_images:
        return out, note.read_text()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            photographs, step = _fetch_wallpapers(Path(scratch)), (SIZE[0] // 4, SIZE[1] // 4)
            source = f"overlapping tiles of {' and '.join(PACKAGES)}"
        except (OSError, subprocess.SubprocessError) as error:
            photographs, step = _find_sample_photographs(str(error)), (10, 4)
            source = "overlapping tiles of scikit-learn's two photographs"
        tiles = cut_tiles(photographs, num_images, step)
    for number, tile in enumerate(tiles):
        folder = out / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.jpg").write_bytes(tile)
    note.write_text(source)
    return out, source


def cut_tiles(photographs: Path, num_tiles: int, step: tuple[int, int]) -> list[bytes]:
    """Returns different encoded tiles of the photographs under a folder, the most detailed ones.

    Raises:
        ValueError: there are fewer.
    """
    # Packages hold a photograph under several names.
    paths = {hashlib.sha256(path.read_bytes()).digest(): path for path in sorted(photographs.rglob("*.jpg"))}
    tiles = {tile for path in paths.values() for tile in _cut(path, step)}
    detailed = sorted(
        (tile for tile in tiles if len(tile) > _LEAST_BYTES), key=lambda tile: (-len(tile), tile)
    )
    if len(detailed) < num_tiles:
        raise ValueError(
            f"--num-images is {num_tiles}; expected at most {len(detailed)}, the tiles of {photographs}; set "
            "--num-images, or --images to a folder of class folders of JPEG photographs"
        )
    return detailed[:num_tiles]


def _cut(path: Path, step: tuple[int, int]) -> Iterator[bytes]:
    with Image.open(path) as opened:
        photograph = opened.convert("RGB")
    # Halved photographs show whole objects at ImageNet's scale; small ones are cut as they are.
    while min(photograph.size) > 3 * SIZE[1]:
        photograph = photograph.reduce(2)
    for top in range(0, photograph.height - SIZE[1] + 1, step[1]):
        for left in range(0, photograph.width - SIZE[0] + 1, step[0]):
            encoded = io.BytesIO()
            tile = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
            tile.save(encoded, format="JPEG", quality=_JPEG_QUALITY)
            yield encoded.getvalue()


def _fetch_wallpapers(scratch: Path) -> Path:
    for package in PACKAGES:
        for command in (["apt-get", "download", package], ["sh", "-c", f"dpkg -x {package}_*.deb unpacked"]):
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=_FETCH_TIMEOUT_S)
    return scratch / "unpacked"


def _find_sample_photographs(reason: str) -> Path:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ValueError(
            f"there are no photographs ({reason}); expected the Debian packages {', '.join(PACKAGES)} in reach of "
            "apt-get (apt-get update), or scikit-learn (requirements-dev.txt); or pass --images FOLDER with class "
            "folders of JPEG photographs"
        ) from error
    return Path(sklearn.datasets.__file__).parent / "images"
