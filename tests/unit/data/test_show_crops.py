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
    assert capsys.readouterr().err.startswith("error: SHARDS is")


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
    [
        ("tilt=1", "names no augmentation"),
        ("flip=1,2", "2 numbers"),
        ("flip=x", "'flip=x' holds 'x'; expected a number in [0, 1]"),
        ("flip=", "'flip=' holds ''; expected a number in [0, 1]"),
        ("flip=nan", "expected a number in [0, 1]"),
        ("global_blur=1,2", "'global_blur=1,2' holds '2'; expected a number in [0, 1]"),
        ("global_crop_scale=0,1", "expected a number in (0, 1]"),
        ("jitter_strength=.2,.2", "has 2 numbers; expected 4"),
    ],
)
def test_no_option_of_the_augmentation_is_one_line(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["nowhere", "--augment", option])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--global-size", "0", "[1, 1e4]"),
        ("--local-size", "1e3", "[1, 1e4]"),
        ("--local-crops", "-1", "[0, 1000]"),
        ("--images", "0", "[1, 1e6]"),
        ("--channels", "0", "[1, 1e4]"),
    ],
)
def test_a_number_out_of_its_option_s_range_is_one_line(option, value, rule, capsys):
    with pytest.raises(SystemExit) as end:
        main(["nowhere", option, value])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument {option}: '{value}'; expected a whole number in {rule}")


def test_a_mistake_names_this_program_s_options(make_set, tmp_path, capsys):
    shards, out = make_set([6]), str(tmp_path / "x.png")
    for options, said in (
        (["--split", "val"], "--split is 'val'; expected one of"),
        (
            ["--augment", "blur_sigma=2,1"],
            "--augment blur_sigma is (2.0, 1.0); expected smallest <= largest",
        ),
        (["--channels", "7"], "of --channels=7 and --pixels=uint8"),
    ):
        assert main([shards, "--out", out, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "data.split" not in line and "data.augm" not in line
