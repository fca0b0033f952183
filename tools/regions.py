"""tools/regions.py: makes region files, which --regions of train.py and eval.py takes.

    python -m tools.regions --images coco/val2014 --out val.safetensors
    python -m tools.regions --images coco/val2014 --out val.safetensors --global_feature resnet50
    python -m tools.regions --tsv trainval_36.tsv --out val.safetensors

--images runs torchvision's Faster R-CNN R50-FPN over pictures: a folder, a folder of tar shards, or
anything that data.py reads as pairs. --global_feature adds the pooled feature of a CNN for each
picture. --tsv converts bottom-up-attention files. formats.py describes the file that is made, and
reads it.

    pictures or rows --look()--> arrays of a picture --pack()--> part files --join_parts()--> FILE

The work goes by parts of --shard pictures in the folder FILE.parts, in the memory of one part.
After a stop, kill -9 included, the same command goes on; another one is refused. A picture that
cannot be read is left out, said and counted.
"""

import base64
import hashlib
import itertools
import json
import os
import shutil
import re
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from tqdm import tqdm

import data
from data import ROW_ARRAYS, SAFE_TYPES
from tools import Parser, Share, Size, check_out
from tools.weights import read_file


def fail(message):
    raise data.DataError(f"regions.py: {message}")


# --------------------------------------------------------------------------------------------------
# Writing a file, part by part

