"""Tests that stood in test_imagebert.py but are of data.py, tools/, train.py and eval.py.

To be distributed: the header of each part names the file it belongs to. What makes region files is
reached through `maker` and `make()` alone, so that they can follow it to tools/regions.py.
"""

import base64
import copy
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as ev
import train
from models import imagebert as ib
from tools import weights

ROOT = Path(__file__).resolve().parents[1]
maker = data


def make(*args):
    """The command line that makes region files -> its exit status."""
    return data.main(["regions", *map(str, args)])


# --------------------------------------------------------------------------------------------------
# test_regions.py: region files

META = {"detector": "a test", "root": "/pictures", "label_names": '["a", "b", "c"]'}


def found(name, n, seed=0, dim=6):
    """What a detector found in a picture: n regions."""
    g = np.random.default_rng([seed, n])
    corner = g.random((n, 2)) * 20
    return {"name": name, "size": (64, 48), "boxes": np.concatenate([corner, corner + 9], 1),
            "labels": g.integers(0, 3, n), "scores": -np.sort(-g.random(n)),
            "features": g.standard_normal((n, dim))}


def test_regions_file_round_trip(tmp_path):
    out = str(tmp_path / "r.safetensors")
    items = [(f"{n}.jpg", n % 5) for n in range(23)] + [None]
    bad = maker.collect_regions(out, items, len(items), lambda i: i and found(*i), META, shard=4,
                                quiet=True)
    assert bad == 1 and not Path(out + ".parts").exists()
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

    two = data.Regions([out, out])
    assert len(two) == 46 and np.array_equal(two[30]["features"], r[7]["features"])


def test_regions_files_that_are_not_right(tmp_path):
    out, items = str(tmp_path / "r"), [(f"{n}.jpg", n % 5) for n in range(23)]
    maker.collect_regions(out, items, 23, lambda i: found(*i), META, quiet=True)
    maker.collect_regions(out + "2", items, 23, lambda i: found(*i, dim=7), META, quiet=True)
    with pytest.raises(data.DataError, match="differ in feature size"):
        data.Regions([out, out + "2"])

    def huge(item):
        return {**found(*item), "features": np.full((item[1], 6), 1e6)}
    with pytest.raises(data.DataError, match="picture 1.jpg: .* not finite"):
        maker.collect_regions(out + "3", items, 23, huge, META, quiet=True)

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
    out = str(tmp_path / "r.safetensors")
    with pytest.raises(KeyboardInterrupt):
        maker.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    for other in (dict(metadata={**META, "detector": "another"}),
                  dict(metadata=META, source="other pictures, as many")):
        with pytest.raises(data.DataError, match="begun with other settings or other pictures"):
            maker.collect_regions(out, items, 10, look, **other, shard=3, quiet=True)

    maker.collect_regions(out, items, 10, look, META, shard=3, quiet=True)
    assert looked[8:] == ["6.jpg", "7.jpg", "8.jpg", "9.jpg"]   # two parts of three were whole
    whole = str(tmp_path / "w.safetensors")
    maker.collect_regions(whole, items, 10, lambda i: found(*i), META, shard=3, quiet=True)
    assert Path(out).read_bytes() == Path(whole).read_bytes()


def test_regions_survive_kill_9_at_every_point(tmp_path, monkeypatch):
    """A process that dies without a chance to tidy up, at each look, each renaming and each
    removal: the same command then makes the file that an undisturbed one makes, and another
    command is refused as long as a part of the first one lies there."""
    items, events = [(f"{n}.jpg", 2) for n in range(7)], []

    def at_last():
        events.append(0)
        if len(events) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(real):
        return lambda *args: (at_last(), real(*args), at_last())[1]

    def look(item):
        return found(*item)

    def collect(out, look=look, meta=META):
        maker.collect_regions(str(out), items, 7, look, meta, shard=3, quiet=True)
    collect(tmp_path / "whole")
    whole, last, deaths = (tmp_path / "whole").read_bytes(), 0, 0
    for last in range(1, 100):
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
        if list(tmp_path.glob(f"{last}.parts/*.safetensors")):
            with pytest.raises(data.DataError, match="begun with other"):
                collect(out, meta={**META, "detector": "another"})
        collect(out)
        assert out.read_bytes() == whole and not Path(f"{out}.parts").exists()

    # looks; plan, parts, whole; what is removed; the folder
    assert deaths == 2 * (7 + 5 + 4 + 1)


