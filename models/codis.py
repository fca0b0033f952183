"""CODIS: align image and text through a shared codebook, then fuse them.

Duan, Chen, Tran, Yang, Xu, Zeng, Chilimbi, "Multi-modal Alignment using Representation Codebook",
CVPR 2022.

Two encoders embed an image and a sentence as unit vectors z_v, z_t. Each has a slow copy of itself,
the teacher. A codebook C of unit vectors bridges the two modalities: optimal transport assigns the
teachers' features to codewords, and the student of one modality must predict the assignment of the
*other*. Students are also contrasted with queues of teacher keys, across and within modalities, and
a fusion transformer learns matching (ITM) and masked words (MLM).

    image ---> ViT ----> tokens --------> context -------------+
      |         : EMA      +--> z_v  --+                       v
      +-----> ViT_m -----------> z_v^m |   Eq. 1-3        fusion layers --> [CLS]  --> Eq. 7 match?
                                       +-> codebook,           ^       \\--> masked --> Eq. 8 words
      +-----> BERT_m ----------> z_t^m |   Eq. 4-5             |
      |         : EMA      +--> z_t  --+   queues              |
    text ----> BERT ---> tokens ------------- queries ---------+

Shapes: B images, T text tokens, P patches, D width, d = 256 embedding, N global batch,
K codewords, M masked tokens, Q queue.

Equations
    Eq. 1  -> ot_loss()             Eq. 2  -> codebook_loss()     Eq. 3  -> Codis.code_losses()
    Eq. 4  -> align_loss()          Eq. 5  -> align_loss(), Codis.contrast()
    Eq. 6  -> ema_()                Eq. 7  -> itm_loss(), hard_negatives()
    Eq. 8  -> mlm_loss(), mask_tokens()                           Eq. 9  -> Codis.loss_pretrain()
    Algorithm 1 -> Codis.loss_pretrain()                          Algorithm 2 -> ipot()

Deviations from the paper
     1. Algorithm 1 minimises Trace(similarity^T T), which repels; Eq. 1 has <T, 1 - cos>: Eq. 1 it
        is.
     2. Eq. 2 prints T_t2p in both lines, Eq. 3 and Algorithm 1 keep each modality to itself; text
        and Figure 3 "chain" the modalities. `codebook_target="cross"` (default) follows text and
        figure, "same" follows Eq. 3 and Algorithm 1.
     3. A plan has total mass 1, so the soft label of a row is T / T.sum(1). H()'s target for the
        queues is softmaxed.
     4. Algorithm 2 leaves eps and the number of iterations open: 0.5 and 50, one inner step, as in
        the authors' own graph optimal transport. It runs in the log domain; sigma has length K (the
        print says n).
     5. The sum of Eq. 4 runs over the queue alone, so that p would be no distribution: here over
        the keys of the global batch and the queue. `batch_keys=False` is the queue alone, as
        Algorithm 1 has it. Keys of one image are all positives.
     6. Targets: distill * teacher + (1 - distill) * one-hot, 0.4, ramped from 0 over the first
        epoch (ALBEF's; the paper's alpha is the EMA's). A row without a positive among its keys has
        the teacher alone for a target, whatever `--distill` says. `--distill 1 --batch_keys False`
        is Algorithm 1.
     7. MLM replaces 80 % by [MASK], 10 % by a random word, 10 % by themselves "following BERT";
        section 3.3.2 speaks only of [MASK]: `mlm_mask_only=True`. Exactly max(1, round(0.15 n)) of
        a caption's n words are chosen, which keeps shapes static.
     8. Algorithm 1 has no distillation of MLM. Section 1 says "for each of the image, text and
        fusion encoders, there is a corresponding encoder that is updated through moving average",
        whose only use can be that: `mlm_distill=0.4` builds it.
     9. Teachers run without dropout. The temperature is learnt as its logarithm (as a raw parameter
        it hits its floor within 60 steps at tiny's learning rate), starts at 0.07 and is clamped to
        [0.001, 0.5] (ALBEF).
    10. Hard negatives are drawn from the "contrastive similarity distribution" (section 3.3.1) of
        student and student, which evaluation ranks by, inside each process's own batch. Eq. 4 and
        ALBEF compare student and teacher. Captions of one image are never its negatives.
    11. Codewords are scaled back to unit length after each step (the cost of Eq. 1 is 1 - cos) and
        take no weight decay. With `codebook_features="student"` the plans come from the students
        without gradient: L_ot then moves C alone, as it does with the teachers'.
    12. The paper does not say how BERT is divided: six layers of text, six of fusion, are ALBEF's,
        and so are captions of 25 tokens (30 when fine-tuned for retrieval). Nor does it say whether
        an epoch of pre-training goes over 4.0M images or 5.1M pairs: over images, and a caption of
        each is drawn, as ALBEF's data set does.
    13. Fine-tuning for retrieval uses the alignment (Eq. 5) and ITM losses, as ALBEF; the paper
        does not say. VQA, VE and NLVR2 use no teachers (in ALBEF they do). The answer decoder
        shares the text encoder's embeddings. Text assignment compares images by their [CLS] tokens,
        gives each class a third of the batch and has NLVR2's head of two layers (ALBEF compares
        projections, draws the classes, has a linear head).
    14. `stem="conv"` (three convolutions instead of one patch projection), `act="relu"` and
        `pos_std` exist for `tiny`.

Run: python train.py --model codis      (tiny on shapes, two CPU cores: 5.6 min; R@1 of 1,000 test
                                        images re-ranked 91.3 / 81.5, chance 0.1)
     python models/codis.py             (2 s: shapes, parameters and every loss on a random batch)
"""

import functools
import math
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
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
    image_size: Size = 256          # pixels a side
    patch: Size = 16                # pixels a side of a patch
    stem: Literal["patch", "conv"] = "patch"    # one projection (ViT), or three convolutions
    vision_width: Size = 768        # D of the image encoder
    vision_layers: Few = 12         # blocks of the image encoder
    vision_heads: Few = 12          # attention heads of the image encoder
    width: Size = 768               # D of text and fusion encoder
    text_layers: Few = 6            # BERT's first layers: text only
    fusion_layers: Few = 6          # BERT's last layers: with cross-attention to the image
    heads: Few = 12                 # attention heads of text and fusion encoder
    mlp_ratio: Few = 4              # hidden width of a feed-forward block over D
    act: Literal["gelu", "relu"] = "gelu"       # the activation
    dropout: Rate = 0.1             # in the text and fusion encoders, as BERT
    embed_dim: Size = 256           # d, of embeddings and codewords
    max_text: Tokens = 25           # tokens of a caption, [CLS] and [SEP] included
    positions: Tokens = 512         # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # [data] words and word pieces of the vocabulary
    pad_id: int = 0                 # [data] id of [PAD]
    cls_id: int = 101               # [data] id of [CLS]
    sep_id: int = 102               # [data] id of [SEP]
    mask_id: int = 103              # [data] id of [MASK]
    first_word: int = 999           # [data] lowest id of an ordinary word
    queue_size: Size = 65536        # Q, teacher keys kept per modality
    momentum: Share = 0.995         # alpha of Eq. 6
    temp: Positive = 0.07           # initial temperature gamma
    distill: Share = 0.4            # weight of the teacher in the targets of Eq. 5
    batch_keys: bool = True         # the global batch's keys join the queue in Eq. 4
    intra: bool = True              # image-image and text-text alignment in Eq. 5
    codebook: bool = True           # the codebook losses, Eq. 3
    codewords: Size = 4000          # K
    codebook_target: Literal["cross", "same"] = "cross"     # whose plan guides a modality
    codebook_features: Literal["teacher", "student"] = "teacher"    # whose features are transported
    ot_eps: Positive = 0.5          # epsilon of Algorithm 2
    ot_iters: Few = 50              # outer iterations of Algorithm 2
    ot_inner: Few = 1               # inner iterations of Algorithm 2
    mlm_prob: Share = 0.15          # share of words masked
    mlm_mask_only: bool = False     # replace every chosen word by [MASK]
    mlm_distill: Share = 0.0        # weight of a fusion teacher in the MLM targets; 0 builds none
    max_answer: Tokens = 10         # tokens of an answer, [CLS] and [SEP] included
    queue_chunk: Size = 8192        # keys scored at a time
    init_std: Positive = 0.02       # standard deviation of initial weights
    pos_std: Positive = 0.02        # that of the image encoder's position embeddings, class token
    checkpointing: bool = False     # recompute encoder blocks in backward, to save memory

    def check(self, task):
        """SystemExit, one line, for a value that its type or another value forbids."""
        check_fields(self)

        # images divide into patches, the convolutional stem halves a patch twice
        if self.image_size % self.patch:
            raise SystemExit(f"--image_size {self.image_size}: not a multiple of "
                             f"--patch {self.patch}")
        if self.stem == "conv" and self.patch % 4:
            raise SystemExit(f"--patch {self.patch}: --stem conv wants a multiple of 4")
        if self.stem == "conv" and self.vision_width < 2:
            raise SystemExit("--vision_width 1: --stem conv halves it")

        # heads share the width
        if self.vision_width % self.vision_heads:
            raise SystemExit(f"--vision_heads {self.vision_heads}: does not divide "
                             f"--vision_width {self.vision_width}")
        if self.width % self.heads:
            raise SystemExit(f"--heads {self.heads}: does not divide --width {self.width}")

        # what precision and the table of positions can hold
        if self.ot_eps < 0.05:
            raise SystemExit(f"--ot_eps {self.ot_eps}: below 0.05 float32 has no exp(-D/eps)")
        for name in ("max_text", "max_answer"):
            if getattr(self, name) > self.positions:
                raise SystemExit(f"--{name} {getattr(self, name)}: more than "
                                 f"--positions {self.positions}")


