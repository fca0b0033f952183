"""ConLIP: two towers for retrieval, taught by masked modelling that needs their [CLS] states.

Luo, Xi, Zhang, Li, Zeng, Zhao, Jing Ma, "Conditioned Masked Language and Image Modeling for
Image-Text Dense Retrieval", Findings of EMNLP 2022.

An image and a sentence are compared by the cosine of their final [CLS] states. Ordinary masked
modelling across modalities (the vanilla of Table 1) lets a masked word look at every complete
patch, and so never needs the [CLS] state. Here both inputs are masked, and the *other* modality's
[CLS] state of the complete input, h_cls, is the only place where the answer can be found.

    complete image --> ViT ---> h_cls of the image ---+--- Eq. 9-12: contrast with keys and queues
    complete text ---> BERT --> h_cls of the text ----+    from ViT_m and BERT_m, their EMA copies

    masked text -----> BERT --> words ---- queries ----> ConMLM head, Eq. 5 --> words under masks
                                                              ^ context
                       [h_cls of the complete image; patches of the masked image]

    masked image ----> ViT ---> patches -- queries ----> ConMIM head, Eq. 6 --> pixels under masks
                                                              ^ context
                       [h_cls of the complete text; words of the masked text]

Shapes: B images, N of all processes, T text tokens, P patches, D width, M masked places,
Q queue, R rows of a contrast, S and L tokens of any kind, p pixels a side of a patch, V vocabulary.

Equations
    Eq. 1  -> ConLIP.image_passes(), ConLIP.text_passes()      Eq. 2  -> unit_cls()
    Eq. 3  -> mask_tokens(), mask_patches(), MaskedViT         Eq. 4  -> ConLIP.loss_pretrain()
    Eq. 5  -> conmlm_loss(), context(), TokenHead              Eq. 6  -> conmim_loss(), likewise
    Eq. 7  -> ConLIP.token_losses()                            Eq. 8  -> ema_()
    Eq. 9  -> infonce_loss()      Eq. 10, 11 -> dcl_loss()     Eq. 12 -> ConLIP.inst_losses()

Deviations from the paper
     1. Eq. 5 lacks its minus sign, and Eq. 5 and 6 are plain sums: here the mean over masked words,
        and over masked pixels and channels as in SimMIM, which the paper follows. With sums, one
        image's 75,264 masked values drown every other loss.
     2. The targets of Eq. 6 are pixels normalised as the encoder's input is, as in SimMIM; the
        paper says "true RGB values".
     3. Eq. 9-11 print h without the mark of a momentum encoder for the positive too. MoCo, which
        they follow, takes the momentum encoder's key: `positive="momentum"` (default).
        `positive="online"` is the print, with gradient to both sides.
     4. A key in a queue that comes from the query's own image (another caption of it, or an earlier
        epoch) is no negative: its image id leaves it out of the sum. The paper does not mention
        such keys. Queues start with random unit vectors, which count as negatives (MoCo); a row
        without any negative has loss 0.
     5. Exactly max(1, round(0.15 n)) of a sentence's n words and round(0.5 n) of an image's n units
        are masked, which keeps shapes static. Words: 80 % [MASK], 10 % a random word, 10 %
        unchanged, as in BERT. A unit is one patch; SimMIM's 32 pixels are `mask_unit=2`.
     6. "One-layer transformer with cross-attention" is read as BERT's layer: self-attention over
        the masked side, cross-attention to the other, feed-forward. Words are predicted by BERT's
        head with its word embeddings as output matrix, pixels by one linear layer. The last layer
        computes masked places only, as no loss reads the others. Table 4's row with shared
        parameters is read as the layers of one head sharing theirs (`head_shared`), not as one head
        for both modalities.
     7. h_cls of the masked input is among the queries of its own head, but not in the context of
        the other (section 3.2: "[h_cls; h_1*, h_2*, ...]"). In `vanilla` the context is all states
        of the complete input, h_cls included.
     8. Dropout 0.1 (Table 6) is BERT's, in the text tower and both heads; the ViT has none, as its
        published weights were trained and configured. Momentum towers run without dropout. Weight
        decay spares biases and norms.
     9. Fine-tuning drops the heads and uses Eq. 12 alone with pre-training's settings (Table 6
        heads its column "Pretraining & Fine-tuning"); the paper does not name the loss. Its 30
        epochs go over captions, each of them once [?]: the paper counts "image-text pairs", but
        does not say what an epoch of five captions an image is. Flickr30K's 145,000 captions are
        1,050 steps, its 29,000 images would be 210. In pre-training there is no difference, as
        CC3M and CC12M have one caption an image. Every run that starts from another one (`--init`)
        starts with new queues, because the image ids of the old ones are those of other data.
    10. `stem="conv"` (three convolutions instead of one 16x16 patch projection), `act="relu"` and
        `pos_std` exist for `tiny`. Pixels under a mask are blanked before the stem, so that no
        convolution carries them to a neighbour.

Run: python models/conlip.py      (2 s: shapes, parameters and every loss on a random batch)
"""

import math
import re
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# what a number of Config may be: its type, this in words, and as a test
Size = Annotated[int, "from 1 to 10**6", lambda n: 1 <= n <= 10**6]
Few = Annotated[int, "from 1 to 1000", lambda n: 1 <= n <= 1000]
Tokens = Annotated[int, "from 3 to 10**4", lambda n: 3 <= n <= 10**4]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rate = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]


