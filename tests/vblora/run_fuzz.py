"""A coverage-guided search for inputs that reading a blob cannot take. Needs atheris (libFuzzer).

    python -m tests.vblora.run_fuzz FOUND tests/vblora/corpus -max_total_time=600

keeps what reaches new lines in the folder FOUND; an input that fails is written to crash-* or timeout-*.
"""

from __future__ import annotations

import sys
import tracemalloc

import atheris

with atheris.instrument_imports(include=["vblora"]):
    from tests.vblora import fuzz


def _test(data: bytes) -> None:
    fuzz.run_one(data)


def _change(data: bytes, most: int, seed: int) -> bytes:
    return fuzz.change(data, seed, lambda part, size: bytes(atheris.Mutate(part, size)))[:most]


if __name__ == "__main__":
    tracemalloc.start()
    atheris.Setup(sys.argv, _test, custom_mutator=_change)
    atheris.Fuzz()