def stub_detector(monkeypatch):
    """A detector that finds one box in every picture, at no cost."""
    transform = SimpleNamespace(min_size=(800,), max_size=1333)
    model = SimpleNamespace(to=lambda device: None, transform=transform)
    one = {"features": np.ones((1, 4)), "boxes": np.array([[0.0, 0, 2, 2]]),
           "labels": np.array([1]), "scores": np.ones(1)}
    monkeypatch.setattr(maker, "load_detector", lambda *a: (model, ["none", "thing"], "a stub"))
    monkeypatch.setattr(maker, "detect", lambda model, image: dict(one))


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
    real, seen = maker.detect, []

    def stops(model, image):
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(model, image)
    monkeypatch.setattr(maker, "detect", stops)
    with pytest.raises(KeyboardInterrupt):
        make(*args)

    # as many pictures, but others
    (folder / "a.png").rename(folder / "z.png")
    with pytest.raises(data.DataError, match="other pictures"):
        make(*args)
    (folder / "z.png").rename(folder / "a.png")
    assert make(*args) == 0 and len(seen) == 5

    out, err = capsys.readouterr()
    assert re.search(r"unreadable, left out +2\n", out)
    assert "e.jpg: no image format" in err and "1x3000 pixels, too narrow" in err
    names = next(data.Regions([str(tmp_path / "r.safetensors")]).tables())
    assert set(names) == {"a.png", os.fsdecode(b"caf\xe9.png"), "c.png", "d.png"}


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
    maker.collect_regions(str(tmp_path / "r"), range(200), 200, look, META, shard=5, quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "r").stat().st_size > 29e6 and peak < 6e6, peak


def records_of(*images):
    out = data.Records("pairs", None)
    for n, image in enumerate(images):
        out.append({"image": image, "image_id": n})
    return out


def test_pictures_are_found_by_name(tmp_path):
    def file(name, names, root):
        maker.collect_regions(str(tmp_path / name), names, None,
                              lambda n: found(n, 1, seed=len(n)), {**META, "root": root},
                              quiet=True)
        return str(tmp_path / name)

    def get(files, *images):
        attached = data.Regions(files).attach(records_of(*images))
        return [record["regions"] for record in attached]
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

    ids = file("ids", ["391895", "1000092795"], "")
    places = "/f/COCO_val2014_000000391895.jpg", "/f/1000092795.jpg", "/f/7.jpg"
    assert get([ids], *places) == [0, 1]
    tar = file("tar", ["0.tar@512"], "/shards")
    assert get([tar], ("/anywhere/0.tar", 512, 99)) == [0]

    # nobody named a regions file
    nothing = data.Records("pairs", "train", str(tmp_path))
    nothing.append({"image": "x.jpg", "image_id": 0})
    with pytest.raises(data.DataError, match="--regions"):
        data.with_regions(nothing, ib.VIEWS["pretrain"])
    plain = {"source": "pairs", "image": "plain"}
    assert data.with_regions(records_of("x"), plain, a).regions is None


# --------------------------------------------------------------------------------------------------
# test_regions.py: bottom-up-attention TSV

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
        shutil.rmtree(tmp_path / "c" / "o.parts")
    with pytest.raises(data.DataError, match="--global_feature looks at pictures"):
        convert("a", "--global_feature", "resnet50")
    with pytest.raises(data.DataError, match="--tsv .*nowhere.*: no such file"):
        make("--tsv", tmp_path / "nowhere.tsv", "--out", tmp_path / "o")

    # the same name, another file: a stopped run does not go on with it
    plans = []

    def collect(*args, source="", **more):
        plans.append(source)
        sys.exit()
    monkeypatch.setattr(maker, "collect_regions", collect)
    for folder in "aba":
        with pytest.raises(SystemExit):
            convert(folder)
    assert plans[0] == plans[2] != plans[1]


