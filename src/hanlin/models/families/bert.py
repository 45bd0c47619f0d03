"""BERT (arXiv:1810.04805): an encoder whose tokens see each other both ways, trained to name masked tokens and to tell
whether sentence B follows sentence A.

Token, position and segment vectors are summed and normed; norms stand behind the sums; a dense layer with GELU and norm
stands in front of the output matrix, which is the embedding. The head for sentence pairs is kept as
`model.next_sentence`, a pooler without it as `model.pooler` (`nn.heads`).
"""

from typing import Any

from hanlin.models.families.family import Family
from hanlin.models.families.gpt2 import biased
from hanlin.models.families.keys import Setting, known_activation
from hanlin.models.families.stored_heads import StoredHead
from hanlin.models.families.weights import Rule
from hanlin.nn.heads import NextSentence, Pooler

SIZES = {
    "vocab_size": Setting(("vocab_size",), int, 30522),
    "hidden_size": Setting(("width",), int, 768),
    "num_hidden_layers": Setting(("depth",), int, 12),
    "num_attention_heads": Setting(("attention.heads",), int, 12),
    "intermediate_size": Setting(("feed_forward.hidden",), int, 3072),
    "hidden_act": Setting(("feed_forward.activation",), str, "gelu", convert=known_activation),
    "max_position_embeddings": Setting(("max_positions",), int, 512),
    "type_vocab_size": Setting(("embedding.segments",), int, 2),
    "layer_norm_eps": Setting(("norm_eps",), float, 1e-12),
    "initializer_range": Setting(("init_std",), float, 0.02),
}
ENCODER: dict[str, Any] = {
    "attention.bidirectional": True,
    "attention.qkv_bias": True,
    "attention.output_bias": True,
    "attention.position": None,
    "feed_forward.bias": True,
    "feed_forward.gated": False,
    "layer.norms": "post",
    "norm.kind": "layer",
    "norm.final": False,
    "embedding.positions": "learned",
    "embedding.norm": True,
    "head.bias": True,
    "tied_embeddings": True,
}
# Untied, the bias that files hold twice would be two biases.
FIXED = {"tie_word_embeddings": True, "position_embedding_type": "absolute"}
_NOTES = """
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout output_past directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""
NOTES = frozenset(_NOTES.split())
BLOCK = "model.layers.{}."


def encoder_weights(root: str) -> tuple[tuple[str, str] | Rule, ...]:
    """Embedding and layers, whose names begin with `root`."""
    embeddings, theirs = f"{root}embeddings.", f"{root}encoder.layer.{{}}."
    return (
        (f"{embeddings}word_embeddings.weight", "model.embed_tokens.weight"),
        (f"{embeddings}position_embeddings.weight", "model.embed_positions.weight"),
        (f"{embeddings}token_type_embeddings.weight", "model.embed_segments.weight"),
        *biased(f"{embeddings}LayerNorm", "model.embed_norm"),
        *biased(f"{theirs}attention.self.query", f"{BLOCK}self_attn.q_proj"),
        *biased(f"{theirs}attention.self.key", f"{BLOCK}self_attn.k_proj"),
        *biased(f"{theirs}attention.self.value", f"{BLOCK}self_attn.v_proj"),
        *biased(f"{theirs}attention.output.dense", f"{BLOCK}self_attn.o_proj"),
        *biased(f"{theirs}attention.output.LayerNorm", f"{BLOCK}post_attention_layernorm"),
        *biased(f"{theirs}intermediate.dense", f"{BLOCK}mlp.up_proj"),
        *biased(f"{theirs}output.dense", f"{BLOCK}mlp.down_proj"),
        *biased(f"{theirs}output.LayerNorm", f"{BLOCK}post_feedforward_layernorm"),
    )


BERT = Family(
    name="bert",
    architecture="BertForMaskedLM",
    bare="BertModel",
    also=("BertForPreTraining",),
    common=SIZES,
    settings={
        "hidden_act": Setting(("feed_forward.activation", "head.transform"), str, "gelu", convert=known_activation),
    },
    always=ENCODER,
    fixed=FIXED,
    harmless=NOTES,
    absent={"pad_token_id": 0},
    rotary=False,
    whole_heads=True,
    weights=(
        *encoder_weights("bert."),
        *biased("cls.predictions.transform.dense", "head_transform.dense"),
        *biased("cls.predictions.transform.LayerNorm", "head_transform.norm"),
        ("cls.predictions.decoder.weight", "lm_head.weight"),
        ("cls.predictions.bias", "lm_head.bias"),
    ),
    heads=(
        StoredHead(
            "next_sentence",
            NextSentence,
            biased("bert.pooler.dense", "pooler.dense") + biased("cls.seq_relationship", "classifier"),
            architecture="BertForPreTraining",
        ),
        StoredHead("pooler", Pooler, biased("bert.pooler.dense", "dense")),
    ),
    skipped=("bert.embeddings.position_ids", "cls.predictions.decoder.bias"),
    old_names=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    prefix="bert.",
)
