"""ImageBERT: one transformer over the words of a sentence and the regions of an image.

Qi, Su, Song, Cui, Bharti, Sacheti, "ImageBERT: Cross-modal Pre-training with Large-scale
Weak-supervised Image-Text Data", 2020.

A detector has turned the image into regions: feature, box and label. BERT reads sentence and
regions as one sequence. Pre-training hides words (MLM) and regions (label: MOC, feature: MRFR) and
asks whether the two belong together (ITM), first on much noisy web data, then on less and cleaner
data: stages. Fine-tuning keeps the matching score alone and trains it against negatives. There is
no embedding of one side: retrieval scores every pair of an image and a sentence.

    words ---> word + segment + position, LN --------------+
                                                           +--> [CLS] w .. w [SEP] v .. v --> BERT
                                                           |        +--------------------------+
                                                           |        +--> [CLS]    --> Eq. 5-9 match?
    regions -> feature + box + segment + dummy pos., LN ---+        +--> hidden w --> Eq. 2 word
    (image --> one more token, with global_feature) -------+        +--> hidden v --> Eq. 3 label,
                                                                                      Eq. 4 feature

Shapes: B pairs, T text tokens, R regions, F feature of a region, D width, S = T + R (+ 1),
M hidden words or regions, P candidates, K labels, W directions of negatives.

Equations (the paper numbers none; ours, in its order)
    Eq. 1 -> embed_region(), box_code()      Eq. 2 -> mlm_loss(), mask_tokens()
    Eq. 3 -> moc_loss(), mask_regions()      Eq. 4 -> mrfr_loss()
    Eq. 5 -> itm_loss(), mismatch()          Eq. 6 -> bce_loss(), candidate_pairs()
    Eq. 7 -> ce_loss()                       Eq. 8 -> hardest_negative()
    Eq. 9 -> triplet_loss()

Deviations from the paper
     1. Signs: MOC, MRFR, CE and triplet are printed with a leading minus, which would maximise
        them: left out. The triplet lacks minus and margin: max(0, 0.2 - s+ + s_h-), once (its sum
        over N is idle).
     2. p_img = PositionEmbed(c), the 5-d box; the paper prints PositionEmbed(e), the sum that p_img
        is a part of.
     3. MRFR is printed as a sum over a feature's F numbers; with F in the thousands it drowns the
        other losses. Here it is their mean; `--mrfr F` gives the print. Losses over hidden words
        and regions are means over these, not sums.
     4. s and c are sigmoids of one logit; all losses but the triplet compute with logits. CE is a
        softmax over the P logits.
     5. Of a sentence's n words exactly max(1, round(0.15 n)) are chosen. BERT's own code fixes the
        number too, but counts [CLS] and [SEP] among the n. Of regions each is chosen with
        probability 0.15 as printed, up to a count that one image of 24,000 exceeds (100 regions;
        one of 9,600 with 36), so that shapes do not depend on data.
     6. A hidden region could be guessed from a twin that stays visible: every region that overlaps
        a zeroed one with IoU above `twin_iou` is zeroed too, without a loss of its own. How many
        that are depends on the detector: the log's `zeroed` is the share of regions that the
        transformer reads as zeros, 0.135 = 0.15 * 0.9 without twins. `twin_iou=1` is the print.
     7. The global feature comes from a CNN that saw the whole image, hidden regions included.
     8. Half of a batch are mismatched pairs: another sentence or another image, at random, of
        another image id, from the same batch. They are masked as well, but have none of the masked
        losses: MLM, MOC and MRFR learn from one half of each batch. Fine-tuning's P - 1 negatives
        a direction come from the batch too. P is not printed: 4. "A batch" is the pairs of one
        forward pass on one GPU; with fewer than 2 (pre-training) or P (fine-tuning) it is refused.
     9. Adam without schedule, warm-up, decay or clipping, as nothing else is printed. The dummy
        position is the last row of BERT's position table. The MLM head is BERT's ("the same with
        the MLM task in BERT"); the other heads are one linear layer.
    10. The paper does not say what an epoch counts. Here it goes over the images and draws one
        caption of each [?], so that 130 epochs of Flickr30K are 157,000 steps of 168 sequences;
        with `--epoch_of captions` they are 785,000.
    11. The paper's detector knows 1,600 Visual Genome classes; `python -m tools.regions` uses
        torchvision's with 91 COCO ids, up to 100 regions over score 0.05, or converts
        bottom-up-attention files. Boxes without label have no part in MOC.
    12. `act="relu"` exists for `tiny`.

Run: python models/imagebert.py      (2 s: shapes, parameters and every loss on a random batch)
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# what a number of Config may be: its type, this in words, and as a test
Size = Annotated[int, "from 1 to 10**6", lambda n: 1 <= n <= 10**6]
Few = Annotated[int, "from 1 to 1000", lambda n: 1 <= n <= 1000]
Tokens = Annotated[int, "from 3 to 10**4", lambda n: 3 <= n <= 10**4]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rate = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
Amount = Annotated[float, "0 or more", lambda x: 0 <= x < math.inf]
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]


@dataclass
class Config:
    width: Size = 768               # D
    layers: Few = 12                # transformer layers
    heads: Few = 12                 # attention heads
    mlp_ratio: Few = 4              # hidden width of a feed-forward block over D
    act: Literal["gelu", "relu"] = "gelu"                   # the activation
    dropout: Rate = 0.1             # everywhere, as BERT
    max_text: Tokens = 44           # tokens of a sentence, [CLS] and [SEP] included
    max_regions: Few = 100          # the surest of an image's regions, if the file has scores
    positions: Tokens = 512         # position embeddings, as BERT; the last is that of all regions
    vocab_size: int = 30522         # [data] words of the vocabulary file
    pad_id: int = 0                 # [data] id of [PAD]
    cls_id: int = 101               # [data] id of [CLS]
    sep_id: int = 102               # [data] id of [SEP]
    mask_id: int = 103              # [data] id of [MASK]
    first_word: int = 999           # [data] lowest id of an ordinary word
    region_dim: int = 1024          # [data] F, from the regions file
    region_classes: int = 91        # [data] K labels of the detector, from the regions file
    global_feature: bool = False    # the whole image as one more token (Table 4, part 1)
    global_dim: int = 2048          # [data] size of its feature, from the regions file
    mlm: Amount = 1.0               # weight of Eq. 2; 0 leaves the task out
    moc: Amount = 1.0               # weight of Eq. 3; 0 leaves the task out
    mrfr: Amount = 1.0              # weight of Eq. 4 (Table 4, part 2); 0 leaves the task out
    itm: Amount = 1.0               # weight of Eq. 5; 0 leaves the task out
    mlm_prob: Share = 0.15          # share of words hidden
    region_prob: Share = 0.15       # probability that a region is hidden
    region_zero: Share = 0.9        # share of hidden regions whose feature becomes zero, not kept
    twin_iou: Share = 0.4           # regions that overlap a zeroed one more are zeroed too
    bce: Amount = 1.0               # fine-tuning: weight of Eq. 6, alone the best (Table 4, part 4)
    ce: Amount = 0.0                # weight of Eq. 7
    triplet: Amount = 0.0           # weight of Eq. 9
    margin: Amount = 0.2            # of Eq. 9
    pool: Few = 4                   # P candidates: the positive and P - 1 negatives a direction
    negatives: Literal["both", "text", "image"] = "both"    # text: other texts for each image
    init_std: Positive = 0.02       # standard deviation of initial weights, BERT's
    checkpointing: bool = False     # recompute layers in backward instead of keeping them

    def check(self, task):
        """SystemExit, one line, for a value that its type or another value forbids."""
        check_fields(self)
        if self.width % self.heads:
            raise SystemExit(f"--heads {self.heads}: does not divide --width {self.width}")
        if self.max_text >= self.positions:
            raise SystemExit(f"--max_text {self.max_text}: of {self.positions} positions the last "
                             "is that of the regions")
        if self.pool < 2:
            raise SystemExit(f"--pool {self.pool}: the positive and at least one negative make 2")
        weights = {"pretrain": (self.mlm, self.moc, self.mrfr, self.itm),
                   "retrieval": (self.bce, self.ce, self.triplet)}
        if not any(weights[task]):
            raise SystemExit("every loss has weight 0: nothing to train")


PRESETS = {
    "base": dict(),
    "tiny": dict(
        width=128, layers=3, heads=4, mlp_ratio=4, act="relu", dropout=0.0, max_text=24,
        max_regions=3, init_std=0.05,
        itm=3.0,                    # matching is learnt last: it starts after 600 steps, not 1,400
        pretrain=[dict(optimizer="adamw", batch_size=64, steps=3000, lr=1e-3, warmup_steps=100,
                       schedule="cosine", min_lr=1e-5, eval_limit=100)],
        retrieval=dict(optimizer="adamw", batch_size=24, steps=400, lr=2e-4, schedule="cosine",
                       eval_limit=100)),
}

# Sections 5.1 (pre-training, both stages alike, from BERT's weights: --init_text bert-base-uncased)
# and 5.2 (fine-tuning).
# Stage 1 is LAIT, stage 2 CC + SBU: --stage_data LAIT CC,SBU.
# epoch_of: LAIT, CC and SBU have one caption an image. Flickr30K and COCO have five, and the paper
# does not say [?]: Deviation 10.
STAGE = dict(optimizer="adam", lr=1e-4, schedule="constant", epochs=17, batch_size=48,
             epoch_of="images")
RECIPE = {
    "pretrain": [dict(STAGE, limit=2_000_000, own_data=True),   # "we only sampled 2M from LAIT"
                 STAGE],
    "retrieval": dict(optimizer="adam", lr=5e-5, schedule="constant", epochs=130, batch_size=24,
                      epoch_of="images"),
}

# Every table and figure with results, as data for tools/tables.py; models/README.md says what its
# words mean. Figures are drawings. Not here: other people's rows; Table 3's CC, which is Table 4's
# row "CC" (part 2): whether Table 3's other rows are with MRFR or without, the paper does not say.
# COCO is evaluated on 5,000 images and 5 x 1,000. The built-in world's noisy captions (half of them
# swapped) stand for LAIT, its clean ones for CC + SBU.
FEATURES = ("--regions lait.safetensors,cc.safetensors,sbu.safetensors --image_root images "
            "--vocab vocab.txt --init_text bert-base-uncased")
STAGES = "--stage_data LAIT cc3m.tsv,sbu.tsv"
CC_SBU, CC = "--stage_data cc3m.tsv,sbu.tsv --limit 0", "--stage_data cc3m.tsv --limit 0"
COCO = "--data dataset_coco.json --image_root coco --regions coco.safetensors"
FLICKR = "--data dataset_flickr30k.json --image_root flickr30k --regions flickr.safetensors"
R1 = dict(evaluation="retrieval", columns=("t2i_r1", "i2t_r1"))
QUICK = dict(pretrain="", eval="--limit 300")
POOL = dict(
    pretrain="--epochs 20 --vocab datasets/shapes/vocab.txt --regions "
             "datasets/shapes/regions_train.safetensors,datasets/shapes/regions_test.safetensors",
    eval="--data shapes --limit 300",
    files=dict(lait="datasets/shapes/noisy.jsonl", clean="datasets/shapes/clean.jsonl"))
PAPER_FILES = dict(lait="LAIT", clean="cc3m.tsv,sbu.tsv")
TABLES = {
    "Table 1: Flickr30K": dict(
        R1, claim="Zero-shot above Unicoder-VL, whose pre-training has one stage.",
        rows={"ImageBERT": "pretrain"}, tiny=QUICK,
        base=dict(pretrain=f"{STAGES} {FEATURES}", eval=FLICKR)),
    "Table 1: COCO": dict(
        R1, claim="The same on COCO.", rows={"ImageBERT": "pretrain"},
        base=dict(pretrain=f"{STAGES} {FEATURES}", eval=COCO)),
    "Table 2: Flickr30K": dict(
        R1, claim="Fine-tuned above all models before.", 
        rows={"ImageBERT": "pretrain -> retrieval"}, tiny=QUICK,
        base=dict(pretrain=f"{STAGES} {FEATURES}", retrieval=FLICKR, eval=FLICKR)),
    "Table 2: COCO": dict(
        R1, claim="The same on COCO.", rows={"ImageBERT": "pretrain -> retrieval"},
        base=dict(pretrain=f"{STAGES} {FEATURES}", retrieval=COCO, eval=COCO)),
    "Table 3": dict(
        R1, claim="Stages, noisy data before clean data, are better than one pool of all data.",
        rows={"LAIT": "pretrain --stage_data {lait}",
              "CC+SBU": "pretrain --stage_data {clean} --limit 0",
              "LAIT+CC+SBU": "pretrain --stage_data {lait},{clean} --limit 0",
              "LAIT -> (CC+SBU)": "pretrain --stage_data {lait} {clean}"},
        reference="LAIT+CC+SBU",
        better=[("LAIT -> (CC+SBU)", "LAIT+CC+SBU"), ("LAIT -> (CC+SBU)", "CC+SBU"),
                ("LAIT -> (CC+SBU)", "LAIT")],
        tiny=POOL, base=dict(pretrain=FEATURES, eval=FLICKR, files=PAPER_FILES)),
    "Table 4: global feature": dict(
        R1, claim="A feature of the whole image improves some metrics and not others.",
        rows={"CC+SBU": f"pretrain {CC_SBU}",
              "CC+SBU (w global feature)": f"pretrain {CC_SBU} --global_feature"},
        reference="CC+SBU",
        base=dict(pretrain=FEATURES, eval=FLICKR)),     # regions by tools.regions --global_feature
    "Table 4: MRFR": dict(
        R1, claim="The regression of region features helps zero-shot retrieval.",
        rows={"CC": "pretrain --mrfr 0", "CC (w MRFR loss)": "pretrain --mrfr 1"}, reference="CC",
        better=[("CC (w MRFR loss)", "CC")], tiny=QUICK,
        base=dict(pretrain=f"{CC} {FEATURES}", eval=FLICKR)),
    "Table 4: regions": dict(
        R1, claim="100 regions are better than 36.",
        rows={"RoI(36)": "pretrain --max_regions 36 -> retrieval --max_regions 36",
              "RoI(100)": "pretrain -> retrieval"},
        better=[("RoI(100)", "RoI(36)")],
        base=dict(pretrain=f"{STAGES} {FEATURES}", retrieval=FLICKR, eval=FLICKR)),
    "Table 4: losses": dict(
        R1, claim="The binary loss alone fine-tunes best.",
        rows={"Binary+CE+Triplet": "pretrain -> retrieval --ce 1 --triplet 1",
              "CE only": "pretrain -> retrieval --bce 0 --ce 1",
              "Triplet only": "pretrain -> retrieval --bce 0 --triplet 1",
              "Binary only": "pretrain -> retrieval"},
        reference="Binary only",
        better=[("Binary only", "Binary+CE+Triplet"), ("Binary only", "CE only"),
                ("Binary only", "Triplet only")],
        tiny=QUICK, base=dict(pretrain=f"{STAGES} {FEATURES}", retrieval=FLICKR, eval=FLICKR)),
}

TASKS = ("pretrain", "retrieval")
EVALS = {"pretrain": ("retrieval", "masked"), "retrieval": ("retrieval",)}
INITS = ("text",)
VIEWS = {task: dict(source="pairs", regions="regions", text="caption") for task in TASKS}
BACKBONE = ("bert.", "regions.")  # `--init` must fill every key that starts so

# What fine-tuning samples: other sentences for each image, other images for each sentence, or both.
DIRECTIONS = {"both": ("text", "image"), "text": ("text",), "image": ("image",)}


def setup(cfg, task, stats):
    """Takes the sizes of the regions file from `stats`, the data.stats() of the training records.

    SystemExit, one line, where the file lacks what a setting wants.
    """
    cfg.region_dim, cfg.region_classes = stats["region_dim"], stats["region_classes"]
    if task == "pretrain" and cfg.moc and not cfg.region_classes:
        raise SystemExit("the regions carry no labels, which MOC learns from: use --moc 0, "
                         "or regions of a detector with labels")
    if cfg.global_feature:
        cfg.global_dim = stats["global_dim"]
        if not cfg.global_dim:
            raise SystemExit("--global_feature: the regions file has none: make it with "
                             "python -m tools.regions --global_feature NAME")


# Copied from tools/__init__.py::check_fields
def check_fields(settings):
    """SystemExit, one line, for a field of a dataclass whose value its type does not allow."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), field.type
        several = get_origin(kind) is tuple
        if several:
            kind = get_args(kind)[0]

        # what the type says: one of some words, a number in a range, or no more than the type
        told, legal = f"not a {getattr(kind, '__name__', kind)}", lambda _: True
        if get_origin(kind) is Literal:
            words = get_args(kind)
            told, legal = f"not one of {', '.join(filter(None, words))}", words.count
        elif get_origin(kind) is Annotated:
            kind, told, legal = get_args(kind)

        # a whole number may stand for a float; JSON makes a list of a tuple
        types = {float: (int, float), int: int, str: str, bool: bool}.get(kind, object)
        alike = isinstance(value, (tuple, list)) == several
        for one in value if several and alike else [value]:
            if not alike or not isinstance(one, types) or not legal(one):
                raise SystemExit(f"--{field.name} {one}: {told}")


