"""What the data room can be told: shards, crops, the augmentation recipe, lanes and workers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from data.views.config import (
    RECIPES,
    PixelFormat,
    PixelType,
    Recipe,
    height_and_width,
    left_out,
    rule_of_masks,
)

RecipeName = Literal["dino", "carp", "grayscale-small", "none"]
SamplerName = Literal["uniform", "class_balanced", "square_root"]

_Probability = Annotated[float, "[0, 1]"]
_Share = Annotated[float, "(0, 1]"]
_Sigma = Annotated[float, "[0.01, 100]"]
# A masked crop keeps a patch.
_Part = Annotated[float, "[0, 0.99]"]
_Aspect = Annotated[float, "[0.01, 100]"]
_Side = Annotated[int, "[1, 1e4]"]
_Size = _Side | Annotated[tuple[_Side, _Side], "[height, width]"]

# Pillow's own warning level for decompression bombs: a quarter of a gigabyte of RGB.
MAX_IMAGE_PIXELS = 89_478_485


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What happens to a view, in place of what `data.recipe` has for it; null takes the recipe's.

    Blur and solarisation have one probability per global view; a further global view takes the last one's.
    """

    global_crop_scale: tuple[_Share, _Share] | None = None
    """Smallest and largest part of the image's area that a global crop covers."""
    local_crop_scale: tuple[_Share, _Share] | None = None
    """Smallest and largest part of the image's area that a local crop covers."""
    flip: _Probability | None = None
    """Probability of a horizontal flip."""
    vertical_flip: _Probability | None = None
    """Probability of a vertical flip, for images without an upright, such as satellites' and microscopes'."""
    quarter_turns: _Probability | None = None
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; after the flips."""
    jitter: _Probability | None = None
    """Probability of the colour jitter."""
    jitter_strength: (
        tuple[
            Annotated[float, "[0, 1]"],
            Annotated[float, "[0, 1]"],
            Annotated[float, "[0, 1]"],
            Annotated[float, "[0, 0.5]"],
        ]
        | None
    ) = None
    """Brightness, contrast, saturation and hue, in torchvision's sense; hue is a part of the full circle."""
    gray: _Probability | None = None
    """Probability of dropping the colours."""
    global_blur: tuple[_Probability, ...] | None = None
    """Probability of a Gaussian blur, for each global view."""
    local_blur: _Probability | None = None
    """Probability of a Gaussian blur of a local crop."""
    blur_sigma: tuple[_Sigma, _Sigma] | None = None
    """Smallest and largest standard deviation of the blur, in pixels."""
    global_solarize: tuple[_Probability, ...] | None = None
    """Probability of inverting pixels of 128 and more, for each global view."""
    local_solarize: _Probability | None = None
    """Probability of inverting pixels of 128 and more in a local crop."""

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for ranges in the wrong order and for no probability."""
        for name in ("global_crop_scale", "local_crop_scale", "blur_sigma"):
            pair = getattr(self, name)
            _require(pair is None or pair[0] <= pair[1], f"augmentation.{name}", pair, "smallest <= largest")
        for name in ("global_blur", "global_solarize"):
            values = getattr(self, name)
            _require(values is None or bool(values), f"augmentation.{name}", "empty", "a probability or more")


MaskKind = Literal["none", "block", "inverse_block"]


class _UsualMasks(NamedTuple):
    """What nulls of `MaskConfig` stand for."""

    crops: float
    ratio: tuple[float, float]
    aspect: tuple[float, float]
    predicted: float


_USUAL_MASKS: dict[str, _UsualMasks] = {
    # DINOv2 (Oquab et al. 2023): official code's defaults.
    "block": _UsualMasks(0.5, (0.1, 0.5), (0.3, 1 / 0.3), 1.0),
    # CAPI (Darcet et al. 2025): official code's defaults.
    "inverse_block": _UsualMasks(1.0, (0.65, 0.65), (0.5, 2.0), 0.05),
}


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches of a global crop the student does not see, for objectives that predict them; null: the kind's."""

    kind: MaskKind = "none"
    """`block`: a union of rectangles (iBOT, DINOv2); `inverse_block`: all but a rectangle that may go over the borders
    (CAPI).
    """
    patch_size: Annotated[int, "[1, 1e4]"] = 16
    """Side of a patch in pixels: the model's."""
    crops: _Probability | None = None
    """Probability that a global crop is masked. Null: .5 for blocks, 1 for inverse blocks."""
    ratio: tuple[_Part, _Part] | None = None
    """Smallest and largest share of a masked crop's patches that is hidden. Null: .1 .. .5 for blocks, .65 for inverse
    blocks. Blocks hide a few patches fewer; inverse blocks need one number, twice.
    """
    aspect: tuple[_Aspect, _Aspect] | None = None
    """Smallest and largest height by width of a rectangle. Null: .3 .. 3.33 for blocks, .5 .. 2 for inverse blocks."""
    min_patches: Annotated[int, "[1, 1e6]"] = 4
    """Smallest area of a rectangle of `block`, in patches; iBOT takes the square of a third of the grid's side."""
    predicted: _Share | None = None
    """Share of the hidden patches that is predicted. Null: 1 for blocks, .05 for inverse blocks."""

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for ranges in the wrong order."""
        for name in ("ratio", "aspect"):
            pair = getattr(self, name)
            _require(pair is None or pair[0] <= pair[1], f"masks.{name}", pair, "smallest <= largest")
        same = self.kind != "inverse_block" or self.ratio is None or self.ratio[0] == self.ratio[1]
        _require(same, "masks.ratio", self.ratio, "one number, twice, with inverse_block")

    @property
    def resolved_crops(self) -> float:
        """Probability that a global crop is masked."""
        return _USUAL_MASKS[self.kind].crops if self.crops is None else self.crops

    @property
    def resolved_ratio(self) -> tuple[float, float]:
        """Smallest and largest hidden share of a masked crop."""
        return _USUAL_MASKS[self.kind].ratio if self.ratio is None else self.ratio

    @property
    def resolved_aspect(self) -> tuple[float, float]:
        """Smallest and largest height by width of a rectangle."""
        return _USUAL_MASKS[self.kind].aspect if self.aspect is None else self.aspect

    @property
    def resolved_predicted(self) -> float:
        """Share of the hidden patches that is predicted."""
        return _USUAL_MASKS[self.kind].predicted if self.predicted is None else self.predicted


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images and what is cut from them."""

    # Options of former versions: the value that changed nothing, and what to do where it is another.
    FORMER: ClassVar[dict[str, tuple[Any, str]]] = {
        "global_crop_scale": (None, "set data.augmentation.global_crop_scale"),
        "local_crop_scale": (None, "set data.augmentation.local_crop_scale"),
    }

    images: str | None = None
    """Folder of images, with `shards` null: at the first start they are written as shards into `cache_dir`, and again
    when the folder has changed. Folders in it are classes, `train`, `val`, `test`, ... splits.
    """
    images_timeout_s: Annotated[float, "[1, 1e6]"] = 21600.0
    """Seconds that the other ranks wait while the first one writes the shards of `images`."""
    shards: str | None = None
    """Folder that holds `{split}-*.tar` and `manifest.json`, with `images` null; also `s3://`-like addresses of one."""
    split: str = "train"
    """Which split of that folder to train on."""
    image_key: str = ""
    """Which member is a sample's image, where samples hold several: its suffix, such as `jpg` or `rgb.png`,
    or several in order of preference (`jpg;png`). Empty takes the manifest's, else the one image.
    """
    sampler: SamplerName = "uniform"
    """`uniform` shows every image once an epoch; `class_balanced` gives every class the same share of an
    epoch, `square_root` a share that grows with the square root of the class's images.
    """
    recipe: RecipeName = "dino"
    """Augmentation by name: `dino`, `carp`, `grayscale-small` (grey images of about 28 x 28) or `none` (crops and flips
    alone). A preset of `data.augmentation`, whose options replace its values one by one.
    """
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    channels: Annotated[int, "[1, 1e4]"] = 3
    """Of 8 bits, 3 decodes every image to RGB, 1 to grey values (cheaper where the images are grey); otherwise images
    (TIFF, `.npy`) must hold as many bands, and recipes lose what is about colours.
    """
    pixels: PixelType = "uint8"
    """Type of the images' numbers: `uint8` and `uint16` are divided by their largest value, `float32` takes numbers of
    any type as they are. Mean and standard deviation are in the divided unit.
    """
    num_global_crops: Annotated[int, "[1, 100]"] = 2
    """Global crops an image, at least 1."""
    global_crop_size: _Size = 224
    """Side of a global crop in pixels, or its height and width."""
    num_local_crops: Annotated[int, "[0, 1000]"] = 6
    """Local crops an image; may be 0."""
    local_crop_size: _Size = 96
    """Side of a local crop in pixels, or its height and width."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How crops are resized (always antialiased)."""
    mean: tuple[Annotated[float, "[-1e9, 1e9]"], ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, or one for all, in [0, 1] but for `float32`; subtracted on the device. `python -m
    data.verify_shards SHARDS --statistics` computes it.
    """
    std: tuple[Annotated[float, "[1e-6, 1e9]"], ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, divided by on the device."""
    num_workers: Annotated[int, "[0, 1024]"] = 8
    """Loader processes a rank; 0 loads in the training process."""
    prefetch_factor: Annotated[int, "[1, 1024]"] = 2
    """Parts of micro-batches that each worker prepares ahead."""
    num_lanes: Annotated[int, "[1, 1e6]"] = 64
    """Independent streams into which an epoch is dealt: a multiple of every world size that the run will ever use,
    and at least world size x `num_workers`. Changing it changes the order of the samples.
    """
    shuffle_window: Annotated[int, "[1, 1e7]"] = 64
    """Encoded samples that a lane reads ahead and shuffles; 1 keeps the order within shards."""
    max_skipped_fraction: Annotated[float, "[0, 1]"] = 0.001
    """The run stops once more than this part of the samples could not be decoded."""
    verify_hash: bool = False
    """Compare every shard's SHA-256 with the manifest when it is first opened."""
    max_image_pixels: Annotated[int, "[1, 1e12]"] = MAX_IMAGE_PIXELS
    """A larger image counts as bad (a decompression bomb)."""
    max_worker_memory_gib: Annotated[float, "[0.1, 1e6]"] = 8.0
    """A worker whose resident memory passes this stops the run."""
    cache_dir: str = "datasets/cache"
    """Where shards of remote addresses and of `images` are kept."""
    cache_gib: Annotated[float, "[0.01, 1e9]"] = 50.0
    """Bound of what it holds of a remote address."""
    allow_pipe: bool = False
    """Allow `pipe:` addresses, which run shell commands."""

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for values that do not go together, and for empty names."""
        for name, highest in (("mean", 1.0), ("std", 10.0)):
            values = getattr(self, name)
            rule = f"one number or {self.channels}, as data.channels is {self.channels}: verify_shards --statistics"
            _require(len(values) in (1, self.channels), name, values, rule)
            scaled = self.pixels == "float32" or all(0 <= value <= highest for value in values)
            rule = f"numbers in [0, {highest:g}], as {self.pixels} pixels are divided by {self.format.full_scale:g}"
            _require(scaled, name, values, rule)
        self._refuse_colours()
        if (kind := self.masks.kind) != "none":
            share = self.masks.resolved_crops and self.masks.resolved_ratio[1]
            rule = rule_of_masks(self.global_size, self.masks.patch_size, kind == "block", share)
            _require(not rule, "global_crop_size", self.global_crop_size, rule)
        require_one_source(images=self.images, shards=self.shards)
        has_source = self.images is not None or self.shards is not None
        _require(has_source, "shards", "null", "a folder of shards, or one of images in data.images")
        _require(bool(self.split), "split", repr(self.split), "the name of a split")

    def check_ranks(self, world_size: int) -> None:
        """Refuses a number of ranks whose loader processes the lanes cannot serve: a lane has one reader.

        Raises:
            ValueError: one line; ranks would have unequally many lanes, or a loader process none.
        """
        workers = max(1, self.num_workers)
        if self.num_lanes % world_size:
            remedy = "set data.num_lanes (another number is another order of samples)"
        elif self.num_lanes < world_size * workers:
            remedy = (
                f"set data.num_workers to at most {self.num_lanes // world_size}, or data.num_lanes before the first "
                "start (another number is another order of samples)"
            )
        else:
            return
        raise ValueError(
            f"data.num_lanes is {self.num_lanes}; expected a multiple of the world size {world_size} and at least "
            f"{world_size * workers} = world size x {workers} workers; {remedy}"
        )

    @property
    def written_shards(self) -> str:
        """The shards, to which `images` give way before anything reads them."""
        assert self.shards is not None, "data.images are written as shards first"
        return self.shards

    @property
    def global_size(self) -> tuple[int, int]:
        """Height and width of a global crop."""
        return height_and_width(self.global_crop_size)

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of a local crop."""
        return height_and_width(self.local_crop_size)

    @property
    def mask_grid(self) -> tuple[int, int]:
        """Rows and columns of a global crop's patches."""
        height, width = self.global_size
        return height // self.masks.patch_size, width // self.masks.patch_size

    @property
    def format(self) -> PixelFormat:
        """What images are decoded to."""
        return PixelFormat(self.channels, self.pixels)

    @property
    def resolved_augmentation(self) -> Recipe:
        """What happens to a view: the recipe with the values of `augmentation` that are not null.

        Of images that are neither RGB nor 8 bits in grey, without what is about colours.
        """
        given = {name: value for name, value in vars(self.augmentation).items() if value is not None}
        recipe = replace(RECIPES[self.recipe], **given)
        return replace(recipe, **left_out(recipe, self.format))

    @property
    def left_out_of_recipe(self) -> tuple[str, ...]:
        """Options of the recipe's augmentation that do not apply to these images."""
        return tuple(left_out(RECIPES[self.recipe], self.format))

    def _refuse_colours(self) -> None:
        """Refuses what is asked for by name and would not happen; of a recipe it is left out."""
        given = {name: value for name, value in vars(self.augmentation).items() if value is not None}
        for name, neutral in left_out(replace(RECIPES["none"], **given), self.format).items():
            rule = f"{neutral}, as images of {self.channels} x {self.pixels} have no colours"
            _require(name not in given, f"augmentation.{name}", given.get(name), rule)


def require_one_source(**places: str | None) -> None:
    """Checks the options of `data` that say where the images are: of several, each would have to be read alone.

    Args:
        places: name and value of each, the one that excludes the others first.

    Raises:
        ValueError: one is empty, or the first stands beside another.
    """
    given = {f"data.{name}": repr(place) for name, place in places.items() if place is not None}
    for key, shown in given.items():
        if shown == "''":
            raise ValueError(f"{key} is ''; expected a folder, or null; set {key}")
    first, *others = (f"data.{name}" for name in places)
    for other in others:
        if first in given and other in given:
            raise ValueError(
                f"{first} is {given[first]} and {other} is {given[other]}; expected one of them; set {other}=null, or "
                f"{first}=null"
            )


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"data.{name} is {value}; expected {rule}; set data.{name}")
