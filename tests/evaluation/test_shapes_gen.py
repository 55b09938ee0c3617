"""Shapes-Gen's prompts."""

from collections import Counter

import pytest

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_gen import TASKS, gen_prompts, says
from spar.worlds.shapes.captions import check_words, to_text
from spar.worlds.shapes.detector import detect, satisfies
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import HELD_OUT_PAIRS, is_held_out


@pytest.fixture(scope="module", params=["seen", "held_out"])
def prompts(request):
    return request.param, gen_prompts(EvalOptions(combinations=request.param))


def test_there_are_a_hundred_a_task_and_they_are_true_of_their_scenes(prompts):
    combinations, asked = prompts
    assert Counter(prompt.task for prompt in asked) == {task.name: 100 for task in TASKS}
    for prompt in asked:
        assert check_words(prompt.text) and to_text(prompt.claim) == prompt.text
        assert is_held_out(prompt.scene) == (combinations == "held_out")
    for prompt in asked[::20]:
        assert satisfies(detect(render(prompt.scene)), prompt.claim)[0]


def test_held_out_prompts_name_what_is_held_out(prompts):
    combinations, asked = prompts
    named = [
        any((group.color, group.shape) in HELD_OUT_PAIRS for group in prompt.claim.groups)
        for prompt in asked
        if prompt.task != "position"
    ]
    assert all(named) if combinations == "held_out" else not any(named)


def test_what_a_task_asks_is_in_the_prompt(prompts):
    for prompt in prompts[1]:
        groups = prompt.claim.groups
        counts = {"single_object": (1,), "two_object": (1, 1), "colors": (1,), "position": (1, 1)}
        if prompt.task in counts:
            assert tuple(group.count for group in groups) == counts[prompt.task]
        if prompt.task == "counting":
            assert len(groups) == 1 and 2 <= groups[0].count <= 4
        if prompt.task == "color_attribution":
            assert groups[0].color != groups[1].color and groups[0].shape != groups[1].shape
        if prompt.task == "colors":
            assert prompt.claim.background is not None and groups[0].size is None
        assert says(prompt.claim, "color")
        assert says(prompt.claim, "position") == (prompt.task == "position")


def test_texts_come_once_where_there_are_enough():
    texts = {task.name: Counter() for task in TASKS}
    for prompt in gen_prompts(EvalOptions()):
        texts[prompt.task][prompt.text] += 1
    assert all(max(counts.values()) == 1 for counts in texts.values())


def test_a_limit_takes_the_first_of_the_same_prompts():
    every = [prompt for prompt in gen_prompts(EvalOptions()) if prompt.index < 3]
    assert gen_prompts(EvalOptions(limit=3)) == every
    assert gen_prompts(EvalOptions(limit=3, seed=9)) == every


def test_says_tells_what_is_left_unsaid():
    plain = next(prompt for prompt in gen_prompts(EvalOptions(limit=9)) if prompt.task == "color_attribution")
    assert not says(plain.claim, "size") and not says(plain.claim, "background") and says(plain.claim, "count")
