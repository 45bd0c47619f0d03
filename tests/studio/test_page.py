"""Chromium drives the chat page of a real server with a tiny random model."""

import json
import re
from pathlib import Path

import httpx
import pytest
import torch
from tests.serve.tiny import wait_until
from tests.studio.conftest import serve

from hanlin.models import load_model
from hanlin.tune import add_lora, save_lora

pytestmark = pytest.mark.browser

CARD = {"en": "A **tiny** model that knows nothing.", "zh": "一个什么都不懂的**小**模型。"}
EXAMPLES = {"en": ["Who are you?", "What is 2 + 3?"], "zh": ["你是谁？", "2 + 3 等于几？"]}


@pytest.fixture(scope="module")
def address(folder):
    models = (
        {"folder": str(folder), "name": "first", "card": CARD, "examples": EXAMPLES, "sampling": {"max_tokens": 60}},
        {"folder": str(folder), "name": "second", "card": "Another one.", "sampling": {"temperature": 0.0}},
        {"folder": str(folder), "name": "endless", "sampling": {"ignore_eos": True, "max_tokens": 90_000}},
    )
    with serve(*models) as address:
        yield address


class Visitor:
    """A page in a fresh browser context that notes everything that must not happen."""

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **context})
        self.page = self.context.new_page()
        self.address = address
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self._hear(message))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._see(request.url))
        self.page.on("websocket", lambda socket: self._see(socket.url.replace("ws://", "http://")))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        self.page.goto(address)
        self.page.wait_for_selector(".hl-welcome")

    def _hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _see(self, url):
        if not url.startswith((self.address, "data:", "blob:")):
            self.complaints.append(f"left this server: {url}")

    @property
    def input(self):
        return self.page.locator(".hl-field textarea").first

    def send(self, text):
        self.input.fill(text)
        self.page.locator(".hl-send:not(.hl-stop)").click()

    def wait_for_end(self, answers=1):
        self.page.wait_for_function(
            "n => document.querySelectorAll('.hl-answer').length === n && "
            "!document.querySelector('.hl-text.running') && "
            "[...document.querySelectorAll('.hl-figures')].every(line => line.textContent)",
            arg=answers,
            timeout=30_000,
        )

    def answer(self, number=-1):
        return self.page.locator(".hl-text").nth(number).evaluate("element => element.textContent")

    def figures(self):
        return self.page.locator(".hl-figures").last.text_content()

    def press(self, label):
        self.page.get_by_role("button", name=label, exact=True).first.click()

    def choose_model(self, name):
        self.page.get_by_label("Model").first.click()
        self.page.get_by_role("option", name=name).click()
        self.page.wait_for_selector(f".hl-model:has-text('{name}')")

    def questions(self):
        return self.page.locator(".hl-question").all_text_contents()

    def edit(self, number, text):
        self.page.locator(".hl-question-row").nth(number).hover()
        self.page.get_by_role("button", name="Edit").nth(number).click()
        field = self.page.locator(".hl-edit textarea").first
        field.fill(text)
        field.press("Enter")

    def turn_page(self, number, label):
        """◀ or ▶ of the page's n-th pager."""
        self.page.locator(".hl-pager").nth(number).get_by_role("button", name=label).click()

    def pages(self):
        return self.page.locator(".hl-page").all_text_contents()

    def save(self, label):
        """What the menu's entry downloads."""
        self.press("More")
        with self.page.expect_download() as download:
            self.page.locator(f".q-item:has-text('{label}')").click()
        return download.value

    def open_file(self, text):
        self.page.locator(".hl-upload input[type=file]").set_input_files(
            {"name": "talk.json", "mimeType": "application/json", "buffer": text.encode()}
        )

    def close(self):
        self.context.close()
        assert self.complaints == []


@pytest.fixture
def visit(browser, address):
    visitors = []

    def open_page(where=address, **context):
        visitors.append(Visitor(browser, where, **context))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.close()


def test_a_question_is_answered_with_tokens_and_figures(visit):
    visitor = visit()
    visitor.send("What does json.dumps do?")
    visitor.wait_for_end()
    assert visitor.page.locator(".hl-question").text_content() == "What does json.dumps do?"
    assert visitor.page.locator(".hl-text .t").count() > 3
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+", visitor.figures())
    assert visitor.input.input_value() == ""


