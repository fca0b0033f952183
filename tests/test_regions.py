"""tools/regions.py and the regions of formats.py: from pictures and rows to a file, from the file
to samples."""

import base64
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import formats
from models import imagebert
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


def make(*args):
    """The command line that makes region files -> its exit status."""
    return regions.main(list(map(str, args)))


# --------------------------------------------------------------------------------------------------
# A file: made part by part, mapped and read

def test_regions_file_round_trip(tmp_path):
    out = str(tmp_path / "r.safetensors")
    items = [(f"{n}.jpg", n % 5) for n in range(23)] + [None]
    bad = regions.collect_regions(out, items, len(items), lambda i: i and found(*i), META, shard=4,
                                quiet=True)
    assert bad == 1 and not Path(out + ".parts").exists()

    # what went in comes out
    r = data.Regions([out])
    assert (len(r), r.dim, r.classes, r.most, r.global_dim, r.about) == (23, 6, 3, 4, 0, "a test")
    for n in range(23):
        want = found(*items[n])
        for key in ("boxes", "labels", "scores", "features"):
            np.testing.assert_allclose(r[n][key], want[key], atol=2e-3)
        assert r[n]["sizes"].tolist() == [64, 48]
    assert next(r.tables())["7.jpg"] == 7

    # the format is what it says it is
    official = load_file(out)
    assert official["features"].shape == (sum(n % 5 for n in range(23)), 6)
    assert official["offsets"][-1] == len(official["labels"])

    # mapped, not read
    features = r.files[0][0]["features"]
    assert isinstance(features.base, np.ndarray) and not features.flags.owndata
    assert len(pickle.dumps(r)) < 300
    assert np.array_equal(pickle.loads(pickle.dumps(r))[9]["features"], r[9]["features"])

    # several files count on
    two = data.Regions([out, out])
    assert len(two) == 46 and np.array_equal(two[30]["features"], r[7]["features"])


def test_regions_files_that_are_not_right(tmp_path):
    out, items = str(tmp_path / "r"), [(f"{n}.jpg", n % 5) for n in range(23)]
    regions.collect_regions(out, items, 23, lambda i: found(*i), META, quiet=True)
    regions.collect_regions(out + "2", items, 23, lambda i: found(*i, dim=7), META, quiet=True)
    with pytest.raises(data.DataError, match="differ in feature size"):
        data.Regions([out, out + "2"])

    def huge(item):
        return {**found(*item), "features": np.full((item[1], 6), 1e6)}
    with pytest.raises(data.DataError, match="picture 1.jpg: .* not finite"):
        regions.collect_regions(out + "3", items, 23, huge, META, quiet=True)

    Path(out).write_bytes(Path(out).read_bytes()[:300])
    with pytest.raises(data.DataError, match="not a whole"):
        data.Regions([out])


def test_regions_go_on_after_a_stop(tmp_path):
    items, looked = [(f"{n}.jpg", 2) for n in range(10)], []

    def look(item):
        looked.append(item[0])
        if len(looked) == 8:
            raise KeyboardInterrupt
        return found(*item)

    # stopped; another command is refused
    out = str(tmp_path / "r.safetensors")
    with pytest.raises(KeyboardInterrupt):
        regions.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    for other in (dict(metadata={**META, "detector": "another"}),
                  dict(metadata=META, source="other pictures, as many")):
        with pytest.raises(data.DataError, match="begun with other settings or other pictures"):
            regions.collect_regions(out, items, 10, look, **other, shard=3, quiet=True)

    # the same one goes on, to the file that an undisturbed one makes
    regions.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    assert looked[8:] == ["6.jpg", "7.jpg", "8.jpg", "9.jpg"]   # two parts of three were whole
    whole = str(tmp_path / "w.safetensors")
    regions.collect_regions(whole, items, 10, lambda i: found(*i), META, shard=3, quiet=True)
    assert Path(out).read_bytes() == Path(whole).read_bytes()


