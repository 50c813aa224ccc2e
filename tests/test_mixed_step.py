"""Steps of prompts and decode rows together: tokens are those of `transformers`, in every mode."""

from __future__ import annotations

import random

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.scheduling.step import Step
from tests import tiny
from tests.test_engine import tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SMALL_STEPS = {"device": "cpu", "max_num_batched_tokens": 64, "prefill_chunk_tokens": 16}


def serve(llm: LLM, prompts, params, *, aborts=(), steps_ahead: int = 1):
    """Tokens of each request; a new one comes every other turn, and the requests of `aborts` are aborted midway.

    On a CPU a step has ended when it was launched. With two `steps_ahead`, two are launched before one is collected,
    as on a GPU.
    """
    ids, outputs, kinds = [], {}, []
    params = params if isinstance(params, list) else [params] * len(prompts)
    llm.add_step_listener(lambda report: kinds.append(report.kind))
    for turn in range(2000):
        if turn % 2 == 0 and len(ids) < len(prompts):
            ids.append(llm.add_request(prompts[len(ids)], params[len(ids)]))
        if len(ids) == len(prompts) and llm.is_finished():
            break
        for _ in range(steps_ahead - 1):
            llm._loop.take_in_mail()
            llm._loop.launch_steps()
        for output in llm.step():
            outputs.setdefault(output.request_id, []).append(output)
        for number in aborts:
            if number < len(ids) and len(outputs.get(ids[number], [])) == 3:
                llm.abort(ids[number])
        llm.scheduler.check_integrity()
    return [tokens_of(outputs.get(request_id, [])) for request_id in ids], kinds


MODES = {
    "plain": {},
    "whole prompts": {"prefill_chunk_tokens": 2048},
    "one row or prompt at a time": {"max_num_seqs": 2},
    "preempting": {"num_kvcache_blocks": 9, "kvcache_block_size": 16},
    "without prefix cache": {"enable_prefix_caching": False},
    "two devices": {"enable_two_gpu_pd": True, "card_roles": "fixed"},
    "pipeline": {"enable_two_gpu_pd": True, "enable_decode_pipeline": True, "decode_pipeline": "static"},
}


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_transformers(checkpoint, mode, steps_ahead):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(7, seed=51, longest=60) + tiny.random_prompts(3, seed=53, longest=20, shared=32)
    with LLM(path, **{**SMALL_STEPS, **MODES[mode]}) as llm:
        max_tokens = 40 if mode == "preempting" else 12
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        found, kinds = serve(llm, prompts, params, steps_ahead=steps_ahead)
        assert ("mixed" in kinds) == ("two_gpu_pd" not in str(MODES[mode])), "the decode card has no prompts"
        assert mode != "preempting" or llm.metrics()["preemptions"]
    assert found == [tiny.reference_tokens(reference, prompt, max_tokens) for prompt in prompts]


@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_tokens_of_all_families_equal_transformers(checkpoint, variant):
    path, reference = checkpoint(variant)
    prompts = tiny.random_prompts(6, seed=54, longest=60)
    with LLM(path, **SMALL_STEPS) as llm:
        found, kinds = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert "mixed" in kinds
    assert found == [tiny.reference_tokens(reference, prompt, 12) for prompt in prompts]


EVERY_PARAMETER = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=15),
    SamplingParams(temperature=0.8, top_k=5, top_p=0.9, seed=2, max_tokens=15),
    SamplingParams(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.3, seed=3, max_tokens=15),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=15),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=0, max_tokens=2),
    SamplingParams(temperature=0, min_tokens=9, logit_bias={7: 4.0}, max_tokens=15),
    SamplingParams(temperature=1.0, min_p=0.05, seed=4, logprobs=2, max_tokens=15),
]


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("blocks", [200, 12])
def test_sampled_tokens_and_logprobs_are_those_of_steps_with_one_part(tiny_path, blocks, steps_ahead):
    prompts = tiny.random_prompts(16, seed=55, longest=50)
    params = [EVERY_PARAMETER[index % len(EVERY_PARAMETER)] for index in range(16)]
    found, logprobs = {}, {}
    for mixed in (False, True):
        # With fixed roles no step has both parts.
        options = {**SMALL_STEPS, **tiny.fixed_roles(not mixed), "kvcache_block_size": 16}
        with LLM(tiny_path, **options, num_kvcache_blocks=blocks, max_num_seqs=8) as llm:
            found[mixed], kinds = serve(llm, prompts, params, steps_ahead=steps_ahead)
            assert ("mixed" in kinds) == mixed
            answers = llm.generate(prompts, params, use_tqdm=False)
            assert [answer["token_ids"] for answer in answers] == found[mixed]
            logprobs[mixed] = [answer.get("logprobs") for answer in answers]
    assert found[True] == found[False]
    for one, other in zip(logprobs[True], logprobs[False], strict=True):
        assert (one is None) == (other is None)
        for mine, theirs in zip(one or [], other or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_aborted_requests_take_no_token_from_others(checkpoint, seed):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(12, seed=60 + seed, longest=60)
    aborted = random.Random(seed).sample(range(12), 4)
    with LLM(path, **SMALL_STEPS, num_kvcache_blocks=14, kvcache_block_size=16) as llm:
        found, _ = serve(llm, prompts, GREEDY, aborts=aborted, steps_ahead=2)
        assert llm.metrics()["leases"] == 0
    for number, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        expected = tiny.reference_tokens(reference, prompt, 12)
        assert tokens == (expected[: len(tokens)] if number in aborted else expected)


def test_tensor_parallel_ranks_run_mixed_steps(checkpoint):
    path, reference = checkpoint("llama")
    prompts = tiny.random_prompts(6, seed=56, longest=60)
    with LLM(path, **SMALL_STEPS, tensor_parallel_size=2) as llm:
        found, kinds = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert "mixed" in kinds
    assert found == [tiny.reference_tokens(reference, prompt, 12) for prompt in prompts]


def test_a_request_joins_the_step_behind_its_prompt(checkpoint):
    """Its first token is on the device alone when that step is launched; a stop token there ends it a step late.

    A request with penalties waits for the host, which counts its tokens.
    """
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=57, longest=14)
    first = tiny.reference_tokens(reference, prompts[2], 1)[0]
    with LLM(path, **SMALL_STEPS) as llm:
        launch, steps = llm.decode_runner.launch, []

        def watched(step):
            steps.append(step)
            return launch(step)

        llm.decode_runner.launch = watched
        kept = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        ids = [llm.add_request(prompts[0], kept)]
        llm.step()
        ids.append(llm.add_request(prompts[1], kept))
        ids.append(llm.add_request(prompts[2], SamplingParams(temperature=0, max_tokens=5, stop_token_ids=[first])))
        ids.append(llm.add_request(prompts[3], SamplingParams(temperature=0, max_tokens=5, presence_penalty=1.0)))
        llm._loop.take_in_mail()
        assert llm._loop.launch_steps()
        assert llm._loop.launch_steps()
        (prompt_step, step), (late,) = steps[-2:], [seq for seq in steps[-1].seqs if seq.request_id == ids[2]]
        assert [chunk.seq.request_id for chunk in prompt_step.sampling_chunks] == ids[1:]
        assert step.kind == "decode"
        assert {seq.request_id for seq in step.seqs} == set(ids[:3])
        assert late.num_output_tokens == 0
        outputs = {}
        while not llm.is_finished():
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
        llm.scheduler.check_integrity()
    assert tokens_of(outputs[ids[2]]) == [first]
    assert outputs[ids[2]][-1].finish_reason == "stop"
    for number in (0, 1):
        expected = tiny.reference_tokens(reference, prompts[number], 5)
        assert tokens_of(outputs[ids[number]]) == expected[5 - len(tokens_of(outputs[ids[number]])) :]