# --------------------------------------------------------------------------------------------------
# test_regions.py: the detector

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
    real = maker.load_detector

    def small(*args):
        model, names, about = real(*args)
        model.transform.min_size = (64,)
        model.rpn._post_nms_top_n = {"training": 30, "testing": 30}
        return model, names, about
    monkeypatch.setattr(maker, "load_detector", small)
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
    again = maker.detect(model, picture)
    np.testing.assert_allclose(again["features"].astype("f2"), r[1]["features"], rtol=1e-2,
                               atol=1e-3)

    # an image without regions is an image too
    none = maker.detect(small_detector("", 7, 0.99, True)[0], torch.rand(3, 40, 60))
    assert none["features"].shape == (0, 1024) and none["boxes"].shape == (0, 4)


def test_weights_of_a_detector(tmp_path, pictures):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    for path, words in (("nowhere.pth", "no such file"),
                        (tmp_path / "w.safetensors", "no Faster R-CNN")):
        with pytest.raises(data.DataError, match=words):
            make("--images", tmp_path / "pictures", "--out", tmp_path / "r", "--weights", path)
    state = maker.load_detector("", 7, 0.0, True)[0].state_dict()
    torch.save(state, tmp_path / "good.pth")
    loaded, names, about = maker.load_detector(str(tmp_path / "good.pth"), 5, 0.1)
    key = "rpn.head.cls_logits.weight"
    assert torch.equal(loaded.state_dict()[key], state[key])
    assert "RANDOM" not in about and len(names) == 91


@pytest.mark.parametrize("name,dim", [("densenet121", 1024), ("googlenet", 1024)])
def test_global_features(tmp_path, name, dim):
    model, about = maker.load_global(name, "", random=True)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, dim) and "RANDOM" in about


# --------------------------------------------------------------------------------------------------
# test_weights.py: a BERT file for this model

SIZES = dict(width=16, layers=2, heads=2, mlp_ratio=2, dropout=0.0, positions=12, vocab_size=40,
             cls_id=2, sep_id=3, mask_id=4, first_word=5, region_dim=6, region_classes=5)


def bert_file(path, heads, change=None):
    """A random BERT in a file, as bert-base-uncased is (heads, gamma and beta) or bare."""
    model, state = ib.ImageBert(ib.Config(**SIZES)), {}
    needed, extra = ib.foreign_names(model, "text")
    for ours, theirs in (needed | extra if heads else needed).items():
        for name, rows in zip(theirs, model.state_dict()[ours].chunk(len(theirs))):
            if heads:
                name = name if name.startswith("cls.") else "bert." + name
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
                name = name.replace("LayerNorm.bias", "LayerNorm.beta")
            state[name] = rows + torch.randn_like(rows)
    if heads:
        state["bert.pooler.dense.weight"] = torch.zeros(2)
        state["cls.seq_relationship.bias"] = torch.zeros(2)
    else:
        state["pooler.dense.bias"] = torch.zeros(2)
    if change:
        change(state)
    save_file(state, path)


def load_bert(path, **sizes):
    """-> (the model that was filled, the lines of the report)."""
    model = ib.ImageBert(ib.Config(**SIZES | sizes))
    return model, weights.load_towers(ib, model, {"text": str(path)})


@pytest.mark.parametrize("heads", [True, False])
def test_every_tensor_of_bert_is_accounted_for(tmp_path, heads):
    bert_file(tmp_path / "bert.safetensors", heads)
    model, (line, new) = load_bert(tmp_path / "bert.safetensors")
    filled = ("bert.", "mlm_head.") if heads else ("bert.",)
    count = sum(name.startswith(filled) for name in model.state_dict())
    assert f"which fill {count} here; missing 0; unexpected" in line and "pooler.dense" in line
    assert ("mlm_head.*" in new) == (not heads)
    assert all(f"{part}.*" in new for part in ("regions", "moc_head", "mrfr_head", "itm_head"))


def first_word_table(state):
    return next(name for name in state if "word_embeddings" in name)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("words,change", [
    ("layer.7", lambda s: s.update({"encoder.layer.7.output.dense.bias": torch.zeros(16)})),
    ("1 of this tower's .* not filled: bert.embeddings.words",
     lambda s: s.pop(first_word_table(s))),
    ("vocabulary", lambda s: s.update({first_word_table(s): torch.zeros(30, 16)}))])
