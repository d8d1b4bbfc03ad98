import pytest

from tests.helpers.digits import write_digit_shards


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory):
    return write_digit_shards(tmp_path_factory.mktemp("digits"))
