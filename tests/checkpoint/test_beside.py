"""Where what is measured of a model is kept."""

import os

import pytest

from alaya_jax.checkpoint import beside


def test_places_are_near_the_model_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    near, cached = beside.places("basis", "a model", ".bin", tmp_path / "model")
    assert near.parent == tmp_path / "model"
    assert cached.parent == tmp_path / "cache" / "basis"
    assert near.name == cached.name == beside.file_name("basis", "a model", ".bin")
    assert beside.places("basis", "a model", ".bin", None) == [cached]
    assert beside.file_name("basis", "another", ".bin") != near.name


def test_it_is_kept_where_that_can_be(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    where = [file / "x", tmp_path / "deep" / "y"]
    assert beside.keep(lambda path: beside.replace(path, b"1"), where) == where[1]
    assert where[1].read_bytes() == b"1"
    with pytest.raises(FileExistsError):
        beside.keep(lambda path: beside.replace(path, b"1"), where[:1])


def test_a_file_is_replaced_whole(tmp_path):
    place = tmp_path / "x.json"
    beside.replace(place, b"old")
    beside.replace(place, b"new")
    assert place.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.json"]
