"""`DataRecipe`: what `hanlin data build` reads."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hanlin.core.recipe import Recipe
from hanlin.data.sources import TextSource


class DataRecipe(Recipe):
    """Text to token shards."""

    out: Annotated[Path, Field(description="folder of the shards")]
    tokenizer: Annotated[Path, Field(description="tokenizer or model folder")]
    sources: Annotated[list[TextSource], Field(min_length=1, description="where the documents come from, in order")]
    shard_mb: Annotated[float, Field(gt=0, description="megabytes of text in a shard")] = 64.0
    workers: Annotated[int | None, Field(ge=1, description="processes that tokenise; None: one a core")] = None
    overwrite: Annotated[bool, Field(description="replace shards in `out` that were made otherwise")] = False