def write_safetensors(path, tensors, metadata):
    """Writes a safetensors file, whole or not at all.

    tensors: {name: list of arrays}; the arrays of a list are joined along axis 0 to one tensor.
    """
    # large types first, so that each tensor begins at a multiple of its type's size
    order = sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)
    header, at = {"__metadata__": metadata}, 0
    for name in order:
        arrays = tensors[name]
        size = sum(array.nbytes for array in arrays)
        shape = [sum(map(len, arrays)), *arrays[0].shape[1:]]
        header[name] = {"dtype": SAFE_TYPES[arrays[0].dtype], "shape": shape,
                        "data_offsets": [at, at + size]}
        at += size

    # the header's length, the header padded to 8 bytes, the tensors
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(f"{path}.tmp", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for array in tensors[name]:
                f.write(np.ascontiguousarray(array).data)
    os.replace(f"{path}.tmp", path)


def collect_regions(out, items, total, look, metadata, shard=1000, quiet=False, source=""):
    """Writes the region file `out` from look(item) for each item -> number of unreadable pictures.

    look: returns a dict of name, size (width, height), the arrays of ROW_ARRAYS and, if metadata
    has "global_feature", globals; or None for a picture that cannot be read.
    items, total: an iterable, and how many they are (None: unknown).
    source: a text that identifies the items. Errors: DataError if the parts that lie there are of
    other settings or other items, or if no picture could be read.
    """
    # what the parts belong to: the same settings, the same pictures
    plan = json.dumps({**metadata, "items": total, "shard": shard, "source": source}, indent=1)
    folder = f"{out}.parts"
    note = os.path.join(folder, "plan.json")
    begin_parts(folder, note, plan)
    files = make_parts(folder, items, total, look, metadata, shard, quiet)
    unreadable = join_parts(out, files, metadata)

    # the note goes last: no part is ever without it
    for file in files + [note]:
        os.remove(file)
    os.rmdir(folder)
    return unreadable


def begin_parts(folder, note, plan):
    """Makes the folder of parts and its note. Errors: a note that holds another plan."""
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(note):
        with open(note, encoding="utf-8") as f:
            if f.read() != plan:
                fail(f"{folder}: begun with other settings or other pictures (see {note}): "
                     "go on with those, or delete the folder")
        return

    # whole or not there, like the parts
    with open(f"{note}.tmp", "w", encoding="utf-8") as f:
        f.write(plan)
    os.replace(f"{note}.tmp", note)


def make_parts(folder, items, total, look, metadata, shard, quiet):
    """Makes the part files that are not there yet -> list of the paths of all parts."""
    items, files = iter(items), []
    with tqdm(total=total, desc="regions", unit="picture", disable=quiet) as bar:
        for n in itertools.count():
            file = os.path.join(folder, f"{n:06d}.safetensors")
            done = os.path.exists(file)

            # a part that is there still takes its items from the iterator
            seen, found = 0, []
            for item in itertools.islice(items, shard):
                seen += 1
                if not done:
                    found.append(look(item))
                bar.update()
            if not seen:
                return files

            if not done:
                readable = [picture for picture in found if picture]
                unreadable = str(len(found) - len(readable))
                write_safetensors(file, pack(readable, metadata), {"unreadable": unreadable})
            files.append(file)


def join_parts(out, files, metadata):
    """Part files -> the region file `out`; returns the number of unreadable pictures."""
    parts = [data.map_safetensors(file) for file in files]
    unreadable = sum(int(note["unreadable"]) for _, note in parts)

    # a part without a readable picture does not know how wide features are
    dims, filled = {}, []
    for file, (arrays, _) in zip(files, parts):
        if len(arrays["sizes"]):
            filled.append(arrays)
            dims[arrays["features"].shape[1]] = file
    if not filled:
        fail(f"{out}: no picture could be read")
    check_one_width(dims)

    # what is counted in each part counts on through the parts
    tensors = {}
    for name in parts[0][0]:
        tensors[name] = [arrays[name] for arrays in filled]
    tensors["offsets"] = count_on(tensors["offsets"], starts_at_zero=True)
    tensors["name_ends"] = count_on(tensors["name_ends"], starts_at_zero=False)
    write_safetensors(out, tensors, metadata)
    return unreadable


def count_on(counts, starts_at_zero):
    """Cumulative counts of each part -> the same, counted on from part to part.

    starts_at_zero: each begins with a 0, which only the first part keeps.
    """
    out, before = [], 0
    for n, count in enumerate(counts):
        skip = 1 if starts_at_zero and n else 0
        out.append(count[skip:] + before)
        before += int(count[-1])
    return out


def check_one_width(dims):
    """dims: {width of features: where it was found}. Errors: there are several."""
    if len(dims) > 1:
        found = [f"{where} has features of {dim} numbers" for dim, where in dims.items()]
        fail(" and ".join(found) + ": of one detector?")


def pack(found, metadata):
    """What look() gave for some pictures -> {tensor name: [array]}.

    Errors: features of several widths, or not finite in float16 (which ends at 65,504).
    """
    # one array a kind, of all pictures' regions
    check_one_width({f["features"].shape[1]: f"picture {f['name']}" for f in found})
    out = {}
    for name, dtype in ROW_ARRAYS.items():
        out[name] = [np.zeros(0, dtype)]
        if found:
            with np.errstate(over="ignore"):            # reported below, in words
                out[name] = [np.concatenate([f[name] for f in found]).astype(dtype)]

    # name the picture whose features do not fit
    if not np.isfinite(out["features"][0]).all():
        for f in found:
            with np.errstate(over="ignore"):
                finite = np.isfinite(f["features"].astype(np.float16)).all()
            if not finite:
                fail(f"picture {f['name']}: a region's feature is not finite in float16: "
                     "are these a detector's weights?")

    # names as bytes: a file's name need not be UTF-8
    names = [os.fsencode(f["name"]) for f in found]
    counts = [len(f["labels"]) for f in found]
    out["offsets"] = [np.cumsum([0] + counts, dtype=np.int64)]
    out["names"] = [np.frombuffer(b"".join(names), np.uint8)]
    out["name_ends"] = [np.cumsum([len(name) for name in names], dtype=np.int64)]
    out["sizes"] = [np.array([f["size"] for f in found], np.int64).reshape(-1, 2)]
    out["bytes"] = [np.array([f.get("bytes", 0) for f in found], np.int64)]     # 0: unknown
    if "global_feature" in metadata:
        out["globals"] = [np.array([f["globals"] for f in found], np.float16)]
    return out


# --------------------------------------------------------------------------------------------------
# Detectors. Torchvision is imported where one runs: --tsv needs none of it.

def detector_state(weights, published, flag):
    """The state dict of a detector or CNN: from a file, or torchvision's own if `weights` is the
    name of its entry `published`."""
    if weights != published.name:
        if not os.path.isfile(weights):
            fail(f"{flag} {weights}: no such file")
        return read_file(Path(weights), flag)
    try:
        return published.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError) as e:
        fail(f"cannot download {published.url} ({getattr(e, 'reason', e)}): fetch it on a machine "
             f"with network and name the file: {flag} PATH")


def fill(model, state, where):
    """Loads a state dict that must fit exactly, or says in one line that it does not."""
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        fail(f"{where}: these are not the weights of {type(model).__name__} ({reason})")


