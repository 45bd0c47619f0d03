"""Greetings, who-are-you, and what the model cannot know: it says so instead of inventing an answer.

The things asked about (countries, cities, people, made-up functions) are split by a hash: what evaluation asks about
never stands in a training question.
"""

import hashlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from hanlin.quickstart.questions import CALL, UNSEEN, WHAT, Language

HELLO = {
    "en": (
        "Hello",
        "Hi",
        "Hi!",
        "Hello!",
        "Hey",
        "Good morning",
        "Good evening",
        "hello there",
        "Hi, how are you?",
        "hey!",
    ),
    "zh": ("你好", "你好！", "您好", "嗨", "早上好", "晚上好", "你好吗？", "大家好", "哈喽", "您好！"),
}
WHO = {
    "en": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Who made you?",
        "Introduce yourself.",
        "who are you",
        "Are you ChatGPT?",
        "What kind of model are you?",
        "Tell me about yourself.",
        "What were you trained on?",
        "Which text did you read?",
        "Are you a language model?",
    ),
    "zh": (
        "你是谁？",
        "你叫什么名字？",
        "你是什么？",
        "请介绍一下你自己。",
        "谁创造了你？",
        "你是谁",
        "你是什么模型？",
        "你是用什么训练的？",
        "你读过什么？",
        "介绍一下自己",
        "你是语言模型吗？",
        "你是 ChatGPT 吗？",
    ),
}
CAN = {
    "en": ("What can you do?", "Help", "How can you help me?", "What can I ask you?", "What do you know?", "help me"),
    "zh": ("你会做什么？", "你能做什么？", "帮助", "我可以问你什么？", "你知道什么？", "你有什么用？"),
}
THANKS = {
    "en": ("Thanks", "Thank you", "Thank you!", "thanks a lot", "Great, thanks", "Bye", "Goodbye"),
    "zh": ("谢谢", "谢谢你", "多谢", "谢谢！", "再见", "拜拜", "好的，谢谢"),
}
COUNTRIES = tuple(
    """France/法国 Germany/德国 Italy/意大利 Spain/西班牙 Japan/日本 Brazil/巴西 Canada/加拿大 Egypt/埃及 India/印度 Kenya/肯尼亚
    Mexico/墨西哥 Norway/挪威 Poland/波兰 Russia/俄罗斯 Sweden/瑞典 Turkey/土耳其 China/中国 Greece/希腊 Peru/秘鲁 Chile/智利
    Cuba/古巴 Iran/伊朗 Nepal/尼泊尔 Vietnam/越南 Thailand/泰国 Austria/奥地利 Belgium/比利时 Denmark/丹麦 Finland/芬兰
    Portugal/葡萄牙 Ireland/爱尔兰 Hungary/匈牙利 Morocco/摩洛哥 Nigeria/尼日利亚 Australia/澳大利亚 Argentina/阿根廷""".split()
)
CITIES = tuple(
    """Paris/巴黎 London/伦敦 Berlin/柏林 Rome/罗马 Madrid/马德里 Tokyo/东京 Beijing/北京 Shanghai/上海 Moscow/莫斯科
    Cairo/开罗 Sydney/悉尼 Boston/波士顿 Chicago/芝加哥 Lima/利马 Oslo/奥斯陆 Vienna/维也纳 Athens/雅典 Delhi/德里
    Seoul/首尔 Bangkok/曼谷 Dublin/都柏林 Prague/布拉格 Warsaw/华沙 Toronto/多伦多 Shenzhen/深圳 Hangzhou/杭州
    Nanjing/南京 Chengdu/成都 Wuhan/武汉 Lisbon/里斯本""".split()
)
PEOPLE = tuple(
    """Einstein/爱因斯坦 Newton/牛顿 Mozart/莫扎特 Beethoven/贝多芬 Shakespeare/莎士比亚 Napoleon/拿破仑 Darwin/达尔文
    Picasso/毕加索 Confucius/孔子 Gandhi/甘地 Lincoln/林肯 Galileo/伽利略 Plato/柏拉图 Aristotle/亚里士多德 Churchill/丘吉尔
    Cleopatra/克利奥帕特拉 Columbus/哥伦布 Tesla/特斯拉 Edison/爱迪生 Chopin/肖邦 Bach/巴赫 Dante/但丁 Goethe/歌德 Tolstoy/托尔斯泰
    Messi/梅西 Ronaldo/罗纳尔多 Kafka/卡夫卡 Caesar/凯撒 Socrates/苏格拉底 Madonna/麦当娜""".split()
)
THINGS = tuple(
    """love/爱情 football/足球 history/历史 cooking/做饭 music/音乐 politics/政治 medicine/医学 law/法律 war/战争 money/金钱
    movies/电影 chess/国际象棋 coffee/咖啡 dinosaurs/恐龙 the-moon/月球 flowers/花 religion/宗教 travel/旅行 dogs/狗 cars/汽车
    poetry/诗歌 painting/绘画 gold/黄金 tea/茶 dreams/梦 health/健康 wine/葡萄酒 fashion/时尚 volcanoes/火山 whales/鲸鱼""".split()
)
ASKED = {
    "en": (
        (
            COUNTRIES,
            (
                "What is the capital of {}?",
                "Where is {}?",
                "How many people live in {}?",
                "Who is the president of {}?",
                "What language do people speak in {}?",
                "capital of {}",
                "Who governs {}?",
                "How large is {}?",
                "What is {} famous for?",
            ),
        ),
        (
            CITIES,
            (
                "What is the weather in {}?",
                "How is the weather in {} today?",
                "Where is {}?",
                "Will it rain in {} tomorrow?",
                "What time is it in {}?",
                "How do I get to {}?",
                "Is it cold in {}?",
                "How far is {}?",
                "Recommend a restaurant in {}.",
            ),
        ),
        (
            PEOPLE,
            (
                "Who is {}?",
                "Who was {}?",
                "When was {} born?",
                "What did {} do?",
                "Tell me a story about {}.",
                "How old is {}?",
                "Where did {} live?",
                "Is {} famous?",
                "Who was {} really?",
            ),
        ),
        (
            THINGS,
            (
                "Write a poem about {}.",
                "Tell me a joke about {}.",
                "What do you think about {}?",
                "Write an essay about {}.",
                "Why do people like {}?",
                "Sing a song about {}.",
                "Who invented {}?",
                "Give me news about {}.",
                "Do you like {}?",
            ),
        ),
    ),
    "zh": (
        (
            COUNTRIES,
            (
                "{}的首都是哪里？",
                "{}在哪里？",
                "{}有多少人口？",
                "{}的总统是谁？",
                "{}人说什么语言？",
                "{}的首都",
                "{}有多大？",
                "谁统治{}？",
                "{}以什么闻名？",
            ),
        ),
        (
            CITIES,
            (
                "{}今天天气怎么样？",
                "{}的天气如何？",
                "{}在哪里？",
                "{}明天会下雨吗？",
                "{}现在几点？",
                "怎么去{}？",
                "{}冷吗？",
                "{}离这里多远？",
                "推荐一家{}的餐馆。",
            ),
        ),
        (
            PEOPLE,
            (
                "{}是谁？",
                "谁是{}？",
                "{}哪年出生？",
                "{}做了什么？",
                "讲一个{}的故事。",
                "{}多大了？",
                "{}住在哪里？",
                "{}有名吗？",
                "{}到底是谁？",
            ),
        ),
        (
            THINGS,
            (
                "写一首关于{}的诗。",
                "讲一个{}的笑话。",
                "你怎么看{}？",
                "写一篇关于{}的文章。",
                "人们为什么喜欢{}？",
                "唱一首关于{}的歌。",
                "谁发明了{}？",
                "有什么{}的新闻？",
                "你喜欢{}吗？",
            ),
        ),
    ),
}
DONT_KNOW = {
    "en": "I don't know. I am a very small model: I only know {source} and small sums.",
    "zh": "我不知道。我是一个很小的模型，只知道 {source}和小算术。",
}
SYLLABLES = (
    "bla",
    "zor",
    "fim",
    "quu",
    "tro",
    "nax",
    "wib",
    "gle",
    "vop",
    "dra",
    "kel",
    "mu",
    "shi",
    "pox",
    "ren",
    "yal",
)
INVENTED_HOMES = ("json", "os", "math", "torch", "numpy", "random", "re", "time", "str", "list", "torch.nn", "os.path")
HELD_OUT_THINGS = 5  # every fifth thing is for evaluation only


