"""tools/regions.py and the regions of data.py: from pictures and rows to a file, from the file to
samples."""

import base64
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from tools import regions, shapes

ROOT = Path(__file__).resolve().parent.parent
META = {"detector": "a test", "root": "/pictures", "label_names": '["none", "thing", "x"]'}
REGIONS = {"source": "pairs", "regions": "regions"}


def found(name, n, seed=0, dim=6):
    """What a detector may find in a picture: n regions."""
    g = np.random.default_rng([seed, n])
    corner = g.random((n, 2)) * 20
    return {"name": name, "size": (64, 48), "boxes": np.concatenate([corner, corner + 9], 1),
            "labels": g.integers(0, 3, n), "scores": -np.sort(-g.random(n)),
            "features": g.standard_normal((n, dim))}


def records_of(*locations):
    records = data.Records("pairs", "train")
    for n, where in enumerate(locations):
        records.append({"image": where, "image_id": n, "caption": ["a"]})
    return records


def stub_detector(monkeypatch):
    """A detector that finds one box in every picture, at no cost."""
    def look(model, image):
        return {"features": np.full((1, 4), image.shape[-1]), "boxes": np.array([[0.0, 0, 2, 2]]),
                "labels": np.array([1]), "scores": np.ones(1)}

    model = SimpleNamespace(to=lambda device: None,
                            transform=SimpleNamespace(min_size=(800,), max_size=1333))
    monkeypatch.setattr(regions, "load_detector", lambda *a: (model, ["none", "thing"], "a stub"))
    monkeypatch.setattr(regions, "detect", look)


def test_the_regions_view(tmp_path):
    """The first max_regions rows, padded; KEY_global where the file has it."""
    out = str(tmp_path / "r.safetensors")
    items = [found(f"{n}.jpg", n) | {"globals": np.full(5, n)} for n in range(4)]
    meta = {**META, "global_feature": "a test's"}
    regions.collect_regions(out, items, 4, lambda item: item, meta, quiet=True)
    records = data.with_regions(records_of("/pictures/3.jpg", "/pictures/1.jpg"), REGIONS, out)
    assert data.stats(records) == {"region_dim": 6, "region_classes": 3, "global_dim": 5,
                                   "regions": "a test"}

    sample = data.Views(records, REGIONS, None, None, None)[1]
    assert sample["regions"].shape == (3, 6) and sample["regions"].dtype == torch.float16
    assert sample["regions_mask"].tolist() == [1, 0, 0]
    assert sample["regions_label"].tolist() == [*items[1]["labels"], -1, -1]
    assert sample["regions_size"].tolist() == [64, 48]
    assert sample["regions_global"].tolist() == [1] * 5
    np.testing.assert_allclose(sample["regions_box"][0], items[1]["boxes"][0], rtol=1e-6)
    np.testing.assert_allclose(sample["regions"][0], items[1]["features"][0], atol=2e-3)
    assert not sample["regions"][1:].any() and not sample["regions_box"][1:].any()

    narrow = data.Views(records, REGIONS, None, None, None, max_regions=2)[0]
    assert narrow["regions"].shape == (2, 6) and narrow["regions_mask"].tolist() == [1, 1]
    np.testing.assert_allclose(narrow["regions_box"], items[3]["boxes"][:2], rtol=1e-6)


