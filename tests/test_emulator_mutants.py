"""Kernels with a planted fault, each of which the emulator must show: so a fault in a kernel would not pass unseen.

The faults are replacements of text (mutants.py). One whose text is no longer in the source fails, so that the table
follows the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import emulated
import mutants
from cases import BY_NAME
from conftest import SEED
from emulated import CONVOLUTIONS, SCHEDULES, KernelError, run_row
from mutants import Edit, Mutant
from test_emulator import LAYOUTS, multiply, operands, product_operands, reference

QUICK = ("-O0", "-DMYCONV_EMULATOR_FLOAT32")  # to compile


def shows(run: Callable[[str], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether a schedule fails or gives something else."""
    for schedule in SCHEDULES:
        try:
            if not torch.equal(run(schedule), expected):
                return True
        except KernelError:
            return True
    return False


def shows_in_direct(mutant: Mutant, edits: Sequence[Edit]) -> bool:
    loaded = emulated.library(*CONVOLUTIONS, edits=edits, options=QUICK)

    def shows_in(layout: str) -> bool:
        call = operands(BY_NAME[mutant.problem], mutant.direction, torch.float32, layout, SEED, integers=True)
        options = {"channels_last": layout != "contiguous", "seed": SEED}
        return shows(
            lambda schedule: run_row(loaded, "direct", mutant.direction, *call, schedule=schedule, **options),
            reference(mutant.direction, *call),
        )

    return any(map(shows_in, LAYOUTS))


def shows_in_products(mutant: Mutant, edits: Sequence[Edit]) -> bool:
    loaded = emulated.library("tests/emulator/mma.cu", edits=edits, options=QUICK)
    a, b = product_operands(mutant.problem, SEED, integers=True)
    expected = (a.double() @ b.double()).float()
    return shows(lambda schedule: multiply(loaded, mutant.problem, a, b, schedule), expected)


MUTANTS = [(shows_in_direct, mutant) for mutant in mutants.DIRECT]
MUTANTS += [(shows_in_products, mutant) for mutant in mutants.PRODUCTS]
NAMES = ["-".join(filter(None, (m.fault, m.direction, m.problem))).replace(" ", "_") for _, m in MUTANTS]


@pytest.mark.parametrize("shows_in, mutant", MUTANTS, ids=NAMES)
def test_fault_shows(shows_in, mutant):
    assert shows_in(mutant, mutant.edits), f"nothing shows {mutant}"


def test_nothing_shows_without_a_fault():
    for shows_in, mutant in {(m.direction, m.problem, m.few_blocks): (f, m) for f, m in MUTANTS}.values():
        assert not shows_in(mutant, mutant.sound), f"something shows in the sound kernel: {mutant}"


def test_text_that_is_gone_fails():
    with pytest.raises(LookupError, match="0 times, not once"):
        emulated.library(*CONVOLUTIONS, edits=[("no such text", "")])