def test_bert_files_that_do_not_fit(tmp_path, heads, words, change):
    bert_file(tmp_path / "bert.safetensors", heads, change)
    with pytest.raises(SystemExit, match=words) as caught:
        load_bert(tmp_path / "bert.safetensors")
    assert "\n" not in str(caught.value)


def test_half_an_mlm_head_is_refused(tmp_path):
    for name in ("cls.predictions.bias", "cls.predictions.transform.dense.weight"):
        bert_file(tmp_path / "bert.safetensors", True, lambda s: s.pop(name))
        with pytest.raises(SystemExit, match="not filled: mlm_head"):
            load_bert(tmp_path / "bert.safetensors")


def test_files_that_are_no_weights(tmp_path):
    bert_file(tmp_path / "bert.safetensors", True)
    cut = (tmp_path / "bert.safetensors").read_bytes()[:200]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, words in (("cut.safetensors", "cannot be read as weights"),
                        ("text.pt", "cannot be read as weights"),
                        ("list.pt", "not a state dict"), (".", "holds neither")):
        with pytest.raises(SystemExit, match=words):
            load_bert(tmp_path / name)


def test_a_hub_folder_has_a_config(tmp_path):
    bert_file(tmp_path / "model.safetensors", True)
    fits = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(fits))
    assert "missing 0" in load_bert(tmp_path)[1][0]
    for field, value in (("num_attention_heads", 4), ("model_type", "roberta")):
        (tmp_path / "config.json").write_text(json.dumps(fits | {field: value}))
        with pytest.raises(SystemExit, match=field):
            load_bert(tmp_path)


# --------------------------------------------------------------------------------------------------
# test_train.py: weight decay, for a model without param_groups

@pytest.mark.parametrize("task", ib.TASKS)
def test_weight_decay_is_on_matrices(task):
    model = ib.ImageBert(ib.Config(**SIZES), task)
    groups = train.decay_matrices(model, train.Loop(weight_decay=0.1))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert (p.ndim < 2) == (group["weight_decay"] == 0)


