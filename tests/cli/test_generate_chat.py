"""`hanlin generate` and `hanlin chat` as a user runs them: pipes, flags, a terminal with Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from hanlin.cli import main
from hanlin.engine import Engine, SamplingParams
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, save_model
from hanlin.tokens import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过懒狗。世界你好！\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=330)
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "llama",
        depth=2,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(48),
        vocab_size=tokenizer.size,
        width=32,
        max_positions=4096,
    )
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    save_model(model, path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    with Engine.from_folder(folder, dtype="float32") as engine:
        return engine.generate("The quick", SamplingParams(temperature=0, max_tokens=20))[0]


def run(capfd, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_generate_prints_the_text_alone(folder, expected, capfd, stream):
    flags = ["--temperature", "0", "--max-tokens", "20", "--dtype", "float32", *stream]
    code, out, err = run(capfd, "generate", str(folder), "The quick", *flags)
    assert (code, out) == (0, expected.text + "\n")
    assert "tokens" in err
    assert run(capfd, "generate", str(folder), "The quick", *flags, "--quiet") == (0, expected.text + "\n", "")


def test_generate_json_has_everything(folder, expected, capfd):
    flags = ["--temperature", "0", "--max-tokens", "20", "--dtype", "float32", "--json", "--n", "2", "--logprobs", "3"]
    code, out, _ = run(capfd, "generate", str(folder), "The quick", *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["index"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["text"], row["token_ids"]) == (expected.text, expected.token_ids)
        assert [len(token["top"]) for token in row["logprobs"]] == [3] * len(expected.token_ids)


def test_generate_reads_stdin_and_repeats_with_a_seed(folder):
    command = [sys.executable, "-m", "hanlin", "generate", str(folder), "-", "--seed", "4", "--max-tokens", "9"]
    outputs = {
        subprocess.run(command, input="敏捷的", capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "0"], "top_p is 0.0"),
        (["--stream", "--n", "2"], "cannot be combined"),
        (["--logprobs", "2"], "needs --json"),
        (["--temprature", "1"], "--temperature"),
        (["--max-context", "2"], "context is 2"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_generate_explains_a_mistake(folder, capfd, flags, message):
    code, out, err = run(capfd, "generate", str(folder), "The quick brown fox", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_chat_answers_each_line_of_a_pipe(folder):
    lines = "你好\n/system Be brief.\nThe quick\n\n/reset\n/nonsense\nfox\n/quit\nnever read\n"
    command = [
        sys.executable,
        "-m",
        "hanlin",
        "chat",
        str(folder),
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--dtype",
        "float32",
    ]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stderr.count("tokens (") == 3
    assert "no /nonsense" in done.stderr
    with Engine.from_folder(folder, dtype="float32") as engine:
        told = [{"role": "system", "content": "Be brief."}]
        params = SamplingParams(max_tokens=5, temperature=0)
        expected = [
            engine.generate(messages, params)[0].text
            for messages in (
                [{"role": "user", "content": "你好"}],
                [*told, {"role": "user", "content": "The quick"}],
                [*told, {"role": "user", "content": "fox"}],
            )
        ]
    written = "".join(text + "\n" for text in expected)
    assert done.stdout == written.replace("\r\n", "\n").replace("\r", "\n")  # as reading in text mode has it


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(folder):
    command = [sys.executable, "-m", "hanlin", "chat", str(folder), "--max-tokens", "20", "--max-context", "100"]
    done = subprocess.run(
        [*command, "--ignore-eos"], input="The quick brown fox\n" * 6, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("20 tokens (length)") == 6
    assert "forgotten" in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_chat(folder):
    ours, theirs = pty.openpty()
    flags = ["--max-tokens", "3500", "--ignore-eos"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hanlin", "chat", str(folder), *flags],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, *, pressing_ctrl_c: bool = False) -> None:
        """Ctrl-C is pressed again after a second of silence, as a person would: readline may just be taking over."""
        nonlocal seen
        deadline = time.monotonic() + 60
        if pressing_ctrl_c:
            process.send_signal(signal.SIGINT)
        while text not in seen:
            assert time.monotonic() < deadline, seen[-500:]
            if select.select([ours], [], [], 1.0)[0]:
                seen += os.read(ours, 4096)
            elif pressing_ctrl_c:
                process.send_signal(signal.SIGINT)
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for(b"> ")
        os.write(ours, b"hello\n")
        wait_for(b"hello\r\n")
        while len(seen) < 40:
            seen += os.read(ours, 4096)
        wait_for(b"(stopped)", pressing_ctrl_c=True)
        wait_for(b"> ")
        wait_for(b"/quit leaves", pressing_ctrl_c=True)
        wait_for(b"> ")
        os.write(ours, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
