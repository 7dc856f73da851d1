"""Image sets in the formats of other tools: the same arrays, or one line that says why not."""

import gzip
import io
import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from experiments import resnet_cifar
from experiments.deep import config as flags, setup, training
from experiments.launch import cli
from sgd_sparse_jax import data

RNG = np.random.default_rng(0)
SPLITS = {"train": 20, "test": 10}
LABELS = {split: np.sort(np.arange(n) % 10) for split, n in SPLITS.items()}  # as folders of classes
COLOUR = {split: RNG.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in SPLITS.items()}
GREY = {split: RNG.integers(0, 256, (n, 28, 28, 1), np.uint8) for split, n in SPLITS.items()}
BATCHES = [(f"data_batch_{i + 1}", "train", slice(4 * i, 4 * i + 4)) for i in range(5)]
BATCHES += [("test_batch", "test", slice(None))]
WHOLE = [(split, split, slice(None)) for split in SPLITS]


def rows(part):
    """Images as rows of three colour planes."""
    return part.transpose(0, 3, 1, 2).reshape(len(part), -1)


def python_2(pixels, labels, key):
    """A dict as cPickle of Python 2 writes it with protocol 2, byte by byte."""
    text = lambda word: b"U" + bytes([len(word)]) + word
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape) + b"\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    array += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key.encode()) + numbers + b"u."


def python_3(protocol):
    return lambda pixels, labels, key: pickle.dumps(
        {"data": pixels, key: labels.tolist(), "filenames": ["a.png"]}, protocol
    )


def cifar_python(folder, images, parts=BATCHES, write=python_2, key="labels"):
    for name, split, part in parts:
        content = write(rows(images[split][part]), LABELS[split][part], key)
        (folder / name).write_bytes(content)
    ten = key == "labels"
    names = {"label_names" if ten else "fine_label_names": list("abcdefghij")}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names))


def cifar_100_python(folder, images):
    cifar_python(folder, images, WHOLE, python_2, "fine_labels")


def cifar_binary(folder, images, parts=BATCHES, coarse=0, names="batches.meta.txt"):
    for name, split, part in parts:
        labels = LABELS[split][part, None].astype(np.uint8)
        table = np.hstack([*[99 - labels] * coarse, labels, rows(images[split][part])])
        (folder / f"{name}.bin").write_bytes(table.tobytes())
    (folder / names).write_text("\n".join("abcdefghij") + "\n\n")


def cifar_100_binary(folder, images):
    cifar_binary(folder, images, WHOLE, 1, "fine_label_names.txt")


def idx(folder, images, pack=False, under="raw"):
    (folder / under).mkdir(exist_ok=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        pixels, labels = images[split][..., 0], LABELS[split].astype(np.uint8)
        for what, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content += array.tobytes()
            path = folder / under / f"{name}-{what}{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(content) if pack else content)


def svhn(folder, images):
    for split in SPLITS:
        labels = np.where(LABELS[split] == 0, 10, LABELS[split])[:, None].astype(np.uint8)
        content = {"X": images[split].transpose(1, 2, 3, 0), "y": labels}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=True)


def npy(folder, images):
    for split in SPLITS:
        np.save(folder / f"{split}_images.npy", images[split])
        np.save(folder / f"{split}_labels.npy", LABELS[split])


def keras(folder, images):
    arrays = {f"x_{split}": images[split].squeeze() for split in SPLITS}
    np.savez(folder / "set.npz", **arrays, **{f"y_{s}": LABELS[s][:, None] for s in SPLITS})


def npz(folder, images):
    for split in SPLITS:
        np.savez(folder / f"{split}.npz", images=images[split], labels=LABELS[split])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "png")
    return file.getvalue()


def image_folder(folder, images, test="test"):
    for split, place in (("train", "train"), ("test", test)):
        for i, (pixels, label) in enumerate(zip(images[split], LABELS[split], strict=True)):
            path = folder / place / f"class {label}" / f"{i:03d}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    (folder / "train" / "class 0" / "notes.txt").write_text("not an image")