# minutes on two CPU cores
TINY = dict(image_view="plain", batch_size=32, warmup_steps=100, warmup_lr=1e-5, min_lr=1e-5)
PRESETS = {
    "base": dict(),
    # A patch is a cell of the built-in world's 3x3 grid: patches of 16 pixels cut most of its
    # objects in two, and shapes are then hardly learnt in minutes. For photos: --patch 16.
    "tiny": dict(image_size=72, patch=24, stem="conv",
                 vision_width=128, vision_layers=4, vision_heads=4,
                 width=128, text_layers=2, fusion_layers=2, heads=4, mlp_ratio=4, act="relu",
                 dropout=0.0, embed_dim=128, queue_size=1024, momentum=0.98, codewords=256,
                 max_text=22, mlm_prob=0.3, init_std=0.08, pos_std=0.5,
                 pretrain=dict(TINY, steps=1700, lr=1e-3, rerank_k=16),
                 retrieval=dict(TINY, steps=1000, lr=3e-4, rerank_k=16),
                 vqa=dict(TINY, steps=1900, lr=3e-4),
                 ve=dict(TINY, steps=1800, lr=5e-4),
                 nlvr2=[dict(TINY, steps=200, lr=3e-4), dict(TINY, steps=1300, lr=3e-4)]),
}

# Values without a mark are the paper's, section 4.2.1. [A]: ALBEF's, which the paper follows
# without printing them. [?]: a choice, where paper and ALBEF leave it open.
# Data: COCO, Visual Genome (its captions), Conceptual Captions and SBU, 4.0M images with 5.1M
# captions (section 4.1).
FINETUNE = dict(optimizer="adamw", schedule="cosine", weight_decay=0.02, image_size=384,
                crop_scale=(0.5, 1.0), lr=2e-5, min_lr=1e-6, batch_size=256)    # all but size: [A]
RECIPE = {
    "pretrain": dict(optimizer="adamw", lr=1e-4, min_lr=1e-5, warmup_lr=1e-5, warmup_steps=1000,
                     schedule="cosine", weight_decay=0.02, epochs=30, batch_size=512,
                     epoch_of="images",         # [?], Deviation 12
                     rerank_k=128),             # [A]: 128 Flickr30K, 256 COCO
    "retrieval": dict(FINETUNE, lr=1e-5, epochs=10, epoch_of="captions", max_text=30,
                      rerank_k=128),            # [A]: 10 epochs on Flickr30K, 5 on COCO
    # the others: a record has one text, so that both meanings of an epoch are the same.
    # [A]. The warm-up is what ALBEF's code does: its configuration says `warmup_epochs` 4 (VQA) and
    # 1 (VE, NLVR2), of which each is 100 steps. VQA's numbers on the test server need train, val
    # and Visual Genome's questions as --data
    "vqa": dict(FINETUNE, epochs=8, warmup_lr=1e-5, warmup_steps=400),
    "ve": dict(FINETUNE, epochs=5, warmup_lr=1e-5, warmup_steps=100),
    # [A]: stage 1 is text assignment on the pre-training data (--stage_data), at its size and crops
    "nlvr2": [dict(FINETUNE, task="assign", epochs=1, epoch_of="images", batch_size=512,
                   image_size=256, crop_scale=(0.2, 1.0), min_lr=1e-5, warmup_lr=1e-5,
                   warmup_steps=100),
              dict(FINETUNE, epochs=10, batch_size=128, warmup_lr=1e-5, warmup_steps=100)],
}

# Every table and figure with results, as data for tools/tables.py; models/README.md says what its
# words mean. Figures 1 to 3 are drawings. Tables 1 to 3 compare with other people's models, whose
# rows are not here; row 1 of Table 4 is ALBEF's objective in this code. Table 1 has two protocols:
# COCO with the pre-trained model (71.1 / 52.1 are Table 4's last row), Flickr30K "with the model
# fine-tuned using MSCOCO" (section 4.2); Table 4 fine-tunes for neither.
PAIRS = ("--data coco.json,vg.json,cc3m.tsv,sbu.tsv --image_root images --vocab vocab.txt "
         "--init_vision vit.safetensors --init_text bert-base-uncased")
COCO = "--data dataset_coco.json --image_root coco-images"
FLICKR = "--data dataset_flickr30k.json --image_root flickr30k-images"
QUICK = dict(pretrain="")
ZERO = dict(claim="Zero-shot retrieval above all models before (which are not run here).",
            evaluation="retrieval", columns=("i2t_r1", "t2i_r1"))
TUNED = dict(claim="Fine-tuned retrieval above all models before (which are not run here).",
             rows={"Ours": "pretrain -> retrieval"}, evaluation="retrieval",
             columns=("i2t_r1", "t2i_r1"))
REASON = "Above all models before (which are not run here)."
TABLES = {
    "Table 1: Flickr30K": dict(
        ZERO, rows={"Ours": "pretrain -> retrieval"},
        base=dict(pretrain=PAIRS, retrieval=COCO + " --epochs 5 --rerank_k 256", eval=FLICKR)),
    "Table 1: COCO": dict(
        ZERO, rows={"Ours": "pretrain"}, tiny=QUICK,
        base=dict(pretrain=PAIRS, eval=COCO + " --captions 5 --rerank_k 256")),
    "Table 2: Flickr30K": dict(
        TUNED, tiny=QUICK,
        base=dict(pretrain=PAIRS, retrieval=FLICKR, eval=FLICKR)),
    "Table 2: COCO": dict(
        TUNED, base=dict(pretrain=PAIRS, retrieval=COCO + " --epochs 5",
                         eval=COCO + " --captions 5 --rerank_k 256")),
    "Table 3: VQA": dict(
        claim=REASON, rows={"Ours": "pretrain -> vqa"}, evaluation="vqa", columns=("accuracy",),
        tiny=dict(pretrain=""),
        base=dict(pretrain=PAIRS, vqa="--data v2_OpenEnded_mscoco_train2014_questions.json,"
                                      "v2_OpenEnded_mscoco_val2014_questions.json "
                                      "--image_root coco-images",
                  eval="--data v2_OpenEnded_mscoco_test2015_questions.json "
                       "--image_root coco-images")),
    "Table 3: NLVR2": dict(
        claim=REASON, rows={"Ours": "pretrain -> nlvr2"}, evaluation="nlvr2",
        columns=("accuracy",), tiny=dict(pretrain=""),
        base=dict(pretrain=PAIRS, nlvr2="--stage_data coco.json,vg.json,cc3m.tsv,sbu.tsv "
                                        "nlvr2-train.json --stage_root images nlvr2-images",
                  eval=("--data nlvr2-dev.json --image_root nlvr2-images",
                        "--data nlvr2-test1.json --image_root nlvr2-images"))),
    "Table 3: SNLI-VE": dict(
        claim=REASON, rows={"Ours": "pretrain -> ve"}, evaluation="ve", columns=("accuracy",),
        tiny=dict(pretrain=""),
        base=dict(pretrain=PAIRS, ve="--data snli_ve_train.jsonl --image_root flickr30k-images",
                  eval=("--data snli_ve_dev.jsonl --image_root flickr30k-images",
                        "--data snli_ve_test.jsonl --image_root flickr30k-images"))),
    "Table 4": dict(
        claim="Alignment within modalities helps, the codebook helps more, and best with the "
              "teachers' features.",
        rows={"cross": "pretrain --codebook False --intra False",
              "intra + cross": "pretrain --codebook False",
              "cross + codebook (teacher)": "pretrain --intra False",
              "intra + cross + codebook (student)": "pretrain --codebook_features student",
              "intra + cross + codebook (teacher)": "pretrain"},
        reference="cross",
        better=[("intra + cross", "cross"), ("cross + codebook (teacher)", "cross"),
                ("intra + cross + codebook (teacher)", "intra + cross"),
                ("intra + cross + codebook (teacher)", "intra + cross + codebook (student)"),
                ("intra + cross + codebook (teacher)", "cross")],
        evaluation="retrieval", columns=("i2t_r1", "t2i_r1"), tiny=QUICK,
        base=dict(pretrain=PAIRS, eval=(FLICKR, COCO + " --captions 5 --rerank_k 256"))),
    "Figure 4": dict(
        claim="Words attend to the things that they name.",
        rows={"Ours": "pretrain"}, evaluation="gradcam",
        base=dict(pretrain=PAIRS, eval="--image a.jpg --text 'a person does tricks'")),
}

