"""Any public method from any thread, `close` at any moment, and interrupts between any two lines of any call."""

from __future__ import annotations

import contextlib
import gc
import linecache
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

import nanovllm
from nanovllm import LLM, EngineBusyError, EngineClosedError, RequestOutput, SamplingParams, UnknownRequestError
from nanovllm.engine import loop
from nanovllm.engine.callers import Inbox
from tests import tiny

# Python drops what a signal handler raises within a destructor, or a test at one of its lines, and only tells of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PACKAGE = str(Path(nanovllm.__file__).parent)


def make(path, two_devices, **options):
    options = {"num_kvcache_blocks": 200, "max_num_batched_tokens": 64, **options}
    return LLM(path, device="cpu", enable_two_gpu_pd=two_devices, **options)


def at_rest(llm):
    """Runs what is in flight to its end and checks that nothing is held."""
    for _ in range(2000):
        if llm.is_finished() and not (llm._steps or llm._handoffs):
            break
        llm.step()
    assert llm.is_finished()
    llm.scheduler.check_integrity()
    assert (
        llm.scheduler.placement.decode_card.block_manager.num_held_blocks
        == llm.scheduler.placement.prefill_card.block_manager.num_held_blocks
        == 0
    )
    assert {**llm._outputs.sequences, **llm._outputs._texts, **llm._outputs._inboxes} == {}


class Workers:
    """Threads that come to their end, and whose first exception is raised by `join`."""

    def __init__(self, *works):
        self.errors = []
        self.threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def _run(self, work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - `join` raises it
            self.errors.append(error)

    def join(self):
        deadline = time.monotonic() + 240
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self.threads), "a thread never returns"
        if self.errors:
            raise self.errors[0]


@pytest.fixture
def fast_switches():
    """Threads take turns after microseconds, so that they meet in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def no_collections():
    """Python drops what a signal handler raises where it breaks into a garbage collection's callbacks."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("two_devices", [False, True])