# --------------------------------------------------------------------------------------------------
# Blocks: one attention and one layer, of which the transformer is built

# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


# Copied from models/codis.py::pick
def pick(x, at):
    """The tokens of x (B, S, D) at positions `at` (B, A) -> (B, A, D)."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention of tokens x (B, S, D)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)                      # one product for all three
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, at=None):
        """-> (B, S, D), or (B, A, D) where only positions `at` (B, A) are asked for.

        mask: bool, True = may look, broadcast to (B, heads, S or A, S).
        """
        query, key, value = self.qkv(x).chunk(3, dim=-1)            # 3 x (B, S, D)
        if at is not None:
            query = pick(query, at)                                 # (B, A, D)
        query, key, value = self.split(query), self.split(key), self.split(value)

        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out(x.transpose(1, 2).flatten(2))

    def split(self, x):
        # (B, S, D) -> (B, heads, S, D/heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """BERT's layer: self-attention, then feed-forward; the sum behind each is normalised.

    Only positions `at` (B, A) are computed where they are given; they still look at all positions.
    """

    def __init__(self, width, heads, mlp_ratio=4, act="gelu", dropout=0.0):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, 1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x, mask=None, at=None):
        own = x if at is None else pick(x, at)                      # (B, S or A, D)
        x = self.attention_norm(own + self.drop(self.attention(x, mask, at)))
        return self.mlp_norm(x + self.drop(self.mlp(x)))


# Copied from models/codis.py::run_block
def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# Copied from models/codis.py::MLMHead
class MLMHead(nn.Module):
    """BERT's prediction of words: tokens (..., D), word embeddings (V, D) -> logits (..., V)."""

    def __init__(self, cfg):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(cfg.width, cfg.width), activation(cfg.act),
                                       nn.LayerNorm(cfg.width, 1e-12))
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.transform(x), word_embeddings, self.bias)


