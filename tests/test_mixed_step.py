"""Steps with both parts, which the scheduler does not form yet: runner, loop and outputs take them as they are."""

from __future__ import annotations

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduling.step import Step
from tests import tiny
from tests.test_engine import drain, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def merge_parts(llm: LLM) -> list[Step]:
    """Has a card's prefill and decode steps of one turn launched as one step; the list of those is filled as they are.

    Where only one of them was formed, that is launched as it is.
    """
    schedule, mixed = llm.scheduler.schedule, []

    def schedule_merged(card, in_flight):
        steps = list(schedule(card, in_flight))
        if len(steps) == 2:
            steps = [Step(card, steps[0].chunks, steps[1].decode)]
            mixed.append(steps[0])
        return iter(steps)

    llm.scheduler.schedule = schedule_merged
    return mixed


def serve_some_late(llm, prompts):
    """The second half of the prompts comes once the first decodes."""
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts[:3]]
    outputs = {}
    for _ in range(4):
        for output in llm.step():
            outputs.setdefault(output.request_id, []).append(output)
    ids += [llm.add_request(prompt, GREEDY) for prompt in prompts[3:]]
    for request_id, later in drain(llm).items():
        outputs.setdefault(request_id, []).extend(later)
    return [tokens_of(outputs[request_id]) for request_id in ids]


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_of_both_parts_gives_the_tokens_of_two(checkpoint, fails):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=51, longest=60)
    with LLM(path, device="cpu", max_num_batched_tokens=64, prefill_chunk_tokens=16) as llm:
        mixed, launch, kinds = merge_parts(llm), llm.decode_runner.launch, []

        def watched(step):
            kinds.append(step.kind)
            if fails and step.kind == "mixed":
                raise RuntimeError("injected")
            return launch(step)

        llm.decode_runner.launch = watched
        found = serve_some_late(llm, prompts)
        assert mixed
        if fails:  # its parts run by themselves, and nobody has failed
            assert all(
                kinds[index + 1 :][:2] == ["prefill", "decode"] for index, kind in enumerate(kinds) if kind == "mixed"
            )
        llm.scheduler.check_integrity()
    assert found == [tiny.reference_tokens(reference, prompt, 12) for prompt in prompts]


def test_a_report_and_the_counters_count_both_parts(checkpoint):
    path, _ = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=52, longest=60)
    with LLM(path, device="cpu", max_num_batched_tokens=64, prefill_chunk_tokens=16) as llm:
        merge_parts(llm)
        reports = []
        llm.add_step_listener(reports.append)
        serve_some_late(llm, prompts)
        assert {report.kind for report in reports} == {"prefill", "decode", "mixed"}
        both = [report for report in reports if report.kind == "mixed"]
        assert all(report.num_tokens > report.num_requests - 1 for report in both)
        counters = llm.counters
        assert sum(report.num_tokens for report in reports) == counters.prefill_tokens + counters.decode_tokens