TASKS = ("pretrain", "retrieval", "vqa", "ve", "nlvr2")
EVALS = {"pretrain": ("retrieval",), "retrieval": ("retrieval",), "vqa": ("vqa",), "ve": ("ve",),
         "nlvr2": ("nlvr2",), "assign": ()}
INITS = ("vision", "text")
VIEWS = {
    "pretrain": dict(source="pairs", image="randaug", image_eval="resize", norm="clip",
                     text="caption"),
    "retrieval": dict(source="pairs", image="randaug", image_eval="resize", norm="clip",
                      text="caption"),
    "vqa": dict(source="vqa", image="randaug", image_eval="resize", norm="clip",
                text="question", answer="answer"),
    "ve": dict(source="ve", image="randaug", image_eval="resize", norm="clip",
               text="caption", label="label"),
    "nlvr2": dict(source="nlvr2", image="randaug", image2="randaug", image_eval="resize",
                  image2_eval="resize", norm="clip", text="caption", label="label"),
    "assign": dict(source="pairs", image="randaug", norm="clip", text="caption"),
}
COUNTS = {"text + fusion + MLM head (the paper, with BERT's 30,522 words: 123.7M)":
          ("text", "fusion", "mlm_head")}
BACKBONE = ("vision.", "text.", "fusion.")      # `--init` must fill every key that starts so

ANSWERS_AT_ONCE = 128       # rank_answers() writes that many at a time

CONTRASTIVE_TASKS = ("pretrain", "retrieval")   # those that embed and match pairs, with teachers
TWO_IMAGE_TASKS = ("nlvr2", "assign")           # a text about two images
PAIR_METHODS = {"encode_image", "encode_text", "image_states", "text_states", "match", "gradcam"}
MEMORY = ("queue_ids", "ptr", "ramp", "distill")    # where a training stands, not what it learnt
OFFERS = {"pretrain": PAIR_METHODS, "retrieval": PAIR_METHODS, "vqa": {"rank_answers"},
          "ve": {"predict"}, "nlvr2": {"predict"}, "assign": {"predict"}}


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
# Blocks: one attention and one layer, of which both encoders and the fusion are built

def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


