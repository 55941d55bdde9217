"""The properties of test_properties.py on ever new examples, until the time is over or one of them fails.

make fuzz MINUTES=5    rounds of random seeds, each printed first
make fuzz SEED=…       the round of that seed, which draws the same examples again
"""

import argparse
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

PROPERTIES = Path(__file__).parents[1] / "op" / "test_properties.py"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 where every round passed, else that of the pytest run that did not."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no further round after this")
    parser.add_argument("--seed", type=int, help="of the one round to run; without it, rounds of random seeds")
    options = parser.parse_args(arguments)
    settings.register_profile("fuzz", print_blob=False)
    settings.load_profile("fuzz")  # the properties ask for it
    end = time.monotonic() + 60 * options.minutes
    rounds = 0
    while rounds == 0 or (options.seed is None and time.monotonic() < end):
        seed = random.randrange(2**32) if options.seed is None else options.seed
        print(f"round {rounds + 1}: seed {seed}", flush=True)
        quiet = ("-q", "--no-header", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider")
        status = pytest.main([*quiet, f"--hypothesis-seed={seed}", str(PROPERTIES)])
        if status:
            print(f"failed; the same round again: make fuzz SEED={seed}")
            return int(status)
        rounds += 1
    print(f"{rounds} rounds passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
