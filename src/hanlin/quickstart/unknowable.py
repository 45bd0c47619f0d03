"""What the model cannot know: capitals, weather, people, functions that nobody wrote. It says so, instead of inventing.

The things asked about are split by a hash, the wordings by their place in the list: what evaluation asks about never
stands in a training question.
"""

import hashlib
import random
from collections.abc import Collection, Iterator

from hanlin.quickstart.questions import CALL, UNSEEN, WHAT, Language

COUNTRIES = """
France/法国 Germany/德国 Italy/意大利 Spain/西班牙 Japan/日本 Brazil/巴西 Canada/加拿大 Egypt/埃及
India/印度 Kenya/肯尼亚 Mexico/墨西哥 Norway/挪威 Poland/波兰 Russia/俄罗斯 Sweden/瑞典 Turkey/土耳其
China/中国 Greece/希腊 Peru/秘鲁 Chile/智利 Cuba/古巴 Iran/伊朗 Nepal/尼泊尔 Vietnam/越南 Thailand/泰国
Austria/奥地利 Belgium/比利时 Denmark/丹麦 Finland/芬兰 Portugal/葡萄牙 Ireland/爱尔兰 Hungary/匈牙利
Morocco/摩洛哥 Nigeria/尼日利亚 Australia/澳大利亚 Argentina/阿根廷
"""
CITIES = """
Paris/巴黎 London/伦敦 Berlin/柏林 Rome/罗马 Madrid/马德里 Tokyo/东京 Beijing/北京 Shanghai/上海
Moscow/莫斯科 Cairo/开罗 Sydney/悉尼 Boston/波士顿 Chicago/芝加哥 Lima/利马 Oslo/奥斯陆 Vienna/维也纳
Athens/雅典 Delhi/德里 Seoul/首尔 Bangkok/曼谷 Dublin/都柏林 Prague/布拉格 Warsaw/华沙 Toronto/多伦多
Shenzhen/深圳 Hangzhou/杭州 Nanjing/南京 Chengdu/成都 Wuhan/武汉 Lisbon/里斯本
"""
PEOPLE = """
Einstein/爱因斯坦 Newton/牛顿 Mozart/莫扎特 Beethoven/贝多芬 Shakespeare/莎士比亚 Napoleon/拿破仑
Darwin/达尔文 Picasso/毕加索 Confucius/孔子 Gandhi/甘地 Lincoln/林肯 Galileo/伽利略 Plato/柏拉图
Aristotle/亚里士多德 Churchill/丘吉尔 Cleopatra/克利奥帕特拉 Columbus/哥伦布 Tesla/特斯拉 Edison/爱迪生
Chopin/肖邦 Bach/巴赫 Dante/但丁 Goethe/歌德 Tolstoy/托尔斯泰 Messi/梅西 Ronaldo/罗纳尔多 Kafka/卡夫卡
Caesar/凯撒 Socrates/苏格拉底 Madonna/麦当娜
"""
THINGS = """
love/爱情 football/足球 history/历史 cooking/做饭 music/音乐 politics/政治 medicine/医学 law/法律 war/战争
money/金钱 movies/电影 chess/国际象棋 coffee/咖啡 dinosaurs/恐龙 the-moon/月球 flowers/花 religion/宗教
travel/旅行 dogs/狗 cars/汽车 poetry/诗歌 painting/绘画 gold/黄金 tea/茶 dreams/梦 health/健康 wine/葡萄酒
fashion/时尚 volcanoes/火山 whales/鲸鱼
"""
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


def unknowable(language: Language, chance: random.Random, *, unseen: bool, real: Collection[str] = ()) -> Iterator[str]:
    """Endless questions to which the answer is "I don't know": unseen ones ask about things and in wordings that no
    training question has. real: names that exist, which no made-up function may carry."""
    wordings = [w for w in (*WHAT, *CALL) if w.language == language]
    while True:
        for things, templates in ASKED[language]:
            names = [t for t in things.split() if is_held_out(t) == unseen]
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