# --------------------------------------------------------------------------------------------------
# Encoders: words and regions become tokens, which one transformer reads together

# Copied from models/codis.py::Embeddings
class Embeddings(nn.Module):
    """BERT's input: ids (B, T) -> (B, T, D), word + position + segment embedding, normalised."""

    def __init__(self, cfg):
        super().__init__()
        self.words = nn.Embedding(cfg.vocab_size, cfg.width, padding_idx=cfg.pad_id)
        self.positions = nn.Embedding(cfg.positions, cfg.width)
        self.segments = nn.Embedding(2, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, 1e-12)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, text):
        x = self.words(text) + self.positions.weight[:text.shape[1]] + self.segments.weight[0]
        return self.drop(self.norm(x))


class Bert(nn.Module):
    """The transformer, and the embeddings of its words. Tokens come to forward() embedded."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = Embeddings(cfg)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.mlp_ratio, cfg.act, cfg.dropout)
                                    for _ in range(cfg.layers))

    def forward(self, x, mask, at):
        """x: (B, S, D) tokens; mask: (B, S), 1 = a token; at: (B, A) -> (B, A, D)."""
        mask = mask[:, None, None].bool()                           # (B, 1, 1, S)
        *lower, last = self.blocks
        for block in lower:
            x = run_block(block, x, mask, save_memory=self.checkpointing)

        # heads read some positions only: the last layer computes no others
        return run_block(last, x, mask, at, save_memory=self.checkpointing)


class RegionEmbeddings(nn.Module):
    """Section 4.1, image embedding: regions of a batch -> tokens (B, R, D) and their mask (B, R).

    With global_feature the whole image is one more token, behind the regions.
    """

    def __init__(self, cfg):
        super().__init__()
        self.feature = nn.Linear(cfg.region_dim, cfg.width)         # the paper's ImageEmbed
        self.box = nn.Linear(5, cfg.width)                          # and PositionEmbed
        if cfg.global_feature:
            self.image = nn.Linear(cfg.global_dim, cfg.width)
        self.global_feature = cfg.global_feature
        self.norm = nn.LayerNorm(cfg.width, 1e-12)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, batch, tables):
        """batch: regions, regions_box, regions_size, regions_mask, with global_feature
        regions_global. tables: BERT's Embeddings, for the segment and the position of regions."""
        # stored features are in half precision, sizes in whole numbers
        dtype = self.box.weight.dtype
        size, mask = batch["regions_size"].to(dtype), batch["regions_mask"]
        v = self.feature(batch["regions"].to(dtype))                # (B, R, D)
        c = box_code(batch["regions_box"].to(dtype), size)          # (B, R, 5)

        # the whole image is a region whose box goes from 0, 0 to its size
        if self.global_feature:
            image = self.image(batch["regions_global"].to(dtype))   # (B, D)
            whole = torch.cat([torch.zeros_like(size), size], dim=-1)
            v = torch.cat([v, image.unsqueeze(1)], dim=1)           # (B, R+1, D)
            c = torch.cat([c, box_code(whole.unsqueeze(1), size)], dim=1)
            mask = F.pad(mask, (0, 1), value=1)                     # (B, R+1)

        # regions have no order: one segment and one position, the last, for all
        s, p_seq = tables.segments.weight[1], tables.positions.weight[-1]
        return self.drop(embed_region(v, s, self.box(c), p_seq, self.norm)), mask