@dataclass
class Config:
    image_size: Size = 224          # pixels a side
    patch: Size = 16                # pixels a side of a patch
    stem: Literal["patch", "conv"] = "patch"                # one projection, or three convolutions
    width: Size = 768               # D of both towers, whose [CLS] states are compared as they are
    vision_layers: Few = 12         # blocks of the image tower
    text_layers: Few = 12           # blocks of the text tower
    heads: Few = 12                 # attention heads, everywhere
    mlp_ratio: Few = 4              # hidden width of a feed-forward part over D
    act: Literal["gelu", "relu"] = "gelu"                   # the activation
    dropout: Rate = 0.1             # in the text tower and the token-level heads
    max_text: Tokens = 50           # tokens of a caption, [CLS] and [SEP] included
    positions: Tokens = 512         # position embeddings of the text tower, as BERT
    vocab_size: int = 30522         # [data] tokens of the vocabulary
    pad_id: int = 0                 # [data] the id of [PAD]
    cls_id: int = 101               # [data] the id of [CLS]
    sep_id: int = 102               # [data] the id of [SEP]
    mask_id: int = 103              # [data] the id of [MASK]
    first_word: int = 999           # [data] lowest id of an ordinary word
    queue_size: Size = 12288        # Q, momentum keys kept per modality
    momentum: Share = 0.99          # m of Eq. 8
    temp: Positive = 0.05           # tau, fixed
    contrast: Literal["dcl", "infonce"] = "dcl"             # Eq. 10-11, or Eq. 9
    positive: Literal["momentum", "online"] = "momentum"    # whose key; online as printed
    mlm: Literal["con", "vanilla", "none"] = "con"          # Eq. 5; vanilla: complete image
    mim: Literal["con", "vanilla", "none"] = "con"          # Eq. 6; vanilla: complete text
    mlm_prob: Share = 0.15          # share of words masked
    mim_prob: Share = 0.5           # share of patches masked
    mask_unit: Few = 1              # patches a side of what is masked as one
    head_layers: Few = 1            # layers of a token-level head
    head_shared: bool = False       # its layers share their parameters
    init_std: Positive = 0.02       # standard deviation of initial weights
    pos_std: Positive = 0.02        # that of the image tower's position embeddings and class token
    checkpointing: bool = False     # recompute blocks in backward instead of keeping activations

    def check(self, task):
        """SystemExit, one line, for a value that its type or another value forbids."""
        check_fields(self)
        unit = self.patch * self.mask_unit              # images divide into units, units in patches
        if self.image_size % unit:
            raise SystemExit(f"--image_size {self.image_size}: not a multiple of --patch "
                             f"{self.patch} x --mask_unit {self.mask_unit}")
        if self.stem == "conv" and self.patch % 4:
            raise SystemExit(f"--patch {self.patch}: --stem conv wants a multiple of 4")
        if self.stem == "conv" and self.width < 2:
            raise SystemExit("--width 1: --stem conv halves it")
        if self.width % self.heads:
            raise SystemExit(f"--heads {self.heads}: does not divide --width {self.width}")
        if self.max_text > self.positions:
            raise SystemExit(f"--max_text {self.max_text}: more than --positions {self.positions}")


PRESETS = {
    "base": dict(),
    # A patch is a cell of the built-in world's 3x3 grid, as in models/codis.py. For photos:
    # --patch 16.
    #
    # The queue has three batches and m is 0.99, both as in the paper, and both are needed. If the
    # momentum towers move far while a key is queued, a new key can be told from all queued ones by
    # its age: the losses fall and recall does not rise. After --steps 400 --warmup_steps 40, seed
    # 0, R@1 on the val split (chance 0.1 / 0.1) and the smallest i2t and t2i on the way:
    #   as here                                             60.1 / 46.1
    #   --momentum 0.9                                       0.2 / 0.1    1.7, 3.5  (log 192: 5.3)
    #   --momentum 0.98 --queue_size 1024 --batch_size 32    0.1 / 0.1    3.2, 3.4  (log 1024: 6.9)
    "tiny": dict(
        image_size=72, patch=24, stem="conv", width=128, vision_layers=4, text_layers=2, heads=4,
        mlp_ratio=2, act="relu", dropout=0.0, max_text=22, queue_size=192, init_std=0.08,
        pos_std=0.5,
        pretrain=dict(batch_size=64, steps=1600, lr=1e-3, warmup_steps=100, amp="auto"),
        retrieval=dict(image_size=72, batch_size=64, steps=650, lr=3e-4, warmup_steps=50,
                       amp="auto"),
    ),
}

# Values are those of Table 6 and section 4.1. AdamW's betas, no clipping and the decay to zero are
# train.py's, as the paper is silent about them.
# Data: CC3M + CC12M, "randomly collect 200k, 5.3M and 9.5M": --limit 200000 --seed 0. They have no
#   test split: name the data of the closing evaluation, --eval_data dataset_coco.json --eval_root
#   COCO_IMAGES (Tables 3 to 5 are zero-shot on COCO's 5,000 test images).
# Towers: --init_vision google/vit-base-patch16-224-in21k --init_text bert-base-uncased; the heads
#   start at random.
PAPER = dict(optimizer="adamw", lr=5e-5, weight_decay=0.01, schedule="linear", warmup_steps=0.1,
             epochs=30, batch_size=4096, amp="fp16")
RECIPE = {
    "pretrain": PAPER,
    # Karpathy's COCO (113,287 images) or Flickr30K (the paper: 29.8k; his file marks 29,000).
    # epoch_of [?]: Deviation 9
    "retrieval": PAPER | dict(image_size=336, epoch_of="captions"),
}

# Every table and figure with results, as data for tools/tables.py; models/README.md says what its
# words mean. Tables 6 and 7 list settings and sizes, Figures 1 to 3 are drawings. Table 1's rows of
# 9.5M pairs stand apart, as "Table 1: pairs"; its rows of other methods are other people's.
CC = ("--data cc3m.tsv,cc12m.tsv --image_root images --vocab vocab.txt "
      "--init_vision google/vit-base-patch16-224-in21k --init_text bert-base-uncased")