def test_regions_survive_kill_9_at_every_point(tmp_path, monkeypatch):
    """A process that dies without a chance to tidy up, at each look, each renaming and each
    removal: the same command then makes the file that an undisturbed one makes, and another
    command is refused as long as a part of the first one lies there."""
    items, events = [(f"{n}.jpg", 2) for n in range(7)], []

    def count():
        events.append(0)
        if len(events) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(real):
        def call(*args):
            count()
            result = real(*args)
            count()
            return result
        return call

    def look(item):
        return found(*item)

    def collect(out, look=look, meta=META):
        regions.collect_regions(str(out), items, 7, look, meta, shard=3, quiet=True)

    collect(tmp_path / "whole")
    whole, last, deaths = (tmp_path / "whole").read_bytes(), 0, 0
    for last in range(1, 100):
        # a child dies at its event number `last`, until one gets through
        out = tmp_path / f"{last}"
        child = os.fork()
        if not child:
            for name in ("replace", "remove", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            collect(out, dying(look))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        deaths += 1

        # what it left: not for another command, enough for the same one
        if list(tmp_path.glob(f"{last}.parts/*.safetensors")):
            with pytest.raises(data.DataError, match="begun with other"):
                collect(out, meta={**META, "detector": "another"})
        collect(out)
        assert out.read_bytes() == whole and not Path(f"{out}.parts").exists()

    # looks; plan, parts, whole; what is removed; the folder
    assert deaths == 2 * (7 + 5 + 4 + 1)


def sparse_regions(path, n):
    """A regions file of n pictures with 36 regions each, whose large arrays are holes."""
    names = [f"{i}.jpg".encode() for i in range(n)]
    small = {"offsets": np.arange(0, 36 * n + 1, 36, dtype=np.int64),
             "names": np.frombuffer(b"".join(names), np.uint8),
             "name_ends": np.cumsum([len(x) for x in names], dtype=np.int64)}
    arrays = {"offsets": ("I64", [n + 1]), "name_ends": ("I64", [n]), "labels": ("I64", [36 * n]),
              "sizes": ("I64", [n, 2]), "boxes": ("F32", [36 * n, 4]), "scores": ("F32", [36 * n]),
              "features": ("F16", [36 * n, 2048]), "names": ("U8", [len(small["names"])])}
    header, at = {"__metadata__": {"detector": "a test"}}, 0
    for key, (dtype, shape) in arrays.items():
        size = math.prod(shape) * {"I64": 8, "F32": 4, "F16": 2, "U8": 1}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size

    # only the small arrays are written
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
        for key, array in small.items():
            f.seek(8 + len(text) + header[key]["data_offsets"][0])
            f.write(array.tobytes())


def resident():
    """Memory of this process in MB; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0.0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_file_larger_than_memory(tmp_path):
    """100,000 pictures of 36 regions, 15 GB: opened, listed and read here and there in less than
    100 MB."""
    n, path = 100_000, tmp_path / "r.safetensors"
    sparse_regions(path, n)
    assert path.stat().st_size > 14e9
    before = resident()
    r = data.Regions([str(path)])
    table = next(r.tables())
    assert len(r) == len(table) == n and table["99999.jpg"] == 99_999
    for i in range(0, n, 5000):
        assert r[i]["features"].shape == (36, 2048) and r[i]["features"].sum() == 0
    assert resident() - before < 100


def test_making_a_file_takes_the_memory_of_one_part(tmp_path):
    def look(n):                                        # 150 kB each, 30 MB in all
        return {**found(f"{n}.jpg", 36), "features": np.ones((36, 2048), np.float16)}
    tracemalloc.start()
    regions.collect_regions(str(tmp_path / "r"), range(200), 200, look, META, shard=5, quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "r").stat().st_size > 29e6 and peak < 6e6, peak


# --------------------------------------------------------------------------------------------------
# Regions of records, and as a view

def test_pictures_are_found_by_name(tmp_path):
    def file(name, names, root):
        regions.collect_regions(str(tmp_path / name), names, None,
                              lambda n: found(n, 1, seed=len(n)), {**META, "root": root},
                              quiet=True)
        return str(tmp_path / name)

    def get(files, *images):
        attached = data.Regions(files).attach(records_of(*images))
        return [record["regions"] for record in attached]

    # by as much of the path as is needed
    a = file("a", ["train/1.jpg", "val/1.jpg", "val/2.jpg"], "/data/coco")
    places = "/data/coco/val/1.jpg", "/elsewhere/coco/train/1.jpg", "/elsewhere/val/2.jpg"
    assert get([a], *places) == [1, 0, 2]
    out = data.Regions([a]).attach(records_of("/data/coco/val/1.jpg", "/data/coco/val/9.jpg"))
    assert len(out) == 1 and out.notes["without_regions"] == 1 and out.regions.dim == 6
    with pytest.raises(data.DataError, match="none of the 1 records"):
        get([a], "/x/9.jpg")

    # two folders, one name
    b = file("b", ["1.jpg"], "/data/one")
    with pytest.raises(data.DataError, match="another picture"):
        get([b], "/x/train/1.jpg", "/x/val/1.jpg")
    c = file("c", ["1.jpg"], "/data/two")
    assert get([b, c], "/data/two/1.jpg") == [1]
    with pytest.raises(data.DataError, match="2 pictures"):
        get([b, c], "/moved/1.jpg")

    # in a tar by its member's name
    tar = file("tar", ["0.tar/x.jpg"], "/shards")
    assert get([tar], formats.TarMember("/anywhere/0.tar", 512, 99, "x.jpg")) == [0]

    # nobody named a regions file
    nothing = data.Records("pairs", "train", str(tmp_path))
    nothing.append({"image": "x.jpg", "image_id": 0})
    with pytest.raises(data.DataError, match="--regions"):
        data.with_regions(nothing, imagebert.VIEWS["pretrain"])
    plain = {"source": "pairs", "image": "plain"}
    assert data.with_regions(records_of("x"), plain, a).regions is None


def test_messages_name_the_tool():
    with pytest.raises(data.DataError, match=r"--regions FILE \(python -m tools.regions makes"):
        data.with_regions(records_of("x.jpg"), REGIONS)
    as_they_are = records_of("x.jpg")
    assert data.with_regions(as_they_are, {"image": "plain"}, "nowhere") is as_they_are


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


def test_evaluation_looks_at_one_side(squares):
    view = imagebert.VIEWS["pretrain"]
    records = data.open_source("pairs", str(squares.small), "test")
    records = data.with_regions(records, view, str(squares.regions))
    tok = data.get_tokenizer(squares.vocab)
    batch = next(data.iter_eval(records, view, tok, None, 8, what="image", batch_size=4))
    assert batch["regions"].shape == (4, 2, 48) and "text" not in batch
    batch = next(data.iter_eval(records, view, tok, None, 8, what="text", batch_size=4))
    assert "regions" not in batch and batch["text"].shape == (4, 8)


# --------------------------------------------------------------------------------------------------
# --images

def test_extraction_goes_on_with_the_same_pictures_only(tmp_path, monkeypatch, capsys):
    stub_detector(monkeypatch)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"c.png", b"d.png"):     # one is not UTF-8
        path = os.path.join(os.fsencode(folder), name)
        Image.new("RGB", (20, 10), (9, 9, 9)).save(path, format="png")
    (folder / "e.jpg").write_bytes(b"no picture")
    Image.new("RGB", (1, 3000)).save(folder / "f.png")  # resized, it would have no width left
    args = ["--images", folder, "--out", tmp_path / "r.safetensors", "--shard", "1",
            "--device", "cpu"]

    real, seen = regions.detect, []

    def stops(model, image):
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(model, image)

    # stopped at the third picture
    monkeypatch.setattr(regions, "detect", stops)
    with pytest.raises(KeyboardInterrupt):
        make(*args)

    # as many pictures, but others
    (folder / "a.png").rename(folder / "z.png")
    with pytest.raises(data.DataError, match="other pictures"):
        make(*args)

    # the same ones: on from there; what is no picture is left out, and said
    (folder / "z.png").rename(folder / "a.png")
    assert make(*args) == 0 and len(seen) == 5
    out, err = capsys.readouterr()
    assert re.search(r"unreadable, left out +2\n", out)
    assert "e.jpg: no image format" in err and "1x3000 pixels, too narrow" in err
    names = next(data.Regions([str(tmp_path / "r.safetensors")]).tables())
    assert set(names) == {"a.png", os.fsdecode(b"caf\xe9.png"), "c.png", "d.png"}


def test_pictures_of_a_tar(tmp_path, monkeypatch, capsys):
    """--images takes tar shards; a picture in a tar is named by tar and member, and found again
    there; a warning names tar and byte."""
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
    assert list(next(data.Regions([out]).tables())) == ["0.tar/1.jpg"]
    attached = data.with_regions(records, REGIONS, out)
    assert len(attached) == 1 and attached[0]["regions"] == 0
    assert data.Views(attached, REGIONS, None, None, None)[0]["regions"].tolist() == [[30] * 4]


def read_picture(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


@pytest.fixture
def pictures(tmp_path):
    """Two small pictures and a file that is none, in tmp_path/pictures/sub."""
    folder = tmp_path / "pictures" / "sub"
    folder.mkdir(parents=True)
    for n in range(2):
        noise = np.random.default_rng(n).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.png")
    (folder / "2.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture
def small_detector(monkeypatch):
    """load_detector() that looks at small pictures and few proposals: a test's patience."""
    real = regions.load_detector

    def small(*args):
        model, names, about = real(*args)
        model.transform.min_size = (64,)
        model.rpn._post_nms_top_n = {"training": 30, "testing": 30}
        return model, names, about
    monkeypatch.setattr(regions, "load_detector", small)
    return small


def test_detector(tmp_path, pictures, small_detector, capsys):
    """Torchvision's Faster R-CNN with random weights on small pictures: boxes inside, features of
    the boxes, one picture unreadable."""
    out = str(tmp_path / "r.safetensors")
    assert make("--images", tmp_path / "pictures", "--out", out, "--random_weights", "--top", "7",
                "--min_score", "0", "--device", "cpu", "--global_feature", "resnet50") == 0
    text = capsys.readouterr()
    assert "RANDOM" in text.out and "not the 1,600 of Visual Genome" in text.out
    assert "2.jpg" in text.err

    # seven regions of each picture, by falling score
    r = data.Regions([out])
    assert (len(r), r.dim, r.classes, r.most, r.global_dim) == (2, 1024, 91, 7, 2048)
    assert r.label_names[1] == "person" and "RANDOM" in r.about
    for n in range(2):
        boxes = r[n]["boxes"]
        assert len(boxes) == 7 and (boxes >= 0).all()
        assert (boxes[:, 2] <= 60).all() and (boxes[:, 3] <= 40).all()
        assert (np.diff(r[n]["scores"]) <= 0).all() and (r[n]["labels"] > 0).all()

    # torchvision's own way through gives the same
    model, picture = small_detector("", 7, 0.0, True)[0], read_picture(pictures / "1.png")
    with torch.no_grad():
        want = model([picture])[0]
    for key in ("boxes", "labels", "scores"):
        np.testing.assert_allclose(r[1][key], want[key].numpy(), rtol=1e-4, atol=1e-4)
    again = regions.detect(model, picture)
    np.testing.assert_allclose(again["features"].astype("f2"), r[1]["features"], rtol=1e-2,
                               atol=1e-3)

    # an image without regions is an image too
    none = regions.detect(small_detector("", 7, 0.99, True)[0], torch.rand(3, 40, 60))
    assert none["features"].shape == (0, 1024) and none["boxes"].shape == (0, 4)


def test_weights_of_a_detector(tmp_path):
    state = regions.load_detector("", 7, 0.0, True)[0].state_dict()
    torch.save(state, tmp_path / "good.pth")
    loaded, names, about = regions.load_detector(str(tmp_path / "good.pth"), 5, 0.1)
    key = "rpn.head.cls_logits.weight"
    assert torch.equal(loaded.state_dict()[key], state[key])
    assert "RANDOM" not in about and len(names) == 91


@pytest.mark.parametrize("name,dim", [("densenet121", 1024), ("googlenet", 1024)])
def test_global_features(name, dim):
    model, about = regions.load_global(name, "", random=True)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, dim) and "RANDOM" in about


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


