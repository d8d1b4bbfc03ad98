"""The report's image panels: what an encoder sees as similar, and what its patches and prototypes are about.

Images are taken from the beginning of each split (shards are shuffled when written), so that a report reads a few
thousand images and not all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from data.config import DataConfig
from data.stream.pipeline import TrainingStream
from data.views.augmentations import DeviceAugmentation
from data.views.config import PixelFormat
from data.views.pictures import Picture, to_rgb
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.encoders.projections import find_spaces, project
from evaluation.features.bank import FeatureBank, FeatureError
from evaluation.features.extract import first_id_after, open_stream
from evaluation.features.patches import grid_shape
from evaluation.features.processes import Processes
from evaluation.features.session import Session
from evaluation.probes.knn import nearest
from evaluation.probes.prototype_audit import load_exported_prototypes
from evaluation.probes.prototype_probe import project_patches
from report.charts import Chart, to_png

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

# A picture and the colour of its frame, or nothing.
_Cell = tuple[Tensor, str] | None
BANK_IMAGES = 4000
_SIDE = 64
_ROWS, _NEIGHBOURS = 8, 7
_MAP_IMAGES, _MAP_CLASSES = 2000, 20
_PATCH_IMAGES, _SHADE = 500, 0.45
# From black to the mean, of images without a white.
_SHOWN_DEVIATIONS = 2.0
# Inches of a cell: a whole panel is as wide as a chart, so that its letters are as large, on a phone too.
_CELL = 0.52
_RIGHT, _WRONG, _QUERY = "#009E73", "#D55E00", "#000000"


class _Thumbnail:
    """Picture to uint8 [3, side, side]; picklable."""

    def __call__(self, image: Picture) -> UInt8[Tensor, "3 S S"]:
        """Returns the whole image, scaled."""
        small = to_rgb(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)


class Gallery:
    """Thumbnails and features of the first images of both splits, in the same order.

    Args:
        session: an encoder whose features are at hand.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.train, self.train_images = self._first(session.banks[0], BANK_IMAGES)
        self.test, self.test_images = self._first(session.banks[1], _ROWS * 12)

    def _first(self, bank: FeatureBank, count: int) -> tuple[FeatureBank, Tensor]:
        manifest, data = bank.manifest, self.session.config.data
        before = first_id_after(manifest, count)
        keep = slice(None) if before is None else bank.sample_ids < before
        tensors = {name: tensor[keep] for name, tensor in bank.tensors.items()}
        part = FeatureBank(tensors, bank.labels[keep], bank.sample_ids[keep], manifest)
        format = self.session.encoder.transform.format
        stream = open_stream(
            manifest, _Thumbnail(), data=data, processes=Processes(), limit=count, format=format
        )
        found: dict[int, Tensor] = {}
        wanted = set(part.sample_ids.tolist())
        for images, _, ids in stream:
            found |= {i: image for i, image in zip(ids.tolist(), images, strict=True) if i in wanted}
        return part, torch.stack([found[i] for i in part.sample_ids.tolist()])

    def queries(self) -> list[int]:
        """Returns positions of test images, of as many classes as there are rows."""
        chosen: dict[int, int] = {}
        for position, label in enumerate(self.test.labels.tolist()):
            chosen.setdefault(label, position)
        return [chosen[label] for label in sorted(chosen)][:_ROWS]


def draw_neighbours(gallery: Gallery, run: str) -> Chart:
    """Returns test images, each with its nearest training images; a frame says whether the class agrees."""
    queries = gallery.queries()
    keys = normalize(gallery.train.select("embedding"), dim=1)
    _, found = nearest(normalize(gallery.test.select("embedding")[queries], dim=1), keys, _NEIGHBOURS)
    classes = gallery.test.manifest.classes
    rows = []
    for query, neighbours in zip(queries, found.tolist(), strict=True):
        label = int(gallery.test.labels[query])
        cells = [(gallery.test_images[query], _QUERY)]
        for index in neighbours:
            colour = _RIGHT if int(gallery.train.labels[index]) == label else _WRONG
            cells.append((gallery.train_images[index], colour))
        rows.append((classes[label], cells))
    png = _draw_rows(rows, f"Nearest neighbours of test images: {run}")
    caption = (
        f"Left: a test image of each class. Right: its {_NEIGHBOURS} nearest among the first {len(keys)} training "
        "images. Green frame: same class; orange: another."
    )
    return Chart(f"neighbours_{run}", f"Nearest neighbours: {run}", caption, png)


