"""tools/weights.py: every file of weights goes in and out here.

    python -m tools.weights show FILE|FOLDER|HUB_NAME   what a file holds
    python -m tools.weights export RUN --out DIR        its towers, for other libraries

Runs (`model.safetensors`) carry the model's own names. Foreign weights (`--init_vision`,
`--init_text`) come as safetensors, as what `torch.load(weights_only=True)` takes, as a folder of
either, or by a hub name. They are brought to one of three naming schemes: Hugging Face's BERT,
timm's ViT (Hugging Face's ViT and DeiT are renamed to it), torchvision's ResNet.

Which tensor goes where is said by the model file: `foreign_names(model, side)` returns two dicts
{our name: [foreign names, rows of ours in this order]}, of what such a file must fill and of what
it may fill. Every tensor of both sides is accounted for before anything changes. An error is a
`Stop`: one line, exit status 1.
"""

import dataclasses
import importlib
import json
import math
import pickle
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tools import Parser, Stop, check_out

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------
# The weights of a run

def bare_name(name):
    """A parameter's name without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def tied_names(model):
    """The names of model.state_dict(), grouped by the memory they share -> list of lists."""
    groups = defaultdict(list)
    for name, t in model.state_dict().items():
        place = (t.device, t.data_ptr(), t.shape, t.stride()) if t.numel() else name
        groups[place].append(name)
    return list(groups.values())


def save_model(model, path, step=None):
    """Writes parameters and buffers as safetensors; `step` becomes its mark.

    Of tied tensors only the first is kept, as the format refuses shared memory. One mark and no
    second: safetensors writes several in any order, and equal weights should be equal files.
    """
    state = model.state_dict()
    tensors = {bare_name(group[0]): state[group[0]] for group in tied_names(model)}
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"} if step is None else {"step": str(step)})


# what names of weights looked like before there was one Block for all towers
OLD_NAMES = r"\.(attn\.qkv|encoder\.layer|crossattention|attention\.self|word_embeddings)\."


def read_run(path):
    """{name: CPU tensor} of a run's model.safetensors; a Stop if it is missing or damaged."""
    if not Path(path).is_file():
        raise Stop(f"{path}: no such file")
    state = read_file(Path(path), str(path))
    old = [name for name in state if re.search(OLD_NAMES, name)]
    if old:
        raise Stop(f"{path}: written before the weights were renamed (it has {old[0]}): "
                   "train this run again")
    return state