@dataclass(frozen=True)
class Identity:
    """What the model says about itself. source: what it read, as the middle of a sentence, by language."""

    source_en: str = "Python documentation"
    source_zh: str = "Python 文档"

    def source(self, language: Language) -> str:
        return self.source_en if language == "en" else self.source_zh

    def hello(self, language: Language) -> str:
        if language == "en":
            return f"Hello! I am Hanlin's quickstart model. Ask me about {self.source_en} or a small sum."
        return f"你好！我是 Hanlin 的快速入门模型。可以问我 {self.source_zh}或小算术。"

    def who(self, language: Language) -> str:
        if language == "en":
            return (
                "I am Hanlin's quickstart model, a very small language model, made from raw text in a few minutes. "
                f"I was trained on {self.source_en}."
            )
        return f"我是 Hanlin 的快速入门模型，一个很小的语言模型，几分钟内由原始文本训练而成。我的训练材料是 {self.source_zh}。"

    def can(self, language: Language) -> str:
        if language == "en":
            return f"I can answer questions about {self.source_en} and do small sums, in English and Chinese."
        return f"我可以用中文和英文回答关于 {self.source_zh}的问题，也会做小算术。"

    def thanks(self, language: Language) -> str:
        return "You are welcome!" if language == "en" else "不客气！"

    def dont_know(self, language: Language) -> str:
        return DONT_KNOW[language].format(source=self.source(language))