def test_threads_that_generate_get_their_own_tokens_and_share_steps(checkpoint, fast_switches, two_devices):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(24, seed=1, longest=40)
    expected = [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]
    with make(path, two_devices) as llm:
        together = []

        def work(number):
            mine = range(number, 24, 6)
            for _ in range(2):
                answers = llm.generate([prompts[place] for place in mine], GREEDY, use_tqdm=False)
                assert [answer["error"] for answer in answers] == [None] * len(mine)
                assert [answer["token_ids"] for answer in answers] == [expected[place] for place in mine]
            together.append(llm.counters.decode_steps)

        Workers(*(lambda number=number: work(number) for number in range(6))).join()
        # One after another they would take 12 calls of 15 decode steps at least.
        assert llm.counters.decode_steps < 12 * 15
        at_rest(llm)


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(checkpoint, fast_switches, two_devices, seed):
    """Streams, some left early, `generate`, aborts, a thread that steps, and one that asks."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(12, seed=seed, longest=40, shared=16)
    expected = [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]
    done = threading.Event()
    with make(path, two_devices, num_kvcache_blocks=24) as llm:
        added, outputs = {}, defaultdict(list)

        def stream(number):
            rng = random.Random(seed * 100 + number)
            for _ in range(4):
                place = rng.randrange(12)
                most = rng.choice([2, 5, 99])
                tokens = []
                iterator = llm.generate_stream(prompts[place], GREEDY)
                for output in iterator:
                    tokens += output.new_token_ids
                    assert output.error is None
                    if len(tokens) >= most:
                        break
                iterator.close()
                assert list(iterator) == []
                assert tokens == expected[place][: len(tokens)]
                assert len(tokens) == 16 or len(tokens) >= most

        def generate(number):
            for _ in range(3):
                answers = llm.generate(prompts[number::4], GREEDY, use_tqdm=False)
                assert [answer["token_ids"] for answer in answers] == expected[number::4]

        def add(number):
            rng = random.Random(seed * 100 + number)
            for _ in range(8):
                place = rng.randrange(12)
                request_id = llm.add_request(prompts[place], GREEDY)
                added[request_id] = place
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.02)
                    with contextlib.suppress(UnknownRequestError):  # it has ended
                        llm.abort(request_id)

        def step():
            while not done.is_set() or not llm.is_finished():
                for output in llm.step():
                    outputs[output.request_id].append(output)

        def ask():
            while not done.is_set():
                llm.metrics()
                for request_id in list(added)[-3:]:
                    str(llm.explain(request_id))
                time.sleep(1e-3)

        works = [lambda n=n: stream(n) for n in range(3)] + [lambda n=n: generate(n) for n in range(2)]
        background = Workers(step, ask)
        workers = Workers(*works, *(lambda n=n: add(n) for n in range(2)))
        try:
            workers.join()
        finally:
            done.set()
        background.join()
        assert outputs.keys() == added.keys()
        for request_id, place in added.items():
            last = outputs[request_id][-1]
            tokens = [token for output in outputs[request_id] for token in output.new_token_ids]
            assert last.finished
            assert last.finish_reason in ("length", "abort")
            assert tokens == expected[place][: len(tokens)]
            assert last.finish_reason == "abort" or len(tokens) == 16
        at_rest(llm)


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_close_ends_what_other_threads_are_in(tiny_path, fast_switches, two_devices, seed):
    rng = random.Random(seed)
    long = SamplingParams(temperature=0, max_tokens=400)
    llm = make(tiny_path, two_devices)

    def again_and_again(call):
        while True:
            call()

    def work(call):
        with pytest.raises(EngineClosedError):
            again_and_again(call)

    workers = Workers(
        lambda: work(lambda: llm.generate([[1, 2, 3]] * 4, long, use_tqdm=False)),
        lambda: work(lambda: list(llm.generate_stream([4, 5], long))),
        lambda: work(lambda: llm.generate_stream([4, 5], long)),
        lambda: work(lambda: llm.add_request([6], long)),
        lambda: work(llm.step),
        lambda: work(llm.metrics),
    )
    time.sleep(rng.random() * 0.3)
    closers = Workers(llm.close, llm.close)
    workers.join()
    closers.join()
    assert not hasattr(llm.decode_runner, "model")
    assert llm.is_finished()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("exits", [False, True])
def test_close_from_a_signal_handler(tiny_path, no_collections, seed, exits):
    llm = make(tiny_path, seed % 2 == 1)

    def handler(number, frame):
        llm.close()
        llm.close()
        if exits:
            raise SystemExit(3)

    def interrupted():
        signal.setitimer(signal.ITIMER_REAL, 0.02 + 0.01 * seed)
        params = SamplingParams(max_tokens=300, ignore_eos=True)
        llm.generate([[1, 2, 3]] * 1000, params, use_tqdm=False)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(SystemExit if exits else EngineClosedError):
            interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not hasattr(llm.decode_runner, "model"), "the pool and the weights are given back"
    llm.close()


def test_a_signal_handler_may_post_but_not_wait(checkpoint):
    path, reference = checkpoint("gqa2")
    with make(path, False) as llm:
        doomed = llm.add_request([9, 9], SamplingParams(temperature=0, max_tokens=400))
        seen = {}

        def handler(number, frame):
            seen["id"] = llm.add_request([4, 5, 6], GREEDY)
            llm.abort(doomed)
            for call in (llm.step, lambda: llm.generate([[1]], GREEDY, use_tqdm=False)):
                with pytest.raises(EngineBusyError, match="signal handler"):
                    call()

        launch = llm.decode_runner.launch

        def interrupted(step):
            llm.decode_runner.launch = launch
            handler(None, None)
            return launch(step)

        llm.decode_runner.launch = interrupted
        answer = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]
        assert answer["token_ids"] == tiny.reference_tokens(reference, [1, 2, 3], 16)
        tokens, reasons = defaultdict(list), {}
        while not llm.is_finished():
            for output in llm.step():
                tokens[output.request_id] += output.new_token_ids
                reasons[output.request_id] = output.finish_reason
        assert tokens[seen["id"]] == tiny.reference_tokens(reference, [4, 5, 6], 16)
        assert reasons == {doomed: "abort", seen["id"]: "length"}
        at_rest(llm)


class InterruptedAtLines:
    """Raises KeyboardInterrupt at the package's n-th line in the block, then once more so many lines further on.

    Lines of `with` and `try:` are left out: Python hears no signal there, between a lock's own methods and the block,
    and has no handler for an exception there either.
    """

    def __init__(self, *distances):
        self.distances = list(distances)

    @property
    def has_struck(self):
        return not self.distances

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self.distances:
            line = linecache.getline(code.co_filename, frame.f_lineno).strip()
            if line.startswith(("with ", "try:")):
                return self.trace
            self.distances[0] -= 1
            if self.distances[0] == 0:
                self.distances.pop(0)
                raise KeyboardInterrupt
        return self.trace


def settle(llm, outputs):
    for _ in range(2000):
        if llm.is_finished():
            return
        for output in llm.step():
            outputs[output.request_id].append(output)
    raise AssertionError("is_finished() never becomes true")


def calls_of(llm, request_id, stream):
    return {
        "add_request": lambda: llm.add_request([7, 8, 9], GREEDY),
        "abort": lambda: llm.abort(request_id),
        "is_finished": llm.is_finished,
        "explain": lambda: str(llm.explain(request_id)),
        "metrics": llm.metrics,
        "generate_stream": lambda: llm.generate_stream([7, 8, 9], GREEDY),
        "stream.close": stream.close,
        "stream.next": lambda: next(stream),
        "step": llm.step,
        "generate": lambda: llm.generate([[5, 6, 7], [8] * 30], GREEDY, use_tqdm=False),
    }


WALKED = {  # how many lines apart the interrupts are: each line of short calls, some of long ones
    "add_request": 1,
    "abort": 2,
    "is_finished": 2,
    "explain": 3,
    "metrics": 7,
    "generate_stream": 3,
    "stream.close": 2,
    "stream.next": 29,
    "step": 17,
    "generate": 211,
}


@pytest.mark.parametrize("two_devices", [False, True])
@pytest.mark.parametrize("name", WALKED)
def test_an_interrupt_at_any_line_of_any_call_leaves_the_engine_whole(checkpoint, name, two_devices):
    path, reference = checkpoint("gqa2")
    prompts = [[1, 2, 3], [3, 2, 1, 0]]
    first, second = (tiny.reference_tokens(reference, prompt, 16) for prompt in prompts)
    rng = random.Random(len(name))
    with make(path, two_devices, enable_prefix_caching=False) as llm:
        line, has_struck = 1, True
        while has_struck and line < 8000:
            request_id, stream = llm.add_request(prompts[0], GREEDY), llm.generate_stream(prompts[1], GREEDY)
            outputs, streamed = defaultdict(list), list(next(stream).new_token_ids)
            # Another request, that nothing may happen to but an abort when it was struck itself.
            for _ in range(rng.randrange(3)):
                for output in llm.step():
                    outputs[output.request_id].append(output)
            call = calls_of(llm, request_id, stream)[name]
            twice = [rng.randrange(1, 40)] if rng.random() < 0.5 else []
            interrupts = InterruptedAtLines(line, *twice)
            result = None
            try:
                with interrupts:
                    result = call()
            except KeyboardInterrupt:
                pass
            has_struck = len(interrupts.distances) <= len(twice)
            if name == "step" and result:
                for output in result:
                    outputs[output.request_id].append(output)
            if name == "stream.next" and result is not None:
                streamed += result.new_token_ids
            known = {request_id} | ({result} if name == "add_request" and result is not None else set())
            if name == "generate_stream":
                del result
            settle(llm, outputs)
            streamed += [token for output in stream for token in output.new_token_ids]
            assert streamed == second[: len(streamed)]
            tokens = [token for output in outputs[request_id] for token in output.new_token_ids]
            assert tokens == first[: len(tokens)], line
            assert len(tokens) == 16 or outputs[request_id][-1].finish_reason == "abort", line
            assert outputs.keys() == known, line
            at_rest(llm)
            line += WALKED[name]
        assert not has_struck or line >= 8000
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [answer["token_ids"] for answer in answers] == [first, second]


@pytest.mark.parametrize("second", [None, 1, 3, 6, 10, 20, 40])
@pytest.mark.parametrize("line", [5, 300, 3000])
def test_what_an_interrupted_generate_has_queued_does_not_run_on(tiny_path, line, second):
    """However many Ctrl-C there are."""
    params = SamplingParams(temperature=0, max_tokens=50)
    with make(tiny_path, False) as llm:
        try:
            with InterruptedAtLines(line, *([] if second is None else [second])):
                llm.generate([[5, 6, 7]] * 20, params, use_tqdm=False)
        except KeyboardInterrupt:
            pass
        before = llm.counters.decode_tokens
        assert llm.is_finished()
        llm.generate([[1]], SamplingParams(max_tokens=2), use_tqdm=False)
        assert llm.counters.decode_tokens - before <= 2 + 2 * 20  # with two steps that were in flight
        at_rest(llm)


@pytest.mark.parametrize("two_devices", [False, True])
def test_interrupts_as_they_come(checkpoint, no_collections, two_devices):
    """Real signals at random moments, in whatever call they strike."""
    path, reference = checkpoint("gqa2")
    expected = tiny.reference_tokens(reference, [1, 2, 3], 16)
    rng = random.Random(7)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with make(path, two_devices) as llm:
            num_struck = 0
            for _ in range(150):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.03))
                    for _ in range(3):
                        answer = llm.generate([[1, 2, 3]] * 2, GREEDY, use_tqdm=False)[1]
                        assert answer["token_ids"] == expected
                        request_id = llm.add_request([4], GREEDY)
                        llm.abort(request_id)
                        llm.step()
                        for output in llm.generate_stream([1, 2, 3], GREEDY):
                            assert output.error is None
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    num_struck += 1
            assert num_struck > 50
            at_rest(llm)
            assert llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("line", range(2, 60, 4))
def test_an_interrupted_close_is_taken_up_again(tiny_path, line):
    llm = make(tiny_path, line % 8 == 1, enable_prefix_caching=False)
    llm.add_request([1, 2, 3], GREEDY)
    llm.step()
    try:
        with InterruptedAtLines(line):
            llm.close()
    except KeyboardInterrupt:
        pass
    with pytest.raises(EngineClosedError):
        llm.step()
    llm.close()
    assert not hasattr(llm.decode_runner, "model")
    assert not hasattr(llm.prefill_runner, "model")


def test_an_interrupt_of_one_thread_leaves_the_others_alone(tiny_path, no_collections):
    """Ctrl-C in the main thread, which may be running the loop or waiting for another thread that does."""
    with make(tiny_path, False) as llm:
        params = SamplingParams(temperature=0, max_tokens=300)
        answers = []

        def interrupted():
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            llm.generate([[4, 5]] * 1000, params, use_tqdm=False)

        worker = Workers(lambda: answers.extend(llm.generate([[1, 2, 3]] * 2, params, use_tqdm=False)))
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                interrupted()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        worker.join()
        assert [len(answer["token_ids"]) for answer in answers] == [300, 300]
        assert answers[0]["token_ids"] == answers[1]["token_ids"]
        at_rest(llm)


class Stderr:
    """Interrupts the first writing of a progress bar, or fails it."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        if self.error is not None and "Generating" in text:
            error, self.error = self.error, None
            raise error

    def flush(self):
        return


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("broken pipe")])
def test_what_breaks_a_progress_bar_holds_up_no_other_thread(tiny_path, monkeypatch, error):
    """By default tqdm has one lock for all bars, and an interrupt leaves it held."""
    with make(tiny_path, False) as llm:
        monkeypatch.setattr(sys, "stderr", Stderr(error))
        try:
            answers = llm.generate([[1, 2, 3]], GREEDY)
            assert answers[0]["finish_reason"] == "length"
        except KeyboardInterrupt as interrupt:
            assert interrupt is error  # noqa: PT017 - or none came out, where the bar was gone before
        Workers(
            lambda: llm.generate([[1, 2, 3]], GREEDY),
            lambda: llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False),
        ).join()
        monkeypatch.setattr(sys, "stderr", None)
        assert llm.generate([[1, 2, 3]], GREEDY)[0]["finish_reason"] == "length"
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["add_request", "abort", "is_finished", "generate_stream", "stream.close"])
def test_close_from_a_handler_that_breaks_into_a_call_that_only_posts(tiny_path, monkeypatch, name):
    llm = make(tiny_path, False)
    request_id, stream = llm.add_request([1, 2, 3], GREEDY), llm.generate_stream([4, 5], GREEDY)
    take_in = llm._loop.take_in_mail

    def interrupted():
        llm.close()
        take_in()

    monkeypatch.setattr(llm._loop, "take_in_mail", interrupted)
    if name in ("add_request", "generate_stream"):
        with pytest.raises(EngineClosedError):
            calls_of(llm, request_id, stream)[name]()
    else:
        calls_of(llm, request_id, stream)[name]()
    assert not hasattr(llm.decode_runner, "model"), "the pool and the weights are given back"
    assert llm.is_finished()


