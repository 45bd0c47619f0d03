"""XLNet (arXiv:1906.08237): relative attention over content, distance and segment (`nn.relative_attention`), norms
behind the sums, no positions added. It was trained to predict tokens in any order, which `models.two_streams` does;
`forward` is the content stream. Files keep q, k, v, o and r as (width, heads, head_dim).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.config import ModelConfig
from hanlin.models.families.family import Family, Values
from hanlin.models.families.gpt2 import biased
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.weights import Rule

THEIRS, OURS = "transformer.layer.{}.", "model.layers.{}."
DIRECTIONS = {"bi": True, "uni": False}
_NOTES = """
    dropout mem_len reuse_len use_mems use_mems_eval use_mems_train summary_type summary_use_proj summary_activation
    summary_last_dropout start_n_top end_n_top
"""


def finish(values: Values, json: Mapping[str, Any]) -> None:
    """Heads share the width evenly; distances are not clamped."""
    width, heads, head_dim = (values[key] for key in ("width", "relative.heads", "relative.head_dim"))
    if head_dim is None:
        values["relative.head_dim"] = head_dim = width // heads
    if heads * head_dim != width:
        raise HanlinError(
            f'"n_head" {heads} times "d_head" {head_dim} must be "d_model" {width}; transformers reads no others.'
        )
    clamp = json.get("clamp_len")
    if clamp is not None and (not isinstance(clamp, int) or clamp > 0):
        raise HanlinError(f'"clamp_len" is {clamp!r}; Hanlin computes XLNet without a limit of distances, -1.')


def per_head(theirs: str, ours: str) -> Rule:
    """Theirs (width, heads, head_dim), which reads the width; ours (heads * head_dim, width)."""
    return Rule((theirs,), (ours,), lambda t, shapes, c: [t[0].flatten(1).T], lambda t, c: [_split_heads(t[0].T, c)])


def per_head_out(theirs: str, ours: str) -> Rule:
    """Theirs (width, heads, head_dim), which gives the width; ours (width, heads * head_dim)."""
    return Rule((theirs,), (ours,), lambda t, shapes, c: [t[0].flatten(1)], lambda t, c: [_split_heads(t[0], c)])


def _split_heads(matrix: Tensor, config: ModelConfig) -> Tensor:
    return matrix.unflatten(1, (config.layers[0].attention.heads, -1))


XLNET = Family(
    name="xlnet",
    architecture="XLNetLMHeadModel",
    bare="XLNetModel",
    common={
        "vocab_size": Setting(("vocab_size",), int, 32000),
        "d_model": Setting(("width",), int, 1024),
        "n_layer": Setting(("depth",), int, 24),
        "n_head": Setting(("relative.heads",), int, 16),
        "d_head": Setting(("relative.head_dim",), int, None),
        "d_inner": Setting(("feed_forward.hidden",), int, 4096),
        "ff_activation": Setting(("feed_forward.activation",), str, "gelu", convert=known_activation),
        "attn_type": Setting(
            ("relative.bidirectional",), str, "bi", convert=lambda name: DIRECTIONS[name],
            back=lambda both: "bi" if both else "uni",
        ),
        "layer_norm_eps": Setting(("norm_eps",), float, 1e-12),
        "initializer_range": Setting(("init_std",), float, 0.02),
        "tie_word_embeddings": Setting(("tied_embeddings",), bool, True),
    },
    always={
        "feed_forward.bias": True,
        "feed_forward.gated": False,
        "layer.norms": "post",
        "norm.kind": "layer",
        "norm.final": False,
        "head.bias": True,
    },
    fixed={"bi_data": False, "same_length": False, "untie_r": True},
    harmless=frozenset(_NOTES.split()),
    hooked=frozenset({"clamp_len"}),
    absent={"pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2},
    rotary=False,
    finish=finish,
    weights=(
        ("transformer.word_embedding.weight", "model.embed_tokens.weight"),
        ("transformer.mask_emb", "model.query_embed"),
        *(per_head(f"{THEIRS}rel_attn.{x}", f"{OURS}self_attn.{x}_proj.weight") for x in "qkvr"),
        per_head_out(f"{THEIRS}rel_attn.o", f"{OURS}self_attn.o_proj.weight"),
        *((f"{THEIRS}rel_attn.{x}", f"{OURS}self_attn.{x}") for x in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed")),
        *biased(f"{THEIRS}rel_attn.layer_norm", f"{OURS}post_attention_layernorm"),
        *biased(f"{THEIRS}ff.layer_1", f"{OURS}mlp.up_proj"),
        *biased(f"{THEIRS}ff.layer_2", f"{OURS}mlp.down_proj"),
        *biased(f"{THEIRS}ff.layer_norm", f"{OURS}post_feedforward_layernorm"),
        *biased("lm_loss", "lm_head"),
    ),
    prefix="transformer.",
)  # fmt: skip
