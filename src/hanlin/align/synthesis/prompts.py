"""What a writer is asked, in English and Chinese. `PROMPTS["zh"].new_tasks` and so on; `{…}` is filled in."""

from dataclasses import dataclass, field

DEEPER = ("constrain", "deepen", "make_concrete", "add_steps", "complicate_input")
OPERATIONS = (*DEEPER, "broaden")
EMPTY_ENGLISH = """a an the and or but of to in on at by for with from as is are was were be been it its this that these
those i you he she we they not no yes do does did so if then there here what which who"""
EMPTY_CHINESE = "的了是在和与也就都而及着或一个我你他她它这那不没有吗呢啊"


@dataclass(frozen=True)
class Prompts:
    """The words of one language.

    new_tasks: {examples}, {count}. evolve: one of `OPERATIONS` -> {task}. same: two tasks {first}, {second}, answered
    with a word that begins as `yes`. impossible: words of tasks that text alone cannot do. echoes: words of these
    prompts, which no good task repeats. sorry: of an answer that refuses. empty: words that say nothing by themselves.
    """

    new_tasks: str
    evolve: dict[str, str]
    same: str
    yes: str
    impossible: tuple[str, ...]
    echoes: tuple[str, ...]
    sorry: tuple[str, ...]
    empty: frozenset[str] = field(default_factory=frozenset)


def _deeper_en(how: str) -> str:
    return (
        f"Below is a task that somebody gave to an assistant. Make a harder one of it: {how} Keep what it is about, "
        "keep it possible to solve and clear to a reader, and add no more than twenty words. Reply with the harder "
        "task alone, without any remark.\n\nTask:\n{task}"
    )


def _deeper_zh(how: str) -> str:
    return (
        f"下面是有人交给助手的一个任务。请把它改得更难：{how}主题不变，仍要能够完成、让人读得明白，最多增加三十个字。"
        "只写改好的任务，不要任何说明。\n\n任务：\n{task}"
    )


ENGLISH = Prompts(
    new_tasks=(
        "Here are tasks that people gave to an assistant:\n\n{examples}\n\nWrite {count} more, one a line, numbered "
        "from 1. Let each differ from the others and from those above in its subject, its wording and what is to be "
        "done: explain, rewrite, classify, calculate, list, compare, invent and so on. Each must hold everything that "
        "is needed to do it in writing. Write only the numbered tasks."
    ),
    evolve={
        "constrain": _deeper_en("add one condition that the answer has to meet."),
        "deepen": _deeper_en("ask further into the matter than it does, for reasons or consequences."),
        "make_concrete": _deeper_en("put a particular case, name or figure where it speaks in general."),
        "add_steps": _deeper_en("change it so that several steps of thought are needed where one was enough."),
        "complicate_input": _deeper_en(
            "give it material to work on, such as a short table, a piece of code, a formula or a list."
        ),
        "broaden": (
            "Below is a task that somebody gave to an assistant. Think of a new one from the same field, as long and "
            "as hard, but about something that is asked less often. Reply with the new task alone, without any "
            "remark.\n\nTask:\n{task}"
        ),
    },
    same=(
        "Compare two tasks. Do they ask for the same thing, under the same conditions and to the same depth? Reply "
        "with one word, Same or Different.\n\nFirst task:\n{first}\n\nSecond task:\n{second}"
    ),
    yes="same",
    impossible=("image", "images", "picture", "photo", "video", "audio", "attached", "graph", "draw", "website"),
    echoes=("harder task", "the new task", "task above", "given task", "without any remark"),
    sorry=("sorry", "i cannot", "i can't", "unable to"),
    empty=frozenset(EMPTY_ENGLISH.split()),
)
CHINESE = Prompts(
    new_tasks=(
        "下面是人们交给助手的一些任务：\n\n{examples}\n\n请再写 {count} 个，每行一个，从 1 开始编号。"
        "每个任务的主题、说法和要做的事都要与其他任务以及上面的不同：解释、改写、分类、计算、列举、比较、创作等等。"
        "每个任务都要写全所需的内容，只用文字就能完成。只写编好号的任务。"
    ),
    evolve={
        "constrain": _deeper_zh("给答案再加一个必须满足的条件。"),
        "deepen": _deeper_zh("比原来问得更深，追问原因或后果。"),
        "make_concrete": _deeper_zh("把笼统的说法换成具体的事例、名称或数字。"),
        "add_steps": _deeper_zh("原来想一步就够的，改成要想好几步。"),
        "complicate_input": _deeper_zh("加上要处理的材料，例如小表格、一段代码、公式或清单。"),
        "broaden": (
            "下面是有人交给助手的一个任务。请想一个同一领域的新任务，长短和难度相当，但内容更少见。"
            "只写新任务，不要任何说明。\n\n任务：\n{task}"
        ),
    },
    same=(
        "比较两个任务。它们要求的事、条件和深度是否都一样？只回答一个词：相同 或 不同。"
        "\n\n第一个任务：\n{first}\n\n第二个任务：\n{second}"
    ),
    yes="相同",
    impossible=("图片", "图像", "照片", "视频", "音频", "附件", "链接", "网站", "画一"),
    echoes=("更难的任务", "改好的任务", "新任务", "上面的任务", "不要任何说明"),
    sorry=("抱歉", "对不起", "无法", "不能回答"),
    empty=frozenset(EMPTY_CHINESE),
)
PROMPTS = {"en": ENGLISH, "zh": CHINESE}
