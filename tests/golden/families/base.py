"""What every family of the goldens has in common: the random decoder, and hooks that a family fills in.

Keys of a variant that the shared scripts read: `dtype` (as stored), `seed`, `hidden`, `inter`, `layers`, `heads`, `kv`, `tied`,
`shards`, `language` (before `layers.N.`); optional: `head` (width of an attention head), `lm_head` (name of the output head),
`brief` (fewer rows of logits, no statistics: for all but the first family, whose decoder the others share), `pixels` (pixel
values of `tiny-image` are written too), `greedy` (what greedy decoding adds to every prompt is written too).
"""

import json
from pathlib import Path

import torch

GOLDEN = Path(__file__).resolve().parent.parent
MODEL = GOLDEN / "model"
DATA = GOLDEN.parent / "data"
TEMPLATE = DATA / "tiny-qwen2-vl"
VOCABULARY = 640


def write_json(path, value, indent=2, separators=None):
    path.write_text(json.dumps(value, indent=indent, separators=separators, ensure_ascii=False) + "\n")


def write_tokenizer(folder, rename=lambda text: text):
    """The template's tokenizer.json in one line, which is less than half as long: the tree must stay small."""
    tokenizer = json.loads(rename((TEMPLATE / "tokenizer.json").read_text()))
    write_json(folder / "tokenizer.json", tokenizer, indent=None, separators=(",", ":"))


class Draw:
    """Random tensors by name, from one seeded generator in the order of the calls.

    Linear layers keep the variance of their input, norm weights lie around 1 with a few large channels (as trained
    language models have), every bias is non-zero: nothing is degenerate.
    """

    def __init__(self, seed):
        self.generator, self.made = torch.Generator().manual_seed(seed), {}

    def normal(self, *shape, std):
        return torch.randn(*shape, generator=self.generator) * std

    def linear(self, name, out, inner, bias, gain=1.0):
        self.made[name + ".weight"] = self.normal(out, inner, std=gain * inner**-0.5)
        if bias:
            self.made[name + ".bias"] = self.normal(out, std=0.3)

    def norm(self, name, width, bias=False):
        weight = 1.0 + self.normal(width, std=0.2)
        weight[torch.randperm(width, generator=self.generator)[: max(1, width // 32)]] *= 3.0
        self.made[name + ".weight"] = weight
        if bias:
            self.made[name + ".bias"] = self.normal(width, std=0.2)

    def decoder(self, v, qkv_bias=True, qk_norm=False):
        """The language model; `qk_norm`: norms of queries and keys inside each head (Qwen3)."""
        d, language = v["hidden"], v["language"]
        self.made[language + "embed_tokens.weight"] = self.normal(VOCABULARY, d, std=0.6)
        for layer in range(v["layers"]):
            at = f"{language}layers.{layer}."
            head = v.get("head", d // v["heads"])
            self.norm(at + "input_layernorm", d)
            self.norm(at + "post_attention_layernorm", d)
            # A gain above 1 on queries and keys: attention that prefers some tokens to others.
            self.linear(at + "self_attn.q_proj", v["heads"] * head, d, bias=qkv_bias, gain=1.4)
            self.linear(at + "self_attn.k_proj", v["kv"] * head, d, bias=qkv_bias, gain=1.4)
            self.linear(at + "self_attn.v_proj", v["kv"] * head, d, bias=qkv_bias)
            self.linear(at + "self_attn.o_proj", d, v["heads"] * head, bias=False)
            if qk_norm:
                self.norm(at + "self_attn.q_norm", head)
                self.norm(at + "self_attn.k_norm", head)
            self.linear(at + "mlp.gate_proj", v["inter"], d, bias=False)
            self.linear(at + "mlp.up_proj", v["inter"], d, bias=False)
            self.linear(at + "mlp.down_proj", d, v["inter"], bias=False)
        self.norm(language + "norm", d)
        if not v["tied"]:
            self.linear(v.get("lm_head", "lm_head"), VOCABULARY, d, bias=False, gain=1.5)


class Family:
    """What a family says; make_model.py and what it imports do the rest."""

    model_type = None
    model_class = None  # of transformers
    variants = {}

    def config(self, name):
        """config.json of a variant."""
        raise NotImplementedError

    def tensors(self, v):
        """Random tensors of a variant under their names on disk, float32."""
        raise NotImplementedError

    def write_processor(self, name, folder):
        """Tokenizer, processor and chat-template files, in the style of the variant's generation."""
        raise NotImplementedError

    def state_key(self, key):
        """The name in transformers' state dictionary of a tensor on disk."""
        raise NotImplementedError

    def check_config(self, name, model, processor):
        """Asserts that values which generations spell differently arrive in transformers as the variant means them."""
        raise NotImplementedError

    def draw_images(self, folder):
        """Writes images that only this family's conversations need."""

    def conversations(self, name):
        """Rows that this family adds to those of model_outputs.conversations."""
        return []

    def positions(self, model, inputs):
        """Positions of a sequence on the three axes, [3, tokens]."""
        return torch.arange(inputs["input_ids"].shape[1]).expand(3, -1).clone()

    def rotary(self, model, place, dtype):
        """Cosines and sines [1, tokens, head] of positions [3, tokens]."""
        raise NotImplementedError

    def features(self, model, inputs):
        """Vision features [vision tokens, hidden], and what DeepStack adds behind the first layers (a list of the same)."""
        raise NotImplementedError

    def image_tensors(self, inputs):
        """Further tensors that describe a sequence's images, by name."""
        return {}
