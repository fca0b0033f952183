"""tools/weights.py: every file of weights goes in and out here.

    python -m tools.weights show FILE|FOLDER|HUB_NAME       what a file holds
    python -m tools.weights export RUN --out DIR            each tower, for transformers, timm or torchvision

Runs (`model.safetensors`) carry the model's own names. Foreign files (`--init_vision`, `--init_text`) come as
safetensors, as what `torch.load(weights_only=True)` takes, as a folder of either, or by a hub name, and are brought to
one of three naming schemes: Hugging Face's BERT, timm's ViT (Hugging Face's ViT and DeiT are renamed to it) and
torchvision's ResNet. Which tensor goes where is said by the model file: `foreign_names(model, side)` returns two dicts
{our name: [foreign names, rows of ours in this order]}, of what such a file must fill and of what it may fill.

Every tensor of both sides is accounted for, before anything changes. An error is a `Stop`: one line, exit status 1.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
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

ROOT = Path(__file__).resolve().parent.parent


class Stop(SystemExit):
    """Something the user can put right: one line, exit status 1."""


# --------------------------------------------------------------------------------------------------
# The weights of a run

def bare_name(name):
    """A parameter's name without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def tied_names(model):
    """The names of model.state_dict(), grouped by the memory they share: a list of lists, most of one name."""
    groups = defaultdict(list)
    for name, t in model.state_dict().items():
        groups[(t.device, t.data_ptr(), t.shape, t.stride()) if t.numel() else name].append(name)
    return list(groups.values())


def save_model(model, path):
    """Writes parameters and buffers as safetensors, whole or not at all. Of tied tensors only the first is kept, as
    the format refuses shared memory."""
    state, path = model.state_dict(), Path(path)
    tensors = {bare_name(group[0]): state[group[0]] for group in tied_names(model)}
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)


def read_run(path):
    """{name: CPU tensor} of a run's model.safetensors, or a Stop if it is missing, damaged or of another version."""
    if not Path(path).is_file():
        raise Stop(f"{path}: no such file")
    state = read_file(Path(path), str(path))
    old = [name for name in state if re.search(r"\.(attn\.qkv|encoder\.layer|crossattention|attention\.self)\.", name)]
    if old:
        raise Stop(f"{path}: written before the weights were renamed ({old[0]}): train this run again")
    return state