def test_threads_that_only_post_do_not_hold_up_those_that_run_the_loop(tiny_path, fast_switches):
    done = threading.Event()
    with make(tiny_path, False) as llm:

        def post():
            while not done.is_set():
                llm.abort(llm.add_request([5, 6], GREEDY))

        posting = Workers(post, post)
        try:
            started = time.monotonic()
            for _ in range(5):
                assert len(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]["token_ids"]) == 16
            assert time.monotonic() - started < 200
        finally:
            done.set()
        posting.join()
        while not llm.is_finished():
            llm.step()
        at_rest(llm)


def test_a_stream_goes_on_after_a_handler_has_tried_to_take_from_it(checkpoint):
    path, reference = checkpoint("gqa2")
    with make(path, False) as llm:
        stream = llm.generate_stream([1, 2, 3], GREEDY)
        launch, tries = llm.decode_runner.launch, []

        def interrupted(step):
            if not tries:
                with pytest.raises(EngineBusyError):
                    tries.append(next(stream))
                tries.append(None)
            return launch(step)

        llm.decode_runner.launch = interrupted
        tokens = [token for output in stream for token in output.new_token_ids]
        assert tries == [None]
        assert tokens == tiny.reference_tokens(reference, [1, 2, 3], 16)


def test_a_request_that_comes_while_the_engine_closes_is_refused(tiny_path, monkeypatch):
    llm = make(tiny_path, False)
    make_request = llm._new_request

    def slow(*args, **kwargs):
        new = make_request(*args, **kwargs)
        llm.close()
        return new

    monkeypatch.setattr(llm, "_new_request", slow)
    with pytest.raises(EngineClosedError):
        llm.add_request([1, 2, 3], GREEDY)
    assert not llm._outputs.sequences


