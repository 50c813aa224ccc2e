"""What `llm.metrics()` counts, against what is known from outside, and that Prometheus can read it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nanovllm import LLM, EngineClosedError, SamplingParams, UnknownRequestError
from nanovllm.engine import observer
from nanovllm.engine.observability.metrics import Histogram, TokenTimes
from nanovllm.entrypoints.prometheus import Collector
from tests import tiny


def test_a_histogram_counts_what_numpy_counts():
    values = np.random.default_rng(1).exponential(0.02, 500)
    histogram = Histogram((0.01, 0.02, 0.05))
    histogram.observe_all(values[:499])
    histogram.observe(values[499])
    found = histogram.as_dict()
    assert found["count"] == 500
    assert found["sum"] == pytest.approx(values.sum())
    assert found["buckets"] == [(bound, int((values <= bound).sum())) for bound in (0.01, 0.02, 0.05)]


def test_a_place_for_a_token_time_is_used_again_and_there_are_as_many_as_needed():
    times = TokenTimes()
    places = [times.take(float(number)) for number in range(1000)]
    assert len(set(places)) == 1000
    assert times.give_back(places[7]) == 7.0
    assert times.take(5000.0) == places[7]
    gaps = times.passed(np.array(places[:3]), 10.0)
    assert gaps.tolist() == [10.0, 9.0, 8.0]
    assert times.give_back(places[1]) == 10.0


@pytest.mark.parametrize("two_devices", [False, True], ids=["one", "two"])
def test_requests_and_tokens_are_counted_once(tmp_path, two_devices):
    path = tiny.save(tiny.make_reference(seed=3), tmp_path)
    prompts = tiny.random_prompts(6, seed=1, shared=32) + tiny.random_prompts(6, seed=2)
    params = [SamplingParams(temperature=0, max_tokens=1 + place) for place in range(len(prompts))]
    with LLM(path, device="cpu", num_kvcache_blocks=200, kvcache_block_size=16, **tiny.fixed_roles(two_devices)) as llm:
        assert llm.metrics()["ttft_s"]["count"] == 0
        started = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts[:1], params[-1:], use_tqdm=False)
        passed = time.perf_counter() - started
        found = llm.metrics()
        num_tokens = sum(len(answer["token_ids"]) for answer in answers + again)
        num_requests = len(prompts) + 1
        assert found["requests_ended"] == {"length": num_requests}
        assert set(found["requests"].values()) == {0}
        assert found["ttft_s"]["count"] == found["latency_s"]["count"] == num_requests
        assert found["itl_s"]["count"] == num_tokens - num_requests
        assert found["tpot_s"]["count"] == sum(len(answer["token_ids"]) > 1 for answer in answers + again)
        assert 0 < found["itl_s"]["sum"] < num_requests * passed
        assert found["prefix_cache_hit_tokens"] >= 32
        assert found["prefix_cache_queried_tokens"] >= sum(map(len, prompts))
        assert found["prefill_tokens"] >= sum(map(len, prompts)) - found["prefix_cache_hit_tokens"]
        assert found["leases"] == found["handoff_backlog"] == 0
        assert found["kv_blocks"]["decode"] == {"held": 0, "total": 200}
        assert (found["handoff_bytes"] > 0) == two_devices
        assert (found["handoff_s"]["count"] > 0) == two_devices
        busy_s = found["busy_s"]
        assert list(busy_s) == (["cpu:1", "cpu:0"] if two_devices else ["cpu:0"])
        assert all(kinds["mixed"] == 0 for kinds in busy_s.values())
        assert (busy_s["cpu:0"]["decode"] == 0) == two_devices
        assert busy_s["cpu:0"]["prefill"] > 0
        assert all(sum(kinds.values()) <= passed for kinds in busy_s.values())
    with pytest.raises(EngineClosedError):
        llm.metrics()


def test_states_aborts_and_preemptions_show(tmp_path):
    path = tiny.save(tiny.make_reference(seed=3), tmp_path)
    prompts = tiny.random_prompts(8, seed=4)
    with LLM(path, device="cpu", num_kvcache_blocks=14, kvcache_block_size=16, max_num_seqs=6) as llm:
        ids = [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=40)) for prompt in prompts]
        assert llm.metrics()["requests"]["waiting"] == 8
        for _ in range(6):
            llm.step()
        found = llm.metrics()
        assert found["requests"]["decoding"] > 0
        assert found["leases"] > 0
        assert found["kv_blocks"]["decode"]["held"] > 0
        llm.abort(ids[-1])
        num_tokens = 0
        while not llm.is_finished():
            num_tokens += sum(len(output.new_token_ids) for output in llm.step())
        found = llm.metrics()
        assert found["requests_ended"] == {"length": 7, "abort": 1}
        assert found["preemptions"] == llm.scheduler.num_preemptions > 0
        assert found["itl_s"]["count"] == 7 * 39


def test_prometheus_reads_them(tmp_path):
    prometheus_client = pytest.importorskip("prometheus_client")
    path = tiny.save(tiny.make_reference(seed=3), tmp_path)
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed") as llm:
        llm.generate(tiny.random_prompts(3, seed=4), SamplingParams(max_tokens=5), use_tqdm=False)
        registry = prometheus_client.CollectorRegistry()
        registry.register(Collector(llm))
        text = prometheus_client.generate_latest(registry).decode()
    assert "nanovllm_time_to_first_token_seconds_count 3.0" in text
    assert "nanovllm_inter_token_latency_seconds_count 12.0" in text
    assert 'nanovllm_inter_token_latency_seconds_bucket{le="+Inf"} 12.0' in text
    assert 'nanovllm_requests_ended_total{reason="length"} 3.0' in text
    assert 'nanovllm_kv_blocks{pool="decode",state="held"} 0.0' in text
    assert 'nanovllm_busy_seconds_total{card="cpu:1",kind="prefill"} 0.0' in text


def phases(timeline):
    return [span.what for span in timeline.spans()]


def test_a_request_can_be_explained(tmp_path):
    path = tiny.save(tiny.make_reference(seed=3), tmp_path)
    prompt = tiny.random_prompts(1, seed=4, shared=40)[0]
    n = len(prompt)
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 1, "kvcache_block_size": 16}
    with LLM(path, device="cpu", enable_two_gpu_pd=True, card_roles="fixed", **options) as llm:
        first = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=5))
        second = llm.add_request(prompt[::-1], SamplingParams(temperature=0, max_tokens=5))
        while not llm.is_finished():
            llm.step()
        explained = llm.explain(first)
        waited = phases(llm.explain(second))
        aborted = llm.add_request(prompt, SamplingParams(max_tokens=5))
        llm.abort(aborted)
        assert phases(llm.explain(aborted)) == ["waits for a lease (its turn)", "ended: abort"]
        with pytest.raises(UnknownRequestError, match="request 99 is not known"):
            llm.explain(99)
    found = phases(explained)
    assert found[0] == "waits for a lease (its turn)"
    for start in range(0, n, 32):
        assert f"prefill of tokens {start} to {min(start + 32, n)} of {n}" in found
    assert found[-4:] == ["handoff", "decode queue", "decodes", "ended: length"]
    assert "waits for a lease (max_num_seqs=1 are held)" in waited
    spans = list(explained.spans())
    assert all(span.end_s >= span.start_s for span in spans[:-1])
    assert spans[-1].end_s is None
    assert str(explained).count("\n") == len(spans) - 1


def test_only_so_many_timelines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "MAX_TIMELINES", 2)
    path = tiny.save(tiny.make_reference(seed=3), tmp_path)
    with LLM(path, device="cpu") as llm:
        llm.generate(tiny.random_prompts(3, seed=4), SamplingParams(max_tokens=2), use_tqdm=False)
        assert len(llm._observer._timelines) == 2
