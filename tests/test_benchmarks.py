"""The benchmarks run to their last line: tiny, for what they measure is measured elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spar.recipes import recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"

TINY = ("--recipe", "tiny", "--device", "cpu")

pytestmark = pytest.mark.slow


def last_line(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_step_of_both_stages():
    found = last_line("train_step.py", *TINY, "--batch", "2", "--steps", "1", "--activation-checkpointing")
    assert [row["stage"] for row in found["results"]] == ["tokenizer-3", "unified-2"]
    for row in found["results"]:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]) and 0 < row["mfu"] < 1


def test_an_image_from_weights_held_in_two_ways():
    found = last_line("inference_memory.py", *TINY, "--steps", "2", "--way", "float32", "--way", "dtype")
    assert list(found["results"]) == ["float32", "dtype"]
    assert found["results"]["dtype"]["change_of_255"] == 0


def test_a_server_under_load():
    found = last_line("serve_load.py", "--seconds", "1", "--minutes", "0.03", "--clients", "3")
    assert found["first_image_s"] > 0 and found["ratio"] > 0 and found["batch_rows"] > 1
    for load in (found["one"], found["eight"], found["long"]):
        assert set(load["statuses"]) == {"200"} and load["p95_s"] >= load["p50_s"] > 0
    assert found["exit_status"] in (0, -15)


def test_joining_by_cost_is_no_slower_than_waiting_where_joining_at_once_is():
    found = last_line("joining_policies.py", "--requests", "100", "--rounds", "1")["results"]
    assert found["equal"]["large"]["0.7"]["by cost"] == {"p50": 1, "p95": 1}  # a step costs as much as its images
    assert found["equal"]["small"]["0.7"]["at once"]["p95"] > 2 > 1.1 > found["equal"]["small"]["0.7"]["by cost"]["p95"]
    assert found["mixed"]["small, no layouts"]["0.5"]["by cost"]["p95"] < 0.8


def test_requests_that_join_beside_requests_that_are_gathered():
    found = last_line("serve_joining.py", "--requests", "4", "--rounds", "1", "--steps", "2", "--load", "5")
    assert [*found["results"]] == ["equal", "mixed"] and found["clients"] == 16
    for one in found["results"].values():
        joined, gathered = one["joined"], one["gathered"]
        assert joined["p95_s"] >= joined["p50_s"] > 0 and joined["rows"] >= 1 <= gathered["rows"]
        assert one["p95_ratio"] == pytest.approx(joined["p95_s"] / gathered["p95_s"])


def test_the_cost_of_both_systems():
    found = last_line("two_systems.py", "--runs", "1", "--batch", "2")
    assert set(found["results"]) == {"spar", "dualtoken"}
    assert set(found["seconds_dualtoken_over_spar"]) == {"generate", "understand", "reconstruct"}
    for one in found["results"].values():
        assert one["parameters"] > 5e6 and one["peak_gib"] > 0.1
        assert all(value > 0 for values in one["seconds_per_image"].values() for value in values.values())


def test_the_cost_of_the_parts():
    found = last_line("cost_of_parts.py", "--recipe", "tiny", "--batch", "2", "--rounds", "1")["results"]
    assert [*found] == ["whole", "no pixel stream", "no semantic stream", "last layer"]
    whole = found.pop("whole")
    for one in found.values():
        assert one["parameters"] < whole["parameters"]
        assert all(one[name]["ratio"] > 0 for name in ("encode", "decode", "condition"))
    for stage in ("tokenizer-3", "unified-2"):
        assert found["no pixel stream"]["tflop_a_step"][stage] < whole["tflop_a_step"][stage]


def test_inference_beside_the_libraries_own():
    found = last_line("full_size_inference.py", "--recipe", "shapes", "--rounds", "1")
    assert [*found["results"]] == ["denoiser", "decoder", "encoder", "condition"]
    for one in found["results"].values():
        assert one["tflop"] > 0 and one["roofline_share"] > 0 and one["times_faster"] > 0
    image, seconds = found["image"], {name: one["seconds"] for name, one in found["results"].items()}
    assert image["seconds"] == pytest.approx(20 * seconds["denoiser"] + seconds["decoder"] + seconds["condition"])


def test_text_tokens_beside_the_librarys_own():
    found = last_line("text_tokens.py", "--layers", "1", "--new", "2", "--rounds", "1")
    assert [*found["results"]] == ["1", "8"]
    assert all(one["ratio"] > 0 and one["tokens_per_second"] > 0 for one in found["results"].values())


def test_the_samplers_approximations():
    found = last_line("approximations.py", "--limit", "1", "--rounds", "1")["results"]
    exact = found.pop("exact")
    assert (exact["blocks"], exact["change_of_255"], exact["times_faster"]) == (1, 0, 1)
    for one in found.values():
        assert one["blocks"] < 1 and 0 <= one["score"] <= 1 and one["images"] == 6 and one["denoiser_seconds"] > 0
    assert found["10 steps"]["blocks"] == 0.5 > found["10 steps, guidance 0.6:1"]["blocks"]


def test_early_exit_is_measured_way_by_way(tmp_path):
    sizes = ("--fit", "20", "--limit", "1", "--steps", "2", "--rounds", "1")
    first = last_line("early_exit.py", *sizes, "--way", "0")
    (tmp_path / "first.txt").write_text(f"a line before\n{json.dumps(first)}\n")
    both = last_line("early_exit.py", *sizes, "--way", "all after 2", "--add", str(tmp_path / "first.txt"))
    assert [*both["results"]] == ["0", "all after 2"]
    full, least = both["results"].values()
    assert {**first["results"]["0"]} == full and full["error"] == 0 and full["left_after"]["8"] == 1
    assert full["saved"] == pytest.approx(0, abs=0.002) and least["left_after"]["2"] == 1
    assert 0.5 < least["saved"] < 0.75 and least["error"] > 0 and least["operations"] == full["operations"]
    assert set(least["mean_layers"].values()) == {2} and len(least["right"]) == both["images"] == 6
    assert least["difference"]["value"] == least["score"] - full["score"] and 0 < both["llm_share"]["shapes"] < 0.2


def test_the_minutes_of_a_recipe():
    found = last_line("recipe_minutes.py", "--recipe", "tiny", "--steps", "3")
    assert [*found["results"]] == [stage.name for stage in recipe("tiny").stages]
    assert found["minutes"] == pytest.approx(sum(row["minutes"] for row in found["results"].values()))
    assert all(row["minutes"] == pytest.approx(row["seconds"] * 3 / 60) for row in found["results"].values())


def test_growth_has_the_slopes_of_its_structure():
    found = last_line("growth.py", "--recipe", "tiny", "--largest", "2", "--rounds", "1")["results"]
    assert len(found) == 7 and all(len(one["seconds"]) == len(one["sizes"]) for one in found.values())
    for name in ("batch, step", "steps, sampling", "side, decode"):
        assert found[name]["exponents"]["tflop"] == pytest.approx(1, abs=0.02)
    assert found["chat's tokens, reading"]["exponents"]["tflop"] > 1.02  # its attention is counted
    counted = last_line("growth.py", "--recipe", "tiny", "--largest", "2", "--counted")["results"]
    assert "seconds" not in counted["side, encode"] and "queries, condition" not in counted