# --------------------------------------------------------------------------------------------------
# The paper's equations

def box_code(boxes, size):
    """Section 4.1: c = (x_tl/W, y_tl/H, x_br/W, y_br/H, (x_br - x_tl)(y_br - y_tl) / (W H)).

    boxes: (B, R, 4) xyxy in pixels; size: (B, 2) width and height of the image in pixels
    -> (B, R, 5) in [0, 1].
    """
    c = boxes / torch.cat([size, size], dim=-1).unsqueeze(1)
    area = (c[..., 2:3] - c[..., 0:1]) * (c[..., 3:4] - c[..., 1:2])    # (B, R, 1)
    return torch.cat([c, area], dim=-1)


def embed_region(v, s, p_img, p_seq, norm):
    """Eq. (1): e^(i) = LN(v^(i) + s^(i) + p_img^(i) + p_seq^(i)).

    v, p_img: (B, R, D); s, p_seq: (D,); norm: LN -> (B, R, D).
    """
    return norm(v + s + p_img + p_seq)


def mlm_loss(logits, labels):
    """Eq. (2): L_MLM = -E log P(w_m | w_\\m, v).

    logits: (B, M, V); labels: (B, M), -100 = no hidden word here -> 0-d.
    """
    return masked_cross_entropy(logits, labels)


