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
    edits, bound, routing, drawn = capsys.readouterr().out.splitlines()
    assert edits.startswith("shapes-edit, said: recolor 0.00")
    assert bound.startswith("shapes-edit-bind, said: recolor 0.00")
    first, entropy = re.fullmatch(r"routing: ([\d.]+), .*; entropy ([\d.]+) nats", routing).groups()
    assert float(first) > 0.85 and float(entropy) < 0.05
    assert re.fullmatch(r"shapes-gen: [\d.]+ routed, [\d.]+ by the plain mean", drawn)
