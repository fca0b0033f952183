"""Every test: the repository root is importable, one thread, the same random numbers.

`@pytest.mark.needs("timm")` marks a test that compares with a package outside requirements.txt: it
is skipped where that package is not installed, and `pytest -m needs` runs these tests alone (as
.ci/run does, which installs them). Little worlds that several files use stand here."""

import importlib.util
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    text = "needs(package, ...): skipped where one of these is not installed"
    config.addinivalue_line("markers", text)


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if not importlib.util.find_spec(package):
                pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# Pictures of one rectangle each

def draw_rectangles(root, n=12, size=(40, 32)):
    """Writes n pictures with one bright rectangle each, COCO instances for them (the first has a
    crowd too), and records with tags and captions (the first without) -> the two files."""
    (root / "im").mkdir(parents=True, exist_ok=True)
    images, notes, rows = [], [], []
    for i in range(n):
        x, y, w, h = 4 + i % 5, 3 + i % 7, 14, 12
        color = "red" if i % 2 else "blue"
        picture = Image.new("RGB", size, (20, 20, 20))
        picture.paste((250, 30, 30) if i % 2 else (30, 30, 250), (x, y, x + w, y + h))
        picture.save(root / "im" / f"{i}.png")

        images.append({"id": i, "file_name": f"im/{i}.png", "height": size[1], "width": size[0]})
        notes.append({"id": i + 1, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0,
                      "bbox": [x, y, w, h], "area": w * h,
                      "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        rows.append({"image": f"im/{i}.png", "image_id": i,
                     "caption": [f"a {color} square"] if i else [],
                     "tags": [color, "square", "a"][:i % 4]})

    crowd = {"size": [size[1], size[0]], "counts": [0, 32, size[0] * size[1] - 32]}
    notes.append({"id": 99, "image_id": 0, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 1, 32],
                  "area": 32, "segmentation": crowd})
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
    instances = {"images": images, "annotations": notes, "categories": categories}
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "instances.json", root / "pairs.jsonl"


@pytest.fixture(scope="session")
def rectangles():
    return draw_rectangles


# --------------------------------------------------------------------------------------------------
# Pictures of two squares each, with a region file

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255),
          "black": (0, 0, 0)}
STAND_IN = "a stand-in for a detector: the squares themselves"


class Squares:
    """A folder with 24 pictures of two squares of different colors, their records (pairs.jsonl;
    small.jsonl has the first ten), a vocabulary and a region file; and command lines for them."""

    stand_in = STAND_IN

    def __init__(self, root):
        self.root, self.regions = root, root / "r.safetensors"
        self.pairs, self.small = root / "pairs.jsonl", root / "small.jsonl"
        self.vocab = root / "vocab.txt"

    def command(self, out, *more, model="imagebert"):
        """Three steps of any model; later flags win."""
        return ["--model", model, "--data", str(self.pairs), "--vocab", str(self.vocab),
                "--out", str(out), "--batch_size", "8", "--steps", "3", "--workers", "0",
                "--hold_out", "0",
                "--device", "cpu", "--evals", "none", *map(str, more)]

    def imagebert(self, out, *more):
        """The same of a tiny ImageBERT that looks at the regions."""
        return self.command(out, "--regions", self.regions, "--width", 16, "--layers", 1,
                            "--heads", 2, *more)


def look(record):
    """What a detector would find in a picture of two squares: both, and 4x4 pixels of each."""
    with Image.open(record["image"]) as picture:
        crops = [np.asarray(picture.crop(box).resize((4, 4))) for box in record["boxes"]]
    return {"name": Path(record["image"]).name, "size": (40, 20), "scores": np.ones(2),
            "boxes": np.array(record["boxes"]), "labels": np.array(record["labels"]),
            "features": np.stack(crops).reshape(2, -1) / 255}


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    import data
    from tools import regions

    here = Squares(tmp_path_factory.mktemp("squares"))
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue green white black and circle square"
    here.vocab.write_text("\n".join(words.split()) + "\n")

    names, rows = list(COLORS), []
    for n in range(24):
        left, right = names[n % 5], names[(n % 5 + 1 + n % 4) % 5]
        image = Image.new("RGB", (40, 20), (128, 128, 128))
        image.paste(COLORS[left], (2, 2, 18, 18))
        image.paste(COLORS[right], (22, 2, 38, 18))
        image.save(here.root / f"{n}.png")
        rows.append({"image": f"{n}.png", "image_id": n,
                     "caption": [f"a {left} square and a {right} square", f"{right} and {left}"],
                     "boxes": [[2, 2, 18, 18], [22, 2, 38, 18]],
                     "labels": [names.index(left), names.index(right)]})
    for path, part in ((here.pairs, rows), (here.small, rows[:10])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))

    records = data.open_source("pairs", str(here.pairs), "train")
    about = {"detector": STAND_IN, "root": str(here.root), "label_names": json.dumps(names)}
    regions.collect_regions(str(here.regions), records, 24, look, about, quiet=True)
    return here


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """A test that limits the size of files must not limit pytest's own output, written next."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
