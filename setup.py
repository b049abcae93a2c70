from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# Upper bounds are the first versions nobody has tried: the engine relies on seams inside DeepSpeed.
RECIPES = [
    "accelerate>=1.15,<2",
    "matplotlib>=3.9,<4",
    "safetensors>=0.5,<1",
    "scikit-learn>=1.5,<2",
    "tensorboard>=2.18,<3",
    "torchvision>=0.26,<0.30",
    "tqdm>=4.66,<5",
    "transformers>=5.17,<6",
]
TEST = [
    "import-linter>=2.17,<3",
    "mypy>=2.4,<3",
    "pytest>=9,<10",
    "pytest-timeout>=2.4,<3",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.17,<0.18",
]

setup(
    name="ds_ddg",
    version="0.1.0",
    description="Decoupled delayed-gradient (DDG) training for DeepSpeed pipelines: no bubble, one changed line",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ds_ddg", "ds_ddg.*"]),
    package_data={"ds_ddg": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["deepspeed>=0.19.8,<0.20", "pydantic>=2,<3", "torch>=2.11,<2.16", "typing_extensions>=4.4"],
    extras_require={"recipes": RECIPES, "test": RECIPES + TEST},
    entry_points={"console_scripts": ["ds-ddg = ds_ddg.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
