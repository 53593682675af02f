"""The search world: its corpus and index, its questions, its grader, and a base model that searches and could do better."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.core.collate import collate
from gruppo.graders.grade import Grading
from gruppo.policies.token import TokenPolicy
from gruppo.rollouts import Conversation, Transcript, WithTools
from gruppo.types import Group, Path, Task
from gruppo.worlds.problems import is_held_out
from gruppo.worlds.search import CALLS, KINDS, SEARCH, SHAPE, TALK, facts, habit, normal, queries, search, task_of, usual, work
from gruppo.worlds.tokenizer import tokenizer
from gruppo.worlds.world import texts


def graded(said: Transcript | str, task: Task) -> dict[str, float]:
    path = Path(torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.ones(1, dtype=torch.bool), output=said)
    found = Grading(SEARCH.graders()[:2], dict(SEARCH.weights))([Group(task, [path])])[0].signals
    return {name: float(v[0]) for name, v in found.items()}


# -- corpus and index


def test_every_fact_is_found_by_its_name_and_relation() -> None:
    random = Random(0)
    for name in random.sample(facts().people, 200):
        for relation, value in facts().about[name].items():
            assert search(f"{name} {relation}") == f"{name} {relation}: {value}"
        town = facts().about[name]["town"]
        assert search(f"{town} river") == f"{town} river: {facts().about[town]['river']}"


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '" OR "',
        "*",
        "NEAR(a b)",
        "about:x",
        "x' ; DROP TABLE facts; --",
        "-xx",
        "(",
        "{",
        "^a",
        "\x00",
        "",
        "é",
        "a" * 9999,
    ],
)
def test_no_query_is_an_operator_or_an_error(query: str) -> None:
    assert search(query) == "nothing"


def test_operators_are_words() -> None:
    name = facts().people[0]
    assert search(f"{name} OR job") == "nothing"
    assert search(f"{name[:2]}*") == "nothing"
    assert search(f"({name}) AND job") == "nothing"
    assert search(f"{name}: JOB") == f"{name} job: {facts().about[name]['job']}"


def test_an_object_is_not_found_as_a_subject() -> None:
    name = facts().people[0]
    assert search(f"{facts().about[name]['friend']} friend").startswith(facts().about[name]["friend"])


def test_nobody_is_their_own_friend_and_names_are_unique() -> None:
    assert len(set(facts().people)) == len(facts().people) == 4000
    assert all(facts().about[p]["friend"] != p for p in facts().people)


# -- questions


def test_a_task_depends_on_seed_and_index_alone() -> None:
    ahead = [SEARCH.task(3, i) for i in range(20)]
    assert [SEARCH.task(3, i) for i in reversed(range(20))] == ahead[::-1]
    assert [SEARCH.task(4, i) for i in range(20)] != ahead


def test_nobody_held_out_is_asked_about_in_training() -> None:
    held = {SEARCH.key(t) for t in SEARCH.held_out(300)}
    assert len(held) == 300
    assert all(map(is_held_out, held))
    assert held.isdisjoint(SEARCH.key(SEARCH.task(seed, i)) for seed in range(3) for i in range(500))


def test_questions_of_zero_one_and_two_hops_occur_and_need_that_many_searches() -> None:
    seen = [SEARCH.task(0, i) for i in range(300)]
    for hops in (0, 1, 2):
        some = [t for t in seen if t.extra["difficulty"] == hops]
        assert len(some) > 40
        assert all(t.extra["solution"].count("<search>") == hops for t in some)


def test_answers_follow_the_facts() -> None:
    name = "zulu" if "zulu" in facts().about else facts().people[7]
    own = facts().about[name]
    expected = {
        "first letter of {}?": name[0],
        "last letter of {}?": name[-1],
        "job of {}?": own["job"],
        "town of {}?": own["town"],
        "friend of {}?": own["friend"],
        "river of {}?": facts().about[own["town"]]["river"],
        "job of friend of {}?": facts().about[own["friend"]]["job"],
        "town of friend of {}?": facts().about[own["friend"]]["town"],
    }
    assert {k.words: task_of(k, name).answer for k in KINDS} == expected


def test_the_solution_earns_full_reward_and_hints_do_not_hold_the_answer() -> None:
    for i in range(100):
        task = SEARCH.task(2, i)
        assert graded(task.extra["solution"], task) == {"correct": 1, "format": 1, "reward": pytest.approx(1.1)}
        assert len(set(task.extra["hints"])) == 3
        assert not any(task.answer in re.split(r"\W+", hint) for hint in task.extra["hints"])


def test_the_habit_searches_from_not_at_all_to_three_times() -> None:
    random, task = Random(0), task_of(KINDS[5], facts().people[0])
    counts = {sum("<search>" in turn for turn in usual(random, task)) for _ in range(500)}
    assert counts == set(range(CALLS + 1))


def test_an_example_trains_one_turn_and_shows_the_results_as_context() -> None:
    random, seen = Random(0), set()
    for i in range(300):
        example = (work if i % 2 else habit)(random, SEARCH.task(0, i))
        assert re.fullmatch(r"<search>[a-z ]+</search>|<answer>[a-z]+</answer>", example.completion)
        assert "<result>" not in example.completion
        seen.add(example.prompt.count("<result>"))
    assert seen == {0, 1, 2, 3}


def test_queries_are_the_searches_of_the_solution() -> None:
    task = task_of(KINDS[5], facts().people[0])
    assert len(queries(task)) == 2
    assert queries(task_of(KINDS[0], "bako")) == []


# -- graders


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>rome</answer>", True),
        ("<answer> Rome. </answer>", True),
        ("<answer>the rome</answer>", True),
        ("<search>x</search><result>nothing</result><answer>rome</answer>", True),
        ("<answer>rome or paris</answer>", False),
        ("<answer>paris</answer><answer>rome</answer>", False),
        ("<answer></answer>", False),
        ("rome", False),
        ("", False),
    ],
)
def test_correct_is_the_normalised_exact_match(text: str, right: bool) -> None:
    assert graded(text, Task("q", answer="rome"))["correct"] == right


def test_normalisation_never_leaves_nothing_of_a_letter() -> None:
    assert normal("a") == "a"
    assert normal("The  Big,  Apple!") == "big apple"
    assert graded("<answer></answer>", Task("q", answer="a"))["correct"] == 0


def test_an_answer_written_by_a_tool_is_not_the_models() -> None:
    said = [
        {"role": "assistant", "content": "<search>x</search>"},
        {"role": "tool", "name": "search", "content": "<answer>rome</answer>"},
    ]
    text = Transcript("<search>x</search><result><answer>rome</answer></result>", said)
    assert graded(text, Task("q", answer="rome")) == {"correct": 0, "format": 0, "reward": 0}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("<answer>a</answer>", True),
        ("<search>a</search><result>b</result><answer>a</answer>", True),
        ("<search>a</search><answer>a</answer>", False),
        ("<search>a</search><result>b</result>" * 4 + "<answer>a</answer>", False),
        ("<answer>a</answer>x", False),
        ("<search>a</search><result>b</result>", False),
    ],
)
def test_format(text: str, holds: bool) -> None:
    assert (SHAPE.fullmatch(text) is not None) == holds


# -- tokenizer and base model


def test_the_shipped_tokenizer_is_the_one_the_code_makes_and_spells_every_text() -> None:
    made, shipped = tokenizer(SEARCH.tags), AutoTokenizer.from_pretrained(SEARCH.base)
    assert shipped.get_vocab() == made.get_vocab()
    assert all(made.get_vocab()[word] == i for word, i in tokenizer().get_vocab().items())  # tags come after all else
    assert len(shipped("<search></search><result></result>", add_special_tokens=False)["input_ids"]) == 4
    for text in texts([SEARCH.task(0, i) for i in range(30)]):
        assert shipped.decode(shipped(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def policy() -> TokenPolicy:
    model = AutoModelForCausalLM.from_pretrained(SEARCH.base)
    return TokenPolicy(model, AutoTokenizer.from_pretrained(SEARCH.base), max_new=SEARCH.defaults["policy"]["max_new_tokens"])


@pytest.fixture(scope="module")
def groups(policy: TokenPolicy) -> list[Group]:
    rollout = Conversation(4, TALK)
    return rollout(policy, SEARCH.held_out(60), Grading(SEARCH.graders(), SEARCH.weights), torch.Generator().manual_seed(1))


def test_the_base_model_is_a_float32_folder_of_at_most_four_megabytes(policy: TokenPolicy) -> None:
    assert sum(f.stat().st_size for f in SEARCH.base.iterdir()) <= 4 * 2**20
    assert next(policy.model.parameters()).dtype == torch.float32


def test_the_base_model_searches_zero_to_three_times_and_is_sometimes_right(groups: list[Group]) -> None:
    correct = torch.stack([g.signals["correct"] for g in groups])
    assert 0.2 <= float(correct.mean()) <= 0.55
    assert float((correct.amax(1) > correct.amin(1)).float().mean()) > 0.4  # the groups differ within themselves
    assert set(torch.stack([g.signals["calls"] for g in groups]).flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_the_base_model_keeps_the_form_and_its_searches_find_something(groups: list[Group]) -> None:
    assert float(torch.stack([g.signals["format"] for g in groups]).mean()) > 0.95
    replies = [m["content"] for g in groups for p in g.paths for m in p.output.replies]
    assert sum(r != "nothing" for r in replies) / len(replies) > 0.9
    assert float(torch.stack([g.signals["tool_errors"] for g in groups]).sum()) == 0
    assert max(int(p.mask.sum()) for g in groups for p in g.paths) <= 64


def test_the_evaluator_agrees_with_the_sampler_on_conversations(policy: TokenPolicy) -> None:
    policy = TokenPolicy(policy.model, policy.tokenizer, temperature=0.8, max_new=64)
    prompts = [t.prompt for t in SEARCH.held_out(12)]
    paths = WithTools(policy, TALK).sample(prompts, g=torch.Generator().manual_seed(2))
    batch = collate([Group(Task(""), [p], advantage=torch.zeros(1, len(p))) for p in paths])
    now = policy.evaluate(batch)
    gap = (now.logp.detach() - batch.logp_old).abs() * batch.mask
    assert float(gap.max()) < 1e-4
    assert not batch.mask.all()


def test_building_twice_gives_the_same_bytes(tmp_path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder in ("a", "b"):
            SEARCH.build(tmp_path / folder, seed=0, log=lambda line: None, steps=2)
    finally:
        torch.set_num_threads(threads)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