def test_the_answer_streams(visit):
    visitor = visit()
    visitor.choose_model("endless")
    visitor.send("go on")
    lengths = set()
    for _ in range(200):
        length = len(visitor.answer())
        lengths.add(length)
        if len(lengths) > 5:
            break
        visitor.page.wait_for_timeout(30)
    assert len(lengths) > 5, lengths
    visitor.page.keyboard.press("Escape")
    visitor.wait_for_end()


def test_stop_ends_the_answer_and_keeps_what_is_there(visit, address):
    visitor = visit()
    visitor.choose_model("endless")
    visitor.send("go on")
    visitor.page.wait_for_function("document.querySelector('.hl-text')?.textContent.length > 20")
    assert not visitor.page.locator(".hl-send:not(.hl-stop)").is_visible()
    visitor.page.locator(".hl-stop").click()
    visitor.wait_for_end()
    assert "stopped" in visitor.figures() and len(visitor.answer()) > 20
    metrics = httpx.get(f"{address}/metrics").text
    assert 'vllm:num_requests_running{model_name="endless"} 0' in metrics


def test_chinese_is_sent_with_enter_but_not_while_it_is_composed(visit):
    visitor = visit(locale="zh-CN")
    visitor.input.fill("翰林院是什么？")
    for composing in ({"isComposing": True}, {"keyCode": 229}):
        visitor.input.dispatch_event("keydown", {"key": "Enter", "bubbles": True, **composing})
    visitor.page.wait_for_timeout(300)
    assert visitor.page.locator(".hl-question").count() == 0
    visitor.input.press("Shift+Enter")
    visitor.input.press_sequentially("第二行")
    visitor.input.press("Enter")
    visitor.wait_for_end()
    assert visitor.page.locator(".hl-question").text_content() == "翰林院是什么？\n第二行"
    assert "词元" in visitor.figures()


def test_the_pointer_shows_a_tokens_probability_and_its_rivals(visit):
    visitor = visit()
    visitor.send("hello")
    visitor.wait_for_end()
    card = visitor.page.locator(".hl-card")
    assert not card.is_visible()
    # The random model's answer may open with half a character or a control character, which take no room on the page.
    visitor.page.locator(".hl-text .t:visible").first.hover()
    visitor.page.wait_for_selector(".hl-card.shown")
    shares = [text.removesuffix(" %") for text in card.locator(".share").all_text_contents()]
    assert len(shares) >= 5 and card.locator(".row.chosen").count() >= 1
    values = [float(share.removeprefix("< ")) for share in shares[:5]]
    assert values == sorted(values, reverse=True) and sum(values) <= 100.5
    box = card.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    visitor.page.mouse.move(5, 5)
    visitor.page.wait_for_selector(".hl-card:not(.shown)", state="attached")


def test_colour_by_probability_can_be_switched(visit):
    visitor = visit()
    visitor.send("hello")
    visitor.wait_for_end()
    token = visitor.page.locator(".hl-text .s7, .hl-text .s6, .hl-text .s5").first
    colour = "element => getComputedStyle(element).backgroundColor"
    assert token.evaluate(colour) == "rgba(0, 0, 0, 0)"
    visitor.page.get_by_role("switch", name="Colour by probability").click()
    visitor.page.wait_for_selector(".hl-list.coloured")
    assert token.evaluate(colour) != "rgba(0, 0, 0, 0)"


