"""Make vblora/quantiles.json: `python tests/vblora/make_quantiles.py`. Needs mpmath.

Two tables of integers, so that every machine draws the same initial logits to the bit (libm differs):

exponential[e][c]  round(2^40 * -ln(u)) for u = x / 2^33 at x = 2^e + c * 2^(e - 6)
normal[e][c]       round(2^20 * probit(exp(-t))) for t = x / 2^40 at x = 2^e + c * 2^(e - 6)

for 64 cells c of each octave e, with one more cell to interpolate to.
"""

import json
import sys
from pathlib import Path

import mpmath as mp

CELLS = 64


def grid(octave: int) -> list[mp.mpf]:
    return [mp.mpf(2) ** octave * (1 + mp.mpf(c) / CELLS) for c in range(CELLS + 1)]


def probit_of_exp(t: mp.mpf) -> mp.mpf:
    """The normal quantile of exp(-t), without cancellation at either end."""
    lower = mp.exp(-t)  # mass below
    upper = -mp.expm1(-t)  # mass above
    tail, sign = (upper, 1) if upper < lower else (lower, -1)
    if 2 * tail == 1:
        return mp.mpf(0)
    guess = mp.sqrt(-2 * mp.log(tail)) if tail < 0.1 else mp.mpf(1) - 2 * tail
    return sign * mp.findroot(lambda z: mp.log(mp.erfc(z / mp.sqrt(2)) / 2) - mp.log(tail), guess)


def main() -> None:
    mp.mp.dps = 30
    exponential = [[int(mp.nint(-mp.log(x / 2**33) * 2**40)) for x in grid(e)] for e in range(33)]
    normal = [[int(mp.nint(probit_of_exp(x / 2**40) * 2**20)) for x in grid(e)] for e in range(46)]
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "vblora/quantiles.json")
    target.write_text(
        json.dumps({"exponential": exponential, "normal": normal}, separators=(",", ":")) + "\n"
    )


if __name__ == "__main__":
    main()
