"""A reward model as others read it and as a reward: padding, packing, transformers, text through its own template."""

import pytest
import torch

from hanlin.align.build import save_model_folder, with_token_ids
from hanlin.align.reward import add_reward_head, answer_rewards
from hanlin.align.reward_export import export_reward_model, is_foreign, load_reward_model
from hanlin.align.reward_model import ModelReward, ProcessReward, split_steps, step_ends
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, write_json
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
from hanlin.models.families import find_family
from hanlin.tokens import Tokenizer


def random_model(
    tokenizer, family: str = "llama", *, tied: bool = False, steps: bool = False, seed: int = 0
) -> Transformer:
    config = ModelConfig.uniform(
        family, depth=2,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16, **find_family(family, "test").attention_traits()),
        feed_forward=FeedForwardConfig(48), vocab_size=tokenizer.size, width=32, max_positions=96, tied_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(with_token_ids(config, tokenizer))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    add_reward_head(model, steps=steps, seed=seed)
    return model.eval()


def random_rows(count: int, seed: int = 0, *, longest: int = 40) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=chance).tolist()
    return [torch.randint(1, 300, (length,), generator=chance).tolist() for length in lengths]


def sample(prompt: list[int], ids: list[int], text: str = "", question: str = "") -> Sample:
    return Sample(Prompt(tuple(prompt), question, {}), ids, text, [0.0] * len(ids), [True] * len(ids))


def alone(model: Transformer, ids: list[int]) -> float:
    """The reward by the plain definition: one text, no padding, the last hidden state times the weight."""
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), logits=None).hidden[0, -1]
        return float(hidden @ model.reward.classifier.weight[0])


