"""What `fedjax-llm doctor` says of a machine."""

import subprocess
import sys

from fedjax_llm import doctor


def test_doctor_finds_this_machine_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedjax_llm", "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encrypt, add and decrypt are exact" in done.stdout


def test_doctor_names_a_cure() -> None:
    finding = doctor.check_python((3, 11, 4))
    assert not finding.ok
    assert "3.12" in finding.cure
    assert not doctor.print_report([finding])