def test_pictures_of_a_tar(tmp_path, monkeypatch, capsys):
    """--images takes tar shards; a picture in a tar is named by tar and byte, in the file and in
    a warning, and found again there."""
    stub_detector(monkeypatch)
    Image.new("RGB", (30, 20)).save(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").write_text("no picture")
    (tmp_path / "shards").mkdir()
    tar = str(tmp_path / "shards" / "0.tar")
    with tarfile.open(tar, "w") as f:
        for n in (1, 2):
            (tmp_path / f"{n}.txt").write_text("a")
            f.add(tmp_path / f"{n}.jpg", f"{n}.jpg")
            f.add(tmp_path / f"{n}.txt", f"{n}.txt")
    out = str(tmp_path / "r.safetensors")
    args = ["--images", str(tmp_path / "shards"), "--out", out, "--device", "cpu"]
    assert regions.main(args) == 0

    printed, warned = capsys.readouterr()
    assert re.search(r"pictures +1\n +unreadable, left out +1\n", printed)
    records = data.open_source("pairs", tar, "train")
    assert f"unreadable image {records[1]['image']}: no image format" in warned
    assert list(next(data.Regions([out]).tables())) == [data.picture_name(records[0]["image"], "")]
    attached = data.with_regions(records, REGIONS, out)
    assert len(attached) == 1 and attached[0]["regions"] == 0
    assert data.Views(attached, REGIONS, None, None, None)[0]["regions"].tolist() == [[30] * 4]


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def test_the_command(tmp_path):
    """`python -m tools.regions`, as a user calls it; data.py reads what it makes."""
    boxes, features = np.eye(4, dtype="f4")[:3], np.arange(15, dtype="f4").reshape(3, 5)
    row = ["12", "64", "48", "3", b64(boxes), b64(features)]
    (tmp_path / "a.tsv").write_text("\t".join(row) + "\n")
    out = tmp_path / "r.safetensors"
    command = [sys.executable, "-m", "tools.regions", "--tsv", str(tmp_path / "a.tsv"),
               "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"regions +3\n", done.stdout) and "feature size" in done.stdout
    file = data.Regions([str(out)])
    np.testing.assert_array_equal(file[0]["features"], features)
    assert (file.about, file.classes) == ("bottom-up-attention (a.tsv)", 0)


@pytest.mark.parametrize("args, words", [
    ([], r"name the pictures \(--images\) or bottom-up-attention files \(--tsv\)"),
    (["--images", "a", "--tsv", "b"], "name the pictures"),
    (["--images", "empty"], "--images empty: no image files in it"),
    (["--images", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--tsv", "nowhere.tsv"], "--tsv nowhere.tsv: no such file"),
    (["--tsv", "a.tsv", "--global_feature", "resnet50"], "--global_feature looks at pictures"),
    (["--images", "one", "--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
    (["--images", "one", "--weights", "text.pth"], "--weights.*text.pth cannot be read as weights"),
    (["--images", "one", "--weights", "other.pth"], "--weights other.pth: no Faster R-CNN"),
    (["--images", "one", "--random_weights", "--shard", "1"], "no picture could be read"),
])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.jpg").write_text("no picture")
    (tmp_path / "a.tsv").write_text("")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match=words) as caught:
        regions.main([*args, "--out", "r.safetensors", "--device", "cpu"])
    assert "\n" not in str(caught.value) and not Path("r.safetensors").exists()


def test_weights_that_do_not_fit(tmp_path):
    """Named by the flag and the kind of model, for the CNN of --global_feature as well."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(data.DataError, match="--global_weights .*not the weights of ResNet"):
        regions.load_global("resnet50", str(tmp_path / "w.pth"))

    # a file of torchvision's, and the same with a prefix of DDP
    state = regions.load_global("densenet121", "", random=True)[0].state_dict()
    state |= {"classifier.weight": torch.zeros(1000, 1024), "classifier.bias": torch.zeros(1000)}
    for prefix in ("", "module."):
        torch.save({prefix + name: t for name, t in state.items()}, tmp_path / "w.pth")
        model, about = regions.load_global("densenet121", str(tmp_path / "w.pth"))
        weight = model.state_dict()["features.conv0.weight"]
        assert torch.equal(weight, state["features.conv0.weight"]) and "RANDOM" not in about


def test_messages_name_the_tool():
    with pytest.raises(data.DataError, match=r"--regions FILE \(python -m tools.regions makes"):
        data.with_regions(records_of("x.jpg"), REGIONS)
    as_they_are = records_of("x.jpg")
    assert data.with_regions(as_they_are, {"image": "plain"}, "nowhere") is as_they_are


# --------------------------------------------------------------------------------------------------
# The built-in world brings its own file

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shapes.ensure(tmp_path_factory.mktemp("world") / "shapes", quiet=True, scale=0.02)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_regions_of_the_built_in_world(world, split, monkeypatch):
    """with_regions finds regions_SPLIT.safetensors at the world's root: a region of each object."""
    monkeypatch.setattr(shapes, "ensure", lambda: world)
    pairs = data.open_source("pairs", "shapes", split)
    records = data.with_regions(pairs, REGIONS)
    assert len(records) == len(pairs) and "stand-in for a detector" in records.regions.about
    assert records.regions.label_names == list(shapes.SHAPES)

    views = data.Views(records, REGIONS, None, None, None)
    for i in range(5):
        sample, record = views[i], records[i]
        n = len(record["boxes"])
        assert sample["regions_mask"].sum() == n
        assert sample["regions_box"][:n].tolist() == record["boxes"]
        assert sample["regions_label"][:n].tolist() == record["labels"]
        assert sample["regions_size"].tolist() == [64, 64]


@pytest.mark.parametrize("name", ["clean", "noisy"])
def test_stages_of_the_built_in_world(world, name):
    """clean.jsonl and noisy.jsonl are read as pairs; the training file has their regions."""
    records = data.open_source("pairs", str(world / f"{name}.jsonl"), "train")
    assert "missing" not in records.notes
    assert len(data.with_regions(records, REGIONS)) == len(records)
