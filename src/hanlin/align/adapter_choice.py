"""`adapter:` of a recipe: LoRA or DoRA on a saved model, new or continued from PEFT's files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.recipe import Section

if TYPE_CHECKING:
    from hanlin.models.transformer import Transformer


class LoraChoice(Section):
    """Low-rank adapters (arXiv:2106.09685). The run writes them to RUN/adapter, and the model with them to RUN/model.
    While they train, the model without them is the reference of preference and on-policy methods."""

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0, description="the update is scaled by alpha / rank")] = 32.0
    targets: Annotated[
        list[str],
        Field(min_length=1, default_factory=lambda: ["all"], description='last parts of layers\' names, or ["all"]'),
    ]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: Annotated[bool, Field(description="scale by alpha / sqrt(rank)")] = False
    dora: Annotated[bool, Field(description="learn the length of each row apart (arXiv:2402.09353)")] = False
    path: Annotated[Path | None, Field(description="go on with this adapter (PEFT's files), as it is")] = None

    @model_validator(mode="after")
    def _acts(self) -> "LoraChoice":
        fields = type(self).model_fields
        given = {
            name
            for name, field in fields.items()
            if name != "path" and getattr(self, name) != field.get_default(call_default_factory=True)
        }
        if self.path is not None and given:
            raise ValueError(f"adapter.path brings its own settings; leave out {', '.join(sorted(given))}")
        return self

    def hang_on(self, model: "Transformer", seed: int) -> None:
        """Add the adapter; only its weights are trained from then on."""
        from hanlin.tune.lora import add_lora
        from hanlin.tune.peft_files import load_lora

        if self.path is not None:
            load_lora(model, self.path)
            return
        targets = "all" if self.targets == ["all"] else self.targets
        add_lora(
            model, self.rank, self.alpha, targets, rslora=self.rslora, dropout=self.dropout, dora=self.dora, seed=seed
        )