def pick(x, at):
    """The tokens of x (B, S, D) at positions `at` (B, A) -> (B, A, D)."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


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
# Encoders

def patch_stem(cfg):
    """(B, 3, H, W) -> (B, D, H/patch, W/patch): ViT's projection, or three convolutions instead."""
    width, patch = cfg.vision_width, cfg.patch
    if cfg.stem == "patch":
        return nn.Conv2d(3, width, patch, patch)
    return nn.Sequential(nn.Conv2d(3, width // 2, patch // 4, patch // 4), activation(cfg.act),
                         nn.Conv2d(width // 2, width // 2, 3, 2, 1), activation(cfg.act),
                         nn.Conv2d(width // 2, width, 3, 2, 1))


class ViT(nn.Module):
    """(B, 3, H, W) -> (B, P+1, D), the class token first. H and W: any multiples of `patch`."""

    def __init__(self, cfg):
        super().__init__()
        width, self.patch, self.checkpointing = cfg.vision_width, cfg.patch, cfg.checkpointing
        self.patch_embed = patch_stem(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (cfg.image_size // cfg.patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, cfg.vision_heads, "pre", cfg.mlp_ratio, cfg.act)
                                    for _ in range(cfg.vision_layers))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, image):
        x = self.patch_embed(image)                                              # (B, D, h, w)
        pos = resize_pos_embed(self.pos_embed, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                         # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + pos   # (B, P+1, D)

        for block in self.blocks:
            x = run_block(block, x, save_memory=self.checkpointing)
        return self.norm(x)


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


def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def resize_pos_embed(pos, height, width):
    """ViT's position embeddings (1, 1+h*h, D), interpolated bicubically to height x width patches.
    The class token's stays."""
    if pos.shape[1] == 1 + height * width:
        return pos
    side = math.isqrt(pos.shape[1] - 1)
    grid = pos[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)     # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :1], grid.flatten(2).mT.to(pos.dtype)], dim=1)      # (1, 1+H*W, D)


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


class MLMHead(nn.Module):
    """BERT's prediction of words: tokens (..., D), word embeddings (V, D) -> logits (..., V)."""

    def __init__(self, cfg):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(cfg.width, cfg.width), activation(cfg.act),
                                       nn.LayerNorm(cfg.width, 1e-12))
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x, word_embeddings):
        return F.linear(self.transform(x), word_embeddings, self.bias)


def attention_mask(text_mask):
    """(B, T), 1 = a real token -> bool (B, 1, 1, T), True = may be looked at, by all heads."""
    return text_mask[:, None, None].bool()


class Fusion(nn.Module):
    """BERT layers that also look at a context: an image, or for the answer decoder a question."""

    def __init__(self, cfg, layers, context_width):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, "post", cfg.mlp_ratio, cfg.act,
                                          context_width, cfg.dropout) for _ in range(layers))

    def contexts(self, tokens):
        """Keys and values of a context (B, L, C) for each block. They do not depend on the text."""
        return [block.cross.context(tokens) for block in self.blocks]

    def forward(self, x, mask, contexts, context_mask=None, cls_only=False):
        """x: (B, T, D); mask: bool (B, 1, 1 or T, T) -> (B, T, D).

        contexts: of B contexts, or of fewer that serve B/U neighbouring rows of x each. Nothing is
        copied then: a context is asked by its rows in one long row.
        cls_only: the last block computes [CLS] alone -> (B, 1, D).
        """
        for block, context in zip(self.blocks, contexts):
            at = None
            if cls_only and block is self.blocks[-1]:
                at = x.new_zeros(len(x), 1, dtype=torch.long)
            x = block.self_attend(x, mask, at)
            asking = x.unflatten(0, (len(context[0]), -1)).flatten(1, 2)            # (U, B/U T, D)
            x = block.cross_attend(asking, context, context_mask).view_as(x)
            x = block.feed(x)
        return x

    def pairs(self, clean, text_mask, contexts, negative_image, negative_text,
              masked=None, positions=None):
        """The fusions of a training step in one -> [CLS] (3B, D), masked words (B, M, D) or None.

        [CLS] is that of the pairs, then of (image i, negative_text i), then of
        (negative_image i, text i). Equal to separate calls of forward(), with nothing done twice:
        self-attention of the first block serves all three uses of a sentence, an image is asked
        by its three sentences in one long row, and the last block computes [CLS] and the masked
        words alone.

        clean: (B, T, D) tokens of the sentences; contexts: contexts() of the images;
        negative_image, negative_text: (B,) indices; masked, positions: (B, T, D) and (B, M), the
        sentences with masked words, where there are any.
        """
        b = len(clean)
        mask = attention_mask(text_mask)                                # (B, 1, 1, T)
        masks = torch.cat([mask, mask[negative_text], mask])            # (3B, 1, 1, T)
        cls = torch.zeros_like(text_mask[:, :1])                        # (B, 1), position of [CLS]

        x = clean
        for n, block in enumerate(self.blocks):
            last = n + 1 == len(self.blocks)

            # words look at words: in the first block once for all three uses of a sentence
            if n == 0:
                x = block.self_attend(x, mask, cls if last else None)
                x = torch.cat([x, x[negative_text], x])                 # (3B, T or 1, D)
            else:
                x = block.self_attend(x, masks, cls.repeat(3, 1) if last else None)
            asking = [x[:b], x[b:2 * b]]                                # both ask image i
            if masked is not None:
                masked = block.self_attend(masked, mask, positions if last else None)
                asking.append(masked)                                   # so does this

            # words look at images
            lengths = [part.shape[1] for part in asking]
            own = block.cross_attend(torch.cat(asking, dim=1), contexts[n])     # (B, sum, D)
            own = own.split(lengths, dim=1)
            key, value = contexts[n]
            swapped = (key[negative_image], value[negative_image])
            other = block.cross_attend(x[2 * b:], swapped)

            # feed-forward
            x = block.feed(torch.cat([own[0], own[1], other]))          # (3B, T or 1, D)
            if masked is not None:
                masked = block.feed(own[2])
        return x[:, 0], masked


# --------------------------------------------------------------------------------------------------
# Processes and memory

def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world() > 1 else 0


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


def own_rows(x, b):
    """The B rows that this process gave to gather()."""
    return x[rank() * b:(rank() + 1) * b]


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


def full_precision(fn):
    """Autocast off inside: under it a product of float32 matrices would be bfloat16's."""
    @functools.wraps(fn)
    def run(*args, **kwargs):
        first = next(a for a in (*args, *kwargs.values()) if torch.is_tensor(a))
        with torch.autocast(first.device.type, enabled=False):
            return fn(*args, **kwargs)
    return run


@torch.no_grad()
def ema_(teacher, student, alpha):
    """Eq. (6): f_t = alpha f_t + (1 - alpha) f_s, in place, over lists of parameters."""
    torch._foreach_lerp_(teacher, student, 1 - alpha)


# --------------------------------------------------------------------------------------------------
# The paper's equations

def ot_loss(plan, cost):
    """Eq. (1): L_ot = sum_ij T_ij d(z_i, c_j) = <T, D>.  plan, cost: (..., N, K) -> (...)."""
    return (plan * cost).sum((-2, -1))


@torch.no_grad()
def ipot(cost, eps=0.5, iters=50, inner=1):
    """Algorithm 2 (IPOT): the plan T of least <T, D> with marginals T 1 = 1/N, T' 1 = 1/K.

    cost: (..., N, K), d(z_i, c_j) = 1 - cos -> T (..., N, K) float32 of total mass 1.
    Per iteration, from T = 1 and sigma = 1/K:

        Q = exp(-D/eps) * T
        repeat `inner` times: delta = 1/(N Q sigma), sigma = 1/(K Q' delta)
        T = diag(delta) Q diag(sigma)

    The plan needs not be kept. Unrolled, T = exp(-t D/eps + u + v) after t iterations, where u (N,)
    and v (K,) are the sums of log delta and log sigma:

        u = -log N - logsumexp_j(-t D/eps + v_before + log sigma)
        v = -log K - logsumexp_i(-t D/eps + u),        log sigma = v - v_before

    That is Sinkhorn's algorithm at a temperature eps/t, which falls, with a v that looks one step
    ahead. Each row of N T before its columns are scaled is a softmax: one pass over D for u, one
    for v. Columns sum to 1/K, rows approach 1/N as iterations go on. t D/eps grows, and float32
    with it: of the largest entry, 4e-5 are rounding after 50 iterations.

    ValueError for eps < 0.05: exp(-D/eps) of a far codeword is 0 in float32.
    """
    if eps < 0.05:
        raise ValueError(f"ipot: eps is {eps}, and must be at least 0.05 in float32")
    n, k = cost.shape[-2:]
    with torch.autocast(cost.device.type, enabled=False):
        step = cost.float() / -eps
        v = step.new_zeros((*step.shape[:-2], 1, k))                        # (..., 1, K)
        log_sigma = v - math.log(k)

        for t in range(1, iters + 1):
            before = v
            for _ in range(inner):
                ahead = before + log_sigma
                p = torch.add(ahead, step, alpha=t).softmax(-1)             # (..., N, K)
                v = ahead - math.log(k) - p.mean(-2, keepdim=True).log()
                log_sigma = v - before
        return p / (k * p.sum(-2, keepdim=True))


@full_precision
def soft_cross_entropy(logits, target):
    """H of Algorithm 1: -sum_j t_j log softmax(logits)_j, mean over rows -> 0-d.

    logits, target: (N, K); target without gradient.
    """
    return -(target.detach() * logits.float().log_softmax(-1)).sum(-1).mean()


@full_precision
def codebook_loss(z, codebook, plan, temp):
    """Eq. (2): H(P, T) with P = SoftMax(Z C / gamma), T's rows scaled to sum to one.

    z: (B, d); codebook: (K, d); plan: (B, K) -> 0-d.
    """
    logits = z.float() @ codebook.float().T / temp                          # (B, K)
    return soft_cross_entropy(logits, plan / plan.sum(-1, keepdim=True))


@torch.no_grad()
@full_precision
def codebook_perplexity(z, codebook, temp):
    """exp of the entropy of the mean row of Eq. (2)'s P, for the log.

    z: (B, d); codebook: (K, d) -> 0-d between 1 (collapsed) and K (every codeword used).
    """
    p = (z.float() @ codebook.float().T / temp).softmax(-1)                 # (B, K)
    return torch.special.entr(p.mean(0)).sum().exp()


def align_loss(z, z_m, ids, blocks, temp, distill, chunk=8192):
    """Eq. (5) in one direction, H(p, y) row by row, with p of Eq. (4):

        s_j = z.k_j / gamma
        p_j = exp(s_j) / sum_j' exp(s_j')                                           Eq. (4)
        y_j = a exp(z_m.k_j / gamma) / sum_j' exp(z_m.k_j' / gamma) + (1 - a) same_j / count
        loss = -sum_j y_j log p_j                                                   Eq. (5)

    same_j: key j is of the row's image; count: how many are; a = distill, but 1 for a row without
    such a key. A row without a key of another image has nothing to contrast with: its loss is 0.

    z, z_m: (R, d) student and teacher, unit norm; ids: (R,) their images; blocks: a list of
    (keys (M_i, d), their images (M_i,)), together the keys k; temp, distill: 0-d; chunk: keys
    scored at a time -> (R,) float32. Gradients go to z and temp.
    """
    flat = []
    for keys, key_ids in blocks:
        flat += [keys.float(), key_ids]
    return QueueContrast.apply(z.float(), z_m.float(), ids, temp, distill, chunk, *flat)


class QueueContrast(torch.autograd.Function):
    """align_loss(), streamed over the keys: memory O(R * chunk) instead of several (R, M) matrices.

    The loss of a row is logsumexp(s) - sum_j y_j s_j, and sum_j y_j s_j = a E_teacher[s]
    + (1 - a) mean of s over the positives: running sums per row suffice. Backward scores the keys
    again: dL/ds = p - y. Keys are constants, and there is no second derivative.
    """

    @staticmethod
    def scores(z, z_m, ids, temp, blocks, chunk):
        """Per chunk of keys: keys, s of student and of teacher, which are of the row's image."""
        both = torch.cat([z, z_m])
        for keys, key_ids in zip(blocks[::2], blocks[1::2]):
            for k, k_ids in zip(keys.split(chunk), key_ids.split(chunk)):
                s, s_m = (both @ k.T / temp).chunk(2)                       # (R, chunk) each
                yield k, s, s_m, ids[:, None] == k_ids

    @staticmethod
    def forward(ctx, z, z_m, ids, temp, distill, chunk, *blocks):
        with torch.autocast(z.device.type, enabled=False):
            lse = lse_m = z.new_full((len(z),), -torch.inf)
            expected = positive = z.new_zeros(len(z))
            count = torch.zeros_like(ids)

            for _, s, s_m, same in QueueContrast.scores(z, z_m, ids, temp, blocks, chunk):
                lse = torch.logaddexp(lse, s.logsumexp(-1))

                # E_teacher[s]: the sum so far is brought to the teacher's new denominator
                new_m = torch.logaddexp(lse_m, s_m.logsumexp(-1))
                p_m = (s_m - new_m[:, None]).exp()                          # (R, chunk)
                expected = expected * (lse_m - new_m).exp() + (p_m * s).sum(-1)
                lse_m = new_m

                positive = positive + (s * same).sum(-1)
                count = count + same.sum(-1)

            # the weights of the teacher and of each positive, and which rows count
            total = sum(len(keys) for keys in blocks[::2])
            a = torch.where(count > 0, distill, 1.0).to(z.dtype)
            share = (1 - a) / count.clamp(min=1)
            valid = (count < total).to(z.dtype)

            ctx.save_for_backward(z, z_m, ids, temp, lse, lse_m, a, share, valid, *blocks)
            ctx.chunk = chunk
            return valid * (lse - a * expected - share * positive)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, z_m, ids, temp, lse, lse_m, a, share, valid, *blocks = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            grad = (grad * valid)[:, None]                                  # (R, 1)
            grad_z, grad_temp = torch.zeros_like(z), torch.zeros_like(temp)

            for k, s, s_m, same in QueueContrast.scores(z, z_m, ids, temp, blocks, ctx.chunk):
                p = (s - lse[:, None]).exp()                                # (R, chunk)
                y = a[:, None] * (s_m - lse_m[:, None]).exp() + share[:, None] * same
                grad_s = grad * (p - y)
                grad_z = grad_z + grad_s @ k / temp
                grad_temp = grad_temp - (grad_s * s).sum() / temp
        return grad_z, None, None, grad_temp, None, None, *[None] * len(blocks)


@torch.no_grad()
def hard_negatives(sim, ids):
    """For Eq. (7): one column per row, drawn with probability softmax(sim) among other images.

    sim: (B, B), already divided by the temperature; ids: (B,)
    -> (B,) int64 indices, (B,) bool: was there a column of another image?
    """
    # argmax(log w - log Exp(1)) is a multinomial draw that no saturated softmax can break
    same = ids[:, None] == ids
    noise = torch.empty_like(sim, dtype=torch.float32).exponential_().log()
    drawn = (sim.float() - noise).masked_fill(same, -torch.inf).argmax(-1)
    return drawn, ~same.all(-1)


def need_negatives(ids):
    """SystemExit where a batch of ids (B,) can hold no other image."""
    if len(ids) < 2:
        raise SystemExit("a batch of 1 has no negatives: --batch_size must be at least "
                         "2 x processes x --accum")


def itm_loss(logits, labels):
    """Eq. (7): H(p_itm, y_itm) -> 0-d.

    logits: (R, 2); labels: (R,), 1 = matched, 0 = not, -100 = not counted.
    """
    return masked_cross_entropy(logits, labels)


def mlm_loss(logits, labels):
    """Eq. (8): H(p_mlm, y_mlm) at masked words -> 0-d.

    logits: (B, M, V); labels: (B, M), -100 = no masked word here.
    """
    return masked_cross_entropy(logits, labels)


def masked_cross_entropy(logits, labels):
    """Mean over the labels that are not -100; 0, not NaN, where there is none."""
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(),
                           ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)


