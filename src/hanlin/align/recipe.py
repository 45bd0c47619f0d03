"""`TrainRecipe`: what `hanlin train` and `hanlin data preview` read. The `objective` says what is learnt, `model` where
the weights come from, `train` how long and how fast; everything that is left out is resolved to the usual value and
written, as resolved, to `recipe.yaml` of the run folder.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.align.adapter_choice import LoraChoice
from hanlin.align.distillation_recipe import DistillObjective
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.named_recipe import NamedRecipe
from hanlin.align.on_policy_recipe import OnPolicyObjective
from hanlin.align.preference_recipe import KtoObjective, PreferenceObjective, RrhfObjective
from hanlin.align.rahf_recipe import RahfObjective
from hanlin.align.reward_recipe import RewardObjective
from hanlin.core.recipe import Section
from hanlin.parallel.settings import Layout
from hanlin.train.settings import LoopSettings


class SavedModel(Section):
    """Continue from a model folder (Hugging Face layout), whoever saved it."""

    kind: Literal["saved"] = "saved"
    path: Annotated[Path, Field(description="model folder")]


class NewExperts(Section):
    """A mixture of experts in the place of each layer's feed-forward (its `hidden` then goes unused)."""

    count: Annotated[int, Field(gt=1, description="experts of a layer")] = 8
    top_k: Annotated[int, Field(gt=0, description="experts a token goes through")] = 2
    hidden: Annotated[int, Field(gt=0, description="units of one expert")] = 128

    @model_validator(mode="after")
    def _enough(self) -> "NewExperts":
        if self.top_k > self.count:
            raise ValueError(f"a token cannot go through {self.top_k} of {self.count} experts")
        return self


class NewModel(Section):
    """A decoder with random weights. The vocabulary is the tokenizer's."""

    kind: Literal["new"] = "new"
    family: Annotated[Literal["llama", "qwen2", "qwen3", "mistral"], Field(description="layout it is saved in")] = (
        "qwen3"
    )
    depth: Annotated[int, Field(gt=0, description="layers")] = 6
    width: Annotated[int, Field(gt=0, description="numbers a token")] = 192
    heads: Annotated[int, Field(gt=0, description="query heads")] = 3
    kv_heads: Annotated[int, Field(gt=0, description="key/value heads; divides heads")] = 1
    head_dim: Annotated[int | None, Field(gt=0, description="None: width / heads")] = None
    hidden: Annotated[int, Field(gt=0, description="units of the feed-forward")] = 512
    experts: Annotated[NewExperts | None, Field(description="saved as qwen3_moe or mixtral")] = None
    tied: Annotated[bool, Field(description="output head = embeddings")] = True
    window: Annotated[int | None, Field(gt=0, description="sliding window (mistral); None: see everything")] = None
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    max_positions: Annotated[int | None, Field(gt=0, description="None: the objective's seq_len")] = None

    @model_validator(mode="after")
    def _consistent(self) -> "NewModel":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_dim")
        if self.window is not None and self.family != "mistral":
            raise ValueError(f"a sliding window belongs to the family mistral, not {self.family}")
        if self.experts is not None and self.family not in ("qwen3", "mistral"):
            raise ValueError(f"experts belong to the families qwen3 and mistral, not {self.family}")
        return self


class Shards(Section):
    """A folder of token shards (`hanlin data build`) and its weight in the mixture."""

    path: Path
    weight: Annotated[float, Field(gt=0)] = 1.0


class CausalLmObjective(Section):
    """Pretraining: the next token of every document."""

    kind: Literal["causal_lm"] = "causal_lm"
    shards: Annotated[list[Shards], Field(min_length=1, description="what to train on")]
    held_out: Annotated[
        list[Path], Field(default_factory=list, description="shard folders for evaluation during training")
    ]
    held_out_rows: Annotated[int, Field(gt=0, description="rows of an evaluation during training")] = 64
    seq_len: Annotated[int, Field(gt=1, description="tokens a row")] = 256


class ContinuedObjective(Section):
    """Continued pretraining: new text of a domain, mixed with general text so that little is forgotten.

    Of every 1 + `ratio` rows one is of the domain (the usual ratios are 1 to 10). A tokenizer with more tokens than the
    model's own grows it, and the rows of the new tokens are trained alone at first.
    """

    kind: Literal["continued"] = "continued"
    domain: Annotated[list[Shards], Field(min_length=1, description="what is to be learnt")]
    general: Annotated[list[Shards], Field(default_factory=list, description="text like what the model was made of")]
    ratio: Annotated[float, Field(ge=0, description="rows of general text for each of the domain; 0: none")] = 5.0
    sft: Annotated[list[Path], Field(default_factory=list, description="conversations to mix in, as kind sft reads")]
    sft_share: Annotated[float, Field(gt=0, lt=1, description="of all rows, where `sft` is given")] = 0.05
    held_out: Annotated[list[Path], Field(default_factory=list, description="domain shards that are never trained")]
    held_out_general: Annotated[list[Path], Field(default_factory=list, description="general ones")]
    held_out_rows: Annotated[int, Field(gt=0, description="rows of an evaluation of each")] = 64
    new_rows_first: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps in which only new tokens' rows are trained, before")
    ] = 0.1
    seq_len: Annotated[int, Field(gt=1, description="tokens a row")] = 256

    @model_validator(mode="after")
    def _acts(self) -> "ContinuedObjective":
        if bool(self.general) != (self.ratio > 0):
            raise ValueError("`general` and `ratio` belong together: give general shards, or set ratio to 0")
        return self


