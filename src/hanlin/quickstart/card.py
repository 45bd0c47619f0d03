"""What the page says about the model before anyone types: what it is, what it can do, and what it cannot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Card:
    """Markdown by language ("en", "zh"), and questions to try by language."""

    text: dict[str, str]
    examples: dict[str, tuple[str, ...]]


def write_card(source_en: str, source_zh: str, parameters: int, evaluation: Mapping[str, Any], own_text: bool) -> Card:
    """An honest card; the figures are those of this very model."""
    grades = evaluation["exam"]["sft"]
    known = "passages, unseen wording" if own_text else "facts, unseen wording"
    size, bits = f"{parameters / 1e6:.1f}", f"{evaluation['perplexity']['sft']['bits_per_byte']:.2f}"
    shares = {
        language: (_share(grades, known, language), _share(grades, "expressions, unseen operands", language))
        for language in ("en", "zh")
    }
    text = {
        "en": (
            f"**This model was made on this machine just now.** It has {size} million parameters, thousands of times "
            f"fewer than the assistants you know, and has read nothing but {source_en} and instruction data that a "
            f"program made from it. It answers {shares['en'][0]} of the questions about facts it was taught (in new "
            f"wordings) and {shares['en'][1]} of small sums it has never seen; on other text it needs {bits} bits a "
            "byte. Ask it anything else and it should say that it does not know. It can be wrong: check what it says."
        ),
        "zh": (
            f"**这个模型是刚刚在这台机器上训练出来的。** 它有 {size} 百万个参数，比常见的助手小几千倍，"
            f"只读过 {source_zh}，"
            f"以及由程序从中生成的问答。学过的知识换一种问法，它能答对 {shares['zh'][0]}；没见过的小算术，能答对 "
            f"{shares['zh'][1]}。问别的，它应当回答不知道。它会出错，请自行核对。"
        ),
    }
    examples: dict[str, tuple[str, ...]]
    if own_text:
        examples = {
            "en": ("Who are you?", "What is 3 + 4?", "What can you do?"),
            "zh": ("你是谁？", "3 + 4 等于几？", "你会做什么？"),
        }
    else:
        examples = {
            "en": (
                "What does len do?",
                "Tell me about torch.nn.Linear.",
                "What is 7 + 5?",
                "Tom has 9 apples and gives away 4. How many apples are left?",
                "What is the capital of France?",
            ),
            "zh": (
                "你是谁？",
                "json.dumps 是什么？",
                "8 + 6 等于几？",
                "小明有7个苹果，又买了5个，一共有多少个苹果？",
                "法国的首都是哪里？",
            ),
        }
    return Card(text, examples)


def _share(grades: Mapping[str, Any], group: str, language: str) -> str:
    right, asked = grades.get(group, {}).get(language, (0, 0))
    return f"{right / asked:.0%}" if asked else "none"