def soft_mlm_loss(logits, target, labels):
    """ALBEF's soft form of Eq. (8): H(p_mlm, the teacher's word distribution) -> 0-d.

    logits, target: (B, M, V), target sums to one; labels: (B, M), -100 = no masked word here.
    """
    valid = labels != -100
    loss = -(target * logits.float().log_softmax(-1)).sum(-1)               # (B, M)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def mask_tokens(text, maskable, mask_id, first_word, vocab_size, prob=0.15, mask_only=False):
    """Section 3.3.2: chooses max(1, round(prob n)) of a row's n maskable tokens.

    80 % of them become [MASK], 10 % a random word from first_word..vocab_size-1, 10 % stay; with
    mask_only all become [MASK]. Shapes depend on T alone.

    text: (B, T) int64; maskable: (B, T) bool -> masked text (B, T), positions (B, M), labels
    (B, M) with -100 where a row has fewer than M = max(1, round(prob T)) chosen tokens.
    """
    # random positions, of which each row uses as many as its length asks for
    n = maskable.sum(-1, keepdim=True)                                      # (B, 1)
    most = max(1, round(prob * text.shape[1]))                              # M
    order = torch.rand(text.shape, device=text.device).masked_fill(~maskable, -1.0)
    positions = order.topk(most, -1).indices                                # (B, M)
    chosen = (n * prob).round().clamp(min=1).minimum(n)                     # (B, 1) how many
    valid = torch.arange(most, device=text.device) < chosen                 # (B, M)

    # the true words, and what stands in their place
    words = text.gather(1, positions)                                       # (B, M)
    labels = words.masked_fill(~valid, -100)
    dice = torch.rand(positions.shape, device=text.device)
    if not mask_only:
        noise = torch.randint(first_word, vocab_size, positions.shape, device=text.device)
        words = torch.where(valid & (dice >= 0.8) & (dice < 0.9), noise, words)
    words = words.masked_fill(valid & ((dice < 0.8) | mask_only), mask_id)
    return text.scatter(1, positions, words), positions, labels


# --------------------------------------------------------------------------------------------------
# The model

