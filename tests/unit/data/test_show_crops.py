"""The picture of crops shows every view of every image, de-normalised."""

import numpy as np
import pytest
from PIL import Image

from data.show_crops import main


def test_a_picture_is_written(make_set, tmp_path):
    out = tmp_path / "crops.png"
    shards = make_set([6])
    sizes = ["--global-size", "20", "--local-size", "10", "--local-crops", "3", "--images", "2"]
    assert main([shards, "--out", str(out), "--recipe", "none", *sizes]) == 0
    picture = np.array(Image.open(out))
    # Two rows of 20 pixels and three columns of margins; 2 x 20 + 3 x 10 pixels and six margins.
    assert picture.shape == (2 * 24 + 4, 2 * 24 + 3 * 14 + 4, 3)
    crop = picture[4:24, 4:24]
    assert 60 < crop.mean() < 200 and crop.std() > 20
    assert (picture[:4] == 255).all()


def test_what_is_no_picture_of_ours_is_not_replaced(make_set, tmp_path, capsys):
    shards = make_set([6])
    sizes = ["--recipe", "none", "--global-size", "20", "--local-crops", "0", "--images", "2"]
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    for name, rule in (
        ("photo.png", "expected a new name"),
        ("text.png", "expected a new name"),
        ("x.jpg", "ends with .png"),
    ):
        assert main([shards, "--out", str(tmp_path / name), *sizes]) == 2
        assert rule in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    for _ in range(2):  # its own it replaces
        assert main([shards, "--out", str(tmp_path / "crops.png"), *sizes]) == 0


def test_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith("error: data.shards is")


def test_options_of_the_augmentation_are_shown(make_set, tmp_path):
    """A turn of every view shows in the picture; what is no option is said before anything is read."""
    shards = make_set([6])
    sizes = ["--global-size", "20", "--local-crops", "0", "--images", "2", "--recipe", "none"]
    pictures = []
    for options in (["flip=0"], ["flip=0", "vertical_flip=1"]):
        out = tmp_path / "crops.png"
        assert main([shards, "--out", str(out), *sizes, "--augment", *options]) == 0
        pictures.append(np.array(Image.open(out)))
    plain, flipped = (picture[4:24, 4:24] for picture in pictures)
    assert np.array_equal(plain[::-1], flipped) and not np.array_equal(plain, flipped)


@pytest.mark.parametrize(
    ("option", "message"),
    [("tilt=1", "names no augmentation"), ("flip=1,2", "2 numbers"), ("flip=x", "flip=x")],
)
def test_no_option_of_the_augmentation_is_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["nowhere", "--augment", option])
    assert end.value.code == 2 and message in capsys.readouterr().err
