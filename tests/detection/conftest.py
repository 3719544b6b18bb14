"""A small synthetic COCO set, and filters for the deprecation warnings that detectron2 causes with newer torch."""

import importlib.util

import pytest

if importlib.util.find_spec("detectron2"):
    import detection  # noqa: F401  (before any test: it suppresses detectron2's warnings at import)

DEPRECATED = (
    "ignore:torch.meshgrid. in an upcoming release:UserWarning",
    "ignore:.*torch.jit.*:FutureWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:.*torch.cuda.amp.*:FutureWarning",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # pycocotools
    "ignore:The 'warn' method is deprecated:DeprecationWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/detection" in str(item.path):
            for text in DEPRECATED:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A folder that holds coco/; its data sets are also registered as synthetic_train and synthetic_val."""
    from tests.detection import _small

    return _small.make_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def small_cfg(datasets, tmp_path):
    """`small_cfg("DKD/DKD-R18-R101", "KEY", "VALUE", ...)`: that config, narrow, on the synthetic set."""
    from tests.detection import _small

    def build(name, *opts):
        return _small.load(name, *_small.ON_SYNTHETIC, "OUTPUT_DIR", str(tmp_path / "out"), *opts)

    return build
