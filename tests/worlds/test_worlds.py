"""The worlds' generators, verifiers, tokenizer and base models."""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.graders.grade import Grading
from gruppo.policies.token import TokenPolicy
from gruppo.types import Group, GruppoError, Path, Task
from gruppo.worlds import WORLDS, arithmetic, countdown
from gruppo.worlds.problems import TRIES, is_held_out
from gruppo.worlds.tokenizer import END, tokenizer
from gruppo.worlds.world import Shape, World, answer_of, texts

# Conversations and pictures have files of their own.
NAMES = sorted(name for name, world in WORLDS.items() if isinstance(world, World) and world.talk is None)
NUMBERS = ["arithmetic", "countdown"]  # worlds of numbers, whose completions are one thought and one answer
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(text: str) -> int:
    """An evaluator that shares no code with the worlds."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return int(node.value)

    return walk(ast.parse(text.strip(), mode="eval").body)


def graded(world: str, text: str, task: Task) -> dict[str, float]:
    path = Path(torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.ones(1, dtype=torch.bool), output=text)
    found = Grading(WORLDS[world].graders(), dict(WORLDS[world].weights))([Group(task, [path])])[0].signals
    return {name: float(v[0]) for name, v in found.items()}


# -- generators


@pytest.mark.parametrize("name", NAMES)
def test_a_task_depends_on_seed_and_index_alone(name):
    world = WORLDS[name]
    ahead = [world.task(3, i) for i in range(20)]
    assert [world.task(3, i) for i in reversed(range(20))] == ahead[::-1]
    assert [world.task(4, i) for i in range(20)] != ahead
    assert len({world.key(t) for t in ahead}) > 15


@pytest.mark.parametrize("name", NAMES)
def test_no_training_task_is_a_held_out_one(name):
    world = WORLDS[name]
    held = {world.key(t) for t in world.held_out(200)}
    assert len(held) == 200
    assert held.isdisjoint(world.key(world.task(seed, i)) for seed in range(2) for i in range(400))
    assert all(map(is_held_out, held))


@pytest.mark.parametrize("name", NAMES)
def test_held_out_is_fixed_and_grows_at_its_end(name):
    assert WORLDS[name].held_out(30)[:10] == WORLDS[name].held_out(10)


@pytest.mark.parametrize(
    ("held", "ask", "sentence"),
    [
        (True, lambda world: world.task(0, 0), "1 of them different, and all are held out, so there is nothing to train on"),
        (False, lambda world: world.held_out(1), "1 of them different, and none is held out, so there is nothing to evaluate on"),
    ],
    ids=["only held-out", "none held out"],
)
@pytest.mark.parametrize("name", ["arithmetic", "glyphs"])
def test_a_world_with_problems_on_one_side_only_says_so_and_ends(name, held, ask, sentence):
    world = WORLDS[name]
    only = world.held_out(1)[0] if held else world.task(0, 0)
    with pytest.raises(GruppoError, match=f"{TRIES} problems of the world {name} were drawn, {sentence}"):
        ask(replace(world, problem=lambda random: only))


def test_the_same_question_in_another_order_is_on_the_same_side():
    def asked(text):
        return Task([{"role": "user", "content": text}])

    assert arithmetic.key(asked("34+27-15=?")) == arithmetic.key(asked("27+34-15=?")) != arithmetic.key(asked("34+15-27=?"))
    a, b = (Task("", extra={"numbers": n, "target": 24}) for n in ([3, 8, 1], [1, 3, 8]))
    assert countdown.key(a) == countdown.key(b)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_level_occurs_and_counts_the_numbers(name):
    seen = [WORLDS[name].task(0, i) for i in range(300)]
    for level in (1, 2, 3):
        some = [t for t in seen if t.extra["difficulty"] == level]
        assert len(some) > 60
        assert all(len(re.findall(r"\d+", t.prompt[0]["content"].split(" make ")[0])) == level + 1 for t in some)


def test_arithmetic_answers_and_steps_agree_with_another_evaluator():
    for i in range(500):
        task = WORLDS["arithmetic"].task(1, i)
        assert value(task.prompt[0]["content"].removesuffix("=?")) == int(task.answer)
        lines = re.findall(r"<think>(.*)</think>", task.extra["solution"], re.DOTALL)[0].split("\n")
        assert all(value(left) == int(right) for left, right in (line.split("=") for line in lines))
        assert lines[-1].endswith("=" + task.answer)
        assert len(lines) == task.extra["difficulty"]


def test_countdown_answers_and_steps_agree_with_another_evaluator():
    for i in range(300):
        task = WORLDS["countdown"].task(1, i)
        assert value(task.answer) == task.extra["target"]
        assert sorted(map(int, re.findall(r"\d+", task.answer))) == sorted(task.extra["numbers"])
        for line in countdown.solution_of(task):
            left, right = line.split("=")
            assert value(left) == int(right)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_solution_earns_full_reward_and_hints_do_not_hold_it(name):
    for i in range(100):
        task = WORLDS[name].task(2, i)
        assert graded(name, task.extra["solution"], task) == {"correct": 1, "format": 1, "reward": pytest.approx(1.1)}
        assert len(task.extra["hints"]) >= 3
        assert len(set(task.extra["hints"])) == len(task.extra["hints"])


@pytest.mark.parametrize("index", range(40))
def test_no_arithmetic_hint_states_the_last_result(index):
    task = WORLDS["arithmetic"].task(5, index)
    last = task.extra["solution"].partition("</think>")[0].split("\n")[-1].removeprefix("<think>")
    assert all(last not in hint for hint in task.extra["hints"])


def test_countdown_has_several_distinct_answers_for_most_problems_of_three_and_four_numbers():
    tasks = [t for t in WORLDS["countdown"].held_out(30) if t.extra["difficulty"] > 1]
    ways = [countdown.solutions(t.extra["numbers"], t.extra["target"]) for t in tasks]
    assert sum(len(w) > 1 for w in ways) / len(ways) > 0.7
    for task, some in zip(tasks, ways):
        assert all(countdown.reaches(w, task) for w in some)


def test_countdown_lists_the_ways_once():
    assert countdown.solutions([2, 3], 6) == {"2*3"}
    assert countdown.solutions([1, 2, 3], 6) == {
        *("2*3", "(1+2)+3", "2+(1+3)", "1+(2+3)"),
        *("(1*2)*3", "2*(1*3)", "1*(2*3)"),
    }


# -- verifiers


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>46</answer>", True),
        ("<answer> 46 </answer>", True),
        ("<answer>046</answer>", True),
        ("<answer>46.0</answer>", False),
        ("<answer>45</answer><answer>46</answer>", False),  # hedging
        ("<answer>46</answer><answer>45</answer>", False),
        ("<answer>46 or 45</answer>", False),
        ("<answer>+46</answer>", False),
        ("<answer>34+12</answer>", False),
        ("<answer>４６</answer>", False),  # digits of another script
        ("<answer></answer>", False),
        ("</answer>46<answer>", False),
        ("46", False),
        ("<answer>46", False),
        ("<answer>" + "9" * 5000 + "</answer>", False),
        ("", False),
    ],
)
def test_arithmetic_verifier(text, right):
    task = arithmetic.task_of([("+", 34), ("+", 27), ("-", 15)])
    assert task.answer == "46"
    assert graded("arithmetic", text, task)["correct"] == right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("3*8", True),
        ("8*3", True),
        ("(8)*((3))", True),
        (" 3 * 8 ", True),
        ("(7-4)*8", True),
        ("8*(7-4)", True),
        ("3*(8+7-7)", False),  # 7 twice
        ("24", False),  # not a given number
        ("3*8*1", False),
        ("4*(7-1)", False),
        ("3*8=24", False),
        ("3**8", False),
        ("3* *8", False),
        ("3 8", False),
        ("--3*8", False),
        ("-3*-8", False),
        ("+3*8", False),
        ("3*8+", False),
        ("(3*8", False),
        ("3*8)", False),
        ("()", False),
        ("", False),
        ("3(8)", False),
        ("3*8 or 7", False),
        ("0x18", False),
        ("3*８", False),
        ("3×8", False),
        ("48/2", False),
        ("3*8#", False),
        ("3*8\n+4", False),
        ("__import__('os')", False),
        ("(" * 150 + "3*8" + ")" * 150, False),
        ("(" * 90 + "3*8" + ")" * 90, True),
        ("9" * 199, False),
    ],
)
def test_countdown_verifier(said, right):
    task = countdown.task_of([3, 8, 7, 4], 24, [("", 3), ("*", 8)])
    assert countdown.reaches(said, task) == right


def test_a_number_given_twice_may_be_used_twice():
    task = countdown.task_of([5, 5, 2], 27, [("", 5), ("*", 5), ("+", 2)])
    assert countdown.reaches("5*5+2", task)
    assert not countdown.reaches("5*5+2", countdown.task_of([5, 6, 2], 27, [("", 5), ("*", 5), ("+", 2)]))


def test_countdown_evaluator_agrees_with_python_on_random_expressions():
    random = Random(0)

    def grow(depth: int) -> str:
        if depth == 0 or random.random() < 0.3:
            return str(random.randint(0, 99))
        return f"{random.choice(['', '('])}{grow(depth - 1)}{random.choice('+-*')}{grow(depth - 1)}"

    for _ in range(300):
        text = grow(3)
        text += ")" * (text.count("(") - text.count(")"))
        found = countdown.evaluate(text)
        if len(text) <= countdown.LONGEST and not re.search(r"(?<!\d)0\d", text):
            assert found is not None
            assert found[0] == value(text)
            assert sorted(found[1]) == sorted(map(int, re.findall(r"\d+", text)))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("<think></think><answer></answer>", True),
        ("<think>a\nb</think><answer>b</answer>", True),
        ("x<think>a</think><answer>b</answer>", False),
        ("<think>a</think> <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> ", False),
        ("<think>a<think>b</think><answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("", False),
    ],
)
def test_format(text, holds):
    assert Shape.holds(text) == holds


def test_answer_of_wants_each_tag_once_and_in_order():
    assert answer_of("x<answer>7</answer>y") == "7"
    assert answer_of("</answer>7<answer>") is None
    assert answer_of("<answer>7</answer></answer>") is None


# -- tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_all_text_of_a_world_comes_back_from_its_tokens(name):
    words = AutoTokenizer.from_pretrained(WORLDS[name].base)
    for text in [*texts([WORLDS[name].task(0, i) for i in range(50)]), "é 你好 🙂\t\r\n  two  spaces "]:
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_tokenizer_is_the_one_the_code_makes(name):
    made, shipped = tokenizer(), AutoTokenizer.from_pretrained(WORLDS[name].base)
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template
    assert shipped.eos_token == END


def test_tags_are_one_token_each_and_survive_decoding_without_special_tokens():
    words = tokenizer()
    ids = words("<think></think><answer></answer>")["input_ids"]
    assert len(ids) == 4
    assert words.decode([*ids, words.eos_token_id], skip_special_tokens=True) == "<think></think><answer></answer>"


def test_the_chat_template_opens_the_assistants_turn_and_ends_each_turn_with_eos():
    words = tokenizer()
    turn = [{"role": "user", "content": "1+1=?"}]
    text = words.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>1+1=?<|end|><|assistant|>"
    whole = words.apply_chat_template([*turn, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == text + "2<|end|>"
    assert words(text, add_special_tokens=False)["input_ids"].count(words.eos_token_id) == 1


# -- base models


@pytest.fixture(scope="module", params=NAMES)
def base(request):
    world = WORLDS[request.param]
    model = AutoModelForCausalLM.from_pretrained(world.base)
    return world, TokenPolicy(
        model, AutoTokenizer.from_pretrained(world.base), max_new=world.defaults["policy"]["max_new_tokens"]
    )


def test_a_base_model_is_a_float32_folder_of_at_most_four_megabytes(base):
    world, policy = base
    assert sum(f.stat().st_size for f in world.base.iterdir()) <= 4 * 2**20
    assert next(policy.model.parameters()).dtype == torch.float32


def test_a_base_model_has_one_eos_and_ends_by_itself(base):
    world, policy = base
    assert policy.eos == [policy.tokenizer.convert_tokens_to_ids(END)]
    paths = policy.sample([t.prompt for t in world.held_out(40)], g=torch.Generator().manual_seed(0))
    assert sum(p.truncated for p in paths) <= 10  # a search of countdown may go on for too long; arithmetic ends
    assert all(int(p.steps[-1]) == policy.eos[0] for p in paths if not p.truncated)


def test_a_base_model_has_room_to_learn_and_something_to_learn_from(base):
    world, policy = base
    if "correct" not in getattr(world.verify[0], "signals", ("correct",)):
        pytest.skip(f"nothing is right or wrong in the world {world.name}")
    tasks = [t for t in world.held_out(60) for _ in range(4)]
    paths = policy.sample([t.prompt for t in tasks], g=torch.Generator().manual_seed(1))
    right = [float(world.verify[0].one(p.output, t)) for p, t in zip(paths, tasks)]
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / 60)  # as if the four samples of a task were one: wider than the truth
    assert share + 2 * error >= 0.20
    assert share - 2 * error <= 0.55
    solved = [any(right[i : i + 4]) for i in range(0, len(right), 4)]
    assert sum(solved) / len(solved) > share + 0.1  # the groups differ within themselves


def test_a_base_model_keeps_the_form(base):
    world, policy = base
    if world.name not in NUMBERS:
        pytest.skip(f"the world {world.name} does not ask for this form")
    paths = policy.sample([t.prompt for t in world.held_out(60)], g=torch.Generator().manual_seed(2))
    assert sum(Shape.holds(p.output) for p in paths) >= 54


@pytest.mark.parametrize("name", NAMES)
def test_building_twice_gives_the_same_bytes(name, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = replace(WORLDS[name], course=tuple(replace(p, step_tokens=512) for p in WORLDS[name].course))
        for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
            torch.manual_seed(ord(folder))  # the global generator must not matter
            world.build(tmp_path / folder, seed=seed, log=lambda line: None, steps=3)
    finally:
        torch.set_num_threads(threads)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()