@pytest.mark.parametrize("fails", ["mixed", "decode", "prefill"])
def test_a_step_that_fails_to_launch_loses_no_token(checkpoint, fails):
    """A mixed one is launched again as two; nobody has failed twice."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=58, longest=60)
    with LLM(path, **SMALL_STEPS) as llm:
        launch, kinds, seen = llm.decode_runner.launch, [], {"mixed": 0, "decode": 0, "prefill": 0}

        def watched(step: Step):
            kinds.append(step.kind)
            seen[step.kind] += 1
            if step.kind == fails and (fails == "mixed" or seen[fails] == 3):
                raise RuntimeError("injected")
            return launch(step)

        llm.decode_runner.launch = watched
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert "mixed" in kinds
        if fails == "mixed":
            at = [index for index, kind in enumerate(kinds) if kind == "mixed"]
            assert all(kinds[index + 1 : index + 3] == ["prefill", "decode"] for index in at)
    assert found == [tiny.reference_tokens(reference, prompt, 12) for prompt in prompts]


def test_two_faults_at_once_cost_nobody_else(checkpoint, monkeypatch):
    """A first token is not finite, and the step that its request has joined fails to launch."""
    path, reference = checkpoint("gqa2")
    prompts = [[number, 7, 9] for number in range(1, 5)]
    with LLM(path, **SMALL_STEPS) as llm:
        runner, launch = llm.decode_runner, llm.decode_runner.launch
        collect, errors = StepHandle.collect, []
        ids = [llm.add_request(prompts[0], GREEDY)]
        llm.step()
        ids += [llm.add_request(prompt, GREEDY) for prompt in prompts[1:]]

        def collect_not_finite(handle):
            tokens = collect(handle)
            if len(tokens.after_chunks.token_ids) == 3:
                tokens.after_chunks.token_ids[1] = -1
            return tokens

        def launch_or_fail(step):
            if step.kind == "decode" and len(step.decode) == 4:
                raise RuntimeError("injected")
            try:
                return launch(step)
            except Exception as error:
                errors.append(error)
                raise

        monkeypatch.setattr(StepHandle, "collect", collect_not_finite)
        monkeypatch.setattr(runner, "launch", launch_or_fail)
        llm._loop.take_in_mail()
        llm._loop.launch_steps()
        llm._loop.launch_steps()
        outputs = {}
        while not llm.is_finished():
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
        llm.scheduler.check_integrity()
    assert not errors
    assert outputs[ids[2]][-1].finish_reason == "error"
    for number in (1, 3):
        assert tokens_of(outputs[ids[number]]) == tiny.reference_tokens(reference, prompts[number], 12)


def test_a_report_and_the_counters_count_both_parts(checkpoint):
    path, _ = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=52, longest=60)
    with LLM(path, **SMALL_STEPS) as llm:
        reports = []
        llm.add_step_listener(reports.append)
        serve(llm, prompts, GREEDY)
        assert {report.kind for report in reports} == {"prefill", "decode", "mixed"}
        both = [report for report in reports if report.kind == "mixed"]
        assert all(report.num_tokens > report.num_requests - 1 for report in both)
        counters = llm.counters
        assert sum(report.num_tokens for report in reports) == counters.prefill_tokens + counters.decode_tokens