def draw_prototype_images(gallery: Gallery, run: str) -> Chart | None:
    """Returns the images nearest to the most used prototypes.

    None where the checkpoint has no projection head, or its run compared no images with prototypes.
    """
    encoder = gallery.session.encoder
    space = None if encoder.folder is None else find_spaces(encoder.folder, encoder.run_dir).get("instance")
    if encoder.folder is None or space is None:
        return None
    projections = project(encoder.folder, gallery.train.select("embedding"), space)
    if projections is None:
        return None
    unit = normalize(load_exported_prototypes(encoder.folder)["teacher"], dim=1)
    winners = (projections @ unit.T).argmax(dim=1)
    counts = torch.bincount(winners, minlength=len(unit))
    popular = counts.argsort(descending=True, stable=True)[:_ROWS]
    similarity = normalize(projections, dim=1) @ unit[popular].T
    rows = []
    for column, prototype in enumerate(popular.tolist()):
        closest = similarity[:, column].argsort(descending=True, stable=True)[: _NEIGHBOURS + 1]
        cells = [(gallery.train_images[index], _QUERY) for index in closest.tolist()]
        rows.append((f"#{prototype}", cells))
    png = _draw_rows(rows, f"Images nearest to the most used prototypes: {run}")
    caption = (
        f"One prototype a row, chosen by how many of the first {len(projections)} training images it "
        "wins by the logits."
    )
    return Chart(f"prototype_images_{run}", f"Images of prototypes: {run}", caption, png)