def load_detector(weights, top, min_score, random=False):
    """Torchvision's Faster R-CNN R50-FPN -> (model in evaluation mode, label names, a text that
    says what it is).

    weights: a file, or "COCO_V1" = torchvision's own. The model finds at most `top` regions an
    image, those with a score over min_score. random: random weights, the same ones each time.
    """
    from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    # how many labels it has, and their names if they are COCO's
    published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    names = published.meta["categories"]
    state, classes = None, len(names)
    if not random:
        state = detector_state(weights, published, "--weights")
        key = "roi_heads.box_predictor.cls_score.weight"
        if key not in state:
            fail(f"--weights {weights}: no Faster R-CNN of torchvision (no key {key})")
        classes = len(state[key])
        if classes != len(names):
            names = [str(n) for n in range(classes)]

    # random weights are the same ones each time
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None,
                                       norm_layer=FrozenBatchNorm2d, trainable_layers=5)
        model = FasterRCNN(backbone, classes, box_detections_per_img=top,
                           box_score_thresh=min_score)
    if state is not None:
        fill(model, state, f"--weights {weights}")
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0            # as torchvision sets it for its published detector

    # what the region file will say of it
    kind = "COCO ids" if classes == 91 else "numbered"
    origin = "RANDOM: it detects nothing" if random else weights
    about = (f"torchvision Faster R-CNN R50-FPN, {classes} labels ({kind}; not the 1,600 of Visual "
             f"Genome), up to {top} regions over score {min_score}, weights {origin}")
    return model.eval(), names, about


@torch.no_grad()
def detect(model, image):
    """image: (3, H, W) float32 in 0..1 -> dict of arrays, by falling score: features (n, 1024) of
    the box head for the final boxes, boxes (n, 4) xyxy in pixels, labels (n,), scores (n,)."""
    # as the model's own forward does
    images, _ = model.transform([image])
    maps = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, maps)
    found, _ = model.roi_heads(maps, proposals, images.image_sizes)     # boxes in the resized image

    # torchvision returns no features: pool those of the final boxes
    roi = model.roi_heads
    features = roi.box_head(roi.box_roi_pool(maps, [found[0]["boxes"]], images.image_sizes))

    # boxes back in the pixels of the picture
    found = model.transform.postprocess(found, images.image_sizes, [tuple(image.shape[-2:])])[0]
    order = found["scores"].argsort(descending=True)
    out = {"features": features[order].cpu().numpy()}
    for name in ("boxes", "labels", "scores"):
        out[name] = found[name][order].cpu().numpy()
    return out


# The CNNs of --global_feature, and their last layer, which is taken off.
GLOBAL_MODELS = {"resnet50": "fc", "densenet121": "classifier", "googlenet": "fc"}