class SftObjective(Section):
    """Supervised fine-tuning on conversations, loss on the assistant's tokens only."""

    kind: Literal["sft"] = "sft"
    files: Annotated[list[Path], Field(min_length=1, description="Alpaca, ShareGPT or OpenAI messages")]
    held_out: Annotated[
        list[Path], Field(default_factory=list, description="such files for evaluation during training")
    ]
    held_out_rows: Annotated[int, Field(gt=0, description="rows of an evaluation during training")] = 64
    seq_len: Annotated[
        int | None, Field(gt=1, description="tokens a row; None: the power of two that holds 99.5 % whole")
    ] = None
    packing: Annotated[bool, Field(description="several conversations a row (they never see each other)")] = True
    loss_on: Annotated[
        Literal["all_turns", "last_turn"],
        Field(description="of the assistant's turns, which are learnt; the last: all it does after the last request"),
    ] = "all_turns"
    loss: Annotated[
        Literal["nll", "dft"], Field(description="of a token: -log p, or -p log p with p held fixed (arXiv:2508.05629)")
    ] = "nll"
    neftune: Annotated[
        float | None, Field(gt=0, description="noise on the token vectors (arXiv:2310.05914); usual: 5 to 15")
    ] = None
    replay: Annotated[
        list[Shards], Field(default_factory=list, description="pretraining text to mix in, so that less is forgotten")
    ]
    replay_ratio: Annotated[float, Field(ge=0, description="rows of it for each row of conversations; 0: none")] = 0.0
    bad_rows: Annotated[Literal["stop", "skip"], Field(description="what to do with a row that cannot be read")] = (
        "stop"
    )

    @model_validator(mode="after")
    def _acts(self) -> "SftObjective":
        if bool(self.replay) != (self.replay_ratio > 0):
            raise ValueError("`replay` and `replay_ratio` belong together: give shards and a ratio above 0, or neither")
        return self


class TrainChoices(LoopSettings):
    """`train:` of a recipe, in which the length and the rate may be left to the objective."""

    steps: Annotated[int | None, Field(gt=0, description="optimizer steps; give this or epochs")] = None
    epochs: Annotated[float | None, Field(gt=0, description="passes over the data; None: the objective's usual")] = None
    lr: Annotated[float | None, Field(gt=0, description="peak rate; None: the objective's usual")] = None

    @model_validator(mode="after")
    def _one_length(self) -> "TrainChoices":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give one of `steps` and `epochs`, not both")
        return self


class TrainRecipe(NamedRecipe):
    """`hanlin train RECIPE`: one model, one objective, one run folder."""

    tokenizer: Annotated[Path | None, Field(description="tokenizer folder; None: the saved model's own")] = None
    model: Annotated[NewModel | SavedModel, Field(discriminator="kind")] = NewModel()
    adapter: Annotated[
        LoraChoice | None, Field(description="train a few added weights (LoRA) and leave the model's own as they are")
    ] = None
    objective: Annotated[
        CausalLmObjective
        | ContinuedObjective
        | SftObjective
        | OnPolicyObjective
        | RewardObjective
        | PreferenceObjective
        | KtoObjective
        | RrhfObjective
        | RahfObjective
        | IteratedObjective
        | DistillObjective,
        Field(discriminator="kind"),
    ]
    train: TrainChoices = TrainChoices()
    parallel: Annotated[Layout, Field(description="how several processes share the work (--nproc, torchrun)")] = (
        Layout()
    )

    @model_validator(mode="after")
    def _has_tokenizer(self) -> "TrainRecipe":
        if self.tokenizer is None and isinstance(self.model, NewModel):
            raise ValueError("a new model needs `tokenizer`: the folder that `hanlin tokenizer train` wrote")
        if self.adapter is not None and isinstance(self.model, NewModel):
            raise ValueError("an adapter is for a trained model: give model {kind: saved, path: ...}")
        if isinstance(self.objective, ContinuedObjective) and isinstance(self.model, NewModel):
            raise ValueError("objective `continued` goes on with a trained model: give model {kind: saved, path: ...}")
        return self