def draw_prototype_patches(gallery: Gallery, run: str) -> Chart | None:
    """Returns the patches nearest to the most used prototypes of patches, each with the patches around it.

    None where the run compared no patches with prototypes, or the checkpoint has not the head in front of them.
    """
    session = gallery.session
    encoder, transform = session.encoder, session.encoder.transform
    space = None if encoder.folder is None else find_spaces(encoder.folder, encoder.run_dir).get("patch")
    if encoder.folder is None or space is None or not isinstance(transform, Preprocessing):
        return None
    seen = list(project_patches(session, gallery.train.manifest, space, _PATCH_IMAGES))
    if not seen:
        return None
    images, projections = (torch.cat(parts) for parts in zip(*seen, strict=True))
    num_images, num_patches, _ = projections.shape
    grid = grid_shape(num_patches, transform.height_and_width, encoder.spec)
    unit = normalize(load_exported_prototypes(encoder.folder, space.prototypes)["teacher"], dim=1)
    winners = torch.cat([(rows @ unit.T).argmax(dim=1) for rows in projections])
    popular = torch.bincount(winners, minlength=len(unit)).argsort(descending=True, stable=True)[:_ROWS]
    # The best patch of each image: neighbours in one image would fill the row.
    similarity, place = (normalize(projections, dim=2) @ unit[popular].T).max(dim=1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
    rows = []
    for column, prototype in enumerate(popular.tolist()):
        closest = similarity[:, column].argsort(descending=True, stable=True)[: _NEIGHBOURS + 1].tolist()
        pictures = [_visible(images[i], mean, std, transform.format) for i in closest]
        places = place[closest, column].tolist()
        cut = [_cut_patch(*pair, grid) for pair in zip(pictures, places, strict=True)]
        rows.append((f"#{prototype}", [(picture, _QUERY) for picture in cut]))
    png = _draw_rows(rows, f"Patches nearest to the most used prototypes: {run}")
    caption = (
        f"One prototype a row, chosen by how many patches of the first {num_images} training images it wins; its "
        "nearest patch in each image is bright in the middle, those around it are dimmed."
    )
    return Chart(f"prototype_patches_{run}", f"Patches of prototypes: {run}", caption, png)


def _cut_patch(image: Float[Tensor, "C H W"], place: int, grid: tuple[int, int]) -> UInt8[Tensor, "3 T T"]:
    """Returns a patch of a grid, with as much as a patch around it on each side, dimmed; black beyond the image."""
    size = image.shape[-1] // grid[1]
    top, left = (place // grid[1]) * size, (place % grid[1]) * size
    dimmed = pad(_SHADE * image.clamp(0, 1), [size] * 4)
    around = dimmed[:, top : top + 3 * size, left : left + 3 * size].clone()
    around[:, size : 2 * size, size : 2 * size] /= _SHADE
    return _to_bytes(around)


@torch.inference_mode()
def draw_patch_components(gallery: Gallery, run: str) -> Chart | None:
    """Returns test images beside the three main components of their patch tokens; None without a token grid."""
    session, queries = gallery.session, gallery.queries()
    data, processes = session.config.data, Processes()
    manifest = gallery.test.manifest
    wanted = {int(gallery.test.sample_ids[q]): q for q in queries}
    images: dict[int, Tensor] = {}
    stream = open_stream(
        manifest,
        session.encoder.transform,
        data=data,
        processes=processes,
        limit=_ROWS * 12,
        format=session.encoder.transform.format,
    )
    for batch, _, ids in stream:
        images |= {wanted[i]: image for i, image in zip(ids.tolist(), batch, strict=True) if i in wanted}
    module = session.encoder.module.to("cpu").float()
    tokens = module.patch_tokens(torch.stack([images[q] for q in queries]))
    if tokens is None or tokens.shape[1] < 4:
        return None
    height, width = next(iter(images.values())).shape[-2:]
    try:
        grid = grid_shape(tokens.shape[1], (height, width), session.encoder.spec)
    except FeatureError:
        return None
    maps = _three_components(tokens.float(), grid)
    figure, axes = plt.subplots(2, len(queries), figsize=(4.7, 1.7), layout="constrained", squeeze=False)
    figure.suptitle(f"Patch tokens: {run}", fontsize=10, fontweight="bold", x=0.01, ha="left")
    for column, query in enumerate(queries):
        for row, picture in enumerate((gallery.test_images[query], maps[column])):
            axes[row, column].imshow(picture.permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
    caption = (
        "Each patch token's first three principal components over these images, shown as red, green and blue."
    )
    title = f"Patch tokens: {run}"
    return Chart(f"patch_components_{run}", title, caption, to_png(figure))


def draw_feature_map(gallery: Gallery, run: str) -> Chart:
    """Returns the test images' embeddings on their two main axes, one colour a class."""
    bank = gallery.session.banks[1]
    features = bank.select("embedding")[:_MAP_IMAGES].float()
    labels, classes = bank.labels[:_MAP_IMAGES], bank.manifest.classes
    points, share = _two_components(normalize(features, dim=1))
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "tab20")
    counted = torch.bincount(labels, minlength=len(classes))
    for label in counted.argsort(descending=True, stable=True)[:_MAP_CLASSES].sort().values.tolist():
        own = points[labels == label]
        colour = colours(label % colours.N)
        axes.scatter(own[:, 0], own[:, 1], s=5, color=colour, alpha=0.55, linewidths=0)
        if len(own):
            x, y = own.median(dim=0).values.tolist()
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": colour, "boxstyle": "round,pad=0.15"}
            axes.text(x, y, classes[label][:16], fontsize=6.5, ha="center", va="center", bbox=box)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"Feature map: {run}", loc="left", fontsize=10, fontweight="bold")
    caption = (
        f"Unit embeddings of the first {len(features)} test images on their first two principal components "
        f"({100 * share:.0f} % of the variance), names at the classes' medians"
        + (f"; the {_MAP_CLASSES} most frequent classes." if len(classes) > _MAP_CLASSES else ".")
    )
    return Chart(f"feature_map_{run}", f"Feature map: {run}", caption, to_png(figure))


def draw_crops(config: DataConfig, seed: int, run: str) -> Chart:
    """Returns the first images' global and local crops as the student sees them, colours included."""
    stream = TrainingStream(
        config, seed=seed, global_batch_size=_ROWS, micro_batch_size=_ROWS, rank=0, world_size=1
    )
    try:
        batch = next(iter(stream))
    finally:
        stream.close()
    crops = DeviceAugmentation(config)(batch)
    mean = torch.tensor(config.mean).view(-1, 1, 1)
    std = torch.tensor(config.std).view(-1, 1, 1)
    groups: list[list[_Cell]] = []
    for image in range(min(_ROWS, crops.global_crops.shape[1])):
        views = [*crops.global_crops[:, image], *crops.local_crops[:, image]]
        shown = [_visible(view, mean, std, config.format) for view in views[: _NEIGHBOURS + 1]]
        groups.append([(_to_bytes(view), "#FFFFFF") for view in shown])
    png = _draw_rows(_side_by_side(groups), f"Augmented crops: {run}")
    local = f", then {config.num_local_crops} local" if config.num_local_crops else ""
    caption = f"Views of one image stand together: {config.num_global_crops} global{local} crops."
    return Chart(f"crops_{run}", f"Augmented crops: {run}", caption, png)


def _side_by_side(groups: Sequence[list[_Cell]]) -> list[tuple[str, list[_Cell]]]:
    """Returns rows of as many groups as fit, a gap between two: one image of two views a row would fill the page."""
    size = max(len(group) for group in groups)
    fitting = max(1, (_NEIGHBOURS + 2) // (size + 1))
    rows: list[tuple[str, list[_Cell]]] = []
    for start in range(0, len(groups), fitting):
        cells = list(groups[start])
        for group in groups[start + 1 : start + fitting]:
            cells += [None, *group]
        rows.append(("", cells))
    return rows


def _three_components(tokens: Float[Tensor, "B N D"], grid: tuple[int, int]) -> UInt8[Tensor, "B 3 S S"]:
    flat = tokens.flatten(0, 1)
    centred = flat - flat.mean(dim=0)
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ basis[:3].T
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    scaled = ((scores - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    maps = scaled.view(len(tokens), *grid, 3).permute(0, 3, 1, 2)
    return (interpolate(maps, size=_SIDE, mode="nearest") * 255).to(torch.uint8)


def _two_components(rows: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N 2"], float]:
    """Returns the scores on the first two principal components, signs fixed, and their share of the variance."""
    centred = rows - rows.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.double().T @ centred.double())
    first = axes[:, [-1, -2]]
    signs = first.gather(0, first.abs().argmax(dim=0, keepdim=True)).sign()
    share = float(variances[-2:].sum() / variances.sum().clamp_min(1e-30))
    return (centred.double() @ (first * signs)).float(), share


def _visible(image: Tensor, mean: Tensor, std: Tensor, format: PixelFormat) -> Tensor:
    """Returns a normalised image as numbers in 0..1: as it was, or where that has no white, around its mean."""
    return image * std + mean if format.is_photograph else 0.5 + image / (2 * _SHOWN_DEVIATIONS)


def _to_bytes(image: Float[Tensor, "C H W"]) -> UInt8[Tensor, "3 S S"]:
    whole = interpolate(image[None].clamp(0, 1), size=_SIDE, mode="nearest")[0]
    shown = whole[:3] if len(whole) >= 3 else whole[:1]
    return (shown.expand(3, -1, -1) * 255).to(torch.uint8)


def _draw_rows(rows: Sequence[tuple[str, Sequence[_Cell]]], title: str) -> bytes:
    columns = max(len(cells) for _, cells in rows)
    has_names = any(name for name, _ in rows)
    size = (_CELL * columns + (0.6 if has_names else 0.1), (_CELL + 0.02) * len(rows) + 0.35)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    for row, (name, cells) in enumerate(rows):
        for column in range(columns):
            cell = axes[row, column]
            cell.set_xticks([])
            cell.set_yticks([])
            found = cells[column] if column < len(cells) else None
            if found is None:
                cell.set_axis_off()
                continue
            picture, colour = found
            cell.imshow(picture.permute(1, 2, 0).numpy())
            for spine in cell.spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return to_png(figure)