def load_weights(model, path):
    """Fills every parameter and buffer of `model` from a file of save_model(); tied tensors stay tied."""
    state, mine, full = read_run(path), model.state_dict(), {}
    for group in tied_names(model):
        found = [state[bare_name(name)] for name in group if bare_name(name) in state]
        full.update({name: found[0] for name in group if found})

    wrong = [f"{name} is missing" for name in mine if name not in full]
    wrong += [f"{name} is {tuple(full[name].shape)}, not {tuple(mine[name].shape)}"
              for name in full if full[name].shape != mine[name].shape]
    wrong += [f"{name} is unknown" for name in sorted(set(state) - {bare_name(name) for name in mine})]
    if wrong:
        more = f"; {len(wrong) - 4} more" * (len(wrong) > 4)
        raise Stop(f"{path}: does not fit the model: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict(full)


def initialize(model, path, backbone):
    """`--init`: fills the model from another run -> a line that says what is new here and what was dropped.

    backbone: prefixes of names. A tensor of the backbone that stays empty is an error, and so is one left over of a
    tower that the model has: part of a tower is another tower.
    """
    state = read_run(find_run(path) / "model.safetensors")
    if hasattr(model, "adapt"):
        state = model.adapt(state)
    for group in tied_names(model):                                 # of tied tensors a file holds one
        state |= {name: state[held] for held in group if held in state for name in group}

    mine = model.state_dict()
    new, dropped = [k for k in mine if k not in state], [k for k in state if k not in mine]
    wrong = [k for k in state if k in mine and state[k].shape != mine[k].shape]
    if wrong:
        raise Stop(f"--init {path}: {wrong[0]} is {tuple(state[wrong[0]].shape)} there "
                   f"and {tuple(mine[wrong[0]].shape)} here: other sizes")
    empty = [k for k in new if k.startswith(tuple(backbone))]
    if empty:
        more = f" and {len(empty) - 1} more of the backbone" * (len(empty) > 1)
        raise Stop(f"--init {path}: it does not fill {empty[0]}{more}")
    here = tuple(tower for tower in backbone if any(k.startswith(tower) for k in mine))
    cut = [k for k in dropped if here and k.startswith(here)]
    if cut:
        raise Stop(f"--init {path}: the backbone here has no place for {prefixes(cut)}: "
                   "give the flags of size that the run had")

    model.load_state_dict(state, strict=False)
    return f"init from {path}: {len(state) - len(dropped)} tensors; new: {prefixes(new)}; dropped: {prefixes(dropped)}"


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
    stages = sorted(path.glob("stage-*/config.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not stages:
        raise Stop(f"{path}: no run here (no config.json)")
    return stages[-1].parent


def load_run(path, device="cpu"):
    """A run directory -> (model in evaluation mode on `device`, info).

    info is config.json {model, preset, task, config, loop, stats, step, ...} and `path`.
    """
    path = find_run(path)
    try:
        info = json.loads((path / "config.json").read_text())
        name, task, config = info["model"], info["task"], info["config"]
    except (ValueError, KeyError) as e:
        raise Stop(f"{path / 'config.json'}: damaged ({type(e).__name__}: {e})") from None

    module = load_module(name)
    unknown = set(config) - {field.name for field in dataclasses.fields(module.Config)}
    if unknown:
        raise Stop(f"{path / 'config.json'}: models/{name}.py has no setting {', '.join(sorted(unknown))}")
    model = module.Model(module.Config(**config), task, num_labels=info.get("stats", {}).get("num_labels", 0))
    load_weights(model, path / "model.safetensors")
    return model.to(device).eval(), {**info, "path": str(path)}


# --------------------------------------------------------------------------------------------------
# Foreign files: reading, and one name for each tensor

def read_file(path, where):
    """{bare name: CPU tensor} of one file. `where` begins each error."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as e:
        raise Stop(f"{where}: {path.name} cannot be read as weights: {str(e).strip().splitlines()[0]}") from None

    for key in ("model", "state_dict"):                             # DeiT's and Lightning's wrapping
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(t) for t in state.values()):
        raise Stop(f"{where}: {path.name} is not a state dict, names and tensors and nothing else")
    return {bare_name(name): tensor for name, tensor in state.items()}


def read_foreign(path, where):
    """A weight file, or a folder with one -> ({name: tensor} in one of the three schemes, its config.json or {})."""
    path, config = Path(path), {}
    if path.is_dir():
        if (path / "config.json").exists():
            config = json.loads((path / "config.json").read_text())
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not files:
            raise Stop(f"{where}: this folder holds neither model.safetensors nor pytorch_model.bin")
        path = files[0]
    state = read_file(path, where)
    return (to_timm(state) if any("patch_embeddings" in name for name in state) else plain_bert(state)), config


def plain_bert(state):
    """BERT's names without "bert.", LayerNorms with weight and bias; what is only stored twice, once. Other files come
    back as they are."""
    out = {}
    for name, tensor in state.items():
        name = re.sub(r"^bert\.", "", name)
        out[re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{GREEK[m[1]]}", name)] = tensor

    out.pop("embeddings.position_ids", None)                        # 0, 1, 2, ...: a buffer of old versions
    for name, tied in (("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
                       ("cls.predictions.decoder.bias", "cls.predictions.bias")):
        if name in out and (tied not in out or torch.equal(out[name], out[tied])):
            out.setdefault(tied, out[name])
            del out[name]
    return out


GREEK = {"gamma": "weight", "beta": "bias"}

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
            continue                                                # joined to their query below
        timm = re.sub(r"^(vit|deit)\.", "", name)
        for theirs, ours in VIT_NAMES:
            timm = timm.replace(theirs, ours)
        if ".attention.attention.query." in timm:
            parts = [state.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            if any(part is None for part in parts):
                continue                                            # counted as a missing tensor
            timm, tensor = timm.replace(".attention.attention.query.", ".attn.qkv."), torch.cat(parts)
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
    """A file or folder as it is; else a hub name (`timm/vit_base_patch16_224.augreg_in21k`, `bert-base-uncased`),
    fetched once -> a path."""
    if Path(name).exists():
        return name
    if name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise Stop(f"{name}: no such file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    files = ["model.safetensors", "pytorch_model.bin", "config.json"]
    ranks = dist.is_available() and dist.is_initialized()
    try:
        # rank 0 downloads, then the others find it in the cache
        for turn in range(2):
            if (turn == 0) == (not ranks or dist.get_rank() == 0):
                folder = snapshot_download(name, allow_patterns=files)
            if ranks:
                dist.barrier()
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as e:
        raise Stop(f"{name!r} is no file here and the hub does not give it ({type(e).__name__}): on a machine with "
                   f"network run `hf download {name} model.safetensors config.json --local-dir weights`, copy that "
                   "folder here and give its path instead of the name") from None
    return folder


# --------------------------------------------------------------------------------------------------
# Foreign files: accounting

# What stands behind the last layer of a published model; a tower does without it.
HEADS = ("pooler.", "cls.predictions.", "cls.seq_relationship.", "head.", "pre_logits.", "classifier.", "fc.")


def load_towers(module, model, paths):
    """`--init_vision`, `--init_text`: fills towers from foreign files -> the lines of the report.

    paths: {side: file, folder or hub name}. A Stop leaves the model as it was.
    """
    filled, lines, states = set(), [], {}
    for side, path in paths.items():
        where = f"--init_{side} {path}"
        state, config = read_foreign(local(path), where)
        ours, line = account(module, model, side, state, where)
        states[side] = state
        filled |= ours
        lines.append(line + compare(config, tower_of(module, model, side), where))
    module.load_pretrained(model, **states)

    # what stays as it was drawn; momentum copies follow their towers
    children = dict(model.named_children())
    copies = {name for name in children if name.removesuffix("_m") in children and name.endswith("_m")}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)
             if name.split(".")[0] not in copies]
    new = [name for name in names if name not in filled]
    whole = [part for part in children
             if any(n.startswith(part + ".") for n in new) and not any(n.startswith(part + ".") for n in filled)]
    rest = [name for name in new if name.split(".")[0] not in whole]
    lines.append(f"new, in none of these files, {len(new)}: "
                 + ", ".join([part + ".*" for part in whole] + [short(rest)] * bool(rest)))
    return lines


def account(module, model, side, state, where):
    """Finds every tensor's place without changing anything -> (our names that will be filled, the report's line)."""
    needed, extra = module.foreign_names(model, side)

    # of the tower everything must be there; of what may be filled, each layer or head whole or not at all
    missing = [ours for ours, theirs in needed.items() if any(name not in state for name in theirs)]
    if len(missing) == len(needed):
        raise Stop(f"{where}: none of its names fits this tower (its first: {', '.join(list(state)[:3])})")
    parts = defaultdict(dict)
    for ours, theirs in extra.items():
        parts[re.match(r"[^.]+(\.\w+\.\d+)?", ours)[0]][ours] = all(name in state for name in theirs)
    missing += [ours for part in parts.values() if any(part.values()) for ours, there in part.items() if not there]
    if missing:
        raise Stop(f"{where}: {len(missing)} of this tower's {len(needed)} tensors are not filled: {short(missing)}")
    taken = {**needed, **{ours: extra[ours] for part in parts.values() for ours, there in part.items() if there}}

    # what the file holds beyond that: heads only, and none of which a part is taken
    used = {name for theirs in taken.values() for name in theirs}
    left = [name for name in state if name not in used]
    torn = [head for head in HEADS if any(name.startswith(head) for name in used)]
    odd = [name for name in left if not name.startswith(HEADS) or name.startswith(tuple(torn))]
    odd = [name for name in odd if not name.endswith("num_batches_tracked")]
    if odd:
        raise Stop(f"{where}: this tower has no place for {short(odd)}")

    # shapes, once position embeddings are brought to this picture size
    theirs = {ours: joined(state, names) for ours, names in taken.items()}
    for ours, tensor in theirs.items():
        if ours.endswith("pos_embed") and (tensor.ndim != 3 or math.isqrt(tensor.shape[1] - 1) ** 2 + 1 != tensor.shape[1]):
            raise Stop(f"{where}: pos_embed {tuple(tensor.shape)} is not a class token and a square of patches")
    fitted, mine = model.adapt(dict(theirs)) if hasattr(model, "adapt") else theirs, model.state_dict()
    for ours, tensor in fitted.items():
        if ours in mine and tensor.shape != mine[ours].shape:
            name, other = taken.get(ours, [ours])[0], tensor.shape[1:] == mine[ours].shape[1:] and "word" in ours
            raise Stop(f"{where}: {name} is {tuple(tensor.shape)} there, {ours} is {tuple(mine[ours].shape)} here"
                       + ", another vocabulary: see --vocab" * other)

    line = (f"{where}: matched {len(used)} of {len(state)} tensors, which fill {len(taken)} here; "
            f"missing 0; unexpected {len(left)}: {short(left)}")
    for ours, tensor in theirs.items():
        if ours.endswith("pos_embed") and tensor.shape != fitted[ours].shape:
            old, new = (math.isqrt(t.shape[1] - 1) for t in (tensor, fitted[ours]))
            line += f"; pos_embed interpolated from {old}x{old} to {new}x{new}"
    return set(taken), line


def joined(state, names):
    """The foreign tensors that are rows of one of ours."""
    return state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])


def tower_of(module, model, side):
    """The part of the model that a foreign file must fill."""
    needed, _ = module.foreign_names(model, side)
    return model.get_submodule(next(iter(needed)).split(".")[0])


ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu"}


def anatomy(tower):
    """What the shapes of a transformer's weights do not tell, under the names of Hugging Face's config.json."""
    modules = list(tower.modules())
    kinds = [ACTIVATIONS[type(m)] for m in modules if type(m) in ACTIVATIONS]
    return {"num_attention_heads": next((m.heads for m in modules if hasattr(m, "heads")), None),
            "hidden_act": next(iter(kinds), None),
            "layer_norm_eps": next((m.eps for m in modules if isinstance(m, nn.LayerNorm)), None),
            "position_embedding_type": "absolute"}


def compare(config, tower, where):
    """Refuses weights whose config.json differs from the tower in anatomy -> the report's words where it is silent."""
    here = anatomy(tower)
    if here["num_attention_heads"] is None:                         # no transformer
        return ""
    if config.get("model_type", "bert") not in ("bert", "vit", "deit"):
        raise Stop(f"{where}: these weights have model_type {config['model_type']}; BERT, ViT and DeiT are read")
    for field, value in here.items():
        if field in config and config[field] != value:
            raise Stop(f"{where}: these weights have {field} {config[field]}, this model has {value}")
    if "num_attention_heads" in config:
        return ""
    return f"; the file does not say its number of heads, {here['num_attention_heads']} here: shapes do not reveal it"


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
            name = name.replace("#", f"{some[0]}-{some[-1]}" if unbroken else ",".join(map(str, some)), 1)
        out.append(name)

    # weight and bias of one module as one
    both = [name.removesuffix("weight") for name in out
            if name.endswith("weight") and name.removesuffix("weight") + "bias" in out]
    out = [name.removesuffix("weight") + "{weight,bias}" if name.removesuffix("weight") in both else name
           for name in out if name.removesuffix("bias") not in both]
    return ", ".join(out) or "none"


# --------------------------------------------------------------------------------------------------
# Out again

def export(run, out):
    """Writes each tower of a run under the folder `out`, in the form that other libraries load -> lines that say how.

    text/ for transformers.BertModel.from_pretrained, vision/ for ViTModel's, vision.safetensors for timm, vision.pth
    for torchvision. Only the tower: heads, projections and fusion layers have no place there.
    """
    model, info = load_run(run)
    module, out, lines = sys.modules[type(model).__module__], Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    for side in module.INITS:
        needed, _ = module.foreign_names(model, side)
        mine, state = model.state_dict(), {}
        for ours, theirs in needed.items():
            for name, rows in zip(theirs, mine[ours].chunk(len(theirs)) if len(theirs) > 1 else [mine[ours]]):
                state[name] = rows.detach().cpu().clone().contiguous()
        lines += write_tower(state, anatomy(tower_of(module, model, side)), out, side)
    return lines


def write_tower(state, about, out, side):
    """One tower under foreign names -> its files, and the lines that load them."""
    if "conv1.weight" in state:
        torch.save(state, out / f"{side}.pth")
        return [f"{out / side}.pth: torchvision's ResNet without fc: net.load_state_dict(torch.load(...), strict=False)"]

    layers = 1 + max(int(n) for name in state for n in re.findall(r"(?:layer|blocks)\.(\d+)\.", name))
    config = {**about, "num_hidden_layers": layers, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    if "patch_embed.proj.weight" not in state:
        words, positions = (state[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        config |= {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(words),
                   "hidden_size": words.shape[1], "max_position_embeddings": len(positions), "type_vocab_size": 2,
                   "intermediate_size": len(state["encoder.layer.0.intermediate.dense.weight"])}
        write_folder(state, config, out / side)
        return [f"{out / side}: transformers.BertModel.from_pretrained({str(out / side)!r}, add_pooling_layer=False)"]

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    save_file(state, out / f"{side}.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": width, "image_size": size,
               "patch_size": patch, "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]), "qkv_bias": True,
               "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_folder(from_timm(state), config, out / side)
    return [f"{out / side}.safetensors: timm.create_model('vit_base_patch16_224', img_size={size}, patch_size={patch}, "
            f"embed_dim={width}, depth={layers}, num_heads={about['num_attention_heads']}, num_classes=0, "
            f"mlp_ratio={config['intermediate_size'] / width:g}, checkpoint_path=...)",
            f"{out / side}: transformers.ViTModel.from_pretrained({str(out / side)!r}, add_pooling_layer=False)"]


def write_folder(state, config, folder):
    """model.safetensors and config.json, as Hugging Face has them."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("show", help="the names and shapes of a file of weights")
    one.add_argument("path", help="a file, a folder with model.safetensors or pytorch_model.bin, or a hub name")
    two = verbs.add_parser("export", help="write each tower of a run as transformers, timm or torchvision load it")
    two.add_argument("run", help="a run's directory")
    two.add_argument("--out", required=True, help="the folder to write into")
    args = parser.parse_args(argv)

    if args.verb == "export":
        print("\n".join(export(args.run, args.out)))
        return
    state, config = read_foreign(local(args.path), args.path)
    for name, tensor in state.items():
        print(f"{name:<60} {tuple(tensor.shape)}")
    print(f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers"
          + "".join(f"; {k} {v}" for k, v in config.items() if isinstance(v, (int, float, str))))


if __name__ == "__main__":
    main()