COCO = "--data dataset_coco.json --image_root coco-images"
FLICKR = "--data dataset_flickr30k.json --image_root flickr30k-images"
# tiny: of 1,000, 1,500 and 2,500 pictures the number whose R@1 on val came nearest to 30..80 (seed
# 100, InfoNCE and both losses: 59.2 to 81.4), chosen before any reported seed was run
QUICK = dict(pretrain="--steps 700 --limit 1000", retrieval="--steps 200")
CL, VANILLA = "pretrain --mlm none --mim none", "pretrain --mlm vanilla --mim vanilla"
TABLE_1 = dict(
    claim="ConMLM and ConMIM are more effective than vanilla MLM and MIM, and than none.",
    rows={"CL (zs)": CL, "Vanilla (zs)": VANILLA, "ConLIP (zs)": "pretrain",
          "CL": CL + " -> retrieval", "Vanilla": VANILLA + " -> retrieval",
          "ConLIP": "pretrain -> retrieval"},
    reference="ConLIP (zs)",
    better=[("ConLIP (zs)", "Vanilla (zs)"), ("ConLIP (zs)", "CL (zs)"), ("ConLIP", "Vanilla"),
            ("ConLIP", "CL")],
    evaluation="retrieval", columns=("t2i_r1", "i2t_r1"))
TABLE_2 = dict(
    rows={"Vanilla": VANILLA, "ConLIP": "pretrain"}, reference="Vanilla",
    better=[("ConLIP", "Vanilla")], evaluation="cross_attention", tiny=QUICK,
    base=dict(pretrain=CC + " --limit 5300000", eval=FLICKR))
ABLATION = dict(evaluation="retrieval", columns=("t2i_r1", "i2t_r1"),
                tiny=QUICK,
                base=dict(pretrain=CC + " --limit 200000", eval=COCO))
TABLES = {
    "Table 1: Flickr30K": dict(
        TABLE_1, tiny=QUICK,
        base=dict(pretrain=CC + " --limit 5300000", retrieval=FLICKR, eval=FLICKR)),
    "Table 1: COCO": dict(
        TABLE_1, base=dict(pretrain=CC + " --limit 5300000", retrieval=COCO, eval=COCO)),
    "Table 1: pairs": dict(
        claim="More pairs help, without fine-tuning and with it.",
        rows={"ConLIP (zs), 5.3M": "pretrain --limit 5300000",
              "ConLIP (zs), 9.5M": "pretrain --limit 9500000",
              "ConLIP, 5.3M": "pretrain --limit 5300000 -> retrieval",
              "ConLIP, 9.5M": "pretrain --limit 9500000 -> retrieval"},
        better=[("ConLIP (zs), 9.5M", "ConLIP (zs), 5.3M"), ("ConLIP, 9.5M", "ConLIP, 5.3M")],
        evaluation="retrieval", columns=("t2i_r1", "i2t_r1"),
        base=dict(pretrain=CC, retrieval=COCO, eval=COCO)),
    "Table 2": dict(
        TABLE_2, claim="The other side's [CLS] state gets more attention in conditioned heads.",
        columns=("text -> h_cls of the image, mean", "image patches -> h_cls of the text, mean")),
    "Table 2: deviation": dict(
        TABLE_2, claim="The attention to it is also spread wider.",
        columns=("text -> h_cls of the image, std", "image patches -> h_cls of the text, std")),
    "Table 3": dict(
        ABLATION,
        claim="DCL is more effective than InfoNCE; ConMLM and ConMIM both improve retrieval.",
        rows={"InfoNCE": "pretrain --contrast infonce --mlm none --mim none", "DCL": CL,
              "DCL + ConMLM": "pretrain --mim none", "DCL + ConMIM": "pretrain --mlm none",
              "DCL + ConMLM + ConMIM": "pretrain"},
        reference="DCL",
        better=[("DCL", "InfoNCE"), ("DCL + ConMLM", "DCL"), ("DCL + ConMIM", "DCL"),
                ("DCL + ConMLM + ConMIM", "DCL")]),
    "Table 4": dict(
        ABLATION,
        claim="More layers in the heads help image-to-text retrieval and harm text-to-image; "
              "layers that share their parameters do not help.",
        rows={"3": "pretrain --head_layers 3", "2": "pretrain --head_layers 2",
              "2*": "pretrain --head_layers 2 --head_shared", "1": "pretrain"},
        reference="1", better=[("3", "1", "i2t_r1"), ("1", "3", "t2i_r1"), ("1", "2*")]),
    "Table 5": dict(
        ABLATION, claim="Masking ratios matter little (no row is claimed to be better).",
        rows={"50 %, 15 %": "pretrain", "50 %, 25 %": "pretrain --mlm_prob 0.25",
              "50 %, 30 %": "pretrain --mlm_prob 0.3", "50 %, 40 %": "pretrain --mlm_prob 0.4",
              "40 %, 15 %": "pretrain --mim_prob 0.4", "60 %, 15 %": "pretrain --mim_prob 0.6",
              "70 %, 15 %": "pretrain --mim_prob 0.7"},
        reference="50 %, 15 %"),
    "Figure 4": dict(
        claim="Two towers search a gallery in O(n), a single-stream model in O(n^2).",
        rows={"ConLIP": "pretrain"}, evaluation="speed",
        base=dict(pretrain=CC + " --limit 5300000",
                  eval=COCO + " --sizes 1000,5000 --beside SINGLE_STREAM_RUN")),
    "Figure 5": dict(
        claim="The picture that a sentence describes comes first.",
        rows={"ConLIP": "pretrain -> retrieval"}, evaluation="gallery",
        base=dict(pretrain=CC + " --limit 9500000", retrieval=FLICKR,
                  eval=FLICKR + " --text 'a man wears an orange hat and glasses'")),
}

TASKS = ("pretrain", "retrieval")
EVALS = {"pretrain": ("retrieval",), "retrieval": ("retrieval",)}
INITS = ("vision", "text")
PAIRS = dict(source="pairs", image="center", image_eval="center", norm="half", text="caption")
VIEWS = {"pretrain": PAIRS, "retrieval": PAIRS}
BACKBONE = ("vision.", "text.")  # `--init` must fill every name that starts so
COUNTS = {"image tower": ("vision",), "text tower": ("text",),
          "MLM head": ("mlm_layers", "mlm_head"), "MIM head": ("mim_layers", "mim_head")}


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
# Blocks: one attention and one layer, of which both towers and both heads are built

# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


