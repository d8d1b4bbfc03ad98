"""Images with label maps: folders of both, PASCAL VOC and ADE20K, as the makers lay them out.

camvid/{train,val,test}/NAME.jpg + NAME.png, camvid/classes.txt
DIR/images/{train,val}/NAME.jpg + DIR/labels/{train,val}/NAME.png (or annotations, masks), DIR/classes.txt
DIR/{train,val}/images/NAME.jpg + DIR/{train,val}/labels/NAME.png
VOC2012/JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt: the official 1,464 + 1,449 images.
    Lists that others added (`trainaug`) are not read: they hold validation images.
ADEChallengeData2016/images/{training,validation}, annotations/..., objectInfo150.txt: 0 is void, 1 to 150 classes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from data.members import LABEL_MAP_SUFFIX, readable
from data.shards import DataError
from data.writing.folder_walk import SPLIT_FOLDERS, PassedOver, walk_images
from data.writing.image_sources import FileSource, ImageFile
from data.writing.label_maps import LabelRule, make_rule, open_label, palette_of, read_label_map
from data.writing.labels import CLASS_FILES, read_class_names, read_text
from data.writing.sources import Rejected, SourceSample

_IMAGE_FOLDER, _LABEL_FOLDERS = "images", ("labels", "annotations", "masks")
_LABEL_SUFFIX = ".png"
_VOC_LISTS, _VOC_SPLITS, _VOC_VOID = "ImageSets/Segmentation", ("train", "val"), 255
# Everingham et al. 2012; the order of the development kit.
_VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
# Zhou et al. 2017, the benchmark "SceneParsing" of 150 classes.
_ADE_INFO, _ADE_SPLITS, _ADE_VOID = "objectInfo150.txt", {"training": "train", "validation": "val"}, 0


@dataclass(frozen=True)
class Pair:
    """An image with its label file; `suffix` is the image's."""

    image: Path
    label: Path
    suffix: str


class SegmentationSource(FileSource):
    """One split's images, their bytes kept, each with a label map. Nothing is left out but images that are broken.

    Args:
        pairs: images with their label files.
        rule: what the values of the latter mean.
    """

    def __init__(self, pairs: Sequence[Pair], rule: LabelRule) -> None:
        files = [ImageFile(str(pair.image), suffix=pair.suffix) for pair in pairs]
        super().__init__(files, rule.classes, drops_duplicates=False)
        self._labels = [pair.label for pair in pairs]
        self._rule = replace(rule, palette=palette_of(open_label(self._labels[0])))
        described = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._labels]
        text = f"{self.fingerprint} {described} {sorted(rule.indices.items())}"
        self.fingerprint = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def load(self, index: int) -> SourceSample | Rejected:
        """Returns an image's bytes and its label map, or why the image is left out.

        Raises:
            DataError: the label map cannot be what it should; see `read_label_map`.
        """
        sample = super().load(index)
        if isinstance(sample, Rejected):
            return sample
        with Image.open(io.BytesIO(next(iter(sample.members.values())))) as image:
            size = image.size
        label_map = read_label_map(self._labels[index], self._rule, size)
        return replace(sample, members={**sample.members, LABEL_MAP_SUFFIX: label_map})


def list_segmentation(
    root: str,
    *,
    layout: str = "auto",
    split: str = "train",
    classes_path: str = "",
    first_class: int = 0,
    void: Sequence[int] = (255,),
) -> tuple[dict[str, SegmentationSource], PassedOver]:
    """Returns every split of a folder of images with label PNGs, and what was passed over to find them.

    Args:
        root: the folder.
        layout: `folders`, `voc`, `ade20k`, or `auto`: what the folder holds.
        split: name of the only split of a folder without split folders.
        classes_path: file of class names, one a line; empty for `classes.txt` in the folder.
        first_class: value of the first class in the label files; VOC and ADE20K say their own.
        void: values that are no class.

    Raises:
        DataError: no such folder, another layout, an image without label, no file of classes.
    """
    base = Path(root)
    if not base.is_dir():
        raise DataError(f"the input folder is {root!r}; expected an existing folder of images; pass its path")
    passed = PassedOver()
    if layout == "voc" or (layout == "auto" and (base / _VOC_LISTS).is_dir()):
        by_split = {name: _list_voc(base, name) for name in _VOC_SPLITS}
        _refuse_common(by_split)
        rule = make_rule(_VOC_NAMES.split(), void=(_VOC_VOID,))
    elif layout == "ade20k" or (layout == "auto" and (base / _ADE_INFO).is_file()):
        by_split = {
            ours: _pair_trees(base / "images" / theirs, base / "annotations" / theirs, passed)
            for theirs, ours in _ADE_SPLITS.items()
        }
        rule = make_rule(_read_ade_classes(base / _ADE_INFO), first_class=1, void=(_ADE_VOID,))
    else:
        by_split = _list_folders(base, split, passed)
        rule = make_rule(_read_classes(base, classes_path), first_class=first_class, void=void)
    return {name: SegmentationSource(pairs, rule) for name, pairs in by_split.items()}, passed


def _read_classes(base: Path, path: str) -> tuple[str, ...]:
    if path:
        if not Path(path).is_file():
            raise DataError(f"--classes is {path!r}; expected an existing file; set --classes")
        return tuple(filter(None, (line.strip() for line in read_text(path).splitlines())))
    found, names = read_class_names(str(base))
    if not found:
        raise DataError(
            f"{base} has no {CLASS_FILES[0]}; expected one with the name of every class in index order, one a line; "
            "write it or set --classes"
        )
    return names