class Codis(nn.Module):
    """All tasks of the paper.

    A batch is a dict: image (B, 3, H, W), text and text_mask (B, T), image_id (B,), and what the
    task adds.
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        cfg.check(task)
        self.cfg, self.task = cfg, task
        self.offers = OFFERS[task]              # the methods that eval.py may call

        # the encoders of image and text, and the layers that fuse them
        copies = 2 if task in TWO_IMAGE_TASKS else 1
        self.vision = ViT(cfg)
        self.text = Bert(cfg)
        self.fusion = Fusion(cfg, copies * cfg.fusion_layers, cfg.vision_width)
        if task in TWO_IMAGE_TASKS:
            # ALBEF's NLVR2: each layer twice, for the first and for the second image, of which
            # they make keys and values with the same weights
            for first, second in zip(self.fusion.blocks[::2], self.fusion.blocks[1::2]):
                second.cross.key_value = first.cross.key_value

        # what the task adds
        if task in CONTRASTIVE_TASKS:
            self.vision_proj = nn.Linear(cfg.vision_width, cfg.embed_dim)
            self.text_proj = nn.Linear(cfg.width, cfg.embed_dim)
            self.itm_head = nn.Linear(cfg.width, 2)
            self.log_temp = nn.Parameter(torch.tensor(math.log(cfg.temp)))
        if task in ("pretrain", "vqa"):
            self.mlm_head = MLMHead(cfg)
        if task == "pretrain" and cfg.codebook:
            self.codebook = nn.Parameter(torch.randn(cfg.codewords, cfg.embed_dim))
        if task == "vqa":
            self.decoder = Fusion(cfg, cfg.fusion_layers, cfg.width)
        if task in ("ve", "nlvr2", "assign"):
            self.cls_head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.ReLU(),
                                          nn.Linear(cfg.width, num_labels or 3))
        self.init_weights()

        # teachers: copies of their students, named with _m
        self.students = []
        if task in CONTRASTIVE_TASKS:
            self.students += ["vision", "text", "vision_proj", "text_proj"]
        if task == "pretrain" and cfg.mlm_distill:
            self.students += ["fusion", "mlm_head"]
        for name in self.students:
            self.add_module(name + "_m", deepcopy(getattr(self, name)).requires_grad_(False))

        # queues of teacher keys, and how much the teachers count
        if self.students:
            self.register_buffer("queue_image", torch.zeros(cfg.queue_size, cfg.embed_dim))
            self.register_buffer("queue_text", torch.zeros(cfg.queue_size, cfg.embed_dim))
            self.register_buffer("queue_ids", torch.zeros(cfg.queue_size, dtype=torch.long))
            self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
            self.register_buffer("ramp", torch.zeros(()))       # 0 to 1 over the first epoch
            self.register_buffer("distill", torch.zeros(()))    # cfg.distill * ramp
            self.reset_memory()

    def init_weights(self):
        """Truncated normal for matrices, zero for biases; the image encoder as in init_vit()."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        init_vit(self.vision, self.cfg.pos_std)
        if hasattr(self, "codebook"):
            self.codebook.data = F.normalize(self.codebook.data, dim=-1)

    def teachers(self):
        """[(teacher, its student), ...], modules."""
        return [(getattr(self, name + "_m"), getattr(self, name)) for name in self.students]

    def train(self, mode=True):
        """As nn.Module's, but teachers stay in evaluation mode: they have no dropout."""
        super().train(mode)
        for teacher, _ in self.teachers():
            teacher.eval()
        return self

    @property
    def temp(self):
        """The temperature gamma, learnt as its logarithm."""
        return self.log_temp.exp()

    # -- encoders

    def encode(self, side, *inputs, teacher=False):
        """-> tokens (B, S, D) and unit embeddings of their [CLS] (B, d) float32.

        side: "vision", whose input is an image, or "text", with text and text_mask; teacher: by
        the teacher instead of the student.
        """
        suffix = "_m" if teacher else ""
        tokens = getattr(self, side + suffix)(*inputs)
        cls = getattr(self, f"{side}_proj{suffix}")(tokens[:, 0])
        return tokens, F.normalize(cls.float(), dim=-1)

    @torch.no_grad()
    def teacher_keys(self, batch):
        """-> keys of the global batch, {"image": (N, d), "text": (N, d), "ids": (N,)}; and the
        teacher's image_tokens (B, P+1, D).

        The teachers' embeddings are the keys of Eq. 4, the features of Eq. 1, and what the queues
        take in.
        """
        image_tokens, image = self.encode("vision", batch["image"], teacher=True)
        _, text = self.encode("text", batch["text"], batch["text_mask"], teacher=True)
        image, text = gather(torch.stack([image, text], dim=1)).unbind(1)      # (N, d) each
        return {"image": image, "text": text, "ids": gather(batch["image_id"])}, image_tokens

    # -- pre-training

    def forward(self, batch):
        """-> {"loss": 0-d, "logs": {name: 0-d}}, and "keys" for after_backward()."""
        return getattr(self, "loss_" + self.task)(batch)

    def loss_pretrain(self, batch):
        """Eq. (9): L = L_mlm + L_itm + L_ica + L_code, as Algorithm 1 goes."""
        cfg, text, text_mask = self.cfg, batch["text"], batch["text_mask"]

        # teachers: a key for each image and sentence of the global batch
        keys, image_tokens_m = self.teacher_keys(batch)

        # students: images; sentences as they are and with masked words, in one pass
        image_tokens, image_emb = self.encode("vision", batch["image"])
        masked, positions, labels = self.mask_text(text, text_mask)
        tokens = self.text(torch.cat([text, masked]), text_mask.repeat(2, 1))       # (2B, T, D)
        clean, masked_tokens = tokens.chunk(2)
        text_emb = F.normalize(self.text_proj(clean[:, 0]).float(), dim=-1)

        # fusion: pairs, their hard negatives, sentences with masked words
        negative_image, negative_text, match_labels = self.negatives(image_emb, text_emb,
                                                                     batch["image_id"])
        cls, words = self.fusion.pairs(clean, text_mask, self.fusion.contexts(image_tokens),
                                       negative_image, negative_text,
                                       masked=masked_tokens, positions=positions)
        logits = self.mlm_head(words, self.text.embeddings.words.weight)            # (B, M, V)

        # losses
        mlm = mlm_loss(logits, labels)                                              # Eq. 8
        if cfg.mlm_distill:
            target = self.teacher_words(image_tokens_m, masked, text_mask, positions)
            soft = soft_mlm_loss(logits, target, labels)
            mlm = mlm + self.ramp * cfg.mlm_distill * (soft - mlm)
        losses = {"mlm": mlm, "itm": itm_loss(self.itm_head(cls), match_labels)}    # Eq. 7
        losses |= self.contrast(image_emb, text_emb, keys)                          # Eq. 5
        if cfg.codebook:
            losses |= self.codebook_losses(image_emb, text_emb, keys)               # Eq. 3

        out = self.total(losses, keys)
        if cfg.codebook:
            both = torch.cat([image_emb, text_emb]).detach()
            temp = out["logs"]["temp"]
            out["logs"]["codebook_ppl"] = codebook_perplexity(both, self.codebook.detach(), temp)
        return out

    def total(self, losses, keys):
        """The sum of all losses, and what is logged."""
        logs = {name: loss.detach() for name, loss in losses.items()}
        logs["temp"] = self.log_temp.detach().exp()
        return {"loss": sum(losses.values()), "logs": logs, "keys": keys}

    def mask_text(self, text, text_mask):
        """mask_tokens() of everything but [CLS], [SEP] and padding."""
        cfg = self.cfg
        maskable = text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)
        return mask_tokens(text, maskable, cfg.mask_id, cfg.first_word, cfg.vocab_size,
                           cfg.mlm_prob, cfg.mlm_mask_only)

    @full_precision
    def negatives(self, image_emb, text_emb, ids):
        """Hard negatives inside this process's batch, by contrastive similarity.

        image_emb, text_emb: (B, d); ids: (B,) -> an image for each text (B,), a text for each
        image (B,), and the labels (3B,) of the rows of Fusion.pairs(): 1 for the pairs, 0 for
        (image, negative text) and (negative image, text), -100 where there was no other image.
        SystemExit for a batch of one.
        """
        need_negatives(ids)
        with torch.no_grad():
            sim = image_emb @ text_emb.T / self.temp                                # (B, B)
        negative_image, image_found = hard_negatives(sim.T, ids)
        negative_text, text_found = hard_negatives(sim, ids)

        found = torch.cat([text_found, image_found])                                # (2B,)
        labels = torch.cat([torch.ones_like(ids), torch.where(found, 0, -100)])     # (3B,)
        return negative_image, negative_text, labels

    def contrast(self, image_emb, text_emb, keys):
        """Eq. (5): {"i2t", "t2t", "t2i", "i2i": 0-d}, the mean of each direction.

        image_emb, text_emb: (B, d) of the students; keys: teacher_keys().
        """
        cfg, b = self.cfg, len(image_emb)
        student = {"i": image_emb, "t": text_emb}
        teacher = {"i": own_rows(keys["image"], b), "t": own_rows(keys["text"], b)}
        ids = own_rows(keys["ids"], b)

        losses = {}
        for target, other, side in (("t", "i", "text"), ("i", "t", "image")):
            # keys of one modality: those of the global batch, and the queue's
            blocks = [(keys[side], keys["ids"])] if cfg.batch_keys else []
            blocks.append((getattr(self, "queue_" + side), self.queue_ids))

            # what is compared with them, in one pass: the other modality, and the same one
            sources = [other, target] if cfg.intra else [other]
            z = torch.cat([student[s] for s in sources])                            # (R, d)
            z_m = torch.cat([teacher[s] for s in sources])
            rows = align_loss(z, z_m, ids.repeat(len(sources)), blocks,
                              self.temp, self.distill, cfg.queue_chunk)             # (R,)
            for source, part in zip(sources, rows.split(b)):
                losses[f"{source}2{target}"] = part.mean()
        return losses

    def codebook_losses(self, image_emb, text_emb, keys):
        """Eq. (3) with the features that `codebook_features` names."""
        if self.cfg.codebook_features == "teacher":
            return self.code_losses(image_emb, text_emb, keys["image"], keys["text"])
        students = gather(torch.stack([image_emb, text_emb], dim=1))                # (N, 2, d)
        return self.code_losses(image_emb, text_emb, students[:, 0], students[:, 1])

    @full_precision
    def code_losses(self, image_emb, text_emb, all_image, all_text):
        """Eq. (3): L_ot of both modalities, L_tp and L_ip -> {"ot", "tp", "ip": 0-d}.

        image_emb, text_emb: (B, d) of the students; all_image, all_text: (N, d), what is assigned
        to codewords. The plan is that of the global batch, of which this process's rows count.
        """
        cfg, codebook, b = self.cfg, self.codebook, len(image_emb)

        # the plans of both modalities in one batch
        features = torch.stack([all_image, all_text]).float()                       # (2, N, d)
        cost = 1 - features @ codebook.detach().T                                   # (2, N, K)
        plan = ipot(cost, cfg.ot_eps, cfg.ot_iters, cfg.ot_inner)
        image_plan, text_plan = own_rows(plan[0], b), own_rows(plan[1], b)          # (B, K) each

        # Eq. 1, times the number of processes: DDP takes their mean, <T, D> is their sum
        image_cost = 1 - own_rows(features[0], b) @ codebook.T                      # (B, K)
        text_cost = 1 - own_rows(features[1], b) @ codebook.T
        ot = (ot_loss(image_plan, image_cost) + ot_loss(text_plan, text_cost)) * world()

        # Eq. 2: each modality learns the plan of the other, or its own
        if cfg.codebook_target == "cross":
            guide_text = image_plan
            guide_image = text_plan
        else:
            guide_text = text_plan
            guide_image = image_plan
        return {"ot": ot, "tp": codebook_loss(text_emb, codebook, guide_text, self.temp),
                "ip": codebook_loss(image_emb, codebook, guide_image, self.temp)}

    @torch.no_grad()
    def teacher_words(self, image_tokens, masked, text_mask, positions):
        """The teachers' word distribution at masked positions (B, M) -> (B, M, V).

        image_tokens: of the image teacher; masked, text_mask: (B, T), the masked text.
        """
        contexts = self.fusion_m.contexts(image_tokens)
        x = self.text_m(masked, text_mask)
        x = self.fusion_m(x, attention_mask(text_mask), contexts)                   # (B, T, D)
        logits = self.mlm_head_m(pick(x, positions), self.text_m.embeddings.words.weight)
        return logits.float().softmax(-1)

    # -- hooks of the training loop

    def after_backward(self, out):
        """Algorithm 1's update_queue. Only now: backward of Eq. 5 reads the queues again."""
        if "keys" in out:
            keys, ids = out["keys"], out["keys"]["ids"]
            enqueue_(self.queue_image, self.queue_ids, self.ptr, keys["image"], ids)
            enqueue_(self.queue_text, self.queue_ids, self.ptr, keys["text"], ids)
            self.ptr.add_(len(ids)).remainder_(len(self.queue_ids))

    @torch.no_grad()
    def after_step(self, step, total_steps, epoch_steps=None):
        """Eq. (6), unit codewords, the clamp of the temperature, the ramp of the teachers' weight.

        step: optimizer steps done; the ramp ends after epoch_steps (without: after total_steps).
        """
        if not self.students:
            return
        for teacher, student in self.teachers():
            ema_(list(teacher.parameters()), list(student.parameters()), self.cfg.momentum)
            # buffers are no parameters: the running statistics of a batch norm are the student's
            for copy, original in zip(teacher.buffers(), student.buffers()):
                copy.copy_(original)

        self.log_temp.clamp_(math.log(0.001), math.log(0.5))
        if hasattr(self, "codebook"):
            self.codebook.div_(self.codebook.norm(dim=-1, keepdim=True))

        # the teachers are worth little during the first epoch
        self.ramp.fill_(min(1.0, step / (epoch_steps or total_steps)))
        self.distill.copy_(self.cfg.distill * self.ramp)

    @torch.no_grad()
    def reset_memory(self):
        """The start of a training: teachers equal students, queues are random and of no image."""
        if not self.students:
            return
        for teacher, student in self.teachers():
            teacher.load_state_dict(student.state_dict())
        for queue in (self.queue_image, self.queue_text):
            queue.copy_(F.normalize(torch.randn_like(queue), dim=-1))
        self.queue_ids.fill_(-1)
        for value in (self.ptr, self.ramp, self.distill):
            value.zero_()

    def param_groups(self, loop):
        """Weight decay on matrices only, and not on the codebook: its rows have unit length."""
        decayed, plain = [], []
        for name, p in self.named_parameters():
            if p.requires_grad:
                group = decayed if p.ndim >= 2 and name != "codebook" else plain
                group.append(p)
        return [{"params": decayed, "lr": loop.lr, "weight_decay": loop.weight_decay},
                {"params": plain, "lr": loop.lr, "weight_decay": 0.0}]

    # -- fine-tuning

    def loss_retrieval(self, batch):
        """Fine-tuning for retrieval: Eq. 5 and Eq. 7."""
        keys, _ = self.teacher_keys(batch)
        image_tokens, image_emb = self.encode("vision", batch["image"])
        text_tokens, text_emb = self.encode("text", batch["text"], batch["text_mask"])

        negative_image, negative_text, match_labels = self.negatives(image_emb, text_emb,
                                                                     batch["image_id"])
        contexts = self.fusion.contexts(image_tokens)
        cls, _ = self.fusion.pairs(text_tokens, batch["text_mask"], contexts,
                                   negative_image, negative_text)
        losses = {"itm": itm_loss(self.itm_head(cls), match_labels)}
        losses |= self.contrast(image_emb, text_emb, keys)
        return self.total(losses, keys)

    def contexts(self, batch):
        """What the fusion layers look at: keys and values of the batch's image, or of its two."""
        tokens = self.vision(batch["image"])
        if self.task in TWO_IMAGE_TASKS:
            return self.two_contexts(tokens, self.vision(batch["image2"]))
        return self.fusion.contexts(tokens)

    def two_contexts(self, first, second):
        """Layers 0, 2, ... look at the first image, layers 1, 3, ... at the second.

        first, second: image_tokens (B, P+1, D).
        """
        contexts = []
        for n, block in enumerate(self.fusion.blocks):
            tokens = first if n % 2 == 0 else second
            contexts.append(block.cross.context(tokens))
        return contexts

    def fuse(self, batch, contexts, cls_only=False):
        """The batch's text, fused with contexts() -> (B, T, D), with cls_only (B, 1, D)."""
        tokens = self.text(batch["text"], batch["text_mask"])
        return self.fusion(tokens, attention_mask(batch["text_mask"]), contexts, cls_only=cls_only)

    def classify(self, batch, contexts):
        """The classes' logits (B, C) of the text, fused with contexts()."""
        return self.cls_head(self.fuse(batch, contexts, cls_only=True)[:, 0]).float()

    def predict(self, batch):
        """Logits (B, 3) of entailment, neutral, contradiction (VE); (B, 2) of False, True (NLVR2).

        For text assignment (B, 3): the text belongs to the first image, the second, or neither.
        """
        return self.classify(batch, self.contexts(batch))

    def loss_ve(self, batch):
        """Section 4.2: cross-entropy of the classes on the fused [CLS]; NLVR2 likewise."""
        loss = F.cross_entropy(self.predict(batch), batch["label"])
        return {"loss": loss, "logs": {"ce": loss.detach()}}

    loss_nlvr2 = loss_ve

    def loss_assign(self, batch):
        """ALBEF's text assignment, before NLVR2: to which of two images does the text belong?

        The other images are hard negatives by the similarity of image [CLS] tokens. A row does not
        count where the batch has no other image. SystemExit for a batch of one.
        """
        ids = batch["image_id"]
        need_negatives(ids)
        tokens = self.vision(batch["image"])                                        # (B, P+1, D)

        # two other images for each text
        with torch.no_grad():
            z = F.normalize(tokens[:, 0].float(), dim=-1)                           # (B, D)
            sim = z @ z.T / 0.07                                                    # (B, B), [A]
            one, found = hard_negatives(sim, ids)
            two, _ = hard_negatives(sim, ids)

        # a third of the texts belongs to the first image, a third to the second, a third to none
        rows = torch.arange(len(ids), device=ids.device)
        label = rows[torch.randperm(len(rows), device=rows.device)] % 3             # (B,)
        first = torch.where(label == 0, rows, one)
        second = torch.where(label == 1, rows, two)

        # every picture was encoded once, whoever looks at it
        logits = self.classify(batch, self.two_contexts(tokens[first], tokens[second]))
        loss = masked_cross_entropy(logits, label.masked_fill(~found, -100))
        return {"loss": loss, "logs": {"assign": loss.detach()}}

    def question_contexts(self, batch):
        """The fused question as the answer decoder reads it: contexts, mask (B, 1, 1, T)."""
        contexts = self.decoder.contexts(self.fuse(batch, self.contexts(batch)))
        return contexts, attention_mask(batch["text_mask"])

    def decode(self, answer, contexts, context_mask):
        """Answer tokens (R, L) -> word logits (R, L, V) of what follows each token.

        contexts, context_mask: question_contexts() of R questions.
        """
        length = answer.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=answer.device).tril()
        x = self.text.embeddings(answer)                                            # (R, L, D)
        x = self.decoder(x, causal[None, None], contexts, context_mask)
        return self.mlm_head(x, self.text.embeddings.words.weight)

    def answer_nll(self, answer, answer_mask, contexts, context_mask):
        """-log likelihood of each of R answers, given its question -> (R,) float32.

        answer, answer_mask: (R, L), [CLS] first; contexts, context_mask: as decode() has them.
        """
        logits = self.decode(answer[:, :-1], contexts, context_mask).float()        # (R, L-1, V)
        labels = answer[:, 1:].masked_fill(answer_mask[:, 1:] == 0, -100)           # (R, L-1)
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return nll.sum(-1)

    def loss_vqa(self, batch):
        """Section 4.2: -log likelihood of the answer, generated from the fused question.

        The mean over questions, weighted by answer_weight (B,). data.py draws `answer` from the
        annotators' ten, so that in expectation each counts as often as it was given.
        """
        answer = batch["answer"][:, :self.cfg.max_answer]                           # (B, L)
        mask = batch["answer_mask"][:, :self.cfg.max_answer]
        weight = batch["answer_weight"]

        nll = self.answer_nll(answer, mask, *self.question_contexts(batch))         # (B,)
        loss = (nll * weight).sum() / weight.sum().clamp(min=1)
        return {"loss": loss, "logs": {"answer": loss.detach()}}

    # -- what evaluation asks for

    def encode_image(self, batch):
        """-> (B, d) unit norm."""
        return self.encode("vision", batch["image"])[1]

    def encode_text(self, batch):
        """-> (B, d) unit norm."""
        return self.encode("text", batch["text"], batch["text_mask"])[1]

    def image_states(self, batch):
        """What match() needs of an image: image_tokens (B, P+1, D); and image_emb (B, d)."""
        tokens, emb = self.encode("vision", batch["image"])
        return {"image_tokens": tokens, "image_emb": emb}

    def text_states(self, batch):
        """What match() needs of a sentence: text_tokens (B, T, D), text_mask; and text_emb."""
        tokens, emb = self.encode("text", batch["text"], batch["text_mask"])
        return {"text_tokens": tokens, "text_emb": emb, "text_mask": batch["text_mask"]}

    def match(self, batch):
        """ITM logit of "matched" minus that of "not" (B,).

        batch: image_states() and text_states() of the pairs, or images and texts themselves. An
        image may have several texts, each the same number: U images, and B texts in their order.
        """
        if "image_tokens" not in batch:
            batch = {**batch, **self.image_states(batch), **self.text_states(batch)}
        contexts = self.fusion.contexts(batch["image_tokens"])
        mask = attention_mask(batch["text_mask"])
        x = self.fusion(batch["text_tokens"], mask, contexts, cls_only=True)        # (B, 1, D)
        logits = self.itm_head(x[:, 0]).float()
        return logits[:, 1] - logits[:, 0]

    def rank_answers(self, batch, answer_ids, answer_mask, k):
        """The best of A candidate answers for each question -> (B,) int64 indices.

        The k of the likeliest first token are compared by the likelihood of the whole answer.
        answer_ids, answer_mask: (A, L), [CLS] first.
        """
        b, k = len(batch["text"]), min(k, len(answer_ids))
        contexts, context_mask = self.question_contexts(batch)

        # the likeliest first tokens, behind [CLS]
        start = answer_ids[:1, :1].expand(b, 1)
        first = self.decode(start, contexts, context_mask)[:, 0].float().log_softmax(-1)
        top = first[:, answer_ids[:, 1]].topk(k, -1).indices                        # (B, k)

        # the whole answers, a part of them at a time: with BERT's words the logits of one take 1 MB
        nll = []
        for n, answers in enumerate(top):
            context = [(key[n:n + 1], value[n:n + 1]) for key, value in contexts]
            for part in answers.split(ANSWERS_AT_ONCE):
                nll.append(self.answer_nll(answer_ids[part], answer_mask[part], context,
                                           context_mask[n:n + 1]))

        best = torch.cat(nll).view(b, k).argmin(-1, keepdim=True)                   # (B, 1)
        return top.gather(1, best).squeeze(1)

    def gradcam(self, batch, block=None):
        """Section 4.6: Grad-CAM, where a fusion layer's cross-attention speaks for a match.

        A map is the attention times the positive part of the gradient of the "matched" logit,
        averaged over heads, without the class token. In the last layer the logit depends on [CLS]
        alone: there the maps of words are zero.

        block: which layer, from 0 (default: the third; of fewer, the last but one)
        -> {"word": (B, T, h, w), a map for each token; "sentence": (B, h, w), the mean over [CLS]
        and words}.
        """
        cfg, blocks, text_mask = self.cfg, self.fusion.blocks, batch["text_mask"]
        if block is None:
            block = min(2, max(len(blocks) - 2, 0))
        if not 0 <= block < len(blocks):
            raise SystemExit(f"--block {block}: the fusion has {len(blocks)} layers, from 0 on")

        # the pair through all layers, one of which shows its attention
        x = self.text(batch["text"], text_mask)                         # (B, T, D)
        contexts = self.fusion.contexts(self.vision(batch["image"]))
        mask, maps = attention_mask(text_mask), []
        for n, layer in enumerate(blocks):
            x = layer(x, mask, contexts[n], maps=maps if n == block else None)
        attention, = maps                                               # (B, heads, T, P+1)

        # attention, weighted by the gradient
        matched = self.itm_head(x[:, 0])[:, 1].sum()
        gradient, = torch.autograd.grad(matched, attention)
        word = (attention * gradient.clamp(min=0)).mean(1)[:, :, 1:]    # (B, T, P)
        height, width = batch["image"].shape[2] // cfg.patch, batch["image"].shape[3] // cfg.patch
        word = word.unflatten(-1, (height, width))                      # (B, T, h, w)

        # the mean over [CLS] and words, not over [SEP] and padding
        real = (text_mask.bool() & (batch["text"] != cfg.sep_id)).float()
        count = real.sum(-1)[:, None, None].clamp(min=1)
        sentence = torch.einsum("bthw,bt->bhw", word, real) / count
        return {"word": word.detach(), "sentence": sentence.detach()}

    # -- weights from elsewhere

    def adapt(self, state):
        """A checkpoint of another task or image size, brought to this model's names and shapes.

        {name: tensor} -> {name: tensor}: position embeddings resized, fusion layers doubled for
        NLVR2, the answer decoder started from the fusion layers where their shapes agree, a head
        for other classes left out. Teachers that the checkpoint lacks start as its students.

        The ids of queued keys are left out: another data set may number its images alike. The keys
        stay, as negatives of no image; pointer and ramps start anew.
        """
        mine, out = self.state_dict(), {}

        def fits(name, tensor):
            return name in mine and mine[name].shape == tensor.shape

        for name, tensor in state.items():
            if name in MEMORY or name.startswith("cls_head.") and not fits(name, tensor):
                continue
            if name.endswith("pos_embed"):
                grid = self.cfg.image_size // self.cfg.patch
                tensor = resize_pos_embed(tensor, grid, grid)
            out[name] = tensor

        # layers with cross-attention: a file of BERT's has none, and is left as it is
        fusion = {name: out[name] for name in out if name.startswith("fusion.blocks.")}
        depth = sum(name.endswith("cross.query.weight") for name in fusion)
        if depth and len(self.fusion.blocks) == 2 * depth:
            for name, tensor in fusion.items():
                del out[name]
            for name, tensor in fusion.items():
                _, _, n, rest = name.split(".", 3)
                out[f"fusion.blocks.{2 * int(n)}.{rest}"] = tensor
                out[f"fusion.blocks.{2 * int(n) + 1}.{rest}"] = tensor

        has_decoder = any(name.startswith("decoder.") for name in out)
        if hasattr(self, "decoder") and depth and not has_decoder:
            for name, tensor in fusion.items():
                name = name.replace("fusion.", "decoder.", 1)
                if fits(name, tensor):
                    out[name] = tensor

        for part in self.students:
            students = {name: out[name] for name in out if name.startswith(part + ".")}
            if not any(name.startswith(part + "_m.") for name in out):
                for name, tensor in students.items():
                    out[name.replace(part, part + "_m", 1)] = tensor
        return out


