"""That what is measured is a whole ledger with checkpoints, and that it is verified with their keys."""

from __future__ import annotations

from pathlib import Path

from peculium_server.archive.verifying import verify_file
from peculium_server.core.checkpoint import key_id_of
from peculium_server.signing import is_signed, load_public_key
from tests.archive.generate import made, write
from tests.archive.measure import measure
from tests.core.ledger import SECOND


def test_a_generated_ledger_is_sealed_with_two_keys_and_verifies_with_both_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "made.jsonl"
    ledger = made(500, trees=1, operation_us=SECOND)
    keys = write(ledger, path)
    measured = measure(path, [str(key) for key in keys])
    verdict = measured.verdict
    assert (verdict["verified"], verdict["keys_trusted"]) == (True, True)
    assert verdict["entries"] == ledger.entries
    assert verdict["checkpoints"] == ledger.seals.checkpoints >= 5
    assert 0 <= verdict["unsealed"] < 60
    assert measured.seconds > 0
    assert measured.peak_bytes > 10_000_000
    for key in keys:
        trusted = load_public_key(key)
        found = verify_file(path, public_keys={key_id_of(trusted): trusted}, is_signed=is_signed)
        [finding] = found.findings
        assert (finding.rule, "which is not known" in finding.detail) == ("checkpoint", True)
