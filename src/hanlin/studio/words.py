"""Every word of the pages, in English and Chinese."""

from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

Language = Literal["en", "zh"]
T = TypeVar("T")

WORDS: dict[str, dict[Language, str]] = {
    "title": {"en": "Hanlin", "zh": "翰林"},
    "greeting": {"en": "What would you like to ask?", "zh": "想问点什么？"},
    "about": {"en": "About this model", "zh": "关于这个模型"},
    "try": {"en": "Try one of these", "zh": "可以这样开始"},
    "placeholder": {"en": "Message {name}", "zh": "给 {name} 发消息"},
    "send": {"en": "Send", "zh": "发送"},
    "stop": {"en": "Stop", "zh": "停止"},
    "regenerate": {"en": "Answer again", "zh": "重新回答"},
    "edit": {"en": "Edit", "zh": "编辑"},
    "edit_hint": {"en": "The old version stays reachable.", "zh": "原来的版本会保留。"},
    "cancel": {"en": "Cancel", "zh": "取消"},
    "resend": {"en": "Send again", "zh": "重新发送"},
    "previous": {"en": "Previous version", "zh": "上一个版本"},
    "next": {"en": "Next version", "zh": "下一个版本"},
    "compare": {"en": "Two models side by side", "zh": "两个模型并排"},
    "second_model": {"en": "Second model", "zh": "第二个模型"},
    "more": {"en": "More", "zh": "更多"},
    "export_json": {"en": "Save as JSON", "zh": "保存为 JSON"},
    "export_markdown": {"en": "Save as Markdown", "zh": "保存为 Markdown"},
    "import": {"en": "Open a saved conversation", "zh": "打开保存的对话"},
    "import_failed": {"en": "This file cannot be opened. {why}", "zh": "无法打开该文件。{why}"},
    "user": {"en": "User", "zh": "用户"},
    "exported": {"en": "A conversation with Hanlin, {when}", "zh": "与翰林的对话，{when}"},
    "copy": {"en": "Copy", "zh": "复制"},
    "copied": {"en": "Copied", "zh": "已复制"},
    "new": {"en": "New conversation", "zh": "新对话"},
    "settings": {"en": "Settings", "zh": "设置"},
    "close": {"en": "Close", "zh": "关闭"},
    "language": {"en": "切换到中文", "zh": "Switch to English"},
    "dark": {"en": "Light or dark", "zh": "浅色或深色"},
    "model": {"en": "Model", "zh": "模型"},
    "system": {"en": "System prompt", "zh": "系统提示词"},
    "system_hint": {
        "en": "Instructions that stand before the conversation. Small models may pay little attention to them.",
        "zh": "放在对话之前的指示。很小的模型可能不太理会它。",
    },
    "system_placeholder": {"en": "None", "zh": "无"},
    "sampling": {"en": "How the next token is chosen", "zh": "如何选择下一个词元"},
    "temperature": {"en": "Temperature", "zh": "温度"},
    "temperature_hint": {
        "en": "0 always takes the likeliest token. Higher values flatten the odds: more variety, more mistakes.",
        "zh": "0 表示总取概率最高的词元；数值越大概率越平，输出更多样，也更容易出错。",
    },
    "top_p": {"en": "Top-p", "zh": "Top-p"},
    "top_p_hint": {
        "en": "Keeps the smallest set of likeliest tokens that together reach this probability. 1 keeps all.",
        "zh": "只保留概率之和达到该值的最小一组词元。1 表示全部保留。",
    },
    "top_k": {"en": "Top-k", "zh": "Top-k"},
    "top_k_hint": {
        "en": "Keeps this many of the likeliest tokens. 0 keeps all.",
        "zh": "只保留概率最高的若干个词元。0 表示全部保留。",
    },
    "min_p": {"en": "Min-p", "zh": "Min-p"},
    "min_p_hint": {
        "en": "Drops tokens less likely than this fraction of the likeliest. 0 drops none.",
        "zh": "去掉概率低于“最高概率 × 该值”的词元。0 表示不去掉。",
    },
    "repetition_penalty": {"en": "Repetition penalty", "zh": "重复惩罚"},
    "repetition_penalty_hint": {
        "en": "Above 1, tokens that already stand in the conversation become less likely. 1 is off.",
        "zh": "大于 1 时，已出现过的词元概率会降低。1 表示关闭。",
    },
    "max_tokens": {"en": "Longest answer", "zh": "回答长度上限"},
    "max_tokens_hint": {"en": "The answer stops after this many tokens.", "zh": "回答到这么多词元就停止。"},
    "seed": {"en": "Seed", "zh": "随机种子"},
    "seed_hint": {
        "en": "With the same seed, settings and conversation, the answer is the same. Empty: new every time.",
        "zh": "种子、设置和对话都相同时，回答也相同。留空则每次不同。",
    },
    "seed_placeholder": {"en": "random", "zh": "随机"},
    "reset": {"en": "Reset", "zh": "恢复默认"},
    "colour": {"en": "Colour by probability", "zh": "按概率着色"},
    "colour_hint": {
        "en": "The redder a token, the less likely the model thought it. Point at any token for its alternatives.",
        "zh": "颜色越红，模型认为该词元越不可能。把鼠标移到词元上可以看到其他候选。",
    },
    "unlikely": {"en": "unlikely", "zh": "不太可能"},
    "certain": {"en": "certain", "zh": "确定"},
    "probability_note": {
        "en": "the model's own probabilities, before temperature and filters",
        "zh": "模型自身的概率（温度与过滤之前）",
    },
    "tokens": {"en": "{n} tokens", "zh": "{n} 个词元"},
    "speed": {"en": "{rate} tokens/s", "zh": "{rate} 词元/秒"},
    "first_token": {"en": "first after {seconds} s", "zh": "首个词元 {seconds} 秒"},
    "prompt": {"en": "prompt {n}", "zh": "提示 {n} 个词元"},
    "prompt_cached": {"en": "prompt {n}, {cached} cached", "zh": "提示 {n} 个词元，缓存 {cached} 个"},
    "ended_length": {"en": "stopped at the length limit", "zh": "达到长度上限"},
    "ended_abort": {"en": "stopped", "zh": "已停止"},
    "forgotten": {
        "en": "Earlier messages no longer fit into the model's {n} tokens and were left out of this answer.",
        "zh": "模型只能容纳 {n} 个词元，较早的消息未参与这次回答。",
    },
    "too_long": {
        "en": "This message is too long: the model holds {n} tokens, and the message with its frame needs {needed}.",
        "zh": "这条消息太长：模型只能容纳 {n} 个词元，而它需要 {needed} 个。",
    },
    "busy": {
        "en": "Too many people are asking at the moment. Try again in a few seconds.",
        "zh": "现在提问的人太多，请过几秒再试。",
    },
    "failed": {"en": "The answer failed. The server's log says why.", "zh": "回答失败，原因见服务器日志。"},
    "empty": {"en": "(an empty answer)", "zh": "（空回答）"},
    "footnote": {
        "en": "Nothing leaves the machine that serves this page. Answers may be wrong.",
        "zh": "一切都在提供本页的机器上运行。回答可能有误。",
    },
    "key": {"en": "Key", "zh": "密钥"},
    "key_ask": {
        "en": "This server asks for a key. It was set by whoever started it, with --api-key.",
        "zh": "此服务器需要密钥，由启动者用 --api-key 设定。",
    },
    "key_wrong": {"en": "That key is wrong.", "zh": "密钥不对。"},
    "enter": {"en": "Enter", "zh": "进入"},
    "run": {"en": "Run", "zh": "训练"},
    "no_run": {"en": "no run below {folder} yet", "zh": "{folder} 下还没有训练"},
    "step": {"en": "step {steps}", "zh": "第 {steps} 步"},
    "run_running": {"en": "running", "zh": "进行中"},
    "run_quiet": {"en": "nothing new for two minutes", "zh": "两分钟没有新内容"},
    "run_finished": {"en": "finished", "zh": "已完成"},
    "no_alarm": {"en": "No alarm.", "zh": "没有警报。"},
    "newest_answers": {"en": "The newest answers", "zh": "最新的回答"},
    "round": {"en": "Round", "zh": "轮"},
    "question": {"en": "Prompt", "zh": "提示"},
    "answer": {"en": "Answer", "zh": "回答"},
    "score": {"en": "Score", "zh": "得分"},
    "length": {"en": "Tokens", "zh": "词元"},
    "cut": {"en": "… (cut)", "zh": "……（截断）"},
}


def say(key: str, language: Language, **values: object) -> str:
    """A text in a language, its {places} filled."""
    return WORDS[key][language].format(**values)


def choose(value: "Mapping[Language, T] | T", language: Language) -> T:
    """Of something given in both languages or in one for both, what this language shows."""
    if isinstance(value, Mapping):
        return value[language] if language in value else next(iter(value.values()))
    return value


def preferred_language(accept: str | None) -> Language:
    """From a browser's Accept-Language header: Chinese if it stands before English."""
    for entry in (accept or "").split(","):
        tag = entry.split(";")[0].strip().lower()[:2]
        if tag in get_args(Language):
            return "zh" if tag == "zh" else "en"
    return "en"
