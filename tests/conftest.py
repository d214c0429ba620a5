import pytest

from support.toy import make_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's files, small: folder/model, folder/glue."""
    return make_demo(tmp_path_factory.mktemp("demo"), steps=20, rows=64, quiet=True)