def moc_loss(logits, labels):
    """Eq. (3): L_MOC = E sum_i CE(l(v_m^(i)), f(v_m^(i))), as a mean.

    logits: (B, M, K); labels: (B, M), -100 = no hidden region, or none with a label -> 0-d.
    """
    return masked_cross_entropy(logits, labels)


# Copied from models/codis.py::masked_cross_entropy
def masked_cross_entropy(logits, labels):
    """Mean over the labels that are not -100; 0, not NaN, where there is none."""
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(),
                           ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)


def mrfr_loss(h, r, live):
    """Eq. (4): L_MRFR = E sum_i ||h(v_m^(i)) - r(v_m^(i))||^2, as a mean over i.

    h, r: (B, M, F) predicted and true features; live: (B, M) bool, a hidden region -> 0-d.
    """
    distance = (h.float() - r.float()).square().sum(-1)             # (B, M)
    return (distance * live).sum() / live.sum().clamp(min=1)


def itm_loss(s, y):
    """Eq. (5): L_ITM = -E [y log s + (1 - y) log(1 - s)].

    s: (B,) logits; y: (B,), 1 = matched -> 0-d.
    """
    return F.binary_cross_entropy_with_logits(s.float(), y.float())


def bce_loss(c, y, live):
    """Eq. (6): L_BCE = -E [y log c + (1 - y) log(1 - c)].

    c: (N,) logits; y: (N,), 1 = matched; live: (N,) bool, True = counts -> 0-d.
    """
    loss = F.binary_cross_entropy_with_logits(c.float(), y.float(), reduction="none")
    return (loss * live).sum() / live.sum().clamp(min=1)


def ce_loss(s, live):
    """Eq. (7): L_CE = E CE(s, l): softmax over P candidates, the positive first.

    s: (..., P) logits; live: (..., P) bool, False = not another image -> 0-d.
    A row without a negative does not count.
    """
    s = s.float().masked_fill(~live, -torch.inf)
    loss = s.logsumexp(-1) - s[..., 0]
    rows = live[..., 1:].any(-1)
    return (loss * rows).sum() / rows.sum().clamp(min=1)


def hardest_negative(s, live):
    """Eq. (8): n_h = arg max over the negatives of s.

    s: (..., P-1); live: (..., P-1) bool -> (...,) index; any index in a row where none is live.
    """
    return s.masked_fill(~live, -torch.inf).argmax(-1)


def triplet_loss(s_pos, s_neg, live, margin=0.2):
    """Eq. (9): L_Triplet = E max[0, margin - s(+) + s(n_h)].

    s_pos, s_neg: (...,) in [0, 1]; live: (...,) bool, there is a negative -> 0-d.
    """
    loss = (margin - s_pos + s_neg).clamp(min=0)
    return (loss * live).sum() / live.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------
# Samples: which words and regions are hidden, which pairs are mismatched

# Copied from models/conlip.py::mask_tokens with Eq. (3)->Section 4.3
@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15):
    """Section 4.3: chooses max(1, round(prob n)) of a sentence's n maskable tokens.

    Of these 80 % become [MASK], 10 % a random word of first_word..vocab_size-1, 10 % stay.
    text: (B, T) int64; maskable: bool (B, T) -> masked text (B, T), places (B, M), labels (B, M).
    M = max(1, round(prob T)). A label is the true word, or -100 where a sentence has fewer than M.
    """
    # how many of each sentence
    n = maskable.sum(-1, keepdim=True)                                           # (B, 1)
    chosen = (n * prob).round().clamp(min=1).minimum(n)                          # 0 without words

    # which: random order, maskable tokens first. M depends on T alone, so that shapes stay static
    most = max(1, round(prob * text.shape[1]))
    order = torch.rand(text.shape, device=text.device).masked_fill(~maskable, -1.0)
    places = order.topk(most, dim=-1).indices                                    # (B, M)
    valid = torch.arange(most, device=text.device) < chosen

    # what is to be predicted there
    words = text.gather(1, places)
    labels = words.masked_fill(~valid, -100)

    # what is shown there instead
    dice = torch.rand(places.shape, device=text.device)
    random_words = torch.randint(first_word, vocab_size, places.shape, device=text.device)
    words = torch.where(valid & (dice >= 0.8) & (dice < 0.9), random_words, words)
    words = words.masked_fill(valid & (dice < 0.8), mask_id)
    return text.scatter(1, places, words), places, labels


def box_iou(boxes):
    """Intersection over union of every two boxes of an image, (B, R, 4) xyxy -> (B, R, R).

    Boxes without area have 0.
    """
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)                       # (B, R, R)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)  # (B, R)
    return both / (area[:, :, None] + area[:, None] - both).clamp(min=1e-6)


@torch.no_grad()
def mask_regions(regions, boxes, region_mask, prob=0.15, zero=0.9, twin_iou=0.4):
    """Section 4.3, task 2: hides each region with probability prob.

    The feature of a share `zero` of them becomes 0, the others keep theirs. Regions that overlap a
    zeroed one by more than twin_iou become 0 too: they show what is to be predicted.
    regions: (B, R, F); boxes: (B, R, 4); region_mask: (B, R), 1 = a region -> regions (B, R, F),
    positions (B, M), live (B, M) bool, False = not hidden, and gone (B, R) bool: which regions are
    0 now, twins included. M depends on R alone: the mean and four standard deviations.
    """
    # which: one number a region, below `prob` = hidden, and below `prob * zero` = zeroed
    count = region_mask.shape[1]
    deviation = math.sqrt(prob * (1 - prob) * count)
    most = min(count, math.ceil(prob * count + 4 * deviation))
    dice = torch.rand(region_mask.shape, device=regions.device).masked_fill(region_mask == 0, 1.0)
    value, positions = dice.topk(most, dim=-1, largest=False)       # (B, M)
    live = value < prob

    # zero them, and their twins
    zeroed = torch.zeros_like(region_mask, dtype=torch.bool)        # (B, R)
    zeroed = zeroed.scatter(1, positions, value < prob * zero)
    twins = (box_iou(boxes) > twin_iou) & zeroed[:, None]           # (B, R, R)
    gone = (zeroed | twins.any(-1)) & region_mask.bool()
    return regions.masked_fill(gone.unsqueeze(-1), 0), positions, live, gone


