"""What `import flaxtransfer` costs and loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.slow
def test_import_costs_at_most_half_more_than_jax_flax_and_optax():
    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        times = [
            float(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                ).stdout
            )
            for _ in range(5)
        ]
        return min(times)

    assert seconds("import flaxtransfer") <= 1.5 * seconds("import jax, flax, optax")


def test_import_loads_no_heavy_room():
    code = textwrap.dedent("""
        import sys, flaxtransfer
        heavy = ("orbax", "grain", "tensorflow_datasets", "sklearn", "scipy", "matplotlib", "PIL",
                 "jax", "flax", "optax", "torch", "tensorflow")
        print([name for name in heavy if name in sys.modules])
    """)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