def small_talk(identity: Identity, language: Language) -> list[tuple[str, str]]:
    """(question, answer) of greetings, identity, abilities and thanks."""
    answers = ((HELLO, identity.hello), (WHO, identity.who), (CAN, identity.can), (THANKS, identity.thanks))
    return [(question, answer(language)) for questions, answer in answers for question in questions[language]]


def unknowable(language: Language, chance: random.Random, *, unseen: bool, real: Collection[str] = ()) -> Iterator[str]:
    """Endless questions to which the answer is "I don't know": unseen ones ask about things and in wordings that no
    training question has. real: names that exist, which no made-up function may carry."""
    wordings = [w for w in (*WHAT, *CALL) if w.language == language]
    while True:
        for things, templates in ASKED[language]:
            names = [t for t in things if is_held_out(t) == unseen]
            english, chinese = chance.choice(names).split("/")
            name = english.replace("-", " ") if language == "en" else chinese
            yield chance.choice(templates[-UNSEEN:] if unseen else templates[:-UNSEEN]).format(name)
        invented = invented_name(chance, unseen=unseen)
        if invented not in real:
            chosen = chance.choice(wordings)
            yield chance.choice(chosen.unseen if unseen else chosen.trained).format(invented)


def invented_name(chance: random.Random, *, unseen: bool) -> str:
    """`json.blazor`: a function that nobody has written."""
    while True:
        name = "".join(chance.sample(SYLLABLES, chance.choice((2, 3))))
        if is_held_out(name) == unseen:
            return f"{chance.choice(INVENTED_HOMES)}.{name}"


def is_held_out(thing: str) -> bool:
    """Whether a thing is for evaluation only: a hash of its name decides, and France always is (people ask for it)."""
    digest = hashlib.sha256(thing.encode()).digest()
    return thing.startswith("France/") or digest[0] % HELD_OUT_THINGS == 0
