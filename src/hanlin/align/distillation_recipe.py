"""`objective: {kind: distill}`: a smaller model learns what a larger one says at every token."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.recipe import Section


class DistillObjective(Section):
    """Token-level distillation on conversations, on text that the student writes itself, or on the teacher's.

    forward_kl covers all that the teacher does (arXiv:1503.02531), reverse_kl keeps to what it does most
    (arXiv:2306.08543), jsd lies between (GKD, arXiv:2306.13649).
    """

    kind: Literal["distill"] = "distill"
    teacher: Annotated[Path, Field(description="model folder with the same tokenizer")]
    files: Annotated[list[Path], Field(min_length=1, description="conversations, as kind sft reads")]
    held_out: Annotated[list[Path], Field(default_factory=list, description="such files for evaluation")]
    held_out_rows: Annotated[int, Field(gt=0, description="rows of an evaluation during training")] = 64
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[float, Field(gt=0, lt=1, description="jsd: the teacher's share of the mixture")] = 0.5
    temperature: Annotated[float, Field(gt=0, description="of both distributions")] = 1.0
    data_loss: Annotated[float, Field(ge=0, description="weight of the plain loss on the text beside it")] = 0.0
    writer: Annotated[
        Literal["data", "student", "teacher"],
        Field(description="whose answers are learnt from: the files', or written anew to their first questions"),
    ] = "data"
    written: Annotated[float, Field(gt=0, le=1, description="share of steps with written answers (GKD's lambda)")] = 1.0
    max_tokens: Annotated[int, Field(gt=0, description="of a written answer")] = 64
    writing_temperature: Annotated[float, Field(gt=0)] = 1.0
    seq_len: Annotated[int | None, Field(gt=1, description="tokens a row; None: what holds 99.5 % whole")] = None

    @model_validator(mode="after")
    def _acts(self) -> "DistillObjective":
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.get_default()}
        if "beta" in given and self.divergence != "jsd":
            raise ValueError(f"`beta` belongs to the divergence jsd, not to {self.divergence}; leave it out")
        for name in ("written", "max_tokens", "writing_temperature"):
            if name in given and self.writer == "data":
                raise ValueError(f"`{name}` is for answers that are written; `writer` is data: leave it out")
        if self.writer != "data" and self.data_loss:
            raise ValueError("`data_loss` learns the files' own answers; with another `writer` leave it out")
        return self
