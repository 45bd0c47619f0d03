"""The words of the health page in Chinese: panels and alarms. The English ones stand where they are made
(`align.health_panels`, `align.health_rules`)."""

from hanlin.align.health import Alarm
from hanlin.align.health_panels import Panel
from hanlin.studio.words import Language

PANELS_ZH = {
    "reward": "奖励",
    "held out": "留出题目的成绩",
    "silent groups": "无信号的组",
    "entropy, nats a token": "熵（nat / 词元）",
    "divergence from the reference, nats": "与参考模型的散度（nat）",
    "tokens an answer": "回答长度（词元）",
    "how answers end": "回答如何结束",
    "share of tokens clipped": "被裁剪的词元比例",
    "rollout against trainer, nats": "采样与训练的概率差（nat）",
    "critic: variance explained": "评论者：解释的方差",
    "rewards of pairs": "偏好对的隐式奖励",
    "pairs told apart": "分辨正确的偏好对",
    "log-probability of answers": "回答的对数概率",
    "loss": "损失",
    "loss on held-out text": "留出文本上的损失",
    "gradient norm": "梯度范数",
    "seconds a round": "每轮耗时（秒）",
    "tokens a second": "词元 / 秒",
}
ZERO_ZH = {"on-policy: nothing to clip": "在策略：没有可裁剪的"}
ALARMS_ZH = {
    "entropy": (
        "熵在 20 行内下降了 {percent:.0f} %（每词元 {before:.3g} → {now:.3g} nat）：很快对同一提示的回答会全都一"
        "样，再也学不到东西。请降低 train.lr，设置 objective.entropy_bonus，提高采样温度，或让策略更贴近参考模型（"
        "objective.beta）。"
    ),
    "too easy": (
        "{percent:.0f} % 的组没有信号，平均奖励 {reward:.2f}：题目太容易，回答全对。请换更难的题目，或去掉总能做对"
        "的题目。"
    ),
    "too hard": (
        "{percent:.0f} % 的组没有信号，平均奖励 {reward:.2f}：题目太难，没有一个回答正确。请换更容易的题目，增加每"
        "题的回答数，先做微调，或奖励部分进展。"
    ),
    "truncated": (
        "{percent:.0f} % 的回答在 objective.max_tokens 处被截断，得不到应得的奖励。请调大它，或加上奖励 `overlong`。"
    ),
    "no end": (
        "没有一个回答自己结束：模型从不写出结束词元。请先训练它（模板会训练结束词元的指令微调），或检查对话模板与分"
        "词器的结束词元是否一致。"
    ),
    "empty": ("{percent:.0f} % 的回答是空的：模型一开口就结束。请检查对话模板的生成提示，并确认空回答得不到奖励。"),
    "length": (
        "回答变长到 {times:.1f} 倍（{before:.0f} → {now:.0f} 词元），奖励却没有上升。请用损失与长度无关的 `kind: "
        "dr_grpo` 或 `dapo`，或加上奖励 `overlong`。"
    ),
    "reference": (
        "策略离参考模型每个回答 {now:.1f} nat（每词元 {token:.2g}），若干行之前是 {before:.1f}：它正在忘记原来会"
        "的。请提高 objective.beta 或降低 train.lr。"
    ),
    "mismatch": (
        "采样时的概率与训练时的相差 {now:.2g} nat（第 95 百分位）：梯度属于另一个策略。请用 objective.weights: "
        "shared、train.precision: fp32，或 objective.correction；采样过滤（objective.top_p、objective.top_k）也会造成"
        "差别。"
    ),
    "clipped": (
        "{percent:.0f} % 的词元被裁剪，学不到东西。请降低 train.lr，减少每轮的遍数（objective.epochs），或加大每步"
        "（train.batch_size）。"
    ),
    "gradient": (
        "梯度范数为 {now:.3g}，是其中位数（{usual:.3g}）的 {times:.0f} 倍。请看 samples.jsonl 中的这一轮；"
        "train.clip 限制一步的影响。"
    ),
    "no progress": (
        "奖励 50 行没有变化（平均 {reward:.3g}），而没有信号的组只有 {percent:.0f} %。请提高 train.lr，增加每轮的回"
        "答数，或检查奖励能否分辨回答的好坏。"
    ),
    "critic": (
        "评论者解释的方差为 {now:.2f}，比没有还差：它让优势更嘈杂。请设置 objective.critic_warmup，从奖励模型开始（"
        "objective.critic），或提高 objective.value_weight。"
    ),
    "forgetting": (
        "留出文本上的损失上升了 {percent:.0f} %（{before:.3f} → {now:.3f}）：模型在忘记语言。请提高 "
        "objective.beta，降低 train.lr，或只训练适配器。"
    ),
    "hacking": (
        "奖励从 {reward_before:.3g} 升到 {reward:.3g}，而 {metric} 从 {before:.3g} 降到 {now:.3g}：策略学会了讨好奖"
        "励，而不是它所代表的东西。请回到第 {best:.0f} 步，降低 train.lr，提高 objective.beta，或用现在的回答重新训"
        "练奖励。"
    ),
    "held out": (
        "{metric} 为 {now:.3g}，低于开始时的 {first:.3g}（训练奖励：{reward_before:.3g} → {reward:.3g}）：学到的不"
        "适用于其他题目。请降低 train.lr，增加不同的题目，或让策略更贴近参考模型（objective.beta）。"
    ),
    "both fall": (
        "被选中的回答与被拒绝的一起变得更不可能（奖励分别下降 {chosen:.2g} 和 {rejected:.2g}）：这是 DPO 已知的漂"
        "移。请设置 objective.sft，用 `kind: dpop`，或降低 train.lr。"
    ),
    "at once": (
        "{lines:.0f} 行之后所有偏好对都分得清：区别它们的是表面特征（长度、格式、来源），或学习率太高。请用 "
        "`hanlin data preview` 查看，并比较两类回答的长度。"
    ),
    "overfitting": (
        "留出损失为 {now:.3f}，最低曾是 {best:.3f}：从那以后是在死记数据。请提早停止，降低 train.lr，或设置 "
        "train.keep_best。"
    ),
}


def panel_title(panel: Panel, language: Language) -> str:
    return panel.title if language == "en" else PANELS_ZH.get(panel.title, panel.title)


def panel_zero(panel: Panel, language: Language) -> str:
    return panel.zero if language == "en" else ZERO_ZH.get(panel.zero, panel.zero)


def alarm_text(alarm: Alarm, language: Language) -> str:
    """A rule of the reader's own stays in the language it was written in."""
    if language == "en" or alarm.rule.name not in ALARMS_ZH:
        return alarm.text
    return ALARMS_ZH[alarm.rule.name].format(metric=alarm.rule.metric, **alarm.found.figures)
