"""Image files as sources of shards: folders of classes, CSV lists and iNaturalist's JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data.config import MAX_IMAGE_PIXELS
from data.local_errors import raise_if_local
from data.members import ARRAY_SUFFIX, READABLE_SUFFIXES, is_system_name, readable
from data.shards import DataError
from data.views.decoding import BadImageError, decode_any, decode_to_pil
from data.views.kinds import describe_loss, kind_of
from data.writing.duplicates import LabelConflicts
from data.writing.folder_walk import PassedOver, sniff_suffix, walk_images
from data.writing.labels import read_text
from data.writing.sources import ImageSource, Rejected, SourceSample

_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFile:
    """One file: its path, its class index if it has one, and what goes into the sample's `.json`.

    The suffix of its member is the path's unless `suffix` says another.
    """

    path: str
    label: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Listing:
    """Images of one split, the names of their classes in index order, and what was passed over to find them."""

    files: list[ImageFile]
    classes: tuple[str, ...]
    passed_over: PassedOver = field(default_factory=PassedOver)


class FileSource(ImageSource):
    """Image files, decoded once to find the broken ones; the bytes are kept unless the image is over-large.

    Args:
        files: in any order; it becomes part of the fingerprint.
        classes: names in index order.
        max_side: images of 8 bits in grey or RGB whose shorter side is longer are resized to it and written as JPEG; 0
            keeps all as they are.
        drops_duplicates: see `ImageSource`.
        label_conflicts: see `ImageSource`.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        classes: Sequence[str],
        *,
        max_side: int = 0,
        drops_duplicates: bool = True,
        label_conflicts: LabelConflicts = "error",
    ) -> None:
        self.files = list(files)
        self.classes = tuple(classes)
        self.max_side = max_side
        self.drops_duplicates = drops_duplicates
        self.label_conflicts = label_conflicts
        self._sizes = array("q")
        digest = hashlib.sha256(f"{max_side} {drops_duplicates}".encode())
        for file in self.files:
            # One stat a file, which on a network costs more than all the rest here.
            size, changed = _size_and_time(file.path)
            self._sizes.append(size)
            facts = json.dumps(file.facts, sort_keys=True)
            described = f"{file.path}\0{size}\0{changed}\0{file.label}\0{facts}\n"
            digest.update(described.encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def size(self, index: int) -> int:
        """Returns a file's size; 0 if it is gone."""
        return self._sizes[index]

    def name(self, index: int) -> str:
        """Returns a file's path."""
        return readable(self.files[index].path)

    def load(self, index: int) -> SourceSample | Rejected:
        """Returns a file's bytes, or why it is left out.

        Raises:
            DataError: this machine does not let it be read.
        """
        file = self.files[index]
        path = Path(file.path)
        try:
            # A list may name a pipe or a device, whose reading would never end.
            if path.exists() and not path.is_file():
                return Rejected(self.name(index), "unreadable", "no regular file", index)
            content = path.read_bytes()
            suffix = file.suffix or path.suffix[1:].lower()
            if suffix not in READABLE_SUFFIXES and not (suffix := sniff_suffix(content)):
                return Rejected(
                    self.name(index), "no image", "neither by its suffix nor by its first bytes", index
                )
            pixels = decode_any(content, max_pixels=MAX_IMAGE_PIXELS)
            is_photograph = suffix != ARRAY_SUFFIX and kind_of(content, pixels).is_plain
            is_large = self.max_side and min(pixels.shape[-2:]) > self.max_side
            if is_large and is_photograph and not describe_loss(content):
                content, suffix = _shrink(content, self.max_side), "jpg"
        except OSError as error:
            raise_if_local(error, self.name(index))
            return Rejected(self.name(index), "unreadable", error.strerror or str(error), index)
        except BadImageError as error:
            return Rejected(self.name(index), "broken", str(error), index)
        members = {suffix: content}
        if file.facts:
            members["json"] = json.dumps(file.facts, sort_keys=True).encode()
        # The number makes the key unique, the stem tells a person which image it is; a key holds no dot.
        stem = readable(path.stem).replace(".", "_")
        return SourceSample(f"{index:08d}-{stem}", members, file.label)


def list_splits(
    roots: Mapping[str, str],
    *,
    labels_path: str = "",
    known_classes: Sequence[str] = (),
    strays_are_unlabelled: bool = False,
) -> dict[str, Listing]:
    """Returns the images of several splits, whose classes have the numbers of the first; see `list_image_folder`.

    All are listed before anything is written: a mistake in the second must not come after an hour.
    """
    listed: dict[str, Listing] = {}
    for split, root in roots.items():
        listed[split] = list_image_folder(
            root,
            labels_path=labels_path,
            known_classes=known_classes,
            strays_are_unlabelled=strays_are_unlabelled,
        )
        known_classes = known_classes or listed[split].classes
    return listed


def list_image_folder(
    root: str,
    *,
    labels_path: str = "",
    known_classes: Sequence[str] = (),
    strays_are_unlabelled: bool = False,
) -> Listing:
    """Returns the images under a folder and their classes.

    Folders below `root` are classes, in alphabetical order. A flat folder takes its classes from a file of lines
    `file name, class`, such as ImageNet's `LOC_val_solution.csv`; without one the images carry no labels. What counts
    as an image and which links are followed: `data.folder_walk.walk_images`.

    Args:
        root: the folder.
        labels_path: the file of classes of a flat folder.
        known_classes: classes of a split that exists already; their numbers are kept, and no other class may occur.
        strays_are_unlabelled: where images lie beside the folders, none has a label, instead of an error.

    Raises:
        DataError: no folder, no images, an image beside class folders, or a class that is not among the known ones.
    """
    found, passed = walk_images(root)
    if not found:
        seen = f" ({'; '.join(passed.lines())})" if passed.counts else ""
        raise DataError(f"{root} holds no image{seen}; expected some; pass another folder")
    names: list[str | None]
    if labels_path:
        by_stem = _read_labels(labels_path)
        names = [by_stem.get(readable(path.stem)) for path, _ in found]
        if None in names:
            missing = readable(found[names.index(None)][0].name)
            raise DataError(
                f"{labels_path} has no line for {missing}; expected one for each image; mend the file"
            )
    else:
        names = [_class_of(path, Path(root)) for path, _ in found]
        if None in names and strays_are_unlabelled:
            names = [None] * len(names)
        elif None in names and any(name is not None for name in names):
            stray = readable(str(found[names.index(None)][0]))
            raise DataError(
                f"{stray} lies beside class folders; expected it in one of them; move or remove it"
            )
        classes = {name for name in names if name is not None}
        for folder in sorted(Path(root).iterdir()) if classes else ():
            is_class = folder.is_dir() and not folder.is_symlink() and not is_system_name(folder.name)
            if is_class and readable(folder.name) not in classes:
                passed.add("class folder without an image", str(folder))
    items: list[_Item] = [(path, name, {}, suffix) for (path, suffix), name in zip(found, names, strict=True)]
    return _number_classes(items, known_classes, passed)


def _class_of(path: Path, root: Path) -> str | None:
    return None if path.parent == root else readable(path.relative_to(root).parts[0])


def list_csv(
    path: str, *, root: str, image_column: str, label_column: str, known_classes: Sequence[str] = ()
) -> Listing:
    """Returns the images that a CSV file with a header lists; its other columns go into the samples' `.json`.

    Args:
        path: the CSV file.
        root: folder to which its paths are relative.
        image_column: name of the column of paths.
        label_column: name of the column of class names; empty for none.
        known_classes: see `list_image_folder`.

    Raises:
        DataError: no such file or column, two columns of one name, a line with another number of columns, or one with
            an empty path or class.
    """
    if not Path(path).is_file():
        raise DataError(f"the CSV file is {path!r}; expected an existing file; pass its path")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        rows, columns = list(reader), list(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num + 1} of {path} is no CSV ({error}); expected rows; mend the file"
        ) from error
    twice = next((name for name, number in Counter(filter(None, columns)).items() if number > 1), None)
    if twice is not None:
        raise DataError(
            f"{path} has {columns.count(twice)} columns {twice!r}; expected different names; mend the header"
        )
    for column, option in ((image_column, "--image-column"), (label_column, "--label-column")):
        if column and column not in columns:
            named = ", ".join(columns) or "a header, but the file is empty"
            raise DataError(f"{path} has no column {column!r}; expected one of {named}; set {option}")
    items: list[_Item] = []
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DataError(
                f"row {number} of {path} has another number of columns; expected {len(columns)}; mend the file"
            )
        for column in filter(None, (image_column, label_column)):
            if not row[column].strip() or "\0" in row[column]:
                what = "a zero byte in" if row[column].strip() else "an empty"
                raise DataError(f"row {number} of {path} has {what} {column!r}; expected text; mend the file")
        facts = {key: value for key, value in row.items() if key not in (image_column, label_column)}
        label = row[label_column].strip() if label_column else None
        items.append((Path(root) / row[image_column], label, facts, ""))
    return _number_classes(items, known_classes)


