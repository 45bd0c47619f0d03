"""How people ask: wordings in English and Chinese. The last ones of each list are never trained on (`UNSEEN` of them),
so that knowing a fact can be told from knowing a sentence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
UNSEEN = 3  # wordings at the end of each list that are kept for evaluation


@dataclass(frozen=True)
class Wordings:
    """Templates of one kind of question in one language; `{}` is what is asked about."""

    language: Language
    templates: tuple[str, ...]

    @property
    def trained(self) -> Sequence[str]:
        return self.templates[:-UNSEEN]

    @property
    def unseen(self) -> Sequence[str]:
        return self.templates[-UNSEEN:]


WHAT = (
    Wordings(
        "en",
        (
            "What does {} do?",
            "What is {}?",
            "Explain {}.",
            "what is {}",
            "Tell me about {}.",
            "What is {} for?",
            "Describe {}.",
            "Can you explain {}?",
            "What does {} mean in Python?",
            "I need help with {}.",
            "help {}",
            "{}?",
            "{}",
            "Please explain what {} does.",
            "Do you know {}?",
            "Give me the documentation of {}.",
            "How does {} work?",
            "What can I do with {}?",
            "Could you tell me what {} does?",
            "What's {}?",
            "Please describe {}.",
            "Can you tell me about {}?",
        ),
    ),
    Wordings(
        "zh",
        (
            "{} 是什么？",
            "{} 有什么用？",
            "{} 是做什么的？",
            "请解释 {}。",
            "请介绍一下 {}。",
            "解释一下 {}",
            "什么是 {}？",
            "{}是什么",
            "{} 的作用是什么？",
            "告诉我 {} 的用途。",
            "我想了解 {}。",
            "请说明 {} 的功能。",
            "你知道 {} 吗？",
            "{} 是什么意思？",
            "在 Python 里，{} 是什么？",
            "帮我看看 {} 的文档。",
            "介绍 {}",
            "能讲讲 {} 吗？",
            "{} 能做什么？",
            "请告诉我 {} 是什么。",
            "能解释一下 {} 吗？",
            "{} 是干什么用的？",
        ),
    ),
)
CALL = (
    Wordings(
        "en",
        (
            "How do I call {}?",
            "What is the signature of {}?",
            "What arguments does {} take?",
            "Show me the signature of {}.",
            "signature of {}",
            "Which parameters does {} have?",
            "How is {} called?",
            "What are the parameters of {}?",
            "Give me the signature of {}.",
            "Which arguments does {} accept?",
        ),
    ),
    Wordings(
        "zh",
        (
            "怎么调用 {}？",
            "{} 的参数是什么？",
            "{} 有哪些参数？",
            "{} 的签名是什么？",
            "请给出 {} 的签名。",
            "如何调用 {}？",
            "{} 的参数有哪些？",
            "{} 要传什么参数？",
            "调用 {} 需要哪些参数？",
            "请写出 {} 的签名。",
        ),
    ),
)
PASSAGE = (
    Wordings(
        "en",
        (
            "What does the text say about {}?",
            "What is {}?",
            "Tell me about {}.",
            "How does the part “{}” begin?",
            "{}",
            "What do you know about {}?",
            "Quote the beginning of “{}”.",
            "What is written under {}?",
            "What does the part “{}” say?",
        ),
    ),
    Wordings(
        "zh",
        (
            "关于{}，文中怎么说？",
            "{}是什么？",
            "请介绍一下{}。",
            "“{}”这一段怎么开头？",
            "{}",
            "你知道{}吗？",
            "请引用“{}”的开头。",
            "“{}”里写了什么？",
            "“{}”这一段说了什么？",
        ),
    ),
)
CONTINUE = (
    Wordings(
        "en",
        (
            "Continue: {}",
            "How does it go on: {}",
            "Complete the sentence: {}",
            "{} ...",
            "What follows after: {}",
            "Go on: {}",
        ),
    ),
    Wordings("zh", ("请续写：{}", "接下来是什么：{}", "补全这句话：{}", "{}……", "后面是什么：{}", "继续：{}")),
)
VALUE = (
    Wordings(
        "en",
        (
            "What is {}?",
            "{}",
            "{} =",
            "{} = ?",
            "Compute {}.",
            "What does {} give?",
            "What is the value of {}?",
            "Evaluate {}.",
            "How much is {}?",
            "Calculate {}.",
            "What does Python print for {}?",
            "Tell me the value of {}.",
        ),
    ),
    Wordings(
        "zh",
        (
            "{} 等于多少？",
            "{} 等于几？",
            "计算 {}。",
            "{} 的值是多少？",
            "{} 是多少？",
            "请算一下 {}。",
            "求 {} 的值。",
            "算一算 {}",
            "{} 的结果是什么？",
            "{} 得多少？",
            "在 Python 里，{} 的值是什么？",
            "请计算 {}。",
        ),
    ),
)