def parquet(folder, images, place="data/{}-00000-of-00001.parquet", note=True):
    """As `datasets` writes it: https://huggingface.co/docs/hub/datasets-image."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"img": kind, "fine_label": pa.int64(), "coarse_label": pa.int64()})
    features = {"fine_label": {"names": list("abcdefghij"), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in SPLITS:
        cells = [{"bytes": png(pixels), "path": "x.png"} for pixels in images[split]]
        columns = [cells, LABELS[split], LABELS[split] // 2]
        table = pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
        )
        path = folder / place.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(about if note else None), path)


FORMS = {
    "CIFAR-10 of Python 2": (COLOUR, cifar_python),
    **{
        f"CIFAR-10, protocol {n}": (
            COLOUR,
            lambda folder, images, n=n: cifar_python(folder, images, write=python_3(n)),
        )
        for n in (4, 5)
    },
    "CIFAR-100 of Python 2": (COLOUR, cifar_100_python),
    "CIFAR-10, binary": (COLOUR, cifar_binary),
    "CIFAR-100, binary": (COLOUR, cifar_100_binary),
    "SVHN": (COLOUR, svhn),
    "npy": (COLOUR, npy),
    "npz": (COLOUR, npz),
    "grey npz": (GREY, npz),
    "IDX": (GREY, idx),
    "IDX.gz": (GREY, lambda folder, images: idx(folder, images, True, ".")),
    "images": (COLOUR, image_folder),
    "grey images": (GREY, lambda folder, images: image_folder(folder, images, "val")),
    "Parquet": (COLOUR, parquet),
    "grey Parquet": (
        GREY,
        lambda folder, images: parquet(folder, images, "cfg/{}/0.parquet", False),
    ),
}


def load(folder, split="train", root=None):
    return data.load_images(f"path:{folder}", split, data_dir=root)


def assert_same(found, images, split):
    np.testing.assert_array_equal(found.images, images[split])
    np.testing.assert_array_equal(found.labels, LABELS[split])
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_gives_the_same_arrays(form, tmp_path):
    images, write = FORMS[form]
    write(tmp_path, images)
    found = {split: load(tmp_path, split) for split in SPLITS}
    for split in SPLITS:
        assert_same(found[split], images, split)
    assert found["train"].class_names == found["test"].class_names
    assert len(found["train"].class_names) == 10


def test_a_file_stands_for_its_folder_or_holds_all_arrays(tmp_path, monkeypatch):
    keras(tmp_path, GREY)
    parquet(tmp_path, COLOUR, "{}.parquet")
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        assert_same(load(tmp_path / "set.npz", split), GREY, split)
        assert_same(load("set.npz", split, root=tmp_path), GREY, split)
        Path("set.npz").rename("elsewhere.zip")
        assert_same(load("train.parquet", split), COLOUR, split)
        Path("elsewhere.zip").rename("set.npz")


@pytest.mark.parametrize(
    ("name", "place", "images", "write"),
    [
        ("cifar10", "cifar-10-batches-py", COLOUR, cifar_python),
        ("cifar10", "cifar-10-batches-bin", COLOUR, cifar_binary),
        ("cifar100", "cifar-100-python", COLOUR, cifar_100_python),
        ("cifar100", "cifar-100-binary", COLOUR, cifar_100_binary),
        ("svhn", ".", COLOUR, svhn),
        ("mnist", "MNIST", GREY, idx),
        ("fashion_mnist", "FashionMNIST", GREY, idx),
    ],
)
def test_folders_of_torchvision_are_read_by_name(name, place, images, write, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    write(tmp_path / place, images)
    for split in SPLITS:
        found = data.load_images(name, split, data_dir=tmp_path)
        assert_same(found, images, split)
        assert found.class_names == data.IMAGE_SETS[name].class_names
    wrong = GREY if images is COLOUR else COLOUR
    if write in (idx, svhn):
        write(tmp_path / place, {split: pixels[..., :1] for split, pixels in wrong.items()})
        with pytest.raises(ValueError, match=r"expected uint8 \[n, "):
            data.load_images(name, "train", data_dir=tmp_path)


def refused(folder, split="train"):
    """The error in one line, which names the folder."""
    with pytest.raises(ValueError) as error:
        load(folder, split)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and len(message) < 900
    return message


@pytest.mark.parametrize("form", ["CIFAR-10 of Python 2", "CIFAR-10, binary", "IDX", "SVHN", "npy"])
def test_a_missing_file_is_named_with_all_that_are_expected(form, tmp_path):
    images, write = FORMS[form]
    write(tmp_path, images)
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        split = "test" if path.name.startswith(("t10k", "test")) else "train"
        message = refused(tmp_path, split)
        assert str(path) in message and "missing" in message
        path.write_bytes(content[:-7])  # truncated
        if "meta" not in path.name:
            assert "expected" in refused(tmp_path, split)
        path.write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_a_label_out_of_range_is_refused(form, tmp_path, monkeypatch):
    images, write = FORMS[form]
    if "images" in form:
        write(tmp_path, images)
        (tmp_path / ("val" if "grey" in form else "test") / "class 10").mkdir()
        assert "class 10" in refused(tmp_path, "test")
        return
    monkeypatch.setitem(LABELS, "test", LABELS["test"] + 3)
    write(tmp_path, images)
    assert "from 0 to 9, one for each of 10 images" in refused(tmp_path, "test")
    load(tmp_path)  # training labels are right


@pytest.mark.parametrize("form", ["images", "Parquet"])
def test_mixed_sizes_and_damaged_images_are_refused(form, tmp_path, monkeypatch):
    mixed = [*COLOUR["train"][:7], COLOUR["train"][7][:16], *COLOUR["train"][8:]]
    FORMS[form][1](tmp_path, {"train": mixed, "test": COLOUR["test"]})
    assert "is 16 x 32" in refused(tmp_path)
    monkeypatch.setitem(globals(), "png", lambda pixels: b"%!PS-Adobe-3.0 EPSF-3.0\n")
    FORMS[form][1](tmp_path, COLOUR)
    assert "can't be decoded" in refused(tmp_path)


class Harm:
    """Its pickle would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["data_batch_3", "batches.meta"])
