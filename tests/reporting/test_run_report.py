"""What of a model's manifest the page shows."""

from spar.reporting.run_report import visible_manifest


def test_recipes_are_left_out_of_a_manifest_and_of_those_of_its_origins():
    origin = {"recipe": "shapes", "resolved_recipe": {"lr": 1}, "origin": {"seed": 0, "resolved_recipe": {}}}
    manifest = {"seed": 1, "resolved_recipe": {"lr": 2}, "origin": origin}
    assert visible_manifest(manifest) == {"seed": 1, "origin": {"recipe": "shapes", "origin": {"seed": 0}}}