def load_weights(model, path):
    """Fills every parameter and buffer of `model` from a file of save_model()."""
    state, mine, full = read_run(path), model.state_dict(), {}
    for group in tied_names(model):
        found = [state[bare_name(name)] for name in group if bare_name(name) in state]
        full.update({name: found[0] for name in group if found})

    wrong = [f"{name} is missing" for name in mine if name not in full]
    wrong += [f"{name} is {tuple(full[name].shape)}, not {tuple(mine[name].shape)}"
              for name in full if full[name].shape != mine[name].shape]
    known = {bare_name(name) for name in mine}
    wrong += [f"{name} is unknown" for name in sorted(set(state) - known)]
    if wrong:
        more = f"; {len(wrong) - 4} more" * (len(wrong) > 4)
        raise Stop(f"{path}: does not fit the model: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(full)


def initialize(model, path, backbone):
    """`--init`: fills the model from another run -> a line that lists what is new or dropped.

    backbone: prefixes of names. A tensor of the backbone that stays empty is an error, and so is
    one that is left over from a tower that the model has: part of a tower is another tower.
    """
    state = read_run(find_run(path) / "model.safetensors")
    if hasattr(model, "adapt"):
        state = model.adapt(state)
    for group in tied_names(model):                     # a file holds one of several tied tensors
        for held in group:
            if held in state:
                state |= dict.fromkeys(group, state[held])

    # sizes
    mine = model.state_dict()
    new = [name for name in mine if name not in state]
    dropped = [name for name in state if name not in mine]
    for name in state:
        if name in mine and state[name].shape != mine[name].shape:
            raise Stop(f"--init {path}: {name} is {tuple(state[name].shape)} there "
                       f"and {tuple(mine[name].shape)} here: other sizes")

    # the backbone: whole, and nothing of it left over
    empty = [name for name in new if name.startswith(tuple(backbone))]
    if empty:
        more = f" and {len(empty) - 1} more of the backbone" if len(empty) > 1 else ""
        raise Stop(f"--init {path}: it does not fill {empty[0]}{more}")
    towers = [tower for tower in backbone if any(name.startswith(tower) for name in mine)]
    cut = [name for name in dropped if name.startswith(tuple(towers))]
    if cut:
        raise Stop(f"--init {path}: the backbone here has no place for {prefixes(cut)}: "
                   "give the flags of size that the run had")

    model.load_state_dict(state, strict=False)
    return (f"init from {path}: {len(state) - len(dropped)} tensors; "
            f"new: {prefixes(new)}; dropped: {prefixes(dropped)}")


def prefixes(names):
    return ", ".join(sorted({name.split(".")[0] for name in names})) or "none"


def load_module(name):
    """The module models/NAME.py, or a Stop that lists the files there."""
    names = sorted(path.stem for path in (ROOT / "models").glob("*.py"))
    if name not in names:
        raise Stop(f"there is no models/{name}.py; there are: {', '.join(names)}")
    return importlib.import_module(f"models.{name}")


def find_run(path):
    """The directory that holds a run: `path`, or the last of its stage-1, stage-2, ..."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    stages = [file.parent for file in path.glob("stage-*/config.json")]
    if not stages:
        raise Stop(f"{path}: no run here (no config.json)")
    return max(stages, key=lambda folder: int(folder.name.removeprefix("stage-")))


def load_run(path, device="cpu"):
    """A run directory -> (model in evaluation mode on `device`, info).

    info is config.json {model, preset, task, config, loop, stats, step, ...} and `path`.
    """
    path = find_run(path)
    try:
        info = json.loads((path / "config.json").read_text())
        name, task, config = info["model"], info["task"], info["config"]
    except (ValueError, KeyError, TypeError) as e:
        raise Stop(f"{path / 'config.json'}: damaged ({type(e).__name__}: {e})") from None

    module = load_module(name)
    unknown = set(config) - {field.name for field in dataclasses.fields(module.Config)}
    if unknown:
        raise Stop(f"{path / 'config.json'}: models/{name}.py has no setting "
                   f"{', '.join(sorted(unknown))}")
    num_labels = info.get("stats", {}).get("num_labels", 0)
    model = module.Model(module.Config(**config), task, num_labels=num_labels)
    load_weights(model, path / "model.safetensors")
    return model.to(device).eval(), {**info, "path": str(path)}


# --------------------------------------------------------------------------------------------------
# Foreign files: reading, and one name for each tensor

FILES = ("model.safetensors", "pytorch_model.bin")                 # Hugging Face's, the first wins


def read_file(path, where):
    """{bare name: CPU tensor} of one file. `where` begins each error."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        reason = (str(e).strip() or "it is empty").splitlines()[0]     # an EOFError says nothing
        raise Stop(f"{where}: {path.name} cannot be read as weights: {reason}") from None

    # DeiT and Lightning wrap theirs
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and [torch.is_tensor(t) for t in state.values()]
    if not tensors or not all(tensors):
        raise Stop(f"{where}: {path.name} is not a state dict, names and tensors and nothing else")
    return {bare_name(name): tensor for name, tensor in state.items()}


def read_foreign(path, where):
    """A weight file, or a folder with one -> ({name: tensor}, its config.json or {})."""
    path, config = Path(path), {}
    if path.is_dir():
        if (path / "config.json").exists():
            config = json.loads((path / "config.json").read_text())
        files = [path / name for name in FILES if (path / name).exists()]
        if not files:
            raise Stop(f"{where}: this folder holds neither {' nor '.join(FILES)}")
        path = files[0]
    state = read_file(path, where)
    if any("patch_embeddings" in name for name in state):
        return to_timm(state), config
    return plain_bert(state), config


def plain_bert(state):
    """BERT's names without "bert.", LayerNorms with weight and bias, tied tensors once.

    Other files come back as they are.
    """
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        out[name] = tensor

    out.pop("embeddings.position_ids", None)            # 0, 1, 2, ...: a buffer of old versions
    for name, tied in (("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
                       ("cls.predictions.decoder.bias", "cls.predictions.bias")):
        if name in out and (tied not in out or torch.equal(out[name], out[tied])):
            out.setdefault(tied, out[name])
            del out[name]
    return out


# Hugging Face's ViT -> timm's, prefixes and parts of names; used in both directions
VIT_NAMES = [
    ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("encoder.layer.", "blocks."),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."), (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."), ("layernorm.", "norm."), ("classifier.", "head."),
]


def to_timm(state):
    """Hugging Face's ViT or DeiT -> timm's names; queries, keys and values become one matrix."""
    out = {}
    for name, tensor in state.items():
        if re.search(r"\.attention\.attention\.(key|value)\.", name):
            continue                                    # joined to their query below

        # one name after the other, parts of names as they stand in the table
        timm = re.sub(r"^(vit|deit)\.", "", name)
        for theirs, ours in VIT_NAMES:
            timm = timm.replace(theirs, ours)

        # timm has one matrix for queries, keys and values
        if ".attention.attention.query." in timm:
            three = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if any(part not in state for part in three):
                continue                                # counted as a missing tensor
            timm = timm.replace(".attention.attention.query.", ".attn.qkv.")
            tensor = joined(state, three)
        out[timm] = tensor
    return out


def from_timm(state):
    """The inverse of to_timm()."""
    out = {}
    for name, tensor in state.items():
        for theirs, ours in reversed(VIT_NAMES):
            if ours.startswith("."):
                name = name.replace(ours, theirs)
            elif name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                out[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            out[name] = tensor
    return out


def local(name):
    """A file or folder as it is, or a hub name (`bert-base-uncased`), fetched once -> a path."""
    if name and Path(name).exists():
        return name
    if name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise Stop(f"{name}: no such file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    ranks = dist.is_available() and dist.is_initialized()
    try:
        # rank 0 downloads, then the others find it in the cache
        for turn in range(2):
            if (turn == 0) == (not ranks or dist.get_rank() == 0):
                folder = snapshot_download(name, allow_patterns=[*FILES, "config.json"])
            if ranks:
                dist.barrier()
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as e:
        download = f"hf download {name} model.safetensors config.json --local-dir weights"
        raise Stop(f"{name!r} is no file here and the hub does not give it ({type(e).__name__}): "
                   f"on a machine with network run `{download}`, copy that folder here and give "
                   "its path instead of the name") from None
    return folder


# --------------------------------------------------------------------------------------------------
# Foreign files: accounting

# What stands behind the last layer of a published model; a tower does without it.
HEADS = ("pooler.", "cls.predictions.", "cls.seq_relationship.", "head.", "pre_logits.",
         "classifier.", "fc.")


def load_towers(module, model, paths):
    """`--init_vision`, `--init_text`: fills towers from foreign files -> the lines of the report.

    paths: {side: file, folder or hub name}. A Stop leaves the model as it was.
    """
    filled, lines, states = set(), [], {}
    for side, path in paths.items():
        where = f"--init_{side} {path}"
        states[side], config = read_foreign(local(path), where)
        taken, line = account(module, model, side, states[side], where)
        filled |= set(taken)
        lines.append(line + compare(config, tower_of(module, model, side), where))
    module.load_pretrained(model, **states)
    return lines + [whats_new(model, filled)]


def whats_new(model, filled):
    """The line that lists the parameters that no file filled."""
    parts = defaultdict(list)
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts[name.split(".")[0]].append(name)
    for part in [part for part in parts if part.removesuffix("_m") in parts]:
        if part.endswith("_m"):
            del parts[part]                             # a momentum copy: it follows its tower

    # whole parts by their name, the rest tensor by tensor
    told, rest, count = [], [], 0
    for part, names in parts.items():
        new = [name for name in names if name not in filled]
        count += len(new)
        if new == names and new != [part]:
            told.append(part + ".*")
        else:
            rest += new
    if rest:
        told.append(short(rest))
    return f"new, in none of these files, {count}: {', '.join(told) or 'none'}"


def account(module, model, side, state, where):
    """Finds every tensor's place, changes nothing -> ({our name: foreign names}, a report line)."""
    try:
        needed, extra = module.foreign_names(model, side)
    except SystemExit as e:                             # a side without a tower or a counterpart
        raise Stop(f"{where}: {reason(e, side)}") from None

    # the tower must be there; of what may be filled, each layer or head is whole or not there
    taken = dict(needed)
    missing = [ours for ours, theirs in needed.items() if not set(theirs) <= set(state)]
    if len(missing) == len(needed):
        first = ", ".join(list(state)[:3])
        raise Stop(f"{where}: none of its names fits this tower (its first: {first})")
    parts = defaultdict(dict)
    for ours, theirs in extra.items():
        parts[re.match(r"[^.]+(\.blocks\.\d+)?", ours)[0]][ours] = theirs
    for part in parts.values():
        there = {ours: theirs for ours, theirs in part.items() if set(theirs) <= set(state)}
        taken |= there
        if there:
            missing += [ours for ours in part
                        if ours not in there and not ours.endswith("num_batches_tracked")]
    if missing:
        raise Stop(f"{where}: {len(missing)} of this tower's {len(needed)} tensors are not filled: "
                   f"{short(missing)}")

    # what the file has beyond that: heads, of which no part is taken
    used = {name for theirs in taken.values() for name in theirs}
    left = [name for name in state if name not in used]
    torn = tuple(head for head in HEADS if any(name.startswith(head) for name in used))
    odd = [name for name in left if not name.startswith(HEADS) or torn and name.startswith(torn)]
    if odd:
        raise Stop(f"{where}: this tower has no place for {short(odd)}")

    resized = check_shapes(model, taken, state, where)
    return taken, (f"{where}: matched {len(used)} of {len(state)} tensors, which fill {len(taken)} "
                   f"here; missing 0; unexpected {len(left)}: {short(left)}{resized}")


def reason(error, side):
    """A model's words about a side without a counterpart, without the side."""
    return str(error).removeprefix(f"--init_{side}: ").removeprefix(f"{side}: ")


def check_shapes(model, taken, state, where):
    """Refuses other shapes -> what to say of position embeddings brought to this size."""
    fitted = {ours: joined(state, names) for ours, names in taken.items()}
    before = {ours: tensor for ours, tensor in fitted.items() if ours.endswith("pos_embed")}
    for tensor in before.values():
        if tensor.ndim != 3 or math.isqrt(tensor.shape[1] - 1) ** 2 != tensor.shape[1] - 1:
            raise Stop(f"{where}: pos_embed {tuple(tensor.shape)} is not a class token and a "
                       "square of patches")
    if hasattr(model, "adapt"):
        fitted = model.adapt(fitted)

    mine = model.state_dict()
    for ours, tensor in fitted.items():
        if tensor.shape != mine[ours].shape:
            words = tensor.shape[1:] == mine[ours].shape[1:] and "word" in ours
            raise Stop(f"{where}: {taken[ours][0]} is {tuple(tensor.shape)} there, {ours} is "
                       f"{tuple(mine[ours].shape)} here"
                       + (", another vocabulary: see --vocab" if words else ""))

    told = ""
    for ours, tensor in before.items():
        old, new = (math.isqrt(t.shape[1] - 1) for t in (tensor, fitted[ours]))
        if old != new:
            told += f"; pos_embed interpolated from {old}x{old} to {new}x{new}"
    return told


def joined(state, names):
    """The foreign tensors that are rows of one of ours."""
    return state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])


def tower_of(module, model, side):
    """The part of the model that a foreign file must fill."""
    needed, _ = module.foreign_names(model, side)
    return model.get_submodule(next(iter(needed)).split(".")[0])


ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu"}


def anatomy(tower):
    """What shapes do not reveal of a transformer, by the names of Hugging Face's config.json."""
    about = {"position_embedding_type": "absolute"}
    for part in tower.modules():
        if hasattr(part, "heads"):
            about["num_attention_heads"] = part.heads
        elif isinstance(part, nn.LayerNorm):
            about["layer_norm_eps"] = part.eps
        elif type(part) in ACTIVATIONS:
            about["hidden_act"] = ACTIVATIONS[type(part)]
    return about


def compare(config, tower, where):
    """Refuses weights whose config.json differs from the tower -> a warning where it is silent."""
    here = anatomy(tower)
    if "num_attention_heads" not in here:               # no transformer
        return ""
    kind = config.get("model_type", "bert")
    if kind not in ("bert", "vit", "deit"):
        raise Stop(f"{where}: these weights have model_type {kind}; bert, vit and deit are read")
    for field, value in here.items():
        if config.get(field, value) != value:
            raise Stop(f"{where}: these weights have {field} {config[field]}, "
                       f"this model has {value}")
    if "num_attention_heads" in config:
        return ""
    return f"; its number of heads is unchecked ({here['num_attention_heads']} here)"


def short(names):
    """Names of tensors for people, layer numbers as ranges, weight and bias together:
    ["a.0.weight", "a.1.weight"] -> "a.0-1.weight"."""
    number, layers = r"(?<=\.)\d+(?=\.)", defaultdict(list)
    for name in sorted(names):
        layers[re.sub(number, "#", name)].append([int(n) for n in re.findall(number, name)])

    # layer numbers as ranges
    out = []
    for name, numbers in layers.items():
        for column in zip(*numbers):
            some = sorted(set(column))
            unbroken = some[-1] - some[0] + 1 == len(some) > 1
            span = f"{some[0]}-{some[-1]}" if unbroken else ",".join(map(str, some))
            name = name.replace("#", span, 1)
        out.append(name)

    # weight and bias of one module as one
    told = []
    for name in out:
        part = name.removesuffix("weight")
        if name.endswith("bias") and name.removesuffix("bias") + "weight" in out:
            continue
        told.append(part + "{weight,bias}" if part != name and part + "bias" in out else name)
    return ", ".join(told) or "none"


# --------------------------------------------------------------------------------------------------
# Out again

def export(run, out):
    """Writes each tower of a run under the folder `out` -> lines that say how it is loaded.

    text/ for transformers.BertModel, vision/ for its ViTModel, vision.safetensors for timm,
    vision.pth for torchvision. Heads, projections and fusion layers have no place there.
    """
    model, _ = load_run(run)
    module, out, lines = sys.modules[type(model).__module__], Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    written = False
    for side in module.INITS:
        try:
            needed, extra = module.foreign_names(model, side)
        except SystemExit as e:                         # a tower without a counterpart elsewhere
            lines.append(f"{side}: not written, {reason(e, side)}")
            continue

        # the tower, and the counters of its batch norms, which a file may lack
        counters = {ours: theirs for ours, theirs in extra.items()
                    if ours.endswith("num_batches_tracked")}
        mine, state = model.state_dict(), {}
        for ours, theirs in {**needed, **counters}.items():
            # a number has no rows to share out
            several = len(theirs) > 1
            parts = mine[ours].chunk(len(theirs)) if several else [mine[ours]]
            for name, rows in zip(theirs, parts):
                state[name] = rows.detach().cpu().clone()
        written = True
        lines += write_tower(state, anatomy(tower_of(module, model, side)), out, side)
    if not written:
        raise Stop("; ".join(lines))
    return lines


# blocks of each stage, and whether the 3x3 convolution of a block is grouped
RESNETS = {((3, 4, 6, 3), False): "resnet50", ((3, 4, 23, 3), False): "resnet101",
           ((3, 4, 23, 3), True): "resnext101_32x8d"}


def resnet_depths(state):
    """-> a key of RESNETS, or another one for a ResNet that torchvision does not have."""
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"layer{n}.")}
              for n in (1, 2, 3, 4)]
    if "layer1.0.conv3.weight" not in state or len(state["conv1.weight"]) != 64:
        return None                                     # no bottlenecks, or another stem
    middle = state["layer1.0.conv2.weight"]
    return tuple(len(stage) for stage in blocks), middle.shape[0] != middle.shape[1]


