"""What the doctor finds on a machine without a GPU, and how it says it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.entrypoints import doctor


def findings_by_check(findings):
    return {finding.check: finding for finding in findings}


def test_it_works_and_says_what_is_missing_without_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    found = findings_by_check(doctor.examine(str(DEMO_MODEL_PATH), 0, 1))
    assert not [finding for finding in found.values() if finding.verdict == doctor.FAILED]
    assert found["GPUs"].verdict == doctor.MISSING
    assert found["backend torch"].verdict == doctor.OK
    assert "not on cpu" in found["backend triton"].found
    assert found["link"].verdict == found["green contexts"].verdict == doctor.MISSING
    assert "KiB of KV per token" in found["model"].found
    assert found["handoff"].verdict == doctor.OK
    assert "logical CPU devices, checksums equal" in found["handoff"].found


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("injected")
        yield

    monkeypatch.setattr(doctor, "check_packages", broken)
    found = findings_by_check(doctor.examine(None, 0, 1))
    assert (found["packages"].verdict, found["packages"].found) == (doctor.FAILED, "RuntimeError: injected")
    assert found["handoff"].verdict == doctor.OK


def test_a_handoff_that_is_wrong_fails(monkeypatch):
    monkeypatch.setattr(doctor, "QUESTION", "What is the capital of Japan?")
    (finding,) = doctor.check_handoff(False, 0, 1)
    assert finding.verdict == doctor.FAILED


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("CUDA_VISIBLE_DEVICES", "0", "at most one GPU"),
        ("CUDA_VISIBLE_DEVICES", "0,1", ""),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "raise it"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "many", "not a number"),
        ("CUDA_LAUNCH_BLOCKING", "1", "unset it"),
        ("TRITON_INTERPRET", "1", "unset it"),
    ],
)
def test_environment_variables_that_matter(name, value, advice):
    (finding,) = doctor.check_environment({name: value})
    assert (finding.check, finding.found) == (name, value)
    assert advice in finding.next_step
    assert finding.verdict == (doctor.WARNING if advice else doctor.OK)


def test_a_model_that_cannot_be_served_fails():
    (finding,) = doctor.check_model("/nowhere", [])
    assert finding.verdict == doctor.FAILED
    assert "/nowhere" in finding.found


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "nanovllm", "doctor"]
    table = subprocess.run(command, capture_output=True, text=True)
    assert table.returncode == 0, table.stderr
    assert "handoff" in table.stdout
    listed = subprocess.run([*command, "--json", "--model", "/nowhere"], capture_output=True, text=True)
    assert listed.returncode == 1
    assert {"check": "model", "verdict": "failed"}.items() <= {
        key: value
        for finding in json.loads(listed.stdout)
        if finding["check"] == "model"
        for key, value in finding.items()
    }.items()
    typo = subprocess.run([*command[:-1], "docter"], capture_output=True, text=True)
    assert typo.returncode == 2
    assert "doctor" in typo.stderr
