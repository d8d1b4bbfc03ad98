"""What the data room can be told: shards, crops, the augmentation recipe, lanes and workers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

RecipeName = Literal["dino", "carp", "grayscale-small", "none"]
SamplerName = Literal["uniform", "class_balanced", "square_root"]

# Pillow's own warning level for decompression bombs: a quarter of a gigabyte of RGB.
MAX_IMAGE_PIXELS = 89_478_485


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published augmentation recipe: the crops' geometry and what happens to their colours.

    Blur and solarisation have one probability per global view; a further global view takes the last one's.
    """

    global_crop_scale: tuple[float, float]
    """Smallest and largest part of the image's area that a global crop covers."""
    local_crop_scale: tuple[float, float]
    """The same for local crops."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of the colour jitter."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue, in torchvision's sense."""
    gray: float = 0.2
    """Probability of dropping the colours."""
    global_blur: tuple[float, ...] = (1.0, 0.1)
    """Probability of a Gaussian blur, for each global view."""
    local_blur: float = 0.5
    """The same for local crops."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    global_solarize: tuple[float, ...] = (0.0, 0.2)
    """Probability of inverting pixels of 128 and more, for each global view."""
    local_solarize: float = 0.0
    """The same for local crops."""


RECIPES: dict[str, Recipe] = {
    # Caron et al. 2021, "Emerging properties in self-supervised vision transformers", official code's defaults.
    "dino": Recipe(global_crop_scale=(0.4, 1.0), local_crop_scale=(0.05, 0.4)),
    # Silva & Ramirez Rivera 2023, "Representation learning via consistent assignment of views over random
    # partitions", official code's defaults.
    "carp": Recipe(global_crop_scale=(0.2, 1.0), local_crop_scale=(0.05, 0.2)),
    # For grey images of about 28 x 28: no colours to jitter, and a two-pixel blur would leave nothing to see.
    "grayscale-small": Recipe(
        global_crop_scale=(0.3, 1.0),
        local_crop_scale=(0.1, 0.3),
        jitter_strength=(0.4, 0.4, 0.0, 0.0),
        gray=0.0,
        global_blur=(0.5, 0.1),
        local_blur=0.2,
        blur_sigma=(0.1, 1.0),
        global_solarize=(0.0, 0.1),
    ),
    # Geometry only.
    "none": Recipe(
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        jitter=0.0,
        gray=0.0,
        global_blur=(0.0,),
        local_blur=0.0,
        global_solarize=(0.0,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images and what is cut from them."""

    shards: str
    """Folder that holds `{split}-*.tar` and `manifest.json`; also `s3://`-like addresses of one."""
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
    """Augmentation by name, see `RECIPES`."""
    channels: Literal[1, 3] = 3
    """3 decodes every image to RGB, 1 to grey values (cheaper where the images are grey)."""
    num_global_crops: Annotated[int, "[1, 100]"] = 2
    """Global crops an image, at least 1."""
    global_crop_size: Annotated[int, "[1, 1e4]"] = 224
    """Side of a global crop in pixels."""
    global_crop_scale: tuple[Annotated[float, "(0, 1]"], Annotated[float, "(0, 1]"]] | None = None
    """Area range of global crops; null takes the recipe's."""
    num_local_crops: Annotated[int, "[0, 1000]"] = 6
    """Local crops an image; may be 0."""
    local_crop_size: Annotated[int, "[1, 1e4]"] = 96
    """Side of a local crop in pixels."""
    local_crop_scale: tuple[Annotated[float, "(0, 1]"], Annotated[float, "(0, 1]"]] | None = None
    """Area range of local crops; null takes the recipe's."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How crops are resized (always antialiased)."""
    mean: tuple[Annotated[float, "[0, 1]"], ...] = (0.485, 0.456, 0.406)
    """Mean of the channels in [0, 1], subtracted on the device."""
    std: tuple[Annotated[float, "[1e-3, 10]"], ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, divided by on the device."""
    num_workers: Annotated[int, "[0, 1024]"] = 8
    """Loader processes a rank; 0 loads in the training process."""
    prefetch_factor: Annotated[int, "[1, 1024]"] = 2
    """Parts of micro-batches that each worker prepares ahead."""
    num_lanes: Annotated[int, "[1, 1e6]"] = 64
    """Independent streams into which an epoch is dealt; a multiple of every world size that the run will ever
    use. Changing it changes the order of the samples.
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
    """Where shards of remote addresses are kept."""
    cache_gib: Annotated[float, "[0.01, 1e9]"] = 50.0
    """Bound of that folder."""
    allow_pipe: bool = False
    """Allow `pipe:` addresses, which run shell commands."""

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for values that do not go together, and for empty names."""
        for name in ("global_crop_scale", "local_crop_scale"):
            scale = getattr(self, name)
            _require(scale is None or scale[0] <= scale[1], name, scale, "smallest <= largest")
        for name in ("mean", "std"):
            values = getattr(self, name)
            rule = f"one number or {self.channels}, as data.channels is {self.channels}"
            _require(len(values) in (1, self.channels), name, values, rule)
        _require(bool(self.shards), "shards", repr(self.shards), "a folder of shards")
        _require(bool(self.split), "split", repr(self.split), "the name of a split")

    @property
    def resolved_global_crop_scale(self) -> tuple[float, float]:
        """The area range of global crops: the configuration's, else the recipe's."""
        return self.global_crop_scale or RECIPES[self.recipe].global_crop_scale

    @property
    def resolved_local_crop_scale(self) -> tuple[float, float]:
        """The area range of local crops: the configuration's, else the recipe's."""
        return self.local_crop_scale or RECIPES[self.recipe].local_crop_scale


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"data.{name} is {value}; expected {rule}; set data.{name}")