def test_packed_padded_and_permuted_answers_have_the_reward_that_they_have_alone(tokenizer):
    """fp64: 1e-12, whatever stands beside or behind an answer."""
    model = random_model(tokenizer).double()
    rows = random_rows(12)
    expected = torch.tensor([alone(model, row) for row in rows], dtype=torch.float64)
    for tokens in (8192, 50):
        found = ModelReward(model, tokenizer, tokens=tokens).score(rows)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    order = torch.randperm(len(rows)).tolist()
    found = ModelReward(model, tokenizer).score([rows[place] for place in order])
    assert torch.allclose(found, expected[order], rtol=0, atol=1e-12)
    for pad in (0, 7):  # a row of its own, with much padding behind
        groups = [
            [Example(row, [False] * (len(row) - 1) + [True], "x", {"place": float(i)})] for i, row in enumerate(rows)
        ]
        batch = PackedExamples(groups, seq_len=64, rows_per_step=12, seed=1, pad_id=pad, pack=False).batch(0)
        with torch.no_grad():
            rewards = answer_rewards(model, batch)
        assert torch.allclose(rewards, expected[batch.of_sequences("place").long()], rtol=0, atol=1e-12)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_the_same_scores_whichever_side_is_padded(tokenizer, tmp_path, family, tied):
    """Parity with AutoModelForSequenceClassification, fp32, 1e-5; and what it saved is read back here."""
    from transformers import AutoModelForSequenceClassification

    model = random_model(tokenizer, family, tied=tied)
    export_reward_model(model, tokenizer, tmp_path / "theirs")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.num_labels == 1
    rows = random_rows(6, seed=3)
    longest = max(map(len, rows))
    ours = ModelReward(model, tokenizer).score(rows)
    for left in (False, True):
        ids = torch.full((len(rows), longest), tokenizer.pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            scores = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
        assert torch.allclose(scores, ours, atol=1e-5)
    theirs.save_pretrained(tmp_path / "saved")
    for folder in ("theirs", "saved"):
        assert is_foreign(tmp_path / folder)
        again = load_reward_model(tmp_path / folder)
        assert torch.allclose(ModelReward(again, tokenizer).score(rows), ours, atol=1e-6)


def test_its_own_folder_is_read_back_bit_for_bit(tokenizer, tmp_path):
    model = random_model(tokenizer)
    save_model_folder(model, tokenizer, tmp_path / "rm")
    assert not is_foreign(tmp_path / "rm")
    rows = random_rows(5)
    assert torch.equal(ModelReward(tmp_path / "rm").score(rows), ModelReward(model, tokenizer).score(rows))


def test_folders_that_hold_no_reward_model_are_refused(tokenizer, tmp_path):
    plain = random_model(tokenizer)
    del plain.reward
    save_model_folder(plain, tokenizer, tmp_path / "plain")
    with pytest.raises(HanlinError, match="no reward head"):
        ModelReward(tmp_path / "plain")
    with pytest.raises(HanlinError, match="one of steps"):
        ModelReward(random_model(tokenizer, steps=True), tokenizer)
    with pytest.raises(HanlinError, match="one of whole answers"):
        ProcessReward(random_model(tokenizer), tokenizer)
    with pytest.raises(HanlinError, match="needs a tokenizer"):
        ModelReward(random_model(tokenizer))
    model = random_model(tokenizer)
    export_reward_model(model, tokenizer, tmp_path / "two")
    assert hasattr(model, "reward")
    config = read_json(tmp_path / "two" / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    write_json(tmp_path / "two" / "config.json", {**config, "architectures": ["LlamaForTokenClassification"]})
    with pytest.raises(HanlinError, match="no other head"):
        load_reward_model(tmp_path / "two")


def test_a_tokenizer_that_pads_with_the_end_token_is_refused_for_export(tokenizer, tmp_path):
    class Ending:
        pad_id, stop_ids = 3, (3,)

    with pytest.raises(HanlinError, match="one token too early"):
        export_reward_model(random_model(tokenizer), Ending(), tmp_path / "x")


def test_as_a_reward_it_reads_the_policys_tokens_and_not_their_text(tokenizer):
    model = random_model(tokenizer).double()
    prompt = tokenizer.chat([{"role": "user", "content": "What is two plus two?"}])
    odd = [tokenizer.encode(letter)[0] for letter in "four"]  # one token a letter, as no encoder would write it
    assert tokenizer.decode(odd) == "four" and tokenizer.encode("four") != odd
    reward = ModelReward(model, tokenizer)
    (found,) = reward([sample(prompt, odd, "four", "What is two plus two?")])
    assert found == pytest.approx(alone(model, [*prompt, *odd]), abs=1e-12)
    assert reward([]) == []


def test_a_policy_with_another_tokenizer_is_read_through_the_reward_models_template(tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("what is this? 12345 " * 50)
    other = Tokenizer.train([tmp_path / "other.txt"], vocab_size=280)
    model = random_model(tokenizer).double()
    question, text = "What is two plus two?", "Two plus two is four."
    reward = ModelReward(model, other, own=tokenizer)
    (found,) = reward([sample([1, 2, 3], [4, 5], text, question)])
    save_model_folder(model, tokenizer, tmp_path / "rm")  # a folder brings the reward model's own tokenizer
    assert ModelReward(tmp_path / "rm", other)([sample([1, 2, 3], [4, 5], text, question)]) == [found]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    chat = tokenizer.chat_trained(turns)
    ends = max(place for place, trained in enumerate(chat.trained) if trained) + 1
    assert chat.ids[ends - 1] in tokenizer.stop_ids
    assert found == pytest.approx(alone(model, chat.ids[:ends]), abs=1e-12)


def test_what_is_too_long_for_the_reward_model_is_refused(tokenizer):
    reward = ModelReward(random_model(tokenizer), tokenizer)
    with pytest.raises(HanlinError, match=r"answer 1 has 100 tokens with its prompt; the reward model knows 96"):
        reward([sample([1, 2], [3]), sample([1] * 50, [2] * 50)])
    with pytest.raises(HanlinError, match="nothing to score"):
        reward.score([[1]])


def test_steps_are_scored_as_each_prefix_alone(tokenizer):
    """fp64: the chance at each step's end is that of the text up to there, 1e-12."""
    model = random_model(tokenizer, steps=True).double()
    torch.nn.init.normal_(model.reward.classifier.bias)
    reward = ProcessReward(model, tokenizer)
    prompt = tokenizer.chat([{"role": "user", "content": "2 + 2 + 2?"}])
    texts = ["2 + 2 = 4\n4 + 2 = 6\n\n6", "", "6", "\n\n"]
    found = reward([sample(prompt, [1], text) for text in texts])
    assert [len(steps) for steps in found] == [3, 0, 1, 0]
    ids = list(prompt)
    for step, chance in zip(split_steps(texts[0]), found[0], strict=True):
        ids += tokenizer.encode(step + "\n")
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), logits=None).hidden[0, -1]
            logits = model.reward.classifier(hidden)
        assert chance == pytest.approx(float(torch.softmax(logits, -1)[1]), abs=1e-12)


def test_the_policys_tokens_at_which_steps_end_are_found(tokenizer):
    for text in ("one\ntwo\n\nthree", "一步。\n两步。\n", "alone", "", "\n", "a\n \nb"):
        ids = [*tokenizer.encode(text), tokenizer.stop_ids[0]]
        ends = step_ends(tokenizer, ids)
        assert len(ends) == len(split_steps(text))
        shown = [tokenizer.decode(ids[: end + 1]) for end in ends]
        for step, until in zip(split_steps(text), shown, strict=True):
            assert until.strip().endswith(step.strip())
        assert all(
            tokenizer.decode(ids[:end]).count("\n") <= until.count("\n") for end, until in zip(ends, shown, strict=True)
        )
