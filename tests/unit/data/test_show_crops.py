"""The picture of crops shows every view of every image, de-normalised."""

import numpy as np
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


def test_a_wrong_folder_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith("error: data.shards is")
