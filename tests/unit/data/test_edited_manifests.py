"""A manifest that somebody edited by hand is refused in one line, and never read as another set."""

import json
import shutil
from pathlib import Path

import pytest

from data.shards import DataError, load_manifest
from tests.helpers.digits import write_digit_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_digit_shards(
        tmp_path_factory.mktemp("digits") / "shards", num_train=24, num_test=12, per_shard=12
    )


EDITS = {
    "classes are text": lambda split: split.update(classes="0123456789"),
    "classes are numbers": lambda split: split.update(classes=list(range(10))),
    "one class ten times": lambda split: split.update(classes=["a"] * 10),
    "too few counts": lambda split: split.update(images_per_class=[1, 2]),
    "counts are text": lambda split: split.update(images_per_class=["a"] * 10),
    "a shard twice": lambda split: split.update(shards=split["shards"] * 2, index_path=""),
    "a negative ordinal": lambda split: split["shards"][0].update(ordinals=[-1, 0]),
    "an ordinal beyond": lambda split: split["shards"][0].update(ordinals=[0, 12]),
    "an ordinal twice": lambda split: split["shards"][0].update(ordinals=[3, 3]),
    "nothing selected": lambda split: [shard.update(ordinals=[]) for shard in split["shards"]],
    "an index that is a number": lambda split: split.update(index_path=3),
    "notes in a list": lambda split: split.update(notes=[1]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(tmp_path, shards, edit):
    document = json.loads((Path(shards) / "manifest.json").read_text())
    edit(document["splits"]["train"])
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="is damaged at split 'train'"):
        load_manifest(str(tmp_path / "copy"), "train")
    assert load_manifest(str(tmp_path / "copy"), "test").num_samples == 12


def test_brackets_without_end_are_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        load_manifest(str(tmp_path), "train")
