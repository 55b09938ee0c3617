"""The probes of binding run on the bundled weights and say what docs/log.md says of them."""

import importlib.util
import re
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "docs" / "probes.py"


def test_the_probes_run_and_find_the_bundled_router_collapsed(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("probes", SCRIPT)
    probes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probes)
    monkeypatch.setattr(probes, "ITEMS", 1)
    monkeypatch.setattr("sys.argv", ["probes.py"])
    probes.main()
    edits, bound, routing, drawn, *nouns = capsys.readouterr().out.splitlines()
    assert edits.startswith("shapes-edit, said: recolor 0.00")
    assert bound.startswith("shapes-edit-bind, said: recolor 0.00")
    first, entropy = re.fullmatch(r"routing: ([\d.]+), .*; entropy ([\d.]+) nats", routing).groups()
    assert float(first) > 0.85 and float(entropy) < 0.05
    assert re.fullmatch(r"shapes-gen: [\d.]+ routed, [\d.]+ by the plain mean", drawn)
    colors = [float(re.search(r"color ([\d.]+)", line).group(1)) for line in nouns]
    assert len(nouns) == 4 and all(0.6 < share < 0.9 for share in colors)  # of eight colours
    assert all("shape 1.00" in line for line in nouns)  # the noun itself
