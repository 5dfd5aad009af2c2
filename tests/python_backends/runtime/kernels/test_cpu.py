"""Which kernels a processor gets."""

import pytest

from python_backends.runtime.kernels import cpu

AVX2 = {"avx2", "f16c", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "bmi2"}
AMX = AVX512 | {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16"}


@pytest.mark.parametrize(
    ("flags", "forbidden", "variant", "amx"),
    [
        (AMX, [], cpu.Variant.AVX512, True),
        (AMX, ["WICORE_NO_AMX"], cpu.Variant.AVX512, False),
        (AMX, ["WICORE_NO_AVX512"], cpu.Variant.AVX2, False),
        (AVX512, [], cpu.Variant.AVX512, False),
        (AVX512 - {"avx512_vnni"}, [], cpu.Variant.AVX2, False),
        (AVX2, ["WICORE_NO_AVX512"], cpu.Variant.AVX2, False),
        (AVX2 - {"fma"}, [], None, False),
        (set(), [], None, False),
    ],
)
def test_a_processor_gets_the_best_kernels_that_it_can_run_and_nobody_forbids(
    monkeypatch, flags, forbidden, variant, amx
):
    for name in ("WICORE_NO_AMX", "WICORE_NO_AVX512"):
        monkeypatch.delenv(name, raising=False)
    for name in forbidden:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
    assert cpu.variant() == variant
    assert cpu.has_amx() == amx
