"""Packages and where they lie; everything else about the distribution stands in pyproject.toml.

`kernels/` and `bench/` are source roots, not packages: an importable name `kernels` would shadow the package of that
name on the Python package index, which transformers imports whenever it can be found.
"""

from setuptools import find_packages, setup

PACKAGE_DIR = {"vit_kernels": "kernels/vit_kernels", "vit_engine": "vit_engine", "vit_bench": "bench/vit_bench"}

packages = []
for name, folder in PACKAGE_DIR.items():
    packages += [name] + [f"{name}.{child}" for child in find_packages(folder)]

setup(
    packages=packages,
    package_dir=PACKAGE_DIR,
    package_data={
        "vit_kernels": ["py.typed"],
        "vit_bench": ["py.typed"],
        "vit_engine": ["py.typed", "digits/*.safetensors", "digits/*.json", "digits/heldout/*"],
    },
)