def test_language_follows_the_browser_switches_and_is_remembered(visit):
    chinese = visit(locale="zh-CN")
    assert chinese.page.locator(".hl-greeting").text_content() == "想问点什么？"
    assert "什么都不懂" in chinese.page.locator(".hl-about").text_content()
    visitor = visit()
    assert visitor.page.locator(".hl-greeting").text_content() == "What would you like to ask?"
    assert visitor.page.locator(".hl-chip").all_text_contents() == EXAMPLES["en"]
    visitor.send("hello")
    visitor.wait_for_end()
    before = visitor.answer()
    visitor.press("切换到中文")
    visitor.page.wait_for_selector("[aria-label='重新回答']")
    assert visitor.answer() == before
    visitor.page.reload()
    visitor.page.wait_for_selector(".hl-greeting:has-text('想问点什么？')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_look_follows_the_system_switches_and_is_remembered(visit, scheme):
    visitor = visit(color_scheme=scheme)
    is_dark = "document.body.classList.contains('body--dark')"
    visitor.page.wait_for_function(f"{is_dark} === {str(scheme == 'dark').lower()}")
    background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    visitor.press("Light or dark")
    visitor.page.wait_for_function(f"{is_dark} === {str(scheme != 'dark').lower()}")
    assert visitor.page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    visitor.page.wait_for_function("document.cookie.includes('hanlin_look')")
    visitor.page.reload()
    visitor.page.wait_for_selector(".hl-welcome")
    visitor.page.wait_for_function(f"{is_dark} === {str(scheme != 'dark').lower()}")


def test_an_example_asks_and_a_new_conversation_begins_anew(visit):
    visitor = visit()
    visitor.page.locator(".hl-chip").first.click()
    visitor.wait_for_end()
    assert visitor.page.locator(".hl-question").text_content() == "Who are you?"
    visitor.send("and then?")
    visitor.wait_for_end(2)
    visitor.press("New conversation")
    visitor.page.wait_for_selector(".hl-welcome")
    assert visitor.page.locator(".hl-answer").count() == 0


def test_a_seed_repeats_and_answering_again_without_one_does_not(visit):
    visitor = visit()
    seed = visitor.page.get_by_role("spinbutton", name="Seed")
    seed.fill("7")
    seed.press("Tab")
    texts = []
    for again in range(3):
        if again == 2:
            seed.fill("")
            seed.press("Tab")
        if again:
            visitor.page.locator(".hl-answer").evaluate("element => element.classList.add('old')")
            visitor.press("Answer again")
            visitor.page.wait_for_selector(".hl-answer:not(.old)")
        else:
            visitor.send("say something")
        visitor.wait_for_end()
        texts.append(visitor.answer())
    assert texts[0] == texts[1] != texts[2]


def test_the_system_prompt_and_the_history_reach_the_model(visit):
    def ask(system, *questions):
        visitor = visit()
        visitor.choose_model("second")
        visitor.page.wait_for_selector(".hl-about:has-text('Another one')")
        if system:
            visitor.page.get_by_placeholder("None").fill(system)
        for count, question in enumerate(questions, 1):
            visitor.send(question)
            visitor.wait_for_end(count)
        return visitor.answer()

    plain = ask("", "hello")
    assert ask("", "hello") == plain  # greedy
    assert ask("Speak Chinese.", "hello") != plain
    assert ask("", "first of all", "hello") != plain


def test_a_message_longer_than_the_model_is_explained(visit):
    visitor = visit()
    visitor.send("fox " * 60_000)
    visitor.page.wait_for_selector(".hl-notice:has-text('too long')")
    visitor.send("hello")
    visitor.page.wait_for_selector(".hl-figures:has-text('tokens')")
    assert visitor.answer()


def test_a_closed_page_frees_its_place(browser, address):
    visitor = Visitor(browser, address)
    visitor.choose_model("endless")
    visitor.send("go on")
    visitor.page.wait_for_function("document.querySelector('.hl-text')?.textContent.length > 20")
    running = 'vllm:num_requests_running{model_name="endless"} '
    assert running + "1" in httpx.get(f"{address}/metrics").text
    visitor.close()
    wait_until(lambda: running + "0" in httpx.get(f"{address}/metrics").text, seconds=25)


def test_the_settings_slide_over_a_narrow_page_and_stand_beside_a_wide_one(visit):
    phone, desk = visit(viewport={"width": 390, "height": 720}), visit()
    temperature = ".hl-drawer [role=slider][aria-label=Temperature]"
    assert desk.page.locator(temperature).is_visible()
    phone.page.wait_for_timeout(300)
    assert not phone.page.locator(temperature).is_visible()
    phone.press("Settings")
    phone.page.wait_for_selector(temperature, state="visible")
    phone.press("Close")
    phone.page.wait_for_selector(temperature, state="hidden")


def test_markup_in_messages_stays_text(visit):
    visitor = visit()
    nasty = "<img src=x onerror=\"console.error('run')\"><b>bold</b>"
    visitor.send(nasty)
    visitor.wait_for_end()
    assert visitor.page.locator(".hl-question").text_content() == nasty
    assert visitor.page.locator(".hl-list img").count() == 0


@pytest.mark.parametrize("width", [340, 390, 768, 1440])
def test_nothing_sticks_out_at_any_width(visit, width):
    visitor = visit(viewport={"width": width, "height": 720})
    visitor.send("a" * 300)
    visitor.wait_for_end()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    for button in visitor.page.locator(".hl-header button").all():
        if button.is_visible():
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_an_earlier_question_can_be_edited_and_the_old_branch_stays(visit):
    visitor = visit()
    for count, question in enumerate(("one", "two 二", "three"), 1):
        visitor.send(question)
        visitor.wait_for_end(count)
    old = [visitor.answer(number) for number in range(3)]
    visitor.edit(1, "zwei 贰")
    visitor.page.wait_for_selector(".hl-question:has-text('zwei 贰')")
    visitor.wait_for_end(2)
    assert visitor.questions() == ["one", "zwei 贰"] and visitor.answer(0) == old[0] and visitor.pages() == ["2/2"]
    visitor.turn_page(0, "Previous version")
    visitor.page.wait_for_selector(".hl-question:has-text('three')")
    assert visitor.questions() == ["one", "two 二", "three"] and visitor.pages() == ["1/2"]
    assert [visitor.answer(number) for number in range(3)] == old
    visitor.turn_page(0, "Next version")
    visitor.page.wait_for_selector(".hl-question:has-text('zwei 贰')")
    visitor.send("four")
    visitor.wait_for_end(3)
    assert visitor.questions() == ["one", "zwei 贰", "four"]


def test_editing_can_be_given_up(visit):
    visitor = visit()
    visitor.send("one")
    visitor.wait_for_end()
    visitor.page.locator(".hl-question-row").hover()
    visitor.press("Edit")
    visitor.page.locator(".hl-edit textarea").first.fill("another")
    visitor.page.keyboard.press("Escape")
    visitor.page.wait_for_selector(".hl-question:has-text('one')")
    assert visitor.pages() == [] and visitor.page.locator(".hl-answer").count() == 1


def test_an_earlier_answer_can_be_given_again_and_both_stay(visit):
    visitor = visit()
    for count, question in enumerate(("one", "two"), 1):
        visitor.send(question)
        visitor.wait_for_end(count)
    first, second = visitor.answer(0), visitor.answer(1)
    visitor.press("Answer again")
    visitor.page.wait_for_function("document.querySelectorAll('.hl-question').length === 1")
    visitor.wait_for_end()
    again = visitor.answer()
    assert again != first and visitor.pages() == ["2/2"]
    visitor.turn_page(0, "Previous version")
    visitor.wait_for_end(2)
    assert (visitor.answer(0), visitor.answer(1)) == (first, second)


def test_two_models_stream_side_by_side_and_both_stop(visit, address):
    visitor = visit()
    visitor.choose_model("endless")
    visitor.press("Two models side by side")
    visitor.page.get_by_label("Second model").click()
    visitor.page.get_by_role("option", name="endless").click()
    visitor.page.wait_for_selector(".hl-models.two .hl-model:nth-child(2):has-text('endless')")
    visitor.send("go on")
    both = "n => { const all = [...document.querySelectorAll('.hl-text.running')].map(e => e.textContent.length);"
    both += " return all.length === 2 && Math.min(...all) > n; }"
    visitor.page.wait_for_function(both, arg=20)
    shortest = "Math.min(...[...document.querySelectorAll('.hl-text.running')].map(e => e.textContent.length))"
    visitor.page.wait_for_function(both, arg=visitor.page.evaluate(shortest) + 20)  # both go on
    assert 'num_requests_running{model_name="endless"} 2' in httpx.get(f"{address}/metrics").text
    left, right = (visitor.page.locator(".hl-answer").nth(n).bounding_box() for n in range(2))
    assert left["x"] + left["width"] <= right["x"] and abs(left["width"] - right["width"]) < 60
    visitor.page.locator(".hl-stop").click()
    visitor.wait_for_end(2)
    assert 'num_requests_running{model_name="endless"} 0' in httpx.get(f"{address}/metrics").text


def test_each_of_two_models_remembers_its_own_answers(visit):
    visitor = visit()
    visitor.press("Two models side by side")
    visitor.page.wait_for_selector(".hl-models.two")
    visitor.send("one")
    visitor.wait_for_end(2)
    assert visitor.page.locator(".hl-answerer").all_text_contents() == ["first", "second"]
    visitor.send("two")
    visitor.wait_for_end(4)
    visitor.page.get_by_role("button", name="Answer again").nth(1).click()  # the second model's first answer
    visitor.page.wait_for_function("document.querySelectorAll('.hl-question').length === 1")
    visitor.wait_for_end(2)
    assert visitor.pages() == ["2/2"]
    visitor.turn_page(0, "Previous version")
    visitor.wait_for_end(4)
    visitor.press("Two models side by side")
    visitor.page.wait_for_selector(".hl-models:not(.two)")
    assert visitor.page.locator(".hl-answer").count() == 2 and visitor.questions() == ["one", "two"]


def test_a_model_and_its_adapter_stand_side_by_side(browser, folder, tmp_path):
    adapter = add_lora(load_model(folder), rank=4)
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_lora(adapter, tmp_path / "pirate")
    settings = {"temperature": 0.0, "max_tokens": 30}
    offer = {"folder": str(folder), "name": "base", "sampling": settings}
    with serve(offer, adapters={"pirate": str(tmp_path / "pirate")}) as address:
        visitor = Visitor(browser, address)
        visitor.press("Two models side by side")
        visitor.page.wait_for_selector(".hl-models.two")
        visitor.send("你好 hello")
        visitor.wait_for_end(2)
        assert visitor.page.locator(".hl-answerer").all_text_contents() == ["base", "base + pirate"]
        assert visitor.answer(0) != visitor.answer(1)
        visitor.close()


def printable(text):
    """Without what HTML knows no way to hold, and a random model writes."""
    return "".join(sign for sign in text if sign.isprintable() and sign != "\ufffd")


def test_a_conversation_is_saved_and_opened_again(visit):
    visitor = visit()
    visitor.page.get_by_placeholder("None").fill("简短 please")
    visitor.send("one 一")
    visitor.wait_for_end()
    visitor.edit(0, "another")
    visitor.page.wait_for_selector(".hl-question:has-text('another')")
    visitor.wait_for_end()
    answer, figures = printable(visitor.answer()), visitor.figures()
    download = visitor.save("Save as JSON")
    assert re.fullmatch(r"hanlin-\d{8}-\d{6}\.json", download.suggested_filename)
    saved = Path(download.path()).read_text(encoding="utf-8")
    *asked, answered = json.loads(saved)["messages"]
    assert asked == [{"role": "system", "content": "简短 please"}, {"role": "user", "content": "another"}]
    assert answered["role"] == "assistant" and printable(answered["content"]) == answer
    readable = Path(visitor.save("Save as Markdown").path()).read_text(encoding="utf-8")
    assert "## User\n\nanother\n" in readable and "简短 please" in readable and answer in printable(readable)
    other = visit()
    other.open_file(saved)
    other.page.wait_for_selector(".hl-question:has-text('another')")
    assert printable(other.answer()) == answer and other.figures() == figures and other.pages() == ["2/2"]
    assert other.page.get_by_placeholder("None").input_value() == "简短 please"
    other.turn_page(0, "Previous version")
    other.page.wait_for_selector(".hl-question:has-text('one 一')")
    other.send("go on")
    other.wait_for_end(2)


def test_a_file_that_is_no_conversation_is_refused_kindly(visit):
    visitor = visit()
    visitor.open_file('[{"role": "tool", "content": "x"}]')
    visitor.page.wait_for_selector("text=This file cannot be opened. Message 0 has the role 'tool'")
    visitor.open_file('[{"role": "user", "content": "x"}]')
    visitor.page.wait_for_selector(".hl-question:has-text('x')")


def talk(*answers):
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return json.dumps(messages)


HOSTILE = (
    "<script>console.error('run')</script><img src=x onerror=console.error('run')>",
    "![spy](https://evil.example/a.png) [x](javascript:console.error('run'))",
    "```\"><img/src=x/onerror=console.error('run')>\n</code></pre><script>console.error('run')</script>\n```",
    "| <svg onload=console.error('run')> | b |\n|-|-|\n| <style>*{background:url(https://evil.example)}</style> | x |",
    "<iframe src=https://evil.example></iframe><link rel=stylesheet href=https://evil.example>",
)


def test_nothing_in_an_answer_runs_or_leaves_the_machine(visit):
    visitor = visit()
    visitor.open_file(talk(*HOSTILE))
    visitor.page.wait_for_function("document.querySelectorAll('.hl-answer').length === 5")
    visitor.page.get_by_role("switch", name="Colour by probability").click()
    visitor.page.wait_for_timeout(500)
    wild = "img, script, svg, style, iframe, link, [onerror], [onload], [href^='javascript' i]"
    assert visitor.page.locator(".hl-text").locator(wild).count() == 0
    for number, text in enumerate(HOSTILE):
        assert visitor.answer(number) == text


def test_the_browser_itself_is_told_to_fetch_nothing_from_elsewhere(visit):
    visitor = visit()
    blocked = """() => new Promise(resolve => {
      document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
      new Image().src = "https://evil.example/a.png";
    })"""
    assert visitor.page.evaluate(blocked) == "https://evil.example/a.png"
    visitor.page.wait_for_timeout(200)
    visitor.complaints.clear()  # the browser's own about what it blocked


def test_markdown_is_shown_with_its_marks_hidden_until_the_tokens_are_coloured(visit):
    visitor = visit()
    visitor.open_file(talk("# 标题\n\nSome **bold** text.\n\n- one\n- 二\n\n| a | b |\n|---|---|\n| 1 | 2 |"))
    text = visitor.page.locator(".hl-text")
    visitor.page.wait_for_selector(".hl-text h1")
    assert text.locator("strong").inner_text() == "bold" and text.locator("li").all_inner_texts() == ["one", "二"]
    assert text.locator("td:visible").all_inner_texts() == ["1", "2"] and "**" not in text.inner_text()
    visitor.page.get_by_role("switch", name="Colour by probability").click()
    visitor.page.wait_for_selector(".hl-list.coloured")
    assert "**bold**" in text.inner_text() and "|---|---|" in text.inner_text()


def test_code_is_highlighted_and_copied(visit):
    visitor = visit()
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f():\n    return '翰林'  # yes\n"
    visitor.open_file(talk(f"So:\n\n```python\n{code}```\nDone."))
    visitor.page.wait_for_selector(".md-fence")
    colours = {
        look: visitor.page.locator(f".md-fence .md-{look}").first.evaluate("e => getComputedStyle(e).color")
        for look in ("k", "s", "c", "f")
    }
    assert len(set(colours.values())) == 4
    visitor.page.locator(".md-copy").click()
    visitor.page.wait_for_selector(".md-copy.done")
    assert visitor.page.evaluate("navigator.clipboard.readText()") == code


def test_a_repeated_beginning_comes_from_the_cache_and_says_so(visit):
    visitor = visit()
    visitor.send("What does json.dumps do? 敏捷的棕色狐狸跳过了懒狗")
    visitor.wait_for_end()
    visitor.send("and then?")
    visitor.wait_for_end(2)
    prompt, cached = map(int, re.search(r"prompt (\d+), (\d+) cached", visitor.figures()).groups())
    assert 0 < cached < prompt


def test_the_door_asks_for_the_key_once(browser, folder):
    with serve({"folder": str(folder), "name": "m"}, api_key="开 sesame") as address:
        for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/anything"):
            response = httpx.get(address + path)
            assert response.status_code == 401 and "_nicegui" not in response.text
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.post(f"{address}/enter", content="x" * 10_000).status_code == 401
        for path in httpx.get(f"{address}/openapi.json").json()["paths"]:  # the interface asks for the key itself
            answer = httpx.post(address + path.replace("{", "").replace("}", ""), json={})
            assert not (answer.status_code == 401 and "text/html" in answer.headers["content-type"]), path
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        sockets = []
        page.on("websocket", lambda socket: sockets.append(socket.url))
        page.goto(address)
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button", name="Enter").click()
        page.wait_for_selector("text=That key is wrong.")
        assert sockets == []
        page.get_by_label("Key").fill("开 sesame")
        page.get_by_role("button", name="Enter").click()
        page.wait_for_selector(".hl-welcome")
        page.reload()
        page.wait_for_selector(".hl-welcome")
        cookies = {cookie["name"]: cookie for cookie in context.cookies()}
        assert cookies["hanlin_door"]["httpOnly"] and cookies["hanlin_door"]["sameSite"] == "Strict"
        assert "sesame" not in cookies["hanlin_door"]["value"]
        context.close()