# --------------------------------------------------------------------------------------------------
# --tsv: bottom-up-attention files

def b64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def tsv_row(image_id, n, labels=False, dim=8):
    """A line of such a file, and the boxes, features, scores and labels in it."""
    g = np.random.default_rng(image_id)
    boxes = g.random((n, 4)).astype("f4")
    features = g.standard_normal((n, dim)).astype("f4")
    scores = g.random(n).astype("f4")
    kinds = g.integers(0, 1600, n)
    if labels:
        cells = [image_id, 48, 64, b64(kinds), b64(scores), b64(kinds), b64(scores), n,
                 b64(boxes), b64(features)]
    else:
        cells = [image_id, 64, 48, n, b64(boxes), b64(features)]
    return "\t".join(map(str, cells)) + "\n", boxes, features, scores, kinds


@pytest.mark.parametrize("labels", [False, True])
def test_bottom_up_attention_files(tmp_path, labels, capsys):
    rows = [tsv_row(n, c, labels) for n, c in ((7, 10), (391895, 36), (12, 100))]
    (tmp_path / "a.tsv").write_text("".join(r[0] for r in rows))
    out = str(tmp_path / "r.safetensors")
    assert make("--tsv", tmp_path / "a.tsv", "--out", out, "--shard", "2") == 0
    assert "10 to 100" in capsys.readouterr().out
    r = data.Regions([out])
    assert (len(r), r.dim, r.classes, r.most) == (3, 8, 1600 if labels else 0, 100)
    for n, (_, boxes, features, scores, kinds) in enumerate(rows):
        order = np.argsort(-scores, kind="stable") if labels else np.arange(len(boxes))
        np.testing.assert_array_equal(r[n]["boxes"], boxes[order])
        np.testing.assert_array_equal(r[n]["features"], features[order].astype("f2"))
        np.testing.assert_array_equal(r[n]["labels"], kinds[order] if labels else -1)
        assert r[n]["sizes"].tolist() == [64, 48]