def list_inaturalist(annotations_path: str, *, root: str, categories_path: str = "") -> Listing:
    """Returns the images of an official iNaturalist JSON; classes are its categories in the order of their ids.

    Everything known of a category (name, supercategory, kingdom to genus) goes into its samples' `.json`.

    Args:
        annotations_path: such as `train2018.json`.
        root: folder to which `file_name` is relative.
        categories_path: `categories.json` with the taxonomy, where the annotations do not hold it.

    Raises:
        DataError: no such file, or not of that layout.
    """
    document = _read_json(annotations_path)
    extra = _read_json(categories_path) if categories_path else []
    try:
        categories = {entry["id"]: dict(entry) for entry in document["categories"]}
        for entry in extra:
            categories.setdefault(entry["id"], {}).update(entry)
        category_of = {entry["image_id"]: entry["category_id"] for entry in document["annotations"]}
        images = [(entry["id"], entry["file_name"]) for entry in document["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{annotations_path} is not of iNaturalist's layout ({error!r}); expected images, annotations, categories"
        ) from error
    number_of = {category: number for number, category in enumerate(sorted(categories))}
    names = tuple(str(categories[category].get("name", category)) for category in sorted(categories))
    taxonomies = {
        category: {key: value for key, value in entry.items() if key != "id"}
        for category, entry in categories.items()
    }
    files = []
    for image_id, file_name in images:
        category = category_of.get(image_id)
        if category is None:
            raise DataError(
                f"image {image_id} of {annotations_path} has no annotation; expected one each; mend the file"
            )
        if category not in taxonomies:
            raise DataError(
                f"image {image_id} of {annotations_path} has category {category}, which is not among its "
                f"{len(categories)} categories; expected one of them; mend the file"
            )
        facts = {"image_id": image_id, "category_id": category, "taxonomy": taxonomies[category]}
        files.append(ImageFile(str(Path(root) / file_name), number_of[category], facts))
    return Listing(files, names)


_Item = tuple[Path, str | None, dict[str, Any], str]  # path, class, facts, suffix


def _number_classes(
    items: Sequence[_Item], known_classes: Sequence[str], passed_over: PassedOver | None = None
) -> Listing:
    found = sorted({name for _, name, _, _ in items if name is not None})
    classes = tuple(known_classes) or tuple(found)
    number_of = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in found if name not in number_of]
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} is not among the {len(classes)} classes of the splits that exist; expected the same "
            "classes in every split; write the splits into different folders, or mend the names"
        )
    files = [
        ImageFile(str(path), None if name is None else number_of[name], facts, suffix)
        for path, name, facts, suffix in items
    ]
    return Listing(files, classes if found else (), passed_over or PassedOver())


def _read_labels(path: str) -> dict[str, str]:
    if not Path(path).is_file():
        raise DataError(f"the file of classes is {path!r}; expected an existing file; pass its path")
    labels = {}
    for line in filter(str.strip, read_text(path).splitlines()):
        name, *others = line.split("," if "," in line else None, maxsplit=1)
        rest = others[0] if others else ""
        # ImageNet's file names the class and then the boxes: "n03995372 85 1 499 272".
        wordnet_id = re.match(r"\s*(n\d{8})\b", rest)
        label = wordnet_id[1] if wordnet_id else rest.strip()
        if name.strip() and label:
            labels[Path(name.strip()).stem] = label
    return labels


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0  # `load` says so
    return status.st_size, status.st_mtime_ns


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); expected a JSON file; pass its path"
        ) from error


def _shrink(content: bytes, side: int) -> bytes:
    image = decode_to_pil(content, max_pixels=MAX_IMAGE_PIXELS)
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    encoded = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(encoded, format="JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()