# --------------------------------------------------------------------------------------------------
# A little world, for all that follows

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue green white black and circle square".split()
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255),
          "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 pictures of two squares of different colors, their records with boxes, and a regions file
    made of these."""
    root = tmp_path_factory.mktemp("world")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    names, rows = list(COLORS), []
    for n in range(24):
        left, right = names[n % 5], names[(n % 5 + 1 + n % 4) % 5]
        image = Image.new("RGB", (40, 20), (128, 128, 128))
        image.paste(COLORS[left], (2, 2, 18, 18))
        image.paste(COLORS[right], (22, 2, 38, 18))
        image.save(root / f"{n}.png")
        rows.append({"image": f"{n}.png", "image_id": n,
                     "caption": [f"a {left} square and a {right} square", f"{right} and {left}"],
                     "boxes": [[2, 2, 18, 18], [22, 2, 38, 18]],
                     "labels": [names.index(left), names.index(right)]})
    for name, part in (("pairs", rows), ("small", rows[:10])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))

    def look(record):
        return maker.box_regions(record, Path(record["image"]).name)
    records = data.open_source("pairs", str(root / "pairs.jsonl"), "train")
    about = {"detector": maker.STAND_IN, "root": str(root), "label_names": json.dumps(names)}
    maker.collect_regions(str(root / "r.safetensors"), records, 24, look, about, quiet=True)
    return root


def command(world, out, *more, model="imagebert"):
    return ["--model", model, "--data", str(world / "pairs.jsonl"),
            "--vocab", str(world / "vocab.txt"), "--out", str(out), "--batch_size", "8",
            "--steps", "3", "--workers", "0", "--device", "cpu", "--evals", "none",
            *map(str, more)]


def ours(world, out, *more):
    return command(world, out, "--regions", world / "r.safetensors", "--width", 16, "--layers", 1,
                   "--heads", 2, *more)


def read_json(path):
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------------------
# test_regions.py or test_data.py: regions as a view of a record

def test_the_regions_view(world):
    view = ib.VIEWS["pretrain"]
    records = data.open_source("pairs", str(world / "small.jsonl"), "test")
    records = data.with_regions(records, view, str(world / "r.safetensors"))
    tok = data.get_tokenizer(world / "vocab.txt")
    s = data.Views(records, view, tok, None, 8, max_regions=3)[4, 0]
    assert s["regions"].shape == (3, 128) and s["regions"].dtype == torch.float16
    assert s["regions_mask"].tolist() == [1, 1, 0]
    assert s["regions_box"].tolist() == [[2, 2, 18, 18], [22, 2, 38, 18], [0] * 4]
    assert s["regions_size"].tolist() == [40, 20]
    assert s["regions_label"].tolist()[2] == -1
    assert not s["regions"][2].any() and s["regions"][:2].any()
    one = data.Views(records, view, tok, None, 8, max_regions=1)[4]
    assert one["regions_box"].tolist() == [[2, 2, 18, 18]]

    # evaluation looks at one side
    batch = next(data.iter_eval(records, view, tok, None, 8, what="image", batch_size=4))
    assert batch["regions"].shape == (4, 2, 128) and "text" not in batch
    batch = next(data.iter_eval(records, view, tok, None, 8, what="text", batch_size=4))
    assert "regions" not in batch and batch["text"].shape == (4, 8)


# --------------------------------------------------------------------------------------------------
# test_train.py and test_eval.py: a run with regions

def test_training_fine_tuning_and_evaluation(world, tmp_path, capsys):
    train.main(ours(world, tmp_path / "pre", "--evals", "default", "--eval_split", "train",
                    "--eval_limit", "6"))
    text = capsys.readouterr().out
    assert "stand-in for a detector" in text and "match, all 72 pairs" in text and "moc" in text
    protocol = read_json(tmp_path / "pre" / "eval-retrieval.json")["protocol"]
    assert protocol["images"] == 6 and protocol["regions"] == maker.STAND_IN
    masked = read_json(tmp_path / "pre" / "eval-masked.json")["metrics"]
    assert set(masked) == {"mlm", "mlm_baseline", "moc", "moc_baseline"}

    # fine-tuning starts from it, with the matching head
    train.main(ours(world, tmp_path / "ft", "--task", "retrieval", "--init", tmp_path / "pre",
                    "--ce", 1, "--triplet", 1, "--steps", 0))
    assert "new: none; dropped: mlm_head, moc_head, mrfr_head" in capsys.readouterr().out
    model, info = ev.load_run(tmp_path / "ft")
    before = ev.load_run(tmp_path / "pre")[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(SystemExit, match="does not offer"):
        ev.main([str(tmp_path / "ft"), "--task", "masked"])
    with pytest.raises(SystemExit, match="name their files, --regions"):
        train.main(command(world, tmp_path / "no"))


def test_regions_stand_for_the_pictures(world, tmp_path, capsys):
    """Who has features often has no pictures: none is opened or asked for. A model that looks at
    pictures asks for them."""
    pairs = tmp_path / "pairs.jsonl"
    extra = {"image": "unknown.png", "image_id": 99, "caption": ["a red square"]}
    pairs.write_text((world / "pairs.jsonl").read_text() + json.dumps(extra) + "\n")
    train.main(ours(world, tmp_path / "run", "--data", pairs, "--steps", 1,
                    "--evals", "retrieval", "--eval_split", "train"))
    out, err = capsys.readouterr()
    assert "24 records of" in out and "without_regions 1" in out
    assert "missing" not in out.split("parameters")[0]
    assert "1 of 25 records left out" in err
    protocol = read_json(tmp_path / "run" / "eval-retrieval.json")["protocol"]
    assert protocol["images"] == 24 and protocol["unreadable_images"] == 0

    with pytest.raises(data.DataError, match="none of the 25 image files"):
        train.main(command(world, tmp_path / "no", "--data", pairs, model="codis"))
    with pytest.raises(data.DataError, match="--regions .*nowhere: no such file"):
        train.main(ours(world, tmp_path / "no", "--regions", tmp_path / "nowhere"))


def score_one_by_one(world, model):
    """match() of every image and caption of small.jsonl, one pair at a time -> (10, 20), owner."""
    view = ib.VIEWS["pretrain"]
    records = data.open_source("pairs", str(world / "small.jsonl"), "train")
    records = data.with_regions(records, view, str(world / "r.safetensors"))
    tok = data.get_tokenizer(world / "vocab.txt")
    views = data.Views(records, view, tok, None, model.cfg.max_text, train=False, max_regions=3)
    sim = torch.zeros(10, 20)
    for i in range(10):
        for c in range(20):
            image, text = views.sample(i)[0], views.sample(c // 2, caption=c % 2)[0]
            pair = image | {"text": text["text"], "text_mask": text["text_mask"]}
            with torch.no_grad():
                sim[i, c] = model.match(data.collate([pair]))
    return sim, data.flat_captions(records)[1]


def test_all_pairs_are_scored(world, tmp_path):
    train.main(ours(world, tmp_path / "run", "--steps", 0))
    every = ev.main([str(tmp_path / "run"), "--task", "retrieval", "--split", "train",
                     "--data", str(world / "small.jsonl"), "--pairs", "7"])["retrieval"]
    want = ev.recall(*score_one_by_one(world, ev.load_run(tmp_path / "run")[0]))
    assert {k: every["metrics"][k] for k in want} == pytest.approx(want)


def test_a_shortlist(world, tmp_path):
    """A shortlist of everything gives what scoring every pair gives; a short one is another run's,
    and says so."""
    run, dual = tmp_path / "run", tmp_path / "dual"
    train.main(ours(world, run, "--steps", 0))
    train.main(command(world, dual, "--steps", 0, "--image_size", 72, model="codis"))
    opts = [str(run), "--task", "retrieval", "--split", "train",
            "--data", str(world / "small.jsonl"), "--pairs", "7"]
    every = ev.main(opts)["retrieval"]
    full = ev.main([*opts, "--candidates", "99", "--candidates_from", str(dual)])["retrieval"]
    assert full["metrics"] == pytest.approx(every["metrics"])

    some = ev.main([*opts, "--candidates", "2", "--candidates_from", str(dual)])["retrieval"]
    assert some["protocol"]["candidates_from"] == str(dual)
    assert some["protocol"]["rerank_k"] == [2, 2]
    rows = [r["scores"] for r in some["rows"]]
    assert rows == ["chance", f"dual encoder of {dual}", "re-ranked, itm, k=2"]
    with pytest.raises(SystemExit, match="--candidates_from"):
        ev.main([*opts, "--candidates", "2"])
    with pytest.raises(SystemExit, match="has no dual encoder"):
        ev.main([*opts, "--candidates", "2", "--candidates_from", str(run)])


def test_two_processes(world, tmp_path):
    """No parameter goes unused under DDP; a shared evaluation has the numbers of one process."""
    words = ours(world, tmp_path / "two", "--evals", "retrieval", "--eval_split", "train",
                 "--log_every", 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, str(ROOT / "train.py"), *words], capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes x 1 x 4" in done.stdout
    two = read_json(tmp_path / "two" / "eval-retrieval.json")
    one = ev.main([str(tmp_path / "two"), "--task", "retrieval", "--split", "train"])["retrieval"]
    assert two["metrics"] == pytest.approx(one["metrics"]) and two["protocol"]["captions"] == 48


# --------------------------------------------------------------------------------------------------
# test_train.py: stages

def states(out):
    return [load_file(path) for path in sorted(Path(out).glob("stage-*/model.safetensors"))]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stages_by_data_are_separate_commands_with_init(world, tmp_path, capsys):
    a, b = world / "small.jsonl", world / "pairs.jsonl"
    train.main(ours(world, tmp_path / "two", "--stage_data", a, b))
    text = capsys.readouterr().out
    assert "10 records of" in text and "24 records of" in text
    assert text.count("3 steps of 8") == 2
    first, second = (read_json(tmp_path / "two" / f"stage-{n}" / "config.json")["loop"]
                     for n in (1, 2))
    assert Path(first["data"]).name == "small.jsonl"
    assert Path(second["data"]).name == "pairs.jsonl"
    assert second["init"] == str(tmp_path / "two" / "stage-1")

    # one datum: one stage, in the run's own folder
    train.main(ours(world, tmp_path / "one", "--stage_data", a))
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert same(one, states(tmp_path / "two")[0])

    # a stage is a run with --init: optimizer and schedule begin anew
    train.main(ours(world, tmp_path / "next", "--init", tmp_path / "one"))
    following = load_file(tmp_path / "next" / "model.safetensors")
    assert same(following, states(tmp_path / "two")[1])
    assert ev.find_run(tmp_path / "two").name == "stage-2"
    train.main(ours(world, tmp_path / "three", "--stage_data", a, b, a, "--steps", 1))
    assert len(states(tmp_path / "three")) == 3


def test_resume_knows_the_stage(world, tmp_path, monkeypatch):
    def args(out, *more):
        return ours(world, tmp_path / out, "--stage_data", world / "small.jsonl",
                    world / "pairs.jsonl", "--save_every", 1, *more)
    train.main(args("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    real, steps = ib.ImageBert.forward, []

    def forward(self, batch):
        steps.append(0)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(ib.ImageBert, "forward", forward)

    # stopped in the first stage, then in the second; what an earlier run left there is not taken
    for stop in (2, 5):
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            train.main(args("cut"))
        stop = 0
        steps.clear()
        train.main(args("cut", "--resume"))
        assert len(steps) in (5, 2)
        for x, y in zip(states(tmp_path / "whole"), states(tmp_path / "cut")):
            assert same(x, y)


def test_recipes_with_stages(world, tmp_path, monkeypatch):
    """A list of dicts = stages, each with its own settings; the preset's list, the command line's
    data and the recipe's agree on how many."""
    with pytest.raises(train.Stop, match="pretrain has 2 stages: name the data of each"):
        train.main(ours(world, tmp_path / "b", "--preset", "base"))
    with pytest.raises(train.Stop, match="1 --stage_root for 2 stages"):
        train.main(ours(world, tmp_path / "b", "--stage_data", "a", "b", "--stage_root", "c"))

    presets = copy.deepcopy(ib.PRESETS)
    presets["tiny"]["pretrain"] = [dict(lr=1e-3, moc=0.0),
                                   dict(lr=3e-4, schedule="constant", width=16)]
    monkeypatch.setattr(ib, "PRESETS", presets)
    got = []
    for n in (0, 1, 2):
        loop, cfg = train.settings(ib, "tiny", "pretrain", {}, n)
        got.append((loop.lr, loop.schedule, cfg.moc))
    assert got == [(1e-3, "constant", 0.0), (3e-4, "constant", 1.0), (3e-4, "constant", 1.0)]
    train.main(ours(world, tmp_path / "s", "--stage_data", world / "small.jsonl",
                    world / "pairs.jsonl", "--steps", 1))
    first, second = states(tmp_path / "s")
    assert "moc_head.weight" not in first and "moc_head.weight" in second