# --------------------------------------------------------------------------------------------------
# Foreign weights

# Our names of a layer's parts -> those of Hugging Face's BERT and of timm's ViT
BERT_BLOCK = {
    "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.out": ["attention.output.dense"], "attention_norm": ["attention.output.LayerNorm"],
    "mlp.0": ["intermediate.dense"], "mlp.2": ["output.dense"], "mlp_norm": ["output.LayerNorm"]}
VIT_BLOCK = {
    "attention.qkv": ["attn.qkv"], "attention.out": ["attn.proj"], "attention_norm": ["norm1"],
    "mlp.0": ["mlp.fc1"], "mlp.2": ["mlp.fc2"], "mlp_norm": ["norm2"]}


def foreign_names(model, side):
    """Which tensors of other libraries are ours: {our name: [their names, rows joined in order]}.

    side: "vision", timm's ViT, or "text", Hugging Face's BERT without "bert." -> two such dicts:
    what a file must fill, the whole tower; and what it may fill, each layer or head whole or not at
    all. BERT's layers above the text encoder start the fusion layers and the answer decoder.
    SystemExit where this tower has no counterpart there.
    """
    cfg, needed, extra = model.cfg, {}, {}
    if side == "vision" and cfg.stem != "patch":
        raise SystemExit(f"vision: a published ViT has --stem patch, this model has {cfg.stem}")
    if cfg.act != "gelu":
        raise SystemExit(f"{side}: published weights have --act gelu, this model has {cfg.act}")

    def rename(ours, theirs, table):
        return {f"{ours}.{part}.{kind}": [f"{theirs}{name}.{kind}" for name in names]
                for part, names in table.items() for kind in ("weight", "bias")}

    if side == "vision":
        needed = {"vision.cls_token": ["cls_token"], "vision.pos_embed": ["pos_embed"]}
        needed |= rename("vision", "", {"patch_embed": ["patch_embed.proj"], "norm": ["norm"]})
        for n in range(cfg.vision_layers):
            needed |= rename(f"vision.blocks.{n}", f"blocks.{n}.", VIT_BLOCK)
        return needed, extra

    # the text encoder
    for ours, theirs in (("words", "word"), ("positions", "position"), ("segments", "token_type")):
        needed[f"text.embeddings.{ours}.weight"] = [f"embeddings.{theirs}_embeddings.weight"]
    needed |= rename("text.embeddings", "embeddings.", {"norm": ["LayerNorm"]})
    for n in range(cfg.text_layers):
        needed |= rename(f"text.blocks.{n}", f"encoder.layer.{n}.", BERT_BLOCK)

    # the layers above it, in NLVR2 each for two fusion layers in a row, and the MLM head
    for tower in ("fusion", "decoder"):
        blocks = getattr(model, tower).blocks if hasattr(model, tower) else []
        for n in range(len(blocks)):
            above = cfg.text_layers + n * cfg.fusion_layers // len(blocks)
            extra |= rename(f"{tower}.blocks.{n}", f"encoder.layer.{above}.", BERT_BLOCK)
    if hasattr(model, "mlm_head"):
        head = {"0": ["dense"], "2": ["LayerNorm"]}
        extra |= rename("mlm_head.transform", "cls.predictions.transform.", head)
        extra["mlm_head.bias"] = ["cls.predictions.bias"]
    return needed, extra


