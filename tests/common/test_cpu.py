"""What the kernel says of the processor."""

import platform

import pytest

from spar.common import cpu


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", ["amx_bf16", "avx512_bf16"]),
        ("flags : fpu avx512f avx512_bf16_not_quite\nmodel name : avx512_bf16\n", []),
        ("Features\t: fp asimd bf16 i8mm\n", ["bf16"]),
        ("", []),
    ],
)
def test_bfloat16_instructions_are_read_from_the_flags_alone(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu.bfloat16_instructions() == expected


def test_the_name_is_the_kernels_or_else_pythons(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu.cpu_name() == (platform.processor() or platform.machine()) and cpu.bfloat16_instructions() == []
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU : 3 GHz\nmodel name : another\n")
    assert cpu.cpu_name() == "Some CPU : 3 GHz"
