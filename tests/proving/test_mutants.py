"""Mutants are what they say, and the proof command's verdict follows from them."""

import ast

import pytest

from autograder.checking.masters import exercises_of, units
from autograder.proving.mutants import mutants
from autograder.proving.prove import Proof, prove, try_mutants

SOURCE = '''
def scaled(x: float, rank: int = 8) -> float:
    """Return x / rank."""
    if rank == 0:
        raise ValueError("rank is 0")
    return x / rank
'''


def test_each_mutant_differs_in_one_place_and_parses():
    found = {mutant.change: mutant.source for mutant in mutants(SOURCE)}
    assert {"x / rank  ->  x * rank", "x / rank  ->  rank / x", "rank == 0  ->  rank != 0", "8  ->  9"} <= found.keys()
    assert "return x / rank  ->  return None" in found
    for source in found.values():
        ast.parse(source)
        assert ("Return x / rank." in source and "rank is 0" in source) or "raise" not in source


def test_a_survivor_without_a_reason_fails_the_proof():
    proof = Proof("unit", mistakes=2, variants=1, killed=99, survivors={"a -> b": "equivalent"})
    assert proof.holds
    proof.survivors["a -> b"] = None
    assert not proof.holds and "NOT EXPLAINED" in str(proof)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [unit for unit in units() if exercises_of(unit)])
def test_mutants_are_rejected(unit):
    """Mistakes and variants are tested one by one in test_exercises.py, on more seeds than the proof takes."""
    proof = Proof(unit)
    try_mutants(proof)
    assert proof.killed and proof.holds, str(proof)


@pytest.mark.slow
def test_the_whole_proof_of_a_unit():
    proof = prove("02_rank_decomposition")
    assert proof.holds, str(proof)
    assert proof.mistakes == sum(len(exercise.mistakes) for exercise in exercises_of(proof.unit)) > 0
    assert proof.variants == sum(len(exercise.variants) for exercise in exercises_of(proof.unit)) > 0