def load_pretrained(model, **states):
    """Fills the towers: load_pretrained(model, vision=timm's state_dict, text=BERT's).

    Position embeddings follow the image size. Teachers become copies of their students and queues
    start anew, as what they held was made by other weights. KeyError with the tensor's name where
    a state does not fill its tower; the model is then as it was.
    """
    # the rows of each of our tensors, of all sides before anything changes
    filled = {}
    for side, state in states.items():
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        needed, extra = foreign_names(model, side)
        for ours, theirs in (needed | extra).items():
            if ours in needed or all(name in state for name in theirs):
                filled[ours] = torch.cat([state[name] for name in theirs])

    model.load_state_dict(model.adapt(filled), strict=False)
    model.reset_memory()


Model = Codis


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {name: value for name, value in PRESETS["tiny"].items() if name not in VIEWS}
    cfg = Config(**sizes, vocab_size=200, mask_id=4, cls_id=2, sep_id=3, first_word=5)

    # a batch with the keys of all tasks
    words = torch.randint(5, 200, (4, cfg.max_text))
    image = torch.randn(4, 3, cfg.image_size, cfg.image_size)
    batch = {"image": image, "image2": image.flip(0), "image_id": torch.arange(4),
             "text": words, "text_mask": torch.ones_like(words), "label": torch.arange(4) % 2,
             "answer": words[:, :5], "answer_mask": torch.ones_like(words[:, :5]),
             "answer_weight": torch.ones(4)}

    for task in VIEWS:
        model = Codis(cfg, task, num_labels=3).train()
        out = model(batch)
        out["loss"].backward()
        size = sum(p.numel() for p in model.parameters())
        logs = {name: round(value.item(), 3) for name, value in out["logs"].items()}
        print(f"{task}: {size:,} parameters;", logs)