@pytest.mark.parametrize("change,words", [
    (lambda c: c[:4], "6 or 10 columns"),
    (lambda c: c[:5] + ["%%"], "features is not base64"),
    (lambda c: c[:4] + [c[4][:16], c[5]], "boxes holds 3 numbers for 3 boxes"),
    (lambda c: c[:3] + ["0"] + c[4:], "num_boxes is '0'"),
    (lambda c: c[:5] + ["\u00e9" + c[5][1:]], "features is not base64")])
def test_damaged_tsv(tmp_path, change, words):
    """One line, with file and line."""
    good = tsv_row(1, 3)[0]
    bad = "\t".join(change(good.rstrip("\n").split("\t")))
    (tmp_path / "a.tsv").write_text(good + bad + "\n", encoding="utf-8")
    with pytest.raises(data.DataError, match=f"a.tsv line 2: {words}") as caught:
        make("--tsv", tmp_path / "a.tsv", "--out", tmp_path / "o")
    assert "\n" not in str(caught.value)


def test_tsv_files_that_do_not_belong_together(tmp_path, monkeypatch):
    one, two, three = tsv_row(1, 3), tsv_row(2, 3), tsv_row(2, 3, dim=7)
    for folder, rows in (("a", [one]), ("b", [one, two]), ("c", [one, three])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tsv").write_text("".join(r[0] for r in rows))

    def convert(folder, *more):
        make("--tsv", tmp_path / folder / "x.tsv", "--out", tmp_path / folder / "o", *more)

    # within a part, and from part to part
    for shard in ("1", "1000"):
        with pytest.raises(data.DataError, match="features of 8 numbers and .* of 7 numbers"):
            convert("c", "--shard", shard)
        assert not (tmp_path / "c" / "o.parts").exists()

    # the same name, another file: a stopped run does not go on with it
    plans = []

    def collect(*args, source="", **more):
        plans.append(source)
        sys.exit()
    monkeypatch.setattr(regions, "collect_regions", collect)
    for folder in "aba":
        with pytest.raises(SystemExit):
            convert(folder)
    assert plans[0] == plans[2] != plans[1]


# --------------------------------------------------------------------------------------------------
# The command

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
    assert file.about == ("bottom-up-attention (a.tsv), without scores: regions in the file's "
                          "order")
    assert file.classes == 0


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


# --------------------------------------------------------------------------------------------------
# Whose regions are whose

def corpus(folder, seed, suffix="jpg"):
    """A folder with 00000.tar as img2dataset writes it: two pictures of this seed, captions."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key in ("000000000", "000000001"):
            noise = np.random.default_rng([seed, int(key)]).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{key}.{suffix}")
            (folder / f"{key}.txt").write_text("a")
            tar.add(folder / f"{key}.{suffix}", f"{key}.{suffix}")
            tar.add(folder / f"{key}.txt", f"{key}.txt")
    return str(folder)


def extract(folder, out, monkeypatch):
    stub_detector(monkeypatch)
    regions.main(["--images", folder, "--out", str(out), "--device", "cpu"])
    return str(out)


def test_two_corpora_of_equal_tar_names_keep_apart(tmp_path, monkeypatch):
    """LAIT and CC3M both have a 00000.tar with a 000000000.jpg in it."""
    lait, cc = corpus(tmp_path / "lait", 1), corpus(tmp_path / "cc", 2)
    file = extract(cc, tmp_path / "cc.safetensors", monkeypatch)
    with pytest.raises(data.DataError, match="none of the 2 records' pictures is in it"):
        data.with_regions(data.open_source("pairs", lait, "train"), REGIONS, file)
    assert len(data.with_regions(data.open_source("pairs", cc, "train"), REGIONS, file)) == 2

    # both together: each takes its own, and a corpus without regions is counted
    both = data.open_source("pairs", f"{lait},{cc}", "train", f"{lait},{cc}")
    attached = data.with_regions(both, REGIONS, file)
    assert [r["image"].tar for r in attached] == [f"{cc}/00000.tar"] * 2
    assert attached.notes["without_regions"] == 2

    # a corpus that was moved is found by the end of its path and the size of its files
    Path(cc).rename(tmp_path / "moved")
    moved = data.open_source("pairs", str(tmp_path / "moved"), "train")
    assert len(data.with_regions(moved, REGIONS, file)) == 2


def test_a_picture_that_was_replaced_is_an_error(tmp_path, monkeypatch):
    folder = corpus(tmp_path / "pictures", 3)
    file = extract(f"{folder}", tmp_path / "r.safetensors", monkeypatch)
    shutil.rmtree(folder)
    corpus(tmp_path / "pictures", 4)                                # the same names, other pictures
    with pytest.raises(data.DataError, match="regions of another picture of this name"):
        data.with_regions(data.open_source("pairs", folder, "train"), REGIONS, file)


def test_image_ids_of_a_tsv_join_by_the_records_own_ids(tmp_path):
    """Never by digits of a file's name; also for a second file, whose ids are moved here."""
    out = str(tmp_path / "r.safetensors")
    items = [found("7", 1, seed=7), found("9", 2, seed=9)]
    regions.collect_regions(out, items, 2, lambda item: item, {**META, "root": ""}, quiet=True)
    rows = {"a.jsonl": {"image": "9.jpg", "image_id": 7},
            "b.jsonl": {"image": "7.jpg", "image_id": 9}}
    for name, row in rows.items():
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
        (tmp_path / name).write_text(f'{{"image": "{row["image"]}", "image_id": {row["image_id"]}, '
                                     '"caption": "a"}\n')
    spec = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    records = data.with_regions(data.open_source("pairs", spec, "train"), REGIONS, out)
    assert [Path(r["image"]).name for r in records] == ["9.jpg", "7.jpg"]
    assert [r["regions"] for r in records] == [0, 1]

    # records without ids of their own have none to join by
    (tmp_path / "c.jsonl").write_text('{"image": "7.jpg", "caption": "a"}\n')
    with pytest.raises(data.DataError, match="none of the 1 records' pictures is in it"):
        data.with_regions(data.open_source("pairs", f"{tmp_path}/c.jsonl", "train"), REGIONS, out)


def test_a_refused_tsv_leaves_nothing_behind(tmp_path):
    row = ["12", "64", "48", "1", b64(np.eye(4, dtype="f4")[:1]), b64(np.ones((1, 5), "f4"))]
    bad = [*row[:4], "no base64!", row[5]]
    (tmp_path / "a.tsv").write_text("\t".join(row) + "\n" + "\t".join(bad) + "\n")
    with pytest.raises(data.DataError, match="a.tsv line 2"):
        regions.main(["--tsv", f"{tmp_path}/a.tsv", "--out", f"{tmp_path}/r", "--shard", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]


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
