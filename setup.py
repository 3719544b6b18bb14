"""pip install .               the library and the command `mdistiller`
pip install -e .            the same, straight from this clone
pip install -e .[dev]       and what `make test` and `make lint` need
pip install -e .[detection] and what detectron2 needs, which itself is installed apart: docs/detection.md
pip install -e .[timm]      and timm, whose networks are named timm/NAME and hf-hub:USER/REPO
pip install -e .[hf]        and Hugging Face datasets, for DATASET.TYPE hf
pip install -e .[ray]       and Ray, for tools/table.py --ray
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
LINES = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
REQUIREMENTS = [line for line in LINES if line and not line.startswith("#")]
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mdistiller" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None



class BuildWithConfigs(build_py):
    """A wheel carries configs/ and plans/ inside the package, where mdistiller/paths.py looks for them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "plans"):
                shutil.copytree(HERE / folder, Path(self.build_lib) / "mdistiller" / folder, dirs_exist_ok=True)


setup(
    name="mdistiller",
    version=VERSION[1],
    description="Knowledge distillation in PyTorch: MDistiller's methods and DCGD",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mdistiller", "mdistiller.*"]),
    package_data={"mdistiller": ["py.typed", "**/*.json", "**/*.html"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    entry_points={"console_scripts": ["mdistiller = mdistiller.commands.main:main"]},
    cmdclass={"build_py": BuildWithConfigs},
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "scipy>=1.11", "mpmath>=1.3",
                "setuptools>=70.1", "ruff>=0.6", "mypy>=1.11", "types-PyYAML", "types-psutil", "types-tqdm",
                "nbclient>=0.10", "ipykernel>=6.29", "ray>=2.30", "timm>=1.0.9", "datasets>=2.19"],
        "timm": ["timm>=1.0.9"],
        "hf": ["datasets>=2.19"],
        "ray": ["ray>=2.30"],
        "detection": ["fvcore>=0.1.5,<0.1.6", "iopath>=0.1.9,<0.1.10", "omegaconf>=2.1,<2.4", "hydra-core>=1.1",
                      "pycocotools>=2.0.7", "cloudpickle", "termcolor>=1.1", "tabulate", "tensorboard", "packaging",
                      "Pillow>=9.4", "opencv-python-headless>=4.8", "setuptools<82"],
    },
)  # fmt: skip