# Copied from models/codis.py::pick
def pick(x, at):
    """The tokens of x (B, S, D) at positions `at` (B, A) -> (B, A, D)."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# Copied from models/codis.py::Attention
class Attention(nn.Module):
    """Multi-head attention: tokens x (B, S, D) look at one another, or at a context (B, L, C).

    context() makes keys and values apart from forward(), as one image serves many sentences.
    """

    def __init__(self, width, heads, context_width=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)                  # one product for all three
        else:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def context(self, tokens):
        """Keys and values of a context (B, L, C) -> 2 x (B, L, D)."""
        return self.key_value(tokens).chunk(2, dim=-1)

    def forward(self, x, context=None, mask=None, at=None, maps=None):
        """-> (B, S, D), or (B, A, D) where only positions `at` (B, A) are asked for.

        mask: bool, True = may look, broadcast to (B, heads, S or A, L).
        maps: a list that receives the attention probabilities (B, heads, S or A, L), in the graph.
        """
        if context is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
            query = query if at is None else pick(query, at)
        else:
            query, (key, value) = self.query(x), context
        query, key, value = self.split(query), self.split(key), self.split(value)

        if maps is None:
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        else:
            # the same written out, as a fused kernel does not show its probabilities
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            maps.append(scores.softmax(-1))
            x = maps[-1] @ value
        return self.out(x.transpose(1, 2).flatten(2))

    def split(self, x):
        # (B, S, D) -> (B, heads, S, D/heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# Copied from models/codis.py::Block
class Block(nn.Module):
    """A transformer layer: self-attention, cross-attention if it has a context, feed-forward.

    norm="pre": each part reads normalised tokens (ViT); "post": the sum is normalised (BERT).
    """

    def __init__(self, width, heads, norm, mlp_ratio=4, act="gelu", context_width=None,
                 dropout=0.0):
        super().__init__()
        eps = {"pre": 1e-6, "post": 1e-12}[norm]          # timm's ViT, Hugging Face's BERT
        self.pre, self.drop = norm == "pre", nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        if context_width is not None:
            self.cross = Attention(width, heads, context_width, dropout)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, eps)

    def before(self, x, norm):
        return norm(x) if self.pre else x

    def after(self, x, change, norm):
        x = x + self.drop(change)
        return x if self.pre else norm(x)

    def self_attend(self, x, mask=None, at=None):
        change = self.attention(self.before(x, self.attention_norm), mask=mask, at=at)
        return self.after(x if at is None else pick(x, at), change, self.attention_norm)

    def cross_attend(self, x, context, mask=None, maps=None):
        change = self.cross(self.before(x, self.cross_norm), context, mask, maps=maps)
        return self.after(x, change, self.cross_norm)

    def feed(self, x):
        return self.after(x, self.mlp(self.before(x, self.mlp_norm)), self.mlp_norm)

    def forward(self, x, mask=None, context=None, context_mask=None, at=None, maps=None):
        """x: (B, S, D); context: cross.context() of the other modality -> (B, S or A, D)."""
        x = self.self_attend(x, mask, at)
        if context is not None:
            x = self.cross_attend(x, context, context_mask, maps)
        return self.feed(x)


# --------------------------------------------------------------------------------------------------
# Towers and heads

# Copied from models/codis.py::patch_stem with cfg.vision_width->cfg.width
def patch_stem(cfg):
    """(B, 3, H, W) -> (B, D, H/patch, W/patch): ViT's projection, or three convolutions instead."""
    width, patch = cfg.width, cfg.patch
    if cfg.stem == "patch":
        return nn.Conv2d(3, width, patch, patch)
    return nn.Sequential(nn.Conv2d(3, width // 2, patch // 4, patch // 4), activation(cfg.act),
                         nn.Conv2d(width // 2, width // 2, 3, 2, 1), activation(cfg.act),
                         nn.Conv2d(width // 2, width, 3, 2, 1))


class MaskedViT(nn.Module):
    """(B, 3, H, W) -> (B, P+1, D), the class token first. H and W: any multiples of `patch`.

    ViT, but for hidden patches: of them the tower knows the position alone.
    """

    def __init__(self, cfg):
        super().__init__()
        self.patch, self.checkpointing = cfg.patch, cfg.checkpointing
        patches = (cfg.image_size // cfg.patch) ** 2
        self.patch_embed = patch_stem(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, "pre", cfg.mlp_ratio, cfg.act)
                                    for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(cfg.width, 1e-6)

    def forward(self, image, hidden=None, mask_token=None):
        """hidden: bool (B, P), True = mask_token (1, 1, D) replaces the patch; None hides none."""
        if hidden is not None:
            image = blank(image, hidden, self.patch)
        x = self.patch_embed(image)                                              # (B, D, h, w)
        pos = resize_pos_embed(self.pos_embed, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                         # (B, P, D)

        # mask before positions are added: a hidden patch still says where it is
        if hidden is not None:
            x = torch.where(hidden[..., None], mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + pos   # (B, P+1, D)

        for block in self.blocks:
            x = run_block(block, x, save_memory=self.checkpointing)
        return self.norm(x)


def blank(image, hidden, patch):
    """The image (B, 3, H, W) with zeros for the pixels of hidden patches; hidden: bool (B, P)."""
    rows, columns = image.shape[2] // patch, image.shape[3] // patch
    hidden = hidden.unflatten(1, (1, rows, columns))                             # (B, 1, h, w)
    hidden = hidden.repeat_interleave(patch, dim=2)
    hidden = hidden.repeat_interleave(patch, dim=3)                              # (B, 1, H, W)
    return image.masked_fill(hidden, 0)


# Copied from models/codis.py::init_vit
def init_vit(vit, pos_std):
    """Initial weights of an image encoder, where a model's `init_std` does not suit it.

    He's for the convolutions of a stem, `pos_std` for position embeddings and class token, 0.02 for
    what a block adds to its tokens. With tiny's 0.08 for all three the first block drowned the
    patches: every token knew the colours of the whole picture, few knew their own position.
    """
    for module in vit.patch_embed.children():  # of a conv stem; ViT's single projection has none
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    for token in (vit.pos_embed, vit.cls_token):
        nn.init.trunc_normal_(token, std=pos_std)
    for block in vit.blocks:
        for module in (block.attention.out, block.mlp[2]):
            nn.init.trunc_normal_(module.weight, std=0.02)


# Copied from models/codis.py::run_block
def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# Copied from models/codis.py::resize_pos_embed
def resize_pos_embed(pos, height, width):
    """ViT's position embeddings (1, 1+h*h, D), interpolated bicubically to height x width patches.
    The class token's stays."""
    if pos.shape[1] == 1 + height * width:
        return pos
    side = math.isqrt(pos.shape[1] - 1)
    grid = pos[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)     # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).mT.to(pos.dtype)], dim=1)      # (1, 1+H*W, D)


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


# Copied from models/codis.py::Bert
class Bert(nn.Module):
    """Ids and mask (B, T) -> (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = Embeddings(cfg)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, "post", cfg.mlp_ratio, cfg.act,
                                          dropout=cfg.dropout) for _ in range(cfg.text_layers))

    def forward(self, text, text_mask):
        x, mask = self.embeddings(text), text_mask[:, None, None].bool()
        for block in self.blocks:
            x = run_block(block, x, mask, save_memory=self.checkpointing)
        return x


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


class TokenHead(nn.Module):
    """A token-level head: the masked side's tokens look at one another, then at the other side."""

    def __init__(self, cfg):
        super().__init__()
        self.depth = cfg.head_layers
        stored = 1 if cfg.head_shared else cfg.head_layers
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, "post", cfg.mlp_ratio, cfg.act,
                                          cfg.width, cfg.dropout) for _ in range(stored))

    def forward(self, x, other, mask=None, other_mask=None, at=None, maps=None):
        """x: (B, S, D), the masked side; other: (B, L, D), the other side -> (B, S or M, D).

        mask, other_mask: bool (B, 1, 1, S) and (B, 1, 1, L), True = may look; None: everywhere.
        at: (B, M) positions of x that are asked for; None: all.
        maps: a list that receives each layer's attention to the other side, (B, heads, S, L).
        """
        for n in range(self.depth):
            # with shared parameters one block serves all layers
            block = self.blocks[n % len(self.blocks)]
            context = block.cross.context(other)

            # the layers below need every position, the last one only those asked for
            last = n + 1 == self.depth
            x = block(x, mask, context, other_mask, at=at if last else None, maps=maps)
        return x

    def attention_to_first(self, x, other, mask=None, other_mask=None):
        """How much x looks at the other side's first token: (B, S) float32, mean over layers and
        attention heads. Arguments as in forward()."""
        maps = []
        self(x, other, mask, other_mask, maps=maps)
        maps = torch.stack(maps).float()                             # (layers, B, heads, S, L)
        return maps.mean(dim=(0, 2))[..., 0]


# --------------------------------------------------------------------------------------------------
# Processes and memory

# Copied from models/codis.py::world
def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Copied from models/codis.py::gather
@torch.no_grad()
def gather(x):
    """(B, ...) of every process -> (N, ...), in the order of ranks, without gradient.

    All processes must have the same B.
    """
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# Copied from models/codis.py::enqueue_
@torch.no_grad()
def enqueue_(queue, queue_ids, ptr, keys, ids):
    """Writes keys (N, d) and their image ids (N,) at `ptr` of a ring (Q, d), around its end.

    Of more than Q keys the last Q stay.
    """
    size = len(queue)
    slots = (ptr + torch.arange(len(keys), device=ptr.device)) % size
    slots, keys, ids = slots[-size:], keys[-size:], ids[-size:]

    queue.index_copy_(0, slots, keys.to(queue.dtype))
    queue_ids.index_copy_(0, slots, ids)


@torch.no_grad()
def ema_(teacher, student, m):
    """Eq. (8): theta_m = m theta_m + (1 - m) theta_o, in place, for two modules of one kind.

    Buffers are copied: the running statistics of a batch norm are an average already.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - m)
    for mine, theirs in zip(teacher.buffers(), student.buffers()):
        mine.copy_(theirs)


# --------------------------------------------------------------------------------------------------
# The paper's equations

def unit_cls(tokens):
    """Eq. (2): h_cls / |h_cls|, whose products are sim(x, y) = h_x'h_y / (|h_x| |h_y|).

    tokens: (B, S, D) final states, [CLS] first -> (B, D) float32 of unit length.
    """
    return F.normalize(tokens[:, 0].float(), dim=-1)


@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15):
    """Eq. (3): chooses max(1, round(prob n)) of a sentence's n maskable tokens.

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


@torch.no_grad()
def mask_patches(b, height, width, prob=0.5, unit=1, device=None):
    """Eq. (3), y*: chooses round(prob n) of an image's n units of unit x unit patches.

    height, width: patches, multiples of `unit`. Each set of units is equally likely
    -> positions of the chosen patches (b, M) int64, and bool (b, height * width), True = chosen.
    """
    # which units: a random order of them
    rows, columns = height // unit, width // unit
    chosen = min(max(1, round(prob * rows * columns)), rows * columns)
    units = torch.rand(b, rows * columns, device=device).topk(chosen, dim=-1).indices

    # their patches, counted row by row: from the upper left corner, `unit` to the right and below
    row = units // columns * unit
    column = units % columns * unit
    corner = (row * width + column)[..., None]                                   # (b, chosen, 1)
    inside = torch.arange(unit, device=device)
    inside = (inside[:, None] * width + inside).flatten()                        # (unit * unit,)
    positions = (corner + inside).flatten(1)                                     # (b, M)

    hidden = torch.zeros(b, height * width, dtype=torch.bool, device=device)
    return positions, hidden.scatter_(1, positions, True)


def patchify(image, patch):
    """(B, 3, H, W) -> (B, P, p * p * 3): a patch's pixels row by row, the channels side by side."""
    x = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))               # (B, 3, h, p, w, p)
    x = x.permute(0, 2, 4, 3, 5, 1)                                             # (B, h, w, p, p, 3)
    return x.flatten(3).flatten(1, 2)


def context(kind, passes):
    """What the other side's masked tokens look at -> (B, S, D), h_cls of the complete input first.

    kind "con" (Eq. 5, 6): the other states are those of the masked input, which cannot tell the
    answer. "vanilla": they too are of the complete input. passes: the Passes of one modality.
    """
    if kind == "vanilla":
        return passes.complete
    return torch.cat([passes.complete[:, :1], passes.masked[:, 1:]], dim=1)


def conmlm_loss(logits, labels):
    """Eq. (5): L = -mean_i log P(x_i* | x*, y*, h_cls of the image).

    logits: (B, M, V); labels: (B, M), -100 = no masked word here -> 0-d float32.
    """
    logits = logits.flatten(0, 1).float()                       # (B * M, V)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)           # 0, not NaN, where none is masked


def conmim_loss(y, z):
    """Eq. (6): L = mean_i |y_i - z_i|, the true and the predicted pixels of masked patches.

    y, z: (B, M, p * p * 3) -> 0-d float32.
    """
    return (y.float() - z.float()).abs().mean()


def negatives_log_sum(q, ids, queue, queue_ids, tau):
    """log sum_j e^(q.q_j/tau) over the keys q_j of other images -> (R,); -inf where there are none.

    Arguments as in infonce_loss(). The (R, Q) matrix is kept for backward: with the paper's queue
    and 512 rows 25 MB, which is no reason to compute it in pieces.
    """
    # float32 throughout: autocast would make the product bfloat16's
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ queue.T / tau                                               # (R, Q)
        own_image = ids[:, None] == queue_ids
        return scores.masked_fill(own_image, -torch.inf).logsumexp(-1)


def infonce_loss(q, k, ids, queue, queue_ids, tau):
    """Eq. (9): L = -log e^(q.k/tau) / (e^(q.k/tau) + sum_j e^(q.q_j/tau)), row by row -> (R,).

    q, k: (R, D) float32 of unit length, queries and their positives; ids: (R,) their images;
    queue: (Q, D) of unit length; queue_ids: (Q,) its images; j runs over keys of other images.
    """
    positive = (q * k).sum(-1) / tau
    negatives = negatives_log_sum(q, ids, queue, queue_ids, tau)
    return torch.logaddexp(positive, negatives) - positive


def dcl_loss(q, k, ids, queue, queue_ids, tau):
    """Eq. (10), (11): L = -q.k/tau + log sum_j e^(q.q_j/tau), row by row -> (R,).

    Arguments as in infonce_loss(), but the positive is not in the denominator. A row without any
    negative has loss 0 and no gradient.
    """
    positive = (q * k).sum(-1) / tau
    negatives = negatives_log_sum(q, ids, queue, queue_ids, tau)
    found = negatives > -torch.inf
    return torch.where(found, negatives.masked_fill(~found, 0) - positive, 0)


# --------------------------------------------------------------------------------------------------
# The model

class Passes(NamedTuple):
    """Eq. (1), (3): B inputs of one modality. Where the model masks none, `complete` is all."""
    complete: torch.Tensor                  # (B, S, D) states of the complete inputs, h_cls first
    masked: torch.Tensor | None = None      # (B, S, D) states of the masked inputs
    places: torch.Tensor | None = None      # (B, M) which words, or which of the P patches
    labels: torch.Tensor | None = None      # (B, M) the true words there, -100 = none; texts only


class Keys(NamedTuple):
    """What the momentum towers make of pairs, B of this process or N of all."""
    image: torch.Tensor                     # (B, D) of unit length
    text: torch.Tensor                      # (B, D) of unit length
    ids: torch.Tensor                       # (B,) image ids


class ConLIP(nn.Module):
    """Both tasks of the paper.

    A batch is a dict: image (B, 3, H, W), text and text_mask (B, T), image_id (B,).
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        cfg.check(task)
        self.cfg, self.task = cfg, task
        self.vision = MaskedViT(cfg)
        self.text = Bert(cfg)

        # fine-tuning has no heads
        self.mlm = cfg.mlm if task == "pretrain" else "none"
        self.mim = cfg.mim if task == "pretrain" else "none"
        if self.mlm != "none":
            self.mlm_layers = TokenHead(cfg)
            self.mlm_head = MLMHead(cfg)
        if self.mim != "none":
            self.mim_layers = TokenHead(cfg)
            self.mim_head = nn.Linear(cfg.width, 3 * cfg.patch ** 2)

        # a head masks its own side; conditioned, it needs the other side masked too
        self.masks_text = self.mlm != "none" or self.mim == "con"
        self.masks_image = self.mim != "none" or self.mlm == "con"
        if self.masks_image:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.init_weights()

        # momentum towers and the queues of their keys
        self.students = ("vision", "text")
        for name in self.students:
            self.add_module(name + "_m", deepcopy(getattr(self, name)).requires_grad_(False))
        self.register_buffer("queue_image", torch.empty(cfg.queue_size, cfg.width))
        self.register_buffer("queue_text", torch.empty(cfg.queue_size, cfg.width))
        self.register_buffer("queue_ids", torch.empty(cfg.queue_size, dtype=torch.long))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.reset_memory()

        # what eval.py may ask for
        self.offers = {"encode_image", "encode_text"}
        if self.mlm != "none" or self.mim != "none":
            self.offers.add("cross_attention")

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        init_vit(self.vision, self.cfg.pos_std)

        # 0.02 at all sizes: with tiny's 0.08 all patches ended in one guess, the median pixel
        if self.masks_image:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.mim != "none":
            nn.init.trunc_normal_(self.mim_head.weight, std=0.02)

    def train(self, mode=True):
        super().train(mode)
        for name in self.students:
            getattr(self, name + "_m").eval()       # momentum towers never run with dropout
        return self

    # -- Eq. 1 and 3: each tower on complete and on masked inputs

    def image_passes(self, image):
        """Images (B, 3, H, W) -> Passes. One call of the tower serves both."""
        if not self.masks_image:
            return Passes(self.vision(image))

        # choose the patches to hide
        cfg = self.cfg
        height, width = image.shape[2] // cfg.patch, image.shape[3] // cfg.patch
        places, hidden = mask_patches(len(image), height, width, cfg.mim_prob, cfg.mask_unit,
                                      image.device)

        # the first B rows hide nothing
        hidden = torch.cat([torch.zeros_like(hidden), hidden])                   # (2B, P)
        states = self.vision(torch.cat([image, image]), hidden, self.mask_token)
        complete, masked = states.chunk(2)                                       # (B, P+1, D) each
        return Passes(complete, masked, places)

    def text_passes(self, text, text_mask):
        """Ids and mask (B, T) -> Passes. One call of the tower serves both."""
        if not self.masks_text:
            return Passes(self.text(text, text_mask))

        # choose the words to mask
        cfg = self.cfg
        words = self.maskable(text, text_mask)
        masked_text, places, labels = mask_tokens(text, words, cfg.mask_id, cfg.first_word,
                                                  cfg.vocab_size, cfg.mlm_prob)

        # the first B rows are complete
        states = self.text(torch.cat([text, masked_text]), text_mask.repeat(2, 1))
        complete, masked = states.chunk(2)                                       # (B, T, D) each
        return Passes(complete, masked, places, labels)

    def maskable(self, text, text_mask):
        """(B, T) -> bool (B, T), True for words: not for [CLS], [SEP] and padding."""
        special = (text == self.cfg.cls_id) | (text == self.cfg.sep_id)
        return text_mask.bool() & ~special

    # -- pre-training

    def forward(self, batch):
        return getattr(self, "loss_" + self.task)(batch)

    def loss_pretrain(self, batch):
        """Eq. (4): L_all = L_token + L_inst."""
        # the trained towers see complete and masked inputs, the momentum towers complete ones
        image = self.image_passes(batch["image"])
        text = self.text_passes(batch["text"], batch["text_mask"])
        keys = self.momentum_keys(batch)

        # two levels of interaction
        losses = self.inst_losses(unit_cls(image.complete), unit_cls(text.complete), keys)
        losses |= self.token_losses(batch, image, text)

        logs = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": sum(losses.values()), "logs": logs, "keys": self.gather_keys(keys)}

    @torch.no_grad()
    def momentum_keys(self, batch):
        """-> the Keys of this process's pairs."""
        image = unit_cls(self.vision_m(batch["image"]))
        text = unit_cls(self.text_m(batch["text"], batch["text_mask"]))
        return Keys(image, text, batch["image_id"])

    def gather_keys(self, keys):
        """Keys of this process (B) -> of all processes (N): what the queues will take in."""
        # both modalities in one transfer
        both = gather(torch.stack([keys.image, keys.text], dim=1))               # (N, 2, D)
        return Keys(both[:, 0], both[:, 1], gather(keys.ids))

    def inst_losses(self, image_emb, text_emb, keys):
        """Eq. (12): L_inst = L_I2T + L_T2I, each a mean over the batch.

        image_emb, text_emb: (B, D) of unit length, from the trained towers; keys: this process's.
        """
        cfg = self.cfg
        contrast = {"dcl": dcl_loss, "infonce": infonce_loss}[cfg.contrast]

        # whose embeddings are the positives
        image_positive, text_positive = keys.image, keys.text
        if cfg.positive == "online":
            image_positive, text_positive = image_emb, text_emb

        # an image asks among texts, a text among images
        i2t = contrast(image_emb, text_positive, keys.ids, self.queue_text, self.queue_ids,
                       cfg.temp)
        t2i = contrast(text_emb, image_positive, keys.ids, self.queue_image, self.queue_ids,
                       cfg.temp)
        return {"i2t": i2t.mean(), "t2i": t2i.mean()}

    def token_losses(self, batch, image, text):
        """Eq. (7): L_token = L_ConMIM + L_ConMLM, or their vanilla forms, or what is left of them.

        image, text: the Passes of the batch.
        """
        losses = {}
        text_mask = batch["text_mask"][:, None, None].bool()                     # (B, 1, 1, T)

        # Eq. 5: masked words look at the image
        if self.mlm != "none":
            seen = context(self.mlm, image)                                      # (B, P+1, D)
            words = self.mlm_layers(text.masked, seen, mask=text_mask, at=text.places)
            logits = self.mlm_head(words, self.text.embeddings.words.weight)     # (B, M, V)
            losses["mlm"] = conmlm_loss(logits, text.labels)

        # Eq. 6: masked patches, which stand behind the class token, look at the text
        if self.mim != "none":
            seen = context(self.mim, text)                                       # (B, T, D)
            patches = self.mim_layers(image.masked, seen, other_mask=text_mask, at=image.places + 1)
            pixels = pick(patchify(batch["image"], self.cfg.patch), image.places)
            losses["mim"] = conmim_loss(pixels, self.mim_head(patches))
        return losses

    # -- hooks of the training loop

    def after_backward(self, out):
        """The queues take in this step's keys."""
        # not in forward: backward scores the old keys a second time
        keys = out["keys"]
        enqueue_(self.queue_image, self.queue_ids, self.ptr, keys.image, keys.ids)
        enqueue_(self.queue_text, self.queue_ids, self.ptr, keys.text, keys.ids)
        self.ptr.add_(len(keys.ids)).remainder_(len(self.queue_ids))

    def after_step(self, step, total_steps, epoch_steps=None):
        """Eq. (8): the momentum towers follow."""
        for name in self.students:
            ema_(getattr(self, name + "_m"), getattr(self, name), self.cfg.momentum)

    @torch.no_grad()
    def reset_memory(self):
        """The start of training; again after foreign weights were loaded."""
        # momentum towers are copies
        for name in self.students:
            getattr(self, name + "_m").load_state_dict(getattr(self, name).state_dict())

        # queues are random unit vectors of no image, which count as negatives (MoCo)
        for queue in (self.queue_image, self.queue_text):
            queue.copy_(F.normalize(torch.randn_like(queue), dim=-1))
        self.queue_ids.fill_(-1)
        self.ptr.zero_()

    # -- fine-tuning

    def loss_retrieval(self, batch):
        """Eq. (12) alone: this task has no heads and masks nothing, so nothing else is left."""
        return self.loss_pretrain(batch)

    # -- what evaluation asks for

    def encode_image(self, batch):
        """-> (B, D) of unit length."""
        return unit_cls(self.vision(batch["image"]))

    def encode_text(self, batch):
        """-> (B, D) of unit length."""
        return unit_cls(self.text(batch["text"], batch["text_mask"]))

    def cross_attention(self, batch):
        """Table 2: how much each head's tokens look at the other side's h_cls, under fresh masks.

        -> {name: (scores (B, S), bool (B, S): which of them count, what uniform attention would
        give (B,))}, scores in the mean over attention heads and layers.
        """
        image = self.image_passes(batch["image"])
        text = self.text_passes(batch["text"], batch["text_mask"])
        text_mask = batch["text_mask"][:, None, None].bool()                     # (B, 1, 1, T)
        found = {}

        # words look at the image
        if self.mlm != "none":
            seen = context(self.mlm, image)
            scores = self.mlm_layers.attention_to_first(text.masked, seen, mask=text_mask)
            words = self.maskable(batch["text"], batch["text_mask"])
            masked = torch.zeros_like(words).scatter(1, text.places, text.labels != -100)
            uniform = scores.new_full((len(scores),), 1 / seen.shape[1])
            found["text -> h_cls of the image"] = scores, words, uniform
            found["masked words -> h_cls of the image"] = scores, masked, uniform

        # patches look at the text; the class token stands before them
        if self.mim != "none":
            seen = context(self.mim, text)
            scores = self.mim_layers.attention_to_first(image.masked, seen, other_mask=text_mask)
            scores = scores[:, 1:]                                               # (B, P)
            patches = torch.ones_like(scores, dtype=torch.bool)
            masked = torch.zeros_like(patches).scatter(1, image.places, True)
            uniform = 1 / batch["text_mask"].sum(1)
            found["image patches -> h_cls of the text"] = scores, patches, uniform
            found["masked patches -> h_cls of the text"] = scores, masked, uniform
        return found

    # -- weights of another run or file

    def adapt(self, state):
        """Weights of another run or a file, {name: tensor}, as this model takes them.

        Position embeddings are brought to this image size. Queues are left out, because their image
        ids are those of the other run's data.
        """
        side = self.cfg.image_size // self.cfg.patch
        fitting = {}
        for name, tensor in state.items():
            if name.startswith("queue_") or name == "ptr":
                continue
            if name.endswith("pos_embed"):
                tensor = resize_pos_embed(tensor, side, side)
            fitting[name] = tensor
        return fitting


# --------------------------------------------------------------------------------------------------
# Foreign weights

# Our modules -> timm's and Hugging Face's, where they differ. Rows of several, joined, are ours.
TIMM = {
    "patch_embed": ["patch_embed.proj"], "attention_norm": ["norm1"], "mlp_norm": ["norm2"],
    "attention.qkv": ["attn.qkv"], "attention.out": ["attn.proj"],
    "mlp.0": ["mlp.fc1"], "mlp.2": ["mlp.fc2"]}
BERT = {
    "embeddings.words": ["embeddings.word_embeddings"], "embeddings.norm": ["embeddings.LayerNorm"],
    "embeddings.positions": ["embeddings.position_embeddings"],
    "embeddings.segments": ["embeddings.token_type_embeddings"],
    "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.out": ["attention.output.dense"], "attention_norm": ["attention.output.LayerNorm"],
    "mlp.0": ["intermediate.dense"], "mlp.2": ["output.dense"], "mlp_norm": ["output.LayerNorm"]}


def foreign_names(model, side):
    """{our name: [foreign names]} of what a file must fill, and the same of what it may fill.

    side: "vision" (timm's ViT) or "text" (Hugging Face's BERT). The second dict is empty, as the
    heads start at random (section 4.1). SystemExit where the tower has no counterpart.
    """
    cfg = model.cfg
    table, layer = {"vision": (TIMM, "blocks"), "text": (BERT, "encoder.layer")}[side]
    if cfg.act != "gelu" or (side == "vision" and cfg.stem != "patch"):
        raise SystemExit(f"{side}: published weights need --stem patch --act gelu, "
                         f"this model has {cfg.stem} and {cfg.act}")

    # "blocks.3.mlp.0.weight" -> "blocks.3." + "mlp.0" + ".weight", and each part renamed
    needed = {}
    for name in getattr(model, side).state_dict():
        parts = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
        block, module, kind = parts.groups(default="")
        block = block.replace("blocks", layer)
        needed[f"{side}.{name}"] = [block + theirs + kind for theirs in table.get(module, [module])]
    return needed, {}


def load_pretrained(model, **states):
    """Fills towers from foreign state dicts, vision=timm's and text=BertModel's.

    Position embeddings are brought to this image size, momentum towers become copies and queues
    start anew. What the towers have no place for is left out; a tensor that is missing is a
    KeyError, before anything changes.
    """
    # gather everything first, so that an error changes nothing
    filled = {}
    for side, state in states.items():
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        needed, _ = foreign_names(model, side)
        for ours, theirs in needed.items():
            filled[ours] = torch.cat([state[name] for name in theirs])

    model.load_state_dict(model.adapt(filled), strict=False)
    model.reset_memory()


Model = ConLIP


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {k: v for k, v in PRESETS["tiny"].items() if k not in TASKS}
    cfg = Config(**sizes, vocab_size=200, mask_id=4, cls_id=2, sep_id=3, first_word=5)
    words = torch.randint(5, 200, (4, cfg.max_text))
    batch = {"image": torch.randn(4, 3, cfg.image_size, cfg.image_size), "text": words,
             "text_mask": torch.ones_like(words), "image_id": torch.arange(4)}

    for task in TASKS:
        model = ConLIP(cfg, task).train()
        out = model(batch)
        out["loss"].backward()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logs = {name: round(loss.item(), 3) for name, loss in out["logs"].items()}
        embeddings = tuple(model.encode_image(batch).shape)
        print(f"{task}: {trained:,} trained parameters, embeddings {embeddings}, losses {logs}")