@torch.no_grad()
def others(ids, n):
    """n different samples of other images for each sample of a batch, at random.

    ids: (B,) image ids; n: at most B -> (B, n) indices, found (B, n) bool: False where the batch
    has too few samples of other images and the index is of the same image.
    """
    same = ids[:, None] == ids                                      # (B, B)
    noise = torch.rand(same.shape, device=ids.device).masked_fill(same, -1.0)
    value, index = noise.topk(n, dim=-1)
    return index, value >= 0


@torch.no_grad()
def mismatch(ids, n):
    """Pairs for Eq. (5): the last n of a batch, whose order is random, get another sentence or
    another image. A sample stays matched where the batch has no other image.

    ids: (B,) -> index of the image (B,), index of the sentence (B,), y (B,): 1 = matched.
    """
    own = torch.arange(len(ids), device=ids.device)
    index, found = others(ids, 1)                                   # (B, 1) each
    swap = found.squeeze(-1) & (own >= len(ids) - n)
    coin = torch.rand(len(ids), device=ids.device) < 0.5

    image = torch.where(swap & coin, index.squeeze(-1), own)
    sentence = torch.where(swap & ~coin, index.squeeze(-1), own)
    return image, sentence, (~swap).float()


@torch.no_grad()
def candidate_pairs(ids, pool, directions):
    """Section 4.4: the matched pairs of a batch, then P - 1 negatives of each in each direction.

    ids: (B,) image ids; pool: P, at most B; directions: a tuple of W words, "text" = other
    sentences for each image, "image" = other images for each sentence
    -> index of the image and index of the sentence, both (B + W * B * (P-1),), and live
    (W, B, P-1) bool: False where the batch has too few other images for this negative.
    """
    count = pool - 1
    own = torch.arange(len(ids), device=ids.device)
    repeated = own.repeat_interleave(count)                         # (B * (P-1),)

    # one side of a negative is the sample's own, the other is drawn
    image, sentence, live = [own], [own], []
    for direction in directions:
        index, found = others(ids, count)                           # (B, P-1) each
        if direction == "text":
            image.append(repeated)
            sentence.append(index.flatten())
        else:
            image.append(index.flatten())
            sentence.append(repeated)
        live.append(found)
    return torch.cat(image), torch.cat(sentence), torch.stack(live)


def check_size(size, least, flag):
    """Negatives come from the same forward pass: a SystemExit where its `size` pairs are fewer
    than the `least` that `flag` needs."""
    if size < least:
        raise SystemExit(f"{flag} needs {least} pairs in a forward pass, not {size}: raise "
                         "--batch_size (processes and --accum divide it)")


def pair_up(batch, image, sentence):
    """Images at `image` (N,) and sentences at `sentence` (N,) of a batch -> a batch of N pairs."""
    pairs = {"text": batch["text"][sentence], "text_mask": batch["text_mask"][sentence]}
    for name, tensor in batch.items():
        if name.startswith("regions"):
            pairs[name] = tensor[image]
    return pairs


# --------------------------------------------------------------------------------------------------
# The model