def test_what_is_put_twice_or_taken_at_once_is_there_once():
    inbox = Inbox()
    outputs = [RequestOutput(number, [], "") for number in range(2000)]
    taken = [[], [], []]

    def take(mine):
        while sum(map(len, taken)) < 2000:
            inbox.take_all(mine)
            one = inbox.pop()
            mine += [one] if one is not None else []

    workers = Workers(*(lambda mine=mine: take(mine) for mine in taken))
    for output in outputs:
        inbox.put(output)
        assert inbox.was_put_last(output)
    workers.join()
    assert sorted(output.request_id for mine in taken for output in mine) == list(range(2000))
    inbox.put_back(outputs[:2])
    assert [inbox.pop(), inbox.pop(), inbox.pop()] == [*outputs[:2], None]


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_abort_of_a_request_that_waits_in_the_mailbox_is_kept(tiny_path, monkeypatch, interrupted):
    """The loop may be broken off before it has taken the request in."""
    with make(tiny_path, False) as llm:
        monkeypatch.setattr(loop, "MAX_ARRIVALS_PER_TURN", 0)
        request_id = llm.add_request([1, 2, 3], GREEDY)
        llm.abort(request_id)
        with pytest.raises(UnknownRequestError):
            llm.abort(request_id)
        if interrupted:
            monkeypatch.setattr(llm._loop, "launch_steps", lambda: signal.default_int_handler(2, None))
            with pytest.raises(KeyboardInterrupt):
                llm.step()
        monkeypatch.undo()
        outputs = defaultdict(list)
        settle(llm, outputs)
        assert [output.finish_reason for output in outputs[request_id]] == ["abort"]
        assert outputs[request_id][0].new_token_ids == []
        assert not llm._mailbox.aborting
        at_rest(llm)