def load_global(name, weights, random=False):
    """A CNN whose pooled output is an image's global feature -> (model in evaluation mode, a text
    that says what it is). weights, random: as in load_detector, "IMAGENET1K_V1" = torchvision's."""
    from torchvision.models import get_model, get_model_weights

    options = {}
    if name == "googlenet":
        options = dict(aux_logits=False, transform_input=True, init_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_model(name, weights=None, **options)

    if not random:
        published = get_model_weights(name)["IMAGENET1K_V1"]
        state = detector_state(weights, published, "--global_weights")

        # torchvision's densenet files still say norm.1 for norm1; googlenet's hold two more heads
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
        renamed = {}
        for key, tensor in state.items():
            if not key.startswith("aux"):
                renamed[old.sub(r"\1\2", key)] = tensor
        fill(model, renamed, f"--global_weights {weights}")

    setattr(model, GLOBAL_MODELS[name], torch.nn.Identity())
    origin = "RANDOM" if random else weights
    return model.eval(), f"global feature: pooled {name}, weights {origin}"


# --------------------------------------------------------------------------------------------------
# --images: a detector looks at pictures

def list_pictures(images, image_root):
    """--images -> (locations of the pictures, the folder from which the file names them)."""
    shards = os.path.isdir(images) and any(f.endswith(".tar") for f in os.listdir(images))
    if os.path.isdir(images) and not shards:
        pictures, root = list(data.pictures_in(images)), images
    else:
        records = data.open_source("pairs", images, None, image_root)
        pictures = list(dict.fromkeys(record["image"] for record in records))
        root = images if shards else records.root
    if not pictures:
        fail(f"--images {images}: no image files in it")
    return pictures, os.path.abspath(root)


def extract_regions(args):
    """`--images`: runs the detector over pictures -> number of unreadable ones."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures, root = list_pictures(args.images, args.image_root)

    # the detector, and the CNN beside it if one is asked for
    detector, names, about = load_detector(args.weights, args.top, args.min_score,
                                           args.random_weights)
    detector.to(device)
    metadata = {"detector": about, "root": root, "label_names": json.dumps(names)}
    print(about, flush=True)

    cnn = None
    if args.global_feature:
        cnn, about = load_global(args.global_feature, args.global_weights, args.random_weights)
        cnn.to(device)
        metadata["global_feature"] = about
        print(about, flush=True)

    # what is found in one picture
    def look(where):
        try:
            picture = open_for(detector, where)
        except data.BadImage as e:
            data.say(f"unreadable image {where}: {e}; left out")
            return None
        found = detect(detector, pixels(picture, device))
        found |= {"name": os.path.relpath(data.picture_path(where), root), "size": picture.size,
                  "bytes": data.picture_bytes(where)}
        if cnn:
            found["globals"] = global_feature(cnn, picture, device)
        return found

    # the same folder may hold other pictures when the command goes on
    listing = "\n".join(map(str, pictures)).encode(errors="surrogateescape")
    source = hashlib.sha256(listing).hexdigest()
    return collect_regions(args.out, pictures, len(pictures), look, metadata, args.shard,
                           source=source)


def open_for(detector, where):
    """The picture at a location -> PIL image. Raises BadImage, also if the detector's resizing
    would leave it less than a pixel wide."""
    picture = data.load_image(where)
    short, long = sorted(picture.size)
    resizing = detector.transform
    scale = min(resizing.min_size[-1] / short, resizing.max_size / long)
    if short * scale < 1:
        raise data.BadImage(f"{picture.width}x{picture.height} pixels, too narrow for the detector")
    return picture


def pixels(picture, device):
    """PIL RGB -> (3, H, W) float32 in 0..1 on the device."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device).float() / 255


@torch.no_grad()
def global_feature(cnn, picture, device):
    """PIL RGB -> (G,) array: what the CNN makes of the whole picture at 224x224."""
    mean, std = torch.tensor(data.NORMS["imagenet"], device=device).view(2, 3, 1, 1)
    x = (pixels(data.resize(picture, 224), device) - mean) / std
    return cnn(x[None])[0].cpu().numpy()


# --------------------------------------------------------------------------------------------------
# --tsv: files of bottom-up-attention

# Columns by their number: 6 as its authors publish them, without labels, 10 as LXMERT does.
TSV_FIELDS = {
    6: "image_id image_w image_h num_boxes boxes features",
    10: "image_id image_h image_w labels scores attributes attribute_scores num_boxes boxes "
        "features"}


def tsv_lines(paths):
    """Yields (where, line) of all files."""
    for path in paths:
        # a byte that is not ASCII is no base64 either: tsv_array names its line
        with open(path, encoding="ascii", errors="replace") as f:
            for n, line in enumerate(f, 1):
                yield f"{path} line {n}", line.rstrip("\r\n")


def tsv_regions(item, classes):
    """A row (where, line) -> what look() returns.

    Regions without scores keep the file's order; without labels they have label -1 and score 1.
    classes: how many label names there are. Errors: DataError with file, line and column.
    """
    # the columns by name
    where, line = item
    cells = line.split("\t")
    if len(cells) not in TSV_FIELDS:
        fail(f"{where}: {' or '.join(map(str, TSV_FIELDS))} columns separated by TAB expected, "
             f"found {len(cells)}")
    row = dict(zip(TSV_FIELDS[len(cells)].split(), cells))

    # without labels or scores: unknown, and all alike
    n = tsv_number(where, row, "num_boxes")
    labels, scores = np.full(n, -1), np.ones(n)
    if "labels" in row:
        labels = tsv_array(where, row, "labels", np.int64, n, 1)[:, 0]
        scores = tsv_array(where, row, "scores", np.float32, n, 1)[:, 0]
    if labels.max() >= classes:
        fail(f"{where}: label {labels.max()}, but there are {classes} label names")
    size = tsv_number(where, row, "image_w"), tsv_number(where, row, "image_h")
    boxes = tsv_array(where, row, "boxes", np.float32, n, 4)
    features = tsv_array(where, row, "features", np.float32, n)

    # by falling score
    order = np.argsort(-scores, kind="stable")
    return {"name": row["image_id"], "size": size, "labels": labels[order],
            "scores": scores[order], "boxes": boxes[order], "features": features[order]}


def tsv_number(where, row, key):
    """A count, or a length in pixels: an int above 0."""
    if not row[key].isdigit() or not int(row[key]):
        fail(f"{where}: {key} is '{row[key][:20]}', not a number above 0")
    return int(row[key])


def tsv_array(where, row, key, dtype, n, width=None):
    """A base64 cell -> (n, width) array; width None: as many columns as there are."""
    try:
        array = np.frombuffer(base64.b64decode(row[key], validate=True), dtype)
    except ValueError as e:
        fail(f"{where}: {key} is not base64 of {np.dtype(dtype).name} ({e})")
    if len(array) % n or (width and len(array) != n * width):
        fail(f"{where}: {key} holds {len(array)} numbers for {n} boxes")
    return array.reshape(n, -1)


def convert_regions(args):
    """`--tsv`: bottom-up-attention files -> a region file; returns 0, the number of unreadable
    pictures: an unreadable row is an error."""
    if args.global_feature:
        fail("--global_feature looks at pictures: use --images; --tsv has none")
    paths = data.expand(args.tsv, "--tsv")

    # ten columns have labels: the Visual Genome detector's, by number if they are not named
    names = []
    with open(paths[0], encoding="ascii", errors="replace") as f:
        labeled = f.readline().count("\t") == 9
    if labeled and args.label_names:
        names = [name for _, name in data.lines_of(args.label_names)]
    elif labeled:
        names = [str(n) for n in range(1600)]

    # another file of the same name has another size
    files = ", ".join(map(os.path.basename, paths))
    about = f"bottom-up-attention ({files})"
    if not labeled:
        about += ", without scores: regions in the file's order"
    metadata = {"detector": about, "root": "", "label_names": json.dumps(names)}
    source = ", ".join(f"{path}, {os.path.getsize(path)} bytes" for path in paths)
    try:
        return collect_regions(args.out, tsv_lines(paths), None,
                               lambda item: tsv_regions(item, len(names)), metadata, args.shard,
                               source=source)
    except data.DataError:
        # rows are quickly read again: a refused file leaves nothing behind
        shutil.rmtree(f"{args.out}.parts", ignore_errors=True)
        raise


# --------------------------------------------------------------------------------------------------
# The command

def build_parser():
    p = Parser(prog="python -m tools.regions", description=__doc__)

    # what is looked at, and what is made
    p.add_argument("--images", help="a folder of pictures, a folder of tar shards, or image-text "
                                    "data")
    p.add_argument("--image_root", help="the folder that the data's images lie in")
    p.add_argument("--tsv", help="bottom-up-attention files instead, separated by commas")
    p.add_argument("--out", required=True, help="the file to make; --regions of train.py")

    # the detector, and the CNN beside it
    p.add_argument("--weights", default="COCO_V1",
                   help="the detector's: a file, or COCO_V1 = torchvision's, downloaded (default)")
    p.add_argument("--random_weights", action="store_true",
                   help="a detector that knows nothing, to try the pipeline; the file says so")
    p.add_argument("--top", type=Size, default=100, help="regions a picture at most (default: 100)")
    p.add_argument("--min_score", type=Share, default=0.05,
                   help="least score of a region (default: 0.05, torchvision's)")
    p.add_argument("--global_feature", choices=GLOBAL_MODELS,
                   help="also store a CNN's pooled feature of each picture")
    p.add_argument("--global_weights", default="IMAGENET1K_V1",
                   help="its weights: a file, or IMAGENET1K_V1 = torchvision's (default)")

    # the rest
    p.add_argument("--label_names",
                   help="names of the labels in --tsv, one a line (default: 1,600 numbers)")
    p.add_argument("--shard", type=Size, default=1000,
                   help="pictures between two savings (default: 1000)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    return p


def main(argv=None):
    """-> exit status 0; prints what is in the file that was made."""
    args = build_parser().parse_args(argv)
    if bool(args.images) == bool(args.tsv):
        fail("name the pictures (--images) or bottom-up-attention files (--tsv)")
    check_out(args.out, "regions.py: --out")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA device here")
    unreadable = extract_regions(args) if args.images else convert_regions(args)

    # read it again, as training will
    regions = data.Regions([args.out])
    counts = np.diff(regions.files[0][0]["offsets"])
    rows = {"pictures": len(regions), "unreadable, left out": unreadable,
            "regions": int(counts.sum()),
            "regions a picture": f"{counts.min()} to {counts.max()}, mean {counts.mean():.1f}",
            "feature size": regions.dim, "labels": regions.classes or "none",
            "global feature": regions.global_dim or "none",
            "file": f"{args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB"}
    for name, value in rows.items():
        print(f"  {name:<22}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
