"""Image sets whose images are PNG, JPEG and other files: folders of classes, and Parquet files."""

import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .released import Found

PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}  # first one wins
DECODED = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # EPS would run a program
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
GREY, COLOUR = {"1", "L", "LA"}, {"P", "RGB", "RGBA", "CMYK", "YCbCr"}  # modes of 8 bits


def image_folder(folder: Path, split: str) -> Found:
    """A folder of images for each class, in train and in test (or val); classes by name."""
    place = next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)
    if place is None:
        raise ValueError(f"it has no folder {' or '.join(SPLITS[split])}")
    names, own = (
        sorted(path.name for path in each.iterdir() if path.is_dir())
        for each in (folder / "train", place)
    )
    if unknown := set(own) - set(names):
        raise ValueError(f"{place} has classes that train has not: {', '.join(sorted(unknown))}")
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((place / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    labels = np.array([label for _, label in files], np.int32)
    return Found(labels, tuple(names), lambda: decoded([(str(path), path) for path, _ in files]))


def parquet(folder: Path, split: str) -> Found:
    """Files or folders named after splits: a struct with `bytes`, and a column of labels."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("the package pyarrow is needed: install it") from error
    files = parquet_files(folder, split)
    schema: Any = pq.read_schema(files[0])
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name, kind in kinds.items() if re.match(r"struct<.*\bbytes: ", kind)]
    integers = [name for name, kind in kinds.items() if re.match("u?int", kind)]
    named = [name for name in ("label", "labels", "fine_label") if name in integers]
    label = named[:1] or integers
    if len(images) != 1 or len(label) != 1:
        raise ValueError(f"{files[0]} has columns {kinds}, not one of images and one of labels")

    def column(name: str) -> list[Any]:
        tables = (pq.read_table(file, columns=[name])[name] for file in files)
        return [value for table in tables for value in table.to_pylist()]

    def pixels() -> np.ndarray:
        files = [(f"{split} image {i}", x["bytes"]) for i, x in enumerate(column(images[0]))]
        return decoded(files)

    note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = note.get("info", {}).get("features", {}).get(label[0], {})
    return Found(np.array(column(label[0])), tuple(feature.get("names", ())), pixels)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, train-00000-of-00002.parquet or train/0000.parquet, say."""
    known = {name for names in SPLITS.values() for name in names}
    found: dict[str, list[Path]] = {}
    for path in sorted(path for sign in PARQUET for path in folder.glob(sign)):
        word = re.match("[a-z]*", path.name)[0]  # pyright: ignore[reportOptionalSubscript]
        word = word if word in known else path.parent.name
        found.setdefault(word, []).append(path)
    files = next((found[name] for name in SPLITS[split] if name in found), [])
    if not files:
        raise ValueError(f"no file is named after {' or '.join(SPLITS[split])}")
    places = {str(path.parent) for path in files}
    if len(places) > 1:
        raise ValueError(f"several sets: choose one of {', '.join(sorted(places))}")
    return files


def decoded(sources: Sequence[tuple[str, Path | bytes | None]]) -> np.ndarray:
    """Named image files as uint8 [n, h, w, c], with c = 1 if all are grey, else 3."""
    from PIL import Image

    images: np.ndarray = np.empty(0, np.uint8)
    modes: set[str] = set()
    for i, (name, source) in enumerate(sources):
        try:
            file = source if isinstance(source, Path) else BytesIO(source or b"")
            with Image.open(file, formats=DECODED) as image:
                modes.add(image.mode)
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # codecs raise many types
            raise ValueError(f"{name} can't be decoded ({type(error).__name__})") from error
        if i == 0:
            images = np.empty((len(sources), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (h, w), (height, width) = pixels.shape[:2], images.shape[1:3]
            raise ValueError(f"{name} is {h} x {w}, {sources[0][0]} is {height} x {width}")
        images[i] = pixels
    if deep := modes - GREY - COLOUR:
        raise ValueError(f"images have mode {', '.join(sorted(deep))}, not 8 bits for each channel")
    return np.ascontiguousarray(images[..., :1]) if modes <= GREY else images