def write_tower(state, about, out, side):
    """One tower under foreign names -> its files, and the lines that load them."""
    folder = out / side
    if "conv1.weight" in state:
        torch.save(state, f"{folder}.pth")
        net = RESNETS.get(resnet_depths(state))
        if net is None:
            return [f"{folder}.pth: torchvision's names; none of its ResNets has these depths"]
        return [f"{folder}.pth: net = torchvision.models.{net}(); net.fc = torch.nn.Identity(); "
                f"net.load_state_dict(torch.load('{folder}.pth'), strict=False)"]
    if about.get("hidden_act") != "gelu":
        raise Stop(f"the {side} tower has {about.get('hidden_act')}: published towers have gelu")
    layers = {n for name in state for n in re.findall(r"(?:layer|blocks)\.(\d+)\.", name)}
    config = {**about, "num_hidden_layers": len(layers)}

    # BERT
    if "embeddings.word_embeddings.weight" in state:
        words = state["embeddings.word_embeddings.weight"]
        config |= {"model_type": "bert", "architectures": ["BertModel"], "type_vocab_size": 2,
                   "vocab_size": len(words), "hidden_size": words.shape[1],
                   "max_position_embeddings": len(state["embeddings.position_embeddings.weight"]),
                   "intermediate_size": len(state["encoder.layer.0.intermediate.dense.weight"])}
        write_folder(state, config, folder)
        pooler = "" if "pooler.dense.weight" in state else ", add_pooling_layer=False"
        return [f"{folder}: transformers.BertModel.from_pretrained('{folder}'{pooler})"]

    # ViT, in timm's names and in Hugging Face's
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    hidden = state["blocks.0.mlp.fc1.bias"]
    save_file(state, f"{folder}.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": width,
               "image_size": size, "patch_size": patch, "intermediate_size": len(hidden)}
    write_folder(from_timm(state), config, folder)
    return [f"{folder}.safetensors: timm.create_model('vit_base_patch16_224', num_classes=0, "
            f"img_size={size}, patch_size={patch}, embed_dim={width}, depth={len(layers)}, "
            f"num_heads={about['num_attention_heads']}, mlp_ratio={len(hidden) / width:g}, "
            f"checkpoint_path='{folder}.safetensors')",
            f"{folder}: transformers.ViTModel.from_pretrained('{folder}', add_pooling_layer=False)"]


def write_folder(state, config, folder):
    """model.safetensors and config.json, as Hugging Face has them."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main(argv=None):
    parser = Parser(prog="python -m tools.weights", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("show", help="the names and shapes of a file of weights")
    one.add_argument("path", help="a file, a folder with model.safetensors, or a hub name")
    two = verbs.add_parser("export", help="write each tower of a run for other libraries")
    two.add_argument("run", help="a run's directory")
    two.add_argument("--out", required=True, help="the folder to write into")
    args = parser.parse_args(argv)

    if args.verb == "export":
        check_out(args.out, "--out", folder=True)
        print("\n".join(export(args.run, args.out)))
        return
    state, config = read_foreign(local(args.path), args.path)
    for name, tensor in state.items():
        print(f"{name:<60} {tuple(tensor.shape)}")
    numbers = sum(tensor.numel() for tensor in state.values())
    print(f"{len(state)} tensors, {numbers:,} numbers")
    for field, value in config.items():
        print(f"{field}: {value}")


if __name__ == "__main__":
    main()