def test_nothing_in_a_file_is_executed(where, tmp_path):
    sprung = tmp_path / "sprung"
    folder = tmp_path / "set"
    folder.mkdir()
    cifar_python(folder, COLOUR)
    for content in (
        pickle.dumps({"data": Harm(sprung), "labels": [0]}),
        pickle.dumps({b"data": COLOUR["train"], b"labels": [Harm(sprung)]}, 2),
        b"cnumpy.testing\nmeasure\n(X\x05\x00\x00\x001 + 1tR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04quit\x85R.",
    ):
        (folder / where).write_bytes(content)
        assert "would execute" in refused(folder)
        assert not sprung.exists()
    for name, write in (("train_labels.npy", npy), ("train.npz", npz)):
        shutil.rmtree(folder)
        folder.mkdir()
        write(folder, COLOUR)
        objects = np.array([Harm(sprung)] * 20)
        if name.endswith("npz"):
            np.savez(folder / name, images=COLOUR["train"], labels=objects)
        else:
            np.save(folder / name, objects)
        refused(folder)
        assert not sprung.exists()


def test_unsuitable_folders_are_refused(tmp_path):
    assert "doesn't exist" in refused(tmp_path / "nowhere")
    for k in range(5):
        (tmp_path / f"{k}.txt").touch()
    message = refused(tmp_path)
    page = re.search(r"docs/\w+\.md", message)
    assert "0.txt" in message and "2 more" in message
    assert page and (Path(__file__).parents[1] / page[0]).exists()
    assert len(message) - len(str(tmp_path)) < 300
    parquet(tmp_path / "a", COLOUR, "{}.parquet")
    parquet(tmp_path / "b", COLOUR, "{}.parquet")
    assert str(tmp_path / "b") in refused(tmp_path)  # one of several sets has to be chosen
    assert_same(load(tmp_path / "b"), COLOUR, "train")


@pytest.fixture
def argv(tmp_path):
    """Flags of a small run on images of 16 x 8 pixels in three classes."""
    (tmp_path / "mine").mkdir()
    for split in SPLITS:
        np.save(tmp_path / "mine" / f"{split}_images.npy", COLOUR[split][:, ::2, ::4])
        np.save(tmp_path / "mine" / f"{split}_labels.npy", LABELS[split] % 3)
    return (
        f"--dataset=path:mine --data_dir={tmp_path} --runs_dir={tmp_path}/runs --max_steps=1 "
        "--model=shallow --model_width=2 --batch_size=8 --batch_size_eval=8 --bn_images=16 "
        "--lr_init=0.05 --lr_schedule=constant --eval_iter_freq=1 --no_data_augm"
    ).split()


def classes_and_shape(config):
    """Of the network that the flags name."""
    network, shape = setup.network_of(config)
    x = jnp.zeros((1, *shape), jnp.float32)
    return jax.eval_shape(lambda key: network.apply(*network.init(key, x), x), jr.key(0)).out, shape


@pytest.mark.usefixtures("shallow", "single_precision")
def test_the_flags_of_a_run_take_sizes_and_classes_from_the_data(argv, tmp_path, capsys):
    config = cli.parse(flags.Config, argv)
    logits, shape = classes_and_shape(config)
    assert logits.shape == (1, 3) and shape == (16, 8, 3)
    plan = setup.resolve(config)
    assert "-mine-shallow-" in plan.folder.name and len(plan.images.class_names) == 3
    np.save(tmp_path / "mine" / "test_images.npy", COLOUR["test"])
    for more in ([], ["--dataset=path:nowhere"], ["--dataset=nowhere"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(flags.Config, training.run, argv + more)
        error = capsys.readouterr().err
        assert stop.value.code == 1
        assert error.startswith("error: --dataset") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("shallow", "unrendered", "single_precision")
def test_a_run_continues_where_its_data_are_moved(argv, tmp_path, capsys):
    run = training.run(cli.parse(flags.Config, argv))
    weights = setup.load_weights(run, *setup.network_of(flags.of_folder(run)))
    (tmp_path / "new").mkdir()
    (tmp_path / "mine").rename(tmp_path / "new" / "mine")
    resnet_cifar.main([*argv, f"--data_dir={tmp_path}/new", "--max_steps=2"])
    assert "step 2: train loss" in capsys.readouterr().out
    after = setup.load_weights(run, *setup.network_of(flags.of_folder(run)))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), weights, after)
    assert not all(jax.tree.leaves(same))