class ImageBert(nn.Module):
    """Pre-training and fine-tuning for retrieval. A batch is a dict:

    text, text_mask (B, T); regions (B, R, F), regions_box (B, R, 4) xyxy pixels, regions_size
    (B, 2) width and height, regions_mask (B, R), regions_label (B, R) with -1 = none;
    regions_global (B, G) with global_feature; image_id (B,).
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        cfg.check(task)
        self.cfg, self.task = cfg, task
        self.bert = Bert(cfg)
        self.regions = RegionEmbeddings(cfg)

        # only the heads that this task trains
        pretrain = task == "pretrain"
        if pretrain and cfg.mlm:
            self.mlm_head = MLMHead(cfg)
        if pretrain and cfg.moc:
            self.moc_head = nn.Linear(cfg.width, cfg.region_classes)
        if pretrain and cfg.mrfr:
            self.mrfr_head = nn.Linear(cfg.width, cfg.region_dim)
        matches = cfg.itm or not pretrain
        if matches:
            self.itm_head = nn.Linear(cfg.width, 1)
        self.init_weights()

        # what eval.py may ask for
        self.offers = set()
        if matches:
            self.offers |= {"image_states", "text_states", "match"}
        if pretrain and (cfg.mlm or cfg.moc):
            self.offers.add("masked_predictions")

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def total(self, losses, **measures):
        """{name: loss} -> what forward() returns: their sum, weighted by Config, and the logs."""
        loss = sum(getattr(self.cfg, name) * value for name, value in losses.items())
        logs = {name: value.detach() for name, value in losses.items()}
        return {"loss": loss, "logs": {**logs, **measures}}

    # -- the sequence

    def encode(self, pairs, positions):
        """The transformer reads [CLS] text [SEP] regions.

        positions: "words" (B, M) in the text and "regions" (B, M) among the regions
        -> its output at [CLS] (B, D), at these words (B, M, D) and at these regions (B, M, D).
        """
        # one sequence, regions behind the text
        text = self.bert.embeddings(pairs["text"])                          # (B, T, D)
        regions, region_mask = self.regions(pairs, self.bert.embeddings)    # (B, R, D), (B, R)
        tokens = torch.cat([text, regions], dim=1)                          # (B, S, D)
        mask = torch.cat([pairs["text_mask"], region_mask], dim=1)

        # [CLS] and the positions asked for
        cls = torch.zeros_like(pairs["text"][:, :1])
        at = [cls, positions["words"], text.shape[1] + positions["regions"]]
        x = self.bert(tokens, mask, torch.cat(at, dim=1))
        cls, words, regions = x.split([part.shape[1] for part in at], dim=1)
        return cls.squeeze(1), words, regions

    def score(self, tokens, mask):
        """Embedded pairs (N, S, D), mask (N, S) -> (N,) float32 logits of s = c, "matched"."""
        cls = self.bert(tokens, mask, at=torch.zeros_like(mask[:, :1]))     # (N, 1, D)
        return self.itm_head(cls.squeeze(1)).squeeze(-1).float()

    # -- pre-training

    def loss_pretrain(self, batch):
        """Section 4.3: the sum of the four tasks."""
        # Eq. 5 needs mismatched pairs: the last half of the batch, so that matched ones come first
        cfg, size = self.cfg, len(batch["image_id"])
        swapped = 0
        if cfg.itm:
            check_size(size, 2, "--itm")
            swapped = size // 2
        matched = size - swapped
        image, sentence, y = mismatch(batch["image_id"], swapped)
        pairs = pair_up(batch, image, sentence)

        # the transformer reads all pairs with words and regions hidden
        read, positions, truth, measures = self.hide(pairs)
        cls, words, regions = self.encode(read, positions)

        # conditional mask: the masked losses are of matched pairs only
        predictions = self.predict_hidden(words[:matched], regions[:matched])
        truth = {name: tensor[:matched] for name, tensor in truth.items()}
        losses = {}
        if cfg.mlm:
            losses["mlm"] = mlm_loss(predictions["mlm"], truth["mlm"])                      # Eq. 2
        if cfg.moc:
            losses["moc"] = moc_loss(predictions["moc"], truth["moc"])                      # Eq. 3
        if cfg.mrfr:
            distance = mrfr_loss(predictions["mrfr"], truth["mrfr"], truth["live"])         # Eq. 4
            losses["mrfr"] = distance / cfg.region_dim

        # matching is of all pairs
        if cfg.itm:
            scores = self.itm_head(cls).squeeze(-1)                                         # (B,)
            losses["itm"] = itm_loss(scores, y)                                             # Eq. 5
            measures["itm_acc"] = ((scores.detach() > 0) == y.bool()).float().mean()
        return self.total(losses, **measures)

    def hide(self, pairs):
        """Hides words and regions -> (pairs as the transformer reads them, positions, truth,
        measures).

        positions: of the hidden words and regions, as encode() takes them; none are (B, 0).
        truth, for the tasks that are trained: "mlm" and "moc" labels (B, M), -100 = none; "mrfr"
        features (B, M, F), of which those count that are "live" (B, M) bool.
        measures, for the log: "zeroed", the share of regions that are read as zeros.
        """
        cfg, text = self.cfg, pairs["text"]
        read, truth, measures = dict(pairs), {}, {}
        positions = {"words": text[:, :0], "regions": text[:, :0]}

        # words, but never [CLS], [SEP] or padding
        if cfg.mlm:
            maskable = pairs["text_mask"].bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
            read["text"], positions["words"], truth["mlm"] = mask_tokens(
                text, maskable, cfg.mask_id, cfg.first_word, cfg.vocab_size, cfg.mlm_prob)

        # regions; labels and features from before the masking are what heads must predict
        if cfg.moc or cfg.mrfr:
            regions, boxes = pairs["regions"].float(), pairs["regions_box"].float()
            mask = pairs["regions_mask"]
            read["regions"], at, live, gone = mask_regions(
                regions, boxes, mask, cfg.region_prob, cfg.region_zero, cfg.twin_iou)
            positions["regions"] = at
            measures["zeroed"] = gone.sum() / mask.sum().clamp(min=1)
        if cfg.moc:
            labels = pairs["regions_label"].gather(1, at)                                   # (B, M)
            truth["moc"] = labels.masked_fill(~live | (labels < 0), -100)
        if cfg.mrfr:
            truth["mrfr"], truth["live"] = pick(regions, at), live
        return read, positions, truth, measures

    def predict_hidden(self, words, regions):
        """The transformer's output at hidden words and regions, (B, M, D) each -> predictions:
        "mlm" logits (B, M, V), "moc" logits (B, M, K), "mrfr" features (B, M, F)."""
        predictions = {}
        if self.cfg.mlm:
            predictions["mlm"] = self.mlm_head(words, self.bert.embeddings.words.weight)
        if self.cfg.moc:
            predictions["moc"] = self.moc_head(regions)
        if self.cfg.mrfr:
            predictions["mrfr"] = self.mrfr_head(regions)
        return predictions

    # -- fine-tuning

    def loss_retrieval(self, batch):
        """Section 4.4, without masks: any weighted sum of Eq. 6, 7 and 9, of matched pairs against
        P - 1 negatives in one or both directions."""
        cfg, size = self.cfg, len(batch["image_id"])
        check_size(size, cfg.pool, f"--pool {cfg.pool}")
        directions = DIRECTIONS[cfg.negatives]
        image, sentence, live = candidate_pairs(batch["image_id"], cfg.pool, directions)

        # each sentence and each image is embedded once, then paired
        words = self.bert.embeddings(batch["text"])                                 # (B, T, D)
        regions, region_mask = self.regions(batch, self.bert.embeddings)            # (B, R, D)
        tokens = torch.cat([words[sentence], regions[image]], dim=1)                # (N, S, D)
        mask = torch.cat([batch["text_mask"][sentence], region_mask[image]], dim=1)
        scores = self.score(tokens, mask)                                           # (N,)
        positive, negative = scores[:size], scores[size:].view(live.shape)          # (W, B, P-1)

        # the losses, each with its weight
        losses = {}
        if cfg.bce:
            y = torch.cat([torch.ones_like(positive), torch.zeros_like(scores[size:])])
            counts = F.pad(live.flatten(), (size, 0), value=True)                   # (N,)
            losses["bce"] = bce_loss(scores, y, counts)                             # Eq. 6
        if cfg.ce:
            first = positive.expand(len(live), size).unsqueeze(-1)                  # (W, B, 1)
            candidates = torch.cat([first, negative], dim=-1)                       # (W, B, P)
            losses["ce"] = ce_loss(candidates, F.pad(live, (1, 0), value=True))     # Eq. 7
        if cfg.triplet:
            index = hardest_negative(negative, live).unsqueeze(-1)                  # Eq. 8
            hardest = negative.gather(-1, index).squeeze(-1)                        # (W, B)
            losses["triplet"] = triplet_loss(positive.sigmoid(), hardest.sigmoid(),
                                             live.any(-1), cfg.margin)              # Eq. 9

        # how often the matched pair comes first among its P candidates
        positive, negative = positive.detach(), negative.detach()
        best = negative.masked_fill(~live, -torch.inf).amax(-1)                     # (W, B)
        return self.total(losses, first=(positive > best).float().mean())

    # -- what eval.py asks for

    def image_states(self, batch):
        """What match() needs of an image: `image_tokens` (B, R, D), `image_mask` (B, R)."""
        tokens, mask = self.regions(batch, self.bert.embeddings)
        return {"image_tokens": tokens, "image_mask": mask}

    def text_states(self, batch):
        """What match() needs of a sentence: its ids, `text` and `text_mask` (B, T)."""
        return {"text": batch["text"], "text_mask": batch["text_mask"]}

    def match(self, batch):
        """(B,) logits of "matched". A pair's score does not depend on the other pairs.

        batch: image_states() and text_states(), or the model's own batch. An image may have
        several texts, each the same number: U images, and B texts in their order.
        """
        if "image_tokens" not in batch:
            batch = {**batch, **self.image_states(batch)}
        words = self.bert.embeddings(batch["text"])
        texts = len(words) // len(batch["image_tokens"])                            # per image
        regions = batch["image_tokens"].repeat_interleave(texts, dim=0)             # (B, R, D)
        region_mask = batch["image_mask"].repeat_interleave(texts, dim=0)
        tokens = torch.cat([words, regions], dim=1)
        mask = torch.cat([batch["text_mask"], region_mask], dim=1)
        return self.score(tokens, mask)

    def masked_predictions(self, batch):
        """Matched pairs, masked as in training -> {"mlm": (predicted, true), "moc": ...}, both
        (B, M) int64, -100 = nothing hidden here."""
        read, positions, truth, _ = self.hide(batch)
        _, words, regions = self.encode(read, positions)
        logits = self.predict_hidden(words, regions)
        return {task: (logits[task].argmax(-1), truth[task])
                for task in ("mlm", "moc") if task in logits}


# --------------------------------------------------------------------------------------------------
# BERT's weights

# Our modules -> Hugging Face's. Of several of theirs, the rows are joined in this order.
BERT_NAMES = {"bert.embeddings.words": ["embeddings.word_embeddings"],
              "bert.embeddings.positions": ["embeddings.position_embeddings"],
              "bert.embeddings.segments": ["embeddings.token_type_embeddings"],
              "bert.embeddings.norm": ["embeddings.LayerNorm"],
              "mlm_head": ["cls.predictions"],
              "mlm_head.transform.0": ["cls.predictions.transform.dense"],
              "mlm_head.transform.2": ["cls.predictions.transform.LayerNorm"]}
BERT_BLOCK = {"attention.qkv": [f"attention.self.{part}" for part in ("query", "key", "value")],
              "attention.out": ["attention.output.dense"],
              "attention_norm": ["attention.output.LayerNorm"],
              "mlp.0": ["intermediate.dense"], "mlp.2": ["output.dense"],
              "mlp_norm": ["output.LayerNorm"]}


def foreign_names(model, side):
    """{our name: [Hugging Face's]}, twice: what a BERT must fill, and the MLM head that it may."""
    if side != "text":
        raise SystemExit(f"ImageBERT has no {side} tower of its own")
    if model.cfg.act != "gelu":
        raise SystemExit(f"BERT's layers have gelu, this model has --act {model.cfg.act}")
    modules = dict(BERT_NAMES)
    for n in range(model.cfg.layers):
        for ours, theirs in BERT_BLOCK.items():
            modules[f"bert.blocks.{n}.{ours}"] = [f"encoder.layer.{n}.{name}" for name in theirs]

    needed, head = {}, {}
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")
        if module in modules:
            table = head if module.startswith("mlm_head") else needed
            table[name] = [f"{foreign}.{kind}" for foreign in modules[module]]
    return needed, head


def load_pretrained(model, text):
    """Fills `bert`, and the MLM head where the model and the state dict have one.

    text: state dict of Hugging Face's BertModel or BertForPreTraining. A KeyError names a tensor
    that is missing, before anything changes.
    """
    text = {name.removeprefix("bert."): tensor for name, tensor in text.items()}
    needed, head = foreign_names(model, "text")
    if all(name in text for names in head.values() for name in names):
        needed |= head
    filled = {ours: torch.cat([text[name] for name in names]) for ours, names in needed.items()}
    model.load_state_dict(filled, strict=False)


Model = ImageBert


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {name: value for name, value in PRESETS["tiny"].items() if name not in TASKS}
    cfg = Config(**sizes, ce=1.0, triplet=1.0, vocab_size=200, cls_id=2, sep_id=3, mask_id=4,
                 first_word=5, region_dim=32, region_classes=8)

    # four pairs with three regions each
    corner = 30 * torch.rand(4, 3, 2)
    batch = {"text": torch.randint(5, 200, (4, cfg.max_text)),
             "text_mask": torch.ones(4, cfg.max_text, dtype=torch.long),
             "regions": torch.randn(4, 3, 32),
             "regions_box": torch.cat([corner, corner + 20], dim=-1),
             "regions_size": torch.full((4, 2), 64.0),
             "regions_mask": torch.ones(4, 3, dtype=torch.long),
             "regions_label": torch.randint(8, (4, 3)),
             "image_id": torch.arange(4)}

    for task in TASKS:
        model = ImageBert(cfg, task).train()
        out = model(batch)
        out["loss"].backward()
        count = sum(p.numel() for p in model.parameters())
        logs = {name: round(value.item(), 3) for name, value in out["logs"].items()}
        print(f"{task} {count:,} parameters {logs}")
