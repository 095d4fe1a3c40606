"""Finds the packages of the wheel below the folders named in pyproject.toml's package-dir table."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())
folders: dict[str, str] = project["tool"]["setuptools"]["package-dir"]

setup(
    packages=[
        package
        for root, folder in folders.items()
        for package in [root, *(f"{root}.{name}" for name in find_packages(folder))]
    ]
)