# --------------------------------------------------------------------------------------------------
# test_data.py or test_shapes.py: noisy captions

def test_noisy_and_clean(world, tmp_path, capsys):
    assert data.main(["noisy", str(world / "pairs.jsonl"), "--out", str(tmp_path), "--clean", "6",
                      "--share", "0.5", "--seed", "3"]) == 0
    assert "18 records, 9 with captions of another" in capsys.readouterr().out
    records = data.open_source("pairs", str(world / "pairs.jsonl"), "train")
    true = {record["image_id"]: record for record in records}
    clean, noisy = (data.open_source("pairs", str(tmp_path / f"{name}.jsonl"), "train")
                    for name in ("clean", "noisy"))
    for record in clean:
        for key in ("caption", "image"):
            assert record[key] == true[record["image_id"]][key]
    ids = [{record["image_id"] for record in part} for part in (clean, noisy)]
    assert ids[0] | ids[1] == set(true) and not ids[0] & ids[1]
    moved = [r for r in noisy if r["caption"] != true[r["image_id"]]["caption"]]
    assert 5 <= len(moved) <= 9                         # two pictures may say the same
    with pytest.raises(data.DataError, match="--clean 24"):
        data.split_noisy(str(world / "pairs.jsonl"), str(tmp_path), clean=24)