def _list_folders(base: Path, split: str, passed: PassedOver) -> dict[str, list[Pair]]:
    """Returns the pairs of every split of a folder: split folders outside, inside or none, trees parallel or one."""
    labels = _label_folder(base)
    if labels is not None:
        splits = _split_folders(base / _IMAGE_FOLDER)
        if not splits:
            return {split: _pair_trees(base / _IMAGE_FOLDER, labels, passed)}
        return {
            name.lower(): _pair_trees(base / _IMAGE_FOLDER / name, labels / name, passed) for name in splits
        }
    found: dict[str, list[Pair]] = {}
    for name in _split_folders(base) or [""]:
        own = _label_folder(base / name)
        found[name.lower() or split] = (
            _pair_beside(base / name, passed)
            if own is None
            else _pair_trees(base / name / _IMAGE_FOLDER, own, passed)
        )
    return found


def _label_folder(base: Path) -> Path | None:
    """Returns the folder of labels beside `images`; None where there are no two such folders."""
    if not (base / _IMAGE_FOLDER).is_dir():
        return None
    found = [base / name for name in _LABEL_FOLDERS if (base / name).is_dir()]
    if len(found) != 1:
        named = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{base} holds {_IMAGE_FOLDER} and of {', '.join(_LABEL_FOLDERS)}: {named}; expected one folder of labels "
            "beside it; rename or add it"
        )
    return found[0]


def _split_folders(base: Path) -> list[str]:
    names = [path.name for path in base.iterdir() if path.is_dir() and path.name.lower() in SPLIT_FOLDERS]
    return sorted(names, key=lambda name: SPLIT_FOLDERS.index(name.lower()))


def _pair_trees(images: Path, labels: Path, passed: PassedOver) -> list[Pair]:
    """Returns every image under a folder with the PNG at the same place under another."""
    found, others = walk_images(str(images))
    _take_over(others, passed)
    return _require_labels(
        [
            Pair(path, (labels / path.relative_to(images)).with_suffix(_LABEL_SUFFIX), suffix)
            for path, suffix in found
        ],
        images,
    )


def _pair_beside(folder: Path, passed: PassedOver) -> list[Pair]:
    """Returns every image under a folder with the PNG of the same name beside it."""
    found, others = walk_images(str(folder))
    _take_over(others, passed)
    pairs = [
        Pair(path, path.with_suffix(_LABEL_SUFFIX), suffix)
        for path, suffix in found
        if path.suffix.lower() != _LABEL_SUFFIX
    ]
    used = {pair.label for pair in pairs}
    for path, _ in found:
        if path.suffix.lower() == _LABEL_SUFFIX and path not in used:
            passed.add("PNG without an image of its name", str(path))
    return _require_labels(pairs, folder)


def _require_labels(pairs: list[Pair], where: Path) -> list[Pair]:
    if not pairs:
        raise DataError(
            f"{where} holds no image with a label; expected NAME.jpg beside NAME.png, or the folders {_IMAGE_FOLDER} "
            f"and {_LABEL_FOLDERS[0]}; pass another folder"
        )
    missing = [pair for pair in pairs if not pair.label.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pairs)} images have no label, the first {readable(str(missing[0].image))}; "
            f"expected {readable(str(missing[0].label))}; add the labels or move the images away"
        )
    return pairs


def _take_over(found: PassedOver, into: PassedOver) -> None:
    into.counts.update(found.counts)
    for reason, names in found.names.items():
        into.names.setdefault(reason, []).extend(names)


def _list_voc(base: Path, split: str) -> list[Pair]:
    path = base / _VOC_LISTS / f"{split}.txt"
    if not path.is_file():
        raise DataError(
            f"{path} is missing; expected VOC's list of the split; pass the folder VOC2012 itself"
        )
    names = read_text(str(path)).split()
    pairs = [
        Pair(
            base / "JPEGImages" / f"{name}.jpg",
            base / "SegmentationClass" / f"{name}{_LABEL_SUFFIX}",
            "jpg",
        )
        for name in names
    ]
    return _require_labels(pairs, path)


def _refuse_common(by_split: dict[str, list[Pair]]) -> None:
    train, val = ({pair.image.name for pair in pairs} for pairs in by_split.values())
    if train & val:
        raise DataError(
            f"{len(train & val)} images, as {min(train & val)}, are in both lists of {_VOC_LISTS}; expected none: what "
            "is scored must not be trained on; take the official lists"
        )


def _read_ade_classes(path: Path) -> list[str]:
    """Returns the 150 names in index order: lines are `index, ..., name`, tabs between, below a header."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing; expected ADEChallengeData2016 as its makers pack it; pass that folder"
        )
    lines = [line.split("\t") for line in read_text(str(path)).splitlines() if line[:1].isdigit()]
    names = {int(fields[0]): fields[-1].strip() for fields in lines if fields[0].strip().isdigit()}
    if sorted(names) != list(range(1, len(names) + 1)) or not names:
        raise DataError(
            f"{path} does not number its classes from 1; expected the official file; fetch it again"
        )
    return [names[number] for number in sorted(names)]
